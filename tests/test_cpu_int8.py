"""LLM.int8() of the native library, on every instruction set, against a model in NumPy whose integers are int64.

Codes, statistics, integer products and everything that is one rounding of them are compared bit for bit; what a floating point sum went into,
within the bound of its rounding.
"""

from functools import partial
import os
from pathlib import Path
import subprocess
import sys

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from native_cpu import (  # noqa: F401  (fixtures among them)
    DTYPES,
    SETS,
    Guarded,
    assert_same_bytes,
    assert_same_floats,
    at_page_edge,
    lib,
    library,
    load_library,
)
import numpy as np
import pytest
from strategies import float_dtypes, float_tensors
import torch

import bitsandbytes  # noqa: F401

ops = torch.ops.bitsandbytes
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "fp16", "bf16"])
# The fixture only chooses a set, which lasts for all examples.
on_every_set = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

PER_CODE, PER_PRODUCT = np.float32(1 / 127), np.float32(1 / 127**2)
ALL_LENGTHS = [*range(1, 67), 95, 96, 127, 128, 129, 191, 200, 255, 256, 257, 4095, 4096, 4097, 8200]


# ------------------------------------------------------------------------------------------------------------------------- the model
def codes_of(x: np.ndarray, stats: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        scaled = np.rint(x * (np.float32(127) / stats))
    return np.nan_to_num(scaled, nan=0, posinf=127, neginf=-127).astype(np.int8)


def model_quantise(A: torch.Tensor, threshold: float):
    """Row codes, row statistics, truth values of outlier columns, and the matrix in fp32 without its outliers."""
    x = A.float().reshape(A.shape[:-1].numel(), A.shape[-1]).numpy().copy()
    with np.errstate(over="ignore"):
        outliers = np.abs(x) >= np.float32(threshold) if threshold > 0 else np.zeros(x.shape, bool)
    x[outliers] = 0
    columns = outliers.any(axis=0)
    stats = np.abs(x).max(axis=1, initial=0)
    codes = codes_of(x, stats[:, None])
    codes[:, columns] = 0
    return codes, stats, columns, x


def product_of_classes(x: np.ndarray, columns: np.ndarray, CB: np.ndarray, SCB: np.ndarray):
    """The layer's product in float64 without outliers and bias, and the sum of its terms' magnitudes. `x`, `columns` as model_quantise gives them."""
    result = np.zeros((x.shape[0], CB.shape[0]))
    size = result.copy()
    for c in range(16):
        of_class = np.arange(x.shape[1]) // 4 % 16 == c
        part = x[:, of_class]
        stats = np.abs(part).max(axis=1, initial=0)[:, None]
        codes = codes_of(part, stats)
        codes[:, columns[of_class]] = 0
        term = exact_product(codes, CB[:, of_class]) * stats.astype(np.float64) * SCB / 127**2
        result += term
        size += np.abs(term)
    return result, size


def exact_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.int64) @ b.astype(np.int64).T).astype(np.int32)


def scaled(product: np.ndarray, row_stats, col_stats, bias=None) -> np.ndarray:
    """fp32, every step rounded."""
    with np.errstate(all="ignore"):
        values = product.astype(np.float32) * (row_stats[:, None] * col_stats[None, :]) * PER_PRODUCT
        return values if bias is None else values + bias


def random_int8(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng([*shape, seed]).integers(-128, 128, shape, dtype=np.int8)


def random_weight(N: int, K: int):
    return random_int8(N, K), np.random.default_rng([N, K]).uniform(0.1, 2, N).astype(np.float32)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


# ------------------------------------------------------------------------------------------------------------------- the exact product
def multiply(lib, a: np.ndarray, b: np.ndarray, threads: int = 1) -> np.ndarray:
    (M, K), N = a.shape, b.shape[0]
    out = Guarded(M * N, torch.int32)
    assert lib.bnb_cpu_int8_matmul(a.ctypes.data, b.ctypes.data, out.pointer, M, N, K, threads) == 0
    return out.check().numpy().reshape(M, N)


@pytest.mark.parametrize("K", ALL_LENGTHS)
def test_every_length(lib, K):
    for M, N in ((1, 3), (5, 17), (13, 2)):
        a, b = random_int8(M, K), random_int8(N, K, seed=1)
        assert_same_bytes(multiply(lib, a, b), exact_product(a, b))


@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25, 97])
def test_every_remainder_of_tokens_and_rows(lib, M):
    for N in (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 130):
        a, b = random_int8(M, 70), random_int8(N, 70, seed=1)
        assert_same_bytes(multiply(lib, a, b), exact_product(a, b))


@on_every_set
@given(M=st.integers(0, 40), N=st.integers(0, 90), K=st.integers(0, 300), offset=st.integers(0, 63), seed=st.integers(0, 9))
def test_any_shape_at_any_address(lib, M, N, K, offset, seed):
    a = random_int8(M * K + offset, seed=seed)[offset:].reshape(M, K)
    b = random_int8(N * K + 63 - offset, seed=seed + 1)[63 - offset :].reshape(N, K)
    assert_same_bytes(multiply(lib, a, b), exact_product(a, b))


@pytest.mark.parametrize("left, right", [(127, 127), (-128, -128), (-128, 127), (127, -128)])
@pytest.mark.parametrize("K", [1, 64, 130, 133_153, 200_000])
def test_extremes_neither_saturate_nor_lose_a_bit(lib, left, right, K):
    """From 131072 products of -128 and -128, or 133153 of 127 and 127, the sum leaves 32 bits: it wraps around."""
    a, b = np.full((7, K), left, np.int8), np.full((5, K), right, np.int8)
    b[1] = random_int8(K)
    assert_same_bytes(multiply(lib, a, b), exact_product(a, b))


def test_one_code_at_every_place(lib):
    for K in (64, 131):
        a = np.eye(K, dtype=np.int8) * np.int8(-128)
        b = random_int8(9, K)
        assert_same_bytes(multiply(lib, a, b), (b.T.astype(np.int32) * -128))


# ------------------------------------------------------------------------------------------------------------------------ quantisation
def quantise(lib, A: torch.Tensor, threshold: float, threads: int = 1):
    """Row codes, row statistics, outlier columns or None, column codes, column statistics."""
    rows, columns = A.shape
    mask = Guarded(columns, torch.uint8)
    row_stats, row_codes = Guarded(rows, torch.float32), Guarded(rows * columns, torch.int8)
    col_stats, col_codes = Guarded(columns, torch.float32), Guarded(rows * columns, torch.int8)
    status = lib.bnb_cpu_int8_quantize(
        A.data_ptr(), DTYPES[A.dtype], rows, columns, threshold, mask.pointer if threshold > 0 else None, row_stats.pointer, row_codes.pointer,
        col_stats.pointer, col_codes.pointer, threads,
    )  # fmt: skip
    assert status == 0
    found = [guarded.check().numpy() for guarded in (row_codes, row_stats, mask, col_codes, col_stats)]
    return found[0].reshape(A.shape), found[1], found[2] if threshold > 0 else None, found[3].reshape(A.shape), found[4]


def assert_quantises(lib, A: torch.Tensor, threshold: float) -> None:
    codes, stats, columns, x = model_quantise(A, threshold)
    found = quantise(lib, A, threshold)
    assert_same_bytes(found[0], codes)
    assert_same_floats(found[1], stats)
    if threshold > 0:
        assert_same_bytes(found[2], columns.astype(np.uint8))
    col_stats = np.abs(x).max(axis=0, initial=0)
    assert_same_bytes(found[3], codes_of(x, col_stats[None, :]))
    assert_same_floats(found[4], col_stats)


@on_every_set
@given(A=float_tensors(), threshold=st.sampled_from([0.0, 1e-60, 0.5, 1.5, 6.0, 3e38, 1e39]))
def test_codes_statistics_and_outliers(lib, A, threshold):
    assert_quantises(lib, A.reshape(A.shape[:-1].numel(), A.shape[-1]).contiguous(), threshold)


@dtypes
def test_codes_of_every_row_length(lib, dtype):
    x = torch.randn(3 * 1100).to(dtype)
    for columns in (*range(1, 70), 255, 256, 257, 1023, 1025, 1100):
        assert_quantises(lib, x[1 : 1 + 2 * columns].view(2, columns), 1.5 if columns % 2 else 0.0)


@dtypes
def test_values_beside_every_tie(lib, dtype):
    """Half-way between two codes the even one is taken, and one bit to either side decides."""
    ties = np.arange(-127, 127) + np.float32(0.5)
    for largest in (127.0, 1.0, 0.3, 1e-20, 3e20):
        values = (ties * np.float32(largest / 127)).astype(np.float32)
        near = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf)), [np.float32(largest)]])
        assert_quantises(lib, torch.from_numpy(near)[None].to(dtype).contiguous(), 0.0)


def test_every_16bit_number_as_a_row_of_its_own(lib):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        assert_quantises(lib, torch.stack([x, x / 2, -x / 3, torch.ones_like(x)], dim=1).contiguous(), 0.0)


@pytest.mark.parametrize("special", [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -3e-39, 3.4e38])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_rows_and_columns_with_a_special_value(lib, special, threshold):
    A = torch.ones(4, 80)
    A[1], A[2, 70] = special, special
    assert_quantises(lib, A, threshold)


def test_everything_is_an_outlier(lib):
    codes, stats, columns, *_ = quantise(lib, torch.full((3, 50), 9.0), 6.0)
    assert not codes.any() and not stats.any() and columns.all()


@on_every_set
@given(rows=st.integers(0, 9), columns=st.integers(0, 200))
def test_dequantisation_rounds_twice(lib, rows, columns):
    codes, stats = random_int8(rows, columns), np.random.default_rng(0).uniform(0, 9, rows).astype(np.float32)
    out = Guarded(rows * columns, torch.float32)
    assert lib.bnb_cpu_int8_dequantize(codes.ctypes.data, stats.ctypes.data, rows, columns, out.pointer, 1) == 0
    expected = (codes.astype(np.float32) * stats[:, None]) * PER_CODE
    assert_same_floats(out.check(), torch.from_numpy(expected.reshape(-1)))


# ------------------------------------------------------------------------------------------- products in floating point, by the operators
@on_every_set
@given(M=st.integers(0, 9), N=st.integers(0, 150), dtype=float_dtypes, has_bias=st.booleans(), scale=st.sampled_from([1.0, 1e-30, 1e25]))
def test_integers_become_floats_with_one_last_rounding(lib, M, N, dtype, has_bias, scale):
    random = np.random.default_rng([M, N])
    product = random.integers(-(2**31), 2**31, (M, N), dtype=np.int64).astype(np.int32)
    row_stats, col_stats = (random.uniform(0, scale, n).astype(np.float32) for n in (M, N))
    bias = random.uniform(-9, 9, N).astype(np.float32) if has_bias else None
    out = ops.int8_mm_dequant(*tensors(product, row_stats, col_stats), dtype, None if bias is None else torch.from_numpy(bias))
    assert_same_floats(out.view(-1), torch.from_numpy(scaled(product, row_stats, col_stats, bias)).to(dtype).view(-1))


@on_every_set
@given(
    lead=st.sampled_from([(), (1,), (4,), (2, 3), (29,), (0,), (2, 0)]), N=st.integers(0, 90), K=st.integers(1, 300), dtype=float_dtypes,
    bias_dtype=st.sampled_from([None, *DTYPES]),
)  # fmt: skip
def test_the_layer_without_outliers_rounds_the_sum_of_classes_only(lib, lead, N, K, dtype, bias_dtype):
    CB, SCB = random_weight(N, K)
    A = torch.from_numpy(np.random.default_rng([N, K]).standard_normal((*lead, K))).to(dtype)
    bias = None if bias_dtype is None else torch.linspace(-3, 3, N).to(bias_dtype)
    codes, stats, columns, x = model_quantise(A, 0.0)
    added = None if bias is None else bias.float().numpy()
    y, mask = ops.int8_linear(A, *tensors(CB, SCB), bias)
    assert y.shape == (*lead, N) and mask.shape == (0,)
    expected, size = product_of_classes(x, columns, CB, SCB)
    offset = np.zeros(N) if bias is None else added.astype(np.float64)
    assert_within_rounding(y, expected + offset, size + np.abs(offset), 16 * (1 + K // 4096))
    of_codes = ops.int8_scaled_mm(*tensors(codes.reshape(*lead, K), CB, stats, SCB), bias, dtype)
    assert_same_floats(of_codes.reshape(-1), torch.from_numpy(scaled(exact_product(codes, CB), stats, SCB, added)).to(dtype).view(-1))


def assert_within_rounding(y: torch.Tensor, expected: np.ndarray, size: np.ndarray, terms: int) -> None:
    """One rounding to the dtype, and fp32 sums of so many terms whose magnitudes add up to `size`."""
    info = torch.finfo(y.dtype)
    bound = np.abs(expected) * info.eps * 0.501 + size * 2.0**-24 * (terms + 8) + info.smallest_normal * info.eps + 1e-44
    excess = np.abs(y.double().numpy().reshape(expected.shape) - expected) - bound
    fits = np.abs(expected) < info.max
    assert (excess[fits] <= 0).all(), f"error beyond the bound by {excess[fits].max()}"


@on_every_set
@given(
    A=float_tensors(kinds=("bell", "steps", "huge", "sparse", "zeros")).filter(lambda A: A.shape[-1] > 0), N=st.integers(0, 90),
    threshold=st.sampled_from([1e-60, 0.3, 1.0, 2.0, 6.0]), has_bias=st.booleans(),
)  # fmt: skip
@example(A=torch.randn(40, 300, generator=torch.Generator().manual_seed(0)), N=130, threshold=0.3, has_bias=True)  # everything an outlier
@example(A=torch.randn(700, 33, generator=torch.Generator().manual_seed(0)).bfloat16(), N=70, threshold=2.5, has_bias=True)
def test_the_layer_with_outliers_rounds_sums_only(lib, A, N, threshold, has_bias):
    K = A.shape[-1]
    CB, SCB = random_weight(N, K)
    bias = torch.linspace(-3, 3, N) if has_bias else None
    codes, stats, columns, kept = model_quantise(A, threshold)
    y, mask = ops.int8_linear(A, *tensors(CB, SCB), bias, threshold)
    assert_same_bytes(mask.numpy(), columns)
    x = A.double().reshape(-1, K).numpy()[:, columns]
    weight = CB.astype(np.float64)[:, columns] * SCB[:, None] / 127
    integers = exact_product(codes, CB).astype(np.float64) * stats.astype(np.float64)[:, None] * SCB / 127**2
    others = x @ weight.T + (np.zeros(N) if bias is None else bias.double().numpy())
    size = np.abs(x) @ np.abs(weight).T + (0 if bias is None else np.abs(bias.double().numpy()))
    of_classes, size_of_classes = product_of_classes(kept, columns, CB, SCB)
    assert_within_rounding(y, of_classes + others, size_of_classes + size, columns.sum() + 16)
    found = torch.from_numpy(np.flatnonzero(columns))
    of_codes, outliers = ops.int8_mixed_scaled_mm(A, *tensors(codes.reshape(A.shape), CB, stats, SCB), found, bias)
    assert_within_rounding(of_codes, integers + others, np.abs(integers) + size, columns.sum())
    assert_same_floats(outliers.reshape(-1), A.reshape(-1, K)[:, found].reshape(-1))


def test_outlier_columns_in_any_order_twice_and_counted_from_the_end(lib):
    A, (CB, SCB) = torch.randn(5, 40), tensors(*random_weight(7, 40))
    CA, SCA, _ = ops.int8_vectorwise_quant(A)
    plain, _ = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB)
    weight = ops.int8_vectorwise_dequant(CB, SCB)
    for columns in ([39, 0, 0, 7], [-1, -40, 3], []):
        for dtype in (torch.int64, torch.int32):
            y, outliers = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor(columns, dtype=dtype))
            torch.testing.assert_close(y, plain + A[:, columns] @ weight[:, columns].T, rtol=1e-5, atol=1e-5)
            assert_same_floats(outliers.reshape(-1), A[:, columns].reshape(-1))


@pytest.mark.parametrize("columns", [[40], [-41], [2**40], [-(2**62)]])
def test_an_outlier_column_that_is_not_there_is_refused(columns):
    A, (CB, SCB) = torch.randn(5, 40), tensors(*random_weight(7, 40))
    CA, SCA, _ = ops.int8_vectorwise_quant(A)
    with pytest.raises(IndexError):
        ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor(columns))


@dtypes
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_special_value_stays_in_its_row(lib, dtype, special):
    A, (CB, SCB) = torch.randn(15, 100).to(dtype), tensors(*random_weight(20, 100))
    A[4, 77] = special
    y, _ = ops.int8_linear(A, CB, SCB)
    assert y.isnan().any(dim=1).tolist() == [row == 4 for row in range(15)]
    clean, _ = ops.int8_linear(torch.cat([A[:4], A[5:]]), CB, SCB)
    assert_same_floats(torch.cat([y[:4], y[5:]]).view(-1), clean.view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_numbers_beyond_the_range_of_fp16(lib, dtype, threshold):
    y, _ = ops.int8_linear(torch.full((2, 64), 2.0**100, dtype=dtype), torch.full((3, 64), 127, dtype=torch.int8), torch.ones(3), None, threshold)
    torch.testing.assert_close(y, torch.full((2, 3), 2.0**106, dtype=dtype), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------------------- the gradient
@dtypes
@pytest.mark.parametrize("N, K", [(1, 1), (5, 7), (33, 64), (64, 130), (70, 33), (129, 17)])
def test_the_gradient_of_a_single_output_is_its_row_of_the_weight(lib, dtype, N, K):
    CB, SCB = tensors(*random_weight(N, K))
    x = ops.int8_linear_backward(torch.eye(N, dtype=dtype), CB, SCB)
    assert_same_floats(x.view(-1), ops.int8_vectorwise_dequant(CB, SCB).to(dtype).view(-1))


@on_every_set
@given(M=st.integers(0, 40), N=st.integers(0, 140), K=st.integers(0, 140), dtype=float_dtypes, mean=st.sampled_from([0.0, 3.0]))
def test_the_gradient_is_within_the_rounding_of_the_weight(lib, M, N, K, dtype, mean):
    CB, SCB = random_weight(N, K)
    grad = torch.from_numpy(np.random.default_rng([M, N]).standard_normal((M, N)) + mean).to(dtype)
    weight = (CB.astype(np.float32) * SCB[:, None]) * PER_CODE
    rounded = torch.from_numpy(weight).to(dtype if dtype == torch.bfloat16 else torch.float32).double().numpy()
    g = grad.double().numpy()
    x = ops.int8_linear_backward(grad, *tensors(CB, SCB))
    size = np.abs(g) @ np.abs(weight)
    info = torch.finfo(dtype)
    bound = np.abs(g @ weight) * info.eps * 0.51 + np.abs(g) @ np.abs(rounded - weight) + size * 2.0**-24 * (N + 8) + info.smallest_normal
    assert (np.abs(x.double().numpy() - g @ weight) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("equal_scales", [False, True])
def test_the_gradient_is_no_worse_than_a_dense_product(lib, dtype, mean, equal_scales):
    random = np.random.default_rng(5)
    W = torch.from_numpy(random.standard_normal((512, 384)) + 0.3).float()
    CB, SCB, _ = ops.int8_vectorwise_quant(W)
    if equal_scales:
        SCB.fill_(SCB[0].item())
    grad = torch.from_numpy(random.standard_normal((64, 512)) + mean).to(dtype)
    weight = CB.double() * SCB.double()[:, None] / 127
    exact = grad.double() @ weight
    dense = grad @ ops.int8_vectorwise_dequant(CB, SCB).to(dtype)
    error, dense_error = ((y.double() - exact).square().mean().sqrt() for y in (ops.int8_linear_backward(grad, CB, SCB), dense))
    assert error <= 1.1 * dense_error


# ---------------------------------------------------------------------------------------------------- threads, memory, wrong arguments
@pytest.mark.parametrize("M, N, K", [(1, 1500, 3000), (9, 700, 2048), (48, 500, 1024), (900, 8, 1024), (90, 130, 1001)])
def test_the_number_of_threads_changes_nothing(lib, M, N, K):
    CB, SCB = tensors(*random_weight(N, K))
    A, grad, bias = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16(), torch.randn(N)

    def everything(threads):
        torch.set_num_threads(threads)
        y, mask = ops.int8_linear(A, CB, SCB, bias, 2.0)
        return y, mask, *ops.int8_double_quant(A, 2.0), ops.int8_linear_backward(grad, CB, SCB), ops.int8_vectorwise_dequant(CB, SCB)

    alone = everything(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(found, expected) for found, expected in zip(everything(threads), alone, strict=True))


def test_strided_operands_are_read_as_they_are_meant(lib):
    CB, SCB = tensors(*random_weight(9, 50))
    A, bias = torch.randn(6, 50), torch.randn(9)
    wide = [torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0] for t in (A, CB, SCB, bias)]
    for found, expected in zip(ops.int8_linear(*wide, 1.0), ops.int8_linear(A, CB, SCB, bias, 1.0)):
        assert torch.equal(found, expected)
    grad = torch.randn(9, 6).t()
    assert torch.equal(ops.int8_linear_backward(grad, wide[1], wide[2]), ops.int8_linear_backward(grad.contiguous(), CB, SCB))


def calls_at_page_edges() -> int:
    """Every function with all its operands at the edge of accessible memory: one byte too far kills the process."""
    lib, calls = load_library(), 0
    supported = [name for name in SETS if lib.bnb_cpu_isa_supported(name.encode())]
    for N, K in (1, 1), (3, 7), (4, 64), (17, 65), (64, 40), (65, 129), (33, 300):
        for M in (1, 2, 5, 7, 13):
            for at_end in (False, True):
                edge = partial(at_page_edge, at_end=at_end)
                CB, SCB = map(edge, random_weight(N, K))
                CA, SCA, bias = edge(random_int8(M, K)), edge(np.ones(M, np.float32)), edge(np.ones(N, np.float32))
                product, mask, columns = edge(np.zeros((M, N), np.int32)), edge(np.zeros(K, np.uint8)), edge(np.array([0, K - 1], np.int64))
                dequantised, column_stats = edge(np.zeros((N, K), np.float32)), edge(np.zeros(K, np.float32))
                a, b, sa, sb, c, p, m, j = (array.ctypes.data for array in (CA, CB, SCA, SCB, bias, product, mask, columns))
                d, s = dequantised.ctypes.data, column_stats.ctypes.data
                codes = edge(np.zeros((2, M, K), np.int8)).ctypes.data
                for code in DTYPES.values():
                    x, y, g = (edge(np.ones(shape, np.float32 if code == 0 else np.uint16)).ctypes.data for shape in ((M, K), (M, N), (M, K)))
                    for name in supported:
                        lib.bnb_cpu_select_isa(name.encode())
                        assert lib.bnb_cpu_int8_quantize(x, code, M, K, 0.5, m, sa, codes, s, codes + M * K, 1) == 0
                        assert lib.bnb_cpu_int8_linear(x, b, sb, c, 0.5, m, y, M, N, K, code, 1) == 0
                        assert lib.bnb_cpu_int8_linear(x, b, sb, None, 0.0, None, y, M, N, K, code, 1) == 0
                        assert lib.bnb_cpu_int8_linear_backward(y, b, sb, g, M, N, K, code, 1) == 0
                        assert lib.bnb_cpu_int8_mm_dequant(p, sa, sb, c, y, M, N, code, 1) == 0
                        assert lib.bnb_cpu_int8_scaled_mm(a, b, sa, sb, x, j, 2, c, y, M, N, K, code, 1) == 0
                        assert lib.bnb_cpu_int8_matmul(a, b, p, M, N, K, 1) == 0
                        assert lib.bnb_cpu_int8_dequantize(b, sb, N, K, d, 1) == 0
                        calls += 8
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="the guard pages are made with Linux's mmap")
def test_nothing_is_read_or_written_outside_the_operands():
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", "import test_cpu_int8 as t; print(t.calls_at_page_edges())"]
    path = os.pathsep.join([here, *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    assert int(done.stdout.split()[-1]) >= 1680


@pytest.mark.parametrize("M, N, K, dtype, threads", [(-1, 4, 4, 0, 1), (4, -1, 4, 0, 1), (4, 4, -1, 0, 1), (2**40, 2**40, 4, 0, 1),
                                                      (4, 2**40, 2**40, 0, 1), (4, 4, 4, 3, 1), (4, 4, 4, -1, 1), (4, 4, 4, 0, -1)])  # fmt: skip
def test_bad_sizes_and_codes_are_refused(library, M, N, K, dtype, threads):
    p = np.ones(64, np.float32).ctypes.data
    refused = [
        library.bnb_cpu_int8_linear(p, p, p, None, 0.0, None, p, M, N, K, dtype, threads),
        library.bnb_cpu_int8_linear_backward(p, p, p, p, M, N, K, dtype, threads),
        library.bnb_cpu_int8_scaled_mm(p, p, p, p, None, None, 0, None, p, M, N, K, dtype, threads),
    ]
    assert refused == [1, 1, 1]


def test_null_pointers_are_refused_where_there_is_something_to_point_at(library):
    p = np.ones(64, np.float32).ctypes.data
    for missing in range(4):
        pointers = [None if i == missing else p for i in range(4)]
        A, CB, SCB, out = pointers
        assert library.bnb_cpu_int8_linear(A, CB, SCB, None, 0.0, None, out, 4, 4, 4, 0, 1) == 1
        assert library.bnb_cpu_int8_linear_backward(A, CB, SCB, out, 4, 4, 4, 0, 1) == 1
        if missing != 2:
            assert library.bnb_cpu_int8_matmul(A, CB, out, 4, 4, 4, 1) == 1
    assert library.bnb_cpu_int8_linear(p, p, p, None, 1.0, None, p, 4, 4, 4, 0, 1) == 1  # a threshold needs a mask
    assert library.bnb_cpu_int8_linear(p, p, p, None, float("nan"), None, p, 4, 4, 4, 0, 1) == 1
    columns = np.array([4], np.int64)
    assert library.bnb_cpu_int8_scaled_mm(p, p, p, p, p, columns.ctypes.data, 1, None, p, 4, 4, 4, 0, 1) == 1


def test_products_over_no_columns_are_zero(lib):
    """There is nothing to point at then: null pointers to codes do not mean that codes are to be made."""
    scales, out = torch.ones(5), torch.full((15,), 7, dtype=torch.int32)
    assert lib.bnb_cpu_int8_matmul(None, None, out.data_ptr(), 3, 5, 0, 1) == 0
    assert not out.any()
    values = torch.full((15,), 7.0)
    arguments = scales.data_ptr(), scales.data_ptr(), None, None, 0, None, values.data_ptr(), 3, 5, 0, 0, 1
    assert lib.bnb_cpu_int8_scaled_mm(None, None, *arguments) == 0
    assert not values.any()
