"""Products with a 4-bit weight in Triton, forward and backward, and the gradient of an 8-bit layer."""

import gpu_rounding  # noqa: F401  (before anything is computed)
from helpers import FLOAT_DTYPES, assert_same_bits, bell, grid
import pytest
import torch

from bitsandbytes import codebooks, functional
from bitsandbytes.backends.default import int8 as reference_int8
from bitsandbytes.backends.default import ops as reference
from bitsandbytes.backends.triton import products
from bitsandbytes.packing import to_cpu_layout

SHAPES = [(1, 1), (5, 7), (9, 50), (33, 96), (300, 32), (20, 100), (9, 576)]  # out_features, in_features
BLOCKSIZES = (32, 64, 512, 4096)


class Weight:
    """A quantised weight [N, K], the arguments that pass it, and what it stands for."""

    def __init__(self, N, K, blocksize, quant_type="nf4", nested=False, offset_dtype=torch.float32):
        self.shape, self.blocksize, self.quant_type = (N, K), blocksize, quant_type
        self.packed, self.absmax = reference.quantize_4bit(bell(N * K).view(N, K), blocksize, quant_type, torch.uint8)
        self.scales, self.nested = self.absmax, ()
        if nested:
            code, offset = functional.create_dynamic_map(), self.absmax.mean().to(offset_dtype)
            codes, self.absmax = reference.quantize_blockwise(self.absmax - offset.float(), code, 256)
            self.nested = (codes, code, offset)
            self.scales = reference.expand_statistics(codes, self.absmax, code, offset)
        self.values = reference.dequantize_4bit(self.packed, self.scales, blocksize, quant_type, self.shape, torch.float32)

    @property
    def arguments(self):
        return self.packed, self.shape, self.absmax, self.blocksize, self.quant_type

    def times(self, A, bias=None):
        return products.gemm_4bit(A, *self.arguments, bias, *self.nested)

    def times_transposed(self, grad):
        return products.gemm_4bit_backward(grad, *self.arguments, *self.nested)


def assert_is_product(out, A, weights, bias=None):
    """Within what rounding the weight, the sum and the result allows, against a float64 product."""
    A, weights = A.double(), weights.double()
    expected, size = A @ weights, A.abs() @ weights.abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    unit = torch.finfo(out.dtype).eps * (4 if out.dtype == torch.float32 else 1)
    assert ((out.double() - expected).abs() <= unit * size + 1e-7).all()


@grid(shape=SHAPES)
def test_rows_of_the_identity_return_the_weight(shape):
    N, K = shape
    for i, blocksize in enumerate(BLOCKSIZES * 2):
        dtype = FLOAT_DTYPES[(i + N) % 3]
        weight = Weight(N, K, blocksize, "fp4" if i % 2 else "nf4", nested=i % 3 == 0)
        rows, columns = torch.randperm(K)[: (1, 3, 20)[i % 3]], torch.randperm(N)[: (20, 1, 4)[i % 3]]
        assert_same_bits(weight.times(torch.eye(K, dtype=dtype)[rows]), weight.values.T[rows].to(dtype))
        assert_same_bits(weight.times_transposed(torch.eye(N, dtype=dtype)[columns]), weight.values[columns].to(dtype))


@grid(dtype=FLOAT_DTYPES, M=(0, 1, 2, 17, 40, 70))
def test_products_of_all_sizes(dtype, M):
    for i, (N, K) in enumerate([(3, 9), (65, 33), (40, 192), (0, 5), (5, 0)]):
        weight = Weight(N, K, 64, nested=bool(i % 2) and N * K > 0, offset_dtype=(torch.float32, torch.float16)[M % 2])
        A, grad, bias = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(N).to(dtype) if i % 2 else None
        assert_is_product(weight.times(A, bias), A, weight.values.T, bias)
        assert_is_product(weight.times_transposed(grad), grad, weight.values)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)])
def test_leading_dimensions_and_strides_of_activations(lead):
    weight = Weight(6, 64, 64)
    A = torch.randn(*lead, 128)[..., ::2]
    out = weight.times(A)
    assert out.shape == (*lead, 6)
    assert_is_product(out.reshape(-1, 6), A.reshape(-1, 64), weight.values.T)


@grid(dtype=(torch.float16, torch.bfloat16), mean=(0, 2), quant_type=("nf4", "fp4"))
def test_error_is_that_of_a_dense_product(dtype, mean, quant_type):
    weight = Weight(48, 1024, 64, quant_type)
    dense_weight = weight.values.to(dtype)
    for M in (1, 4, 24):
        A, grad = (torch.randn(M, 1024) + mean).to(dtype), (torch.randn(M, 48) + mean).to(dtype)
        for out, exact, dense in (
            (weight.times(A), A.double() @ weight.values.double().T, A @ dense_weight.T),
            (weight.times_transposed(grad), grad.double() @ weight.values.double(), grad @ dense_weight),
        ):
            error, dense_error = ((y.double() - exact).square().mean().sqrt() for y in (out, dense))
            assert error <= 1.1 * dense_error


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_table_of_the_callers_own(dtype):
    weight, A = Weight(32, 64, 32), torch.randn(3, 64).to(dtype)
    for code in (codebooks.levels("nf4"), torch.linspace(-2, 2, 16)):
        expected = reference.gemv_4bit(A, weight.packed, weight.shape, weight.absmax, code, 32)
        out = products.gemv_4bit(A, weight.packed, weight.shape, weight.absmax, code, 32)
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-6)
        target = torch.zeros(3, 64, dtype=dtype)[:, ::2]
        products.gemv_4bit_out(A, weight.packed, weight.shape, weight.absmax, code, 32, target)
        assert_same_bits(target.contiguous(), out)
    packed, absmax = to_cpu_layout(weight.packed, weight.absmax, weight.shape)
    out = products.gemv_4bit(A, packed, weight.shape, absmax, codebooks.levels("nf4"), 32)
    torch.testing.assert_close(out, A @ weight.values.to(dtype).T, rtol=2**-6, atol=2**-4)


@grid(dtype=FLOAT_DTYPES, shape=((1, 1), (5, 7), (33, 64), (70, 33)))
def test_the_gradient_of_an_8bit_layer(dtype, shape):
    N, K = shape
    CB, SCB, _ = reference_int8.int8_vectorwise_quant(bell(N * K).view(N, K))
    values = reference_int8.int8_vectorwise_dequant(CB, SCB)
    assert_same_bits(products.int8_linear_backward(torch.eye(N, dtype=dtype), CB, SCB), values.to(dtype))
    for M in (0, 1, 5, 40):
        grad = torch.randn(M, N).to(dtype)
        assert_is_product(products.int8_linear_backward(grad, CB, SCB), grad, values)
