"""LARS (You et al. 2017, https://arxiv.org/abs/1708.03888), with its trust ratio as a limit.

The step is that of SGD with momentum; where the norm of the update, without the learning rate, exceeds ``max_unorm`` times the norm of the
parameter, the update is scaled down to that.
"""

import torch

from .algorithms import require_numbers
from .constructors import constructor
from .optimizer import Optimizer1State, evaluate
from .sgd import check_momentum


def lars(
    self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, optim_bits=32, args=None, min_8bit_size=4096, max_unorm=0.02,
    **options,
):  # fmt: skip
    """
    Args:
        max_unorm: largest norm of an update, as a multiple of the parameter's norm; 0 for none.

    See ``SGD`` for the other arguments.
    """
    check_momentum(momentum, dampening, nesterov)
    Optimizer1State.__init__(
        self, "lars", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size, max_unorm=max_unorm,
        nesterov=nesterov, **options,
    )  # fmt: skip


class LARS(Optimizer1State):
    """LARS with states of ``optim_bits`` bits."""

    __init__ = constructor(lars)


class LARS8bit(Optimizer1State):
    """LARS with 8-bit states."""

    __init__ = constructor(lars, hide=("optim_bits",), optim_bits=8)


class LARS32bit(Optimizer1State):
    """LARS with 32-bit states."""

    __init__ = constructor(lars, hide=("optim_bits",), optim_bits=32)


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain PyTorch. State: ``momentum_buffer``. See ``LARS`` for the arguments.

    Raises:
        TypeError: a hyperparameter is not a number.
        ValueError: a hyperparameter is negative, or Nesterov's momentum without momentum or with dampening.
    """

    def __init__(self, params, lr=0.01, momentum=0, dampening=0, weight_decay=0, nesterov=False, max_unorm=0.02):
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, max_unorm=max_unorm)
        require_numbers(defaults)
        for name, value in (("learning rate", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: it must not be negative, got {value}")
        check_momentum(momentum, dampening, nesterov)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step. Returns what ``closure`` returned, else None."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self._update(p, group)
                    limit = group["max_unorm"] * p.norm()
                    norm = update.norm()
                    scale = torch.where((norm > limit) & (limit > 0), limit / norm, 1.0)
                    p.sub_(group["lr"] * scale * update)
        return loss

    def _update(self, p: torch.Tensor, group: dict) -> torch.Tensor:
        gradient = p.grad + group["weight_decay"] * p
        if group["momentum"] == 0:
            return gradient
        state = self.state[p]
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        else:
            state["momentum_buffer"] = gradient.clone()
        return gradient + group["momentum"] * state["momentum_buffer"] if group["nesterov"] else state["momentum_buffer"]
