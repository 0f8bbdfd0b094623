"""Building the GPU library: what it exports, what CMake refuses, and how nvcc and the compiler of ROCm take the kernels.

What needs no such compiler is checked on the emulated library, which is built from the same sources. The tests with one compile every kernel for
some architectures, which takes minutes: they are marked slow and run with ``make cuda-test``.
"""

import functools
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
# Backend -> the option of CMake that names architectures, and those to compile for, "all" for its default: of CUDA the oldest with tensor cores, and
# the one with instructions that no other has; of ROCm one with wavefronts of 64 lanes, and one of 32.
ARCHITECTURES = {
    "cuda": ("COMPUTE_CAPABILITY", os.environ.get("BNB_TEST_CUDA_ARCHITECTURES", "75;90")),
    "hip": ("BNB_ROCM_ARCH", os.environ.get("BNB_TEST_ROCM_ARCHITECTURES", "gfx90a;gfx1100")),
}

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
HIPCONFIG = shutil.which("hipconfig", path=os.pathsep.join([os.environ["PATH"], "/opt/rocm/bin"]))
needs_rocm = pytest.mark.skipif(HIPCONFIG is None, reason="needs ROCm")
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


@pytest.fixture
def path_without_gpu_compilers(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "c++", "make", "as", "ld", "ar", "ranlib", "sh", "uname"):
        if (found := shutil.which(tool)) is not None:
            (tools / tool).symlink_to(found)
    return str(tools)


@needs_cmake
@pytest.mark.skipif(HIPCONFIG is not None, reason="ROCm is installed here")
def test_hip_without_its_compiler(tmp_path, path_without_gpu_compilers):
    done = configure(tmp_path / "build", "-DCOMPUTE_BACKEND=hip", "-G", "Unix Makefiles", PATH=path_without_gpu_compilers, ROCM_PATH="")
    assert done.returncode and "the compiler of ROCm, was not found" in words(done)


@needs_cmake
def test_cuda_without_its_compiler(tmp_path, path_without_gpu_compilers):
    done = configure(
        tmp_path / "build", "-DCOMPUTE_BACKEND=cuda", "-G", "Unix Makefiles", PATH=path_without_gpu_compilers, CUDACXX="", CUDA_PATH=str(tmp_path)
    )
    if "CUDA 1" in done.stdout:
        pytest.skip("CMake finds a toolkit in a place that cannot be hidden from it")
    assert done.returncode and "the CUDA compiler nvcc, was not found" in words(done)


@needs_cmake
@needs_nvcc
def test_by_default_the_library_is_built_for_architectures_that_the_toolkit_knows(tmp_path):
    done = configure(tmp_path, "-DCOMPUTE_BACKEND=cuda")
    assert done.returncode == 0, done.stderr
    chosen = re.search(r"for compute capabilities (\S+)", done.stdout).group(1).split(";")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    assert len(chosen) >= 5 and set(chosen) <= set(re.findall(r"compute_(\d+)", known))


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


# ------------------------------------------------------------------------------------------------------- with nvcc, with that of ROCm
@functools.cache
def build(backend: str) -> tuple[Path, str]:
    """Compiles every file anew. Returns the library and what the compiler said of each kernel."""
    folder = ROOT / "build" / f"{backend}_test"
    option, architectures = ARCHITECTURES[backend]
    options = [] if architectures == "all" else [f"-D{option}={architectures}"]
    done = configure(folder, f"-DCOMPUTE_BACKEND={backend}", "-DPTXAS_VERBOSE=ON", f"-DBNB_OUTPUT_DIRECTORY={folder / 'lib'}", *options)
    assert done.returncode == 0, done.stderr
    command = ["cmake", "--build", str(folder), "--clean-first", "--parallel", str(os.cpu_count() or 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = (folder / "lib").glob("libbitsandbytes_*.so")
    return library, done.stdout + done.stderr


each_compiler = pytest.mark.parametrize("backend", [pytest.param("cuda", marks=needs_nvcc), pytest.param("hip", marks=needs_rocm)])


def version_in_name(backend: str) -> str:
    command, before = (["nvcc", "--version"], "release ") if backend == "cuda" else ([HIPCONFIG, "--version"], "")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "".join(re.search(before + r"(\d+)\.(\d+)", said).groups())


@pytest.mark.slow
@needs_cmake
@needs_nvcc
def test_every_kernel_stays_in_registers():
    _, said = build("cuda")
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
@each_compiler
def test_the_compiler_warns_of_nothing(backend):
    _, said = build(backend)
    assert [line for line in said.splitlines() if "warning" in line.lower() or "Performance Loss" in line] == []


@pytest.mark.slow
@needs_cmake
@needs_nm
@each_compiler
def test_native_library_is_named_after_its_toolkit_and_exports_every_published_name(backend):
    library, _ = build(backend)
    assert library.name == f"libbitsandbytes_{'cuda' if backend == 'cuda' else 'rocm'}{version_in_name(backend)}.so"
    names = exported_symbols(library)
    assert EXPORTED - names == set()
    assert [name for name in names - EXPORTED if not name.startswith(("bnb_cuda_", "__hip_cuid_"))] == []  # the last: clang's marks of files
