"""Products with a quantised weight, undone a tile at a time in registers: forward, out[M, N] = A[M, K] . W[N, K]^T + bias, and backward,
out[M, K] = A[M, N] . W[N, K]. The weight has 4 bits, its statistics may be quantised themselves; the backward product also takes 8 bits.

A program computes a tile [tokens, free] of the result, ``free`` being N forward and K backward, and walks along the other dimension of the weight.
Element (n, k) of the weight is code n K + k of its buffer. A value is level * scale in float32, rounded to the type of the activations where the
tensor cores take that, exactly as dequantisation and a dense product would have it; sums are float32. A single token is multiplied without rounding
the weight.

Bytes moved: the codes once for every ``tokens`` rows of A, A once for every ``free`` columns of the result. Where K is even, two neighbours come in
one byte (``PAIRED``); where K is a multiple of the block size, a tile's row lies in one block and has one scale (``ROW_SCALE``).
"""

import torch
import triton
import triton.language as tl

from ...packing import from_cpu_layout, is_cpu_layout
from . import arithmetic as ar
from .launch import as_bytes, ceil_div, launch, levels, operator


@triton.jit
def _scale(block, inside, absmax, absmax_codes, absmax_table, offset, NESTED: tl.constexpr):
    """The scales of blocks; nested ones are codes in blocks of 256, plus an offset."""
    if NESTED:
        code = tl.load(absmax_codes + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(absmax_table + code) * tl.load(absmax + block // 256, mask=inside, other=0.0)
        scale += tl.load(offset).to(tl.float32)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _weight_4bit(
    codes, table, absmax, absmax_codes, absmax_table, offset, n, k, first_k, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr, ROW_SCALE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    row = n.to(tl.int64)[:, None] * K
    inside = (n < N)[:, None] & (k < K)[None, :]
    if PAIRED:
        pair = first_k // 2 + tl.arange(0, K_TILE // 2)
        byte = tl.load(codes + row // 2 + pair[None, :], mask=(n < N)[:, None] & (pair * 2 < K)[None, :], other=0).to(tl.int32)
        code = tl.interleave(byte >> 4, byte & 15)
    else:
        byte = tl.load(codes + (row + k[None, :]) // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where((row + k[None, :]) % 2 == 0, byte >> 4, byte & 15)
    if ROW_SCALE:
        scale = _scale((row + first_k) // BLOCKSIZE, (n < N)[:, None], absmax, absmax_codes, absmax_table, offset, NESTED)
    else:
        scale = _scale((row + k[None, :]) // BLOCKSIZE, inside, absmax, absmax_codes, absmax_table, offset, NESTED)
    return tl.where(inside, tl.load(table + code) * scale, 0.0)


@triton.jit
def weight_8bit(codes, stats, n, k, inside_n, inside_k, K):
    """A tile of an int8 weight as floats, 0 outside."""
    code = tl.load(codes + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0)
    stat = tl.load(stats + n, mask=inside_n, other=0.0)
    return tl.where(inside_k[None, :], (code.to(tl.float32) * stat[:, None]) * ar.PER_CODE, 0.0)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    a, codes, table, absmax, absmax_codes, absmax_table, offset, bias, out, M, N, K,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr, ROW_SCALE: tl.constexpr, IN_4BIT: tl.constexpr, BACKWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_TOKEN: tl.constexpr, M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    dtype = a.dtype.element_ty
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    n, k = tl.arange(0, N_TILE), tl.arange(0, K_TILE)
    first_k = 0
    if BACKWARD:
        depth = N
        step = N_TILE
        first_k = tl.program_id(1) * K_TILE
        k += first_k
    else:
        depth = K
        step = K_TILE
        n += tl.program_id(1) * N_TILE
    if ONE_TOKEN:
        sums = tl.zeros([N_TILE, K_TILE], dtype=tl.float32)
    else:
        sums = tl.zeros([M_TILE, K_TILE if BACKWARD else N_TILE], dtype=tl.float32)

    for begin in range(0, depth, step):
        d = begin + tl.arange(0, N_TILE if BACKWARD else K_TILE)
        tile_n = d if BACKWARD else n
        tile_k = k if BACKWARD else d
        tile_first_k = first_k if BACKWARD else begin
        if IN_4BIT:
            weight = _weight_4bit(
                codes, table, absmax, absmax_codes, absmax_table, offset, tile_n, tile_k, tile_first_k, N, K,
                BLOCKSIZE, NESTED, PAIRED, ROW_SCALE, K_TILE,
            )  # fmt: skip
        else:
            weight = weight_8bit(codes, absmax, tile_n, tile_k, tile_n < N, tile_k < K, K)
        if ONE_TOKEN:
            activation = tl.load(a + d, mask=d < depth, other=0).to(tl.float32)
            sums += weight * (activation[:, None] if BACKWARD else activation[None, :])
        else:
            activations = tl.load(a + m.to(tl.int64)[:, None] * depth + d[None, :], mask=(m < M)[:, None] & (d < depth)[None, :], other=0)
            weight = weight.to(dtype)
            sums = tl.dot(activations, weight if BACKWARD else tl.trans(weight), sums, input_precision="ieee")

    free = k if BACKWARD else n
    width = K if BACKWARD else N
    result = tl.sum(sums, axis=0 if BACKWARD else 1)[None, :] if ONE_TOKEN else sums
    if HAS_BIAS:
        result += tl.load(bias + free, mask=free < width, other=0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * width + free[None, :]
    tl.store(at, result.to(dtype), mask=(m < M)[:, None] & (free < width)[None, :])


def _tiles(M: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """The tile of a program. One token: many small programs, long stretches of the weight. More: what fits the registers of four warps."""
    if M == 1:
        return dict(M_TILE=1, N_TILE=32, K_TILE=128) if backward else dict(M_TILE=1, N_TILE=8, K_TILE=512)
    tokens = 16 if M <= 16 else 32 if M <= 32 or dtype == torch.float32 else 64
    return dict(M_TILE=tokens, N_TILE=32, K_TILE=64 if backward else 32) if dtype == torch.float32 else dict(M_TILE=tokens, N_TILE=64, K_TILE=64)


def _multiply(A, codes, shape, absmax, *, table=None, blocksize=1, nested=None, bias=None, backward=False):
    """``table``: levels of a 4-bit weight; without it the codes are int8 and ``absmax`` their statistics."""
    N, K = shape
    A, absmax = A.contiguous(), absmax.contiguous()
    absmax_codes, absmax_table, offset = nested or (absmax, absmax, absmax)
    rows, width = A.shape[:-1], K if backward else N
    M = rows.numel()
    out = A.new_empty((*rows, width))
    tiles = _tiles(M, A.dtype, backward)
    row_scale = K % blocksize == 0 and tiles["K_TILE"] <= blocksize
    launch(
        _product_kernel, (ceil_div(M, tiles["M_TILE"]), ceil_div(width, tiles["K_TILE" if backward else "N_TILE"])),
        A, codes, absmax if table is None else table, absmax, absmax_codes, absmax_table, offset, out if bias is None else bias.contiguous(), out,
        M, N, K, BLOCKSIZE=blocksize, NESTED=nested is not None, PAIRED=K % 2 == 0, ROW_SCALE=row_scale, IN_4BIT=table is not None,
        BACKWARD=backward, HAS_BIAS=bias is not None, ONE_TOKEN=M == 1, **tiles, num_stages=2,  # three need more shared memory than most GPUs have
    )  # fmt: skip
    return out


def _nested(absmax_8bit, absmax_code, absmax_offset):
    return None if absmax_8bit is None else (absmax_8bit.contiguous(), absmax_code.contiguous(), absmax_offset)


@operator("gemm_4bit")
def gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    nested = _nested(absmax_8bit, absmax_code, absmax_offset)
    return _multiply(A, as_bytes(B), shapeB, absmax, table=levels(quant_type, A.device), blocksize=blocksize, nested=nested, bias=bias)


@operator("gemm_4bit_backward")
def gemm_4bit_backward(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    nested = _nested(absmax_8bit, absmax_code, absmax_offset)
    return _multiply(A, as_bytes(B), shapeB, absmax, table=levels(quant_type, A.device), blocksize=blocksize, nested=nested, backward=True)


@operator("gemv_4bit")
def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    if is_cpu_layout(absmax):
        B, absmax = from_cpu_layout(B, absmax.view(-1, shapeB[0]), shapeB)
    return _multiply(A, as_bytes(B), shapeB, absmax, table=code.contiguous(), blocksize=blocksize)


@operator("gemv_4bit.out")
def gemv_4bit_out(A, B, shapeB, absmax, code, blocksize, out):
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


@operator("int8_linear_backward")
def int8_linear_backward(grad, CB, SCB):
    return _multiply(grad, CB.contiguous(), CB.shape, SCB, backward=True)
