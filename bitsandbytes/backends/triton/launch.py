"""What the kernel families share on the host: launching, tables on the device, results in a given tensor."""

from collections.abc import Callable
import contextlib
import functools
import math

import torch

from ... import codebooks

# Operator -> the function that computes it on whatever device its tensors are on.
OPERATORS: dict[str, Callable] = {}


def operator(name: str) -> Callable:
    """Makes the decorated function the Triton kernel of an operator. ``register`` of this package puts it on a device."""

    def remember(function: Callable) -> Callable:
        OPERATORS[name] = function
        return function

    return remember


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Runs a kernel on the device of the first tensor among its arguments; nothing where the grid is empty.

    Products and sums stay as they are written: a fused multiply-add where the reference rounds twice would change codes.
    """
    if math.prod(grid) == 0:
        return
    with _device_of(args):
        kernel[grid](*args, **meta, enable_fp_fusion=False)


def _device_of(args):
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def power_of_two(count: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``count``, within limits."""
    return min(max(1 << max(count - 1, 0).bit_length(), smallest), largest)


@functools.cache
def levels(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type on a device."""
    return codebooks.levels(quant_type).to(device)


@functools.cache
def thresholds(quant_type: str, device: torch.device) -> torch.Tensor:
    """The decision values of a 4-bit type on a device: 15 for NF4, 7 magnitudes for FP4."""
    return (codebooks.nf4_thresholds() if quant_type == "nf4" else codebooks.fp4_thresholds()).to(device)


def as_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes of any storage dtype as uint8 [bytes]."""
    return packed.contiguous().view(-1).view(torch.uint8)


def written(out: torch.Tensor, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets ``write`` fill ``out``, by way of a contiguous tensor where ``out`` is not contiguous itself."""
    if out.is_contiguous():
        write(out)
    else:
        out.copy_(write(torch.empty_like(out, memory_format=torch.contiguous_format)))
