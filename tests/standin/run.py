#!/usr/bin/env python3
"""Runs Python on a machine without a GPU as if it had two: torch.cuda is there, and bitsandbytes with its CUDA kernels, emulated.

    python tests/standin/run.py [PYTHON_OPTION...] (-m MODULE | SCRIPT) [ARGUMENT...]
    python tests/standin/run.py -m pytest tests/test_linear4bit.py

Every process that it starts sees the same. BNB_TEST_DEVICE is set to cuda, so that tests put their tensors there. What has to be built (device.cpp
against the headers of the installed torch, and the emulated library) lies in build/standin and build/cuda_emulated.
"""

import os
from pathlib import Path
import shutil
import subprocess
import sys

import torch

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
sys.path[:0] = [str(ROOT), str(TESTS)]
from native_cuda import build_emulated_library  # noqa: E402

BUILD = Path(os.environ.get("BNB_STANDIN_BUILD", ROOT / "build" / "standin"))


def build_device(torch_folder: Path) -> Path:
    """Compiles device.cpp if it is newer than what was compiled from it, or torch is.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    source, library = HERE / "device.cpp", BUILD / "device.so"
    inputs = (source, source.with_name("memory.h"), torch_folder / "version.py")
    if not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in inputs):
        library.parent.mkdir(parents=True, exist_ok=True)
        include, lib = torch_folder / "include", torch_folder / "lib"
        folders = ["-isystem", include, "-isystem", include / "torch/csrc/api/include", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", *folders]
        command = [os.environ.get("CXX", "c++"), *options, source, "-o", library.with_suffix(".new"), "-ltorch_cpu", "-lc10"]
        subprocess.run(list(map(str, command)), check=True)
        library.with_suffix(".new").replace(library)
    return library


def assemble_package(emulated_library: Path) -> Path:
    """A folder with a copy of the package as a machine with a GPU has it: a library for CUDA, and the one for the CPU where it was built."""
    folder = BUILD / "package"
    package = folder / "bitsandbytes"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("libbitsandbytes_[!c]*", "libbitsandbytes_cuda*", "__pycache__")
    shutil.copytree(ROOT / "bitsandbytes", package, ignore=ignored)
    shutil.copy(emulated_library, package / "libbitsandbytes_cuda130.so")
    return folder


def environment() -> dict[str, str]:
    """The variables of a process that is to see the stand-in, everything built that they name."""
    device = build_device(Path(torch.__file__).parent)
    package = assemble_package(build_emulated_library())
    paths = [HERE, package, TESTS, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"BNB_STANDIN_DEVICE": device, "BNB_TEST_DEVICE": "cuda", "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": 1}
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


def hindrance() -> str | None:
    """Why it cannot be done here."""
    if torch.version.cuda or torch.version.hip:
        return "This PyTorch has GPUs of its own: run the tests with BNB_TEST_DEVICE=cuda."
    if sys.platform != "linux" or sys.version_info < (3, 11):
        return "The stand-in for a GPU needs Linux and Python 3.11 or newer."
    return None


if __name__ == "__main__":
    if reason := hindrance():
        sys.exit(reason)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
