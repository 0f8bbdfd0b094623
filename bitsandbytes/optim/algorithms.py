"""What an optimizer keeps of a parameter: which moments, under which names, ours and torch.optim's.

The formulas are those of the operator ``optimizer_step``; here stands only what the engine has to know of an algorithm.
"""

from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from numbers import Real
from typing import Any, Optional

import torch


@dataclass(frozen=True)
class Moment:
    """A moment as it lies in the state of a parameter.

    Attributes:
        number: it is stored as ``state<number>``, in 8 bits with ``qmap<number>`` and ``absmax<number>``.
        torch_name: what torch.optim calls it.
        signed: whether its 8-bit codes come from the signed map. The published format has the signed one for every first moment.
        rows: 2 where one tensor [2, *shape] holds two moments of the operator.
        needs: the setting without which there is no such moment.
    """

    number: int
    torch_name: str
    signed: bool = True
    rows: int = 1
    needs: Optional[str] = None

    @cached_property
    def keys(self) -> tuple[str, str, str]:
        return f"state{self.number}", f"absmax{self.number}", f"qmap{self.number}"


_ADAM = (Moment(1, "exp_avg"), Moment(2, "exp_avg_sq", signed=False), Moment(3, "max_exp_avg_sq", signed=False, needs="amsgrad"))
_MOMENTUM = (Moment(1, "momentum_buffer"),)

MOMENTS = {
    "adam": _ADAM,
    "lamb": _ADAM,
    "ademamix": (Moment(1, "m1_m2", rows=2), Moment(2, "nu", signed=False)),
    "momentum": _MOMENTUM,
    "lars": _MOMENTUM,
    "lion": (Moment(1, "exp_avg"),),
    "rmsprop": (Moment(1, "square_avg"), Moment(2, "momentum_buffer", needs="momentum"), Moment(3, "grad_avg", needs="centered")),
    "adagrad": (Moment(1, "sum"),),
}

# Everything that belongs to a moment, and the norm that max_unorm leaves.
STATE_KEYS = frozenset(key for number in (1, 2, 3) for key in Moment(number, "").keys) | {"unorm_vec"}


_NUMBERS = (
    "lr", "eps", "weight_decay", "momentum", "dampening", "alpha", "max_unorm", "lr_decay", "initial_accumulator_value", "optim_bits",
    "min_8bit_size", "seed",
)  # fmt: skip
_NUMBERS_OR_NONE = ("t_alpha", "t_beta3")


def _is_number(value) -> bool:
    return isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def require_numbers(settings: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: a hyperparameter among the settings is not a number, or ``betas`` are not a list or tuple of them.
    """
    for name in (*_NUMBERS, *_NUMBERS_OR_NONE):
        value = settings.get(name, 0)
        if not _is_number(value) and not (value is None and name in _NUMBERS_OR_NONE):
            raise TypeError(f"{name} must be a number, got {value!r}")
    betas = settings.get("betas", ())
    if not isinstance(betas, (list, tuple)) or not all(map(_is_number, betas)):
        raise TypeError(f"betas must be a list or a tuple of numbers, got {betas!r}")


def moments_of(algorithm: str, config: dict[str, Any]) -> tuple[Moment, ...]:
    """The moments that the algorithm keeps under these settings, in the order of the operator.

    Raises:
        ValueError: no such algorithm.
    """
    if algorithm not in MOMENTS:
        raise ValueError(f"unknown optimizer {algorithm!r}; choose one of {sorted(MOMENTS)}")
    present = {
        None: True,
        "amsgrad": config["amsgrad"],
        "centered": config["centered"],
        "momentum": len(config["betas"]) > 1 and config["betas"][1] > 0.0,
    }
    return tuple(moment for moment in MOMENTS[algorithm] if present[moment.needs])


def scalars(algorithm: str, config: dict[str, Any], step: int) -> dict[str, Any]:
    """The arguments of the operator for one step: the settings with their schedules applied.

    AdEMAMix raises ``alpha`` linearly and ``beta3`` in equal steps of its half-life (Pagliardini et al. 2024, section 3); Adagrad lets the
    learning rate decay.
    """
    beta1, beta2, beta3 = (*config["betas"], 0.0, 0.0)[:3]
    alpha, lr = config["alpha"], float(config["lr"])
    if algorithm == "ademamix":
        alpha = alpha_at(step, alpha, config["t_alpha"])
        beta3 = beta3_at(step, beta1, beta3, config["t_beta3"])
    elif algorithm == "adagrad":
        lr /= 1.0 + (step - 1) * config["lr_decay"]
    elif algorithm in ("momentum", "lars") and beta1 == 0.0:
        beta2 = 0.0  # torch.optim.SGD dampens momentum only
    return dict(
        algorithm=algorithm, step=step, lr=lr, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=config["eps"],
        weight_decay=float(config["weight_decay"]), gnorm_scale=-1.0 if config["maximize"] else 1.0, max_unorm=config["max_unorm"],
        skip_zeros=config["skip_zeros"], decoupled_weight_decay=config["decoupled_weight_decay"], bias_correction=config["bias_correction"],
        nesterov=config["nesterov"], amsgrad=config["amsgrad"], centered=config["centered"],
    )  # fmt: skip


def alpha_at(step: int, alpha: float, duration: Optional[int]) -> float:
    """Linear from 0 to ``alpha`` over ``duration`` steps; constant without one."""
    return min(alpha * step / duration, alpha) if duration else alpha


def beta3_at(step: int, beta1: float, beta3: float, duration: Optional[int]) -> float:
    """From ``beta1`` to ``beta3`` over ``duration`` steps, linear in the half-life of the average; constant without a duration."""
    if not duration or step >= duration:
        return beta3
    done, slow, fast = step / duration, log(beta3), log(beta1)
    return min(exp(fast * slow / ((1.0 - done) * slow + done * fast)), beta3)


# How torch.optim names in a parameter group what ours keeps in betas. Everything else that both know has one name.
def betas_from_torch(algorithm: str, group: dict[str, Any]) -> Optional[tuple]:
    """``betas`` of a parameter group that torch.optim saved, None where it says nothing about them."""
    if algorithm in ("momentum", "lars") and "momentum" in group:
        return group["momentum"], group.get("dampening", 0.0)
    if algorithm == "rmsprop" and "alpha" in group and "betas" not in group:
        return group["alpha"], group.get("momentum", 0.0)
    return group.get("betas")
