"""LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962), with its trust ratio as a limit.

The step is Adam's; where the norm of the update, without the learning rate, exceeds ``max_unorm`` times the norm of the parameter, the update is
scaled down to that. The paper scales it up as well, and counts weight decay as part of the update; the published library does neither.
"""

from .constructors import constructor
from .optimizer import Optimizer2State


def lamb(
    self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, adam_w_mode=True, optim_bits=32,
    args=None, min_8bit_size=4096, max_unorm=1.0, **options,
):  # fmt: skip
    """
    Args:
        bias_correction: make up for both averages having started at zero.
        adam_w_mode: decoupled weight decay; otherwise it is added to the gradient.
        max_unorm: largest norm of an update, as a multiple of the parameter's norm; 0 for none.

    See ``Adam`` for the other arguments.
    """
    Optimizer2State.__init__(
        self, "lamb", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm=max_unorm, amsgrad=amsgrad,
        bias_correction=bias_correction, decoupled_weight_decay=adam_w_mode, **options,
    )  # fmt: skip


class LAMB(Optimizer2State):
    """LAMB with states of ``optim_bits`` bits."""

    __init__ = constructor(lamb)


class LAMB8bit(Optimizer2State):
    """LAMB with 8-bit states."""

    __init__ = constructor(lamb, hide=("optim_bits",), only_default=("amsgrad", "max_unorm"), optim_bits=8)


class LAMB32bit(Optimizer2State):
    """LAMB with 32-bit states."""

    __init__ = constructor(lamb, hide=("optim_bits",), optim_bits=32)
