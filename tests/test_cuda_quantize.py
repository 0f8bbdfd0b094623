"""The CUDA kernels that quantise and dequantise give the bytes of the reference."""

import ctypes as ct

from helpers import FLOAT_DTYPES, QUANT_TYPES, bell
from native_cpu import FP4_THRESHOLDS, NF4_THRESHOLDS, at_page_edge
from native_cuda import ON_GPU, cuda, cuda_once, emulated_library, emulated_only, here, same_bits_but_any_nan  # noqa: F401  (fixtures among them)
import numpy as np
import pytest
import torch

from bitsandbytes import codebooks, functional
from bitsandbytes.backends.cuda import ops
from bitsandbytes.backends.default import ops as reference

SIZES_4BIT = [
    (1, 32),
    (64, 64),
    (4097, 64),
    (20011, 512),
    (333, 4096),
    (100, 9),
    (1000, 96),
    (20000, 128),
    (3 * 256 + 7, 256),
    (9000, 4096),
    (300, 16),
    (5000, 1024),
]
SIZES_8BIT = [
    (1, 256),
    (255, 256),
    (4097, 64),
    (20011, 4096),
    (3 * 256 + 7, 256),
    (100, 9),
    (1000, 2048),
    (2100, 512),
    (40, 1),
    (300, 16),
    (77, 8),
    (1000, 100000),
]


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
    return here(torch.from_numpy(padded.reshape(-1)))


def signed_map():
    return here(functional.create_dynamic_map(True))


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
    code = here(CODES[name]())
    edges = near_thresholds(codebooks.midpoints(code).cpu().numpy(), 256)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if ON_GPU else 4
    worth_a_table = multiprocessors * 75 * 256 * 4
    x = torch.cat([edges, awkward(worth_a_table + 300 - edges.numel(), torch.float32)])
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


# ------------------------------------------------------------------------------------------------ the C interface and the old names
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def pointer(tensor):
    return None if tensor is None else ct.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", [None, *QUANT_TYPES])
def test_old_names_take_what_other_projects_give_them(cuda_once, quant_type, dtype):
    n, blocksize = 1000, 64
    x = awkward(n, dtype)
    suffix = DTYPE_NAMES[dtype] if quant_type is None else f"{DTYPE_NAMES[dtype]}_{quant_type}"
    code = None if quant_type else signed_map()
    absmax, codes, out = torch.zeros(16), torch.zeros(n if quant_type is None else n // 2, dtype=torch.uint8), torch.zeros(n, dtype=dtype)
    cuda_once[f"cquantize_blockwise_{suffix}"](pointer(code), pointer(x), pointer(absmax), pointer(codes), ct.c_int32(blocksize), ct.c_int(n))
    cuda_once[f"cdequantize_blockwise_{suffix}"](
        pointer(code), pointer(codes), pointer(absmax), pointer(out), ct.c_int32(blocksize), ct.c_int(n), ct.c_void_p(None)
    )
    if quant_type is None:
        expected_codes, expected_absmax = reference.quantize_blockwise(x, code, blocksize)
        expected = reference.dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    else:
        expected_codes, expected_absmax = reference.quantize_4bit(x, blocksize, quant_type, torch.uint8)
        expected = reference.dequantize_4bit(codes, absmax, blocksize, quant_type, (n,), dtype)
    same_bits_but_any_nan(codes, expected_codes.view(-1))
    same_bits_but_any_nan(absmax, expected_absmax)
    same_bits_but_any_nan(out, expected)


@pytest.mark.parametrize("count, blocksize", [(-1, 64), (64, 0), (64, -3)])
def test_old_names_leave_the_output_alone_when_sizes_are_wrong(cuda_once, count, blocksize):
    absmax, codes = torch.full((4,), 7.0), torch.full((64,), 7, dtype=torch.uint8)
    cuda_once.cquantize_blockwise_fp32_nf4(None, pointer(torch.ones(64)), pointer(absmax), pointer(codes), ct.c_int(blocksize), ct.c_int(count))
    assert (absmax == 7).all() and (codes == 7).all()


BAD_ARGUMENTS = {
    "dtype": {"dtype": 3},
    "quant_type": {"quant_type": 0},
    "count": {"n": -1},
    "too many": {"n": 2**61},
    "blocksize": {"blocksize": 0},
    "input": {"A": None},
    "absmax": {"absmax": None},
    "output": {"out": None},
}


@pytest.mark.parametrize("wrong", BAD_ARGUMENTS)
def test_bad_arguments_are_a_status(cuda_once, wrong):
    x, absmax, codes, code = torch.ones(64), torch.zeros(1), torch.zeros(64, dtype=torch.uint8), signed_map()
    given = {"A": pointer(x), "dtype": 0, "n": 64, "blocksize": 64, "quant_type": 2, "absmax": pointer(absmax), "out": pointer(codes)}
    given |= BAD_ARGUMENTS[wrong]
    A, dtype, n, blocksize, quant_type, absmax_pointer, out = given.values()
    n, blocksize = ct.c_int64(n), ct.c_int64(blocksize)
    functions = [
        lambda: cuda_once.bnb_cuda_quantize_4bit(A, dtype, n, blocksize, quant_type, absmax_pointer, out, *cuda_once.where),
        lambda: cuda_once.bnb_cuda_dequantize_4bit(
            A, absmax_pointer, None, None, None, n, blocksize, quant_type, dtype, out, *cuda_once.where),
        lambda: cuda_once.bnb_cuda_quantize_blockwise(pointer(code), A, dtype, n, blocksize, absmax_pointer, out, *cuda_once.where),
        lambda: cuda_once.bnb_cuda_dequantize_blockwise(pointer(code), A, absmax_pointer, n, blocksize, dtype, out, *cuda_once.where),
    ]  # fmt: skip
    if wrong == "quant_type":
        functions = functions[:2]
    assert [function() for function in functions] == [1] * len(functions)


@pytest.mark.parametrize("n, blocksize", [(1001, 64), (4096 + 8, 4096), (999, 33)])
def test_nothing_beyond_the_operands_is_read_or_written(cuda_once, emulated_only, n, blocksize):  # noqa: F811
    """Every operand ends where an unreadable page begins."""
    x, code = at_page_edge(awkward(n, torch.float32).numpy(), at_end=True), at_page_edge(signed_map().numpy(), at_end=True)
    absmax = at_page_edge(np.zeros(-(-n // blocksize), np.float32), at_end=True)
    packed, codes = (at_page_edge(np.zeros(size, np.uint8), at_end=True) for size in ((n + 1) // 2, n))
    out = at_page_edge(np.zeros(n, np.float32), at_end=True)
    where, sizes = cuda_once.where, (ct.c_int64(n), ct.c_int64(blocksize))
    x, code, absmax, packed, codes, out = (ct.c_void_p(array.ctypes.data) for array in (x, code, absmax, packed, codes, out))
    assert cuda_once.bnb_cuda_quantize_4bit(x, 0, *sizes, 2, absmax, packed, *where) == 0
    assert cuda_once.bnb_cuda_dequantize_4bit(packed, absmax, None, None, None, *sizes, 2, 0, out, *where) == 0
    assert cuda_once.bnb_cuda_quantize_blockwise(code, x, 0, *sizes, absmax, codes, *where) == 0
    assert cuda_once.bnb_cuda_dequantize_blockwise(code, codes, absmax, *sizes, 0, out, *where) == 0


def test_the_handle_of_old_functions_is_not_null(cuda_once):
    cuda_once.get_context.restype = ct.c_void_p
    assert cuda_once.get_context() == cuda_once.get_context() is not None
