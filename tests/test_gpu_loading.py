"""Two native libraries in one process: the GPU's for tensors on it, the CPU's for all others.

There is no GPU here. The emulated library, under the name of a CUDA library, stands in for the native one, and torch is told that it sees a device.
"""

import os
import shutil
import subprocess
import sys

from native_cuda import emulated_library  # noqa: F401  (a fixture)
import pytest

from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR

pytestmark = pytest.mark.skipif(
    not (PACKAGE_DIR / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}").exists(), reason="no native CPU library is built here"
)

PRETEND = """
torch.cuda.device_count = lambda: 1
def never(*args, **kwargs):
    raise AssertionError("the import asked the CUDA runtime")
torch.cuda.init = torch.cuda._lazy_init = torch.cuda.get_device_properties = never
import bitsandbytes
from bitsandbytes import cextension, functional as F
from bitsandbytes.backends.cpu import ops as cpu_ops
from bitsandbytes.backends.cuda import native, ops
lib, cpu_lib = cextension.lib, cextension.cpu_lib
"""


@pytest.fixture
def machine_with_gpu(tmp_path, emulated_library):  # noqa: F811
    """Runs a program with a copy of the package that has both libraries, on a machine that seems to have a GPU."""
    shutil.copytree(
        PACKAGE_DIR, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("libbitsandbytes_[!c]*", "libbitsandbytes_cuda*", "__pycache__")
    )
    shutil.copy(emulated_library._lib._name, tmp_path / "bitsandbytes" / "libbitsandbytes_cuda130.so")

    def run(program, remove=None, rocm=None):
        if remove is not None:
            (tmp_path / "bitsandbytes" / remove).unlink()
        if rocm is not None:
            (tmp_path / "bitsandbytes" / "libbitsandbytes_cuda130.so").rename(tmp_path / "bitsandbytes" / "libbitsandbytes_rocm64.so")
        runtime = 'torch.version.cuda = "13.0"' if rocm is None else f'torch.version.cuda, torch.version.hip = None, "{rocm}"'
        whole = f"import torch\n{runtime}\n{PRETEND}{program}"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_both_libraries_are_loaded_silently(machine_with_gpu):
    done = machine_with_gpu("""
assert type(lib).__name__ == "CudaBNBNativeLibrary" and lib.compiled_with_cuda
assert type(cpu_lib).__name__ == "BNBNativeLibrary" and "libbitsandbytes_cpu" in cpu_lib._lib._name
assert cextension.BNB_BACKEND == "CUDA"
""")
    assert done.stderr == ""


def test_cpu_tensors_keep_the_cpu_kernels(machine_with_gpu):
    machine_with_gpu("""
assert cpu_ops._quantize_4bit.__name__ == "bnb_cpu_quantize_4bit" and cpu_ops._kernel.__name__ == "<lambda>"
from bitsandbytes import _ops
assert ("quantize_4bit", "cpu") in _ops._NATIVE and ("quantize_4bit", "cuda") in _ops._NATIVE
x = torch.arange(-500.0, 500.0).view(10, 100)
packed, state = F.quantize_4bit(x)
assert (F.dequantize_4bit(packed, state) - x).abs().max() < 100
""")


def test_functions_of_the_cpu_library_are_found_in_the_gpu_library_object(machine_with_gpu):
    machine_with_gpu("""
for name in ("cquantize_blockwise_cpu_fp32", "cdequantize_blockwise_cpu_nf4_bf16", "bnb_cpu_isa", "has_avx512f_cpu"):
    assert getattr(lib, name) is lib[name]
assert lib.bnb_cpu_isa is cpu_lib.bnb_cpu_isa
assert lib.cdequantize_blockwise_fp16_nf4 is not None and lib.get_context() is not None
try:
    lib.no_such_function()
except RuntimeError as error:
    assert "no_such_function" in str(error)
else:
    raise AssertionError("a function that is nowhere could be called")
""")


def test_without_the_cpu_library_the_reference_serves_the_cpu(machine_with_gpu):
    done = machine_with_gpu("""
assert lib.compiled_with_cuda and type(cpu_lib).__name__ == "ErrorHandlerMockBNBNativeLibrary"
x = torch.arange(-500.0, 500.0).view(10, 100)
packed, state = F.quantize_4bit(x)
assert (F.dequantize_4bit(packed, state) - x).abs().max() < 100
""", remove=f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}")  # fmt: skip
    assert done.stderr == ""


def test_without_the_gpu_library_the_cpu_kernels_work_and_status_errors_have_words(machine_with_gpu):
    done = machine_with_gpu("""
assert type(lib).__name__ == "ErrorHandlerMockBNBNativeLibrary" and type(cpu_lib).__name__ == "BNBNativeLibrary"
packed, state = F.quantize_4bit(torch.arange(-500.0, 500.0))
try:
    cextension.check_status(1, "this")
except RuntimeError as error:
    assert "this failed in native code: bad argument" in str(error)
""", remove="libbitsandbytes_cuda130.so")  # fmt: skip
    assert "could not load its CUDA library" in done.stderr


def test_under_rocm_its_library_serves_the_gpu_without_tensor_cores(machine_with_gpu):
    machine_with_gpu("""
assert cextension.BNB_BACKEND == "ROCm" and lib.compiled_with_cuda and lib._lib._name.endswith("libbitsandbytes_rocm64.so")
from bitsandbytes import _ops
from bitsandbytes.backends.cuda import gemm, gemm_4bit_plan
assert ("gemm_4bit", "cuda") in _ops._NATIVE and ("int8_linear", "cuda") in _ops._NATIVE
capability = 1  # what the library says of a GPU of AMD
assert not gemm._suits_tensor_cores(torch.float16, 4096, 4096, 4096, 64, capability)
assert gemm_4bit_plan.forward_plan(capability, False, 1, 4096, 4096).kernel == gemm_4bit_plan.KERNELS["simple"]
assert gemm_4bit_plan.forward_plan(capability, False, 4096, 4096, 4096) is None
assert gemm_4bit_plan.backward_plan(capability, False, 64, 4096, 4096) is None
""", rocm="6.4.43484-9999")  # fmt: skip


def test_a_status_of_the_gpu_library_becomes_an_exception_with_the_words_of_the_driver(machine_with_gpu):
    machine_with_gpu("""
native.use_library(lib, lambda tensor: (7, None))
try:
    ops.quantize_4bit(torch.ones(64), 64, "nf4", torch.uint8)
except RuntimeError as error:
    assert "bnb_cuda_quantize_4bit failed: the device reported an error: the emulation has" in str(error), error
else:
    raise AssertionError("a wrong device passed")
""")
