"""Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), optionally as AMSGrad (Reddi et al. 2018).

Weight decay is decoupled from the gradient, as in AdamW, unless ``decoupled_weight_decay=False`` asks for that of torch.optim.Adam.
"""

from .constructors import constructor
from .optimizer import Optimizer2State


def adam(
    self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, optim_bits=32, args=None, min_8bit_size=4096,
    is_paged=False, *, decoupled_weight_decay=True, **options,
):  # fmt: skip
    """
    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the mean and of the mean of squares of the gradient.
        eps: added to the root of the mean of squares.
        weight_decay: strength of weight decay.
        amsgrad: divide by the largest mean of squares so far.
        optim_bits, min_8bit_size: states of parameters with at least ``min_8bit_size`` elements have ``optim_bits`` bits, 8 or 32.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, which then count instead.
        is_paged: keep large states in memory that the GPU and the host share.
        decoupled_weight_decay: shrink the parameter by ``lr * weight_decay`` (AdamW) instead of adding to the gradient (torch.optim.Adam).
        skip_zeros: leave elements alone whose gradient is exactly zero.
        maximize: go up instead of down.
        stochastic_rounding, seed: round 16-bit parameters up or down at random, without bias.

    Raises:
        ValueError: a hyperparameter is out of range, or this class does not have the choice.
    """
    Optimizer2State.__init__(
        self, "adam", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged, amsgrad=amsgrad,
        decoupled_weight_decay=decoupled_weight_decay, **options,
    )  # fmt: skip


_8BIT = dict(optim_bits=8, only_default=("amsgrad", "optim_bits"))


class Adam(Optimizer2State):
    """Adam with states of ``optim_bits`` bits."""

    __init__ = constructor(adam)


class Adam8bit(Optimizer2State):
    """Adam with 8-bit states."""

    __init__ = constructor(adam, **_8BIT)


class Adam32bit(Optimizer2State):
    """Adam with 32-bit states."""

    __init__ = constructor(adam, optim_bits=32)


class PagedAdam(Optimizer2State):
    """Adam with paged states of ``optim_bits`` bits."""

    __init__ = constructor(adam, is_paged=True)


class PagedAdam8bit(Optimizer2State):
    """Adam with paged 8-bit states."""

    __init__ = constructor(adam, is_paged=True, **_8BIT)


class PagedAdam32bit(Optimizer2State):
    """Adam with paged 32-bit states."""

    __init__ = constructor(adam, is_paged=True, optim_bits=32)
