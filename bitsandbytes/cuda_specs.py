"""Which GPU and which GPU runtime this process has. "CUDA" stands for ROCm too, as it does in torch.

Nothing here runs at import: a process that has touched the CUDA runtime cannot use the GPU in forked children any more.
"""

from dataclasses import dataclass
import functools
import platform
import re
import subprocess

import torch

# Instruction sets of the data-centre parts (GCN and CDNA), whose wavefronts are 64 lanes wide; every later family uses 32.
_WAVE64_ARCH = re.compile(r"gfx[89]")


@dataclass(frozen=True)
class CUDASpecs:
    """The GPU runtime that torch was built for and the best device it sees.

    Attributes:
        highest_compute_capability: (major, minor) of the most capable device.
        cuda_version_string: version of the runtime without dots, as library file names carry it: "124", on ROCm "713".
        cuda_version_tuple: the same as (major, minor).
    """

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the device multiplies int8 matrices in hardware (Turing and later; every supported ROCm device)."""
        return bool(torch.version.hip) or self.highest_compute_capability >= (7, 5)


def gpu_is_visible() -> bool:
    """Whether torch sees a CUDA or ROCm device, found out without initialising the runtime.

    On NVIDIA ``torch.cuda.device_count`` asks the management library, while ``torch.cuda.is_available`` asks the CUDA runtime,
    which stops working in children forked after that.
    """
    return torch.cuda.device_count() > 0


def get_compute_capabilities() -> list[tuple[int, int]]:
    """(major, minor) of every visible device, ascending; empty without one. Initialises CUDA."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


@functools.cache
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """(major, minor) of the CUDA or ROCm release that torch was built with; None for a torch without either."""
    version = torch.version.hip or torch.version.cuda
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The version of :func:`get_cuda_version_tuple` as library file names carry it, "124" for (12, 4)."""
    version = get_cuda_version_tuple()
    return None if version is None else "{}{}".format(*version)


def get_cuda_specs() -> CUDASpecs | None:
    """What GPU this machine has, or None where there is none that works. Initialises CUDA."""
    try:
        capabilities = get_compute_capabilities()
        version = get_cuda_version_tuple()
    except Exception:  # a broken driver raises whatever it likes; for every caller that is the same as no GPU
        return None
    if not capabilities or version is None:
        return None
    return CUDASpecs(
        highest_compute_capability=capabilities[-1],
        cuda_version_string="{}{}".format(*version),
        cuda_version_tuple=version,
    )


@functools.cache
def get_rocm_gpu_arch() -> str:
    """The instruction set of the first ROCm device, such as "gfx942", as ROCm's own tool reports it; "unknown" without one."""
    if not torch.version.hip:
        return "unknown"
    tool = "hipinfo.exe" if platform.system() == "Windows" else "rocminfo"
    try:
        report = subprocess.run([tool], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    arch = re.search(r"\bgfx[0-9a-f]+\b", report)
    return arch.group() if arch else "unknown"


def get_rocm_warpsize() -> int:
    """Lanes in a wavefront of the first ROCm device: 64 or 32. 64 when the device is not known, 32 without ROCm."""
    if not torch.version.hip:
        return 32
    arch = get_rocm_gpu_arch()
    return 64 if arch == "unknown" or _WAVE64_ARCH.match(arch) else 32
