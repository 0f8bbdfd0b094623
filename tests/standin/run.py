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

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
BUILD = Path(os.environ.get("BNB_STANDIN_BUILD", ROOT / "build" / "standin"))


def build_device(torch_folder: Path) -> Path:
    """Compiles device.cpp if it is newer than what was compiled from it, or torch is.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    source, library = HERE / "device.cpp", BUILD / "device.so"
    inputs = (source, torch_folder / "version.py")
    if not library.exists() or any(path.stat().st_mtime > library.stat().st_mtime for path in inputs):
        library.parent.mkdir(parents=True, exist_ok=True)
        include, lib = torch_folder / "include", torch_folder / "lib"
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++20",
            "-O1",
            "-fPIC",
            "-shared",
            "-isystem",
            include,
            "-isystem",
            include / "torch/csrc/api/include",
        ]
        command += ["-Wall", "-Wextra", source, "-o", library.with_suffix(".new"), f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]
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
    sys.path[:0] = [str(ROOT), str(TESTS)]
    from native_cuda import build_emulated_library
    import torch

    device = build_device(Path(torch.__file__).parent)
    package = assemble_package(build_emulated_library())
    paths = [HERE, package, TESTS, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"BNB_STANDIN_DEVICE": device, "BNB_TEST_DEVICE": "cuda", "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": 1}
    return {**os.environ, **{name: str(value) for name, value in settings.items()}}


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
