"""Blockwise quantisation to 4 and 8 bits, and the way back.

A tensor is taken flat and cut into blocks; the last may be short. A program handles a tile [blocks, width], so that the largest magnitude of a block
is a maximum along the tile's rows and the scale of a block is loaded once. Blocks wider than a tile are read in pieces, twice when quantising; the
second time they come from a cache.

Bytes moved: each element once, half a byte or a byte for its code, four bytes for the scale of a block. Codes of 4 bits are two a byte, the first
in the high half; the tile keeps neighbours together (``split`` and ``interleave``), so that all memory is accessed in order.
"""

import torch
import triton
import triton.language as tl

from ..._ops import blocks, packed_length
from . import arithmetic as ar
from .launch import as_bytes, ceil_div, launch, levels, operator, power_of_two, thresholds, written

_TILE = 2048  # elements
_WIDEST = 4096
_BYTES = 1024  # of 4-bit codes for a program that undoes them

_ZERO_CODE = {"nf4": 7, "fp4": 0}


@triton.jit
def _load(x, block, start, count, blocksize, WIDTH: tl.constexpr):
    """A piece of some blocks as floats [blocks, WIDTH], 0 where there is nothing; where it lies, and what of it is there."""
    within = start + tl.arange(0, WIDTH)[None, :]
    index = block[:, None] * blocksize + within
    inside = (within < blocksize) & (index < count)
    return tl.load(x + index, mask=inside, other=0).to(tl.float32), index, inside


@triton.jit
def _quantise(values, absmax, index, inside, table, codes, stored, FORMAT: tl.constexpr, ZERO_CODE: tl.constexpr):
    v = ar.normalise(values, ar.inverse_absmax(absmax)[:, None])
    if FORMAT == "8bit":
        tl.store(codes + index, ar.count_below(v, table, 8, True).to(tl.uint8), mask=inside)
    else:
        code = ar.count_below(v, table, 4, False) if FORMAT == "nf4" else ar.fp4_code(v, table)
        code = tl.where(inside, code, ZERO_CODE)
        first, second = tl.split(tl.reshape(code, [code.shape[0], code.shape[1] // 2, 2]))
        even, _ = tl.split(tl.reshape(index, [code.shape[0], code.shape[1] // 2, 2]))
        tl.store(codes + even // 2, (first << 4 | second).to(tl.uint8), mask=even // 2 < stored)


@triton.jit
def _quantize_kernel(
    x, table, codes, absmaxes, count, blocksize, stored,
    FORMAT: tl.constexpr, ZERO_CODE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``stored``: bytes of 4-bit codes to write, filled up with zero codes. ``WHOLE``: a block is not wider than the tile."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if WHOLE:
        values, index, inside = _load(x, block, 0, count, blocksize, WIDTH)
        absmax = ar.largest_magnitude(tl.max(ar.magnitude_bits(values), axis=1))
        _quantise(values, absmax, index, inside, table, codes, stored, FORMAT, ZERO_CODE)
    else:
        largest = tl.zeros([BLOCKS], dtype=tl.int32)
        for start in range(0, blocksize, WIDTH):
            values, _, _ = _load(x, block, start, count, blocksize, WIDTH)
            largest = tl.maximum(largest, tl.max(ar.magnitude_bits(values), axis=1))
        absmax = ar.largest_magnitude(largest)
        for start in range(0, blocksize, WIDTH):
            values, index, inside = _load(x, block, start, count, blocksize, WIDTH)
            _quantise(values, absmax, index, inside, table, codes, stored, FORMAT, ZERO_CODE)
    tl.store(absmaxes + block, absmax, mask=block * blocksize < count)


def _quantize(x, table, codes, absmax, blocksize, format, zero_code=0):
    count = x.numel()
    blocksize = min(blocksize, max(count, 1)) if format == "8bit" else blocksize
    width = power_of_two(blocksize, 16, _WIDEST)
    tile_blocks = max(_TILE // width, 1)
    launch(
        _quantize_kernel, (ceil_div(absmax.numel(), tile_blocks),), x, table, codes, absmax, count, blocksize, codes.numel(),
        FORMAT=format, ZERO_CODE=zero_code, BLOCKS=tile_blocks, WIDTH=width, WHOLE=blocksize <= width,
    )  # fmt: skip


@operator("quantize_4bit")
def quantize_4bit(A, blocksize, quant_type, quant_storage):
    packed = A.new_empty((packed_length(A.numel(), quant_storage), 1), dtype=quant_storage)
    absmax = A.new_empty(blocks(A.numel(), blocksize), dtype=torch.float32)
    _quantize(A.contiguous(), thresholds(quant_type, A.device), as_bytes(packed), absmax, blocksize, quant_type, _ZERO_CODE[quant_type])
    return packed, absmax


@operator("quantize_blockwise")
def quantize_blockwise(A, code, blocksize):
    codes = torch.empty_like(A, dtype=torch.uint8, memory_format=torch.contiguous_format)
    absmax = A.new_empty(blocks(A.numel(), blocksize), dtype=torch.float32)
    _quantize(A.contiguous(), code.contiguous(), codes, absmax, blocksize, "8bit")
    return codes, absmax


@triton.jit
def _dequantize_blockwise_kernel(codes, absmaxes, table, out, count, blocksize, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    pieces = tl.cdiv(blocksize, WIDTH)
    program = tl.program_id(0)
    block = (program // pieces).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    within = (program % pieces) * WIDTH + tl.arange(0, WIDTH)[None, :]
    index = block[:, None] * blocksize + within
    inside = (within < blocksize) & (index < count)
    absmax = tl.load(absmaxes + block, mask=block * blocksize < count, other=0.0)
    code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
    tl.store(out + index, (tl.load(table + code) * absmax[:, None]).to(out.dtype.element_ty), mask=inside)


def _dequantize_blockwise_into(out, A, absmax, code, blocksize):
    blocksize = min(blocksize, max(A.numel(), 1))
    width = power_of_two(blocksize, 16, _TILE)
    tile_blocks = max(_TILE // width, 1)
    launch(
        _dequantize_blockwise_kernel, (ceil_div(blocks(A.numel(), blocksize), tile_blocks) * ceil_div(blocksize, width),),
        A.contiguous(), absmax.contiguous(), code.contiguous(), out, A.numel(), blocksize, BLOCKS=tile_blocks, WIDTH=width,
    )  # fmt: skip
    return out


@operator("dequantize_blockwise")
def dequantize_blockwise(A, absmax, code, blocksize, dtype):
    return _dequantize_blockwise_into(A.new_empty(A.shape, dtype=dtype), A, absmax, code, blocksize)


@operator("dequantize_blockwise.out")
def dequantize_blockwise_out(A, absmax, code, blocksize, dtype, out):
    written(out, lambda buffer: _dequantize_blockwise_into(buffer, A, absmax, code, blocksize))


@triton.jit
def _dequantize_4bit_kernel(packed, absmaxes, table, out, count, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte * 2 < count
    codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    absmax = tl.load(absmaxes + byte // (BLOCKSIZE // 2), mask=inside, other=0.0)
    values = tl.interleave(tl.load(table + (codes >> 4)) * absmax, tl.load(table + (codes & 15)) * absmax)
    index = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=index < count)


def _dequantize_4bit_into(out, A, absmax, blocksize, quant_type):
    launch(
        _dequantize_4bit_kernel, (ceil_div(out.numel(), 2 * _BYTES),), as_bytes(A), absmax.contiguous(), levels(quant_type, A.device), out,
        out.numel(), BLOCKSIZE=blocksize, BYTES=_BYTES,
    )  # fmt: skip
    return out


@operator("dequantize_4bit")
def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    return _dequantize_4bit_into(A.new_empty(tuple(shape), dtype=dtype), A, absmax, blocksize, quant_type)


@operator("dequantize_4bit.out")
def dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out):
    written(out, lambda buffer: _dequantize_4bit_into(buffer, A, absmax, blocksize, quant_type))
