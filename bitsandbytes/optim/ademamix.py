"""AdEMAMix (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137): AdamW with a second, much slower average of the gradient."""

from typing import Optional

import torch

from .algorithms import alpha_at, beta3_at
from .constructors import constructor
from .optimizer import Optimizer2State, evaluate


def ademamix(
    self, params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha: Optional[int] = None, t_beta3: Optional[int] = None, eps=1e-8,
    weight_decay=1e-2, optim_bits=32, min_8bit_size=4096, is_paged=False, **options,
):  # fmt: skip
    """
    Args:
        betas: decay of the fast mean, of the mean of squares, and of the slow mean of the gradient.
        alpha: weight of the slow mean.
        t_alpha: number of steps over which ``alpha`` rises from 0.
        t_beta3: number of steps over which the third beta rises from the first.

    See ``Adam`` for the other arguments. Weight decay is decoupled.
    """
    Optimizer2State.__init__(
        self, "ademamix", params, lr, betas, eps, weight_decay, optim_bits, None, min_8bit_size, is_paged=is_paged, alpha=alpha, t_alpha=t_alpha,
        t_beta3=t_beta3, **options,
    )  # fmt: skip


class AdEMAMix(Optimizer2State):
    """AdEMAMix with states of ``optim_bits`` bits."""

    __init__ = constructor(ademamix)


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""

    __init__ = constructor(ademamix, hide=("optim_bits",), optim_bits=8)


class AdEMAMix32bit(Optimizer2State):
    """AdEMAMix with 32-bit states."""

    __init__ = constructor(ademamix, hide=("optim_bits",), optim_bits=32)


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged states of ``optim_bits`` bits."""

    __init__ = constructor(ademamix, hide=("is_paged",), is_paged=True)


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with paged 8-bit states."""

    __init__ = constructor(ademamix, hide=("optim_bits", "is_paged"), optim_bits=8, is_paged=True)


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix with paged 32-bit states."""

    __init__ = constructor(ademamix, hide=("optim_bits", "is_paged"), optim_bits=32, is_paged=True)


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """Algorithm 1 of the paper, line by line. State: ``m1_m2``, [2, ...] (the means), and ``nu`` (the mean of squares)."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, weight_decay=1e-2, t_beta3: Optional[int] = None,
        t_alpha: Optional[int] = None,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay, t_beta3=t_beta3, t_alpha=t_alpha))

    @torch.no_grad()
    def step(self, closure=None):
        loss = evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, m1_m2=p.new_zeros((2, *p.shape)), nu=torch.zeros_like(p))
        state["step"] += 1
        t, g, (fast, slow), square = state["step"], p.grad, state["m1_m2"], state["nu"]
        beta1, beta2, beta3 = group["betas"]
        beta3 = beta3_at(t, beta1, beta3, group["t_beta3"])
        alpha = alpha_at(t, group["alpha"], group["t_alpha"])

        fast.copy_(beta1 * fast + (1 - beta1) * g)
        slow.copy_(beta3 * slow + (1 - beta3) * g)
        square.copy_(beta2 * square + (1 - beta2) * g * g)
        corrected_mean = fast / (1 - beta1**t)
        corrected_square = square / (1 - beta2**t)
        update = (corrected_mean + alpha * slow) / (corrected_square.sqrt() + group["eps"])
        p.sub_(group["lr"] * (update + group["weight_decay"] * p))
