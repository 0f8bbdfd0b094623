"""The general tests of operators, functions and layers, with every operator that the CUDA backend has computed by it (emulated)."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from native_cuda import ON_GPU, emulated_library  # noqa: F401  (a fixture)
import pytest

from bitsandbytes.consts import PACKAGE_DIR

TESTS = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(ON_GPU, reason="emulates a GPU where there is none")


@pytest.fixture(scope="module")
def package(tmp_path_factory, emulated_library):  # noqa: F811
    """A folder with a copy of the package whose only library is the emulated one."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(PACKAGE_DIR, folder / "bitsandbytes", ignore=shutil.ignore_patterns("libbitsandbytes*", "__pycache__"))
    shutil.copy(emulated_library._lib._name, folder / "bitsandbytes" / "libbitsandbytes_cuda130.so")
    return folder


@pytest.mark.parametrize(
    "file, options",
    [
        ("test_ops.py", []),
        ("test_functional.py", []),
        ("test_numerics_traps.py", []),
        ("test_linear4bit.py", ["-k", "not any_size"]),
        ("test_autograd.py", []),
        ("test_linear8bitlt.py", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_general_tests_pass_on_cuda_kernels(package, file, options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, TESTS, TESTS.parent)))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_device", "-p", "no:cacheprovider", "--show-capture=no", str(TESTS / file)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=package, env=environment, timeout=900)
    assert re.search(r"\d+ passed", done.stdout) and done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for operator in ("quantize_4bit", "dequantize_4bit", "gemm_4bit", "gemv_4bit"):
        assert operator in done.stdout.split("CUDA kernels, emulated, served:")[1].splitlines()[0]
