"""Parts of a packed 4-bit tensor that are packed tensors of their own.

A part has the bytes of its elements and the statistics of their blocks. So it begins where a block begins, and ends where one ends or the tensor
does. Blocks that a cut would go through can be taken as smaller ones with equal scales, if there is a block size that small.
"""

import copy
from math import prod

import torch
from torch import Tensor

from .._ops import BLOCKSIZES_4BIT
from ..quant_state import QuantState
from .pieces import _scales_between, _scales_of, common_unit, packed_bytes


def between(packed: Tensor, state: QuantState, start: int, stop: int) -> tuple[Tensor, QuantState]:
    """The elements start .. stop - 1 of the flat tensor.

    Args:
        packed: codes of the whole tensor, any storage dtype.
        state: its state.

    Returns:
        Codes [n, 1] in the same storage dtype that share memory with ``packed``, and their state: of shape [rows, ...] if the elements are whole
        rows, else of one dimension. Statistics are views too, but nested ones that begin in the middle of one of their own blocks of 256, which are
        dequantised.

    Raises:
        ValueError: the part does not consist of whole blocks, or the codes are in the layout of old releases for CPUs, whose blocks are scattered.
    """
    if state.packing_format_for_cpu:
        raise ValueError("a weight in the CPU layout cannot be cut; bring it back with _convert_weight_packed_for_cpu_inverse first")
    size, count, row = state.blocksize, prod(state.shape), prod(state.shape[1:])
    if start % size or (stop % size and stop != count):
        raise ValueError(
            f"elements {start} to {stop} of a 4-bit tensor of shape {list(state.shape)} are not whole blocks of {size}: "
            "the part has no scales of its own. Cut it at multiples of the block size, or cut weight.dequantize(); the bytes alone are weight.data."
        )
    whole_rows = row and start % row == stop % row == 0
    own = copy.copy(state)
    own.shape = torch.Size([(stop - start) // row, *state.shape[1:]] if whole_rows else [stop - start])
    first, last = start // size, -(-stop // size)
    if state.nested and first % state.state2.blocksize == 0:
        step = state.state2.blocksize
        own.state2 = copy.copy(state.state2)
        own.state2.absmax = state.state2.absmax[first // step : -(-last // step)]
        own.absmax = state.absmax[first:last]
    else:
        _set_scales(own, _scales_between(state, first, last))
    per_item = 2 * packed.element_size()
    return packed.detach().reshape(-1, 1)[start // per_item : -(-stop // per_item)], own


def rows(packed: Tensor, state: QuantState, start: int, stop: int) -> tuple[Tensor, QuantState]:
    """The rows start .. stop - 1, as ``between``; where they are not whole blocks, in smaller ones.

    Raises:
        ValueError: there is no block size that divides the parts.
    """
    row = prod(state.shape[1:])
    start, stop = start * row, stop * row
    unit = _unit(state, start, 0 if stop == prod(state.shape) else stop)
    return between(packed, state if unit == state.blocksize else _in_blocks_of(unit, state), start, stop)


def columns(packed: Tensor, state: QuantState, start: int, stop: int) -> tuple[Tensor, QuantState]:
    """The columns start .. stop - 1 of a matrix.

    Returns:
        Codes [n, 1] in the same storage dtype and their state. Both are copies, nested statistics are dequantised.

    Raises:
        ValueError: the columns are not whole blocks, of the state's block size or a smaller one, in every row.
    """
    height, width = state.shape
    unit = _unit(state, width, start, stop)
    own = copy.copy(state)
    own.shape, own.blocksize = torch.Size([height, stop - start]), unit
    elements = torch.arange(height, device=packed.device)[:, None] * width + torch.arange(start, stop, unit, device=packed.device)
    _set_scales(own, _scales_of(state, (elements // state.blocksize).reshape(-1)))
    codes = packed_bytes(packed, state).view(height, width // 2)[:, start // 2 : stop // 2]
    return codes.contiguous().view(-1).view(packed.dtype).view(-1, 1), own


def _unit(state: QuantState, *cuts: int) -> int:
    """The largest block size, up to that of ``state``, of which every cut is a multiple.

    Raises:
        ValueError: there is none.
    """
    unit = state.blocksize
    for cut in filter(None, cuts):
        unit = common_unit(cut, unit)
    if unit not in BLOCKSIZES_4BIT:
        raise ValueError(
            f"a 4-bit tensor of shape {list(state.shape)} in blocks of {state.blocksize} cannot be cut like this: a part would begin or end in the "
            f"middle of a block, and there are no blocks smaller than {BLOCKSIZES_4BIT[0]} elements to cut at"
        )
    return unit


def _in_blocks_of(size: int, state: QuantState) -> QuantState:
    """The same state in smaller blocks: those that were one have the same scale."""
    blocks = torch.arange(-(-prod(state.shape) // size), device=state.absmax.device)
    finer = copy.copy(state)
    finer.blocksize = size
    _set_scales(finer, _scales_of(state, blocks * size // state.blocksize))
    return finer


def _set_scales(state: QuantState, absmax: Tensor) -> None:
    """Gives a state statistics that are not nested."""
    state.absmax, state.nested, state.state2, state.offset = absmax, False, None, None
