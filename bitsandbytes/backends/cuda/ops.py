"""The 4-bit and 8-bit blockwise operators on CUDA.

Each function hands plain pointers and sizes to one C function; ``_ops`` has checked that they fit together. Nothing here waits for the device.
"""

import torch

from .native import DTYPES, I, L, P, QUANT_TYPES, bind, kernels, written

_kernel = kernels("bnb_cuda_dequantize_4bit")

_dequantize_4bit = bind("bnb_cuda_dequantize_4bit", *[P] * 5, L, L, I, I, P)


def _dequantize_4bit_into(out, A, absmax, blocksize, quant_type):
    A, absmax = A.contiguous(), absmax.contiguous()
    _dequantize_4bit(
        A, A.data_ptr(), absmax.data_ptr(), None, None, None, out.numel(), blocksize, QUANT_TYPES[quant_type], DTYPES[out.dtype], out.data_ptr()
    )
    return out


@_kernel("dequantize_4bit")
def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    return _dequantize_4bit_into(torch.empty(shape, dtype=dtype, device=A.device), A, absmax, blocksize, quant_type)


@_kernel("dequantize_4bit.out")
def dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
    written(out, lambda buffer: _dequantize_4bit_into(buffer, A, absmax, blocksize, quant_type))
