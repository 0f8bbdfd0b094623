"""The CUDA kernels that quantise and dequantise give the bytes of the reference."""

from helpers import FLOAT_DTYPES, QUANT_TYPES, bell
from native_cuda import cuda, cuda_once, emulated_library, same_bits_but_any_nan  # noqa: F401  (fixtures among them)
import pytest
import torch

from bitsandbytes.backends.cuda import ops
from bitsandbytes.backends.default import ops as reference


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("n, blocksize", [(1, 32), (64, 64), (4097, 64), (20011, 512), (333, 4096), (100, 9), (1000, 96)])
def test_4bit_dequantises_to_the_bits_of_the_reference(cuda, n, blocksize, quant_type, dtype):
    packed, absmax = reference.quantize_4bit(bell(n), blocksize, quant_type, torch.uint8)
    actual = ops.dequantize_4bit(packed, absmax, blocksize, quant_type, (n,), dtype)
    same_bits_but_any_nan(actual, reference.dequantize_4bit(packed, absmax, blocksize, quant_type, (n,), dtype))
