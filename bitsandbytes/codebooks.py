"""The code tables: which real number a 4-bit or 8-bit code stands for, and where one code ends and the next begins.

All tables are float32 on the CPU whatever torch's default dtype is; callers move them. The native counterpart is ``csrc/common``.
Sources: NF4 from QLoRA (Dettmers et al. 2023), the dynamic map from 8-bit Optimizers (Dettmers et al. 2021), AF4 from Yoshida 2023.
"""

import functools
from itertools import product

import torch

# Value order equals index order. Level 7 is zero; the steps are quantiles of a standard normal scaled to [-1, 1].
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Bit 3 is the sign; the low bits index these magnitudes, which are not in ascending order.
FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_LEVELS = (*FP4_MAGNITUDES, 0.0, *(-m for m in FP4_MAGNITUDES[1:]))

AF4_LEVELS = (
    1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164,
    0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0,
)  # fmt: skip

INT4_LEVELS = (*range(7, -1, -1), *range(0, -8, -1))

# Decision magnitudes of FP4, ascending, and the low bits of the code between them. They are the constants of the CUDA kernels,
# a few units in the last place away from the true midpoints, and they are part of the format: checkpoints were made with them.
FP4_THRESHOLDS = tuple(
    float.fromhex(h) for h in ("0x1.555572p-9", "0x1.6p-4", "0x1.aaaaaap-3", "0x1.2aaaaap-2", "0x1.aaaaacp-2", "0x1.2aaaap-1", "0x1.aaaaaap-1")
)
FP4_CODES_BY_MAGNITUDE = (0, 1, 6, 7, 4, 5, 2, 3)

# The code that a zero gets, and so what an all-zero block and the unused last nibble of an odd tensor hold.
ZERO_CODE = {"nf4": 7, "fp4": 0}

# What a value that compares with nothing (inf * 0 in a block that holds an infinity, any value next to a NaN) becomes.
NAN_CODE = {"nf4": 15, "fp4": 3}

_LEVELS_4BIT = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "af4": AF4_LEVELS, "int4": INT4_LEVELS}


@functools.cache
def levels(quant_type: str) -> torch.Tensor:
    """The 16 levels of a 4-bit type, float32, scaled so that the largest magnitude is 1. The tensor is shared: do not write to it."""
    table = torch.tensor(_LEVELS_4BIT[quant_type], dtype=torch.float32)
    return table / table.abs().max()


@functools.cache
def nf4_thresholds() -> torch.Tensor:
    """The 15 decision values of NF4: float32 midpoints of neighbouring levels."""
    table = levels("nf4")
    return (table[1:] + table[:-1]) / 2


@functools.cache
def fp4_thresholds() -> torch.Tensor:
    """The 7 decision magnitudes of FP4."""
    return torch.tensor(FP4_THRESHOLDS, dtype=torch.float32)


def midpoints(code: torch.Tensor) -> torch.Tensor:
    """Decision values between neighbouring entries of an ascending code, rounded to float32 as every kernel does."""
    return (code[1:] + code[:-1]) / 2


def identify_4bit(code: torch.Tensor) -> str | None:
    """Name of the 4-bit type that ``code`` (16 values) is the table of: "nf4", "fp4", or None for a table of the caller's own."""
    return _NAMES_BY_TABLE.get(tuple(code.tolist()))


_NAMES_BY_TABLE = {tuple(levels(name).tolist()): name for name in ("nf4", "fp4")}


def get_4bit_type(typename: str, device=None, blocksize: int = 64) -> torch.Tensor:
    """Levels of a 4-bit data type.

    Args:
        typename: "nf4", "fp4", "int4" or "af4".
        device: where to put the table; None means the current CUDA device where there is one, else the CPU.
        blocksize: AF4 depends on the block size and is tabulated for 64 only.

    Returns:
        16 float32 values with the largest magnitude 1, in the order of the codes (descending for int4 and af4).

    Raises:
        NotImplementedError: unknown type, or AF4 with a block size other than 64.
    """
    if typename not in _LEVELS_4BIT:
        raise NotImplementedError(f"4-bit type {typename!r} is not supported; choose one of {sorted(_LEVELS_4BIT)}")
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"the AF4 table exists for blocksize 64 only, got blocksize {blocksize}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return levels(typename).to(device, copy=True)


def _linspace(start: float, stop: float, steps: int) -> torch.Tensor:
    return torch.linspace(start, stop, steps, dtype=torch.float32)


def _padded_and_sorted(values: list[float], scale_to_one: bool = False) -> torch.Tensor:
    """Fills a list of levels up to 256 entries with zeros and sorts it."""
    table = torch.tensor(values + [0.0] * (256 - len(values)), dtype=torch.float32).sort(stable=True).values
    return table / table.max() if scale_to_one else table


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Evenly spaced levels in [-1, 1] (signed) or [0, 1], with unused entries filled by zeros in the middle.

    A signed map gives up one level so that the number of levels is odd and zero is among them.

    Returns:
        256 ascending float32 values.
    """
    give_up_one = signed and (add_zero or total_bits < 8)
    count = 2**total_bits - int(give_up_one)
    values = _linspace(-1.0 if signed else 0.0, 1.0, count)
    middle = count // 2
    return torch.cat([values[:middle], torch.zeros(256 - count, dtype=torch.float32), values[middle:]])


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Quantiles of a standard normal at the two ends of a 256-entry table, zeros between them: the construction behind NF4.

    Args:
        offset: probability at which the outermost quantile is taken.
        use_extra_value: 8 positive and 7 negative levels instead of 7 and 7.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import norm
    except ImportError as error:
        raise ImportError("Scipy is required for `create_normal_map`. Install it with `pip install scipy`.") from error

    def quantiles(count: int) -> list[float]:
        return norm.ppf(_linspace(offset, 0.5, count + 1)[:-1].cpu().numpy()).tolist()

    negative = [-q for q in quantiles(7)]
    return _padded_and_sorted(quantiles(8 if use_extra_value else 7) + negative, scale_to_one=True)


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> torch.Tensor:
    """All values of a small floating-point format, largest magnitude scaled to 1; larger exponent fields mean smaller numbers.

    Raises:
        AssertionError: sign, exponent and precision bits do not add up to ``total_bits``.
    """
    if int(signed) + exponent_bits + precision_bits != total_bits:
        raise AssertionError(
            f"sign ({int(signed)}) + exponent ({exponent_bits}) + precision ({precision_bits}) bits must be total_bits ({total_bits})"
        )
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent, mantissa in product(range(2**exponent_bits), range(2**precision_bits)):
        fraction = mantissa / 2**precision_bits
        magnitude = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        values += [magnitude, -magnitude] if signed else [magnitude]
    return _padded_and_sorted(values, scale_to_one=True)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """The dynamic tree data type: decades from 10^-6 to 1, each split twice as finely as the one below it.

    Source: "8-bit Optimizers via Block-wise Quantization", section 1.2. The rounding of the float32 ``linspace`` is part of the format.

    Returns:
        256 ascending float32 values; signed maps have 0 at index 127 and 1 at 255, and no -1.

    Raises:
        AssertionError: the arguments do not produce exactly ``2 ** total_bits`` levels.
    """
    values = [0.0, 1.0]

    def add_decade(boundaries: int, scale: float) -> None:
        levels_of_decade = midpoints(_linspace(0.1, 1.0, boundaries)) * torch.tensor(scale, dtype=torch.float32)
        values.extend(levels_of_decade.tolist())
        if signed:
            values.extend((-levels_of_decade).tolist())

    fraction_bits = total_bits - 1 - max_exponent_bits
    for i in range(max_exponent_bits):
        steps = 2.0 ** (i + fraction_bits) * (1 if signed else 2)
        add_decade(int(steps + 1), 10.0 ** (i - max_exponent_bits + 1))
    extra = 2**fraction_bits - 1 if fraction_bits >= 0 else 0
    if extra > 0:
        add_decade(extra + 1, 1.0)

    if len(values) != 2**total_bits:
        raise AssertionError(f"max_exponent_bits={max_exponent_bits}, total_bits={total_bits} give {len(values)} levels, not {2**total_bits}")
    return _padded_and_sorted(values)
