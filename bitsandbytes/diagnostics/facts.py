"""What this installation is and what it does: the facts that ``python -m bitsandbytes`` prints and ``--json`` writes.

The JSON object, in the order of its keys (null: there is none, or it cannot be told):

``schema``                  1; raised when a key changes its meaning or goes away, not when one is added
``version``                 of bitsandbytes
``environment``             ``platform``, ``libc``, ``python``, ``torch``, ``cuda``, ``hip``, ``xpu`` (versions), ``packages`` (name -> version)
``variables``               environment variables that change what bitsandbytes does: name -> value, those that are set
``backend``                 "CPU", "CUDA", "ROCm" or "XPU"
``devices``                 list of accelerators: ``name``, ``capability`` ("9.0"; on ROCm the architecture), ``memory`` (bytes)
``library``                 ``path``, ``loaded``, ``error`` (what the loader said), ``available`` (GPU runtimes with a library in the package),
                            ``cpu_loaded`` (whether there are CPU kernels: on a machine with a GPU they come from a second library)
``instruction_sets``        of the CPU kernels: ``used``, ``best`` (of this machine), ``supported``
``threads``                 ``torch`` (the number in use), ``processors``, ``openmp`` (path of the runtime that runs the kernels),
                            ``openmp_runtimes`` (paths of all in the process)
``operators``               list of ``operator``, ``device``, ``backend`` (what serves it), ``instruction_set``, ``check`` ("ok", "wrong", "failed",
                            "died", "not checked") and ``detail`` (what was seen where it is not "ok")
``problems``                list of ``level`` ("error", "warning"), ``what`` and ``do`` (the one thing to do)
``exit_status``             0, or 1 where a problem is an error
"""

import importlib.metadata
import os
from pathlib import Path
import platform
import sys
from typing import Any

import torch

from .. import _ops, cextension, cuda_specs
from ..cextension import ErrorHandlerMockBNBNativeLibrary
from . import selfcheck

SCHEMA = 1
NOT_FOUND = "not found"
RELATED_PACKAGES = ("accelerate", "diffusers", "numpy", "pip", "peft", "safetensors", "transformers", "triton", "trl")
INSTRUCTION_SETS = ("scalar", "neon", "neondot", "avx2", "avx512", "avx512vnni", "avx512bf16")  # of a processor family, lowest first
VARIABLES = ("BNB_CPU_ISA", "BNB_CUDA_VERSION", "BNB_ROCM_VERSION", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")

_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")


def package_version(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The platform and the packages around this one."""
    return {
        "platform": platform.platform(),
        "libc": "-".join(platform.libc_ver()) if platform.system() == "Linux" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "xpu": getattr(torch.version, "xpu", None),
        "packages": {name: package_version(name) for name in RELATED_PACKAGES},
    }


def devices() -> list[dict[str, Any]]:
    """The accelerators that torch sees."""
    if cextension.BNB_BACKEND == "XPU":
        seen = [torch.xpu.get_device_properties(i) for i in range(torch.xpu.device_count())]
        return [{"name": device.name, "capability": None, "memory": device.total_memory} for device in seen]
    if cextension.BNB_BACKEND == "CPU" or cuda_specs.get_cuda_specs() is None:
        return []
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": device.name, "capability": _capability(device), "memory": device.total_memory} for device in seen]


def _capability(device) -> str:
    return device.gcnArchName.split(":")[0] if torch.version.hip else f"{device.major}.{device.minor}"


def library() -> dict[str, Any]:
    """The native library: which file, and whether it serves."""
    loaded = not isinstance(cextension.lib, ErrorHandlerMockBNBNativeLibrary)
    return {
        "path": _library_path(),
        "loaded": loaded,
        "error": None if loaded else _loading_error(),
        "available": cextension.get_available_cuda_binary_versions(),
        "cpu_loaded": _has("bnb_cpu_isa"),
    }


def _library_path() -> str | None:
    try:
        return str(cextension._library_path())
    except RuntimeError:
        return None


def _loading_error() -> str:
    """What the loader says: the import kept it for the log."""
    try:
        cextension.get_native_library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return "it could not be loaded when bitsandbytes was imported, but can be now"


def instruction_sets() -> dict[str, Any]:
    """The instruction sets of the CPU kernels, if there are any."""
    if not _has("bnb_cpu_isa"):
        return {"used": None, "best": None, "supported": []}
    supported = [name for name in INSTRUCTION_SETS if cextension.cpu_lib.bnb_cpu_isa_supported(name.encode())]
    return {"used": cextension.cpu_lib.bnb_cpu_isa().decode(), "best": supported[-1], "supported": supported}


def threads() -> dict[str, Any]:
    """How the CPU kernels run in parallel."""
    openmp = cextension.cpu_lib.bnb_cpu_openmp_library().decode() if _has("bnb_cpu_openmp_library") else ""
    return {
        "torch": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "openmp": openmp or None,
        "openmp_runtimes": _openmp_runtimes(),
    }


def _has(symbol: str) -> bool:
    return hasattr(getattr(cextension.cpu_lib, "_lib", None), symbol)


def _openmp_runtimes() -> list[str]:
    """The OpenMP runtimes in this process, where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if os.path.basename(path).startswith(_OPENMP_RUNTIMES))


def serving_backend(operator: str, device: str) -> str:
    """What runs an operator on a device: "cpu" or "cuda" (native kernels), "triton", "default" (PyTorch operations), "plugin" (another package)."""
    if (operator, device) in _ops._NATIVE:
        _, kernel = _ops._NATIVE[operator, device]
        return "triton" if "triton" in kernel.__module__.split(".") else device
    packet, _, form = operator.partition(".")
    qualified = f"{_ops.NAMESPACE}::{packet}" + (f".{form}" if form else "")
    from_elsewhere = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, torch._C._dispatch_key_for_device(device))
    return "plugin" if from_elsewhere else "default"


def operators() -> list[dict[str, Any]]:
    """What serves each operator on the CPU and on the accelerator, and whether it computes rightly."""
    accelerator = {"CUDA": "cuda", "ROCm": "cuda", "XPU": "xpu"}.get(cextension.BNB_BACKEND)
    return [row for device in ("cpu", accelerator) if device is not None for row in _operators_of(device)]


def _operators_of(device: str) -> list[dict[str, Any]]:
    rows = []
    for outcome in selfcheck.run(device):
        backend = serving_backend(outcome.operator, device)
        rows.append({
            "operator": outcome.operator,
            "device": device,
            "backend": backend,
            "instruction_set": _instruction_set(backend),
            "check": outcome.status,
            "detail": outcome.detail,
        })  # fmt: skip
    return rows


def _instruction_set(backend: str) -> str | None:
    if backend == "cpu":
        return instruction_sets()["used"]
    if backend == "cuda":
        capabilities = [device["capability"] for device in devices()]
        return ", ".join(sorted(set(capabilities))) or None
    return None


def gather(version: str) -> dict[str, Any]:
    """Everything but the problems."""
    return {
        "schema": SCHEMA,
        "version": version,
        "environment": environment(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "backend": cextension.BNB_BACKEND,
        "devices": devices(),
        "library": library(),
        "instruction_sets": instruction_sets(),
        "threads": threads(),
        "operators": operators(),
    }


def driver_without_runtime() -> bool:
    """Whether the system has an NVIDIA driver but torch was built for the CPU only."""
    return not (torch.version.cuda or torch.version.hip) and sys.platform == "linux" and Path("/proc/driver/nvidia/version").exists()
