"""The 4-bit and 8-bit blockwise operators on CUDA.

Each function hands plain pointers and sizes to one C function; ``_ops`` has checked that they fit together. Nothing here waits for the device.
"""

import torch

from ... import codebooks
from ..._ops import blocks, packed_length
from ..marshalling import DTYPES, QUANT_TYPES, I, L, P, written
from .native import bind, kernels

_kernel = kernels("bnb_cuda_quantize_4bit")

_quantize_4bit = bind("bnb_cuda_quantize_4bit", P, I, L, L, I, P, P)
_dequantize_4bit = bind("bnb_cuda_dequantize_4bit", *[P] * 5, L, L, I, I, P)
_quantize_blockwise = bind("bnb_cuda_quantize_blockwise", P, P, I, L, L, P, P)
_dequantize_blockwise = bind("bnb_cuda_dequantize_blockwise", P, P, P, L, L, I, P)


@_kernel("quantize_4bit")
def quantize_4bit(A, blocksize, quant_type, quant_storage):
    A = A.contiguous()
    n = A.numel()
    absmax = torch.empty(blocks(n, blocksize), dtype=torch.float32, device=A.device)
    packed = torch.empty((packed_length(n, quant_storage), 1), dtype=quant_storage, device=A.device)
    _fill_up(packed, n, quant_type)
    _quantize_4bit(A, A.data_ptr(), DTYPES[A.dtype], n, blocksize, QUANT_TYPES[quant_type], absmax.data_ptr(), packed.data_ptr())
    return packed, absmax


def _fill_up(packed: torch.Tensor, count: int, quant_type: str) -> None:
    """Gives the bytes of the last storage element that hold no codes their value: zero codes."""
    used = (count + 1) // 2
    if used < packed.numel() * packed.element_size():
        zero = codebooks.ZERO_CODE[quant_type]
        packed.view(-1).view(torch.uint8)[used:] = zero << 4 | zero


def dequantize_4bit_into(out, A, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    """Dequantises as many elements as ``out``, which is contiguous, has; nested statistics, contiguous and float32, are decoded on the way."""
    A, absmax = A.contiguous(), absmax.contiguous()
    nested = (None, None, None) if absmax_8bit is None else (absmax_8bit.data_ptr(), absmax_code.data_ptr(), absmax_offset.data_ptr())
    _dequantize_4bit(A, A.data_ptr(), absmax.data_ptr(), *nested, out.numel(), blocksize, QUANT_TYPES[quant_type], DTYPES[out.dtype], out.data_ptr())
    return out


@_kernel("dequantize_4bit")
def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    return dequantize_4bit_into(torch.empty(shape, dtype=dtype, device=A.device), A, absmax, blocksize, quant_type)


@_kernel("dequantize_4bit.out")
def dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
    written(out, lambda buffer: dequantize_4bit_into(buffer, A, absmax, blocksize, quant_type))


@_kernel("quantize_blockwise")
def quantize_blockwise(A, code, blocksize):
    A, code = A.contiguous(), code.contiguous()
    n = A.numel()
    absmax = torch.empty(blocks(n, blocksize), dtype=torch.float32, device=A.device)
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    _quantize_blockwise(A, code.data_ptr(), A.data_ptr(), DTYPES[A.dtype], n, blocksize, absmax.data_ptr(), codes.data_ptr())
    return codes, absmax


def dequantize_blockwise_into(out, A, absmax, code, blocksize):
    A, absmax, code = A.contiguous(), absmax.contiguous(), code.contiguous()
    _dequantize_blockwise(A, code.data_ptr(), A.data_ptr(), absmax.data_ptr(), A.numel(), blocksize, DTYPES[out.dtype], out.data_ptr())
    return out


@_kernel("dequantize_blockwise")
def dequantize_blockwise(A, absmax, code, blocksize, dtype):
    return dequantize_blockwise_into(torch.empty(A.shape, dtype=dtype, device=A.device), A, absmax, code, blocksize)


@_kernel("dequantize_blockwise.out")
def dequantize_blockwise_out(A, absmax, code, blocksize, dtype, out):
    written(out, lambda buffer: dequantize_blockwise_into(buffer, A, absmax, code, blocksize))
