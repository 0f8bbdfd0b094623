"""LLM.int8() on CUDA, by the native library.

The functions are those of ``backends/default/int8.py``, which says what they compute: codes, statistics and products bit for bit, floating point
results up to the order of fp32 sums. What the layer calls, ``int8_linear`` and ``int8_linear_backward``, waits for nothing and takes its memory from
torch, so that it can be captured in a CUDA graph; operators that return the list of outlier columns wait for its length.
"""

import torch

from ..marshalling import DTYPES, D, I, L, P, address
from ..native_int8 import operators
from .native import bind, kernels

_kernel = kernels("bnb_cuda_int8_linear")

_quantize = bind("bnb_cuda_int8_quantize", P, I, L, L, D, *[P] * 7)
_dequantize = bind("bnb_cuda_int8_dequantize", P, L, P, L, L, I, P)
_matmul = bind("bnb_cuda_int8_matmul", P, P, P, L, L, L, I)
_mm_dequant = bind("bnb_cuda_int8_mm_dequant", P, P, P, P, I, P, L, L, I)
_scaled_mm = bind("bnb_cuda_int8_scaled_mm", *[P] * 5, P, L, P, I, P, L, L, L, I, I)
_linear = bind("bnb_cuda_int8_linear", P, P, P, P, I, D, P, P, L, P, L, L, L, I, I)
_linear_backward = bind("bnb_cuda_int8_linear_backward", P, P, P, P, L, L, L, I, I)

# Kernels of the C interface; 0 lets the library choose.
AUTO, ROWS, NARROW, MIDDLE, WIDE = range(5)
SIMPLE_BACKWARD, TILED_BACKWARD = 1, 2

# From so many tokens on, the plain product of codes is cuBLASLt's. A prediction: it multiplies at twice the rate of the kernels here, which know no
# wgmma, and pays that back once both are bound by arithmetic.
LIBRARY_PRODUCT_TOKENS = 512

# Up to so many tokens the gradient is multiplied from codes; beyond that the weight is dequantised, in slabs of columns of at most so many bytes.
FUSED_BACKWARD_TOKENS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 8}
SLAB_BYTES = 32 << 20

# Tokens whose codes int8_linear holds at a time, and what its workspace is in multiples of (csrc/api/cuda_int8_api.cpp).
_SLAB_TOKENS = 8192
_ALIGNMENT = 16


def _bias(bias):
    """The address and dtype of a bias, and the tensor that they are of."""
    if bias is None:
        return None, 0, None
    bias = bias.contiguous()
    return bias.data_ptr(), DTYPES[bias.dtype], bias


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# ------------------------------------------------------------------------------------------------------------------ quantisation


def _quantise(A, threshold, with_columns):
    A = A.contiguous()
    rows, columns = A.shape[:-1].numel(), A.shape[-1]
    codes, stats = torch.empty_like(A, dtype=torch.int8), A.new_empty(rows, dtype=torch.float32)
    col_codes, col_stats = (torch.empty_like(codes), A.new_empty(columns, dtype=torch.float32)) if with_columns else (None, None)
    mask = found = count = None
    if threshold > 0.0:
        mask, found, count = A.new_empty(columns, dtype=torch.bool), A.new_empty(columns, dtype=torch.int64), A.new_empty(1, dtype=torch.int64)
    _quantize(
        A, A.data_ptr(), DTYPES[A.dtype], rows, columns, threshold, address(mask), address(found), address(count), stats.data_ptr(),
        codes.data_ptr(), address(col_stats), address(col_codes),
    )  # fmt: skip
    return codes, col_codes, stats, col_stats, None if found is None else found[: count.item()].clone()


@_kernel("int8_vectorwise_dequant")
def int8_vectorwise_dequant(A, stats):
    A, stats = A.contiguous(), stats.contiguous()
    out = torch.empty_like(A, dtype=torch.float32)
    _dequantise_into(out, A, stats)
    return out


def _dequantise_into(out, codes, stats) -> None:
    """Dequantises rows of ``codes``, which may lie apart, into contiguous ``out``."""
    columns = out.shape[-1]
    stride = codes.stride(0) if codes.dim() == 2 and not codes.is_contiguous() else columns
    _dequantize(
        codes, codes.data_ptr(), stride, stats.data_ptr(), out.shape[:-1].numel(), columns, DTYPES[out.dtype], out.data_ptr()
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- product


def _suits_library(A, M, N, K) -> bool:
    """Whether ``torch._int_mm``, which is cuBLASLt with torch's handle and workspace, multiplies these codes, and should."""
    is_there = A.is_cuda and torch.version.hip is None  # ROCm has it for some GPUs only
    return is_there and M >= LIBRARY_PRODUCT_TOKENS and K > 0 and K % 8 == 0 and N > 0 and N % 8 == 0


def _matmul_into(out, A, B, kernel=AUTO):
    A, B = A.contiguous(), B.contiguous()
    (N, K), M = B.shape, A.shape[:-1].numel()
    if kernel == AUTO and _suits_library(A, M, N, K):
        torch._int_mm(A.view(M, K), B.t(), out=out.view(M, N))
    else:
        _matmul(A, A.data_ptr(), B.data_ptr(), out.data_ptr(), M, N, K, kernel)
    return out


@_kernel("int8_mm_dequant")
def int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    A, row_stats, col_stats = A.contiguous(), row_stats.contiguous(), col_stats.contiguous()
    bias_address, bias_dtype, bias = _bias(bias)
    out = torch.empty_like(A, dtype=dtype or torch.float16)
    _mm_dequant(
        A, A.data_ptr(), row_stats.data_ptr(), col_stats.data_ptr(), bias_address, bias_dtype, out.data_ptr(), A.shape[:-1].numel(), A.shape[-1],
        DTYPES[out.dtype],
    )  # fmt: skip
    return out


def scaled_product(CA, CB, SCA, SCB, bias, dtype, A=None, outlier_cols=None, kernel=AUTO):
    """The product of codes in floating point, plus that of the outlier columns, which are int64 and not negative, of contiguous A."""
    CA, CB, SCA, SCB = CA.contiguous(), CB.contiguous(), SCA.contiguous(), SCB.contiguous()
    bias_address, bias_dtype, bias = _bias(bias)
    N, K = CB.shape
    rows = CA.shape[:-1]
    out = CA.new_empty((*rows, N), dtype=dtype)
    _scaled_mm(
        CA, CA.data_ptr(), CB.data_ptr(), SCA.data_ptr(), SCB.data_ptr(), address(A), address(outlier_cols),
        0 if outlier_cols is None else outlier_cols.numel(), bias_address, bias_dtype, out.data_ptr(), rows.numel(), N, K, DTYPES[dtype], kernel,
    )  # fmt: skip
    return out


int8_vectorwise_quant, int8_double_quant, int8_linear_matmul, int8_linear_matmul_out, int8_scaled_mm, int8_mixed_scaled_mm = operators(
    _kernel, _quantise, _matmul_into, scaled_product
)


# ------------------------------------------------------------------------------------------------------------------------- layer


def workspace_bytes(M: int, K: int, has_threshold: bool) -> int:
    """What ``bnb_cuda_int8_linear`` needs: the list of outlier columns and its length, statistics, and the codes of a slab of tokens."""
    outliers = _aligned(8 * K) + _ALIGNMENT if has_threshold else 0
    return outliers + 64 * M + min(M, _SLAB_TOKENS) * _aligned(K)


def linear(A, CB, SCB, bias=None, threshold=0.0, kernel=AUTO):
    """``int8_linear`` by a kernel of one's choice."""
    A, CB, SCB = A.contiguous(), CB.contiguous(), SCB.contiguous()
    bias_address, bias_dtype, bias = _bias(bias)
    N, K = CB.shape
    rows = A.shape[:-1]
    M = rows.numel()
    mask = A.new_empty(K if threshold > 0.0 else 0, dtype=torch.bool)
    out = A.new_empty((*rows, N))
    workspace = A.new_empty(workspace_bytes(M, K, threshold > 0.0), dtype=torch.uint8)
    _linear(
        A, A.data_ptr(), CB.data_ptr(), SCB.data_ptr(), bias_address, bias_dtype, threshold, mask.data_ptr() if threshold > 0.0 else None,
        workspace.data_ptr(), workspace.numel(), out.data_ptr(), M, N, K, DTYPES[A.dtype], kernel,
    )  # fmt: skip
    return out, mask


@_kernel("int8_linear")
def int8_linear(A, CB, SCB, bias=None, threshold=0.0):
    return linear(A, CB, SCB, bias, threshold)


@_kernel("int8_linear_backward")
def int8_linear_backward(grad, CB, SCB):
    grad, CB, SCB = grad.contiguous(), CB.contiguous(), SCB.contiguous()
    rows = grad.shape[:-1]
    out = grad.new_empty((*rows, CB.shape[1]))
    if rows.numel() <= FUSED_BACKWARD_TOKENS[grad.dtype]:
        fused_backward_into(out, grad, CB, SCB)
    else:
        backward_in_slabs_into(out, grad, CB, SCB)
    return out


def fused_backward_into(out, grad, CB, SCB, kernel=AUTO) -> None:
    """``grad`` times the weight, which is dequantised in registers. All are contiguous."""
    N, K = CB.shape
    _linear_backward(
        grad, grad.data_ptr(), CB.data_ptr(), SCB.data_ptr(), out.data_ptr(), grad.shape[:-1].numel(), N, K, DTYPES[grad.dtype], kernel
    )  # fmt: skip


def backward_in_slabs_into(out, grad, CB, SCB) -> None:
    """``grad`` times the weight, of which a slab of columns at a time is dequantised. All are contiguous."""
    N, K = CB.shape
    grad, out = grad.view(-1, N), out.view(-1, K)
    width = min(K, max(64, SLAB_BYTES // max(1, N * grad.element_size()) // 64 * 64))
    memory = grad.new_empty(N * width)
    for first in range(0, K, width):
        codes = CB[:, first : first + width]
        weight = memory[: codes.numel()].view(codes.shape)
        _dequantise_into(weight, codes, SCB)
        torch.mm(grad, weight, out=out[:, first : first + width])
