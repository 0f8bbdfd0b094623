"""Finds and loads the native libraries, once, when the package is imported.

``lib`` is the library for this machine's accelerator, or for the CPU where there is none; ``cpu_lib`` is the one that serves CPU tensors, and lends
``lib`` what that lacks. Each may be a stand-in whose functions explain on call why there is no library: importing never fails, because every operator
also has a PyTorch kernel. Nothing is logged on a healthy machine.
"""

import ctypes as ct
import logging
import os
from pathlib import Path
import re
import struct

import torch

from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from .cuda_specs import CUDASpecs, get_cuda_version_tuple, get_rocm_gpu_arch, get_rocm_warpsize, gpu_is_visible

logger = logging.getLogger(__name__)

HIP_ENVIRONMENT = bool(torch.version.hip)

_NO_GPU_LIBRARY_NEEDED = "No native library was found. The CPU and XPU run without it, by the slower PyTorch kernels."

# ctypes takes every result for an int unless told otherwise.
_RETURNS_TEXT = ("bnb_status_message", "bnb_cpu_isa", "bnb_cpu_openmp_library")
_RETURNS_POINTER = ("get_context", "cget_managed_ptr")


# ---------------------------------------------------------------------------------------------- which file


def _is_hip() -> bool:
    return bool(torch.version.hip)


def _runtime_name() -> str:
    return "ROCm" if _is_hip() else "CUDA"


def _library_prefix() -> str:
    return f"libbitsandbytes_{_runtime_name().lower()}"


def _override_variable() -> str:
    return f"BNB_{_runtime_name().upper()}_VERSION"


def _split_cuda_version(compact: str, is_hip: bool) -> tuple[int, int]:
    """(major, minor) of a version without its dot. CUDA majors have two digits ("124"), ROCm majors one ("713")."""
    major_digits = 1 if is_hip else 2
    return int(compact[:major_digits]), int(compact[major_digits:])


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _find_cuda_libs(prefix: str, is_hip: bool) -> dict[tuple[int, int], Path]:
    """The GPU libraries that lie in the package, by (major, minor) of the runtime they were built for."""
    libraries = {}
    for path in PACKAGE_DIR.glob(f"{prefix}*{DYNAMIC_LIBRARY_SUFFIX}"):
        compact = path.name.removeprefix(prefix).removesuffix(DYNAMIC_LIBRARY_SUFFIX)
        if re.fullmatch(r"\d{2,}" if is_hip else r"\d{3,}", compact):
            libraries[_split_cuda_version(compact, is_hip)] = path
    return libraries


def get_available_cuda_binary_versions() -> list[str]:
    """Runtime versions that the package has a GPU library for, ascending, such as ["12.4", "12.8"]."""
    return [_dotted(version) for version in sorted(_find_cuda_libs(_library_prefix(), _is_hip()))]


def parse_cuda_version(version_str: str) -> str:
    """The dotted form: "118" -> "11.8", on ROCm "713" -> "7.13". Text that is no such number comes back unchanged."""
    try:
        return _dotted(_split_cuda_version(version_str, _is_hip()))
    except ValueError:
        return version_str


def _requested_by_environment() -> str | None:
    """The version that the user forces through the environment, digits only.

    Raises:
        RuntimeError: the variable is set to something else.
    """
    variable = _override_variable()
    value = os.environ.get(variable)
    if value is not None and not re.fullmatch("[0-9]+", value):
        raise RuntimeError(f"{variable} must hold digits only, such as 124 for version 12.4, but is {value!r}. Correct or unset it.")
    return value


def _closest_version(wanted: tuple[int, int], available: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The release to use in place of ``wanted``: the newest older one of the same major, else the oldest newer one."""
    same_major = sorted(version for version in available if version[0] == wanted[0])
    older = [version for version in same_major if version <= wanted]
    return older[-1] if older else next(iter(same_major), None)


def _gpu_library_path(version: tuple[int, int]) -> Path:
    prefix, variable = _library_prefix(), _override_variable()

    forced = _requested_by_environment()
    if forced is not None:
        path = PACKAGE_DIR / f"{prefix}{forced}{DYNAMIC_LIBRARY_SUFFIX}"
        logger.warning("%s=%s is set: loading %s whatever version torch was built with.", variable, forced, path.name)
        return path

    available = _find_cuda_libs(prefix, _is_hip())
    chosen = _closest_version(version, list(available))
    if chosen is None:
        return PACKAGE_DIR / f"{prefix}{version[0]}{version[1]}{DYNAMIC_LIBRARY_SUFFIX}"
    if chosen != version:
        logger.warning(
            "There is no library for %s %s; using the one for %s. Set %s to choose another.",
            _runtime_name(), _dotted(version), _dotted(chosen), variable,
        )  # fmt: skip
    return available[chosen]


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """The GPU library to load: the one the environment forces, the exact match, or the closest of the same major version.

    Args:
        cuda_specs: what torch was built with; only the version is looked at.

    Returns:
        A path, which may not exist: where nothing fits it is the exact match's, where the environment forces one it is that one's.

    Raises:
        RuntimeError: the environment variable is set to something that is no version.
    """
    return _gpu_library_path(cuda_specs.cuda_version_tuple)


def get_xpu_bnb_library_path() -> Path:
    """The XPU library to load, named after the year of the SYCL release that torch was built with where torch tells it."""
    release = getattr(torch.version, "xpu", None) or ""
    return PACKAGE_DIR / f"libbitsandbytes_xpu{release[:4]}{DYNAMIC_LIBRARY_SUFFIX}"


# ---------------------------------------------------------------------------------------------- what was loaded


class BNBNativeLibrary:
    """A loaded library. Its functions are attributes; one that it lacks raises RuntimeError when called, not when looked up.

    Projects bind symbols at import on machines that will never call them, so looking one up must not fail.
    """

    _lib: ct.CDLL
    _cpu: ct.CDLL | None = None
    compiled_with_cuda = False

    def __init__(self, lib: ct.CDLL):
        self._lib = lib
        for names, result in ((_RETURNS_TEXT, ct.c_char_p), (_RETURNS_POINTER, ct.c_void_p)):
            for name in names:
                if hasattr(lib, name):
                    getattr(lib, name).restype = result

    def __getattr__(self, name: str):
        # Only reached for names that are not attributes yet; keeping the function makes it the same object every time.
        # No symbol starts with an underscore: such a name is Python's own protocol asking (copy, pickle, inspect).
        if name.startswith("_"):
            raise AttributeError(name)
        function = self._find(name)
        setattr(self, name, function)
        return function

    def __getitem__(self, name: str):
        return getattr(self, name)

    def complete_with(self, cpu_library: "BNBNativeLibrary") -> None:
        """Functions that are looked up from now on and missing here are taken from the CPU library."""
        self._cpu = cpu_library._lib

    def _find(self, name: str):
        return (
            getattr(self._lib, name, None)
            or getattr(self._cpu, name, None)
            or _always_raises(
                f"{name} is not available in CPU-only builds of bitsandbytes, and this build has no such function. "
                "Install a build for the accelerator that it runs on."
            )
        )


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """A library with CUDA or ROCm kernels."""

    compiled_with_cuda = True


class XpuBNBNativeLibrary(BNBNativeLibrary):
    """A library with SYCL kernels."""


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands in for a library that could not be loaded; every function raises RuntimeError and says why and what to do.

    Attributes:
        error_msg: what the loader said.
        available_versions: runtime versions that the package has GPU libraries for.
        requested_version: the one that was looked for, "unknown" where torch has no GPU runtime.
        formatted_error: the whole explanation.
    """

    def __init__(self, error_msg: str):
        self.error_msg = error_msg
        self.available_versions = get_available_cuda_binary_versions()
        self.requested_version = _requested_version()
        self.formatted_error = _explain(error_msg, self.requested_version, self.available_versions)

    def _find(self, name: str):
        return getattr(self._cpu, name, None) or _always_raises(f"{self.formatted_error}Native code method attempted to call: lib.{name}()")


def _always_raises(message: str):
    def unavailable(*args, **kwargs):
        raise RuntimeError(message)

    return unavailable


def _requested_version() -> str:
    forced = os.environ.get(_override_variable())
    if forced:
        return parse_cuda_version(forced)
    version = get_cuda_version_tuple()
    return "unknown" if version is None else _dotted(version)


def _explain(error: str, requested: str, available: list[str]) -> str:
    """The text of every error that a missing library causes: what is missing, what to do, what the loader said."""
    backend = BNB_BACKEND
    if "cannot open shared object file" in error:
        missing = error.split(":")[0]
        major = requested.split(".")[0]
        advice = (
            f"bitsandbytes for {backend} has a missing dependency: {missing}\n\n"
            f"The loader looks for it in the system's library folders and in those of LD_LIBRARY_PATH. Install the {backend} {major}.x\n"
            "runtime libraries, or add the folder that holds them:\n"
            "    export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:<folder>\n"
        )
    else:
        advice = (
            f"The native library of bitsandbytes is not available for {backend}, so this function cannot run.\n\n"
            f"Looked for version: {requested}. In the package: {', '.join(available) or 'none'}.\n"
            "Install a wheel for your platform, or compile the library in a source checkout:\n"
            f"    cmake -DCOMPUTE_BACKEND={_COMPUTE_BACKEND[backend]} -S . && make\n"
        )
    return (
        f"\n{advice}\nOriginal error: {error}\n\n"
        "For a report on this installation, to be included when you ask for help, run\n    python -m bitsandbytes\n\n"
    )


# ---------------------------------------------------------------------------------------------- loading

_COMPUTE_BACKEND = {"CPU": "cpu", "CUDA": "cuda", "ROCm": "hip", "XPU": "xpu"}


def _detect_backend() -> str:
    if gpu_is_visible():
        return _runtime_name()
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "XPU"
    return "CPU"


def _cpu_library_path() -> Path:
    return PACKAGE_DIR / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}"


def _library_path() -> Path:
    """The file for this machine.

    Raises:
        RuntimeError: there is a GPU and no library for it.
    """
    if getattr(torch._C, "_has_xpu", False) and get_xpu_bnb_library_path().exists():
        return get_xpu_bnb_library_path()
    version = get_cuda_version_tuple()
    if version is None or not gpu_is_visible():
        return _cpu_library_path()
    path = _gpu_library_path(version)
    if not path.exists():
        raise RuntimeError(f"No compatible {_runtime_name()} library: no binary found at {path}. Choose another with {_override_variable()}.")
    return path


def get_native_library() -> BNBNativeLibrary:
    """Loads the library for this machine.

    Raises:
        RuntimeError: there is a GPU and no library for it, or the environment forces a version that is no version.
        OSError: the file is missing, cut short or cannot be loaded.
    """
    path = _library_path()
    library = _open(path)
    if hasattr(library, "get_context"):
        return CudaBNBNativeLibrary(library)
    if path.name.startswith("libbitsandbytes_xpu"):
        return XpuBNBNativeLibrary(library)
    return BNBNativeLibrary(library)


def _open(path: Path) -> ct.CDLL:
    _require_whole(path)
    return ct.cdll.LoadLibrary(str(path))


def _require_whole(path: Path) -> None:
    """Raises OSError for a Linux library that is cut short, by a full disk or a broken copy: mapping it would end the process.

    The header of a 64-bit ELF file says where its table of sections lies, which is near the end of the file.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):
        table, entry_size, entries = struct.unpack_from("<40xQ10xHH", header)
        needed = table + entry_size * entries
        if path.stat().st_size < needed:
            raise OSError(f"{path}: file is cut short, {path.stat().st_size} of {needed} bytes are there")


def _load() -> BNBNativeLibrary:
    try:
        return get_native_library()
    except (OSError, RuntimeError) as error:
        if BNB_BACKEND in ("CUDA", "ROCm"):
            logger.error("bitsandbytes could not load its %s library: %s", BNB_BACKEND, error, exc_info=True)
            return ErrorHandlerMockBNBNativeLibrary(str(error))
        return _do_without(_library_path(), error)


def _do_without(path: Path, error: Exception) -> BNBNativeLibrary:
    if path.exists():
        logger.warning("bitsandbytes could not load its native library and is slower without it: %s", error)
    return ErrorHandlerMockBNBNativeLibrary(_NO_GPU_LIBRARY_NEEDED)


def _load_cpu_library(library: BNBNativeLibrary) -> BNBNativeLibrary:
    """The library that serves CPU tensors: ``library`` itself on a machine without an accelerator, else one that completes it."""
    if BNB_BACKEND == "CPU":
        return library
    path = _cpu_library_path()
    try:
        cpu_library = BNBNativeLibrary(_open(path))
    except OSError as error:
        return _do_without(path, error)
    library.complete_with(cpu_library)
    return cpu_library


def check_status(status: int, what: str) -> None:
    """Turns the status of a native function into an exception.

    Args:
        status: what the function returned; 0 is success.
        what: what was being done, for the message: "gemm_4bit of a [5, 64] activation".

    Raises:
        RuntimeError: the status is not 0.
    """
    if status:
        raise RuntimeError(f"{what} failed in native code: {lib.bnb_status_message(status).decode()} (status {status})")


def __getattr__(name: str):
    # Asking ROCm for these starts a process, so that is left until somebody wants to know.
    if name == "ROCM_GPU_ARCH":
        return get_rocm_gpu_arch()
    if name == "ROCM_WARP_SIZE_64":
        return get_rocm_warpsize() == 64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


BNB_BACKEND = _detect_backend()
lib = _load()
cpu_lib = _load_cpu_library(lib)
