"""Optimizer steps in plain PyTorch, with 32-bit and with blockwise 8-bit states.

An algorithm is one function: from the gradient it updates the running moments in place and returns the direction in which to go. What
all of them share (weight decay, the limit on the update's norm, skipped zeros, precision, quantised states) stands once, around it.
These functions define what every other backend must compute.

The arithmetic is float32 whatever the dtype of the parameter, which is rounded once, at the end. A gradient element that is NaN or
infinite spoils its own parameter element, as in torch.optim, and no other.

``optimizer_step`` steps many parameters and knows every option; the two single-tensor operators are the published ones, by the same functions.
What is exact about them, for other backends to repeat bit for bit where torch's CPU kernels have fused multiply-add (AVX2 and up):

* Scalars such as 1 - beta or lr * weight_decay are computed in double precision and rounded to float32 once.
* ``x.mul_(a).add_(y, alpha=b)`` is fma(b, y, x * a); ``x.addcmul_(y, z, value=b)`` is fma(b * y, z, x). All else is rounded operation by
  operation, in the order written; division and square root are correctly rounded.
* Stochastic rounding: see rounding.py. 8-bit codes: see QuantisedMoment and quantize_blockwise.
* Not exact, since it depends on the order of a sum: the norms that ``max_unorm`` needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
import functools
from typing import Optional, Union

import torch
from torch.nn.functional import pad

from ..._ops import OPTIMIZER_BLOCKSIZE, OPTIMIZER_STATES, implement, invoke, optimizer_moments
from .rounding import round_stochastically


@dataclass(frozen=True)
class Settings:
    """The scalars of one step; the field names are those of the operators' arguments. ``step`` counts from 1.

    The two betas are Adam's and Lion's. For momentum they are momentum and dampening, for RMSprop the smoothing and the momentum.
    ``decoupled_weight_decay`` matters to algorithms of Adam's family only.
    """

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    step: int
    lr: float
    gnorm_scale: float
    decoupled_weight_decay: bool = True
    bias_correction: bool = True
    nesterov: bool = False
    amsgrad: bool = False
    centered: bool = False


# ------------------------------------------------------------------------------------------------------------------- algorithms
# (gradient, moments, settings) -> (direction, factor): the parameter moves by -lr * factor * direction.


def _average(mean: torch.Tensor, value: torch.Tensor, beta: float) -> None:
    """One step of an exponential moving average, in place."""
    mean.mul_(beta).add_(value, alpha=1.0 - beta)


def _average_of_squares(mean: torch.Tensor, value: torch.Tensor, beta: float) -> None:
    mean.mul_(beta).addcmul_(value, value, value=1.0 - beta)


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, rounded to the nearest float32. That of torch is not where it comes from Intel's vector library."""
    return x.to(torch.float64).sqrt_().to(torch.float32)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, in the memory of the denominator."""
    return torch.div(numerator, denominator, out=denominator)


def bias_corrections(s: Settings) -> tuple[float, float]:
    """What to divide the mean by, and the root of the mean of squares, to make up for both having started at zero."""
    return (1.0 - s.beta1**s.step, (1.0 - s.beta2**s.step) ** 0.5) if s.bias_correction else (1.0, 1.0)


def _adam(g, moments, s: Settings):
    """Kingma and Ba 2015, with the two bias corrections in one factor: (m / c1) / (r / c2 + eps) = c2 / c1 * m / (r + c2 * eps).

    AMSGrad (Reddi et al. 2018) divides by the largest mean of squares so far.
    """
    mean, square, *largest = moments
    _average(mean, g, s.beta1)
    _average_of_squares(square, g, s.beta2)
    if s.amsgrad:
        square = torch.maximum(largest[0], square, out=largest[0])
    c1, c2 = bias_corrections(s)
    return _ratio(mean, _root(square).add_(c2 * s.eps)), c2 / c1


def _ademamix(g, moments, s: Settings):
    """Pagliardini et al. 2024: Adam plus ``alpha`` times a second, slower mean (``beta3``) that is not bias-corrected."""
    fast, slow, square = moments
    _average(fast, g, s.beta1)
    _average(slow, g, s.beta3)
    _average_of_squares(square, g, s.beta2)
    c1, c2 = bias_corrections(s)
    mean = (fast / c1).add_(slow, alpha=s.alpha)
    return mean.div_(_root(square).div_(c2).add_(s.eps)), 1.0


def _momentum(g, moments, s: Settings):
    """Heavy ball, as in torch.optim.SGD: the first step takes the gradient itself, later ones a part of it (dampening, ``beta2``).

    Nesterov's form (Sutskever et al. 2013) looks one step of the momentum ahead.
    """
    (buffer,) = moments
    if s.step == 1:
        buffer.copy_(g)
    else:
        buffer.mul_(s.beta1).add_(g, alpha=1.0 - s.beta2)
    return (g.add(buffer, alpha=s.beta1) if s.nesterov else buffer), 1.0


def _lion(g, moments, s: Settings):
    """Chen et al. 2023: the direction mixes the gradient in with ``beta1``, the mean with ``beta2``."""
    (mean,) = moments
    mixed = (mean * s.beta1).add_(g, alpha=1.0 - s.beta1)
    _average(mean, g, s.beta2)
    return torch.where(mixed.isnan(), mixed, mixed.sign()), 1.0  # the sign of NaN is 0 for torch, which would hide it


def _rmsprop(g, moments, s: Settings):
    """Hinton 2012, smoothed with ``beta1``; Graves 2013 for the centred form, which divides by the deviation from the mean gradient.

    Momentum (``beta2``) runs over the updates. Moments: mean of squares, then, where wanted, momentum, then mean.
    """
    square, *others = moments
    _average_of_squares(square, g, s.beta1)
    variance = square
    if s.centered:
        mean = others[-1]
        _average(mean, g, s.beta1)
        variance = square.addcmul(mean, mean, value=-1.0).clamp_(min=0.0)  # rounding may leave it just below zero
    direction = _ratio(g, _root(variance).add_(s.eps))
    if s.beta2 > 0.0:
        direction = others[0].mul_(s.beta2).add_(direction)
    return direction, 1.0


def _adagrad(g, moments, s: Settings):
    """Duchi et al. 2011."""
    (total,) = moments
    total.addcmul_(g, g)
    return _ratio(g, _root(total).add_(s.eps)), 1.0


@dataclass(frozen=True)
class Algorithm:
    """How to step, and where weight decay goes: off the parameter before the step (decoupled, if wanted) or into the gradient (coupled)."""

    direction: Callable
    decoupled_decay: bool = False

    def decouples(self, s: Settings) -> bool:
        return self.decoupled_decay and s.decoupled_weight_decay


# LAMB is Adam and LARS is momentum, each with the update limited in proportion to the parameter's norm (max_unorm).
ALGORITHMS = {
    "adam": Algorithm(_adam, decoupled_decay=True),
    "lamb": Algorithm(_adam, decoupled_decay=True),
    "ademamix": Algorithm(_ademamix, decoupled_decay=True),
    "lion": Algorithm(_lion, decoupled_decay=True),
    "momentum": Algorithm(_momentum),
    "lars": Algorithm(_momentum),
    "rmsprop": Algorithm(_rmsprop),
    "adagrad": Algorithm(_adagrad),
}


def published_settings(name: str, beta1, beta2, *scalars) -> Settings:
    """The single-tensor operators know neither dampening nor the momentum of RMSprop, whatever they are given as ``beta2``."""
    return Settings(beta1, 0.0 if ALGORITHMS[name].direction in (_momentum, _rmsprop) else beta2, *scalars)


def rows_of_moments(name: str, state1, state2) -> list:
    """The moments of an algorithm one by one, or their statistics. AdEMAMix keeps its two means in the rows of state1.

    Raises:
        ValueError: state1 has not the two rows.
    """
    states = [state1, state2][: OPTIMIZER_STATES[name]]
    if name != "ademamix":
        return states
    if state1.dim() < 2 or state1.shape[0] != 2:
        raise ValueError(f"ademamix keeps two means: state1 and absmax1 must have shape [2, ...], got {tuple(state1.shape)}")
    return [*state1, *states[1:]]


# ------------------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class UpdateLimit:
    """A limit on the L2 norm of the update (without the learning rate), as a multiple of the norm of the parameter.

    The norm is left in ``unorm_vec``. A parameter whose norm is 0 is not limited; it could never leave zero.
    """

    max_unorm: float
    param_norm: Union[float, torch.Tensor]
    unorm_vec: torch.Tensor

    def apply(self, direction: torch.Tensor, factor: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(direction) * factor
        self.unorm_vec.fill_(norm)
        limit = torch.as_tensor(self.max_unorm * self.param_norm, dtype=torch.float32, device=norm.device)
        return direction * torch.where((norm > limit) & (limit > 0.0), limit / norm, 1.0)


def _touched(g: torch.Tensor, skip_zeros: bool) -> Optional[torch.Tensor]:
    """The elements to step, None for all of them."""
    return g != 0.0 if skip_zeros else None


def _step(
    name: str, g, p, moments, s: Settings, touched: Optional[torch.Tensor], limit: Optional[UpdateLimit] = None, seed: Optional[int] = None
) -> None:
    """Steps a parameter and its float32 moments, all of one shape, in place. With a seed the parameter is rounded stochastically."""
    algorithm = ALGORITHMS[name]
    gradient = g.to(torch.float32) if s.gnorm_scale == 1.0 else g.to(torch.float32) * s.gnorm_scale
    value = p if p.dtype == torch.float32 and touched is None else p.to(torch.float32, copy=True)
    before = [] if touched is None else [moment.clone() for moment in moments]

    if s.weight_decay > 0.0 and algorithm.decouples(s):
        value.mul_(1.0 - s.lr * s.weight_decay)
    elif s.weight_decay > 0.0:
        gradient = gradient.add(value, alpha=s.weight_decay)
    direction, factor = algorithm.direction(gradient, moments, s)
    if touched is not None:
        direction = torch.where(touched, direction, 0.0)
    if limit is not None:
        direction = limit.apply(direction, factor)
    value.add_(direction, alpha=-s.lr * factor)

    if touched is not None:
        value = torch.where(touched, value, p)
    if seed is not None and p.dtype != torch.float32:
        value = round_stochastically(value, p.dtype, seed, s.step)
    if value is not p:
        p.copy_(value)
    for moment, old in zip(moments, before):
        moment.copy_(torch.where(touched, moment, old))


@implement("optimizer_update_32bit", "default")
@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: Optional[torch.Tensor],
    unorm_vec: Optional[torch.Tensor],
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """One step with float32 states.

    Args:
        g: gradient; multiplied by ``gnorm_scale`` first.
        state1: like p, for AdEMAMix [2, ...]. state2: like p, for Adam, LAMB and AdEMAMix.
        max_unorm, param_norm, unorm_vec: see UpdateLimit; no limit where ``max_unorm`` is 0.
        skip_zeros: leave the elements alone, states and all, whose gradient is exactly 0.
    """
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    limit = UpdateLimit(max_unorm, param_norm, unorm_vec) if max_unorm > 0.0 else None
    moments = [moment.view(p.shape) for moment in rows_of_moments(optimizer_name, state1, state2)]
    gradient = g.reshape(p.shape)
    _step(optimizer_name, gradient, p, moments, settings, _touched(gradient, skip_zeros), limit)


# --------------------------------------------------------------------------------------------------------------- 8-bit states


@dataclass(frozen=True)
class QuantisedMoment:
    """A moment as it is stored: uint8 codes in the row order of the parameter, float32 absmax of every 256 of them, and the code table."""

    codes: torch.Tensor
    absmax: torch.Tensor
    qmap: torch.Tensor

    def read(self, shape: torch.Size) -> torch.Tensor:
        codes, absmax = self.codes.reshape(shape).contiguous(), self.absmax.reshape(-1)
        return invoke("dequantize_blockwise", codes, absmax, self.qmap, OPTIMIZER_BLOCKSIZE, torch.float32)

    def write(self, values: torch.Tensor, touched: Optional[torch.Tensor]) -> None:
        codes, absmax = invoke("quantize_blockwise", values.contiguous(), self.qmap, OPTIMIZER_BLOCKSIZE)
        codes = _keep_signs(codes, values, self.qmap)
        if touched is not None:  # quantising anew would change even a block in which nothing has changed
            blocks = pad(touched.reshape(-1), (0, -values.numel() % OPTIMIZER_BLOCKSIZE)).view(-1, OPTIMIZER_BLOCKSIZE).any(dim=1)
            elements = blocks.repeat_interleave(OPTIMIZER_BLOCKSIZE)[: values.numel()].view(values.shape)
            codes = torch.where(elements, codes, self.codes.reshape(values.shape))
            absmax = torch.where(blocks, absmax, self.absmax.reshape(-1))
        self.codes.copy_(codes.view(self.codes.shape))
        self.absmax.copy_(absmax.view(self.absmax.shape))


def _keep_signs(codes: torch.Tensor, values: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """Moves a code by one where its table entry has not the sign of the value: a small negative value must not become +0.

    Momentum that is lost on one side of zero only would pull the parameter to the other. Zero itself stays zero.
    A table of one sign leaves no choice.
    """
    negatives = qmap.signbit().sum().to(torch.uint8)  # entries are ascending: the codes below this one have a minus sign; all 256 count as none
    too_high = (values < 0.0) & (codes >= negatives) & (negatives > 0)
    too_low = (values > 0.0) & (codes < negatives)
    return codes - too_high.to(torch.uint8) + too_low.to(torch.uint8)


def _reset_spoilt(moments: list[torch.Tensor]) -> None:
    """Zeroes, in place, every moment of an element that has one which is NaN or infinite.

    Codes cannot say NaN, and an infinite absmax would spoil the other 255 elements of its block. The parameter shows what happened.
    """
    finite = functools.reduce(torch.logical_and, (moment.isfinite() for moment in moments))
    for moment in moments:
        moment.masked_fill_(~finite, 0.0)


@implement("optimizer_update_8bit_blockwise", "default")
@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: Optional[torch.Tensor],
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: Optional[torch.Tensor],
    absmax1: torch.Tensor,
    absmax2: Optional[torch.Tensor],
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """One step with 8-bit states: they are read into float32, stepped as in ``optimizer_update_32bit``, and quantised anew.

    Args:
        state1, state2: uint8 codes, of the shapes that the 32-bit states have.
        qmap1, qmap2: float32 [256], ascending: the values of the codes.
        absmax1, absmax2: float32, one for every 256 consecutive elements; for AdEMAMix absmax1 is [2, blocks].
    """
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    stored = [
        QuantisedMoment(codes, absmax, qmap)
        for codes, absmax, qmap in zip(
            rows_of_moments(optimizer_name, state1, state2),
            rows_of_moments(optimizer_name, absmax1, absmax2),
            [qmap1, qmap1, qmap2] if optimizer_name == "ademamix" else [qmap1, qmap2],
        )
    ]
    moments = [moment.read(p.shape) for moment in stored]
    gradient = g.reshape(p.shape)
    touched = _touched(gradient, skip_zeros)
    _step(optimizer_name, gradient, p, moments, settings, touched)
    _reset_spoilt(moments)
    for moment, values in zip(stored, moments):
        moment.write(values, touched)


# --------------------------------------------------------------------------------------------------------------- many parameters


@implement("optimizer_step", "default")
@torch.no_grad()
def optimizer_step(
    p: list[torch.Tensor],
    g: list[torch.Tensor],
    moments: list[torch.Tensor],
    absmax: list[torch.Tensor],
    qmaps: list[torch.Tensor],
    unorm: list[torch.Tensor],
    algorithm: str,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    decoupled_weight_decay: bool = True,
    bias_correction: bool = True,
    nesterov: bool = False,
    amsgrad: bool = False,
    centered: bool = False,
    seeds: Optional[list[int]] = None,
) -> None:
    """One step of many parameters that share everything but their values.

    Args:
        p, g: parameters of one dtype, and their gradients: float32, float16 or bfloat16, of any strides.
        moments: the K moments of the first parameter, then those of the second, ...; each like its parameter, in row order. K and the order:
            adam, lamb: mean, mean of squares[, largest mean of squares with ``amsgrad``]; ademamix: fast mean, slow mean, mean of squares;
            momentum, lars: buffer; lion: mean; adagrad: sum of squares; rmsprop: mean of squares[, momentum where ``beta2`` > 0][, mean where
            ``centered``]. float32, or uint8 codes with ``qmaps``.
        absmax: for 8-bit moments, in the order of ``moments``: float32, one for every 256 consecutive elements of one moment. Else empty.
        qmaps: for 8-bit moments, K code tables, float32 [256]. Else empty.
        unorm: with ``max_unorm`` one tensor for each parameter, that receives the norm of its update. Else empty.
        gnorm_scale: factor on the gradients; -1 maximises.
        max_unorm, skip_zeros: see UpdateLimit and ``optimizer_update_32bit``.
        decoupled_weight_decay: False adds it to the gradient, for every algorithm.
        seeds: empty, or one for each parameter: parameters of 16 bits are then rounded stochastically (see rounding.py).
    """
    settings = Settings(
        beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, decoupled_weight_decay, bias_correction, nesterov, amsgrad, centered
    )  # fmt: skip
    count = optimizer_moments(algorithm, beta2, amsgrad, centered)
    for i, parameter in enumerate(p):
        mine = slice(i * count, (i + 1) * count)
        stored = [QuantisedMoment(*parts) for parts in zip(moments[mine], absmax[mine], qmaps)]
        values = [moment.read(parameter.shape) for moment in stored] or [moment.view(parameter.shape) for moment in moments[mine]]
        gradient = g[i].reshape(parameter.shape)
        touched = _touched(gradient, skip_zeros)
        norm = torch.linalg.vector_norm(parameter, dtype=torch.float32) if max_unorm > 0.0 else None
        limit = UpdateLimit(max_unorm, norm, unorm[i]) if max_unorm > 0.0 else None
        _step(algorithm, gradient, parameter, values, settings, touched, limit, seeds[i] if seeds else None)
        if stored:
            _reset_spoilt(values)
        for moment, new in zip(stored, values):
            moment.write(new, touched)
