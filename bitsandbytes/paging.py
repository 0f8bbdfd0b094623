"""Paged memory: buffers that the host and the GPU both reach, and that move between them when either runs short.

Optimizer states live in it, so that a spike of activation memory pushes them out to the host and not the job out of memory
(QLoRA, Dettmers et al. 2023, section 3). A paged tensor is a CPU tensor for torch, with two attributes more: ``is_paged`` is True and
``page_deviceid`` is the index of the GPU that works on it.

Kernels on a paged tensor do not hold up the host. Before the host touches one that a kernel may still use, it calls ``wait_for_pages``;
``elementwise_func``, the step of an optimizer, and whatever saves, loads or copies its states, do so themselves.
"""

from collections.abc import Iterable, Iterator
import contextlib
import ctypes as ct
import functools
from math import prod
from typing import Optional, TypeVar
import weakref

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .cextension import lib
from .devices import FIRST_CUDA_DEVICE, get_ptr
from .singleton import Singleton
from .utils import sync_gpu  # noqa: F401

_TO_HOST = -1

_NATIVE_SCALARS = {torch.float32: ("fp32", ct.c_float), torch.uint8: ("uint8", ct.c_uint8)}


class WeakTensors:
    """Tensors in the order in which they were appended, as long as somebody else keeps them."""

    def __init__(self):
        self._references: list[TensorWeakRef] = []

    def append(self, tensor: Tensor) -> None:
        self._references = [reference for reference in self._references if reference() is not None]
        self._references.append(TensorWeakRef(tensor))

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor for reference in self._references if (tensor := reference()) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class GlobalPageManager(Singleton):
    """Every paged tensor of the process.

    Attributes:
        paged_tensors: those that live, in the order in which they were made.
    """

    def _set_up(self) -> None:
        self.paged_tensors = WeakTensors()

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Starts moving every paged tensor to its GPU or to the host.

        The newest goes first: what moves last is the least likely to be evicted again, and an optimizer starts with the oldest.
        """
        for tensor in reversed(list(self.paged_tensors)):
            prefetch_tensor(tensor, to_cpu)


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """Allocates an uninitialised paged tensor. Its memory is given back when the last tensor over it is gone.

    Args:
        shape: the sizes, at least one element in all.
        dtype: the element type.
        device: the GPU that will work on it; without an index the first.

    Raises:
        ValueError: a tensor without elements was asked for.
        RuntimeError: the native library cannot allocate managed memory, or there is none left.
    """
    count = prod(shape)
    if count <= 0:
        raise ValueError(f"a paged tensor needs at least one element, got shape {shape}")
    nbytes = count * dtype.itemsize
    index = 0 if device.index is None else device.index
    with _device_is_current(index):
        address = lib.cget_managed_ptr(ct.c_size_t(nbytes))
    if not address:
        raise RuntimeError(f"could not allocate {nbytes} bytes of managed memory. Use an optimizer that is not paged, or a smaller model.")
    memory = (ct.c_uint8 * nbytes).from_address(address)
    weakref.finalize(memory, lib.bnb_cuda_free_managed, ct.c_void_p(address)).atexit = False  # torch keeps it as long as the storage lives
    tensor = torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
    tensor.is_paged = True
    tensor.page_deviceid = index
    return tensor


def _device_is_current(index: int):
    """A context in which native functions that are not told a device work on this one. Costs nothing where there is only one."""
    return torch.cuda.device(index) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def paged_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """The rows of a tensor, which are paged if it is."""
    rows = tensor.unbind()
    if is_paged(tensor):
        for row in rows:
            row.is_paged, row.page_deviceid = True, tensor.page_deviceid
    return rows


def is_paged(tensor: Optional[Tensor]) -> bool:
    return getattr(tensor, "is_paged", False)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Starts moving a paged tensor to its GPU, or to the host, behind the work that its GPU has been given so far. Does not wait.

    Raises:
        ValueError: the tensor is not paged.
    """
    if not is_paged(A):
        raise ValueError("only paged tensors can be prefetched: pass one that get_paged returned")
    if not _is_capturing(A.page_deviceid):
        _start_moving(A, _TO_HOST if to_cpu else A.page_deviceid, torch.cuda.current_stream(A.page_deviceid))


def _is_capturing(device: int) -> bool:
    """Whether a graph is made of what is launched on the GPU: graphs cannot move pages."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _start_moving(A: Tensor, device: int, stream: torch.cuda.Stream) -> None:
    """Moves pages in the order of a stream. What it returns does not matter: pages that have not moved will when they are touched."""
    lib.bnb_cuda_prefetch_managed(get_ptr(A), ct.c_int64(A.nbytes), ct.c_int32(device), ct.c_int32(A.page_deviceid), ct.c_void_p(stream.cuda_stream))


def wait_for_pages(tensors: Iterable[Tensor]) -> None:
    """Waits for the GPUs that work on those of the tensors that are paged: after that the host may touch them.

    While a graph is captured nothing runs that could be waited for.
    """
    for device in {tensor.page_deviceid for tensor in tensors if is_paged(tensor)}:
        if not _is_capturing(device):
            torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------- pages that travel while others are used
_Work = TypeVar("_Work")


@functools.cache
def _stream_for_pages(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _send_ahead(tensors: list[Tensor]) -> Optional[torch.cuda.Event]:
    """Starts moving paged tensors of one GPU there as soon as it is through with its work so far. Returns what happens when they have arrived."""
    device = tensors[0].page_deviceid if tensors else None
    if device is None or _is_capturing(device):
        return None
    stream = _stream_for_pages(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for tensor in tensors:
        _start_moving(tensor, device, stream)
    return stream.record_event()


def prefetched(work: list[tuple[_Work, list[Tensor]]]) -> Iterator[_Work]:
    """Yields pieces of work, whose kernels the caller launches at once, behind the arrival of their paged tensors.

    Those of a piece travel while the kernels of the piece before run. They do not travel earlier: they might push out what others still need.

    Args:
        work: pieces, each with those of its tensors that are paged, all of one GPU.
    """
    arrival = _send_ahead(work[0][1]) if work else None
    for i, (piece, tensors) in enumerate(work):
        next_arrival = _send_ahead(work[i + 1][1]) if i + 1 < len(work) else None
        if arrival is not None:
            torch.cuda.current_stream(tensors[0].page_deviceid).wait_event(arrival)
        yield piece
        arrival = next_arrival


# -------------------------------------------------------------------------------------------------------------- elementwise functions
def elementwise_func(func_name: str, A: Tensor, B: Optional[Tensor], value: float, prefetch: bool = True) -> None:
    """Runs a native elementwise function in place on a paged tensor and waits for it.

    Args:
        func_name: the native function without its prefix and type, such as "fill".
        A: what is read and written, float32 or uint8.
        B: a second operand of A's size, or None.
        value: a scalar operand.
        prefetch: move the paged operands to the GPU first.

    Raises:
        NotImplementedError: A is of another type.
        ValueError: B does not match A.
        RuntimeError: the native library has no such function.
    """
    if A.dtype not in _NATIVE_SCALARS:
        raise NotImplementedError(f"{func_name} exists for float32 and uint8, not for {A.dtype}")
    if B is not None and (B.dtype != A.dtype or B.numel() != A.numel()):
        raise ValueError(f"{func_name} needs operands of one type and size, got {A.dtype} x {A.numel()} and {B.dtype} x {B.numel()}")
    _start_elementwise(func_name, A, B, value, prefetch)
    wait_for_pages([t for t in (A, B) if t is not None])  # the host may read them at once, and nothing orders that after the kernel


def _start_elementwise(func_name: str, A: Tensor, B: Optional[Tensor], value: float, prefetch: bool) -> None:
    suffix, c_type = _NATIVE_SCALARS[A.dtype]
    paged = [t for t in (A, B) if is_paged(t)]
    if prefetch:
        for tensor in paged:
            prefetch_tensor(tensor)
    function = lib[f"c{func_name}_{suffix}"]
    arguments = get_ptr(A), get_ptr(B), c_type(value), ct.c_int64(A.numel())
    if not paged:
        function(*arguments)
        return
    index = paged[0].page_deviceid
    current, default = torch.cuda.current_stream(index), torch.cuda.default_stream(index)  # which these functions use
    default.wait_stream(current)
    with _device_is_current(index):
        function(*arguments)
    current.wait_stream(default)


def fill(A: Tensor, value: float, device: Optional[torch.device] = None, prefetch: bool = True) -> None:
    """Sets every element of A to ``value``, on the GPU where A is paged. ``device`` is accepted and not used."""
    if is_paged(A):
        elementwise_func("fill", A, None, value, prefetch)
    else:
        A.fill_(value)


def start_filling(A: Tensor, value: float) -> None:
    """As ``fill``, but the host does not wait: what is launched on the GPU's current stream afterwards finds the values, the host itself may not."""
    if is_paged(A):
        _start_elementwise("fill", A, None, value, prefetch=True)
    else:
        A.fill_(value)


def _mul(A: Tensor, B: Tensor, device: Optional[torch.device] = None) -> None:
    """A *= B element by element, on the GPU where A is paged. ``device`` is accepted and not used."""
    if is_paged(A):
        elementwise_func("_mul", A, B, 0)
    else:
        A.mul_(B)
