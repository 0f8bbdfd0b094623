"""LLM.int8() in Triton: codes, statistics and exact products bit for bit, the layer's product up to the rounding of float32 sums."""

import gpu_rounding  # noqa: F401  (before anything is computed)
from helpers import FLOAT_DTYPES, assert_same_bits, bell, grid
from hypothesis import example, given
from hypothesis import strategies as st
from native_cpu import assert_same_floats
import pytest
from strategies import float_dtypes, float_tensors
import torch

from bitsandbytes.backends.default import int8 as reference
from bitsandbytes.backends.triton import int8

matrices = float_tensors().filter(lambda A: A.dim() > 1 and A.numel() < 3000)
thresholds = st.sampled_from([0.0, 1e-60, 0.3, 1.0, 6.0])


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        if other is None or other.dtype != torch.float32:
            assert one is None if other is None else torch.equal(one, other)
        else:
            assert_same_floats(one.flatten(), other.flatten())


@given(A=matrices, threshold=thresholds)
@example(A=torch.full((3, 50), 9.0), threshold=6.0)  # nothing but outliers
@example(A=torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [0.0, 0.0], [1e-45, 0.0], [3e38, -2e38]]), threshold=0.0)
@example(A=bell(2 * 1100).view(2, 1100), threshold=2.0)  # more than a tile
@example(A=torch.zeros(0, 5), threshold=1.0)
@example(A=torch.zeros(5, 0), threshold=1.0)
def test_codes_and_statistics(A, threshold):
    assert_same(int8.int8_vectorwise_quant(A, threshold), reference.int8_vectorwise_quant(A, threshold))
    assert_same(int8.int8_double_quant(A, threshold), reference.int8_double_quant(A, threshold))


def test_codes_beside_every_tie():
    ties = torch.arange(-127, 127) + 0.5
    for largest in (127.0, 0.3, 1e-20, 3e20):
        values = ties * (largest / 127)
        rows = [values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(torch.tensor(-torch.inf))]
        A = torch.cat([torch.stack(rows), torch.full((3, 1), largest)], dim=1)
        assert_same(int8.int8_vectorwise_quant(A), reference.int8_vectorwise_quant(A))


@given(lead=st.sampled_from([(), (1,), (2, 3), (40,), (0,)]), N=st.integers(0, 70), K=st.integers(0, 300))
def test_products_are_exact(lead, N, K):
    A, B = random_int8(*lead, K), random_int8(N, K)
    expected = (A.long() @ B.long().T).int()
    assert_same_bits(int8.int8_linear_matmul(A, B), expected)
    out = torch.zeros(*lead, 2 * N, dtype=torch.int32)[..., ::2]
    int8.int8_linear_matmul_out(A, B, out)
    assert_same_bits(out.contiguous(), expected)


def test_products_by_fp16_are_exact(monkeypatch):
    """For GPUs without matrix instructions for int8. The largest sums there can be, and random ones."""
    monkeypatch.setattr(int8, "_multiplies_int8", lambda device: False)
    for A, B in ((torch.full((3, 4000), -128), torch.full((5, 4000), -128)), (random_int8(20, 333), random_int8(70, 333))):
        assert torch.equal(int8.int8_linear_matmul(A.to(torch.int8), B.to(torch.int8)), (A.long() @ B.long().T).int())


@given(M=st.integers(0, 20), N=st.integers(0, 80), K=st.integers(1, 90), dtype=float_dtypes, has_bias=st.booleans())
def test_values_of_codes_and_of_products(M, N, K, dtype, has_bias):
    A, B, row_stats, col_stats = random_int8(M, K), random_int8(N, K), torch.rand(M), torch.rand(N)
    bias = torch.randn(N).bfloat16() if has_bias else None
    product = reference.int8_linear_matmul(A, B)
    expected = reference.int8_mm_dequant(product, row_stats, col_stats, dtype, bias)
    assert_same_bits(int8.int8_mm_dequant(product, row_stats, col_stats, dtype, bias), expected)
    assert_same_bits(int8.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype), expected)
    assert_same_bits(int8.int8_vectorwise_dequant(A, row_stats), reference.int8_vectorwise_dequant(A, row_stats))


def assert_close_to_sum(y, expected, A, CB, SCB):
    """One rounding to the dtype, and float32 sums of at most a few hundred terms."""
    size = A.double().abs().reshape(-1, A.shape[-1]) @ (CB.double().abs() * SCB.double()[:, None] / 127).T
    bound = expected.double().abs() * torch.finfo(y.dtype).eps + 2.0**-18 * (size + 1).view(y.shape)
    assert ((y.double() - expected.double()).abs() <= bound).all()


@grid(dtype=FLOAT_DTYPES, threshold=(0.0, 1.5), shape=((1, 20, 7), (5, 33, 130), (40, 70, 300), (3, 4, 2100), (0, 4, 5)))
def test_the_product_of_a_layer(dtype, threshold, shape):
    M, N, K = shape
    A, CB, SCB = torch.randn(M, K).to(dtype), random_int8(N, K), torch.rand(N)
    bias = torch.randn(N) if M % 2 else None
    y, is_outlier = int8.int8_linear(A, CB, SCB, bias, threshold)
    expected, expected_mask = reference.int8_linear(A, CB, SCB, bias, threshold)
    assert_same_bits(is_outlier, expected_mask)
    if threshold == 0.0 and K <= 2048:  # the sum of every class is exact, and there is nothing else
        assert_same_bits(y, expected)
    assert_close_to_sum(y, expected, A, CB, SCB)

    codes, stats, columns = reference.int8_vectorwise_quant(A, threshold)
    y, outliers = int8.int8_mixed_scaled_mm(A, codes, CB, stats, SCB, columns, bias)
    expected, expected_outliers = reference.int8_mixed_scaled_mm(A, codes, CB, stats, SCB, columns, bias)
    assert_same_bits(outliers, expected_outliers)
    assert_close_to_sum(y, expected, A, CB, SCB)


def test_outlier_columns_in_any_order_twice_and_counted_from_the_end():
    A, CB, SCB = torch.randn(5, 40), random_int8(7, 40), torch.rand(7)
    CA, SCA, _ = reference.int8_vectorwise_quant(A)
    for columns in ([39, 0, 0, 7], [-1, -40, 3], []):
        for dtype in (torch.int64, torch.int32):
            listed = torch.tensor(columns, dtype=dtype)
            y, outliers = int8.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, listed)
            expected, expected_outliers = reference.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, listed)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert_same_bits(outliers, expected_outliers)


@pytest.mark.parametrize("columns", [[40], [-41], [2**40]])
def test_an_outlier_column_that_is_not_there_is_refused(columns):
    A, CB, SCB = torch.randn(5, 40), random_int8(7, 40), torch.rand(7)
    CA, SCA, _ = reference.int8_vectorwise_quant(A)
    with pytest.raises(IndexError):
        int8.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor(columns))


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_special_value_stays_in_its_row(special):
    A, CB, SCB = torch.randn(5, 100), random_int8(20, 100), torch.rand(20) + 0.1
    A[2, 77] = special
    y, _ = int8.int8_linear(A, CB, SCB)
    assert y.isnan().any(dim=1).tolist() == [row == 2 for row in range(5)]
