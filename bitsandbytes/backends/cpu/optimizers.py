"""Optimizer steps on the CPU, by the native library; threads share the parameters of a call."""

from array import array
import ctypes as ct

import torch

from ...cextension import check_status
from ..marshalling import I, P
from ..native_optimizers import operators, start_of
from .native import bind, kernels

_optimizer_step = bind("bnb_cpu_optimizer_step", P, P, I)


def call(tensors, settings, _: torch.Tensor, unorm: list) -> None:
    norms = array("f", bytes(4 * len(unorm)))
    tensors.update_norms = start_of(norms)
    check_status(_optimizer_step(ct.byref(tensors), ct.byref(settings), torch.get_num_threads()), "optimizer_step")
    for tensor, norm in zip(unorm, norms):
        tensor.fill_(norm)


optimizer_step, optimizer_update_32bit, optimizer_update_8bit_blockwise = operators(kernels("bnb_cpu_optimizer_step"), call)
