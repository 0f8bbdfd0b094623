"""Blockwise quantisation in Triton: codes, statistics and values are those of the reference, bit for bit."""

import gpu_rounding  # noqa: F401  (before anything is computed)
from helpers import BLOCKSIZES_4BIT, FLOAT_DTYPES, QUANT_TYPES, STORAGE_DTYPES, assert_same_bits, bell, grid
from hypothesis import example, given
from hypothesis import strategies as st
from native_cpu import assert_same_floats
import pytest
from strategies import float_tensors
import torch

from bitsandbytes import codebooks, functional
from bitsandbytes.backends.default import ops as reference
from bitsandbytes.backends.triton import blockwise

CODES = {
    "signed": functional.create_dynamic_map(signed=True),
    "unsigned": functional.create_dynamic_map(signed=False),
    "linear": functional.create_linear_map(),
    "without zero": torch.linspace(0, 1, 257)[1:],
}
blocksizes_4bit, quant_types, storages = (st.sampled_from(values) for values in (BLOCKSIZES_4BIT, QUANT_TYPES, STORAGE_DTYPES))


def assert_quantises_to_4bit(A, blocksize, quant_type, storage=torch.uint8):
    packed, absmax = blockwise.quantize_4bit(A, blocksize, quant_type, storage)
    expected, expected_absmax = reference.quantize_4bit(A, blocksize, quant_type, storage)
    assert_same_bits(packed, expected)
    assert_same_floats(absmax, expected_absmax)


def assert_quantises_to_8bit(A, code, blocksize):
    codes, absmax = blockwise.quantize_blockwise(A, code, blocksize)
    expected, expected_absmax = reference.quantize_blockwise(A, code, blocksize)
    assert_same_bits(codes, expected)
    assert_same_floats(absmax, expected_absmax)


def neighbours(thresholds: torch.Tensor) -> torch.Tensor:
    """The floats within three units of thresholds and of their negatives, each beside a one, so that a block of 32 has the scale one."""
    near = (thresholds.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).flatten().view(torch.float32)
    near = torch.cat([near, -near]).clamp(-1, 1)
    return torch.stack([near, torch.ones_like(near)], dim=1)


@given(A=float_tensors(), blocksize=blocksizes_4bit, quant_type=quant_types, storage=storages)
@example(A=torch.zeros(0), blocksize=64, quant_type="nf4", storage=torch.uint8)
@example(A=torch.full((33,), torch.nan), blocksize=32, quant_type="fp4", storage=torch.float32)
@example(A=torch.full((33,), 1e-45), blocksize=32, quant_type="nf4", storage=torch.float16)
def test_codes_of_4_bits(A, blocksize, quant_type, storage):
    assert_quantises_to_4bit(A, blocksize, quant_type, storage)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_codes_of_4_bits_beside_every_threshold(quant_type):
    thresholds = codebooks.nf4_thresholds() if quant_type == "nf4" else codebooks.fp4_thresholds()
    assert_quantises_to_4bit(neighbours(thresholds), 32, quant_type)
    assert_quantises_to_4bit(neighbours(thresholds) * 0.7, 32, quant_type)


@given(
    A=float_tensors(),
    blocksize=st.one_of(st.integers(1, 300), st.sampled_from([256, 2048, 4096, 5000, 16384, 2**40])),
    name=st.sampled_from([*CODES]),
)
@example(A=bell(9001), blocksize=4100, name="signed")  # more than a tile
def test_codes_of_8_bits(A, blocksize, name):
    assert_quantises_to_8bit(A, CODES[name], blocksize)


@pytest.mark.parametrize("name", CODES)
def test_codes_of_8_bits_beside_every_threshold(name):
    assert_quantises_to_8bit(neighbours(codebooks.midpoints(CODES[name])), CODES[name], 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16bit_number(dtype):
    A = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    A = A[A.isfinite()]
    assert_quantises_to_4bit(A, 4096, "nf4")
    assert_quantises_to_8bit(A, CODES["signed"], 100)


@grid(dtype=FLOAT_DTYPES, quant_type=QUANT_TYPES, storage=(torch.uint8, torch.bfloat16))
def test_values_of_4_bits(dtype, quant_type, storage):
    for count, blocksize in ((0, 32), (1, 32), (4097, 32), (2500, 4096)):
        packed, absmax = reference.quantize_4bit(bell(count), blocksize, quant_type, storage)
        expected = reference.dequantize_4bit(packed, absmax, blocksize, quant_type, (count, 1), dtype)
        assert_same_bits(blockwise.dequantize_4bit(packed, absmax, blocksize, quant_type, (count, 1), dtype), expected)
        for out in (torch.zeros(count, 1, dtype=dtype), torch.zeros(count, 2, dtype=dtype)[:, 1:]):
            blockwise.dequantize_4bit_out(packed, absmax, blocksize, quant_type, (count, 1), dtype, out)
            assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_values_of_8_bits(dtype):
    for shape, blocksize in (((0,), 64), ((3, 667), 64), ((1500, 2), 100), ((5000,), 4999), ((5000,), 2**40)):
        codes, absmax = reference.quantize_blockwise(bell(torch.Size(shape).numel()).view(shape), CODES["signed"], blocksize)
        expected = reference.dequantize_blockwise(codes, absmax, CODES["signed"], blocksize, dtype)
        assert_same_bits(blockwise.dequantize_blockwise(codes, absmax, CODES["signed"], blocksize, dtype), expected)
        for out in (torch.zeros(shape, dtype=dtype), torch.zeros(*shape, 2, dtype=dtype)[..., 1]):
            blockwise.dequantize_blockwise_out(codes, absmax, CODES["signed"], blocksize, dtype, out)
            assert_same_bits(out, expected)
