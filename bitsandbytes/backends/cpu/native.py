"""How the kernels of the native library become operators."""

from collections.abc import Callable
import ctypes as ct

import torch

from ..._ops import implement
from ...cextension import cpu_lib

P, I, L, D = ct.c_void_p, ct.c_int32, ct.c_int64, ct.c_double  # noqa: E741  (as in the C interface: pointer, int32, int64, double)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def bind(name: str, *argtypes):
    """A function of the native library that returns a status."""
    function = getattr(cpu_lib, name)
    function.argtypes, function.restype = argtypes, ct.c_int32
    return function


def kernels(symbol: str) -> Callable:
    """Like ``_ops.implement`` for the CPU, if the native library has ``symbol``.

    Without it the decorated functions still exist, unregistered, and the reference serves the CPU.
    """
    available = isinstance(getattr(cpu_lib, "_lib", None), ct.CDLL) and hasattr(cpu_lib._lib, symbol)
    return lambda operator: implement(operator, "cpu") if available else lambda function: function


def written(out: torch.Tensor, write) -> None:
    """Lets ``write`` fill ``out``, by way of a contiguous buffer if ``out`` is not contiguous itself."""
    if out.is_contiguous():
        write(out)
    else:
        out.copy_(write(out.new_empty(out.shape)))
