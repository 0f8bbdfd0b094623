"""LLM.int8() in plain PyTorch: vector-wise int8 quantisation, the exact integer product, and the way back to floating point.

A row of activations x with the largest magnitude s becomes the codes q = round(x * 127 / s), s being its *statistic*; a weight is quantised
row by row too, so one entry of x W^T is (q_x . q_w) * s_x * s_w / 127**2. Columns of x that hold an outlier, a magnitude of at least
``threshold``, stay out of that: they are multiplied in floating point (Dettmers et al. 2022, section 3).

These functions define what every other backend must compute. All arithmetic is float32 with one rounding to the result's dtype at the end.
Tensors of any rank are matrices of rows of their last dimension.
"""

import functools
from typing import Optional

import torch

from ..._ops import implement, invoke

INT8_MAX = 127.0
_PER_CODE = 1.0 / INT8_MAX
_PER_PRODUCT = 1.0 / (INT8_MAX * INT8_MAX)

# Of the columns of a row of activations, in the layer's product.
_CLASSES = 16

# (-128)**2 * 1024 = 2**24: up to here every partial sum is an integer that float32 holds exactly, in whatever order it is added up.
_EXACT_LENGTH = 1024


def _as_matrix(A: torch.Tensor) -> torch.Tensor:
    return A.reshape(A.shape[:-1].numel(), A.shape[-1])


# ------------------------------------------------------------------------------------------------------------------ quantisation


def _largest_magnitude(A: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 max |A| along ``dim`` of a matrix; 0 where that is empty."""
    if A.shape[dim] == 0:
        return A.new_zeros(A.shape[1 - dim])
    return A.abs().amax(dim=dim)


def _to_codes(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """int8 codes of a float32 matrix, ``stats`` broadcasting against it.

    All codes are 0 where the statistic is 0, infinite or NaN: it alone then says what was there. Next to denormals only, 127 / stats
    is infinite; the largest code is the nearest there.
    """
    scaled = A * (stats.new_tensor(INT8_MAX) / stats)  # between tensors: a Python number would be multiplied by a rounded reciprocal
    return scaled.round_().nan_to_num_(nan=0.0, posinf=INT8_MAX, neginf=-INT8_MAX).to(torch.int8)


def _split_outliers(A: torch.Tensor, threshold: float) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """A as a float32 matrix with its outliers replaced by 0, and the ascending int64 indices of the columns that had any.

    The indices are None when there is no threshold.
    """
    matrix = _as_matrix(A).to(torch.float32)
    if threshold <= 0.0:
        return matrix, None
    outliers = matrix.abs() >= threshold
    return matrix.masked_fill(outliers, 0.0), outliers.any(dim=0).nonzero().flatten()


def _quantise_rows(matrix: torch.Tensor, outlier_cols: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    stats = _largest_magnitude(matrix, dim=1)
    codes = _to_codes(matrix, stats[:, None])
    if outlier_cols is not None:
        codes[:, outlier_cols] = 0  # these columns are multiplied in floating point: they must not count twice
    return codes, stats


@implement("int8_vectorwise_quant", "default")
def int8_vectorwise_quant(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """int8 codes of A's shape, float32 statistics [rows], and the outlier columns, int64 [number of them], or None without a threshold.

    A statistic is the largest magnitude of its row that is no outlier.
    """
    matrix, outlier_cols = _split_outliers(A, threshold)
    codes, stats = _quantise_rows(matrix, outlier_cols)
    return codes.view(A.shape), stats, outlier_cols


@implement("int8_double_quant", "default")
def int8_double_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Quantises A along its rows and along its columns: codes of the rows, codes of the columns (both of A's shape), statistics [rows],
    statistics [columns], outlier columns.

    The codes of a column are 0 at its outliers only: what else it holds is what a product along the columns needs.
    """
    matrix, outlier_cols = _split_outliers(A, threshold)
    row_codes, row_stats = _quantise_rows(matrix, outlier_cols)
    col_stats = _largest_magnitude(matrix, dim=0)
    col_codes = _to_codes(matrix, col_stats)
    return row_codes.view(A.shape), col_codes.view(A.shape), row_stats, col_stats, outlier_cols


@implement("int8_vectorwise_dequant", "default")
def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """float32 values of A's shape."""
    return (_as_matrix(A) * stats.view(-1, 1)).mul_(_PER_CODE).view(A.shape)


# ----------------------------------------------------------------------------------------------------------------------- product


@functools.cache
def _cpu_int_mm_is_exact() -> bool:
    """Whether ``torch._int_mm`` on this CPU adds up in 32 bits.

    Without VNNI instructions oneDNN adds pairs of products in saturating 16 bits. Which it does depends on the CPU and on its own
    settings, so it is asked.
    """
    largest = torch.full((1, 64), 127, dtype=torch.int8)
    return torch._int_mm(largest, largest.t()).item() == 64 * 127**2


def _int_mm_is_exact(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether ``torch._int_mm(A, B.t())`` takes these operands and gives their exact product."""
    if A.device.type == "cpu":
        return A.shape[1] > 1 and _cpu_int_mm_is_exact()  # a single column leaves its result unwritten (torch 2.13)
    return A.device.type == "cuda" and A.shape[0] > 16 and A.shape[1] > 0 and A.shape[1] % 8 == 0 and B.shape[0] > 0 and B.shape[0] % 8 == 0


def _exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B^T of int8 matrices in int32, modulo 2**32."""
    if _int_mm_is_exact(A, B):
        return torch._int_mm(A.contiguous(), B.contiguous().t())
    product = torch.zeros(A.shape[0], B.shape[0], dtype=torch.int32, device=A.device)
    for a, b in zip(A.split(_EXACT_LENGTH, dim=1), B.split(_EXACT_LENGTH, dim=1)):
        product += (a.to(torch.float32) @ b.to(torch.float32).t()).to(torch.int32)
    return product


@implement("int8_linear_matmul", "default")
def int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The exact product of int8 [..., K] and the transpose of int8 [N, K]: int32 [..., N]."""
    return _exact_product(_as_matrix(A), B).view(*A.shape[:-1], B.shape[0])


@implement("int8_linear_matmul.out", "default")
def int8_linear_matmul_out(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor) -> None:
    """As ``int8_linear_matmul``, into ``out``."""
    out.copy_(invoke("int8_linear_matmul", A, B))


@implement("int8_mm_dequant", "default")
def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: Optional[torch.dtype] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The floating point values of an int32 product [..., N], plus the bias [N]: ``dtype`` (float16 where none is given), A's shape."""
    values = _as_matrix(A) * (row_stats.view(-1, 1) * col_stats.view(1, -1))
    values.mul_(_PER_PRODUCT)
    if bias is not None:
        values += bias.to(torch.float32)
    return values.to(dtype or torch.float16).view(A.shape)


# ----------------------------------------------------------------------------------------------------------- compositions of these


@implement("int8_scaled_mm", "default")
def int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """The product of quantised activations [..., K] and a quantised weight [N, K], plus the bias, in floating point: [..., N]."""
    product = invoke("int8_linear_matmul", A, B)
    return invoke("int8_mm_dequant", product, row_stats, col_stats, dtype, bias)


@implement("int8_mixed_scaled_mm", "default")
def int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """As ``int8_scaled_mm`` with the outlier columns of A multiplied in floating point by the dequantised columns of the weight.

    Returns:
        The result, of A's dtype, and those columns of A, [rows, number of them]; an empty tensor without ``outlier_cols``.
    """
    if outlier_cols is None:
        return invoke("int8_scaled_mm", CA, CB, SCA, SCB, bias, A.dtype), A.new_empty(0)
    result = invoke("int8_scaled_mm", CA, CB, SCA, SCB, bias, torch.float32)
    outliers = _as_matrix(A)[:, outlier_cols]
    columns = invoke("int8_vectorwise_dequant", CB[:, outlier_cols], SCB)
    result.view(outliers.shape[0], CB.shape[0]).addmm_(outliers.to(torch.float32), columns.t())
    return result.to(A.dtype), outliers


def _classes(columns: int) -> list[torch.Tensor]:
    """The columns of each class; see ``int8_linear``."""
    classes = torch.arange(columns) // 4 % _CLASSES
    return [(classes == c).nonzero().flatten() for c in range(min(_CLASSES, -(-columns // 4)))]


@implement("int8_linear", "default")
def int8_linear(
    A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, bias: Optional[torch.Tensor] = None, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of floating point activations [..., K] and a quantised weight [N, K], plus the bias: [..., N] in the dtype of A.

    The activations of a row are quantised in 16 classes of columns, each with a statistic of its own: column k is of class (k // 4) % 16. One
    statistic a row, as in ``int8_vectorwise_quant``, makes every code as coarse as the largest value asks for; that costs a small language model 2 %
    of its perplexity, more than its quantised weights do, and 16 of them 0.3 %. Outlier columns are multiplied in floating point as in
    ``int8_mixed_scaled_mm``.

    Returns:
        The result and a mask of the outlier columns, bool [K]; an empty one without a threshold.
    """
    matrix, outlier_cols = _split_outliers(A, threshold)
    sums = matrix.new_zeros(matrix.shape[0], CB.shape[0])
    for columns in _classes(matrix.shape[1]):
        part = matrix[:, columns]
        stats = _largest_magnitude(part, dim=1)[:, None]
        codes = _to_codes(part, stats)
        if outlier_cols is not None:
            codes[:, torch.isin(columns.to(outlier_cols.device), outlier_cols)] = 0
        sums += _exact_product(codes, CB[:, columns]) * stats
    result = sums.mul_(SCB.view(1, -1)).mul_(_PER_PRODUCT)
    if bias is not None:
        result += bias.to(torch.float32)
    shape = (*A.shape[:-1], CB.shape[0])
    if outlier_cols is None:
        return result.to(A.dtype).view(shape), A.new_empty(0, dtype=torch.bool)
    result.addmm_(_as_matrix(A)[:, outlier_cols].to(torch.float32), invoke("int8_vectorwise_dequant", CB[:, outlier_cols], SCB).t())
    is_outlier = A.new_zeros(A.shape[-1], dtype=torch.bool)
    is_outlier[outlier_cols] = True
    return result.to(A.dtype).view(shape), is_outlier


@implement("int8_linear_backward", "default")
def int8_linear_backward(grad: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor) -> torch.Tensor:
    """The gradient of ``int8_linear`` with respect to A: [..., N] times the dequantised weight, in grad's dtype."""
    product = _as_matrix(grad).to(torch.float32) @ invoke("int8_vectorwise_dequant", CB, SCB)
    return product.to(grad.dtype).view(*grad.shape[:-1], CB.shape[1])
