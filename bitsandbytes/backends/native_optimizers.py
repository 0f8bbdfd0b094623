"""Optimizer steps by a native library, the CPU's or the GPU's: many parameters in one call.

The operators are those of ``default/optimizers.py``, which says what they compute: bit for bit, save for the norms that ``max_unorm`` needs.
Those are sums in double precision here, which depend on nothing but the parameter.

A native call steps its parameters at the same time, so those that overlap are stepped one after the other instead.
"""

from array import array
from collections.abc import Callable
import ctypes as ct
from dataclasses import dataclass
import functools
from operator import add, gt
from typing import Optional

import torch

from .default.optimizers import Settings, bias_corrections, published_settings, rows_of_moments
from .marshalling import DTYPES, D, L, P

# As in csrc/common/optimizer.h.
_ALGORITHMS = {"adam": 0, "lamb": 0, "ademamix": 1, "momentum": 2, "lars": 2, "lion": 3, "rmsprop": 4, "adagrad": 5}
_OWN_NORM = -1.0


class NativeTensors(ct.Structure):
    _fields_ = [("count", L), *((name, P) for name in ("sizes", "p", "g", "g_dtypes", "moments", "absmax", "update_norms", "seeds"))]


class NativeSettings(ct.Structure):
    _fields_ = [
        *((name, L) for name in ("algorithm", "dtype", "step")),
        *((name, D) for name in ("lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "gnorm_scale")),
        *((name, D) for name in ("mean_correction", "root_correction", "max_unorm", "param_norm")),
        *((name, L) for name in ("decoupled_weight_decay", "nesterov", "amsgrad", "centered", "skip_zeros")),
        ("qmaps", P * 3),
    ]


# Makes the native call. Takes the two structures, a parameter of the device, and the tensors that receive the norms of the updates, empty without a
# limit on them: those and ``update_norms`` are its own business.
NativeStep = Callable[[NativeTensors, NativeSettings, torch.Tensor, list], None]


# Of every tensor of a call, so by ``map``, which takes two thirds of the time of a loop.
_is_contiguous, _data_ptr, _numel = torch.Tensor.is_contiguous, torch.Tensor.data_ptr, torch.Tensor.numel


class _Table:
    """Tensors as the C interface takes them: an array of addresses.

    Those that are not contiguous are copied, and written back afterwards where the kernel writes.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors, self.plain = tensors, tensors
        if not all(map(_is_contiguous, tensors)):
            self.plain = [tensor.contiguous() for tensor in tensors]
        self.addresses = array("Q", list(map(_data_ptr, self.plain)))

    def overlaps(self) -> bool:
        """Whether two of the tensors may share memory."""
        if self.plain is self.tensors:
            return _overlap(tuple(self.addresses), tuple([tensor.nbytes for tensor in self.tensors]))
        return _overlap(tuple(map(_data_ptr, self.tensors)), tuple(map(_span, self.tensors)))

    def write_back(self) -> None:
        if self.plain is self.tensors:
            return
        with torch.no_grad():
            for tensor, plain in zip(self.tensors, self.plain):
                if plain is not tensor:
                    tensor.copy_(plain)


@functools.lru_cache(maxsize=16)  # a step asks about the same numbers as the one before
def _overlap(starts: tuple[int, ...], spans: tuple[int, ...]) -> bool:
    """Whether two stretches of memory overlap: then, among all in the order of memory, one ends behind the next beginning."""
    return any(map(gt, sorted(map(add, starts, spans)), sorted(starts)[1:]))


def start_of(numbers: array) -> Optional[int]:
    return numbers.buffer_info()[0] if numbers else None


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element of a tensor of any strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _note_changes(tensors: list[torch.Tensor]) -> None:
    """Tells autograd that the values it may have saved are gone."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # before torch 2.6 one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True)
class Step:
    """What the parameters of a call share."""

    call: NativeStep
    name: str
    settings: Settings
    qmaps: list
    skip_zeros: bool
    max_unorm: float = 0.0
    param_norm: float = _OWN_NORM

    def run(self, p: list, g: list, moments: list, absmax: list, unorm: list = (), seeds: list = ()) -> None:
        if not p:
            return
        prepared = self.prepare(p, g, moments, absmax, seeds)
        if prepared.overlaps():
            for i in range(len(p)):
                mine = (tensors[i * len(tensors) // len(p) : (i + 1) * len(tensors) // len(p)] for tensors in (p, g, moments, absmax))
                self.run(*mine, unorm[i : i + 1], seeds[i : i + 1])
            return
        self.call(prepared.tensors, prepared.settings, p[0], unorm)
        prepared.write_back()
        _note_changes(p)

    def prepare(self, p: list, g: list, moments: list, absmax: list, seeds: list) -> "Prepared":
        """The arguments of the native call."""
        written, read = [_Table(tensors) for tensors in (p, moments, absmax)], [_Table(tensors) for tensors in (g, self.qmaps)]
        numbers = [array("q", values) for values in (list(map(_numel, p)), [DTYPES[t.dtype] for t in g], seeds)]
        (parameters, moments, absmax), (gradients, _) = ([start_of(table.addresses) for table in tables] for tables in (written, read))
        sizes, dtypes, seeds = map(start_of, numbers)
        tensors = NativeTensors(len(p), sizes, parameters, gradients, dtypes, moments, absmax, None, seeds)
        s = self.settings
        settings = NativeSettings(
            _ALGORITHMS[self.name], DTYPES[p[0].dtype], s.step, s.lr, s.beta1, s.beta2, s.beta3, s.alpha, s.eps, s.weight_decay, s.gnorm_scale,
            *bias_corrections(s), self.max_unorm, self.param_norm, s.decoupled_weight_decay, s.nesterov, s.amsgrad, s.centered, self.skip_zeros,
            (P * 3)(*read[1].addresses),
        )  # fmt: skip
        return Prepared(tensors, settings, written, (read, numbers))


@dataclass(frozen=True)
class Prepared:
    """The two structures of a native call, and what they point to."""

    tensors: NativeTensors
    settings: NativeSettings
    written: list
    kept: tuple

    def overlaps(self) -> bool:
        """Whether two parameters share memory, so that they cannot be stepped at the same time."""
        return self.tensors.count > 1 and self.written[0].overlaps()

    def write_back(self) -> None:
        for table in self.written:
            table.write_back()


def operators(kernel: Callable, call: NativeStep) -> tuple[Callable, Callable, Callable]:
    """The operators ``optimizer_step``, ``optimizer_update_32bit`` and ``optimizer_update_8bit_blockwise``.

    Args:
        kernel: registers a function under the operator's name; see ``_ops.implement``.
        call: makes the native call.
    """

    @kernel("optimizer_step")
    def optimizer_step(
        p, g, moments, absmax, qmaps, unorm, algorithm, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale=1.0, max_unorm=0.0,
        skip_zeros=False, decoupled_weight_decay=True, bias_correction=True, nesterov=False, amsgrad=False, centered=False, seeds=(),
    ):  # fmt: skip
        settings = Settings(
            beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, decoupled_weight_decay, bias_correction, nesterov, amsgrad, centered
        )  # fmt: skip
        Step(call, algorithm, settings, qmaps, skip_zeros, max_unorm).run(p, g, moments, absmax, unorm if max_unorm > 0.0 else [], seeds)

    @kernel("optimizer_update_32bit")
    def optimizer_update_32bit(
        optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale,
        skip_zeros=False,
    ):  # fmt: skip
        settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
        moments = rows_of_moments(optimizer_name, state1, state2)
        unorm = [unorm_vec] if max_unorm > 0.0 else []
        Step(call, optimizer_name, settings, [], skip_zeros, max_unorm, max(param_norm, 0.0)).run([p], [g], moments, [], unorm)

    @kernel("optimizer_update_8bit_blockwise")
    def optimizer_update_8bit_blockwise(
        optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale,
        skip_zeros=False,
    ):  # fmt: skip
        settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
        moments, absmax = (rows_of_moments(optimizer_name, *pair) for pair in ((state1, state2), (absmax1, absmax2)))
        qmaps = [qmap1, qmap1, qmap2] if optimizer_name == "ademamix" else [qmap1, qmap2][: len(moments)]
        Step(call, optimizer_name, settings, qmaps, skip_zeros).run([p], [g], moments, absmax)

    return optimizer_step, optimizer_update_32bit, optimizer_update_8bit_blockwise
