"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): steps of one size, in the direction of the sign. Weight decay is decoupled."""

from .constructors import constructor
from .optimizer import Optimizer1State


def lion(
    self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0, optim_bits=32, args=None, min_8bit_size=4096, is_paged=False, **options
):  # fmt: skip
    """
    Args:
        betas: share of the average in the direction, and decay of the average.

    See ``Adam`` for the other arguments.
    """
    Optimizer1State.__init__(self, "lion", params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged, **options)


class Lion(Optimizer1State):
    """Lion with states of ``optim_bits`` bits."""

    __init__ = constructor(lion)


class Lion8bit(Optimizer1State):
    """Lion with 8-bit states."""

    __init__ = constructor(lion, hide=("optim_bits",), optim_bits=8)


class Lion32bit(Optimizer1State):
    """Lion with 32-bit states."""

    __init__ = constructor(lion, hide=("optim_bits",), optim_bits=32)


class PagedLion(Optimizer1State):
    """Lion with paged states of ``optim_bits`` bits."""

    __init__ = constructor(lion, hide=("is_paged",), is_paged=True)


class PagedLion8bit(Optimizer1State):
    """Lion with paged 8-bit states."""

    __init__ = constructor(lion, hide=("optim_bits", "is_paged"), optim_bits=8, is_paged=True)


class PagedLion32bit(Optimizer1State):
    """Lion with paged 32-bit states."""

    __init__ = constructor(lion, hide=("optim_bits", "is_paged"), optim_bits=32, is_paged=True)
