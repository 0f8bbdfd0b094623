"""The native CPU library through ctypes, and an independent model of what it promises.

The wrappers put every output between guard bytes, so that a write beyond a buffer fails the test. The model works on whole arrays with
``np.searchsorted``; it shares no code and no method with the kernels.
"""

from __future__ import annotations

import ctypes as ct
from importlib.util import find_spec
import mmap
from pathlib import Path
import platform

import numpy as np
import pytest
import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPES = {"fp4": 1, "nf4": 2}
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
SETS = ("scalar", "neon", "neondot") if IS_ARM else ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16")  # lowest first
GUARD = 64

# fmt: off
NF4_LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
], np.float32)
NF4_THRESHOLDS = np.array([
    0xBF591CD8, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC, 0xBD3A7871, 0x3D22FAFF,
    0x3DF64862, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9, 0x3F006D04, 0x3F248DAF, 0x3F5C89DA,
], np.uint32).view(np.float32)
FP4_MAGNITUDES = np.array([
    0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000,
], np.uint32).view(np.float32)
FP4_LEVELS = np.concatenate([FP4_MAGNITUDES, [np.float32(0)], -FP4_MAGNITUDES[1:]])
FP4_THRESHOLDS = np.array([0x3B2AAAB9, 0x3DB00000, 0x3E555555, 0x3E955555, 0x3ED55556, 0x3F155550, 0x3F555555], np.uint32).view(np.float32)
FP4_CODE_OF_RANK = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)
# fmt: on
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
ZERO_CODE = {"nf4": 7, "fp4": 0}


def library_path() -> Path:
    """Beside the package's modules, whether it is imported from the source tree or installed."""
    spec = find_spec("bitsandbytes")
    package = Path(spec.origin).parent if spec is not None and spec.origin else Path(__file__).resolve().parent.parent / "bitsandbytes"
    return package / "libbitsandbytes_cpu.so"


def load_library() -> ct.CDLL:
    lib = ct.CDLL(str(library_path()))
    pointer, size, code = ct.c_void_p, ct.c_int64, ct.c_int32
    lib.bnb_cpu_quantize_4bit.argtypes = [pointer, code, size, size, code, pointer, pointer, code]
    lib.bnb_cpu_dequantize_4bit.argtypes = [pointer, pointer, size, size, code, code, pointer, code]
    lib.bnb_cpu_quantize_blockwise.argtypes = [pointer, pointer, code, size, size, pointer, pointer, code]
    lib.bnb_cpu_dequantize_blockwise.argtypes = [pointer, pointer, pointer, size, size, code, pointer, code]
    lib.bnb_cpu_gemm_4bit.argtypes = [pointer] * 8 + [size] * 4 + [code] * 3
    lib.bnb_cpu_int8_quantize.argtypes = [pointer, code, size, size, ct.c_double, *[pointer] * 5, code]
    lib.bnb_cpu_int8_dequantize.argtypes = [pointer, pointer, size, size, pointer, code]
    lib.bnb_cpu_int8_matmul.argtypes = [pointer] * 3 + [size] * 3 + [code]
    lib.bnb_cpu_int8_mm_dequant.argtypes = [pointer] * 5 + [size] * 2 + [code] * 2
    lib.bnb_cpu_int8_scaled_mm.argtypes = [pointer] * 6 + [size] + [pointer] * 2 + [size] * 3 + [code] * 2
    lib.bnb_cpu_int8_linear.argtypes = [pointer] * 4 + [ct.c_double] + [pointer] * 2 + [size] * 3 + [code] * 2
    lib.bnb_cpu_int8_linear_backward.argtypes = [pointer] * 4 + [size] * 3 + [code] * 2
    lib.bnb_status_message.argtypes = [code]
    for name in ("bnb_status_message", "bnb_cpu_isa", "bnb_cpu_openmp_library"):
        getattr(lib, name).restype = ct.c_char_p
    for name in ("bnb_cpu_select_isa", "bnb_cpu_isa_supported"):
        getattr(lib, name).argtypes = [ct.c_char_p]
    return lib


class Guarded:
    """An output of ``count`` elements with guard bytes on both sides. ``check`` returns a copy of it after looking at them.

    The memory is NumPy's, so that the wrappers start none of PyTorch's threads.
    """

    def __init__(self, count: int, dtype: torch.dtype):
        self.dtype = dtype
        self.bytes = np.full(GUARD + count * dtype.itemsize + GUARD, 0xA5, np.uint8)
        self.pointer = self.bytes.ctypes.data + GUARD

    def check(self) -> torch.Tensor:
        assert (self.bytes[:GUARD] == 0xA5).all() and (self.bytes[-GUARD:] == 0xA5).all(), "wrote outside the output"
        words = self.bytes[GUARD:-GUARD].copy().view(f"i{self.dtype.itemsize}")
        return torch.from_numpy(words).view(self.dtype)


def block_count(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def quantize_4bit(lib, x: torch.Tensor, blocksize: int, quant_type: str, threads: int = 1):
    n = x.numel()
    absmax, out = Guarded(block_count(n, blocksize), torch.float32), Guarded((n + 1) // 2, torch.uint8)
    status = lib.bnb_cpu_quantize_4bit(x.data_ptr(), DTYPES[x.dtype], n, blocksize, QUANT_TYPES[quant_type], absmax.pointer, out.pointer, threads)
    assert status == 0
    return absmax.check().numpy(), out.check().numpy()


def dequantize_4bit(lib, packed, absmax, n: int, blocksize: int, quant_type: str, dtype: torch.dtype, threads: int = 1) -> torch.Tensor:
    packed, absmax = np.ascontiguousarray(packed), np.ascontiguousarray(absmax, np.float32)
    out = Guarded(n, dtype)
    arguments = packed.ctypes.data, absmax.ctypes.data, n, blocksize, QUANT_TYPES[quant_type], DTYPES[dtype], out.pointer, threads
    assert lib.bnb_cpu_dequantize_4bit(*arguments) == 0
    return out.check()


def quantize_blockwise(lib, code: np.ndarray, x: torch.Tensor, blocksize: int, threads: int = 1):
    n = x.numel()
    absmax, out = Guarded(block_count(n, blocksize), torch.float32), Guarded(n, torch.uint8)
    arguments = code.ctypes.data, x.data_ptr(), DTYPES[x.dtype], n, blocksize, absmax.pointer, out.pointer, threads
    assert lib.bnb_cpu_quantize_blockwise(*arguments) == 0
    return absmax.check().numpy(), out.check().numpy()


def dequantize_blockwise(lib, code: np.ndarray, codes, absmax, blocksize: int, dtype: torch.dtype, threads: int = 1) -> torch.Tensor:
    codes, absmax = np.ascontiguousarray(codes), np.ascontiguousarray(absmax, np.float32)
    out = Guarded(codes.size, dtype)
    arguments = code.ctypes.data, codes.ctypes.data, absmax.ctypes.data, codes.size, blocksize, DTYPES[dtype], out.pointer, threads
    assert lib.bnb_cpu_dequantize_blockwise(*arguments) == 0
    return out.check()


def model_scaled(x: torch.Tensor, blocksize: int):
    """absmax of each block, and every element divided by it as the contract says (NaN where the contract wants the highest code)."""
    values = x.float().numpy()
    blocks = block_count(values.size, blocksize)
    padded = np.zeros(blocks * blocksize, np.float32)
    padded[: values.size] = np.abs(values)
    absmax = padded.reshape(blocks, blocksize).max(axis=1, initial=0)
    with np.errstate(all="ignore"):
        inverse = np.where(absmax == 0, np.float32(0), np.float32(1) / absmax)
        inverse = np.repeat(inverse, blocksize)[: values.size]
        v = values * inverse
    v[(values == 0) & np.isinf(inverse)] = 0
    return absmax, np.clip(v, np.float32(-1), np.float32(1))


def model_quantize_4bit(x: torch.Tensor, blocksize: int, quant_type: str):
    absmax, v = model_scaled(x, blocksize)
    if quant_type == "nf4":
        codes = np.searchsorted(NF4_THRESHOLDS, v).astype(np.uint8)
    else:
        codes = FP4_CODE_OF_RANK[np.searchsorted(FP4_THRESHOLDS, np.abs(v))]
        codes = np.where((v < 0) & (codes != 0), codes + 8, codes).astype(np.uint8)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(ZERO_CODE[quant_type]))
    return absmax, codes[0::2] << 4 | codes[1::2]


def model_quantize_blockwise(code: np.ndarray, x: torch.Tensor, blocksize: int):
    absmax, v = model_scaled(x, blocksize)
    with np.errstate(over="ignore"):
        midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    return absmax, np.searchsorted(midpoints, v).astype(np.uint8)


def model_dequantize(values: np.ndarray, absmax: np.ndarray, blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    with np.errstate(all="ignore"):
        product = values * np.repeat(np.asarray(absmax, np.float32), blocksize)[: values.size]
    return torch.from_numpy(product).to(dtype)


def nibbles(packed: np.ndarray, n: int) -> np.ndarray:
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:n]


def assert_same_bytes(actual: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.flatnonzero(actual != expected)
    if wrong.size:
        first = wrong[0]
        raise AssertionError(f"{wrong.size} of {actual.size} bytes differ, first at {first}: got {actual[first]:#x}, want {expected[first]:#x}")


def assert_same_floats(actual, expected) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.view(integer) != expected.view(integer)) & ~(actual.isnan() & expected.isnan())
    where = wrong.nonzero().flatten()
    assert where.numel() == 0, f"{where.numel()} of {actual.numel()} differ, first at {where[0]}: got {actual[where[0]]}, want {expected[where[0]]}"


def at_page_edge(array: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy that begins right behind an unreadable page or ends right before one."""
    page, size = mmap.PAGESIZE, array.nbytes
    body = -(-size // page) * page
    libc = ct.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ct.c_void_p, [ct.c_void_p, ct.c_size_t, *[ct.c_int] * 3, ct.c_long]
    libc.mprotect.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_int]
    start = libc.mmap(None, body + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(start, page, 0) == 0 and libc.mprotect(start + page + body, page, 0) == 0
    begin = start + page + (body - size if at_end else 0)
    copied = np.frombuffer((ct.c_char * size).from_address(begin), array.dtype).reshape(array.shape)
    np.copyto(copied, array)
    return copied


# Fixtures: a test file gets them by importing their names.


@pytest.fixture(scope="module")
def library():
    return load_library()


@pytest.fixture(params=SETS)
def lib(library, request):
    """The library, switched to one instruction set and back."""
    name = request.param.encode()
    if not library.bnb_cpu_isa_supported(name):
        pytest.skip(f"this machine or build has no {request.param}")
    before = library.bnb_cpu_isa()
    assert library.bnb_cpu_select_isa(name) == 0
    yield library
    assert library.bnb_cpu_select_isa(before) == 0
