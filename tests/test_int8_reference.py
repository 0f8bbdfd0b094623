"""LLM.int8(): row quantisation, the exact product, the way back, against a second opinion in NumPy."""

import os
import warnings

from helpers import FLOAT_DTYPES, assert_same_bits, bell, from_numpy, grid, run_python, sawtooth, seeded, sha, short_name
from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import pytest
from strategies import float_tensors
import torch

from bitsandbytes import functional as F
from bitsandbytes.backends.default import int8

ops = torch.ops.bitsandbytes

# The matrix of the recorded digests.
W = sawtooth(65536, 65521, 12289, divisor=64 * 512).view(256, 256)

EXTREMES = st.sampled_from(["random", "120 to 127", "all 127", "all -128", "127 by -128"])


def int8_matrix(rows, columns, seed=0):
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=seeded(seed))


def model_lines(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and statistics of an fp32 matrix, one statistic for each index of the other axis."""
    stats = np.abs(x).max(axis=axis) if x.shape[axis] else np.zeros(x.shape[1 - axis], dtype=np.float32)
    with np.errstate(all="ignore"):
        scaled = np.rint(x * np.expand_dims(np.float32(127) / stats, axis))
    return np.nan_to_num(scaled, nan=0, posinf=127, neginf=-127).astype(np.int8), stats


def model_quant(A: torch.Tensor, threshold: float = 0.0):
    """What int8_vectorwise_quant must return, and the matrix without its outliers."""
    x = A.to(torch.float32).reshape(-1, A.shape[-1]).cpu().numpy().copy()
    outliers = np.abs(x) >= np.float32(threshold) if threshold > 0 else np.zeros_like(x, dtype=bool)
    x[outliers] = 0
    codes, stats = model_lines(x, axis=1)
    columns = np.flatnonzero(outliers.any(axis=0))
    codes[:, columns] = 0
    return from_numpy(codes).view(A.shape), from_numpy(stats), from_numpy(columns), x


def exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return from_numpy((A.cpu().numpy().astype(np.int64) @ B.cpu().numpy().astype(np.int64).T).astype(np.int32))


# ------------------------------------------------------------------------------------------------------------------ quantisation
@given(A=float_tensors().filter(lambda A: A.shape[-1] > 0), threshold=st.sampled_from([0.0, 0.5, 1.5, 6.0]))
def test_codes_statistics_and_outlier_columns_follow_the_rule(A, threshold):
    codes, stats, columns, _ = model_quant(A, threshold)
    actual_codes, actual_stats, actual_columns = ops.int8_vectorwise_quant(A, threshold)
    assert_same_bits(actual_codes, codes)
    torch.testing.assert_close(actual_stats, stats, rtol=0, atol=0, equal_nan=True)  # one NaN is as good as another
    if threshold == 0.0:
        assert actual_columns is None
    else:
        assert_same_bits(actual_columns, columns)


@given(A=float_tensors(), threshold=st.sampled_from([0.0, 1.0]))
def test_quantising_leaves_the_input_alone(A, threshold):
    before, version = A.clone(), A._version
    ops.int8_vectorwise_quant(A, threshold)
    assert_same_bits(A, before)
    assert A._version == version


def test_inference_tensors_and_saved_activations_can_be_quantised():
    with torch.inference_mode():
        ops.int8_vectorwise_quant(torch.full((2, 4), 9.0), 6.0)
    x = torch.zeros(2, 4, requires_grad=True)
    y = (x + 9.0).exp()
    ops.int8_vectorwise_quant(y.detach(), 6.0)
    y.sum().backward()  # exp saved y: writing into it would be an error here
    assert x.grad.isfinite().all()


def test_an_outlier_takes_its_column_out_of_every_row_and_itself_out_of_the_statistic():
    A = torch.tensor([[1.0, -7.0, 2.0], [3.0, 0.5, -4.0]], dtype=torch.float16)
    codes, stats, columns = ops.int8_vectorwise_quant(A, 6.0)
    assert columns.tolist() == [1]
    assert stats.tolist() == [2.0, 4.0]
    assert codes.tolist() == [[64, 0, 127], [95, 0, -127]]


def test_a_magnitude_equal_to_the_threshold_is_an_outlier():
    _, _, columns = ops.int8_vectorwise_quant(torch.tensor([[5.9990234375, 6.0, -6.0]]), 6.0)
    assert columns.tolist() == [1, 2]


def test_no_outlier_gives_an_empty_list():
    _, _, columns = ops.int8_vectorwise_quant(torch.ones(2, 3), 6.0)
    assert columns.dtype == torch.int64 and columns.shape == (0,)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_usable_statistic_gets_zero_codes_and_keeps_the_statistic(value):
    A = torch.ones(2, 5)
    A[0] = 0.0
    A[0, 3] = value
    codes, stats, _ = ops.int8_vectorwise_quant(A)
    assert codes[0].tolist() == [0] * 5 and codes[1].tolist() == [127] * 5
    assert_same_bits(stats, torch.tensor([abs(value), 1.0]))


def test_a_row_of_denormals_keeps_its_signs():
    tiny = torch.tensor([[1e-45, -1e-45, 0.0]])
    codes, stats, _ = ops.int8_vectorwise_quant(tiny)
    assert codes.tolist() == [[127, -127, 0]] and stats.item() == tiny[0, 0].item()


def test_bfloat16_beyond_the_range_of_float16_is_quantised():
    codes, stats, _ = ops.int8_vectorwise_quant(torch.tensor([[2.0**100, -(2.0**99)]], dtype=torch.bfloat16))
    assert codes.tolist() == [[127, -64]] and stats.isfinite().all()


@grid(shape=[(0, 4), (3, 0), (0, 0), (0,), (2, 0, 3)], threshold=[0.0, 1.0])
def test_empty_inputs(shape, threshold):
    codes, stats, columns = ops.int8_vectorwise_quant(torch.empty(shape), threshold)
    assert codes.shape == shape and codes.dtype == torch.int8
    assert_same_bits(stats, torch.zeros(torch.Size(shape[:-1]).numel()))
    assert columns is None if threshold == 0.0 else columns.shape == (0,)


@given(A=float_tensors().filter(lambda A: A.shape[-1] > 0), threshold=st.sampled_from([0.0, 1.5]))
def test_double_quantisation_does_rows_and_columns(A, threshold):
    row_codes, row_stats, columns, matrix = model_quant(A, threshold)
    col_codes, col_stats = (from_numpy(t) for t in model_lines(matrix, axis=0))
    actual = ops.int8_double_quant(A, threshold)
    assert_same_bits(actual[0], row_codes)
    assert_same_bits(actual[1], col_codes.view(A.shape))
    for got, wanted in zip(actual[2:4], (row_stats, col_stats)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)  # one NaN is as good as another
    if threshold == 0.0:
        assert actual[4] is None
    else:
        assert_same_bits(actual[4], columns)


@given(A=float_tensors(kinds=("bell", "tiny", "steps", "one_sign")).filter(lambda A: A.shape[-1] > 0))
def test_a_round_trip_is_within_half_a_step(A):
    codes, stats, _ = ops.int8_vectorwise_quant(A)
    restored = ops.int8_vectorwise_dequant(codes, stats)
    step = (stats / 127).double().view(*A.shape[:-1], 1)
    assert restored.shape == A.shape and restored.dtype == torch.float32
    assert ((restored.double() - A.double()).abs() <= step * 0.50001).all()


def test_dequantisation_multiplies_by_the_statistic_first():
    codes, stats = int8_matrix(9, 31), bell(9).abs()
    expected = (codes.cpu().numpy().astype(np.float32) * stats.cpu().numpy()[:, None]) * np.float32(1 / 127)
    assert_same_bits(ops.int8_vectorwise_dequant(codes, stats), from_numpy(expected))


# ----------------------------------------------------------------------------------------------------------------------- product
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    length=st.one_of(st.integers(0, 70), st.sampled_from([1023, 1024, 1025, 2049, 5000])),
    extreme=EXTREMES,
    trusted=st.booleans(),
)
@example(rows=3, columns=2, length=5000, extreme="120 to 127", trusted=False)
@example(rows=3, columns=2, length=131071, extreme="all -128", trusted=False)
@example(rows=1, columns=2, length=1, extreme="random", trusted=True)
@example(rows=17, columns=8, length=131072, extreme="127 by -128", trusted=True)
def test_the_product_is_exact(rows, columns, length, extreme, trusted):
    A, B = int8_matrix(rows, length, seed=1), int8_matrix(columns, length, seed=2)
    if extreme == "120 to 127":  # large sums whose last bit counts
        A.remainder_(8).add_(120)
        B.remainder_(8).add_(120)
    elif extreme != "random":
        A.fill_(-128 if extreme == "all -128" else 127)
        B.fill_(127 if extreme == "all 127" else -128)
    with pytest.MonkeyPatch.context() as patch:
        if not trusted:
            patch.setattr(int8, "_cpu_int_mm_is_exact", lambda: False)
        product = int8.int8_linear_matmul(A, B)
    assert_same_bits(product, exact_product(A, B))
    assert_same_bits(ops.int8_linear_matmul(A, B), product)


def test_the_product_is_exact_where_the_processor_would_saturate():
    """oneDNN without VNNI instructions adds pairs of products in 16 bits; its own switch brings that about on any x86."""
    code = """
import torch, bitsandbytes
A = torch.full((20, 300), 127, dtype=torch.int8)
print((torch.ops.bitsandbytes.int8_linear_matmul(A, A) == 300 * 127**2).all().item())
"""
    done = run_python(code, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 7), (1, 3, 2, 7), (0, 7)])
def test_the_product_keeps_leading_dimensions(shape):
    A, B = torch.ones(shape, dtype=torch.int8), int8_matrix(5, 7)
    product = ops.int8_linear_matmul(A, B)
    assert product.shape == (*shape[:-1], 5) and product.dtype == torch.int32
    assert (product == B.sum(dim=1)).all()


def test_operands_and_result_may_be_strided():
    A, B = int8_matrix(64, 40)[::2, ::2], int8_matrix(20, 30).t()
    out = torch.zeros(30, 32, dtype=torch.int32).t()
    ops.int8_linear_matmul.out(A, B, out)
    assert_same_bits(out.contiguous(), exact_product(A, B))


# -------------------------------------------------------------------------------------------------------------- way back, composed
def model_mm_dequant(product, row_stats, col_stats, bias, dtype):
    scale = row_stats.cpu().numpy().reshape(-1, 1) * col_stats.cpu().numpy().reshape(1, -1)
    values = product.cpu().numpy().reshape(scale.shape).astype(np.float32) * scale * np.float32(1 / (127 * 127))
    if bias is not None:
        values = values + bias.to(torch.float32).cpu().numpy()
    return from_numpy(values.astype(np.float32)).to(dtype).view(product.shape)


@grid(dtype=FLOAT_DTYPES, bias_dtype=[None, *FLOAT_DTYPES], shape=[(6, 10), (2, 3, 10), (10,), (0, 10)])
def test_way_back_rounds_once_and_keeps_the_shape(dtype, bias_dtype, shape):
    product = torch.randint(-(2**28), 2**28, shape, dtype=torch.int32)
    row_stats, col_stats = torch.rand(torch.Size(shape[:-1]).numel()), torch.rand(10)
    bias = None if bias_dtype is None else bell(10).to(bias_dtype)
    actual = ops.int8_mm_dequant(product, row_stats, col_stats, dtype=dtype, bias=bias)
    assert_same_bits(actual, model_mm_dequant(product, row_stats, col_stats, bias, dtype))


def test_way_back_gives_float16_where_no_dtype_is_asked_for():
    assert ops.int8_mm_dequant(torch.ones(2, 2, dtype=torch.int32), torch.ones(2), torch.ones(2)).dtype == torch.float16


def test_statistics_may_be_columns():
    product, row_stats, col_stats = torch.randint(-999, 999, (4, 6), dtype=torch.int32), torch.rand(4, 1), torch.rand(1, 6)
    expected = ops.int8_mm_dequant(product, row_stats.view(-1), col_stats.view(-1))
    assert_same_bits(ops.int8_mm_dequant(product, row_stats, col_stats), expected)


@grid(dtype=FLOAT_DTYPES, has_bias=[False, True], rank=[1, 2, 3])
def test_scaled_product_approximates_the_float_product(dtype, has_bias, rank):
    A = bell(24 * 300, seed=3).view(24, 300).to(dtype)
    A = {1: A[0], 2: A, 3: A.view(2, 12, 300)}[rank]
    B = bell(40 * 300, seed=4).view(40, 300).to(dtype)
    bias = bell(40, seed=5).to(dtype) if has_bias else None
    (CA, SCA, _), (CB, SCB, _) = ops.int8_vectorwise_quant(A), ops.int8_vectorwise_quant(B)
    result = ops.int8_scaled_mm(CA, CB, SCA, SCB, bias=bias, dtype=dtype)
    exact = torch.nn.functional.linear(A.double(), B.double(), None if bias is None else bias.double())
    assert result.shape == exact.shape and result.dtype == dtype
    assert (result.double() - exact).norm() < 0.02 * exact.norm()


@grid(dtype=FLOAT_DTYPES, rank=[2, 3])
def test_outlier_columns_are_multiplied_in_floating_point(dtype, rank):
    A = bell(24 * 300, seed=3).view(24, 300)
    A[3, 17] = 5000.0  # alone it would leave the rest of its row no codes
    A[9, 200] = -800.0
    A = A.to(dtype).view((24, 300) if rank == 2 else (4, 6, 300))
    B = bell(40 * 300, seed=4).view(40, 300).to(dtype)
    (CA, SCA, columns), (CB, SCB, _) = ops.int8_vectorwise_quant(A, 6.0), ops.int8_vectorwise_quant(B)
    result, outliers = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, columns, None)
    assert columns.tolist() == [17, 200]
    assert_same_bits(outliers, A.view(24, 300)[:, columns])
    weight = ops.int8_vectorwise_dequant(CB, SCB).double()
    exact = A.double() @ weight.t()
    assert result.shape == exact.shape and result.dtype == dtype
    limit = 0.02 * (bell(1).numel() + 300**0.5) + 2.0**-7 * exact.abs()  # a code step a row, and the rounding of the result
    assert ((result.double() - exact).abs() < limit).all()


def test_mixed_product_without_outlier_columns_is_the_scaled_product():
    A = bell(5 * 64).view(5, 64).to(torch.bfloat16)
    (CA, SCA, columns), (CB, SCB, _) = ops.int8_vectorwise_quant(A, 60.0), ops.int8_vectorwise_quant(bell(640).view(10, 64))
    bias = bell(10).to(torch.bfloat16)
    expected = ops.int8_scaled_mm(CA, CB, SCA, SCB, bias, torch.bfloat16)
    for given_columns, shape in ((columns, (5, 0)), (None, (0,))):
        result, outliers = ops.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, given_columns, bias)
        assert_same_bits(result, expected)
        assert outliers.shape == shape and outliers.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- recorded from the published library
def test_recorded_digests():
    codes, stats, _ = ops.int8_vectorwise_quant(W)
    assert (sha(codes), sha(stats)) == ("2b8bc52bd1ab76d4b07789c5", "0f677f1deffd058d3352a8ec")
    product = ops.int8_linear_matmul(codes, codes)
    assert product[0, :4].tolist() == [1381700, 1417899, 1422563, 1373752]
    assert sha(product) == "f1c3d2b27b4d2386785eb6b0"
    assert sha(ops.int8_vectorwise_dequant(codes, stats)) == "bdef69279192489978ee219e"


def test_recorded_digests_with_outliers():
    A = W / 4
    A[5, 7], A[9, 200] = 3.0, -2.5
    codes, stats, columns = ops.int8_vectorwise_quant(A, 2.0)
    assert (sha(codes), sha(stats)) == ("904f4229a5c48f043475af94", "0684d6e842ad62578011ceea")
    assert columns.tolist() == [7, 200]


def test_way_back_differs_from_the_published_one_by_its_constant_only(monkeypatch):
    """The published PyTorch kernels have 6.200124e-05 for 1 / 127**2, too high by 1.8e-5 of it; its CUDA kernels have ours."""
    codes, stats, _ = ops.int8_vectorwise_quant(W)
    product = ops.int8_linear_matmul(codes, codes)
    monkeypatch.setattr(int8, "_PER_PRODUCT", 6.200124e-05)
    digests = [sha(int8.int8_mm_dequant(product, stats, stats, dtype)) for dtype in (torch.float32, None)]
    assert digests == ["0c0f6c4a04338f5bffcc9403", "b7f9e2572a94dd61f054e6e6"]


# ----------------------------------------------------------------------------------------------------------- deprecated products
@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.parametrize("function", [F.check_matmul, F.igemm, F.batched_igemm], ids=lambda f: f.__name__)
def test_old_products_warn_on_every_call(function):
    assert function.__deprecated__
    A = torch.ones(1, 2, 2, dtype=torch.int8)
    for _ in range(2):
        with pytest.warns(FutureWarning, match="deprecated"):
            function(A, A, None, False, False)


@grid(transposed_A=[False, True], transposed_B=[False, True], batch=[(), (3,)])
def test_old_products_are_exact(quiet, transposed_A, transposed_B, batch):
    a, b = (torch.randint(-128, 128, (*batch, *shape), dtype=torch.int8) for shape in ((4, 2000), (2000, 6)))
    expected = (a.double() @ b.double()).to(torch.int32)
    A, B = a.mT.contiguous() if transposed_A else a, b.mT.contiguous() if transposed_B else b
    assert F.check_matmul(A, B, None, transposed_A, transposed_B) == expected.shape
    assert_same_bits(F.igemm(A, B, None, transposed_A, transposed_B), expected)
    out = torch.zeros_like(expected)
    assert F.igemm(A, B, out, transposed_A, transposed_B) is out
    assert_same_bits(out, expected)
    if batch:
        assert_same_bits(F.batched_igemm(A, B, None, transposed_A, transposed_B), expected)


def test_old_product_of_a_batch_and_one_matrix(quiet):
    A, B = int8_matrix(6, 8).view(2, 3, 8), int8_matrix(8, 5)
    assert_same_bits(F.igemm(A, B), (A.double() @ B.double()).to(torch.int32))


def test_old_product_over_batch_and_sequence(quiet):
    A, B = int8_matrix(24, 8).view(2, 12, 8), int8_matrix(24, 5, seed=1).view(2, 12, 5)
    out = torch.zeros(8, 5, dtype=torch.int32)
    F.igemm(A, B, out=out)
    assert_same_bits(out, torch.einsum("bsi,bso->io", A.double(), B.double()).to(torch.int32))


@pytest.mark.parametrize(
    "a, b, out",
    [((4, 8), (7, 3), None), ((4, 8), (8, 3), (4, 4)), ((8,), (8, 3), None), ((4, 8), (2, 8, 3), None), ((2, 4, 8), (3, 8, 5), None)],
    ids=str,
)
def test_old_products_refuse_shapes_that_do_not_fit(quiet, a, b, out):
    with pytest.raises(ValueError, match="Tensor dimensions incorrect"):
        F.igemm(torch.ones(a, dtype=torch.int8), torch.ones(b, dtype=torch.int8), None if out is None else torch.zeros(out, dtype=torch.int32))


def test_old_products_refuse_other_dtypes(quiet):
    with pytest.raises(TypeError, match="float32"):
        F.check_matmul(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int8), None, False, False)
    with pytest.raises(ValueError, match="three-dimensional"):
        F.batched_igemm(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2, dtype=torch.int8))


# ------------------------------------------------------------------------------------------------------------- the whole layer
def model_linear(A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None, threshold: float):
    """float64 result of the whole layer, the sum of magnitudes that bounds its rounding, and the mask of outlier columns."""
    x = A.double().view(-1, A.shape[-1])
    outliers = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    is_outlier, kept = outliers.any(0), x.masked_fill(outliers, 0.0)
    weight = CB.double() * SCB.double()[:, None] / 127
    product = size = torch.zeros(x.shape[0], CB.shape[0], dtype=torch.float64)
    for c in range(16):
        of_class = torch.arange(x.shape[1]) // 4 % 16 == c
        if not of_class.any():
            continue
        codes, stats, _, _ = model_quant(kept[:, of_class].to(A.dtype), 0.0)
        codes = codes.view(x.shape[0], -1).masked_fill(is_outlier[of_class], 0)
        term = exact_product(codes, CB[:, of_class]).double() * stats.double()[:, None] * SCB.double() / 127**2
        product, size = product + term, size + term.abs()
    added = torch.zeros(CB.shape[0], dtype=torch.float64) if bias is None else bias.double()
    of_outliers = x[:, is_outlier]
    size = size + of_outliers.abs() @ weight[:, is_outlier].abs().t() + added.abs()
    return product + of_outliers @ weight[:, is_outlier].t() + added, size, is_outlier if threshold > 0 else is_outlier[:0]


@given(
    A=float_tensors(kinds=("bell", "tiny", "huge", "zeros", "sparse", "steps")).filter(lambda A: A.shape[-1] > 0),
    N=st.integers(0, 20),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    bias=st.sampled_from([None, *FLOAT_DTYPES]),
)
def test_the_whole_layer_rounds_once(A, N, threshold, bias):
    CB, SCB = int8_matrix(N, A.shape[-1]), bell(N, 2).abs() + 0.1
    bias = None if bias is None else bell(N, 3).to(bias)
    y, mask = ops.int8_linear(A, CB, SCB, bias, threshold)
    expected, size, is_outlier = model_linear(A, CB, SCB, bias, threshold)
    assert y.shape == (*A.shape[:-1], N) and y.dtype == A.dtype
    assert_same_bits(mask, is_outlier)
    y = y.double().view(expected.shape)
    finite = expected.abs() < torch.finfo(A.dtype).max  # fp16 has no room for some
    unit, smallest = torch.finfo(A.dtype).eps, torch.finfo(A.dtype).smallest_normal * torch.finfo(A.dtype).eps
    bound = expected.abs() * unit * 0.501 + size * 2.0**-24 * (A.shape[-1] + 8) + smallest + 1e-44
    assert ((y - expected).abs() <= bound)[finite].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short_name)
def test_the_whole_layer_goes_beyond_the_range_of_float16(dtype):
    A = torch.full((2, 64), 2.0**100, dtype=dtype)
    y, _ = ops.int8_linear(A, torch.full((3, 64), 127, dtype=torch.int8), torch.ones(3))
    assert_same_bits(y, torch.full((2, 3), 2.0**106, dtype=dtype))


@given(grad=float_tensors(kinds=("bell", "steps", "one_sign")).filter(lambda grad: grad.shape[-1] > 0), K=st.integers(0, 20))
def test_the_gradient_is_the_product_with_the_dequantised_weight(grad, K):
    N = grad.shape[-1]
    CB, SCB = int8_matrix(N, K), bell(N, 2).abs() + 0.1
    x = ops.int8_linear_backward(grad, CB, SCB)
    assert x.shape == (*grad.shape[:-1], K) and x.dtype == grad.dtype
    weight, g = CB.double() * SCB.double()[:, None] / 127, grad.double().view(-1, N)
    unit = torch.finfo(grad.dtype).eps
    bound = (g @ weight).abs() * unit + g.abs() @ weight.abs() * ((unit if grad.dtype != torch.float32 else 0) + 2.0**-24 * (N + 8))
    assert ((x.double().view(bound.shape) - g @ weight).abs() <= bound + 1e-6).all()


@grid(shape=[(0, 4), (0,), (2, 0), (2, 0, 4)], N=[0, 3], threshold=[0.0, 1.0])
def test_the_whole_layer_of_nothing(shape, N, threshold):
    A = torch.ones(shape)
    CB, SCB, bias = torch.ones(N, shape[-1], dtype=torch.int8), torch.ones(N), torch.arange(N, dtype=torch.float32)
    y, mask = ops.int8_linear(A, CB, SCB, bias, threshold)
    assert_same_bits(y, bias.expand(*shape[:-1], N).contiguous())
    assert mask.shape == ((shape[-1],) if threshold else (0,))
    assert_same_bits(ops.int8_linear_backward(y, CB, SCB), y @ torch.ones(N, shape[-1]) / 127)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_whole_layer_compiles_without_a_break(threshold):
    CB, SCB = int8_matrix(6, 16), torch.ones(6)

    def layer(A):
        y, mask = ops.int8_linear(A, CB, SCB, None, threshold)
        return y + 1, mask, ops.int8_linear_backward(y, CB, SCB)

    A = bell(5 * 16).reshape(5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(A), layer(A)):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=short_name)
def test_functional_layer_reaches_the_operators(dtype):
    A = bell(12 * 32).view(12, 32).to(dtype)
    CA, SCA, columns = F.int8_vectorwise_quant(A, threshold=2.0)
    assert columns is not None
    product = F.int8_linear_matmul(CA, CA)
    assert_same_bits(F.int8_mm_dequant(product, SCA, SCA), ops.int8_mm_dequant(product, SCA, SCA))
    assert len(F.int8_double_quant(A)) == 5
