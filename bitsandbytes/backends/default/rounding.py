"""Stochastic rounding: a float32 value becomes one of its two neighbours in a 16-bit format, the nearer the likelier.

On average nothing is lost, so that updates far below half a unit in the last place still move a bfloat16 or float16 parameter.

The random number of an element is a hash of a seed, the step and the element's index in row order. It depends on nothing else: not on the
backend, the number of threads, or which tensors share a call. All integer arithmetic is modulo 2**32:

    key(seed, step) = mix(mix(seed) + step)
    r(i)            = mix(low32(i) ^ key ^ mix(high32(i)))      of which the upper 16 bits are used

``mix`` is "lowbias32" of Chris Wellons, https://nullprogram.com/blog/2018/07/31/. mix(0) is 0, so the last term costs nothing below 2**32.
"""

import torch

_MASK = 0xFFFFFFFF


def mix(x):
    """Spreads 32 bits over 32 bits, one to one. Takes an int or an int64 tensor of values below 2**32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_16_bits(shape: torch.Size, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """int32 in [0, 2**16) for every element of ``shape``."""
    key = mix((mix(seed & _MASK) + step) & _MASK)
    index = torch.arange(shape.numel(), dtype=torch.int64, device=device).view(shape)
    return (mix((index & _MASK) ^ key ^ mix(index >> 32)) >> 16).to(torch.int32)


def round_stochastically(value: torch.Tensor, dtype: torch.dtype, seed: int, step: int) -> torch.Tensor:
    """Rounds float32 to bfloat16 or float16. What the format can say stays as it is; NaN and infinity are rounded as always.

    The bits that are cut off, as a fraction of the last bit kept, are compared with the random number by adding it below and cutting:
    16 bits for bfloat16, 13 for float16. Below 2**-14, where the steps of float16 no longer shrink, the fraction is taken in fixed point with
    16 bits after the last one kept; finer bits of the float32 value are dropped.
    """
    random = random_16_bits(value.shape, seed, step, value.device)
    bits = value.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + random) & ~0xFFFF).view(torch.float32)
    else:
        rounded = ((bits + (random >> 3)) & ~0x1FFF).view(torch.float32)
        fixed = ((value.abs().clamp(max=2.0**-14) * 2.0**40).to(torch.int32) + random) >> 16
        rounded = torch.where(value.abs() < 2.0**-14, torch.copysign(fixed.to(torch.float32) * 2.0**-24, value), rounded)
    return torch.where(value.isfinite(), rounded, value).to(dtype)
