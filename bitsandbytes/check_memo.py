"""Remembers what long lists of tensors looked like when they passed a check, so that the next step need not ask each of them again.

To ask one tensor for one property takes Python about 40 nanoseconds, and a step over 400 small parameters has 2400 tensors. torch compares everything
that the checks look at (type, dtype, device, sizes, strides) in one call, about 40 nanoseconds a tensor for all of it together, as torch.compile does
before it runs compiled code.
"""

from collections import deque
from collections.abc import Callable, Sequence
import functools
from itertools import chain

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # not a public name: without it, everything is checked every time
    TensorGuards = None

_MANY = 64  # tensors; below, the memory costs more than it saves
_LAYOUTS = 4  # remembered at a time: those of a few optimizers


def _may_remember(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors are all there is to a check: subclasses may have sizes without numbers, and one device may reach another's pages."""
    return set(map(type, tensors)) <= {torch.Tensor, torch.nn.Parameter} and len({tensor.device for tensor in tensors}) == 1


def once_for_alike(check: Callable) -> Callable:
    """Spares a check when tensors of the same metadata have passed it lately.

    Args:
        check: takes hashable arguments and lists of tensors, in this order and told apart by type. It raises for bad ones, and must depend on
            nothing but the arguments and the types, dtypes, devices, sizes and strides of the tensors.
    """
    passed: deque = deque(maxlen=_LAYOUTS)

    @functools.wraps(check)
    def checked(*args) -> None:
        lists = [arg for arg in args if isinstance(arg, (list, tuple))]
        if TensorGuards is None or sum(map(len, lists)) < _MANY:
            return check(*args)
        tensors = tuple(chain.from_iterable(lists))
        kind = tuple([len(arg) if isinstance(arg, (list, tuple)) else arg for arg in args])
        if any(known == kind and guards.check(*tensors) for known, guards in tuple(passed)):  # another thread may add to it meanwhile
            return
        check(*args)
        if _may_remember(tensors):
            passed.append((kind, TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)))

    return checked
