"""The native CPU library works on PyTorch's threads: same bytes for any number of them, one OpenMP runtime, no hang after a fork."""

from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import subprocess
import sys

from native_cpu import (
    assert_same_bytes,
    assert_same_floats,
    dequantize_4bit,
    dequantize_blockwise,
    load_library,
    model_quantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
import numpy as np
import pytest
import torch

N = 300_001
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def lib():
    return load_library()


def run_program(body: str, threads: int = 4) -> str:
    """Runs a program in a fresh process, where no thread has been started yet. A hang fails after two minutes."""
    tests = Path(__file__).parent
    prologue = """
import os, numpy, torch, native_cpu as native
lib = native.load_library()
count = lambda: len(os.listdir("/proc/self/task"))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    result = subprocess.run([sys.executable, "-c", prologue + body], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("blocksize", [1, 3, 32, 64, 4096, 2**20])
def test_the_bytes_do_not_depend_on_the_number_of_threads(lib, blocksize):
    x = torch.randn(N)
    code = np.linspace(-1, 1, 256, dtype=np.float32)
    absmax, packed = quantize_4bit(lib, x, blocksize, "nf4", threads=1)
    absmax8, codes = quantize_blockwise(lib, code, x, blocksize, threads=1)
    y = dequantize_4bit(lib, packed, absmax, N, blocksize, "nf4", torch.bfloat16, threads=1)
    y8 = dequantize_blockwise(lib, code, codes, absmax8, blocksize, torch.float32, threads=1)
    for threads in (0, 2, 3, 7):
        for actual, expected in zip(quantize_4bit(lib, x, blocksize, "nf4", threads), (absmax, packed)):
            assert_same_bytes(actual.view(np.uint8), expected.view(np.uint8))
        for actual, expected in zip(quantize_blockwise(lib, code, x, blocksize, threads), (absmax8, codes)):
            assert_same_bytes(actual.view(np.uint8), expected.view(np.uint8))
        assert_same_floats(dequantize_4bit(lib, packed, absmax, N, blocksize, "nf4", torch.bfloat16, threads), y)
        assert_same_floats(dequantize_blockwise(lib, code, codes, absmax8, blocksize, torch.float32, threads), y8)


def test_callers_on_several_python_threads_do_not_disturb_each_other(lib):
    """Each has its own lookup table, rebuilt here at every call because the code changes every time."""

    def quantize_with_changing_codes(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal(40_000).astype(np.float32))
        codes = [np.linspace(-1, 1, 256, dtype=np.float32), np.linspace(-0.9, 1 - seed / 100, 256, dtype=np.float32)]
        expected = [model_quantize_blockwise(code, x, 256)[1] for code in codes]
        return all(np.array_equal(quantize_blockwise(lib, codes[i % 2], x, 256)[1], expected[i % 2]) for i in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(quantize_with_changing_codes, range(8)))


@linux_only
def test_small_work_wakes_no_thread_and_large_work_does():
    counts = run_program("""
small, large = (torch.from_numpy(numpy.ones(n, numpy.float32)) for n in (60_000, 1_000_000))
before = count()
native.quantize_4bit(lib, small, 64, "nf4", threads=4)
native.quantize_4bit(lib, small, 1, "nf4", threads=4)
after_small = count()
native.quantize_4bit(lib, large, 64, "nf4", threads=1)
after_single = count()
native.quantize_4bit(lib, large, 64, "nf4", threads=4)
print(before, after_small, after_single, count())
""")
    before, after_small, after_single, after_large = map(int, counts.split())
    assert before == after_small == after_single
    assert after_large == before + 3


@linux_only
def test_the_thread_count_of_pytorch_is_the_default():
    counts = run_program("""
torch.set_num_threads(1)
before = count()
native.quantize_4bit(lib, torch.ones(1_000_000), 64, "nf4", threads=0)
print(before, count())
""")
    before, after = map(int, counts.split())
    assert before == after


@linux_only
def test_one_openmp_runtime_is_mapped_and_it_is_the_one_in_use():
    output = run_program("""
import re
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
native.quantize_4bit(lib, torch.ones(1_000_000), 64, "nf4", threads=4)
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"/\\S*/lib(?:gomp|iomp5|omp)[-.]\\S*", maps))))
print(lib.bnb_cpu_openmp_library().decode())
""")
    mapped, used = output.splitlines()
    assert mapped.split() == [used]


@linux_only
def test_the_library_works_without_pytorch_and_then_finds_its_threads():
    """Loaded before any OpenMP runtime, it computes on one thread; once PyTorch is there, on PyTorch's."""
    output = run_program("""
import subprocess, sys
print(subprocess.run([sys.executable, "-c", '''
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.bnb_cpu_openmp_library.restype = ctypes.c_char_p
n = 1 << 20
x, absmax, out = (ctypes.c_float * n)(*[0.5] * n), (ctypes.c_float * (n // 64))(), (ctypes.c_uint8 * (n // 2))()
size = ctypes.c_int64
assert lib.bnb_cpu_quantize_4bit(x, 0, size(n), size(64), 2, absmax, out, 4) == 0
assert set(out) == {255} and set(absmax) == {0.5}
before = lib.bnb_cpu_openmp_library()
import torch
print(before == b"", lib.bnb_cpu_openmp_library() != b"")
''', str(native.library_path())], capture_output=True, text=True, check=True).stdout.strip())
""")
    assert output == "True True"


@linux_only
def test_a_forked_child_finishes_and_gives_the_same_bytes():
    """The runtime's threads do not exist in the child; waiting for them would hang."""
    output = run_program("""
x = torch.randn(1_000_000)
expected = native.quantize_4bit(lib, x, 64, "nf4", threads=4)[1]
child = os.fork()
if child == 0:
    same = bool((native.quantize_4bit(lib, x, 64, "nf4", threads=4)[1] == expected).all())
    os._exit(0 if same and count() == 1 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
native.quantize_4bit(lib, x, 64, "nf4", threads=4)
print("parent goes on")
""")
    assert output.splitlines() == ["0", "parent goes on"]
