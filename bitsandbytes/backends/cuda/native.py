"""How the kernels of the native GPU library become operators.

The functions of a backend module do not care where memory lies: the library that is in use does. So tests can call them with CPU tensors and the
emulated library (``use_library``), and all that differs is which device and stream a call names.
"""

from collections.abc import Callable
import ctypes as ct
import weakref

import torch

from ..._ops import implement
from ...cextension import lib
from ..marshalling import I, P

_functions: "weakref.WeakSet[NativeFunction]" = weakref.WeakSet()


def _device_and_stream(tensor: torch.Tensor) -> tuple[int, int]:
    """The last two arguments of every function: the tensor's device, and the stream that is current there."""
    index = tensor.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


_library = lib if lib.compiled_with_cuda else None
_where: Callable[[torch.Tensor], tuple[int, int | None]] = _device_and_stream


def use_library(library, where: Callable = _device_and_stream) -> None:
    """Binds every function to another library: for tests.

    Args:
        library: has the C functions as attributes; None: the one of the package, or none.
        where: tensor -> device and stream.
    """
    global _library, _where
    _library = library if library is not None else (lib if lib.compiled_with_cuda else None)
    _where = where
    for function in _functions:
        function.bind()


class NativeFunction:
    """A function of the library that returns a status, without its last arguments, the device and the stream.

    Called with a tensor of the device it is to run on, then the arguments. Tensors that the arguments point to must live until the call returns;
    the allocator keeps their memory for the stream after that.

    Raises:
        RuntimeError: on call, if the status is not 0 or there is no such function.
    """

    def __init__(self, name: str, argtypes: tuple):
        self.name, self.argtypes = name, argtypes
        self.bind()
        _functions.add(self)

    def bind(self) -> None:
        # Of its own for each binding: a library hands out one function object for all, whose types others may want to set.
        self._call = None
        if has_symbol(self.name):
            prototype = ct.CFUNCTYPE(I, *self.argtypes, I, P)
            self._call = prototype((self.name, _library._lib))

    def __call__(self, like: torch.Tensor, *arguments) -> None:
        if self._call is None:
            raise RuntimeError(f"{self.name} is not in the native library that was loaded. Install a build for this GPU.")
        status = self._call(*arguments, *_where(like))
        if status:
            raise RuntimeError(f"{self.name} failed: {_words_for(status)} (status {status})")


def _words_for(status: int) -> str:
    functions = _library._lib
    functions.bnb_status_message.restype = functions.bnb_cuda_last_error.restype = ct.c_char_p
    words = functions.bnb_status_message(status).decode()
    details = functions.bnb_cuda_last_error().decode() if status == 5 else ""
    return f"{words}: {details}" if details else words


def bind(name: str, *argtypes) -> NativeFunction:
    """The function ``name`` of the library in use; ``argtypes`` leave out the device and the stream."""
    return NativeFunction(name, argtypes)


def has_symbol(name: str) -> bool:
    return _library is not None and hasattr(_library._lib, name)


def kernels(symbol: str) -> Callable:
    """Like ``_ops.implement`` for CUDA, if the package's GPU library is loaded and has ``symbol``.

    Without it the decorated functions still exist, unregistered.
    """
    available = has_symbol(symbol)
    return lambda operator: implement(operator, "cuda") if available else lambda function: function
