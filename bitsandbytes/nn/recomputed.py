"""Dense values that autograd does not keep: what it saves of them is how to dequantise them again.

A product with a dense weight saves that weight for its backward pass. For a weight that was only dequantised, the packed codes are there anyway
and take an eighth of the memory. ``recomputed`` marks such a tensor; whatever autograd would save of it or of a view of it becomes a note, and
the backward pass dequantises the blocks that the view covers.
"""

import copy
from functools import partial

import torch

from ..quant_state import QuantState
from .pieces import dequantize_between

functorch_level = torch._C._functorch.peek_interpreter_stack


class RecomputedTensor(torch.Tensor):
    """A dense weight, or a view of it, whose values autograd does not keep."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        sources = [value._source for value in (*args, *kwargs.values()) if isinstance(value, RecomputedTensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if not sources or functorch_level() is not None or not torch._C._autograd._saved_tensors_hooks_is_enabled():
                return func(*args, **kwargs)
            with torch.autograd.graph.saved_tensors_hooks(partial(_note, sources), _recalled):
                result = func(*args, **kwargs)
        return _marked_views(result, sources)

    def _plain(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol):
        return self._plain().__reduce_ex__(protocol)


class Source:
    """Where a dense weight comes from."""

    def __init__(self, dense: torch.Tensor, packed: torch.Tensor, state: QuantState):
        self.packed, self.state = packed, state
        self.storage, self.start = dense.untyped_storage().data_ptr(), dense.storage_offset()
        self.version = _version(dense), _version(packed)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of the dense weight that nobody has written to."""
        return tensor.dtype == self.state.dtype and tensor.untyped_storage().data_ptr() == self.storage and _version(tensor) == self.version[0]

    def view(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> torch.Tensor:
        """A view of the dense weight, given by its place in the storage, dequantised again; only the blocks that it touches are."""
        if _version(self.packed) != self.version[1]:
            raise RuntimeError("a 4-bit parameter that a backward pass needs has been modified since the forward pass")
        extent = sum((n - 1) * step for n, step in zip(size, stride)) + 1 if size.numel() else 0
        first = offset - self.start
        values = dequantize_between(self.packed, self.state, first, first + extent)
        return values.as_strided(size, stride, values.storage_offset())


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def recomputed(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Marks a dense weight, or a view of it, as one to be dequantised again."""
    tensor = tensor.as_subclass(RecomputedTensor)
    tensor._source = source
    return tensor


def _marked_views(result, sources: list[Source]):
    """The result of a function, or of one with several, marked where it is a view of a dense weight."""
    if type(result) in (tuple, list):
        return type(result)(_marked_views(item, sources) for item in result)
    if type(result) is not torch.Tensor or result.layout is not torch.strided or result.requires_grad:
        return result
    source = next((source for source in sources if source.holds(result)), None)
    return result if source is None else recomputed(result, source)


def _note(sources: list[Source], tensor: torch.Tensor):
    """What autograd keeps of a tensor: itself, or where it comes from."""
    source = next((source for source in sources if source.holds(tensor)), None)
    return tensor if source is None else partial(source.view, tensor.size(), tensor.stride(), tensor.storage_offset())


def _recalled(kept) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()
