"""The meaning of codes, one element at a time, for all kernels: the counterpart of ``csrc/common/quantize.h``.

Bit for bit as the reference, which takes care in four places. Division and square root are the correctly rounded ones (``div_rn``, ``sqrt_rn``):
the plain operators become approximations on a GPU. Multiply-adds are fused only where ``tl.fma`` says so (see ``launch``). Largest magnitudes are
found among the bits, where a NaN is above infinity and so prevails. And every comparison with a threshold is one that a NaN fails.
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
_QUIET_NAN_BITS = tl.constexpr(0x7FC00000)
_LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)

# Low bits of the FP4 codes by rank of their magnitude, a nibble each: 0, 1, 6, 7, 4, 5, 2, 3.
_FP4_CODE_OF_RANK = tl.constexpr(0x32547610)

_INT8_MAX = tl.constexpr(127.0)
PER_CODE = tl.constexpr(1.0 / 127.0)
PER_PRODUCT = tl.constexpr(1.0 / (127.0 * 127.0))
_ROUNDING_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a number below 2**22 it rounds that to the nearest integer, ties to even


@triton.jit
def magnitude_bits(x):
    """Bits of the magnitude as int32, which are ordered like the magnitudes themselves."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(bits):
    """The float of the largest magnitude bits; one NaN for all of them."""
    return tl.where(bits > INFINITY_BITS, _QUIET_NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def ratio_to(numerator, x):
    """A number divided by each x, correctly rounded."""
    return tl.div_rn(tl.zeros_like(x) + numerator, x)


@triton.jit
def inverse_absmax(absmax):
    return tl.where(absmax == 0.0, 0.0, ratio_to(1.0, absmax))


@triton.jit
def normalise(x, inverse):
    """x times the inverse absmax of its block, in [-1, 1] or NaN. Next to denormals only the inverse is infinite; zero is zero all the same."""
    v = x * inverse
    v = tl.where(v > 1.0, 1.0, tl.where(v < -1.0, -1.0, v))
    return tl.where((x == 0.0) & (inverse > _LARGEST_FLOAT), 0.0, v)


@triton.jit
def count_below(v, table, STEPS: tl.constexpr, OF_LEVELS: tl.constexpr):
    """For each v the number of ascending thresholds below it, of which there are 2**STEPS - 1; all of them for NaN.

    ``table`` holds the thresholds, or the levels (``OF_LEVELS``) whose midpoints they are.
    """
    count = tl.zeros(v.shape, dtype=tl.int32)
    for i in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - i)
        entry = table + count + (step - 1)
        threshold = tl.load(entry)
        if OF_LEVELS:
            threshold = (threshold + tl.load(entry + 1)) * 0.5
        count += tl.where(v <= threshold, 0, step)
    return count


@triton.jit
def fp4_code(v, thresholds):
    rank = count_below(tl.abs(v), thresholds, 3, False)
    code = (_FP4_CODE_OF_RANK >> (rank * 4)) & 7
    return tl.where((v < 0.0) & (code != 0), code + 8, code)


@triton.jit
def int8_code(x, inverse):
    """x * inverse, rounded to the nearest int8, ties to even; 0 for what is no number."""
    v = x * inverse
    v = tl.where(v > _INT8_MAX, _INT8_MAX, tl.where(v < -_INT8_MAX, -_INT8_MAX, v))
    rounded = (v + _ROUNDING_SHIFT) - _ROUNDING_SHIFT
    return tl.where(v == v, rounded, 0.0).to(tl.int8)


@triton.jit
def inverse_int8_scale(stat):
    return ratio_to(_INT8_MAX, stat)
