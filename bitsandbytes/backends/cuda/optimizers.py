"""Optimizer steps on CUDA: every parameter of a call in as few launches as their table takes, and nothing that waits for the device."""

import ctypes as ct

import torch

from ..marshalling import L, P
from ..native_optimizers import operators
from .native import bind, kernels

_optimizer_step = bind("bnb_cuda_optimizer_step", P, P, P, L)

# Of csrc/cuda/kernels.h: for the norms, each begun unit of a parameter leaves two sums in double precision, and each parameter a factor.
_UNIT, _BYTES_OF_UNIT, _BYTES_OF_PARAMETER = 2048, 16, 4


def call(tensors, settings, p: torch.Tensor, unorm: list) -> None:
    norms = workspace = None
    if unorm:
        norms = torch.empty(tensors.count, dtype=torch.float32, device=p.device)
        sizes = (ct.c_int64 * tensors.count).from_address(tensors.sizes)
        units = sum([-(-n // _UNIT) for n in sizes])
        workspace = torch.empty(units * _BYTES_OF_UNIT + tensors.count * _BYTES_OF_PARAMETER, dtype=torch.uint8, device=p.device)
        tensors.update_norms = norms.data_ptr()
    where = (workspace.data_ptr(), workspace.numel()) if unorm else (None, 0)
    _optimizer_step(p, ct.byref(tensors), ct.byref(settings), *where)
    if unorm:
        torch._foreach_copy_([tensor if tensor.dim() else tensor.view(1) for tensor in unorm], list(norms.split(1)))


optimizer_step, optimizer_update_32bit, optimizer_update_8bit_blockwise = operators(kernels("bnb_cuda_optimizer_step"), call)
