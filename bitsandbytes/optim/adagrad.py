"""Adagrad (Duchi et al. 2011), as in torch.optim.Adagrad."""

from .constructors import constructor
from .optimizer import Optimizer1State


def adagrad(
    self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, optim_bits=32, args=None, min_8bit_size=4096,
    **options,
):  # fmt: skip
    """
    Args:
        lr_decay: step t is taken with ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: is added to the gradient, times the parameter.
        initial_accumulator_value: what the sum of squares starts with.

    See ``Adam`` for the other arguments.

    Raises:
        ValueError: a hyperparameter is out of range, or this class does not have the choice.
    """
    for name, value in (("lr_decay", lr_decay), ("initial_accumulator_value", initial_accumulator_value)):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name}: it must not be negative, got {value}")
    Optimizer1State.__init__(
        self, "adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size, lr_decay=lr_decay,
        initial_accumulator_value=initial_accumulator_value, **options,
    )  # fmt: skip


class Adagrad(Optimizer1State):
    """Adagrad with states of ``optim_bits`` bits."""

    __init__ = constructor(adagrad)


class Adagrad8bit(Optimizer1State):
    """Adagrad with 8-bit states."""

    __init__ = constructor(adagrad, defaults={"optim_bits": 8}, optim_bits=8)


class Adagrad32bit(Optimizer1State):
    """Adagrad with 32-bit states."""

    __init__ = constructor(adagrad, optim_bits=32)
