"""What Python hands to a native library, whichever device it is for: C types, numbers of dtypes and quantisation types, addresses."""

from collections.abc import Callable
import ctypes as ct

import torch

# As in the C interface: pointer, int32, int64, float, double.
P, I, L, F, D = ct.c_void_p, ct.c_int32, ct.c_int64, ct.c_float, ct.c_double  # noqa: E741

# csrc/common/types.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPES = {"fp4": 1, "nf4": 2}


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor begins; None, which C takes for a null pointer, without one."""
    return None if tensor is None else tensor.data_ptr()


def written(out: torch.Tensor, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets ``write`` fill ``out``, by way of a contiguous buffer if ``out`` is not contiguous itself."""
    if out.is_contiguous():
        write(out)
    else:
        out.copy_(write(out.new_empty(out.shape)))
