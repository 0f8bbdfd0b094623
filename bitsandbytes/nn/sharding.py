"""Quantised weights in parts: one a process, put together for each use (FSDP2), or used as they are (tensor parallelism).

FSDP2 knows nothing of codes and their statistics. It cuts a parameter, keeps one part of it in a process as a distributed tensor, and gathers the
whole before a layer runs. Left alone it would cast codes in floating-point storage like any float, and leave the layer with a plain tensor. The
part of a ``Params4bit`` is therefore a ``WeightShard``: it remembers what it is a part of, and its all-gather hooks, which FSDP2 calls, send the
codes as they are and make a ``Params4bit`` of them again. The statistics are small and stay whole in every process.
"""

import copy

import torch
from torch import Tensor

from .. import functional
from ..quant_state import QuantState
from . import dispatch, slicing
from .parameters import Params4bit, _state_on

aten = torch.ops.aten

# What FSDP2, the loading of state dicts and nn.Module.to do with a shard; the result is the shard again, elsewhere or in part.
_SAME_SHARD = {
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten._to_copy.default,
    aten._pin_memory.default,
    aten.empty_like.default,
    aten.new_zeros.default,
}

# Integers that stand for storage dtypes on the way between processes. Neither gloo nor NCCL sends integers of two bytes; codes in float16 and
# bfloat16 are sent as such, which copies their bits.
_CARRIERS = {torch.float32: torch.int32}


class WeightShard(Tensor):
    """The packed codes [n, 1] that one process has of a ``Params4bit``.

    Attributes:
        attributes: those of the weight, its statistics among them. One dict for all tensors that are this shard.
    """

    attributes: dict

    @staticmethod
    def of(codes: Tensor, attributes: dict) -> "WeightShard":
        shard = Tensor._make_subclass(WeightShard, codes)
        shard.attributes = attributes
        return shard

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            result = func(*args, **(kwargs or {}))
        if func in _SAME_SHARD and type(result) is Tensor and result.dtype == args[0].dtype:
            return WeightShard.of(result, args[0].attributes)
        return result

    def _codes(self) -> Tensor:
        """The codes as an ordinary tensor."""
        return self.view(self.shape)

    def __reduce_ex__(self, protocol):  # what is written to disk is the codes
        return self._codes().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        memo[id(self)] = result = WeightShard.of(self._codes().clone(), copy.deepcopy(self.attributes, memo))
        return result

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """What this process sends: its codes, as many as those of the others. Called by FSDP2."""
        codes = self.view(_CARRIERS.get(self.dtype, self.dtype))
        size = -(-outer_size[0] // mesh.size())
        if codes.shape[0] < size:
            codes = torch.cat([codes, codes.new_zeros(size - codes.shape[0], *codes.shape[1:])])
        return (codes,), None

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        """The whole weight around what was received, whatever dtype mixed precision asks for. Called by FSDP2, later with the weight as ``out``."""
        (codes,) = all_gather_outputs
        self.attributes["quant_state"] = _state_on(self.attributes["quant_state"], codes.device)
        if out is not None:
            vars(out).update(self.attributes)
            return None
        return GatheredWeight(codes.view(self.dtype), **self.attributes), ()


class GatheredWeight(Params4bit):
    """The ``Params4bit`` that a layer has while FSDP2 has gathered it; memory is FSDP2's, which frees it afterwards."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func in (torch.as_strided, Tensor.detach):  # the steps by which FSDP2 makes a parameter of it
            return cls(result, args[0].requires_grad, **vars(args[0]))
        return result

    def _with(self, data, **changes):  # moved elsewhere it is a weight like any other
        return Params4bit(data, **{**vars(self), "module": None, "requires_grad": self.requires_grad, **changes})


GatheredWeight.__name__ = Params4bit.__name__  # programs know a quantised weight by the name of its class


def _zeros_or_shard(func, weight, *args, **kwargs):
    """``new_zeros``. FSDP2 asks the parameter for the memory of its part with it; what has the form of a part is one."""
    zeros = func(weight, *args, **kwargs)
    state = weight.quant_state
    if state is None or zeros.dtype != weight.dtype or zeros.shape[1:] != weight.shape[1:] or zeros.dim() != 2:
        return zeros
    return WeightShard.of(zeros, {**vars(weight), "module": None})


dispatch.HANDLERS[Tensor.new_zeros] = _zeros_or_shard


def is_sharded(weight: Tensor) -> bool:
    """Whether FSDP2 put a distributed parameter in place of the layer's own."""
    return type(weight.data) is not Tensor


def shard_of(weight: Tensor) -> WeightShard | None:
    """This process's part of a distributed 4-bit weight, if it still knows what it is a part of."""
    local = getattr(weight, "_local_tensor", None)  # of a DTensor; importing that takes longer than importing all of this library
    return local if isinstance(local, WeightShard) else None


def make_ordinary(entry: Tensor) -> None:
    """Lets the entry of a state dict for a distributed weight hold an ordinary tensor, in the same memory, whatever is done with it next."""
    if shard_of(entry) is not None:
        entry._local_tensor = entry._local_tensor._codes()


def adopt(weight: Tensor, state: QuantState, shard: WeightShard | None) -> None:
    """Makes ``state`` that of a distributed weight. ``shard`` is its part as it was before other codes were loaded, perhaps into a new tensor."""
    if shard is not None:
        shard.attributes["quant_state"] = state
        if shard_of(weight) is None:
            weight._local_tensor = WeightShard.of(weight._local_tensor, shard.attributes)


def shard_4bit(weight: Params4bit, dim: int, rank: int, world_size: int) -> Params4bit:
    """One of ``world_size`` equal parts of a quantised weight, for a layer that computes with no more than that part.

    The values are those of the whole weight, bit for bit: nothing is quantised again. For column-parallel layers cut the rows (dim 0), for
    row-parallel ones the columns (dim 1).

    Args:
        weight: a quantised weight.
        dim: 0: rows, entries along the first dimension of a weight of any shape; 1: columns of a matrix.
        rank: which part, 0 to world_size - 1.
        world_size: number of parts.

    Returns:
        A weight of its own with the same quant_type, storage dtype and dequantised dtype. Parts along dim 0 share memory with ``weight``. Blocks that
        a cut goes through become smaller blocks; nested statistics are sliced where the part begins with one of their blocks, and
        dequantised otherwise.

    Raises:
        TypeError: not a ``Params4bit``.
        ValueError: it is not quantised; no such dimension or rank; the dimension is not divisible; the parts are not whole blocks of any block size.
    """
    if not isinstance(weight, Params4bit):
        raise TypeError(f"shard_4bit cuts a Params4bit, got {type(weight).__name__}")
    state = weight.quant_state
    if state is None:
        raise ValueError("shard_4bit cuts quantised weights, this one is not; move it to a device first (weight.to('cpu'), weight.to('cuda'))")
    shape = tuple(state.shape)
    if dim not in (0, 1) or dim >= len(shape) or (dim == 1 and len(shape) != 2):
        raise ValueError(f"dim must be 0, or 1 for a matrix; got {dim} for a weight of shape {list(shape)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. world_size - 1, got rank {rank} of {world_size}")
    if shape[dim] % world_size:
        raise ValueError(f"dimension {dim} of a weight of shape {list(shape)} cannot be divided among {world_size}; pad it before quantising")
    codes, state = functional._canonical(weight.data, state) if state.packing_format_for_cpu else (weight.data, state)
    size = shape[dim] // world_size
    cut = slicing.columns if dim else slicing.rows
    codes, state = cut(codes, state, rank * size, (rank + 1) * size)
    part = Params4bit(codes, weight.requires_grad, bnb_quantized=True)
    part._adopt(state)
    return part
