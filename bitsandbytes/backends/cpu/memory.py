"""Memory for large results, used again.

The C library returns blocks of more than 32 MiB to the system as soon as they are freed, and gets the next one in pages that the system must clear
first. For a dense weight that lives only as long as one product or one merge, that costs several times what dequantising does. So the memory of large
results comes from here: when a tensor's storage dies, its memory is kept for the next of the same size. While nobody uses it the system may take the
pages back whenever it wants them (MADV_FREE), and little is kept.
"""

import ctypes as ct
import mmap
import weakref

import torch

# Smaller blocks are recycled by the C library itself.
SMALLEST = 32 << 20
MOST_KEPT = 128 << 20

# Memory that nobody uses, by size. Its lists are only appended to and popped from, which needs no lock.
_kept: dict[int, list[mmap.mmap]] = {}


def empty(shape, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """``like.new_empty(shape, dtype=dtype)``, for a result that will be written in full.

    A large one has storage that cannot be resized.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < SMALLEST:
        return like.new_empty(shape, dtype=dtype)
    pages = _take(size)
    memory = (ct.c_char * size).from_buffer(pages)
    weakref.finalize(memory, _keep, pages).atexit = False
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _take(size: int) -> mmap.mmap:
    try:
        return _kept[size].pop()
    except LookupError:
        pages = mmap.mmap(-1, size)
        _advise(pages, "MADV_HUGEPAGE")
        return pages


def _keep(pages: mmap.mmap) -> None:
    size = len(pages)
    if size + sum(kept_size * len(kept) for kept_size, kept in list(_kept.items())) > MOST_KEPT:
        _kept.clear()
    if size <= MOST_KEPT:
        _advise(pages, "MADV_FREE")
        _kept.setdefault(size, []).append(pages)


def _advise(pages: mmap.mmap, name: str) -> None:
    """Tells the system what to do with pages, where it listens."""
    try:
        pages.madvise(getattr(mmap, name))
    except (AttributeError, OSError):
        pass
