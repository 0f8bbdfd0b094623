"""How the kernels of the native library become operators."""

from collections.abc import Callable
import ctypes as ct

from ..._ops import implement
from ...cextension import cpu_lib


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
