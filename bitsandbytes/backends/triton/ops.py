"""The operators that the kernel families of this package implement, and how a device gets them."""

from ..._ops import implement
from . import blockwise, int8, optimizers, products  # noqa: F401  (each adds its operators)
from .launch import OPERATORS


def register(device: str) -> None:
    """Makes the kernels of this package those of a device type, such as "xpu"."""
    for name, function in OPERATORS.items():
        implement(name, device)(function)
