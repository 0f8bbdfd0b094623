"""LLM.int8(): statistics and codes of activations and weights, the exact product of codes, and its way back to floating point.

* ``_largest_kernel`` finds the largest magnitude of each row that is no outlier, or of each class of the columns of a row, and marks the columns
  that have an outlier. Columns are rows of the transposed strides.
* ``_encode_kernel`` turns a matrix and its statistics into codes.
* ``_product_kernel`` multiplies codes in tiles of 32-bit integers and finishes the result while it is in registers: scaling, bias, and the outlier
  columns in float32. With classes it takes the columns of one class after the other out of stretches of the weight that a cache holds, so that the
  sum of a class within a stretch is exact.

Bytes moved: activations twice (once from a cache), codes of the weight once for every tile of tokens, the result once.
"""

import functools

import torch
import triton
import triton.language as tl

from . import arithmetic as ar
from .launch import ceil_div, launch, operator, power_of_two, written
from .products import weight_8bit

_CLASSES = 16  # of the columns of a token in the layer's product: column k is of class (k // 4) % 16


# ------------------------------------------------------------------------------------------------------------------ quantisation


@triton.jit
def _without_outliers(x, threshold, HAS_THRESHOLD: tl.constexpr):
    return tl.where(tl.abs(x) >= threshold, 0.0, x) if HAS_THRESHOLD else x


@triton.jit(do_not_specialize=["rows"])
def _largest_kernel(
    x, stats, is_outlier, rows, columns, row_stride, column_stride, threshold,
    HAS_THRESHOLD: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([ROWS, CLASSES], dtype=tl.int32)
    for begin in range(0, columns, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(x + row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride, mask=inside, other=0).to(tl.float32)
        if HAS_THRESHOLD:
            marks = is_outlier + tl.zeros([ROWS, 1], dtype=tl.int32) + column[None, :]
            tl.store(marks, tl.full([ROWS, COLUMNS], 1, dtype=tl.uint8), mask=inside & (tl.abs(values) >= threshold))
        bits = ar.magnitude_bits(_without_outliers(values, threshold, HAS_THRESHOLD))
        if CLASSES > 1:
            bits = tl.max(tl.max(tl.reshape(bits, [ROWS, COLUMNS // (4 * CLASSES), CLASSES, 4]), axis=3), axis=1)
        else:
            bits = tl.max(bits, axis=1)[:, None]
        largest = tl.maximum(largest, bits)
    at = stats + row[:, None] * CLASSES + tl.arange(0, CLASSES)[None, :]
    tl.store(at, ar.largest_magnitude(largest), mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _encode_kernel(
    x, stats, is_outlier, codes, rows, columns, threshold,
    HAS_THRESHOLD: tl.constexpr, CLASSES: tl.constexpr, OF_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``OF_ROWS``: statistics are those of rows, whose outlier columns are left out whole; else those of columns, which lose only the outliers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = _without_outliers(tl.load(x + at, mask=inside, other=0).to(tl.float32), threshold, HAS_THRESHOLD)
    if OF_ROWS:
        stat = tl.load(stats + row[:, None] * CLASSES + (column // 4 % CLASSES)[None, :], mask=inside, other=0.0)
    else:
        stat = tl.load(stats + column, mask=column < columns, other=0.0)[None, :]
    code = ar.int8_code(values, ar.inverse_int8_scale(stat))
    if HAS_THRESHOLD and OF_ROWS:
        marked = tl.load(is_outlier + column, mask=column < columns, other=0)
        code = tl.where((marked != 0)[None, :], 0, code)
    tl.store(codes + at, code, mask=inside)


_ROWS, _COLUMNS = 4, 512  # of a tile whose rows lie in memory as they are


def _grid(matrix):
    return ceil_div(matrix.shape[0], _ROWS), ceil_div(matrix.shape[1], _COLUMNS)


def _as_matrix(A):
    return A.contiguous().view(A.shape[:-1].numel(), A.shape[-1])


def _largest(matrix, threshold, is_outlier, classes=1):
    """Statistics of rows, float32 [rows * classes]. Marks outlier columns in ``is_outlier``, uint8 [columns]."""
    rows, columns = matrix.shape
    stats = torch.empty(rows * classes, dtype=torch.float32, device=matrix.device)
    row_tile, column_tile = (_ROWS, _COLUMNS) if matrix.stride(1) == 1 else (64, 32)
    launch(
        _largest_kernel, (ceil_div(rows, row_tile),), matrix, stats, is_outlier, rows, columns, *matrix.stride(), float(threshold),
        HAS_THRESHOLD=threshold > 0.0, CLASSES=classes, ROWS=row_tile, COLUMNS=column_tile,
    )  # fmt: skip
    return stats


def _encode(matrix, stats, threshold, is_outlier, classes=1, of_rows=True):
    codes = torch.empty_like(matrix, dtype=torch.int8)
    launch(
        _encode_kernel, _grid(matrix), matrix, stats, is_outlier, codes, *matrix.shape,
        float(threshold), HAS_THRESHOLD=threshold > 0.0, CLASSES=classes, OF_ROWS=of_rows, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return codes


def _outlier_marks(matrix, threshold):
    return torch.zeros(matrix.shape[1] if threshold > 0.0 else 0, dtype=torch.uint8, device=matrix.device)


def _outlier_columns(marks, threshold):
    return marks.nonzero().flatten() if threshold > 0.0 else None


@operator("int8_vectorwise_quant")
def int8_vectorwise_quant(A, threshold=0.0):
    matrix = _as_matrix(A)
    marks = _outlier_marks(matrix, threshold)
    stats = _largest(matrix, threshold, marks)
    codes = _encode(matrix, stats, threshold, marks)
    return codes.view(A.shape), stats, _outlier_columns(marks, threshold)


@operator("int8_double_quant")
def int8_double_quant(A, threshold=0.0):
    matrix = _as_matrix(A)
    marks, marks_of_rows = _outlier_marks(matrix, threshold), _outlier_marks(matrix.t(), threshold)
    row_stats, col_stats = _largest(matrix, threshold, marks), _largest(matrix.t(), threshold, marks_of_rows)
    row_codes, col_codes = _encode(matrix, row_stats, threshold, marks), _encode(matrix, col_stats, threshold, marks, of_rows=False)
    return row_codes.view(A.shape), col_codes.view(A.shape), row_stats, col_stats, _outlier_columns(marks, threshold)


# ---------------------------------------------------------------------------------------------------------- back to floating point


@triton.jit
def _scaled(sums, row_stat, col_stat):
    """Sums of products of codes as values."""
    return (sums.to(tl.float32) * (row_stat * col_stat)) * ar.PER_PRODUCT


@triton.jit(do_not_specialize=["rows"])
def _dequantize_kernel(
    x, row_stats, col_stats, bias, out, rows, columns, OF_PRODUCT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """``OF_PRODUCT``: x holds sums of products of codes; else codes, which have no statistics of columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    row_stat = tl.load(row_stats + row, mask=row < rows, other=0.0)[:, None]
    if OF_PRODUCT:
        values = _scaled(values, row_stat, tl.load(col_stats + column, mask=column < columns, other=0.0)[None, :])
    else:
        values = (values * row_stat) * ar.PER_CODE
    if HAS_BIAS:
        values += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def _dequantize(A, row_stats, col_stats, bias, dtype):
    matrix, out = _as_matrix(A), A.new_empty(A.shape, dtype=dtype)
    of_product, has_bias = col_stats is not None, bias is not None
    launch(
        _dequantize_kernel, _grid(matrix), matrix, row_stats.contiguous(), col_stats.contiguous() if of_product else out,
        bias.contiguous() if has_bias else out, out, *matrix.shape, OF_PRODUCT=of_product, HAS_BIAS=has_bias, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return out


@operator("int8_vectorwise_dequant")
def int8_vectorwise_dequant(A, stats):
    return _dequantize(A, stats, None, None, torch.float32)


@operator("int8_mm_dequant")
def int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    return _dequantize(A, row_stats, col_stats, bias, dtype or torch.float16)


# ----------------------------------------------------------------------------------------------------------------------- product


@triton.jit
def _outlier_product(a, codes, stats, m, n, column, inside_column, M, N, K):
    """Some columns of the activations times those of the weight, in float32."""
    mask = (m < M)[:, None] & inside_column[None, :]
    activations = tl.load(a + m.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0).to(tl.float32)
    weight = weight_8bit(codes, stats, n, column, n < N, inside_column, K)
    return tl.dot(activations, tl.trans(weight), input_precision="ieee")


@triton.jit
def _exact_dot(a, b, FP16: tl.constexpr):
    """a b^T of codes in int32, for 1024 columns at most. ``FP16``: by matrix instructions for float16 whose sums are float32, which are exact too."""
    if FP16:
        product = tl.dot(a.to(tl.float16), tl.trans(b).to(tl.float16)).to(tl.int32)
    else:
        product = tl.dot(a, tl.trans(b), out_dtype=tl.int32)
    return product


@triton.jit(do_not_specialize=["M", "outlier_count"])
def _product_kernel(
    codes_a, codes_b, row_stats, col_stats, bias, a, outliers, out, M, N, K, outlier_count,
    CLASSES: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, OUTLIERS: tl.constexpr, FP16: tl.constexpr,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """``OUTLIERS``: "none", "listed" (``outliers`` holds column numbers) or "marked" (it holds a byte for every column)."""
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    within = tl.arange(0, K_TILE)
    row_a, row_b = m.to(tl.int64)[:, None] * K, n.to(tl.int64)[:, None] * K
    sums = tl.zeros([M_TILE, N_TILE], dtype=tl.float32 if CLASSES > 1 else tl.int32)
    for begin in range(0, K, K_TILE * CLASSES):
        for c in range(CLASSES):
            k = begin + within if CLASSES == 1 else begin + within // 4 * (4 * CLASSES) + c * 4 + within % 4
            tile_a = tl.load(codes_a + row_a + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
            tile_b = tl.load(codes_b + row_b + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
            product = _exact_dot(tile_a, tile_b, FP16)
            if CLASSES == 1:
                sums += product
            else:
                stat = tl.load(row_stats + m * CLASSES + c, mask=m < M, other=0.0)
                sums += product.to(tl.float32) * stat[:, None]

    result = sums
    if SCALED:
        col_stat = tl.load(col_stats + n, mask=n < N, other=0.0)[None, :]
        if CLASSES == 1:
            result = _scaled(sums, tl.load(row_stats + m, mask=m < M, other=0.0)[:, None], col_stat)
        else:
            result = (sums * col_stat) * ar.PER_PRODUCT
        if HAS_BIAS:
            result += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
        if OUTLIERS == "listed":
            for begin in range(0, outlier_count, 16):
                j = begin + tl.arange(0, 16)
                column = tl.load(outliers + j, mask=j < outlier_count, other=0)
                column = tl.where(column < 0, column + K, column)
                is_there = (j < outlier_count) & (column >= 0) & (column < K)
                result += _outlier_product(a, codes_b, col_stats, m, n, column, is_there, M, N, K)
        if OUTLIERS == "marked":
            for begin in range(0, K, 32):
                column = begin + tl.arange(0, 32)
                marked = tl.load(outliers + column, mask=column < K, other=0).to(tl.int32)
                if tl.max(marked, axis=0) != 0:
                    result += _outlier_product(a, codes_b, col_stats, m, n, column, marked != 0, M, N, K)
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@functools.cache
def _multiplies_int8(device: torch.device) -> bool:
    """Whether Triton knows the device's matrix instructions for int8: not those of NVIDIA's GPUs before Ampere."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _multiply(out, CA, CB, stats=None, bias=None, classes=1, a=None, listed=None, marked=None):
    """Into ``out`` [..., N]. ``stats``: those of CA and CB; without them the result is the integers."""
    N, K = CB.shape
    M = CA.shape[:-1].numel()
    CA, CB = CA.contiguous(), CB.contiguous()
    row_stats, col_stats = (out, out) if stats is None else (stats[0].contiguous(), stats[1].contiguous())
    outliers = out if listed is None and marked is None else (marked if listed is None else listed.contiguous())
    tokens = power_of_two(M, 16, 64)
    launch(
        _product_kernel, (ceil_div(M, tokens), ceil_div(N, 64)),
        CA, CB, row_stats, col_stats, out if bias is None else bias.contiguous(), out if a is None else a, outliers, out,
        M, N, K, 0 if listed is None else listed.numel(), CLASSES=classes, SCALED=stats is not None, HAS_BIAS=bias is not None,
        OUTLIERS="listed" if listed is not None else "marked" if marked is not None else "none",
        FP16=not _multiplies_int8(CA.device), M_TILE=tokens, N_TILE=64, K_TILE=128,
    )  # fmt: skip
    return out


@operator("int8_linear_matmul")
def int8_linear_matmul(A, B):
    return _multiply(A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32), A, B)


@operator("int8_linear_matmul.out")
def int8_linear_matmul_out(A, B, out):
    written(out, lambda buffer: _multiply(buffer, A, B))


@operator("int8_scaled_mm")
def int8_scaled_mm(A, B, row_stats, col_stats, bias=None, dtype=None):
    return _multiply(A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16), A, B, (row_stats, col_stats), bias)


@operator("int8_mixed_scaled_mm")
def int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    out = A.new_empty((*CA.shape[:-1], CB.shape[0]))
    if outlier_cols is None:
        return _multiply(out, CA, CB, (SCA, SCB), bias), A.new_empty(0)
    matrix = _as_matrix(A)
    outliers = matrix[:, outlier_cols]  # complains of a column that A has not
    return _multiply(out, CA, CB, (SCA, SCB), bias, a=matrix, listed=outlier_cols), outliers


@operator("int8_linear")
def int8_linear(A, CB, SCB, bias=None, threshold=0.0):
    matrix = _as_matrix(A)
    marks = _outlier_marks(matrix, threshold)
    stats = _largest(matrix, threshold, marks, _CLASSES)
    codes = _encode(matrix, stats, threshold, marks, _CLASSES)
    out = A.new_empty((*A.shape[:-1], CB.shape[0]))
    _multiply(out, codes, CB, (stats, SCB), bias, _CLASSES, a=matrix, marked=marks if threshold > 0.0 else None)
    return out, marks.view(torch.bool)
