"""Building the GPU library: what it exports, what CMake refuses, and how nvcc takes the kernels.

What needs no CUDA compiler is checked on the emulated library, which is built from the same sources. The tests with nvcc compile every kernel for
some architectures, which takes minutes: they are marked slow and run with ``make cuda-test``.
"""

import importlib.util
import os
from pathlib import Path
import re
import shutil
import subprocess

from native_cuda import emulated_library  # noqa: F401  (a fixture)
import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
# The oldest with tensor cores, and the one with instructions that no other has. All the toolkit knows: BNB_TEST_CUDA_ARCHITECTURES=all.
ARCHITECTURES = os.environ.get("BNB_TEST_CUDA_ARCHITECTURES", "75;90")
BUILD = ROOT / "build" / "cuda_test"

FLOATS = ("fp32", "fp16", "bf16")
EXPORTED = {
    "get_context", "cigemmlt_32", "cigemmlt_8", "cigemmlt_8_rowscale", "cigemm", "cbatched_igemm", "cdequant_mm_int32_fp16", "cint8_vector_quant",
    "cget_managed_ptr", "cprefetch", "cfill_fp32", "cfill_uint8", "carange_fp32", "c_mul_fp32", "bnb_status_message",
    *(f"c{verb}_blockwise_{t}{suffix}" for verb in ("quantize", "dequantize") for t in FLOATS for suffix in ("", "_fp4", "_nf4")),
    *(f"cgemm_4bit_{t}" for t in FLOATS), *(f"cgemm_4bit_inference_naive_{t}" for t in FLOATS),
    *(f"c{name}32bit_grad_{t}" for name in ("adam", "lion", "ademamix") for t in FLOATS),
    *(f"c{name}32bit_grad_{bits}" for name in ("momentum", "rmsprop", "adagrad") for bits in (32, 16)),
    *(f"c{name}_8bit_blockwise_grad_{t}" for name in ("adam", "momentum", "rmsprop", "adagrad", "lion", "ademamix") for t in FLOATS),
}  # fmt: skip


def exported_symbols(path) -> set[str]:
    """The C names of a library, from its table of dynamic symbols."""
    listing = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def configure(folder, *options, **environment):
    return subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def words(done) -> str:
    return " ".join((done.stdout + done.stderr).split())


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs CMake and a C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")


@needs_nm
def test_library_exports_every_published_name(emulated_library):  # noqa: F811
    assert EXPORTED - exported_symbols(emulated_library._lib._name) == set()


@needs_nm
def test_library_exports_nothing_else_than_c_functions_of_the_project(emulated_library):  # noqa: F811
    others = exported_symbols(emulated_library._lib._name) - EXPORTED
    own_or_of_the_standard_library = ("bnb_cuda_", "bnb_emulation_", "_ZNSt")  # the last: templates that the emulation uses
    assert [name for name in others if not name.startswith(own_or_of_the_standard_library)] == []


# ------------------------------------------------------------------------------------------------------------------ what CMake refuses
@needs_cmake
def test_unknown_backend(tmp_path):
    done = configure(tmp_path, "-DCOMPUTE_BACKEND=vulkan")
    assert done.returncode and "COMPUTE_BACKEND must be cpu, cuda or hip, got 'vulkan'" in words(done)


@needs_cmake
@pytest.mark.skipif(any(map(shutil.which, ("hipcc", "amdclang++"))) or Path("/opt/rocm").exists(), reason="ROCm is installed here")
def test_hip_without_its_compiler(tmp_path):
    done = configure(tmp_path, "-DCOMPUTE_BACKEND=hip", HIPCXX="")
    assert done.returncode and "the compiler of ROCm, was not found" in words(done)


@needs_cmake
def test_cuda_without_its_compiler(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "c++", "make", "as", "ld", "ar", "ranlib", "sh", "uname"):
        if (found := shutil.which(tool)) is not None:
            (tools / tool).symlink_to(found)
    done = configure(tmp_path / "build", "-DCOMPUTE_BACKEND=cuda", "-G", "Unix Makefiles", PATH=str(tools), CUDACXX="", CUDA_PATH=str(tmp_path))
    if "CUDA 1" in done.stdout:
        pytest.skip("CMake finds a toolkit in a place that cannot be hidden from it")
    assert done.returncode and "the CUDA compiler nvcc, was not found" in words(done)


@needs_cmake
@needs_nvcc
@pytest.mark.parametrize(
    "option, message",
    [("-DCUDA_VERSION=999", "CUDA_VERSION is 999, but the toolkit found is"), ("-DCOMPUTE_CAPABILITY=90;hopper", "got 'hopper'")],
)
def test_options_that_do_not_fit_the_toolkit(tmp_path, option, message):
    done = configure(tmp_path, "-DCOMPUTE_BACKEND=cuda", option)
    assert done.returncode and message in words(done)


# ------------------------------------------------------------------------------------------------------------- what an install builds
@pytest.fixture
def setup_module(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("setup_of_bitsandbytes", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cpu_library_is_built_beside_that_of_a_gpu(setup_module, monkeypatch):
    assert setup_module.wanted_builds("cuda") == {"cuda": [], "cpu": []} and list(setup_module.wanted_builds("cuda"))[0] == "cuda"
    assert setup_module.wanted_builds("cpu") == {"cpu": []}
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: "/toolkit/nvcc")
    monkeypatch.setattr(setup_module, "find_gpu_capabilities", lambda: ["80", "90"])
    assert setup_module.wanted_builds("") == {"cpu": [], "cuda": ["-DCMAKE_CUDA_COMPILER=/toolkit/nvcc", "-DCOMPUTE_CAPABILITY=80;90"]}
    monkeypatch.setattr(setup_module, "find_gpu_capabilities", list)
    assert setup_module.wanted_builds("") == {"cpu": []}


@pytest.mark.parametrize("named, failing, is_fatal", [("cuda", "cuda", True), ("cuda", "cpu", False), ("", "cpu", False), ("cpu", "cpu", True)])
def test_only_the_library_that_was_asked_for_must_be_built(setup_module, monkeypatch, named, failing, is_fatal):
    def build(backend, options):
        if backend == failing:
            raise setup_module.BuildError("no reason", "none")

    monkeypatch.setattr(setup_module, "build_library", build)
    monkeypatch.setattr(setup_module, "announce", lambda message: None)
    monkeypatch.setenv("COMPUTE_BACKEND", named)
    monkeypatch.delenv("BNB_SKIP_CMAKE", raising=False)
    if is_fatal:
        with pytest.raises(SystemExit, match=f"COMPUTE_BACKEND={named} cannot be built"):
            setup_module.build_native_libraries()
    else:
        setup_module.build_native_libraries()


# ---------------------------------------------------------------------------------------------------------------------- with nvcc
@pytest.fixture(scope="module")
def native_build():
    """Compiles the library for ARCHITECTURES, every file anew, and returns its path and what the compiler said of each kernel."""
    options = [] if ARCHITECTURES == "all" else [f"-DCOMPUTE_CAPABILITY={ARCHITECTURES}"]
    done = configure(BUILD, "-DCOMPUTE_BACKEND=cuda", "-DPTXAS_VERBOSE=ON", f"-DBNB_OUTPUT_DIRECTORY={BUILD / 'lib'}", *options)
    assert done.returncode == 0, done.stderr
    command = ["cmake", "--build", str(BUILD), "--clean-first", "--parallel", str(os.cpu_count() or 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = (BUILD / "lib").glob("libbitsandbytes_cuda*.so")
    return library, done.stdout + done.stderr


@pytest.mark.slow
@needs_cmake
@needs_nvcc
def test_every_kernel_stays_in_registers(native_build):
    _, said = native_build
    kernel, kernels, bad = "", 0, []
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            kernel, kernels = " ".join(match.groups()), kernels + 1
        elif (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)) and any(
            map(int, match.groups())
        ):
            bad.append((kernel, match.group()))
    assert kernels > 100 and bad == []


@pytest.mark.slow
@needs_cmake
@needs_nvcc
def test_the_compiler_warns_of_nothing(native_build):
    _, said = native_build
    assert [line for line in said.splitlines() if "warning" in line.lower() or "C7508" in line or "C7512" in line] == []


@pytest.mark.slow
@needs_cmake
@needs_nvcc
@needs_nm
def test_native_library_is_named_after_its_toolkit_and_exports_every_published_name(native_build):
    library, _ = native_build
    release = re.search(r"release (\d+)\.(\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout)
    assert library.name == "libbitsandbytes_cuda{}{}.so".format(*release.groups())
    names = exported_symbols(library)
    assert EXPORTED - names == set()
    assert [name for name in names - EXPORTED if not name.startswith("bnb_cuda_")] == []
