"""Stochastic gradient descent with momentum, as in torch.optim.SGD."""

from .constructors import constructor
from .optimizer import Optimizer1State


def check_momentum(momentum: float, dampening: float, nesterov: bool) -> None:
    """
    Raises:
        ValueError: Nesterov's momentum without momentum, or with dampening.
    """
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"Nesterov momentum requires a momentum and zero dampening, got momentum={momentum} and dampening={dampening}")


def sgd(
    self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, optim_bits=32, args=None, min_8bit_size=4096, **options
):  # fmt: skip
    """
    Args:
        momentum: decay of the sum of gradients.
        dampening: share of the gradient that is left out of the sum, from the second step on.
        weight_decay: is added to the gradient, times the parameter.
        nesterov: look one step of the momentum ahead.

    See ``Adam`` for the other arguments.
    """
    check_momentum(momentum, dampening, nesterov)
    Optimizer1State.__init__(
        self, "momentum", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size, nesterov=nesterov, **options
    )  # fmt: skip


class SGD(Optimizer1State):
    """SGD with states of ``optim_bits`` bits."""

    __init__ = constructor(sgd)


class SGD8bit(Optimizer1State):
    """SGD with 8-bit states."""

    __init__ = constructor(sgd, hide=("optim_bits",), optim_bits=8)


class SGD32bit(Optimizer1State):
    """SGD with 32-bit states."""

    __init__ = constructor(sgd, hide=("optim_bits",), optim_bits=32)
