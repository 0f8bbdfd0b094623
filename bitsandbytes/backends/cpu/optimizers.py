"""Optimizer steps on the CPU, by the native library: many parameters in one call.

The functions are those of ``backends/default/optimizers.py``, which says what they compute: bit for bit, save for the norms that ``max_unorm``
needs. Those are sums in double precision here, the same for every instruction set and number of threads.

Threads step the parameters of one native call at the same time, so those that overlap are stepped one after the other instead.
"""

from array import array
import ctypes as ct
from itertools import pairwise
from typing import Optional

import torch

from ...cextension import check_status
from ..default.optimizers import Settings, bias_corrections, published_settings, rows_of_moments
from .native import DTYPES, D, I, L, P, bind, kernels

# As in csrc/common/optimizer.h.
_ALGORITHMS = {"adam": 0, "lamb": 0, "ademamix": 1, "momentum": 2, "lars": 2, "lion": 3, "rmsprop": 4, "adagrad": 5}
_OWN_NORM = -1.0


class _Tensors(ct.Structure):
    _fields_ = [("count", L), *((name, P) for name in ("sizes", "p", "g", "g_dtypes", "moments", "absmax", "update_norms", "seeds"))]


class _Settings(ct.Structure):
    _fields_ = [
        *((name, L) for name in ("algorithm", "dtype", "step")),
        *((name, D) for name in ("lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "gnorm_scale")),
        *((name, D) for name in ("mean_correction", "root_correction", "max_unorm", "param_norm")),
        *((name, L) for name in ("decoupled_weight_decay", "nesterov", "amsgrad", "centered", "skip_zeros")),
        ("qmaps", P * 3),
    ]


_kernel = kernels("bnb_cpu_optimizer_step")
_optimizer_step = bind("bnb_cpu_optimizer_step", P, P, I)


class _Table:
    """Tensors as the C interface takes them: an array of addresses.

    Those that are not contiguous are copied, and written back afterwards where the kernel writes.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors, self.plain = tensors, tensors
        if not all([tensor.is_contiguous() for tensor in tensors]):
            self.plain = [tensor.contiguous() for tensor in tensors]
        self.addresses = array("Q", [tensor.data_ptr() for tensor in self.plain])

    def write_back(self) -> None:
        if self.plain is not self.tensors:
            for tensor, plain in zip(self.tensors, self.plain):
                if plain is not tensor:
                    tensor.copy_(plain)


def _start(numbers: array) -> Optional[int]:
    return numbers.buffer_info()[0] if numbers else None


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element of a tensor of any strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _overlap(tensors: list[torch.Tensor]) -> bool:
    """Whether two of the tensors may share memory."""
    width = tensors[0].element_size()
    spans = [tensor.numel() * width if tensor.is_contiguous() else _span(tensor) for tensor in tensors]
    ranges = sorted(zip([tensor.data_ptr() for tensor in tensors], spans))
    return any([start + span > following for (start, span), (following, _) in pairwise(ranges)])


def _note_changes(tensors: list[torch.Tensor]) -> None:
    """Tells autograd that the values it may have saved are gone."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # before torch 2.6 one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def _run_one_by_one(name, p, g, moments, absmax, qmaps, unorm, s: Settings, max_unorm, param_norm, skip_zeros, seeds) -> None:
    for i in range(len(p)):
        mine = (tensors[i * len(tensors) // len(p) : (i + 1) * len(tensors) // len(p)] for tensors in (p, g, moments, absmax))
        _run(name, *mine, qmaps, unorm[i : i + 1], s, max_unorm, param_norm, skip_zeros, seeds[i : i + 1])


@torch.no_grad()
def _run(name, p, g, moments, absmax, qmaps, unorm, s: Settings, max_unorm, param_norm, skip_zeros, seeds) -> None:
    if not p:
        return
    if len(p) > 1 and _overlap(p):
        return _run_one_by_one(name, p, g, moments, absmax, qmaps, unorm, s, max_unorm, param_norm, skip_zeros, seeds)
    written = [_Table(tensors) for tensors in (p, moments, absmax)]
    gradients, codes = _Table(g), _Table(qmaps)
    sizes, dtypes, seeds = (array("q", numbers) for numbers in ([t.numel() for t in p], [DTYPES[t.dtype] for t in g], seeds))
    norms = array("f", bytes(4 * len(p) if max_unorm > 0.0 else 0))
    parameters, moments, absmax = (_start(table.addresses) for table in written)
    tensors = _Tensors(
        len(p), _start(sizes), parameters, _start(gradients.addresses), _start(dtypes), moments, absmax, _start(norms), _start(seeds)
    )  # fmt: skip
    settings = _Settings(
        _ALGORITHMS[name], DTYPES[p[0].dtype], s.step, s.lr, s.beta1, s.beta2, s.beta3, s.alpha, s.eps, s.weight_decay, s.gnorm_scale,
        *bias_corrections(s), max_unorm, param_norm, s.decoupled_weight_decay, s.nesterov, s.amsgrad, s.centered, skip_zeros,
        (P * 3)(*codes.addresses),
    )  # fmt: skip
    check_status(_optimizer_step(ct.byref(tensors), ct.byref(settings), torch.get_num_threads()), "optimizer_step")
    for table in written:
        table.write_back()
    for tensor, norm in zip(unorm, norms):
        tensor.fill_(norm)
    _note_changes(p)


@_kernel("optimizer_step")
def optimizer_step(
    p, g, moments, absmax, qmaps, unorm, algorithm, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale=1.0, max_unorm=0.0,
    skip_zeros=False, decoupled_weight_decay=True, bias_correction=True, nesterov=False, amsgrad=False, centered=False, seeds=(),
):  # fmt: skip
    settings = Settings(
        beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, decoupled_weight_decay, bias_correction, nesterov, amsgrad, centered
    )  # fmt: skip
    _run(algorithm, p, g, moments, absmax, qmaps, unorm, settings, max_unorm, _OWN_NORM, skip_zeros, seeds)


@_kernel("optimizer_update_32bit")
def optimizer_update_32bit(
    optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale,
    skip_zeros=False,
):  # fmt: skip
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    moments = rows_of_moments(optimizer_name, state1, state2)
    unorm = [unorm_vec] if max_unorm > 0.0 else []
    param_norm = param_norm if param_norm > 0.0 else 0.0
    _run(optimizer_name, [p], [g], moments, [], [], unorm, settings, max_unorm, param_norm, skip_zeros, ())


@_kernel("optimizer_update_8bit_blockwise")
def optimizer_update_8bit_blockwise(
    optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale,
    skip_zeros=False,
):  # fmt: skip
    settings = published_settings(optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    moments, absmax = (rows_of_moments(optimizer_name, *pair) for pair in ((state1, state2), (absmax1, absmax2)))
    qmaps = [qmap1, qmap1, qmap2] if optimizer_name == "ademamix" else [qmap1, qmap2][: len(moments)]
    _run(optimizer_name, [p], [g], moments, absmax, qmaps, [], settings, 0.0, _OWN_NORM, skip_zeros, ())
