"""Parts of a packed 4-bit tensor, dequantised without touching the rest.

A block is a run of consecutive elements of the flat tensor, so a part need not begin where a block begins: a row of 65 elements in blocks of 64
does not. The statistics are read where they are, nested or not; nothing of the size of the whole is copied.
"""

import copy
from math import prod

import torch
from torch import Tensor

from .._ops import BLOCKSIZES_4BIT, NESTED_BLOCKSIZE, packed_length
from ..quant_state import QuantState


def packed_bytes(packed: Tensor, state: QuantState) -> Tensor:
    """Packed codes of any storage dtype as uint8 [(elements + 1) // 2], a view where they are contiguous."""
    flat = packed.detach().contiguous().view(-1).view(torch.uint8)
    return flat[: packed_length(prod(state.shape), torch.uint8)]


def _scales_between(state: QuantState, first: int, last: int) -> Tensor:
    """The float32 absmax of the blocks first .. last - 1."""
    if not state.nested:
        return state.absmax[first:last]
    inner, step = state.state2, state.state2.blocksize
    start = first // step * step
    outer = inner.absmax[start // step : -(-last // step)]
    scales = torch.ops.bitsandbytes.dequantize_blockwise(state.absmax[start:last], outer, inner.code, step, torch.float32)
    return scales[first - start :] + state.offset


def _scales_of(state: QuantState, blocks: Tensor) -> Tensor:
    """The float32 absmax of some blocks, in the shape of ``blocks``."""
    found = state.absmax[blocks]
    if not state.nested:
        return found
    inner = state.state2
    return inner.code[found.int()] * inner.absmax[blocks // inner.blocksize] + state.offset


def dequantize_between(packed: Tensor, state: QuantState, start: int, stop: int) -> Tensor:
    """The elements start .. stop - 1 of the flat tensor, in ``state.dtype``."""
    size, count = state.blocksize, prod(state.shape)
    first, last = start // size, -(-stop // size)
    codes = packed_bytes(packed, state)[first * size // 2 : (last * size + 1) // 2]
    shape = [min(last * size, count) - first * size]
    covering = torch.ops.bitsandbytes.dequantize_4bit(codes, _scales_between(state, first, last), size, state.quant_type, shape, state.dtype)
    return covering[start - first * size : stop - first * size]


def dequantize_rows(packed: Tensor, state: QuantState, rows: Tensor) -> Tensor:
    """Some rows of a packed matrix.

    Args:
        packed: codes of a matrix [count, width], any storage dtype.
        state: its state.
        rows: int32 or int64, any shape.

    Returns:
        [*rows.shape, width] in ``state.dtype``.

    Raises:
        IndexError: a row that the matrix does not have.
    """
    count, width = state.shape
    flat = rows.reshape(-1)
    unit = state.blocksize if width % state.blocksize == 0 else common_unit(width, state.blocksize)
    read = _by_unit if unit in BLOCKSIZES_4BIT else _by_element
    return read(packed_bytes(packed, state), state, flat, count, width, unit).view(*rows.shape, width)


def common_unit(width: int, blocksize: int) -> int:
    """The largest power of two that divides both: every row begins, and every block ends, at a multiple of it."""
    return min(width & -width, blocksize)


def _by_unit(codes: Tensor, state: QuantState, rows: Tensor, count: int, width: int, unit: int) -> Tensor:
    """Rows made of whole units; a unit lies in one block, so the rows are themselves a tensor with blocks of that size."""
    chosen = codes.view(count, width // 2).index_select(0, rows)
    units = width // unit
    if unit == state.blocksize and not state.nested:
        scales = state.absmax[: count * units].view(count, units).index_select(0, rows)
    else:
        first = rows.long()[:, None] * width
        scales = _scales_of(state, (first + torch.arange(0, width, unit, device=rows.device)) // state.blocksize)
    if torch.compiler.is_compiling():  # the operator takes a shape of constants, which would tie the graph to one number of rows
        levels = torch.stack([chosen >> 4, chosen & 15], -1).view(-1, units, unit)
        return (state.code[levels.int()] * scales.view(-1, units, 1)).view(-1, width).to(state.dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(
        chosen.view(-1, 1), scales.reshape(-1), unit, state.quant_type, [rows.numel(), width], state.dtype
    )  # fmt: skip


def _by_element(codes: Tensor, state: QuantState, rows: Tensor, count: int, width: int, unit: int) -> Tensor:
    """Rows that may begin in the middle of a byte."""
    known = codes.new_zeros(()).expand(count).index_select(0, rows)  # zeros; fails on rows that do not exist
    elements = (rows.long() + known)[:, None] * width + torch.arange(width, device=rows.device)
    pairs = codes[elements // 2]
    levels = torch.where(elements % 2 == 0, pairs >> 4, pairs & 15)
    values = state.code.to(torch.float32)[levels.int()] * _scales_of(state, elements // state.blocksize)
    return values.to(state.dtype)


def part(packed: Tensor, state: QuantState, index: int) -> tuple[Tensor, QuantState]:
    """One entry along the first dimension of a packed tensor, as a packed tensor of its own.

    Args:
        packed: codes of a tensor [n, ...], any storage dtype.
        state: its state.
        index: which entry.

    Returns:
        uint8 codes [bytes, 1] that share memory with ``packed``, and their state. Where entries begin in the middle of a block, its block size is
        the largest that divides both, and blocks that belonged together have the same scale. Scales are shared where they can be.

    Raises:
        ValueError: entries have no such block size: their number of elements is not a multiple of 32.
    """
    own = copy.copy(state)
    own.shape = torch.Size(state.shape[1:])
    count = prod(own.shape)
    own.blocksize = common_unit(count, state.blocksize)
    if own.blocksize not in BLOCKSIZES_4BIT:
        sizes = f"{count} elements are not a multiple of {BLOCKSIZES_4BIT[0]}"
        raise ValueError(f"a 4-bit tensor of shape {list(state.shape)} cannot be taken apart: {sizes}")
    first, blocks = index * (count // own.blocksize), count // own.blocksize
    if own.blocksize < state.blocksize:
        units = torch.arange(first, first + blocks, device=state.absmax.device)
        own.absmax = _scales_of(state, units * own.blocksize // state.blocksize)
    elif state.nested and first % NESTED_BLOCKSIZE == 0:
        own.absmax = state.absmax[first : first + blocks]
        own.state2 = copy.copy(state.state2)
        own.state2.absmax = state.state2.absmax[first // NESTED_BLOCKSIZE : -(-(first + blocks) // NESTED_BLOCKSIZE)]
        return _codes_of(packed, state, index, count), own
    else:
        own.absmax = _scales_between(state, first, first + blocks)
    own.nested, own.state2, own.offset = False, None, None
    return _codes_of(packed, state, index, count), own


def _codes_of(packed: Tensor, state: QuantState, index: int, count: int) -> Tensor:
    return packed_bytes(packed, state)[index * count // 2 : (index + 1) * count // 2].view(-1, 1)
