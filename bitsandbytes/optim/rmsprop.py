"""RMSprop (Hinton 2012), as in torch.optim.RMSprop; centred as in Graves 2013, https://arxiv.org/abs/1308.0850."""

from .constructors import constructor
from .optimizer import Optimizer1State


def rmsprop(
    self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, optim_bits=32, args=None, min_8bit_size=4096,
    **options,
):  # fmt: skip
    """
    Args:
        alpha: decay of the mean of squares.
        weight_decay: is added to the gradient, times the parameter.
        momentum: decay of the sum of updates.
        centered: divide by the deviation of the gradient from its mean. Its states have 32 bits: in 8 bits the difference of the two averages
            that the deviation is would be lost.

    See ``Adam`` for the other arguments.

    Raises:
        NotImplementedError: centred, with 8-bit states.
    """
    if centered and optim_bits == 8:
        raise NotImplementedError("centered RMSprop needs 32-bit states: use RMSprop or RMSprop32bit with optim_bits=32")
    Optimizer1State.__init__(
        self, "rmsprop", params, lr, (alpha, momentum), eps, weight_decay, optim_bits, args, min_8bit_size, centered=centered, **options
    )  # fmt: skip


class RMSprop(Optimizer1State):
    """RMSprop with states of ``optim_bits`` bits."""

    __init__ = constructor(rmsprop)


class RMSprop8bit(Optimizer1State):
    """RMSprop with 8-bit states."""

    __init__ = constructor(rmsprop, hide=("optim_bits",), optim_bits=8)


class RMSprop32bit(Optimizer1State):
    """RMSprop with 32-bit states."""

    __init__ = constructor(rmsprop, hide=("optim_bits",), optim_bits=32)
