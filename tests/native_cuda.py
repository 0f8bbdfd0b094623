"""The CUDA kernels without a GPU: built for the CPU, where every thread of a block is a fiber (csrc/cuda/emulation.h), and called through ctypes.

A test file imports the fixtures that it uses:

    from native_cuda import cuda, emulated_library  # noqa: F401

    def test_something(cuda):
        ops.dequantize_4bit(...)           # the functions of bitsandbytes.backends.cuda, with CPU tensors
        cuda.bnb_cuda_dequantize_4bit(...) # the C function itself; its last two arguments are *cuda.where

``cuda`` runs a test twice, with threads in ascending and in descending order, so that a missing barrier shows; ``cuda_once`` runs it once.

With BNB_TEST_DEVICE=cuda the same tests run on a GPU with the package's own library: new tensors are then on the GPU, unless a test says otherwise
(``here`` moves the others), and tests that take ``emulated_only``, which look into memory of the host, are skipped.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
from pathlib import Path
import shutil
import subprocess
from types import SimpleNamespace

from helpers import here  # noqa: F401
import pytest
import torch

from bitsandbytes import cextension
from bitsandbytes.backends.cuda import native

ON_GPU = os.environ.get("BNB_TEST_DEVICE") == "cuda"
ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("BNB_CUDA_EMULATION_BUILD", ROOT / "build" / "cuda_emulated"))


def build_emulated_library() -> Path:
    """Compiles what has changed since the last time and returns the library.

    Raises:
        RuntimeError: the compiler failed; its words are in the message.
    """
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (BUILD / "Makefile").exists() else []
    steps = (
        ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, "-DBNB_CUDA_EMULATION=ON", f"-DBNB_OUTPUT_DIRECTORY={BUILD / 'lib'}"],
        ["cmake", "--build", str(BUILD), "--parallel", "2"],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{' '.join(step)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return BUILD / "lib" / "libbitsandbytes_cuda_emulated.so"


class EmulatedLibrary:
    """The library with its functions as attributes, like the loaded ones of the package."""

    where = (0, None)  # the device and the stream, the last two arguments of every function

    def __init__(self, path: Path):
        self._lib = ct.CDLL(str(path))
        self._lib.bnb_cuda_last_error.restype = ct.c_char_p

    def __getattr__(self, name: str):
        function = getattr(self._lib, name)
        setattr(self, name, function)
        return function

    def __getitem__(self, name: str):
        return getattr(self, name)

    def be(self, capability: int = 90, reversed_threads: bool = False, built_for: int = 0) -> None:
        """Sets the compute capability that is emulated, the order in which threads run, and what the library was built for, if not for the device."""
        self.bnb_emulation_set_capability(capability)
        self.bnb_emulation_set_built_for(built_for)
        self.bnb_emulation_set_reversed(int(reversed_threads))


class GPULibrary:
    """The library of the package and the current device and stream, in place of the emulation."""

    def __init__(self):
        if not cextension.lib.compiled_with_cuda:
            raise RuntimeError("BNB_TEST_DEVICE=cuda, but the package has loaded no CUDA library: build one with `make cuda`")
        self._lib = cextension.lib._lib

    def __getattr__(self, name: str):
        return getattr(self._lib, name)

    def __getitem__(self, name: str):
        return getattr(self._lib, name)

    @property
    def where(self):
        return torch.cuda.current_device(), ct.c_void_p(torch.cuda.current_stream().cuda_stream)

    def be(self, capability: int | None = None, reversed_threads: bool = False) -> None:
        """A GPU is what it is."""
        if capability is not None and capability != 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]:
            pytest.skip(f"this GPU is not of capability {capability}")


@pytest.fixture
def no_streams(monkeypatch):
    """Without a GPU torch has no streams. The emulation is through with its work when a call returns, so they need not do anything."""
    if ON_GPU:
        return
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.fixture
def emulated_only():
    if ON_GPU:
        pytest.skip("needs operands in the host's memory")


@pytest.fixture(scope="session")
def emulated_library():
    if ON_GPU:
        return GPULibrary()
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("building the emulated CUDA library takes CMake and a C++ compiler")
    return EmulatedLibrary(build_emulated_library())


@pytest.fixture
def cuda_once(emulated_library):
    """The emulated library, also behind the functions of the backend."""
    if ON_GPU:
        yield emulated_library
        return
    emulated_library.be()
    native.use_library(emulated_library, lambda tensor: EmulatedLibrary.where)
    yield emulated_library
    native.use_library(None)
    emulated_library.be()


@pytest.fixture(params=[False] if ON_GPU else [False, True], ids=["gpu"] if ON_GPU else ["ascending", "descending"])
def cuda(cuda_once, request):
    cuda_once.be(reversed_threads=request.param)
    return cuda_once


def same_bits_but_any_nan(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless both are equal bit for bit; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    wrong = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    if actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    where = wrong.reshape(-1).nonzero().reshape(-1)
    if where.numel():
        first = where[0].item()
        got, want = actual.reshape(-1)[first].item(), expected.reshape(-1)[first].item()
        raise AssertionError(f"{where.numel()} of {actual.numel()} elements differ, first at {first}: got {got!r}, want {want!r}")
