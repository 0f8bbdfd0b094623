"""What a native call has to know about a tensor: its address, its stream, its device."""

from collections.abc import Iterable
import contextlib
import ctypes as ct
from typing import Optional

import torch
from torch import Tensor

from .cextension import lib
from .singleton import Singleton

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


def get_ptr(A: Optional[Tensor]) -> Optional[ct.c_void_p]:
    """The address of a tensor's first element as C takes it; None, which C takes for NULL, without a tensor."""
    return None if A is None else ct.c_void_p(A.data_ptr())


def _cuda_device_of(a: Tensor):
    """A context in which the CUDA device of the tensor is the current one. Costs nothing where there is only one."""
    return torch.cuda.device_of(a) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def _get_tensor_stream(tensor: Tensor) -> ct.c_void_p:
    """The raw handle of the stream that work on the tensor belongs to.

    A tensor in host memory belongs to whichever accelerator works on it: the current XPU where there is one, else the current GPU.
    """
    device = tensor.device
    if device.type == "cpu":
        device = torch.device("xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cuda")
    if device.type == "xpu":
        return ct.c_void_p(torch.xpu.current_stream(device).sycl_queue)
    return ct.c_void_p(torch.cuda.current_stream(device).cuda_stream)


def is_on_gpu(tensors: Iterable[Optional[Tensor]]) -> bool:
    """Checks that one device can work on all the tensors. Paged tensors, which every device reaches, and None do not count.

    Returns:
        True. All tensors on the CPU is one device too.

    Raises:
        RuntimeError: the tensors lie on different devices.
    """
    devices = {t.device for t in tensors if t is not None and not getattr(t, "is_paged", False)}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        kind = "same device" if any(device.type == "cpu" for device in devices) else "same GPU"
        raise RuntimeError(f"All tensors must be on the {kind}, but they are on {found}. Move them to one.")
    return True


class CUBLAS_Context(Singleton):
    """The native library's handles to the BLAS library, one a device, created when first asked for."""

    def _set_up(self) -> None:
        self.context: dict[int, ct.c_void_p] = {}

    def get_context(self, device: torch.device) -> ct.c_void_p:
        """The handle for ``device``, a CUDA device with an index."""
        if device.index not in self.context:
            with torch.cuda.device(device):
                self.context[device.index] = ct.c_void_p(lib.get_context())
        return self.context[device.index]
