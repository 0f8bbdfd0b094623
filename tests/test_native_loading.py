"""Finding and loading the native library: which file, what happens without one, what errors say."""

import copy
import ctypes
import logging
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest
import torch

from bitsandbytes import cextension, cuda_specs
from bitsandbytes.cextension import BNBNativeLibrary, CudaBNBNativeLibrary, ErrorHandlerMockBNBNativeLibrary, XpuBNBNativeLibrary
from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from bitsandbytes.cuda_specs import CUDASpecs

SUFFIX = DYNAMIC_LIBRARY_SUFFIX


def specs(major, minor, capability=(8, 6)):
    return CUDASpecs(highest_compute_capability=capability, cuda_version_string=f"{major}{minor}", cuda_version_tuple=(major, minor))


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    monkeypatch.delenv("BNB_CUDA_VERSION", raising=False)
    monkeypatch.delenv("BNB_ROCM_VERSION", raising=False)


@pytest.fixture
def hip(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0.0")


@pytest.fixture
def in_package(monkeypatch, tmp_path):
    """Makes the package folder one that holds just the files named."""

    def place(*names):
        monkeypatch.setattr(cextension, "PACKAGE_DIR", tmp_path)
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    return place


# -------------------------------------------------------------------------------------------------------------------- which file
@pytest.mark.parametrize(
    "wanted, present, chosen, warns",
    [
        ((12, 4), ["124", "126"], "124", False),
        ((12, 5), ["121", "124", "126", "118"], "124", True),  # the newest that is older
        ((12, 0), ["124", "121", "118"], "121", True),  # else the oldest that is newer
        ((13, 0), ["118", "128"], "130", False),  # never another major: the missing file is named
        ((12, 4), [], "124", False),
    ],
    ids=str,
)
def test_cuda_library_is_the_closest_of_its_major(in_package, caplog, wanted, present, chosen, warns):
    folder = in_package(*(f"libbitsandbytes_cuda{version}{SUFFIX}" for version in present))
    path = cextension.get_cuda_bnb_library_path(specs(*wanted))
    assert path == folder / f"libbitsandbytes_cuda{chosen}{SUFFIX}"
    assert ("BNB_CUDA_VERSION" in caplog.text) == warns == bool(caplog.records)


def test_rocm_versions_have_one_digit_before_the_dot(in_package, hip, caplog):
    folder = in_package(f"libbitsandbytes_rocm72{SUFFIX}", f"libbitsandbytes_rocm713{SUFFIX}", f"libbitsandbytes_cuda128{SUFFIX}")
    assert cextension.get_cuda_bnb_library_path(specs(7, 12)) == folder / f"libbitsandbytes_rocm72{SUFFIX}"
    assert "BNB_ROCM_VERSION" in caplog.text
    assert cextension.get_available_cuda_binary_versions() == ["7.2", "7.13"]
    assert cextension.parse_cuda_version("713") == "7.13"


def test_files_that_are_no_library_are_overlooked(in_package):
    in_package(
        f"libbitsandbytes_cuda128{SUFFIX}", f"libbitsandbytes_cuda118{SUFFIX}", f"libbitsandbytes_cpu{SUFFIX}", f"libbitsandbytes_cuda{SUFFIX}",
        f"libbitsandbytes_cuda12x{SUFFIX}", f"libbitsandbytes_cuda12{SUFFIX}", "libbitsandbytes_cuda124.txt", f"libbitsandbytes_rocm72{SUFFIX}",
    )  # fmt: skip
    assert cextension.get_available_cuda_binary_versions() == ["11.8", "12.8"]


@pytest.mark.parametrize("text, read", [("118", "11.8"), ("1213", "12.13"), ("abc", "abc"), ("", ""), ("12", "12")])
def test_compact_versions_are_read_where_they_can_be(text, read):
    assert cextension.parse_cuda_version(text) == read


def test_environment_overrides_without_asking_for_the_file(in_package, monkeypatch, caplog):
    folder = in_package(f"libbitsandbytes_cuda124{SUFFIX}")
    monkeypatch.setenv("BNB_CUDA_VERSION", "110")
    assert cextension.get_cuda_bnb_library_path(specs(12, 4)) == folder / f"libbitsandbytes_cuda110{SUFFIX}"
    assert "BNB_CUDA_VERSION" in caplog.text


def test_each_runtime_listens_to_its_own_variable(in_package, hip, monkeypatch):
    folder = in_package()
    monkeypatch.setenv("BNB_CUDA_VERSION", "110")
    assert cextension.get_cuda_bnb_library_path(specs(7, 0)).name == f"libbitsandbytes_rocm70{SUFFIX}"
    monkeypatch.setenv("BNB_ROCM_VERSION", "72")
    assert cextension.get_cuda_bnb_library_path(specs(7, 0)) == folder / f"libbitsandbytes_rocm72{SUFFIX}"


@pytest.mark.parametrize("value", ["12.4", "", "cuda", "12 4", "12\n", "²"])
def test_an_override_that_is_no_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("BNB_CUDA_VERSION", value)
    with pytest.raises(RuntimeError, match="BNB_CUDA_VERSION must hold digits only"):
        cextension.get_cuda_bnb_library_path(specs(12, 4))


def test_xpu_library_carries_the_year_of_the_runtime(monkeypatch):
    monkeypatch.setattr(torch.version, "xpu", "20250301", raising=False)
    assert cextension.get_xpu_bnb_library_path().name == f"libbitsandbytes_xpu2025{SUFFIX}"
    monkeypatch.setattr(torch.version, "xpu", None, raising=False)
    assert cextension.get_xpu_bnb_library_path().name == f"libbitsandbytes_xpu{SUFFIX}"


# --------------------------------------------------------------------------------------------------------------- a machine with a GPU
@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(cextension, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(cextension, "get_cuda_version_tuple", lambda: (12, 4))
    monkeypatch.setattr(cextension, "BNB_BACKEND", "CUDA")


def test_gpu_without_a_library_is_one_logged_error_and_a_stand_in(with_gpu, in_package, caplog):
    in_package(f"libbitsandbytes_cpu{SUFFIX}", f"libbitsandbytes_cuda118{SUFFIX}")
    stand_in = cextension._load()
    assert isinstance(stand_in, ErrorHandlerMockBNBNativeLibrary)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info
    assert (stand_in.requested_version, stand_in.available_versions) == ("12.4", ["11.8"])
    with pytest.raises(RuntimeError, match="No compatible CUDA .*binary found"):
        stand_in.cadam32bit_grad_fp32()
    with pytest.raises(RuntimeError, match=r"version: 12\.4\. In the package: 11\.8\."):
        stand_in.cadam32bit_grad_fp32()


def test_gpu_with_an_override_that_is_no_number_does_not_break_the_import(with_gpu, in_package, monkeypatch, caplog):
    in_package()
    monkeypatch.setenv("BNB_CUDA_VERSION", "12.4")
    with pytest.raises(RuntimeError, match="digits only"):
        cextension._load().cfoo()


def test_gpu_library_that_lacks_a_dependency_names_it(with_gpu, in_package, monkeypatch):
    in_package(f"libbitsandbytes_cuda124{SUFFIX}")

    def fail(path):
        raise OSError("libcublasLt.so.12: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes.cdll, "LoadLibrary", fail)
    with pytest.raises(RuntimeError, match=r"missing dependency: libcublasLt\.so\.12\n(.|\n)*CUDA 12\.x(.|\n)*LD_LIBRARY_PATH"):
        cextension._load().cfoo()


def test_gpu_library_is_told_by_its_contents(with_gpu, in_package, monkeypatch):
    in_package(f"libbitsandbytes_cuda124{SUFFIX}")
    loaded = FakeLibrary(get_context=lambda: None, cget_managed_ptr=lambda size: None)
    monkeypatch.setattr(ctypes.cdll, "LoadLibrary", lambda path: loaded)
    library = cextension.get_native_library()
    assert type(library) is CudaBNBNativeLibrary and library.compiled_with_cuda is True
    assert library.get_context.restype is library.cget_managed_ptr.restype is ctypes.c_void_p


def test_xpu_library_is_preferred_where_torch_is_built_for_xpu(in_package, monkeypatch):
    monkeypatch.setattr(torch._C, "_has_xpu", True, raising=False)
    monkeypatch.setattr(torch.version, "xpu", None, raising=False)
    in_package(f"libbitsandbytes_cpu{SUFFIX}", f"libbitsandbytes_xpu{SUFFIX}")
    monkeypatch.setattr(ctypes.cdll, "LoadLibrary", lambda path: FakeLibrary(cfill_fp32=lambda: None))
    library = cextension.get_native_library()
    assert type(library) is XpuBNBNativeLibrary and library.compiled_with_cuda is False


# ------------------------------------------------------------------------------------------------------------------ library objects
class FakeLibrary:
    def __init__(self, **functions):
        self.__dict__.update(functions)


def test_functions_are_attributes_and_items_and_always_the_same_object():
    def quantise():
        return 7

    library = BNBNativeLibrary(FakeLibrary(cquantize=quantise))
    assert library.cquantize is quantise is library["cquantize"] is library.cquantize
    assert library.compiled_with_cuda is False


def test_a_missing_function_can_be_looked_up_and_bound_but_not_called():
    library = BNBNativeLibrary(FakeLibrary())
    missing = library.cgemm_4bit_fp16
    assert missing is library["cgemm_4bit_fp16"]
    missing.argtypes, missing.restype = [ctypes.c_void_p], ctypes.c_int32
    with pytest.raises(RuntimeError, match="cgemm_4bit_fp16 .*not available in CPU-only"):
        missing(None)


@pytest.mark.parametrize("library", [BNBNativeLibrary(FakeLibrary()), ErrorHandlerMockBNBNativeLibrary("boom")], ids=["loaded", "stand-in"])
def test_library_objects_answer_no_to_python_protocols(library):
    assert not hasattr(library, "__array__") and not hasattr(library, "_repr_html_")
    assert copy.copy(library).compiled_with_cuda is False


def test_stand_in_explains_on_call():
    stand_in = ErrorHandlerMockBNBNativeLibrary("the disk is on fire")
    assert isinstance(stand_in, BNBNativeLibrary) and stand_in.error_msg == "the disk is on fire"
    for function in (stand_in.cfoo, stand_in["cfoo"]):
        with pytest.raises(RuntimeError) as raised:
            function(1, flag=True)
        text = str(raised.value)
        assert text == stand_in.formatted_error + "Native code method attempted to call: lib.cfoo()"
        for part in ("Original error: the disk is on fire", "python -m bitsandbytes", "cmake -DCOMPUTE_BACKEND=cpu -S . && make", "not available"):
            assert part in text
    stand_in.cfoo.restype = ctypes.c_int32
    stand_in.something = 1
    assert stand_in.something == 1


def test_stand_in_tells_a_missing_dependency():
    error = ErrorHandlerMockBNBNativeLibrary("libcudart.so.12: cannot open shared object file: No such file or directory").formatted_error
    assert "missing dependency: libcudart.so.12\n" in error and "LD_LIBRARY_PATH" in error


def test_stand_in_reports_the_forced_version(monkeypatch):
    monkeypatch.setenv("BNB_CUDA_VERSION", "118")
    assert ErrorHandlerMockBNBNativeLibrary("x").requested_version == "11.8"


def test_check_status_turns_a_status_into_an_exception(monkeypatch):
    cextension.check_status(0, "anything")
    monkeypatch.setattr(cextension, "lib", BNBNativeLibrary(FakeLibrary(bnb_status_message=lambda status: b"bad argument")))
    with pytest.raises(RuntimeError, match=r"gemm_4bit failed in native code: bad argument \(status 1\)"):
        cextension.check_status(1, "gemm_4bit")


@pytest.mark.skipif(type(cextension.lib) is ErrorHandlerMockBNBNativeLibrary, reason="no native library is built here")
def test_loaded_library_names_its_errors():
    with pytest.raises(RuntimeError, match=r"^\w+ failed in native code: \S.* \(status 1\)$"):
        cextension.check_status(1, "something")


# ------------------------------------------------------------------------------------------------------------ importing, as a user does
USE_EVERYTHING = """
import hashlib, logging, sys, warnings
warnings.simplefilter("error")
import torch
for name in ("is_available", "get_device_capability", "get_device_properties", "init", "_lazy_init"):
    def never(*args, **kwargs):
        raise AssertionError("the import asked the CUDA runtime")
    original = getattr(torch.cuda, name); setattr(torch.cuda, name, never)
import bitsandbytes
from bitsandbytes import functional as F
from bitsandbytes.cextension import lib

digest = hashlib.sha256()
def result(*tensors):
    for t in tensors:
        digest.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

x = ((torch.arange(5000) * 37 % 101 - 50) / 64).view(50, 100)
for quant_type in ("nf4", "fp4"):
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    result(packed, state.absmax, F.dequantize_4bit(packed, state))
    y = bitsandbytes.matmul_4bit(x, packed.t(), state)
    assert (y - x @ F.dequantize_4bit(packed, state).t()).abs().max() < 1e-4
codes, state = F.quantize_blockwise(x)
result(codes, F.dequantize_blockwise(codes, state))
CA, SCA, columns = F.int8_vectorwise_quant(x.half(), threshold=0.7)
result(CA, SCA, columns, F.int8_mm_dequant(F.int8_linear_matmul(CA, CA), SCA, SCA))
p, state1, absmax1 = x.clone(), torch.zeros(50, 100, dtype=torch.uint8), torch.zeros(20)
F.optimizer_update_8bit_blockwise("lion", x, p, state1, None, 0.9, 0.99, 0.0, 0.0, 0.0, 1, 1e-3, F.create_dynamic_map(), None, absmax1, None)
result(p, state1, absmax1)
print(type(lib).__name__, digest.hexdigest())
"""


def import_from(folder: Path):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", USE_EVERYTHING], capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.fixture
def without_library(tmp_path):
    """A copy of the package without native libraries."""
    shutil.copytree(PACKAGE_DIR, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("libbitsandbytes*", "__pycache__"))
    return tmp_path


def test_import_is_silent_and_leaves_cuda_alone():
    done = import_from(PACKAGE_DIR.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_everything_works_without_a_library_silently_and_with_the_same_results(without_library):
    native, bare = import_from(PACKAGE_DIR.parent), import_from(without_library)
    assert bare.returncode == 0, bare.stderr
    assert bare.stderr == ""
    kind, digest = bare.stdout.split()
    assert kind == "ErrorHandlerMockBNBNativeLibrary"
    assert digest == native.stdout.split()[1]


def test_a_library_that_cannot_be_loaded_is_one_warning(without_library):
    (without_library / "bitsandbytes" / f"libbitsandbytes_cpu{SUFFIX}").write_bytes(b"not a library")
    done = import_from(without_library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ErrorHandlerMockBNBNativeLibrary")
    assert len(done.stderr.strip().splitlines()) == 1 and "could not load its native library" in done.stderr


# --------------------------------------------------------------------------------------------------------------------- cuda_specs
def test_specs_know_which_devices_multiply_int8(monkeypatch):
    assert specs(12, 4, capability=(7, 5)).has_imma and specs(12, 4, capability=(12, 0)).has_imma
    assert not specs(12, 4, capability=(7, 0)).has_imma
    monkeypatch.setattr(torch.version, "hip", "7.0.0")
    assert specs(7, 0, capability=(0, 0)).has_imma


@pytest.fixture
def fresh_cache():
    cuda_specs.get_cuda_version_tuple.cache_clear()
    cuda_specs.get_rocm_gpu_arch.cache_clear()
    yield
    cuda_specs.get_cuda_version_tuple.cache_clear()
    cuda_specs.get_rocm_gpu_arch.cache_clear()


def test_specs_of_a_machine_with_gpus(monkeypatch, fresh_cache):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 6)][i])
    assert cuda_specs.get_compute_capabilities() == [(8, 6), (9, 0)]
    assert cuda_specs.get_cuda_specs() == CUDASpecs((9, 0), "128", (12, 8))
    assert cuda_specs.gpu_is_visible()


def test_specs_of_a_broken_driver(monkeypatch, fresh_cache):
    def fail(*args):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert cuda_specs.get_cuda_specs() is None


@pytest.mark.parametrize(
    "report, arch, warp",
    [("Name: gfx942\nName: gfx1100", "gfx942", 64), ("  Name:                    gfx1100  ", "gfx1100", 32), ("nothing", "unknown", 64)],
)
def test_rocm_device_is_read_from_rocms_own_report(monkeypatch, fresh_cache, hip, report, arch, warp):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, stdout=report))
    assert cextension.ROCM_GPU_ARCH == arch
    assert cuda_specs.get_rocm_warpsize() == warp
    assert cextension.ROCM_WARP_SIZE_64 == (warp == 64)


def test_rocm_without_its_tools(monkeypatch, fresh_cache, hip):
    def missing(*args, **options):
        raise FileNotFoundError("rocminfo")

    monkeypatch.setattr(subprocess, "run", missing)
    assert cuda_specs.get_rocm_gpu_arch() == "unknown"


@pytest.mark.skipif(torch.version.hip is not None or torch.cuda.device_count() > 0, reason="for machines without a GPU")
def test_names_on_a_machine_without_a_gpu():
    assert (cextension.BNB_BACKEND, cextension.HIP_ENVIRONMENT, cextension.ROCM_GPU_ARCH, cextension.ROCM_WARP_SIZE_64) == (
        "CPU", False, "unknown", False,
    )  # fmt: skip
    assert cuda_specs.get_cuda_specs() is None and cuda_specs.get_compute_capabilities() == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        cextension.nonsense
