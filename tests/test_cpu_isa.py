"""Every instruction set of the native CPU library gives the bytes of the contract: codes, scales and dequantised values."""

import ctypes as ct
import os
from pathlib import Path
import subprocess
import sys

from native_cpu import (  # noqa: F401  (fixtures among them)
    DTYPES,
    FP4_THRESHOLDS,
    LEVELS,
    NF4_THRESHOLDS,
    SETS,
    assert_same_bytes,
    assert_same_floats,
    dequantize_4bit,
    dequantize_blockwise,
    lib,
    library,
    library_path,
    model_dequantize,
    model_quantize_4bit,
    model_quantize_blockwise,
    nibbles,
    quantize_4bit,
    quantize_blockwise,
)
import numpy as np
import pytest
import torch

dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "fp16", "bf16"])
quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def assert_quantizes_4bit(lib, x, blocksize, quant_type):
    absmax, packed = quantize_4bit(lib, x, blocksize, quant_type)
    expected_absmax, expected = model_quantize_4bit(x, blocksize, quant_type)
    assert_same_floats(absmax, expected_absmax)
    assert_same_bytes(packed, expected)


def assert_quantizes_blockwise(lib, code, x, blocksize):
    absmax, codes = quantize_blockwise(lib, code, x, blocksize)
    expected_absmax, expected = model_quantize_blockwise(code, x, blocksize)
    assert_same_floats(absmax, expected_absmax)
    assert_same_bytes(codes, expected)


def neighbours(values: np.ndarray, reach: int = 3) -> np.ndarray:
    """The values and up to ``reach`` fp32 numbers on either side."""
    below, above, found = values, values, [values]
    for _ in range(reach):
        below = np.nextafter(below, np.float32(-np.inf), dtype=np.float32)
        above = np.nextafter(above, np.float32(np.inf), dtype=np.float32)
        found += [below, above]
    return np.concatenate(found)


def in_blocks(values: np.ndarray, largest: float, blocksize: int) -> torch.Tensor:
    """Blocks whose absmax is ``largest``, the rest of each filled with the values in turn."""
    per_block = blocksize - 1
    values = np.resize(values, -(-values.size // per_block) * per_block).reshape(-1, per_block)
    blocks = np.concatenate([np.full((len(values), 1), largest, np.float32), values.astype(np.float32)], axis=1)
    return torch.from_numpy(blocks.reshape(-1).copy())


def every_16bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def signed_dynamic_code() -> np.ndarray:
    positive = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)]
    return np.sort(np.array([*positive, *(-v for v in positive), 0.0, 1.0], np.float32))


def unsigned_dynamic_code() -> np.ndarray:
    positive = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2 ** (i + 1)) for i in range(7) for k in range(2 ** (i + 1))]
    return np.sort(np.array([*positive, 0.0, 1.0], np.float32))


def random_code(low: float, high: float) -> np.ndarray:
    return np.sort(np.random.default_rng(5).uniform(low, high, 256).astype(np.float32))


CODES = {
    "signed_dynamic": signed_dynamic_code(),
    "unsigned_dynamic": unsigned_dynamic_code(),
    "linear": np.linspace(-1, 1, 256, dtype=np.float32),
    "random": random_code(-1, 1),
    "beyond_one": random_code(-3, 3),
    "all_positive_large": random_code(2, 3),
    "crowded": random_code(0.5, 0.5001),
    "repeated": np.sort(np.resize(np.linspace(-1, 1, 8, dtype=np.float32), 256)),
    "padded_with_zeros": np.sort(np.append(np.linspace(-1, 1, 15), np.zeros(241)).astype(np.float32)),
    "all_equal": np.full(256, 0.25, np.float32),
    "negative_zeros": np.array([-1] * 100 + [-0.0] * 56 + [0.0] * 50 + [1] * 50, np.float32),
    "denormal": np.linspace(-1e-38, 1e-38, 256, dtype=np.float32),
    "overflowing_midpoints": np.array([-3e38] * 100 + [-0.5, 0, 0.5] + [3e38] * 153, np.float32),
    "infinite_ends": np.array([-np.inf, *np.linspace(-1, 1, 254), np.inf], np.float32),
}
codes_by_name = pytest.mark.parametrize("name", list(CODES))


# ---- which set runs


def test_the_sets_match_what_the_processor_reports(library):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo")
    words = set(cpuinfo.read_text().split())
    avx2 = {"avx2", "fma", "f16c"} <= words
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= words
    vnni = avx512 and "avx512_vnni" in words
    bf16 = vnni and {"avx512_bf16", "avx512vbmi"} <= words
    expected = {"scalar": True, "avx2": avx2, "avx512": avx512, "avx512vnni": vnni, "avx512bf16": bf16}
    expected |= {"neon": True, "neondot": "asimddp" in words}
    assert {name: bool(library.bnb_cpu_isa_supported(name.encode())) for name in SETS} == {name: expected[name] for name in SETS}
    library.has_avx512f_cpu.restype = library.has_avx512bf16_cpu.restype = ct.c_bool
    assert library.has_avx512f_cpu() == ("avx512f" in words)
    assert library.has_avx512bf16_cpu() == ("avx512_bf16" in words)


def test_an_unknown_set_changes_nothing(library):
    before = library.bnb_cpu_isa()
    for name in (b"avx1024", b"", None):
        assert library.bnb_cpu_isa_supported(name) == 0
        assert library.bnb_cpu_select_isa(name) != 0
        assert library.bnb_cpu_isa() == before


def isa_with_environment(value: str) -> str:
    program = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).bnb_cpu_isa; f.restype = ctypes.c_char_p; print(f().decode())"
    command = [sys.executable, "-c", program, str(library_path())]
    return subprocess.run(command, env={**os.environ, "BNB_CPU_ISA": value}, capture_output=True, text=True, check=True).stdout.strip()


def test_the_environment_lowers_the_set(library):
    best = [name for name in SETS if library.bnb_cpu_isa_supported(name.encode())][-1]
    assert isa_with_environment("scalar") == "scalar"
    assert isa_with_environment("no such set") == best
    assert isa_with_environment("") == best
    assert isa_with_environment(SETS[-1]) == best, "a set above the machine's means the best one below it"


# ---- 4 bit


@dtypes
@quant_types
@pytest.mark.parametrize("blocksize", [1, 2, 3, 31, 32, 64, 100, 128, 4096, 16384])
def test_4bit_codes_of_random_data(lib, dtype, quant_type, blocksize):
    generator = torch.Generator().manual_seed(blocksize)
    for n in (1, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 7, 5 * blocksize, 20011):
        if n > 0:
            assert_quantizes_4bit(lib, torch.randn(n, generator=generator).to(dtype), blocksize, quant_type)


@dtypes
@quant_types
def test_4bit_short_inputs_of_every_length_unaligned(lib, dtype, quant_type):
    x = torch.randn(260).to(dtype)
    for n in range(201):
        for blocksize in (32, 64, 7):
            assert_quantizes_4bit(lib, x[1 : n + 1], blocksize, quant_type)


@quant_types
def test_4bit_codes_beside_every_threshold(lib, quant_type):
    thresholds = NF4_THRESHOLDS if quant_type == "nf4" else np.concatenate([FP4_THRESHOLDS, -FP4_THRESHOLDS])
    for largest in (1.0, -1.0, 0.4371, 3e-30, 7e33):
        values = neighbours(np.concatenate([thresholds, [np.float32(0)]]) * np.float32(abs(largest)))
        for blocksize in (64, 33, 256):
            assert_quantizes_4bit(lib, in_blocks(values, largest, blocksize), blocksize, quant_type)


@quant_types
def test_4bit_a_tie_goes_to_the_lower_value_or_magnitude(lib, quant_type):
    thresholds = NF4_THRESHOLDS if quant_type == "nf4" else np.concatenate([FP4_THRESHOLDS, -FP4_THRESHOLDS])
    x = torch.from_numpy(np.concatenate([[np.float32(1)], thresholds, np.zeros(31 - len(thresholds), np.float32)]))
    _, packed = quantize_4bit(lib, x, 32, quant_type)
    expected = range(15) if quant_type == "nf4" else [0, 1, 6, 7, 4, 5, 2, 0, 9, 14, 15, 12, 13, 10]
    assert nibbles(packed, 32)[1 : len(thresholds) + 1].tolist() == list(expected)


@quant_types
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_4bit_every_16bit_input(lib, dtype, quant_type):
    everything = every_16bit_value(dtype)
    assert_quantizes_4bit(lib, everything, 64, quant_type)
    assert_quantizes_4bit(lib, everything, 1, quant_type)
    shuffled = everything[everything.isfinite()]
    assert_quantizes_4bit(lib, shuffled[torch.randperm(shuffled.numel())], 32, quant_type)


SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-39, 3e-39, -2.9e-39, 1.2e-38, 3.4028235e38, -3.4028235e38, 1.0]


@dtypes
@quant_types
def test_4bit_special_values_in_every_mix(lib, dtype, quant_type):
    special = torch.tensor(SPECIAL)
    generator = torch.Generator().manual_seed(0)
    for blocksize in (2, 32, 37, 64):
        picks = special[torch.randint(len(SPECIAL), (300, blocksize), generator=generator)]
        without_nan = torch.where(picks.isnan(), 0.0, picks)
        finite = torch.where(picks.isfinite(), picks, 0.0)
        tiny = torch.where(picks.abs() < 1e-37, picks, 0.0)
        for x in (picks, without_nan, finite, tiny):
            assert_quantizes_4bit(lib, x.reshape(-1).to(dtype), blocksize, quant_type)


@quant_types
def test_4bit_zero_nan_and_infinite_blocks(lib, quant_type):
    zero, top = (7, 15) if quant_type == "nf4" else (0, 3)
    x = torch.zeros(4, 32)
    x[1] = torch.linspace(-1, 1, 32)
    x[1, 5] = float("nan")
    x[2] = torch.linspace(-1, 1, 32)
    x[2, 5], x[2, 6] = float("inf"), float("-inf")
    x[3, 0] = -1e-45
    absmax, packed = quantize_4bit(lib, x.reshape(-1), 32, quant_type)
    codes = nibbles(packed, 128).reshape(4, 32)
    assert absmax[0] == 0 and np.isnan(absmax[1]) and np.isposinf(absmax[2]) and absmax[3] > 0
    assert (codes[0] == zero).all()
    assert (codes[1] == top).all()
    assert codes[2, 5] == codes[2, 6] == top and (np.delete(codes[2], [5, 6]) == zero).all()
    assert codes[3, 0] == (0 if quant_type == "nf4" else 11) and (codes[3, 1:] == zero).all()


@dtypes
@quant_types
@pytest.mark.parametrize("blocksize", [1, 3, 32, 64, 100, 4096])
def test_4bit_dequantises(lib, dtype, quant_type, blocksize):
    rng = np.random.default_rng(blocksize)
    for n in [*range(70), blocksize, 2 * blocksize + 1, 5003]:
        packed = rng.integers(0, 256, (n + 1) // 2, dtype=np.uint8)
        absmax = np.exp(rng.normal(size=-(-n // blocksize))).astype(np.float32)
        values = LEVELS[quant_type][nibbles(packed, n)]
        actual = dequantize_4bit(lib, packed, absmax, n, blocksize, quant_type, dtype)
        assert_same_floats(actual, model_dequantize(values, absmax, blocksize, dtype))


@dtypes
@quant_types
def test_4bit_dequantises_to_denormals_infinities_and_nan(lib, dtype, quant_type):
    edges = [0.0, -1.0, 1e-45, 3e-42, 1.1754944e-38, 2e-38, 9e-8, 6e-8, 3e-8, 6.1e-5, 65504, 65519.996, 65520, 1e38, 3.4e38, np.inf, np.nan]
    random_bits = np.random.default_rng(1).integers(0, 2**32, 5000, dtype=np.uint32).view(np.float32)
    absmax = np.concatenate([np.array(edges, np.float32), random_bits])
    packed = np.tile(np.array([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], np.uint8), len(absmax))
    values = LEVELS[quant_type][nibbles(packed, 2 * packed.size)]
    actual = dequantize_4bit(lib, packed, absmax, values.size, 16, quant_type, dtype)
    assert_same_floats(actual, model_dequantize(values, absmax, 16, dtype))


# ---- 8 bit

LONG = 40000  # enough for the lookup table; shorter inputs search the thresholds


@dtypes
@codes_by_name
def test_8bit_codes_of_random_data(lib, dtype, name):
    x = torch.randn(LONG).to(dtype)
    for blocksize, n in ((64, 97), (100, 5000), (1, 5000), (256, LONG), (4096, LONG), (16384, LONG), (99, LONG), (256, 97)):
        assert_quantizes_blockwise(lib, CODES[name], x[:n], blocksize)


@codes_by_name
def test_8bit_codes_beside_every_threshold(lib, name):
    code = CODES[name]
    with np.errstate(over="ignore"):
        midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    within = midpoints[np.abs(midpoints) < 1]
    for largest in (1.0, -0.31):
        values = np.clip(neighbours(np.append(within, np.float32([0.0, -0.0])) * np.float32(abs(largest))), -abs(largest), abs(largest))
        for repeats in (1, LONG // values.size + 1):
            assert_quantizes_blockwise(lib, code, in_blocks(np.tile(values, repeats), largest, 256), 256)


@codes_by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_8bit_every_16bit_input(lib, dtype, name):
    everything = every_16bit_value(dtype)
    assert_quantizes_blockwise(lib, CODES[name], everything, 256)
    finite = everything[everything.isfinite()]
    assert_quantizes_blockwise(lib, CODES[name], finite[torch.randperm(finite.numel())], 32)


@dtypes
def test_8bit_special_values_in_every_mix(lib, dtype):
    special = torch.tensor(SPECIAL)
    for blocksize in (2, 37, 64):
        picks = special[torch.randint(len(SPECIAL), (600, blocksize))]
        tiny = torch.where(picks.abs() < 1e-37, picks, 0.0)
        for x in (picks, torch.where(picks.isfinite(), picks, 0.0), tiny):
            for repeats in (1, 20):
                assert_quantizes_blockwise(lib, CODES["signed_dynamic"], x.reshape(-1).repeat(repeats).to(dtype), blocksize)


def test_8bit_zero_is_exactly_zero(lib):
    for name, zero in (("signed_dynamic", 127), ("unsigned_dynamic", 0)):
        x = torch.zeros(LONG)
        x[::512] = 1.0
        absmax, codes = quantize_blockwise(lib, CODES[name], x, 256)
        assert set(codes.tolist()) == {zero, 255} and absmax[1] == 0
        assert CODES[name][zero] == 0


@codes_by_name
def test_8bit_every_level_of_a_code_finds_itself(lib, name):
    code = CODES[name]
    levels = code[np.abs(code) <= 1]
    x = in_blocks(np.tile(levels, LONG // 256), 1.0, 256)
    _, codes = quantize_blockwise(lib, code, x, 256)
    if name in ("signed_dynamic", "unsigned_dynamic", "linear", "random"):
        np.testing.assert_array_equal(code[codes], x.numpy() if code[-1] == 1 else np.where(x == 1, code[-1], x))


def test_8bit_a_code_changed_in_place_is_noticed(lib):
    code = CODES["linear"].copy()
    x = torch.randn(LONG)
    assert_quantizes_blockwise(lib, code, x, 256)
    code[60] = code[59]
    assert_quantizes_blockwise(lib, code, x, 256)


def test_8bit_short_inputs_of_every_length_unaligned(lib):
    x = torch.randn(300)
    for n in range(201):
        for blocksize in (64, 7):
            assert_quantizes_blockwise(lib, CODES["signed_dynamic"], x[1 : n + 1], blocksize)


@dtypes
@pytest.mark.parametrize("blocksize", [1, 3, 64, 100, 4096, 16384])
def test_8bit_dequantises(lib, dtype, blocksize):
    rng = np.random.default_rng(blocksize)
    code = CODES["signed_dynamic"]
    for n in [*range(70), blocksize, 2 * blocksize + 1, 5003]:
        codes = rng.integers(0, 256, n, dtype=np.uint8)
        absmax = np.exp(rng.normal(size=-(-n // blocksize))).astype(np.float32)
        actual = dequantize_blockwise(lib, code, codes, absmax, blocksize, dtype)
        assert_same_floats(actual, model_dequantize(code[codes], absmax, blocksize, dtype))


@dtypes
def test_8bit_dequantise_rounds_any_float_as_pytorch_does(lib, dtype):
    """Levels with random bits, and every 16-bit number with its ties, pass through absmax 1 unchanged but for the rounding."""
    patterns = np.arange(65536, dtype=np.uint32)
    ties_of_bfloat16 = np.concatenate([patterns << 16 | low for low in (0x0000, 0x7FFF, 0x8000, 0x8001)]).astype(np.uint32).view(np.float32)
    halves = np.sort(patterns.astype(np.uint16).view(np.float16)[np.isfinite(patterns.astype(np.uint16).view(np.float16))].astype(np.float32))
    ties_of_half = neighbours((halves[:-1] + halves[1:]) / 2, reach=1)
    random_bits = np.random.default_rng(2).integers(0, 2**32, 256 * 300, dtype=np.uint32).view(np.float32)
    for levels in (ties_of_bfloat16, ties_of_half, random_bits):
        for table in np.resize(levels, (-(-levels.size // 256), 256)):
            table = np.ascontiguousarray(table)
            actual = dequantize_blockwise(lib, table, np.arange(256, dtype=np.uint8), np.ones(1), 256, dtype)
            assert_same_floats(actual, torch.from_numpy(table).to(dtype))


# ---- arguments


def test_empty_inputs_need_no_pointers(library):
    assert library.bnb_cpu_quantize_4bit(None, 0, 0, 64, 2, None, None, 1) == 0
    assert library.bnb_cpu_dequantize_4bit(None, None, 0, 64, 2, 0, None, 1) == 0
    assert library.bnb_cpu_quantize_blockwise(None, None, 0, 0, 64, None, None, 1) == 0
    assert library.bnb_cpu_dequantize_blockwise(None, None, None, 0, 64, 0, None, 1) == 0


def test_bad_arguments_are_refused_and_nothing_is_written(library):
    buffer = torch.full((4096,), 0x3C, dtype=torch.uint8)
    p = buffer.data_ptr()
    code = CODES["linear"].ctypes.data
    for n, blocksize, dtype, quant_type in ((-1, 64, 0, 2), (8, 0, 0, 2), (8, -64, 0, 2), (8, 64, 3, 2), (8, 64, -1, 2), (2**62, 64, 0, 2)):
        assert library.bnb_cpu_quantize_4bit(p, dtype, n, blocksize, quant_type, p, p, 1) == 1
        assert library.bnb_cpu_dequantize_4bit(p, p, n, blocksize, quant_type, dtype, p, 1) == 1
        assert library.bnb_cpu_quantize_blockwise(code, p, dtype, n, blocksize, p, p, 1) == 1
        assert library.bnb_cpu_dequantize_blockwise(code, p, p, n, blocksize, dtype, p, 1) == 1
    for quant_type in (0, 3, -1):
        assert library.bnb_cpu_quantize_4bit(p, 0, 8, 64, quant_type, p, p, 1) == 1
        assert library.bnb_cpu_dequantize_4bit(p, p, 8, 64, quant_type, 0, p, 1) == 1
    for missing in range(3):
        pointers = [None if i == missing else p for i in range(3)]
        assert library.bnb_cpu_quantize_4bit(pointers[0], 0, 8, 64, 2, pointers[1], pointers[2], 1) == 1
        assert library.bnb_cpu_dequantize_4bit(pointers[0], pointers[1], 8, 64, 2, 0, pointers[2], 1) == 1
        assert library.bnb_cpu_quantize_blockwise(code, pointers[0], 0, 8, 64, pointers[1], pointers[2], 1) == 1
        assert library.bnb_cpu_dequantize_blockwise(code, pointers[0], pointers[1], 8, 64, 0, pointers[2], 1) == 1
    assert library.bnb_cpu_quantize_blockwise(None, p, 0, 8, 64, p, p, 1) == 1
    assert library.bnb_cpu_quantize_4bit(p, 0, 8, 64, 2, p, p, -1) == 1
    assert bool((buffer == 0x3C).all())
    assert b"bad argument" in library.bnb_status_message(1)


def test_a_code_that_is_not_ascending_is_refused(library):
    x, out, absmax = torch.randn(512), torch.full((512,), 9, dtype=torch.uint8), torch.zeros(2)
    for code in (CODES["linear"][::-1].copy(), np.where(np.arange(256) == 7, np.float32(np.nan), CODES["linear"])):
        status = library.bnb_cpu_quantize_blockwise(code.ctypes.data, x.data_ptr(), 0, 512, 256, absmax.data_ptr(), out.data_ptr(), 1)
        assert b"ascending" in library.bnb_status_message(status)
        assert bool((out == 9).all())


def test_a_blocksize_beyond_the_input_is_one_block(lib):
    x = torch.randn(1000)
    for blocksize in (1001, 2**40, 2**63 - 1):
        absmax = np.zeros(1, np.float32)
        out = np.zeros(1000, np.uint8)
        code = CODES["linear"]
        assert lib.bnb_cpu_quantize_blockwise(code.ctypes.data, x.data_ptr(), 0, 1000, blocksize, absmax.ctypes.data, out.ctypes.data, 4) == 0
        assert_same_bytes(out, model_quantize_blockwise(code, x, 1000)[1])


# ---- the published C names

SUFFIX = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dtypes
def test_published_blockwise_names(library, dtype):
    n, blocksize, code = 5000, 256, CODES["signed_dynamic"]
    x = torch.randn(n).to(dtype)
    absmax, codes = torch.zeros(20), torch.zeros(n, dtype=torch.uint8)
    sizes = ct.c_longlong(blocksize), ct.c_longlong(n)
    pointers = [ct.c_void_p(p) for p in (code.ctypes.data, x.data_ptr(), absmax.data_ptr(), codes.data_ptr())]
    getattr(library, f"cquantize_blockwise_cpu_{SUFFIX[dtype]}")(*pointers, *sizes)
    expected_absmax, expected = model_quantize_blockwise(code, x, blocksize)
    assert_same_floats(absmax, expected_absmax)
    assert_same_bytes(codes.numpy(), expected)

    y = torch.zeros(n, dtype=dtype)
    pointers = [ct.c_void_p(p) for p in (code.ctypes.data, codes.data_ptr(), absmax.data_ptr(), y.data_ptr())]
    getattr(library, f"cdequantize_blockwise_cpu_{SUFFIX[dtype]}")(*pointers, *sizes)
    assert_same_floats(y, model_dequantize(code[expected], expected_absmax, blocksize, dtype))


@dtypes
@quant_types
def test_published_4bit_names_use_flat_blocks_whatever_the_rows(library, dtype, quant_type):
    rows, columns, blocksize = 7, 96, 64
    packed = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8)
    absmax = torch.rand(11)
    y = torch.zeros(rows * columns, dtype=dtype)
    function = getattr(library, f"cdequantize_blockwise_cpu_{quant_type}_{SUFFIX[dtype]}")
    pointers = [ct.c_void_p(t.data_ptr()) for t in (packed, absmax, y)]
    function(*pointers, ct.c_longlong(blocksize), ct.c_longlong(rows), ct.c_longlong(columns))
    values = LEVELS[quant_type][nibbles(packed.numpy(), rows * columns)]
    assert_same_floats(y, model_dequantize(values, absmax.numpy(), blocksize, dtype))

    y.fill_(5)
    for bad_rows, bad_columns in ((-7, 96), (2**40, 2**40)):
        function(*pointers, ct.c_longlong(blocksize), ct.c_longlong(bad_rows), ct.c_longlong(bad_columns))
    assert bool((y == 5).all())


def packed_for_gemv(codes: np.ndarray) -> np.ndarray:
    """[N, K] codes in blocks of 32 rows: byte j of a column pair holds rows j // 2 (low nibble) and 16 + j // 2 (high), column j % 2."""
    N, K = codes.shape
    blocks = codes.reshape(N // 32, 2, 16, K // 2, 2).transpose(0, 3, 1, 2, 4)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(-1).astype(np.uint8)


def call_gemv(library, quant_type, M, N, K, x, weight, absmax, out, blocksize, x_stride, out_stride):
    function = getattr(library, f"gemv_4bit_inference_cpu_{quant_type}_bf16")
    sizes = [ct.c_int64(v) for v in (M, N, K)]
    pointers = [ct.c_void_p(p) for p in (x.data_ptr(), weight.ctypes.data, absmax.data_ptr(), out.data_ptr())]
    function(*sizes, *pointers, *(ct.c_int64(v) for v in (blocksize, x_stride, out_stride)))


@quant_types
def test_published_gemv_reads_the_repacked_layout(library, quant_type):
    M, N, K, blocksize = 3, 64, 96, 32
    codes = np.random.default_rng(0).integers(0, 16, (N, K), dtype=np.uint8)
    absmax = torch.rand(K // blocksize, N).bfloat16()
    x = torch.randn(M, K + 5).bfloat16()
    out = torch.full((M, N + 3), 7.0, dtype=torch.bfloat16)
    call_gemv(library, quant_type, M, N, K, x, packed_for_gemv(codes), absmax, out, blocksize, K + 5, N + 3)
    weight = torch.from_numpy(LEVELS[quant_type][codes]).double() * absmax.double().t().repeat_interleave(blocksize, dim=1)
    torch.testing.assert_close(out[:, :N].double(), x[:, :K].double() @ weight.t(), rtol=2e-2, atol=2e-2)
    assert bool((out[:, N:] == 7).all()), "wrote between the rows"


@pytest.mark.parametrize("M, N, K, blocksize", [(1, 33, 64, 64), (1, 32, 63, 63), (1, 32, 64, 48), (-1, 32, 64, 64), (1, 32, 64, 0), (1, 0, 64, 64)])
def test_published_gemv_refuses_bad_shapes(library, M, N, K, blocksize):
    x, absmax, out = torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), torch.full((64,), 7.0).bfloat16()
    call_gemv(library, "nf4", M, N, K, x, np.zeros(2048, np.uint8), absmax, out, blocksize, 64, 64)
    assert bool((out == 7).all())


def test_only_the_interface_is_exported():
    """Kernel code compiled for one instruction set must not be visible, or the linker could put it in place of another's."""
    listing = subprocess.run(["nm", "-D", "--defined-only", str(library_path())], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    prefixes = ("bnb_", "cquantize_blockwise_cpu_", "cdequantize_blockwise_cpu_", "gemv_4bit_inference_cpu_", "has_avx512")
    assert names and [name for name in names if not name.startswith(prefixes)] == []
