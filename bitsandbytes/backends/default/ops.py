"""Blockwise quantisation and 4-bit matrix products in plain PyTorch.

Written to be read: these functions define what every other backend must compute, bit for bit where a code or a dequantised value is
concerned. A tensor is quantised in flat blocks of its contiguous order; the last block may be short.
"""

import torch
from torch.nn.functional import linear, pad

from ... import codebooks
from ..._ops import NESTED_BLOCKSIZE, implement, packed_length
from ...packing import from_cpu_layout, is_cpu_layout
from . import int8, optimizers  # noqa: F401  (register their kernels)

# ------------------------------------------------------------------------------------------------------------------ blockwise


def _scale_blocks(A: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales each block by its largest magnitude.

    Returns:
        The elements of A divided by their block's absmax, float32 [A.numel()] in [-1, 1] or NaN, and absmax, float32 [number of blocks].
        "Divided" means multiplied by the rounded reciprocal, in full and short blocks alike. A zero is 0 whatever its block holds besides
        NaN; an infinity, and everything in a block with a NaN, is NaN.
    """
    count = A.numel()
    blocksize = min(blocksize, max(count, 1))
    flat = A.reshape(-1).to(torch.float32)
    grid = pad(flat, (0, -count % blocksize)).view(-1, blocksize)
    absmax = grid.abs().amax(dim=1) if count else flat.new_empty(0)
    inverse = torch.where(absmax > 0, 1.0 / absmax, absmax)  # an all-zero block keeps the factor 0, a NaN block NaN
    scaled = (grid * inverse[:, None]).clamp_(-1.0, 1.0)
    # Next to denormals only, 1 / absmax is inf and 0 * inf is NaN. The zero of such a block is a zero all the same.
    scaled = torch.where((grid == 0) & ~absmax.isnan()[:, None], 0.0, scaled)
    return scaled.view(-1)[:count], absmax


def _unscale_blocks(values: torch.Tensor, absmax: torch.Tensor, blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies a flat float32 tensor by its blocks' absmax in place and rounds once to ``dtype``."""
    count = values.numel()
    whole = count // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    if whole < count:
        values[whole:].mul_(absmax[whole // blocksize])
    return values.to(dtype)


def _count_below(values: torch.Tensor, thresholds: torch.Tensor, nan_code: int) -> torch.Tensor:
    """For each value the number of ascending thresholds strictly below it (a tie goes to the lower code)."""
    codes = torch.bucketize(values, thresholds, out_int32=True)
    return codes.masked_fill_(values.isnan(), nan_code)


@implement("quantize_blockwise", "default")
def quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest entry of ``code``, uint8 of A's shape, and absmax, float32 [blocks]."""
    scaled, absmax = _scale_blocks(A, blocksize)
    codes = _count_below(scaled, codebooks.midpoints(code), nan_code=255)
    return codes.to(torch.uint8).view(A.shape), absmax


@implement("dequantize_blockwise", "default")
def dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """``code[A] * absmax`` in float32, rounded once to ``dtype``; A's shape."""
    values = code[A.reshape(-1).to(torch.int32)]
    return _unscale_blocks(values, absmax, blocksize, dtype).view(A.shape)


# ---------------------------------------------------------------------------------------------------------------------- 4 bit


def _nf4_codes(scaled: torch.Tensor) -> torch.Tensor:
    return _count_below(scaled, codebooks.nf4_thresholds().to(scaled.device), codebooks.NAN_CODE["nf4"])


def _fp4_codes(scaled: torch.Tensor) -> torch.Tensor:
    steps = _count_below(scaled.abs(), codebooks.fp4_thresholds().to(scaled.device), nan_code=0)
    magnitudes = torch.tensor(codebooks.FP4_CODES_BY_MAGNITUDE, dtype=torch.int32, device=scaled.device)[steps]
    codes = torch.where((scaled < 0) & (magnitudes != 0), magnitudes + 8, magnitudes)
    return codes.masked_fill_(scaled.isnan(), codebooks.NAN_CODE["fp4"])


_CODES_4BIT = {"nf4": _nf4_codes, "fp4": _fp4_codes}


def _pack(codes: torch.Tensor, zero_code: int, storage: torch.dtype) -> torch.Tensor:
    """Two codes a byte, the first in the high nibble; bytes seen as ``storage``, the last element filled up with zero codes."""
    count = 2 * storage.itemsize * packed_length(codes.numel(), storage)
    pairs = pad(codes, (0, count - codes.numel()), value=zero_code).to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).view(storage).unsqueeze(1)


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` 4-bit codes of a packed buffer, int32 [count]."""
    packed_bytes = packed.contiguous().view(-1).view(torch.uint8)[: (count + 1) // 2]
    return torch.stack((packed_bytes >> 4, packed_bytes & 15), dim=1).view(-1)[:count].to(torch.int32)


@implement("quantize_4bit", "default")
def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Packed codes, ``quant_storage`` [n, 1], and absmax, float32 [blocks]."""
    scaled, absmax = _scale_blocks(A, blocksize)
    return _pack(_CODES_4BIT[quant_type](scaled), codebooks.ZERO_CODE[quant_type], quant_storage), absmax


def _dequantize_with_table(A, absmax, blocksize, table, shape, dtype):
    count = torch.Size(shape).numel()
    values = table.to(A.device)[_unpack(A, count)]
    return _unscale_blocks(values, absmax, blocksize, dtype).view(tuple(shape))


@implement("dequantize_4bit", "default")
def dequantize_4bit(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """``level[code] * absmax`` in float32, rounded once to ``dtype``; of shape ``shape``."""
    return _dequantize_with_table(A, absmax, blocksize, codebooks.levels(quant_type), shape, dtype)


def expand_statistics(
    absmax_8bit: torch.Tensor, absmax: torch.Tensor, absmax_code: torch.Tensor, absmax_offset: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Undoes the quantisation of the statistics: one float32 absmax for each block of the weight."""
    return dequantize_blockwise(absmax_8bit.reshape(-1), absmax, absmax_code, NESTED_BLOCKSIZE, torch.float32) + absmax_offset.float()


@implement("gemm_4bit", "default")
def gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    """A times the transposed dequantised weight, plus bias; the weight is rounded to A's dtype first."""
    if absmax_8bit is not None:
        absmax = expand_statistics(absmax_8bit, absmax, absmax_code, absmax_offset)
    return linear(A, dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype), bias)


@implement("gemm_4bit_backward", "default")
def gemm_4bit_backward(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    """A times the dequantised weight, which is rounded to A's dtype first."""
    if absmax_8bit is not None:
        absmax = expand_statistics(absmax_8bit, absmax, absmax_code, absmax_offset)
    return A @ dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)


@implement("gemv_4bit", "default")
def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    """As ``gemm_4bit`` without bias, for a table of 16 levels of the caller's choice. Also takes weights in the published CPU layout."""
    if is_cpu_layout(absmax):
        B, absmax = from_cpu_layout(B, absmax.view(-1, shapeB[0]), shapeB)
    return linear(A, _dequantize_with_table(B, absmax, blocksize, code, shapeB, A.dtype))


# --------------------------------------------------------------------------------------------------------------- forms with out


def _register_out_form(name: str) -> None:
    """``<name>.out`` computes with whatever kernel the device has and copies: right everywhere, if not the least memory."""

    @implement(f"{name}.out", "default")
    def write_to_out(*args, out=None):
        if out is None:
            *args, out = args
        out.copy_(getattr(torch.ops.bitsandbytes, name)(*args))


for _name in ("dequantize_4bit", "dequantize_blockwise", "gemv_4bit"):
    _register_out_form(_name)
