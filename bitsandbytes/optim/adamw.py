"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

from .adam import adam
from .constructors import constructor
from .optimizer import Optimizer2State

_ADAMW = dict(defaults={"weight_decay": 1e-2}, hide=("decoupled_weight_decay",))
_PAGED = dict(defaults={"weight_decay": 1e-2}, hide=("decoupled_weight_decay", "is_paged"), is_paged=True)
_8BIT = dict(optim_bits=8, only_default=("amsgrad", "optim_bits"))


class AdamW(Optimizer2State):
    """AdamW with states of ``optim_bits`` bits."""

    __init__ = constructor(adam, **_ADAMW)


class AdamW8bit(Optimizer2State):
    """AdamW with 8-bit states."""

    __init__ = constructor(adam, **_ADAMW, **_8BIT)


class AdamW32bit(Optimizer2State):
    """AdamW with 32-bit states."""

    __init__ = constructor(adam, **_ADAMW, optim_bits=32)


class PagedAdamW(Optimizer2State):
    """AdamW with paged states of ``optim_bits`` bits."""

    __init__ = constructor(adam, **_PAGED)


class PagedAdamW8bit(Optimizer2State):
    """AdamW with paged 8-bit states."""

    __init__ = constructor(adam, **_PAGED, **_8BIT)


class PagedAdamW32bit(Optimizer2State):
    """AdamW with paged 32-bit states."""

    __init__ = constructor(adam, **_PAGED, optim_bits=32)
