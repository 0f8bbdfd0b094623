"""The CUDA kernels that quantise and dequantise give the bytes of the reference."""

from helpers import FLOAT_DTYPES, QUANT_TYPES, bell
from native_cpu import FP4_THRESHOLDS, NF4_THRESHOLDS
from native_cuda import cuda, cuda_once, emulated_library, same_bits_but_any_nan  # noqa: F401  (fixtures among them)
import numpy as np
import pytest
import torch

from bitsandbytes import codebooks, functional
from bitsandbytes.backends.cuda import ops
from bitsandbytes.backends.default import ops as reference

SIZES_4BIT = [(1, 32), (64, 64), (4097, 64), (20011, 512), (333, 4096), (100, 9), (1000, 96), (20000, 128), (3 * 256 + 7, 256), (9000, 4096)]
SIZES_8BIT = [(1, 256), (255, 256), (4097, 64), (20011, 4096), (3 * 256 + 7, 256), (100, 9), (1000, 2048), (40, 1), (77, 8), (1000, 100000)]


def awkward(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of many magnitudes, zeros among them."""
    x = bell(n) * torch.tensor([1.0, 1e-3, 0.0, -1e-30, 100.0])[torch.arange(n) // 97 % 5]
    return x.to(dtype)


def special_blocks(dtype: torch.dtype, blocksize: int) -> torch.Tensor:
    """Blocks of zeros, of denormals only, with an infinity, with a NaN, of negative zeros, and a short last one with a NaN."""
    x = bell(7 * blocksize).view(7, blocksize)
    smallest = 2.0**-149 if dtype != torch.float16 else 2.0**-24
    x[0] = 0.0
    x[1] = torch.arange(blocksize) % 5 * (smallest if dtype != torch.bfloat16 else 2.0**-133)
    x[1, ::3] *= -1
    x[2, blocksize // 2] = torch.inf
    x[3, 1], x[3, 2] = torch.nan, torch.inf
    x[4] = -0.0
    x[5, blocksize - 1] = -torch.inf
    x[6, 0] = torch.nan
    return x.view(-1)[:-3].to(dtype)


def near_thresholds(thresholds: np.ndarray, blocksize: int) -> torch.Tensor:
    """Every threshold and eight neighbours on each side, of both signs, in blocks whose absmax is 1."""
    bits = np.concatenate([thresholds, -thresholds, np.float32([0.0, 1.0])]).view(np.int32)
    values = (bits[:, None] + np.arange(-8, 9, dtype=np.int32)).view(np.float32).reshape(-1)
    values = values[np.abs(values) <= 1]
    rows = -(-values.size // (blocksize - 1))
    padded = np.zeros((rows, blocksize), np.float32)
    padded[:, 0] = 1
    padded[:, 1:].flat[: values.size] = values
    return torch.from_numpy(padded.reshape(-1))


def signed_map():
    return functional.create_dynamic_map(True)


def assert_4bit_is_right(x, blocksize, quant_type):
    packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, torch.uint8)
    expected_packed, expected_absmax = reference.quantize_4bit(x, blocksize, quant_type, torch.uint8)
    same_bits_but_any_nan(absmax, expected_absmax)
    same_bits_but_any_nan(packed, expected_packed)


def assert_8bit_is_right(x, code, blocksize):
    codes, absmax = ops.quantize_blockwise(x, code, blocksize)
    expected_codes, expected_absmax = reference.quantize_blockwise(x, code, blocksize)
    same_bits_but_any_nan(absmax, expected_absmax)
    same_bits_but_any_nan(codes, expected_codes)


# ---------------------------------------------------------------------------------------------------------------------- quantise
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("n, blocksize", SIZES_4BIT)
def test_4bit_codes_are_those_of_the_reference(cuda, n, blocksize, quant_type, dtype):
    assert_4bit_is_right(awkward(n, dtype), blocksize, quant_type)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [64, 512, 33])
def test_4bit_blocks_of_zeros_denormals_infinities_and_nan(cuda_once, blocksize, quant_type, dtype):
    assert_4bit_is_right(special_blocks(dtype, blocksize), blocksize, quant_type)


@pytest.mark.parametrize("quant_type, thresholds", [("nf4", NF4_THRESHOLDS), ("fp4", FP4_THRESHOLDS)])
def test_4bit_neighbours_of_every_threshold(cuda_once, quant_type, thresholds):
    assert_4bit_is_right(near_thresholds(thresholds, 64), 64, quant_type)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 64])
def test_4bit_storage_is_filled_up_with_zero_codes(cuda_once, n, storage):
    packed, _ = ops.quantize_4bit(bell(n), 64, "nf4", storage)
    expected, _ = reference.quantize_4bit(bell(n), 64, "nf4", storage)
    assert packed.dtype == storage and packed.shape == expected.shape
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n, blocksize", SIZES_8BIT)
def test_8bit_codes_are_those_of_the_reference(cuda, n, blocksize, dtype):
    assert_8bit_is_right(awkward(n, dtype), signed_map(), blocksize)


@pytest.mark.parametrize("blocksize", [256, 1024, 33])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_8bit_blocks_of_zeros_denormals_infinities_and_nan(cuda_once, dtype, blocksize):
    assert_8bit_is_right(special_blocks(dtype, blocksize), signed_map(), blocksize)


# Maps with at most one midpoint in a cell, and maps that must be searched.
CODES = {
    "signed": lambda: functional.create_dynamic_map(True),
    "unsigned": lambda: functional.create_dynamic_map(False),
    "linear": lambda: functional.create_linear_map(True),
    "few bits": lambda: functional.create_dynamic_map(True, 3, 4),
    "normal": lambda: functional.create_normal_map(),
    "beyond 1": lambda: torch.linspace(-3, 2, 256),
    "crowded": lambda: torch.linspace(-1e-12, 1e-12, 256),
}


@pytest.mark.parametrize("name", CODES)
def test_8bit_codes_of_large_tensors_come_from_cells_or_a_search(cuda_once, name):
    code = CODES[name]()
    edges = near_thresholds(codebooks.midpoints(code).numpy(), 256)
    elements_per_multiprocessor = 75 * 256 * 4
    x = torch.cat([edges, awkward(4 * elements_per_multiprocessor + 300 - edges.numel(), torch.float32)])
    assert_8bit_is_right(x, code, 256)
    assert_8bit_is_right(x.to(torch.bfloat16), code, 512)


# -------------------------------------------------------------------------------------------------------------------- dequantise
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("n, blocksize", SIZES_4BIT)
def test_4bit_dequantises_to_the_bits_of_the_reference(cuda, n, blocksize, quant_type, dtype):
    packed, absmax = reference.quantize_4bit(bell(n), blocksize, quant_type, torch.uint8)
    actual = ops.dequantize_4bit(packed, absmax, blocksize, quant_type, (n,), dtype)
    same_bits_but_any_nan(actual, reference.dequantize_4bit(packed, absmax, blocksize, quant_type, (n,), dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n, blocksize", SIZES_8BIT)
def test_8bit_dequantises_to_the_bits_of_the_reference(cuda, n, blocksize, dtype):
    codes, absmax = reference.quantize_blockwise(awkward(n, torch.float32), signed_map(), blocksize)
    actual = ops.dequantize_blockwise(codes, absmax, signed_map(), blocksize, dtype)
    same_bits_but_any_nan(actual, reference.dequantize_blockwise(codes, absmax, signed_map(), blocksize, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 9])
def test_nested_statistics_are_decoded_as_in_two_steps(cuda_once, blocksize, dtype):
    n = 40000
    packed, absmax = reference.quantize_4bit(awkward(n, torch.float32), blocksize, "nf4", torch.uint8)
    offset = absmax.mean()
    absmax_8bit, outer = reference.quantize_blockwise(absmax - offset, signed_map(), 256)
    expanded = reference.expand_statistics(absmax_8bit, outer, signed_map(), offset)
    out = torch.empty(n, dtype=dtype)
    ops.dequantize_4bit_into(out, packed, outer, blocksize, "nf4", absmax_8bit, signed_map(), offset)
    same_bits_but_any_nan(out, reference.dequantize_4bit(packed, expanded, blocksize, "nf4", (n,), dtype))


# ------------------------------------------------------------------------------------------------- where operands lie, and bounds
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_operands_may_begin_at_any_element(cuda_once, dtype):
    n = 1000
    x = awkward(n + 1, dtype)[1:]
    assert_4bit_is_right(x, 64, "nf4")
    assert_8bit_is_right(x, signed_map(), 256)
    packed, absmax = reference.quantize_4bit(x, 64, "nf4", torch.uint8)
    shifted = torch.cat([packed.new_zeros(1, 1), packed])[1:]
    out = torch.zeros(n + 1, dtype=dtype)
    ops.dequantize_4bit_out(shifted, absmax, 64, "nf4", (n,), dtype, out=out[1:])
    same_bits_but_any_nan(out[1:], reference.dequantize_4bit(packed, absmax, 64, "nf4", (n,), dtype))
    assert out[0] == 0


def test_results_go_into_a_tensor_that_is_not_contiguous(cuda_once):
    packed, absmax = reference.quantize_4bit(bell(640), 64, "fp4", torch.uint8)
    out = torch.zeros(20, 32).t()
    ops.dequantize_4bit_out(packed, absmax, 64, "fp4", (32, 20), torch.float32, out=out)
    same_bits_but_any_nan(out, reference.dequantize_4bit(packed, absmax, 64, "fp4", (32, 20), torch.float32))
    codes, absmax = reference.quantize_blockwise(bell(640).view(32, 20), signed_map(), 256)
    ops.dequantize_blockwise_out(codes, absmax, signed_map(), 256, torch.float32, out=out)
    same_bits_but_any_nan(out, reference.dequantize_blockwise(codes, absmax, signed_map(), 256, torch.float32))


def test_nothing_is_done_with_nothing(cuda_once):
    packed, absmax = ops.quantize_4bit(torch.empty(0), 64, "nf4", torch.uint8)
    assert packed.shape == (0, 1) and absmax.shape == (0,)
    assert ops.dequantize_4bit(packed, absmax, 64, "nf4", (0,), torch.float32).shape == (0,)
    codes, absmax = ops.quantize_blockwise(torch.empty(0, 3), signed_map(), 256)
    assert codes.shape == (0, 3) and absmax.shape == (0,)
    assert ops.dequantize_blockwise(codes, absmax, signed_map(), 256, torch.float16).shape == (0, 3)
