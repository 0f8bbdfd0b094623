"""Optimizer steps: one kernel for every algorithm, with float32 moments or with blockwise codes of 8 bits.

A launch steps many parameters: a table on the device says for each where its tensors lie and which program is its first. A program takes a tile
[blocks, 256] of one parameter: the 256 elements of a row share the scale of their codes. It reads parameter, gradient and moments once and writes
parameter and moments once. Algorithm and options are compile-time constants, so a program holds only what it needs; the numbers that change from step
to step are arguments. What an algorithm computes, and which operations are fused or rounded apart, is said in
``backends/default/optimizers.py``.

A limit on the update's norm takes two passes, parameter by parameter: the first only sums the squares of the update, by program, the second steps.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Optional

import torch
import triton
import triton.language as tl

from ..._ops import OPTIMIZER_BLOCKSIZE, optimizer_moments
from ..default.optimizers import ALGORITHMS, Settings, bias_corrections, published_settings, rows_of_moments
from ..default.rounding import mix
from . import arithmetic as ar
from .launch import ceil_div, launch, operator

_BLOCKS = 4  # of 256 elements in a tile

# LAMB is Adam and LARS is momentum, each with a limit.
_KERNEL_OF = {"lamb": "adam", "lars": "momentum"}


# -------------------------------------------------------------------------------------------------------------------- algorithms


@triton.jit
def _average(mean, value, beta, rest):
    """One step of an exponential moving average; ``rest`` is 1 - beta."""
    return tl.fma(tl.zeros_like(value) + rest, value, mean * beta)


@triton.jit
def _average_of_squares(mean, value, beta, rest):
    return tl.fma(value * rest, value, mean * beta)


@triton.jit
def _fused(factor, value, addend):
    """factor * value + addend with one rounding, for a scalar factor."""
    return tl.fma(tl.zeros_like(value) + factor, value, addend)


@triton.jit
def _larger(a, b):
    """The larger of two, NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _direction(
    g, m0, m1, m2, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, mean_correction, root_correction,
    ALGORITHM: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, AMSGRAD: tl.constexpr, CENTERED: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Where the parameter goes, and the new moments; unused moments are passed through."""
    if ALGORITHM == "adam":
        m0 = _average(m0, g, beta1, rest1)
        m1 = _average_of_squares(m1, g, beta2, rest2)
        square = m1
        if AMSGRAD:
            m2 = _larger(m2, m1)
            square = m2
        direction = tl.div_rn(m0, tl.sqrt_rn(square) + eps)
    elif ALGORITHM == "ademamix":
        m0 = _average(m0, g, beta1, rest1)
        m1 = _average(m1, g, beta3, rest3)
        m2 = _average_of_squares(m2, g, beta2, rest2)
        one = tl.zeros_like(g) + 1.0
        mean = _fused(alpha, m1, tl.div_rn(m0, one * mean_correction))
        direction = tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(m2), one * root_correction) + eps)
    elif ALGORITHM == "momentum":
        m0 = g if FIRST_STEP else _average(m0, g, beta1, rest2)
        direction = _fused(beta1, m0, g) if NESTEROV else m0
    elif ALGORITHM == "lion":
        mixed = _average(m0, g, beta1, rest1)
        m0 = _average(m0, g, beta2, rest2)
        direction = tl.where(mixed > 0.0, 1.0, tl.where(mixed < 0.0, -1.0, tl.where(mixed == 0.0, 0.0, mixed)))
    elif ALGORITHM == "rmsprop":
        m0 = _average_of_squares(m0, g, beta1, rest1)
        variance = m0
        if CENTERED:
            mean = _average(m2 if HAS_MOMENTUM else m1, g, beta1, rest1)
            variance = tl.fma(-mean, mean, m0)
            variance = tl.where(variance < 0.0, 0.0, variance)
            if HAS_MOMENTUM:
                m2 = mean
            else:
                m1 = mean
        direction = tl.div_rn(g, tl.sqrt_rn(variance) + eps)
        if HAS_MOMENTUM:
            m1 = m1 * beta2 + direction
            direction = m1
    else:
        tl.static_assert(ALGORITHM == "adagrad")
        m0 = tl.fma(g, g, m0)
        direction = tl.div_rn(g, tl.sqrt_rn(m0) + eps)
    return direction, m0, m1, m2


# ----------------------------------------------------------------------------------------------------------- how moments are kept


@triton.jit
def _read(moment, absmax, qmap, index, inside, block, has_block, IN_8BIT: tl.constexpr):
    """A tile of a moment: as floats, and as it lies in memory with the scales of its blocks."""
    stored = tl.load(moment + index, mask=inside, other=0)
    if IN_8BIT:
        scale = tl.load(absmax + block, mask=has_block, other=0.0)
        values = tl.load(qmap + stored.to(tl.int32)) * scale[:, None]
    else:
        values = stored
        scale = block  # nobody asks
    return tl.where(inside, values, 0.0), stored, scale


@triton.jit
def _is_finite(x):
    return ar.magnitude_bits(x) < ar.INFINITY_BITS


@triton.jit
def _write_codes(moment, absmax, qmap, values, old_codes, old_scale, touched, index, inside, block, has_block, SKIP_ZEROS: tl.constexpr):
    """Encodes a moment anew. A code whose value has not the sign of its element moves by one; a block without a touched element stays as it is."""
    scale = ar.largest_magnitude(tl.max(ar.magnitude_bits(values), axis=1))
    codes = ar.count_below(ar.normalise(values, ar.inverse_absmax(scale)[:, None]), qmap, 8, True)
    minus_signs = tl.load(qmap + tl.arange(0, 256)).to(tl.int32, bitcast=True) < 0
    negatives = tl.sum(minus_signs.to(tl.int32), axis=0) & 255  # a table of one sign leaves no choice
    down = (values < 0.0) & (codes >= negatives) & (negatives > 0)
    up = (values > 0.0) & (codes < negatives)
    codes = (codes - down.to(tl.int32) + up.to(tl.int32)).to(tl.uint8)
    if SKIP_ZEROS:
        any_touched = tl.max(touched.to(tl.int32), axis=1) != 0
        codes = tl.where(any_touched[:, None], codes, old_codes)
        scale = tl.where(any_touched, scale, old_scale)
    tl.store(moment + index, codes, mask=inside)
    tl.store(absmax + block, scale, mask=has_block)


# ------------------------------------------------------------------------------------------------------------ stochastic rounding


@triton.jit
def _mix(x):
    """Spreads 32 bits over 32 bits; see ``backends/default/rounding.py``."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_randomly(value, index, key, dtype: tl.constexpr):
    """Floats that ``dtype``, one of 16 bits, holds exactly: each one of the neighbours of the value, the nearer the likelier."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    random = _mix(low ^ key ^ _mix(high)) >> 16
    bits = value.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((bits + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        smallest_normal = 2.0**-14
        magnitude = tl.abs(value)
        steps = (tl.where(magnitude < smallest_normal, magnitude, 0.0) * 2.0**40).to(tl.int32) + random.to(tl.int32)
        fixed = (steps >> 16).to(tl.float32) * 2.0**-24
        fixed = (fixed.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(magnitude < smallest_normal, fixed, rounded)
    return tl.where(_is_finite(value), rounded, value)


# ------------------------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _row_of(table, tensors, program, COLUMNS: tl.constexpr):
    """The parameter that a program works on: the last one whose first program is not behind it."""
    low = tensors * 0
    high = tensors
    while high - low > 1:
        middle = (low + high) // 2
        is_behind = tl.load(table + middle * COLUMNS) > program
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle, high)
    return table + low * COLUMNS


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["tensors"])
def _step_kernel(
    table, tensors, qmap0, qmap1, qmap2, squares, limit_factor,
    gnorm_scale, decay, step_size, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, mean_correction, root_correction,
    COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    ALGORITHM: tl.constexpr, MOMENTS: tl.constexpr, IN_8BIT: tl.constexpr, FIRST_STEP: tl.constexpr, NESTEROV: tl.constexpr, AMSGRAD: tl.constexpr,
    CENTERED: tl.constexpr, HAS_MOMENTUM: tl.constexpr, SKIP_ZEROS: tl.constexpr, SCALES: tl.constexpr, DECAY: tl.constexpr,
    ROUNDS_RANDOMLY: tl.constexpr, MEASURES: tl.constexpr, LIMITED: tl.constexpr, BLOCKS: tl.constexpr, BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """
    ``table``: see _Batch. ``ALIGNED``: 16 divides all addresses and counts in it. ``P`` and ``G``: types of parameters and gradients.
    ``decay``: a factor on the parameter where ``DECAY`` is "decoupled", else the factor with which the parameter is added to the gradient.
    ``step_size``: what a direction of one adds to the parameter. ``MEASURES``: only write the sum of squares of the direction.
    """
    row = _row_of(table, tensors, tl.program_id(0), COLUMNS)
    count = tl.load(row + 1)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    key = tl.load(row + 2).to(tl.uint32)
    p = _pointer(row, 3, P, ALIGNED)
    g = _pointer(row, 4, G, ALIGNED)
    moment0 = _pointer(row, 5, tl.uint8 if IN_8BIT else tl.float32, ALIGNED)
    moment1 = _pointer(row, 6, tl.uint8 if IN_8BIT else tl.float32, ALIGNED)
    moment2 = _pointer(row, 7, tl.uint8 if IN_8BIT else tl.float32, ALIGNED)
    absmax0 = _pointer(row, 8, tl.float32, ALIGNED)
    absmax1 = _pointer(row, 9, tl.float32, ALIGNED)
    absmax2 = _pointer(row, 10, tl.float32, ALIGNED)
    block = (tl.program_id(0) - tl.load(row)) * BLOCKS + tl.arange(0, BLOCKS)
    has_block = block * BLOCKSIZE < count
    index = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = index < count

    gradient = tl.load(g + index, mask=inside, other=0).to(tl.float32)
    before = tl.load(p + index, mask=inside, other=0)
    value = before.to(tl.float32)
    touched = inside & (gradient != 0.0)
    old0, stored0, scale0 = _read(moment0, absmax0, qmap0, index, inside, block, has_block, IN_8BIT)
    old1, stored1, scale1 = old0, stored0, scale0
    old2, stored2, scale2 = old0, stored0, scale0
    if MOMENTS > 1:
        old1, stored1, scale1 = _read(moment1, absmax1, qmap1, index, inside, block, has_block, IN_8BIT)
    if MOMENTS > 2:
        old2, stored2, scale2 = _read(moment2, absmax2, qmap2, index, inside, block, has_block, IN_8BIT)

    if SCALES:
        gradient *= gnorm_scale
    if DECAY == "decoupled":
        value *= decay
    elif DECAY == "coupled":
        gradient = _fused(decay, value, gradient)
    direction, m0, m1, m2 = _direction(
        gradient, old0, old1, old2, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, mean_correction, root_correction,
        ALGORITHM, FIRST_STEP, NESTEROV, AMSGRAD, CENTERED, HAS_MOMENTUM,
    )  # fmt: skip
    if SKIP_ZEROS:
        direction = tl.where(touched, direction, 0.0)

    if MEASURES:
        direction = tl.where(inside, direction, 0.0)
        tl.store(squares + tl.program_id(0), tl.sum(tl.sum(direction * direction, axis=1), axis=0))
    else:
        if LIMITED:
            direction *= tl.load(limit_factor)
        value = _fused(step_size, direction, value)
        if SKIP_ZEROS:
            value = tl.where(touched, value, before.to(tl.float32))
            m0 = tl.where(touched, m0, old0)
            m1 = tl.where(touched, m1, old1)
            m2 = tl.where(touched, m2, old2)
        if ROUNDS_RANDOMLY:
            value = _round_randomly(value, index, key, P)
        tl.store(p + index, value.to(P), mask=inside)

        if IN_8BIT:  # codes cannot say NaN, and an infinite scale would spoil the block: such an element starts anew
            finite = inside & _is_finite(m0)
            if MOMENTS > 1:
                finite &= _is_finite(m1)
            if MOMENTS > 2:
                finite &= _is_finite(m2)
            m0 = tl.where(finite, m0, 0.0)
            m1 = tl.where(finite, m1, 0.0)
            m2 = tl.where(finite, m2, 0.0)
            _write_codes(moment0, absmax0, qmap0, m0, stored0, scale0, touched, index, inside, block, has_block, SKIP_ZEROS)
            if MOMENTS > 1:
                _write_codes(moment1, absmax1, qmap1, m1, stored1, scale1, touched, index, inside, block, has_block, SKIP_ZEROS)
            if MOMENTS > 2:
                _write_codes(moment2, absmax2, qmap2, m2, stored2, scale2, touched, index, inside, block, has_block, SKIP_ZEROS)
        else:
            tl.store(moment0 + index, m0, mask=inside)
            if MOMENTS > 1:
                tl.store(moment1 + index, m1, mask=inside)
            if MOMENTS > 2:
                tl.store(moment2 + index, m2, mask=inside)


# --------------------------------------------------------------------------------------------------------------------------- host


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MOST_MOMENTS = 3


@dataclass(frozen=True)
class _Batch:
    """Parameters that one launch steps, all tensors without gaps, gradients of one type.

    ``moments`` and ``absmax`` have a list for each parameter; those of ``absmax``, and ``qmaps``, are empty for float32 moments. ``seeds`` is empty
    or has one for each.
    """

    name: str
    settings: Settings
    p: list
    g: list
    moments: list
    absmax: list
    qmaps: list
    skip_zeros: bool
    seeds: list

    def _table(self) -> tuple[torch.Tensor, int, bool]:
        """A row for each parameter: first program, count, key of the random numbers, addresses of parameter, gradient, moments and statistics.

        Beside it the number of programs, and whether 16 divides all counts and addresses.
        """
        rows, first = [], 0
        for i, p in enumerate(self.p):
            addresses = [t.data_ptr() for t in (p, self.g[i], *_filled_up(self.moments[i], p), *_filled_up(self.absmax[i], p))]
            rows.append([first, p.numel(), self._key(i), *addresses])
            first += programs(p)
        aligned = all(number % 16 == 0 for row in rows for number in (row[1], *row[3:]))
        return torch.tensor(rows, dtype=torch.int64).to(self.p[0].device), first, aligned

    def _key(self, i: int) -> int:
        return mix((mix(self.seeds[i] & 0xFFFFFFFF) + self.settings.step) & 0xFFFFFFFF) if self.seeds else 0

    def launch(self, squares: Optional[torch.Tensor] = None, limit_factor: Optional[torch.Tensor] = None) -> None:
        """With ``squares`` it only measures."""
        s, dtype = self.settings, self.p[0].dtype
        algorithm = _KERNEL_OF.get(self.name, self.name)
        decay, decay_factor = self._decay()
        table, grid, aligned = self._table()
        mean_correction, root_correction = bias_corrections(s)
        eps = root_correction * s.eps if algorithm == "adam" else s.eps
        launch(
            _step_kernel, (grid,), table, len(table), *_filled_up(self.qmaps, table), table if squares is None else squares,
            table if limit_factor is None else limit_factor, *map(float, (
                s.gnorm_scale, decay_factor, -s.lr * self.factor, s.beta1, 1.0 - s.beta1, s.beta2, 1.0 - s.beta2, s.beta3, 1.0 - s.beta3, s.alpha,
                eps, mean_correction, root_correction,
            )),
            COLUMNS=table.shape[1], ALIGNED=aligned, P=_TYPES[dtype], G=_TYPES[self.g[0].dtype],
            ALGORITHM=algorithm, MOMENTS=len(self.moments[0]), IN_8BIT=bool(self.qmaps), FIRST_STEP=s.step == 1 and algorithm == "momentum",
            NESTEROV=s.nesterov, AMSGRAD=s.amsgrad, CENTERED=s.centered, HAS_MOMENTUM=algorithm == "rmsprop" and s.beta2 > 0.0,
            SKIP_ZEROS=self.skip_zeros, SCALES=s.gnorm_scale != 1.0, DECAY=decay, ROUNDS_RANDOMLY=bool(self.seeds) and dtype != torch.float32,
            MEASURES=squares is not None, LIMITED=limit_factor is not None, BLOCKS=_BLOCKS, BLOCKSIZE=OPTIMIZER_BLOCKSIZE,
        )  # fmt: skip

    @property
    def factor(self) -> float:
        """What the direction is multiplied with besides the learning rate: both of Adam's bias corrections in one."""
        mean_correction, root_correction = bias_corrections(self.settings)
        return root_correction / mean_correction if ALGORITHMS[self.name].direction is ALGORITHMS["adam"].direction else 1.0

    def _decay(self) -> tuple[str, float]:
        s = self.settings
        if s.weight_decay <= 0.0:
            return "none", 0.0
        return ("decoupled", 1.0 - s.lr * s.weight_decay) if ALGORITHMS[self.name].decouples(s) else ("coupled", s.weight_decay)

    def limit(self, max_unorm: float, param_norm, unorm: torch.Tensor) -> torch.Tensor:
        """For a batch of one: the factor that limits the update, a float32 on the device; its norm is left in ``unorm``."""
        squares = torch.zeros(programs(self.p[0]), dtype=torch.float32, device=unorm.device)
        self.launch(squares=squares)
        norm = squares.sum().sqrt() * self.factor
        unorm.fill_(norm)
        limit = torch.as_tensor(max_unorm * param_norm, dtype=torch.float32, device=norm.device)
        return torch.where((norm > limit) & (limit > 0.0), limit / norm, 1.0)


def programs(p: torch.Tensor) -> int:
    return ceil_div(p.numel(), _BLOCKS * OPTIMIZER_BLOCKSIZE)


def _filled_up(tensors, filling: torch.Tensor) -> list:
    """As many as the kernel has places for."""
    return [*tensors, *[filling] * (_MOST_MOMENTS - len(tensors))]


class _Plain:
    """Tensors without gaps for the kernel to write; ``write_back`` brings what it wrote to those that had gaps."""

    def __init__(self, tensors):
        self.tensors = list(tensors)
        self.plain = [tensor.contiguous() for tensor in self.tensors]

    def write_back(self) -> None:
        for tensor, plain in zip(self.tensors, self.plain):
            if plain is not tensor:
                tensor.copy_(plain)


def _span(p: torch.Tensor) -> tuple[int, int]:
    """Addresses between which a tensor of any strides lies."""
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride())) if p.numel() else -1
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def _overlap(tensors: list) -> bool:
    return any(end > start for (_, end), (start, _) in pairwise(sorted(map(_span, tensors))))


@torch.no_grad()
def _run(name, settings, p, g, moments, absmax, qmaps, skip_zeros, max_unorm=0.0, param_norm=None, unorm=None, seeds=()) -> None:
    """Steps parameters. ``moments`` and ``absmax``: a list for each. ``unorm`` and ``param_norm``: of the only one; the latter may be left out."""
    if not p[0].numel() and max_unorm <= 0.0:
        return
    written = [_Plain(tensors) for tensors in (p, *moments, *absmax)]
    plain_p, *states = (tensors.plain for tensors in written)
    gradients, tables = [gradient.contiguous() for gradient in g], [qmap.contiguous() for qmap in qmaps]
    batch = _Batch(name, settings, plain_p, gradients, states[: len(p)], states[len(p) :], tables, skip_zeros, list(seeds))
    limit_factor = None
    if max_unorm > 0.0:
        param_norm = torch.linalg.vector_norm(p[0], dtype=torch.float32) if param_norm is None else param_norm
        limit_factor = batch.limit(max_unorm, param_norm, unorm)
    batch.launch(limit_factor=limit_factor)
    for tensors in written:
        tensors.write_back()
    for parameter in p:  # autograd must know that the values it may have saved are gone
        torch.autograd.graph.increment_version(parameter)


def _batches(p: list, g: list, one_by_one: bool) -> list[list[int]]:
    """Numbers of the parameters that one launch can step; programs of a launch run at the same time."""
    if one_by_one or _overlap(p):
        return [[i] for i in range(len(p))]
    alike = {}
    for i, parameter in enumerate(p):
        if parameter.numel():
            alike.setdefault((g[i].dtype, parameter.numel() % 16 == 0), []).append(i)  # odd sizes apart: they are read element by element
    return list(alike.values())


@operator("optimizer_update_32bit")
def optimizer_update_32bit(
    optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr,
    gnorm_scale, skip_zeros=False,
):  # fmt: skip
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    moments = rows_of_moments(optimizer_name, state1, state2)
    _run(optimizer_name, settings, [p], [g], [moments], [[]], [], skip_zeros, max_unorm, param_norm, unorm_vec)


@operator("optimizer_update_8bit_blockwise")
def optimizer_update_8bit_blockwise(
    optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, weight_decay,
    gnorm_scale, skip_zeros=False,
):  # fmt: skip
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    moments, absmax = rows_of_moments(optimizer_name, state1, state2), rows_of_moments(optimizer_name, absmax1, absmax2)
    qmaps = ([qmap1, qmap1, qmap2] if optimizer_name == "ademamix" else [qmap1, qmap2])[: len(moments)]
    _run(optimizer_name, settings, [p], [g], [moments], [absmax], qmaps, skip_zeros)


@operator("optimizer_step")
def optimizer_step(
    p, g, moments, absmax, qmaps, unorm, algorithm, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale=1.0, max_unorm=0.0,
    skip_zeros=False, decoupled_weight_decay=True, bias_correction=True, nesterov=False, amsgrad=False, centered=False, seeds=(),
):  # fmt: skip
    settings = Settings(
        beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, decoupled_weight_decay, bias_correction, nesterov, amsgrad, centered
    )  # fmt: skip
    count = optimizer_moments(algorithm, beta2, amsgrad, centered)
    limited = max_unorm > 0.0
    for batch in _batches(p, g, one_by_one=limited):
        of_each = [[tensors[i * count : (i + 1) * count] for i in batch] for tensors in (moments, absmax)]
        _run(
            algorithm, settings, [p[i] for i in batch], [g[i] for i in batch], *of_each, qmaps, skip_zeros, max_unorm, None,
            unorm[batch[0]] if limited else None, [seeds[i] for i in batch] if seeds else (),
        )  # fmt: skip
