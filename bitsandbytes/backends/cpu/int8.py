"""LLM.int8() on the CPU, by the native library.

The functions are those of ``backends/default/int8.py``, which says what they compute: codes, statistics and products bit for bit, floating point
results up to the order of fp32 sums.
"""

import torch

from ...cextension import check_status
from ..marshalling import DTYPES, D, I, L, P, address
from ..native_int8 import operators
from . import memory
from .native import bind, kernels

_kernel = kernels("bnb_cpu_int8_linear")

_quantize = bind("bnb_cpu_int8_quantize", P, I, L, L, D, P, P, P, P, P, I)
_dequantize = bind("bnb_cpu_int8_dequantize", P, P, L, L, P, I)
_matmul = bind("bnb_cpu_int8_matmul", P, P, P, L, L, L, I)
_mm_dequant = bind("bnb_cpu_int8_mm_dequant", P, P, P, P, P, L, L, I, I)
_scaled_mm = bind("bnb_cpu_int8_scaled_mm", *[P] * 6, L, P, P, L, L, L, I, I)
_linear = bind("bnb_cpu_int8_linear", P, P, P, P, D, P, P, L, L, L, I, I)
_linear_backward = bind("bnb_cpu_int8_linear_backward", P, P, P, P, L, L, L, I, I)


def _plain(bias):
    """A bias as the kernels read it."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def _outlier_mask(A, threshold):
    """Memory for the truth values of A's columns; None where there is no threshold."""
    return A.new_empty(A.shape[-1], dtype=torch.bool) if threshold > 0.0 else None


def _quantise(A, threshold, with_columns):
    A = A.contiguous()
    rows, columns = A.shape[:-1].numel(), A.shape[-1]
    is_outlier = _outlier_mask(A, threshold)
    codes, stats = torch.empty_like(A, dtype=torch.int8), A.new_empty(rows, dtype=torch.float32)
    col_codes, col_stats = (torch.empty_like(codes), A.new_empty(columns, dtype=torch.float32)) if with_columns else (None, None)
    status = _quantize(
        A.data_ptr(), DTYPES[A.dtype], rows, columns, threshold, address(is_outlier), stats.data_ptr(), codes.data_ptr(), address(col_stats),
        address(col_codes), torch.get_num_threads(),
    )  # fmt: skip
    check_status(status, "int8_double_quant" if with_columns else "int8_vectorwise_quant")
    return codes, col_codes, stats, col_stats, None if is_outlier is None else is_outlier.nonzero().flatten()


@_kernel("int8_vectorwise_dequant")
def int8_vectorwise_dequant(A, stats):
    A, stats = A.contiguous(), stats.contiguous()
    out = memory.empty(A.shape, torch.float32, A)
    status = _dequantize(A.data_ptr(), stats.data_ptr(), A.shape[:-1].numel(), A.shape[-1], out.data_ptr(), torch.get_num_threads())
    check_status(status, "int8_vectorwise_dequant")
    return out


def _matmul_into(out, A, B):
    A, B = A.contiguous(), B.contiguous()
    N, K = B.shape
    status = _matmul(A.data_ptr(), B.data_ptr(), out.data_ptr(), A.shape[:-1].numel(), N, K, torch.get_num_threads())
    check_status(status, "int8_linear_matmul")
    return out


@_kernel("int8_mm_dequant")
def int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    A, row_stats, col_stats, bias = A.contiguous(), row_stats.contiguous(), col_stats.contiguous(), _plain(bias)
    out = torch.empty_like(A, dtype=dtype or torch.float16)
    status = _mm_dequant(
        A.data_ptr(), row_stats.data_ptr(), col_stats.data_ptr(), address(bias), out.data_ptr(), A.shape[:-1].numel(), A.shape[-1],
        DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status(status, "int8_mm_dequant")
    return out


def _scaled_product(CA, CB, SCA, SCB, bias, dtype, A=None, outlier_cols=None):
    CA, CB, SCA, SCB, bias = CA.contiguous(), CB.contiguous(), SCA.contiguous(), SCB.contiguous(), _plain(bias)
    N, K = CB.shape
    rows = CA.shape[:-1]
    out = CA.new_empty((*rows, N), dtype=dtype)
    status = _scaled_mm(
        CA.data_ptr(), CB.data_ptr(), SCA.data_ptr(), SCB.data_ptr(), address(A), address(outlier_cols),
        0 if outlier_cols is None else outlier_cols.numel(), address(bias), out.data_ptr(), rows.numel(), N, K, DTYPES[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    check_status(status, "int8_scaled_mm")
    return out


int8_vectorwise_quant, int8_double_quant, int8_linear_matmul, int8_linear_matmul_out, int8_scaled_mm, int8_mixed_scaled_mm = operators(
    _kernel, _quantise, _matmul_into, _scaled_product
)


@_kernel("int8_linear")
def int8_linear(A, CB, SCB, bias=None, threshold=0.0):
    A, CB, SCB = A.contiguous(), CB.contiguous(), SCB.contiguous()
    bias = _plain(bias)
    N, K = CB.shape
    rows = A.shape[:-1]
    is_outlier = _outlier_mask(A, threshold)
    out = A.new_empty((*rows, N))
    status = _linear(
        A.data_ptr(), CB.data_ptr(), SCB.data_ptr(), address(bias), threshold, address(is_outlier), out.data_ptr(), rows.numel(), N, K,
        DTYPES[A.dtype], torch.get_num_threads(),
    )  # fmt: skip
    check_status(status, "int8_linear")
    return out, A.new_empty(0, dtype=torch.bool) if is_outlier is None else is_outlier


@_kernel("int8_linear_backward")
def int8_linear_backward(grad, CB, SCB):
    grad, CB, SCB = grad.contiguous(), CB.contiguous(), SCB.contiguous()
    N, K = CB.shape
    rows = grad.shape[:-1]
    out = grad.new_empty((*rows, K))
    status = _linear_backward(
        grad.data_ptr(), CB.data_ptr(), SCB.data_ptr(), out.data_ptr(), rows.numel(), N, K, DTYPES[grad.dtype], torch.get_num_threads()
    )
    check_status(status, "int8_linear_backward")
    return out
