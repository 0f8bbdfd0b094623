"""LLM.int8() of the CUDA kernels, in the emulation: codes, statistics, integer products and whatever is one rounding of them are the reference's bit
for bit; what a floating point sum went into, within the bound of its rounding."""

import ctypes as ct

from helpers import FLOAT_DTYPES, bell
from native_cpu import at_page_edge
from native_cuda import cuda, cuda_once, emulated_library, emulated_only, here  # noqa: F401  (fixtures among them)
from native_cuda import same_bits_but_any_nan as assert_same_bits
import numpy as np
import pytest
from strategies import KINDS
import torch

from bitsandbytes.backends.cuda import int8
from bitsandbytes.backends.default import int8 as reference

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=["fp32", "fp16", "bf16"])
KERNELS = {"rows": int8.ROWS, "narrow": int8.NARROW, "middle": int8.MIDDLE, "wide": int8.WIDE}
kernels = pytest.mark.parametrize("kernel", list(KERNELS.values()), ids=list(KERNELS))


def random_int8(*shape, seed=0) -> torch.Tensor:
    return here(torch.from_numpy(np.random.default_rng([*shape, seed]).integers(-128, 128, shape, dtype=np.int8)))


def random_weight(N, K):
    return random_int8(N, K), bell(N, seed=3).abs() + 0.1


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is aligned to one element only."""
    return torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(x.shape)


# -------------------------------------------------------------------------------------------------------------------------- quantisation
def assert_quantises(A: torch.Tensor, threshold: float) -> None:
    expected = reference.int8_double_quant(A, threshold)
    for found, wanted in zip(int8.int8_double_quant(A, threshold), expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert_same_bits(found, wanted)
    codes, stats, columns = int8.int8_vectorwise_quant(A, threshold)
    assert_same_bits(codes, expected[0])
    assert_same_bits(stats, expected[2])
    assert columns is None if expected[4] is None else torch.equal(columns, expected[4])


@dtypes
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("threshold", [0.0, 1e-60, 1.5, 6.0, 1e39])
def test_codes_statistics_and_outliers(cuda_once, kind, dtype, threshold):
    for shape in ((1, 300), (5, 70), (2, 3, 33), (64,)):
        assert_quantises(KINDS[kind](bell(torch.Size(shape).numel())).reshape(shape).to(dtype), threshold)


@dtypes
def test_every_row_length_at_every_address(cuda, dtype):
    for columns in (*range(1, 18), 63, 64, 65, 127, 200, 255, 1000, 2049):
        A = bell(3 * columns, seed=columns).view(3, columns).to(dtype)
        assert_quantises(A if columns % 2 else off_by_one(A), 1.5 if columns % 3 else 0.0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 7), (1, 0)])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_nothing_to_quantise(cuda_once, shape, threshold):
    assert_quantises(torch.zeros(shape), threshold)


def test_a_long_row_with_outliers_in_every_stretch(cuda):
    """More columns than the widest block reads at a turn."""
    A = bell(2 * 17000).view(2, 17000).bfloat16()
    assert_quantises(A, 2.5)
    assert_quantises(A[:1].clone(), 2.5)


def test_every_16bit_number(cuda_once):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        finite = x[x.isfinite()]
        assert_quantises((finite * 2.0**-9)[None], 0.0)
        assert_quantises(finite[None], 3.0)


@dtypes
def test_values_beside_every_tie(cuda_once, dtype):
    ties = torch.arange(-127, 127) + 0.5
    for largest in (127.0, 0.3, 1e-20, 3e20):
        values = ties * float(np.float32(largest / 127))
        up, down = torch.nextafter(values, torch.tensor(torch.inf)), torch.nextafter(values, torch.tensor(-torch.inf))
        assert_quantises(torch.cat([values, up, down, torch.tensor([largest])])[None].to(dtype), 0.0)


@pytest.mark.parametrize("special", [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -3e-39, 3.4e38])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_rows_and_columns_with_a_special_value(cuda_once, special, threshold):
    A = torch.ones(4, 80)
    A[1], A[2, 70] = special, special
    assert_quantises(A, threshold)


@dtypes
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 64), (7, 100), (3, 1029), (0, 9)])
def test_dequantisation_rounds_twice(cuda_once, rows, columns, dtype):
    codes, stats = random_int8(rows, columns), bell(rows).abs()
    assert_same_bits(int8.int8_vectorwise_dequant(codes, stats), reference.int8_vectorwise_dequant(codes, stats))
    wide = torch.cat([codes, codes], dim=1)[:, :columns]
    out = torch.empty(rows, columns, dtype=dtype)
    int8._dequantise_into(out, wide, stats)
    assert_same_bits(out, reference.int8_vectorwise_dequant(codes, stats).to(dtype))


# ------------------------------------------------------------------------------------------------------------------- the exact product
GUARD, UNTOUCHED = 16, 0x5A5A5A5A


def exact_product(a, b):
    return here((a.cpu().long() @ b.cpu().long().t()).to(torch.int32))


def assert_multiplies(a, b, kernel) -> None:
    (M, K), N = a.shape, b.shape[0]
    memory = torch.full((GUARD + M * N + GUARD,), UNTOUCHED, dtype=torch.int32)
    out = memory[GUARD : GUARD + M * N]
    int8._matmul(a, a.data_ptr(), b.data_ptr(), out.data_ptr(), M, N, K, kernel)
    assert_same_bits(out.view(M, N), exact_product(a, b))
    assert (memory[:GUARD] == UNTOUCHED).all() and (memory[GUARD + M * N :] == UNTOUCHED).all(), "wrote outside the output"


SHAPES = [
    (1, 1, 1), (1, 3, 16), (2, 5, 17), (3, 2, 512), (5, 17, 513), (8, 33, 96), (16, 32, 1024), (17, 31, 60), (31, 66, 528), (65, 9, 64),
    (70, 130, 48),
]  # fmt: skip


@kernels
@pytest.mark.parametrize("M, N, K", [*SHAPES, (129, 130, 80)])
def test_products_are_exact(cuda, kernel, M, N, K):
    assert_multiplies(random_int8(M, K), random_int8(N, K, seed=1), kernel)


@kernels
@pytest.mark.parametrize("K", [5, 16, 20, 100])
def test_products_at_any_address(cuda_once, kernel, K):
    a, b = random_int8(9, K), random_int8(11, K, seed=1)
    for left, right in ((off_by_one(a), b), (a, off_by_one(b)), (off_by_one(a), off_by_one(b))):
        assert_multiplies(left, right, kernel)


@kernels
@pytest.mark.parametrize("left, right", [(127, 127), (-128, -128), (-128, 127), (127, -128)])
def test_extremes_neither_saturate_nor_lose_a_bit(cuda_once, kernel, left, right):
    for K in (64, 1500):
        a, b = torch.full((6, K), left, dtype=torch.int8), torch.full((5, K), right, dtype=torch.int8)
        b[1] = random_int8(K)
        assert_multiplies(a, b, kernel)


@pytest.mark.parametrize("kernel", [int8.ROWS, int8.NARROW, int8.MIDDLE])
def test_sums_wrap_around_at_32_bits(cuda_once, kernel):
    K = 131_072 + 16  # times 128 * 128: beyond 2**31
    a, b = torch.full((1, K), -128, dtype=torch.int8), torch.full((2, K), -128, dtype=torch.int8)
    b[1] = 127
    assert_multiplies(a, b, kernel)


@kernels
def test_one_code_at_every_place(cuda_once, kernel):
    """A group of columns that meets the wrong one of the other operand, or none, shows."""
    for K in (64, 131, 1040):
        rows = min(K, 70)
        places = torch.arange(rows) * (K // rows)
        a = torch.zeros(rows, K, dtype=torch.int8)
        a[torch.arange(rows), places] = -128
        assert_multiplies(a, random_int8(9, K), kernel)


@pytest.mark.parametrize("capability", [70, 75, 80, 86, 89, 90, 100, 120])
def test_every_architecture_multiplies(cuda_once, capability):
    cuda_once.be(capability)
    for M in (1, 10, 40):
        a, b = random_int8(M, 544), random_int8(70, 544, seed=1)
        assert_multiplies(a, b, int8.AUTO)
    A, (CB, SCB) = bell(20 * 200).view(20, 200), random_weight(30, 200)
    assert_like_the_reference(A, CB, SCB, None, 1.5, int8.AUTO)


def test_old_devices_have_no_tensor_cores(cuda_once):
    cuda_once.be(70)
    a = random_int8(8, 32)
    out = torch.empty(8, 8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="not supported"):
        int8._matmul_into(out, a, a, int8.WIDE)


def test_operators_of_the_exact_product(cuda_once):
    a, b = random_int8(2, 3, 40), random_int8(7, 40, seed=1)
    expected = exact_product(a.view(6, 40), b).view(2, 3, 7)
    assert_same_bits(int8.int8_linear_matmul(a, b), expected)
    out = torch.zeros(2, 3, 14, dtype=torch.int32)[..., ::2]
    int8.int8_linear_matmul_out(a, b, out)
    assert_same_bits(out.contiguous(), expected)
    for shapes in (((0, 8), (3, 8)), ((3, 8), (0, 8)), ((3, 0), (4, 0))):
        a, b = (torch.ones(shape, dtype=torch.int8) for shape in shapes)
        assert_same_bits(int8.int8_linear_matmul(a, b), exact_product(a, b))


@pytest.mark.skipif(not reference._cpu_int_mm_is_exact(), reason="torch._int_mm saturates on this CPU")
def test_many_tokens_are_multiplied_by_the_library_of_torch(cuda_once, monkeypatch):
    monkeypatch.setattr(int8, "_suits_library", lambda *sizes: True)
    monkeypatch.setattr(int8, "_matmul", None)
    a, b = random_int8(2, 16, 40), random_int8(24, 40, seed=1)
    assert_same_bits(int8.int8_linear_matmul(a, b), exact_product(a.view(32, 40), b).view(2, 16, 24))


# --------------------------------------------------------------------------------------------------------- floating point, rounded once
@dtypes
@pytest.mark.parametrize("bias_dtype", [None, *FLOAT_DTYPES])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_integers_become_floats_with_one_last_rounding(cuda_once, dtype, bias_dtype, scale):
    for M, N in ((1, 1), (3, 130), (5, 33), (0, 4), (4, 0)):
        random = np.random.default_rng([M, N])
        product = here(torch.from_numpy(random.integers(-(2**31), 2**31, (M, N), dtype=np.int64).astype(np.int32)))
        row_stats, col_stats = (here(torch.from_numpy(random.uniform(0, scale, n).astype(np.float32))) for n in (M, N))
        bias = None if bias_dtype is None else bell(N).to(bias_dtype)
        arguments = product, row_stats, col_stats, dtype, bias
        assert_same_bits(int8.int8_mm_dequant(*arguments), reference.int8_mm_dequant(*arguments))
        assert_same_bits(int8.int8_mm_dequant(product, row_stats, col_stats), reference.int8_mm_dequant(product, row_stats, col_stats))


@kernels
@dtypes
@pytest.mark.parametrize("M, N, K", [(1, 5, 70), (3, 33, 512), (18, 40, 528)])
def test_scaled_products_of_codes_are_rounded_once(cuda_once, kernel, dtype, M, N, K):
    CA, SCA, (CB, SCB) = random_int8(M, K, seed=2), bell(M).abs(), random_weight(N, K)
    for bias in (None, bell(N).to(dtype)):
        expected = reference.int8_mm_dequant(exact_product(CA, CB), SCA, SCB, dtype, bias)
        assert_same_bits(int8.scaled_product(CA, CB, SCA, SCB, bias, dtype, kernel=kernel), expected)


# ------------------------------------------------------------------------------------------------------------------------- the layer
def without_outliers(A, threshold):
    """A as a float64 matrix without its outliers, and the columns that have any."""
    matrix, columns = reference._split_outliers(A, threshold)
    return matrix, torch.zeros(matrix.shape[1], dtype=torch.bool) if columns is None else torch.isin(torch.arange(matrix.shape[1]), columns)


def product_of_classes(A, CB, SCB, threshold):
    """The layer's product without bias in float64, and the sum of its terms' magnitudes."""
    matrix, columns = without_outliers(A, threshold)
    result = torch.zeros(matrix.shape[0], CB.shape[0], dtype=torch.float64)
    size = result.clone()
    classes = torch.arange(matrix.shape[1]) // 4 % 16
    for c in range(16):
        part = matrix[:, classes == c]
        stats = reference._largest_magnitude(part, dim=1)[:, None]
        codes = reference._to_codes(part, stats)
        codes[:, columns[classes == c]] = 0
        term = (codes.double() @ CB[:, classes == c].double().t()) * stats.double() * SCB.double() / 127**2
        result += term
        size += term.abs()
    outliers = A.reshape(matrix.shape).double()[:, columns]
    weight = CB.double()[:, columns] * SCB.double()[:, None] / 127
    return result + outliers @ weight.t(), size + outliers.abs() @ weight.abs().t(), columns


def assert_within_rounding(y, expected, size, terms) -> None:
    """One rounding to the dtype, and fp32 sums of so many terms whose magnitudes add up to `size`."""
    info = torch.finfo(y.dtype)
    bound = expected.abs() * info.eps * 0.501 + size * 2.0**-24 * (terms + 8) + info.smallest_normal * info.eps + 1e-44
    excess = (y.double().reshape(expected.shape) - expected).abs() - bound
    assert (excess[expected.abs() < info.max] <= 0).all(), f"error beyond the bound by {excess.max()}"


def assert_like_the_reference(A, CB, SCB, bias, threshold, kernel) -> torch.Tensor:
    y, mask = int8.linear(A, CB, SCB, bias, threshold, kernel)
    expected, size, columns = product_of_classes(A, CB, SCB, threshold)
    assert y.shape == (*A.shape[:-1], CB.shape[0]) and y.dtype == A.dtype
    assert_same_bits(mask, columns if threshold > 0 else torch.zeros(0, dtype=torch.bool))
    offset = 0 if bias is None else bias.double()
    terms = 16 * (1 + A.shape[-1] // 512) + int(columns.sum())
    assert_within_rounding(y, expected + offset, size + (0 if bias is None else bias.double().abs()), terms)
    return y


@kernels
@dtypes
@pytest.mark.parametrize("M, N, K", [(1, 5, 70), (2, 34, 1), (4, 33, 512), (7, 40, 1040), (20, 66, 200)])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_layer_rounds_sums_only(cuda_once, kernel, dtype, M, N, K, threshold):
    A, (CB, SCB) = bell(M * K).view(M, K).to(dtype), random_weight(N, K)
    assert_like_the_reference(A, CB, SCB, bell(N).to(dtype) if N % 2 else None, threshold, kernel)


@kernels
@pytest.mark.parametrize("threshold", [1e-60, 0.3, 100.0])
def test_all_many_and_no_columns_are_outliers(cuda, kernel, threshold):
    A, (CB, SCB) = bell(18 * 150).view(18, 150).bfloat16(), random_weight(37, 150)
    assert_like_the_reference(A, CB, SCB, bell(37), threshold, kernel)


@kernels
@pytest.mark.parametrize("period", range(0, 512, 61))
def test_a_class_has_a_scale_of_its_own(cuda_once, kernel, period):
    """One large number makes coarse codes of its own class and of no other: in every class, token and part of a fragment."""
    A, (CB, SCB) = bell(18 * 528).view(18, 528) / 64, random_weight(33, 528)
    for token in range(18):
        A[token, (period + 29 * token) % 528] = 50.0
    assert_like_the_reference(A, CB, SCB, None, 0.0, kernel)


@kernels
@dtypes
@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_a_special_value_stays_in_its_row(cuda_once, kernel, dtype, special):
    A, (CB, SCB) = bell(15 * 100).view(15, 100).to(dtype), random_weight(20, 100)
    A[4, 77] = special
    y, _ = int8.linear(A, CB, SCB, kernel=kernel)
    assert y.isnan().any(dim=1).tolist() == [row == 4 for row in range(15)]
    A[4, 77] = 0
    clean, _ = int8.linear(A, CB, SCB, kernel=kernel)
    others = torch.arange(15) != 4
    assert_same_bits(y[others], clean[others])


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_numbers_beyond_the_range_of_fp16(cuda_once, kernel, dtype, threshold):
    y, _ = int8.linear(torch.full((2, 64), 2.0**100, dtype=dtype), torch.full((3, 64), 127, dtype=torch.int8), torch.ones(3), None, threshold, kernel)
    torch.testing.assert_close(y, torch.full((2, 3), 2.0**106, dtype=dtype), rtol=1e-6, atol=0)


def test_tokens_of_several_slabs(cuda_once):
    """Codes are kept for 8192 tokens at a time; the outlier columns are those of all."""
    A, (CB, SCB) = bell(8200 * 8).view(8200, 8), random_weight(3, 8)
    A[8195, 5] = 7.0
    y = assert_like_the_reference(A, CB, SCB, None, 6.0, int8.AUTO)
    assert y.shape == (8200, 3)


@pytest.mark.parametrize("shape, N", [((0, 8), 3), ((2, 0, 8), 3), ((3, 8), 0), ((3, 0), 4), ((0, 0), 0)])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_empty_products(cuda_once, shape, N, threshold):
    A, (CB, SCB) = torch.full(shape, 5.0), random_weight(N, shape[-1])
    bias = bell(N)
    for found, expected in zip(int8.int8_linear(A, CB, SCB, bias, threshold), reference.int8_linear(A, CB, SCB, bias, threshold)):
        assert_same_bits(found, expected)


def test_strided_operands_are_read_as_they_are_meant(cuda_once):
    A, bias, (CB, SCB) = bell(6 * 50).view(6, 50), bell(9), random_weight(9, 50)
    wide = [torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0] for t in (A, CB, SCB, bias)]
    for found, expected in zip(int8.int8_linear(*wide, 1.0), int8.int8_linear(A, CB, SCB, bias, 1.0)):
        assert_same_bits(found, expected)
    grad = bell(54).view(9, 6).t()
    assert_same_bits(int8.int8_linear_backward(grad, wide[1], wide[2]), int8.int8_linear_backward(grad.contiguous(), CB, SCB))


@kernels
def test_outlier_columns_in_any_order_twice_and_counted_from_the_end(cuda_once, kernel, monkeypatch):
    monkeypatch.setattr(int8, "AUTO", kernel)
    A, (CB, SCB) = bell(5 * 40).view(5, 40), random_weight(7, 40)
    CA, SCA, _ = reference.int8_vectorwise_quant(A)
    plain, empty = int8.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB)
    assert empty.shape == (0,)
    for columns in ([39, 0, 0, 7], [-1, -40, 3], [], list(range(40))):
        for dtype in (torch.int64, torch.int32):
            y, outliers = int8.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor(columns, dtype=dtype))
            expected, _ = reference.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, torch.tensor(columns, dtype=dtype))
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert_same_bits(outliers, A[:, columns])


@kernels
def test_outlier_columns_that_are_not_there_are_passed_over(cuda_once, kernel):
    A, (CB, SCB) = bell(5 * 40).view(5, 40), random_weight(7, 40)
    CA, SCA, _ = reference.int8_vectorwise_quant(A)
    good = int8.scaled_product(CA, CB, SCA, SCB, None, torch.float32, A, torch.tensor([3]), kernel)
    bad = int8.scaled_product(CA, CB, SCA, SCB, None, torch.float32, A, torch.tensor([40, 3, -1, 2**62, -(2**62)]), kernel)
    torch.testing.assert_close(bad, good, rtol=1e-6, atol=1e-6)


@kernels
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_the_order_of_threads_changes_nothing(cuda_once, kernel, threshold):
    A, (CB, SCB) = bell(18 * 600).view(18, 600), random_weight(35, 600)
    first, _ = int8.linear(A, CB, SCB, None, threshold, kernel)
    again, _ = int8.linear(A, CB, SCB, None, threshold, kernel)
    cuda_once.be(reversed_threads=True)
    reverse, _ = int8.linear(A, CB, SCB, None, threshold, kernel)
    assert_same_bits(first, again)
    assert_same_bits(first, reverse)


# ---------------------------------------------------------------------------------------------------------------------- the gradient
BACKWARD = pytest.mark.parametrize("kernel", [int8.SIMPLE_BACKWARD, int8.TILED_BACKWARD], ids=["simple", "tiles"])


def gradient(grad, CB, SCB, kernel):
    out = torch.full((grad.shape[0], CB.shape[1]), torch.nan, dtype=grad.dtype)
    int8.fused_backward_into(out, grad, CB, SCB, kernel)
    return out


@dtypes
@BACKWARD
@pytest.mark.parametrize("N, K", [(4, 8), (36, 64), (64, 136), (140, 24)])
def test_the_gradient_of_a_single_output_is_its_row_of_the_weight(cuda_once, dtype, kernel, N, K):
    if dtype == torch.float32 and kernel == int8.TILED_BACKWARD:
        with pytest.raises(RuntimeError, match="not supported"):
            gradient(torch.eye(N), *random_weight(N, K), kernel)
        return
    CB, SCB = random_weight(N, K)
    assert_same_bits(gradient(torch.eye(N, dtype=dtype), CB, SCB, kernel), reference.int8_vectorwise_dequant(CB, SCB).to(dtype))


def assert_gradient_is_within_rounding(found, grad, CB, SCB) -> None:
    weight = reference.int8_vectorwise_dequant(CB, SCB)
    rounded = weight.to(grad.dtype).double()
    g, weight = grad.double(), weight.double()
    info = torch.finfo(grad.dtype)
    error = g.abs() @ (rounded - weight).abs() + (g.abs() @ weight.abs()) * 2.0**-24 * (CB.shape[0] + 8)
    assert ((found.double() - g @ weight).abs() <= (g @ weight).abs() * info.eps * 0.51 + error + info.smallest_normal).all()


@dtypes
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (3, 5, 7), (8, 128, 128), (15, 33, 64), (17, 12, 24), (40, 132, 72), (65, 64, 130), (128, 20, 8)])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_the_gradient_is_within_the_rounding_of_the_weight(cuda, dtype, M, N, K, mean):
    CB, SCB = random_weight(N, K)
    grad = (bell(M * N).view(M, N) + mean).to(dtype)
    assert_gradient_is_within_rounding(int8.int8_linear_backward(grad, CB, SCB), grad, CB, SCB)
    for at_odd_address in (off_by_one(grad), CB, SCB), (grad, off_by_one(CB), SCB):
        assert_gradient_is_within_rounding(int8.int8_linear_backward(*at_odd_address), *at_odd_address)


@dtypes
def test_many_tokens_take_the_weight_in_slabs(cuda_once, dtype, monkeypatch):
    monkeypatch.setattr(int8, "SLAB_BYTES", 64 * 40 * dtype.itemsize)
    CB, SCB = random_weight(40, 150)
    grad = bell(130 * 40).view(2, 65, 40).to(dtype)
    found = int8.int8_linear_backward(grad, CB, SCB)
    dense = grad.view(130, 40) @ reference.int8_vectorwise_dequant(CB, SCB).to(dtype)
    torch.testing.assert_close(found.view(130, 150), dense)
    assert found.shape == (2, 65, 150)


@pytest.mark.parametrize("shape, N, K", [((0, 4), 4, 8), ((3, 0), 0, 5), ((3, 4), 4, 0)])
def test_empty_gradients(cuda_once, shape, N, K):
    CB, SCB = random_weight(N, K)
    grad = torch.ones(shape)
    assert_same_bits(int8.int8_linear_backward(grad, CB, SCB), reference.int8_linear_backward(grad, CB, SCB))


@pytest.mark.parametrize("capability, dtype, is_tiled", [(75, torch.float16, True), (75, torch.bfloat16, False), (70, torch.float16, False)])
def test_old_devices_take_the_gradient_too(cuda_once, capability, dtype, is_tiled):
    cuda_once.be(capability)
    CB, SCB = random_weight(36, 64)
    grad = torch.eye(36, dtype=dtype)
    assert_same_bits(int8.int8_linear_backward(grad, CB, SCB), reference.int8_vectorwise_dequant(CB, SCB).to(dtype))
    if not is_tiled:
        with pytest.raises(RuntimeError, match="not supported"):
            gradient(grad, CB, SCB, int8.TILED_BACKWARD)


# --------------------------------------------------------------------------------------------------------------- memory, wrong arguments
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("M, N, K", [(1, 3, 7), (3, 33, 64), (18, 4, 68), (5, 8, 528)])
def test_nothing_is_read_or_written_outside_the_operands(emulated_only, cuda_once, M, N, K, at_end):
    """Operands end where an unreadable page begins, or begin where one ends."""

    def edge(tensor):
        return torch.from_numpy(at_page_edge(tensor.numpy(), at_end))

    CB, SCB = map(edge, random_weight(N, K))
    A, bias, grad = edge(bell(M * K).view(M, K)), edge(bell(N)), edge(bell(M * N).view(M, N))
    mask, out, back = edge(torch.zeros(K, dtype=torch.uint8)), edge(torch.zeros(M, N)), edge(torch.zeros(M, K))
    codes, stats = edge(torch.zeros(M, K, dtype=torch.int8)), edge(torch.zeros(M))
    found, count = edge(torch.zeros(K, dtype=torch.int64)), edge(torch.zeros(1, dtype=torch.int64))
    workspace = edge(torch.zeros(int8.workspace_bytes(M, K, True) // 16 * 16 + 16, dtype=torch.uint8))
    a, cb, scb, b = (t.data_ptr() for t in (A, CB, SCB, bias))
    expected, product = reference.int8_vectorwise_quant(A, 1.5), edge(torch.zeros(M, N, dtype=torch.int32))
    int8._quantize(A, a, 0, M, K, 1.5, mask.data_ptr(), found.data_ptr(), count.data_ptr(), stats.data_ptr(), codes.data_ptr(), None, None)
    assert_same_bits(codes, expected[0])
    assert_same_bits(found[: count.item()], expected[2])
    for kernel in KERNELS.values():
        int8._matmul(A, codes.data_ptr(), cb, product.data_ptr(), M, N, K, kernel)
        assert_same_bits(product, exact_product(codes, CB))
        arguments = codes.data_ptr(), cb, stats.data_ptr(), scb, a, found.data_ptr(), count.item(), b, 0, out.data_ptr(), M, N, K, 0, kernel
        int8._scaled_mm(A, *arguments)
        int8._linear(A, a, cb, scb, b, 0, 1.5, mask.data_ptr(), workspace.data_ptr(), workspace.numel(), out.data_ptr(), M, N, K, 0, kernel)
    int8._mm_dequant(A, product.data_ptr(), stats.data_ptr(), scb, b, 0, out.data_ptr(), M, N, 0)
    int8._dequantize(A, cb, K, scb, N, K, 0, edge(torch.zeros(N, K)).data_ptr())
    for given, result in ((grad, back), (edge(grad.half()), edge(back.half()))):
        int8._linear_backward(A, given.data_ptr(), cb, scb, result.data_ptr(), M, N, K, DTYPES[given.dtype], 0)


@dtypes
def test_a_workspace_that_is_too_small_is_refused(cuda_once, dtype):
    cuda_once.bnb_cuda_int8_linear_workspace.argtypes = [ct.c_int64, ct.c_int64, ct.c_int32]
    cuda_once.bnb_cuda_int8_linear_workspace.restype = ct.c_int64
    for M, K, has_threshold in ((1, 1, 0), (3, 100, 1), (8193, 5, 1), (0, 7, 1), (20000, 16, 0)):
        assert cuda_once.bnb_cuda_int8_linear_workspace(M, K, has_threshold) == int8.workspace_bytes(M, K, bool(has_threshold))
    assert cuda_once.bnb_cuda_int8_linear_workspace(-1, 5, 0) == -1
    A, (CB, SCB) = torch.ones(4, 32, dtype=dtype), random_weight(3, 32)
    room = torch.empty(int8.workspace_bytes(4, 32, False) + 16, dtype=torch.uint8)
    out = torch.empty(4, 3, dtype=dtype)
    for address, size in ((room.data_ptr(), room.numel() - 17), (room.data_ptr() + 8, room.numel()), (None, room.numel())):
        with pytest.raises(RuntimeError, match="bad argument"):
            int8._linear(
                A, A.data_ptr(), CB.data_ptr(), SCB.data_ptr(), None, 0, 0.0, None, address, size, out.data_ptr(), 4, 3, 32, DTYPES[dtype], 0
            )  # fmt: skip


@pytest.mark.parametrize(
    "M, N, K, dtype, kernel", [(-1, 4, 4, 0, 0), (4, -1, 4, 0, 0), (4, 4, -1, 0, 0), (2**40, 2**40, 4, 0, 0), (4, 4, 4, 3, 0), (4, 4, 4, 0, 9)]
)
def test_bad_sizes_and_codes_are_refused(cuda_once, M, N, K, dtype, kernel):
    p = torch.ones(64).data_ptr()
    like = torch.ones(1)
    calls = [
        lambda: int8._linear(like, p, p, p, None, 0, 0.0, None, p, 1 << 50, p, M, N, K, dtype, kernel),
        lambda: int8._linear_backward(like, p, p, p, p, M, N, K, dtype, kernel),
        lambda: int8._scaled_mm(like, p, p, p, p, None, None, 0, None, 0, p, M, N, K, dtype, kernel),
    ]
    if dtype == 0:
        calls.append(lambda: int8._matmul(like, p, p, p, M, N, K, kernel))
    for call in calls:
        with pytest.raises(RuntimeError, match="bad argument"):
            call()


def test_null_pointers_and_thresholds_that_do_not_fit_are_refused(cuda_once):
    p = torch.ones(64).data_ptr()
    like = torch.ones(1)
    for missing in range(4):
        A, CB, SCB, out = (None if i == missing else p for i in range(4))
        with pytest.raises(RuntimeError, match="bad argument"):
            int8._linear(like, A, CB, SCB, None, 0, 0.0, None, p, 1 << 20, out, 4, 4, 4, 0, 0)
        with pytest.raises(RuntimeError, match="bad argument"):
            int8._linear_backward(like, A, CB, SCB, out, 4, 4, 4, 0, 0)
    for threshold, mask in ((1.0, None), (0.0, p), (float("nan"), p), (-1.0, p)):
        with pytest.raises(RuntimeError, match="bad argument"):
            int8._linear(like, p, p, p, None, 0, threshold, mask, p, 1 << 20, p, 4, 4, 4, 0, 0)
        with pytest.raises(RuntimeError, match="bad argument"):
            int8._quantize(like, p, 0, 4, 4, threshold, mask, None, None, p, p, None, None)
    with pytest.raises(RuntimeError, match="bad argument"):
        int8._quantize(like, p, 0, 4, 4, 1.0, p, p, None, p, p, None, None)  # a list needs its length


# ------------------------------------------------------------------------------------------------------------------- the legacy interface
INT, POINTER = ct.c_int, ct.c_void_p


def column_major(rows, columns, ld, seed=0):
    """Memory of a matrix whose columns are `ld` apart, and the matrix."""
    memory = random_int8(columns, ld, seed=seed)
    return memory, memory[:, :rows].t()


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 3, 64), (33, 18, 40)])
def test_legacy_products_of_k_by_m_and_k_by_n(cuda_once, m, n, k):
    (A, a), (B, b) = column_major(k, m, k + 3), column_major(k, n, k + 16, seed=1)
    expected = exact_product(a.t(), b.t())
    C = torch.zeros(n, m + 2, dtype=torch.int32)
    arguments = [INT(m), INT(n), INT(k), POINTER(A.data_ptr()), POINTER(B.data_ptr())]
    strides = [INT(k + 3), INT(k + 16), INT(m + 2), POINTER(None)]
    context = POINTER(1234)
    assert cuda_once.cigemmlt_32(context, *arguments, POINTER(C.data_ptr()), POINTER(None), *strides) == 0
    assert_same_bits(C[:, :m].t(), expected)
    assert not C[:, m:].any()

    scales = bell(m).abs() / k / 30
    small = torch.full((n, m + 2), 99, dtype=torch.int8)
    for function, factor in ((cuda_once.cigemmlt_8, torch.ones(m)), (cuda_once.cigemmlt_8_rowscale, scales)):
        assert function(context, *arguments, POINTER(small.data_ptr()), POINTER(scales.data_ptr()), *strides) == 0
        wanted = (expected.float() * factor[:, None]).round().clamp(-128, 127).to(torch.int8)
        assert_same_bits(small[:, :m].t(), wanted)
        assert (small[:, m:] == 99).all()


def test_legacy_products_report_bad_arguments(cuda_once):
    p = POINTER(torch.zeros(64, dtype=torch.int32).data_ptr())
    for function in (cuda_once.cigemmlt_32, cuda_once.cigemmlt_8, cuda_once.cigemmlt_8_rowscale):
        for m, n, k, lda, ldb, ldc in ((2, 2, -1, 4, 4, 4), (-2, 2, 2, 4, 4, 4), (2, 2, 4, 3, 4, 4), (2, 2, 4, 4, 3, 4), (2, 2, 4, 4, 4, 1)):
            assert function(None, INT(m), INT(n), INT(k), p, p, p, p, INT(lda), INT(ldb), INT(ldc), None) == 1
        assert function(None, INT(2), INT(2), INT(2), None, p, p, p, INT(4), INT(4), INT(4), None) == 1
    assert cuda_once.cigemmlt_8_rowscale(None, INT(2), INT(2), INT(2), p, p, p, None, INT(4), INT(4), INT(4), None) == 1


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_legacy_igemm_and_batches_of_it(cuda_once, transpose_a, transpose_b):
    m, n, k, batches = 5, 7, 19, 3
    matrices = []
    for transpose, (rows, columns), seed in ((transpose_a, (m, k), 0), (transpose_b, (k, n), 9)):
        shape = (columns, rows) if transpose else (rows, columns)
        ld = shape[0] + 2
        memory = random_int8(batches, shape[1], ld, seed=seed)
        values = memory[:, :, : shape[0]].transpose(1, 2)
        matrices.append((memory, ld, values.transpose(1, 2) if transpose else values))
    (A, lda, a), (B, ldb, b) = matrices
    C = torch.zeros(batches, n, m + 1, dtype=torch.int32)
    flags = [None, ct.c_bool(transpose_a), ct.c_bool(transpose_b), INT(m), INT(n), INT(k)]
    pointers = [POINTER(t.data_ptr()) for t in (A, B, C)]
    strides = [INT(lda), INT(ldb), INT(m + 1)]
    cuda_once.cigemm(*flags, *pointers, *strides)
    expected = here((a.cpu().long() @ b.cpu().long()).to(torch.int32))
    assert_same_bits(C[0, :, :m].t(), expected[0])
    assert not C[1:].any()
    cuda_once.cbatched_igemm(*flags, *pointers, *strides, *(ct.c_long(t[0].numel()) for t in (A, B, C)), INT(batches))
    assert_same_bits(C[:, :, :m].transpose(1, 2), expected)
    before = C.clone()
    cuda_once.cigemm(*flags[:3], INT(m), INT(n), INT(k), *pointers, INT(1), INT(ldb), INT(m + 1))  # a leading dimension that cannot be
    assert_same_bits(C, before)


@pytest.mark.parametrize("has_bias", [False, True])
def test_legacy_dequantisation_of_products(cuda_once, has_bias):
    product, rows, columns = torch.arange(-300, 300, dtype=torch.int32).view(12, 50) * 999, bell(12).abs(), bell(50).abs()
    bias = bell(50, seed=5).half() if has_bias else None
    out = torch.empty(12, 50, dtype=torch.float16)
    pointers = [POINTER(None if t is None else t.data_ptr()) for t in (product, rows, columns, out, bias)]
    cuda_once.cdequant_mm_int32_fp16(*pointers, INT(12), INT(50), POINTER(None))
    assert_same_bits(out, reference.int8_mm_dequant(product, rows, columns, torch.float16, bias))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_legacy_quantisation_of_rows(cuda_once, threshold):
    """Outliers alone get the code 0 here, not their columns."""
    A = bell(7 * 130).view(7, 130).half()
    codes, stats = torch.empty(7, 130, dtype=torch.int8), torch.empty(7)
    cuda_once.cint8_vector_quant(*(POINTER(t.data_ptr()) for t in (A, codes, stats)), ct.c_float(threshold), INT(7), INT(130), POINTER(None))
    kept = A.float().masked_fill(A.abs() >= threshold, 0.0) if threshold > 0 else A.float()
    expected = reference.int8_vectorwise_quant(kept)
    assert_same_bits(codes, expected[0])
    assert_same_bits(stats, expected[1])
