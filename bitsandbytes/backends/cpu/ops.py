"""The 4-bit and 8-bit blockwise operators on the CPU, by the native library. Operators without a native kernel here run on the reference.

Each function hands plain pointers and sizes to one C function; ``_ops`` has checked that they fit together. Tensors are made contiguous first
(most are). The number of threads is torch's, also on autograd's threads, where the OpenMP default would be another.
"""

import torch

from ... import codebooks
from ..._ops import blocks, packed_length
from ...cextension import check_status
from ...packing import from_cpu_layout, is_cpu_layout
from ..default import ops as reference
from ..marshalling import DTYPES, QUANT_TYPES, I, L, P, written
from . import memory
from .native import bind, kernels

_kernel = kernels("bnb_cpu_gemm_4bit_backward")

_quantize_4bit = bind("bnb_cpu_quantize_4bit", P, I, L, L, I, P, P, I)
_dequantize_4bit = bind("bnb_cpu_dequantize_4bit", P, P, L, L, I, I, P, I)
_quantize_blockwise = bind("bnb_cpu_quantize_blockwise", P, P, I, L, L, P, P, I)
_dequantize_blockwise = bind("bnb_cpu_dequantize_blockwise", P, P, P, L, L, I, P, I)
_gemm_4bit = bind("bnb_cpu_gemm_4bit", *[P] * 8, *[L] * 4, I, I, I)
_gemm_4bit_backward = bind("bnb_cpu_gemm_4bit_backward", *[P] * 7, *[L] * 4, I, I, I)


@_kernel("quantize_4bit")
def quantize_4bit(A, blocksize, quant_type, quant_storage):
    A = A.contiguous()
    n = A.numel()
    absmax = A.new_empty(blocks(n, blocksize), dtype=torch.float32)
    packed = A.new_empty((packed_length(n, quant_storage), 1), dtype=quant_storage)
    _fill_up(packed, n, quant_type)
    status = _quantize_4bit(
        A.data_ptr(), DTYPES[A.dtype], n, blocksize, QUANT_TYPES[quant_type], absmax.data_ptr(), packed.data_ptr(), torch.get_num_threads()
    )
    check_status(status, "quantize_4bit")
    return packed, absmax


def _dequantize_4bit_into(out, A, absmax, blocksize, quant_type):
    A, absmax = A.contiguous(), absmax.contiguous()
    status = _dequantize_4bit(
        A.data_ptr(), absmax.data_ptr(), out.numel(), blocksize, QUANT_TYPES[quant_type], DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads()
    )
    check_status(status, "dequantize_4bit")
    return out


@_kernel("dequantize_4bit")
def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    return _dequantize_4bit_into(memory.empty(shape, dtype, A), A, absmax, blocksize, quant_type)


@_kernel("dequantize_4bit.out")
def dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
    written(out, lambda buffer: _dequantize_4bit_into(buffer, A, absmax, blocksize, quant_type))


@_kernel("quantize_blockwise")
def quantize_blockwise(A, code, blocksize):
    A, code = A.contiguous(), code.contiguous()
    n = A.numel()
    absmax = A.new_empty(blocks(n, blocksize), dtype=torch.float32)
    codes = A.new_empty(A.shape, dtype=torch.uint8)
    status = _quantize_blockwise(
        code.data_ptr(), A.data_ptr(), DTYPES[A.dtype], n, blocksize, absmax.data_ptr(), codes.data_ptr(), torch.get_num_threads()
    )
    check_status(status, "quantize_blockwise")
    return codes, absmax


def _dequantize_blockwise_into(out, A, absmax, code, blocksize):
    A, absmax, code = A.contiguous(), absmax.contiguous(), code.contiguous()
    status = _dequantize_blockwise(
        code.data_ptr(), A.data_ptr(), absmax.data_ptr(), A.numel(), blocksize, DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads()
    )
    check_status(status, "dequantize_blockwise")
    return out


@_kernel("dequantize_blockwise")
def dequantize_blockwise(A, absmax, code, blocksize, dtype):
    return _dequantize_blockwise_into(memory.empty(A.shape, dtype, A), A, absmax, code, blocksize)


@_kernel("dequantize_blockwise.out")
def dequantize_blockwise_out(A, absmax, code, blocksize, dtype, out):
    written(out, lambda buffer: _dequantize_blockwise_into(buffer, A, absmax, code, blocksize))


def _nested_pointers(absmax_8bit, absmax_code, absmax_offset):
    """Addresses of nested statistics, and the tensors behind them, which the caller keeps alive until the call is over."""
    if absmax_8bit is None:
        return (None, None, None), None
    offset = absmax_offset if absmax_offset.dtype is torch.float32 else absmax_offset.float()
    codes, table = absmax_8bit.contiguous(), absmax_code.contiguous()
    return (codes.data_ptr(), table.data_ptr(), offset.data_ptr()), (codes, table, offset)


@_kernel("gemm_4bit")
def gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    N, K = shapeB
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    nested, _alive = _nested_pointers(absmax_8bit, absmax_code, absmax_offset)
    if bias is not None:
        bias = bias.contiguous()
    rows = A.shape[:-1]
    out = A.new_empty((*rows, N))
    status = _gemm_4bit(
        A.data_ptr(), B.data_ptr(), absmax.data_ptr(), *nested, None if bias is None else bias.data_ptr(), out.data_ptr(),
        rows.numel(), N, K, blocksize, QUANT_TYPES[quant_type], DTYPES[A.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if status:  # a call for each layer
        check_status(status, "gemm_4bit")
    return out


@_kernel("gemm_4bit_backward")
def gemm_4bit_backward(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    N, K = shapeB
    A, B, absmax = A.contiguous(), B.contiguous(), absmax.contiguous()
    nested, _alive = _nested_pointers(absmax_8bit, absmax_code, absmax_offset)
    rows = A.shape[:-1]
    out = A.new_empty((*rows, K))
    status = _gemm_4bit_backward(
        A.data_ptr(), B.data_ptr(), absmax.data_ptr(), *nested, out.data_ptr(),
        rows.numel(), N, K, blocksize, QUANT_TYPES[quant_type], DTYPES[A.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status(status, "gemm_4bit_backward")
    return out


@_kernel("gemv_4bit")
def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    quant_type = codebooks.identify_4bit(code)
    if quant_type is None:
        return reference.gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    if is_cpu_layout(absmax):
        B, absmax = from_cpu_layout(B, absmax.view(-1, shapeB[0]), shapeB)
    return gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type)


def _fill_up(packed: torch.Tensor, count: int, quant_type: str) -> None:
    """Gives the bytes of the last storage element that hold no codes their value: zero codes."""
    used = (count + 1) // 2
    if used < packed.numel() * packed.element_size():
        zero = codebooks.ZERO_CODE[quant_type]
        packed.view(-1).view(torch.uint8)[used:] = zero << 4 | zero
