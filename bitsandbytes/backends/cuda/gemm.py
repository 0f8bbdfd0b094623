"""4-bit matrix products on CUDA.

Up to some hundred tokens a kernel reads the packed weight and multiplies at once; ``gemm_4bit_plan`` says which. Beyond that the weight is
dequantised, a bounded slab at a time, and multiplied by the device's dense product. Nothing here waits for the device, and all memory is the caller's
allocator's: calls can be captured in a CUDA graph.
"""

import functools

import torch

from ..._ops import NESTED_BLOCKSIZE, blocks
from ...packing import is_cpu_layout
from ..default import ops as reference
from ..marshalling import DTYPES, QUANT_TYPES, I, L, P, address, written
from . import native
from .gemm_4bit_plan import KERNELS, Plan, backward_plan, forward_plan, table_of
from .native import bind, kernels
from .ops import dequantize_4bit_into, dequantize_blockwise

_kernel = kernels("bnb_cuda_gemm_4bit")

_gemm_4bit = bind("bnb_cuda_gemm_4bit", *[P] * 9, *[L] * 4, *[I] * 5, P, L)
_gemm_4bit_backward = bind("bnb_cuda_gemm_4bit_backward", *[P] * 7, *[L] * 4, *[I] * 5, P, L)

_ANY_NUMBER_OF_TOKENS = Plan(KERNELS["tiled"], 64, 1)


@functools.cache
def _capability(device_index: int, _library) -> int:
    return _library.bnb_cuda_capability(device_index)


def capability(tensor: torch.Tensor) -> int:
    """10 * major + minor of the tensor's device."""
    return _capability(native._where(tensor)[0], native._library)


@functools.lru_cache(maxsize=1 << 14)
def _suits_tensor_cores(dtype: torch.dtype, rows: int, N: int, K: int, blocksize: int, capability: int) -> bool:
    """What the kernels on tensor cores ask for (csrc/cuda/gemm_4bit_tensor.h); ``rows`` is the length of A's."""
    if dtype is torch.float32 or capability < (80 if dtype is torch.bfloat16 else 75):
        return False
    return K % 32 == 0 and rows % 8 == 0 and N > 0 and K > 0 and max(N, K) <= 1 << 27 and N * K // blocksize < 1 << 31


def _aligned(A: torch.Tensor) -> torch.Tensor:
    """A contiguous, and where vectors can be read from; a copy if it is not."""
    A = A.contiguous()
    return A.clone() if A.data_ptr() % 16 else A


_NOT_NESTED = (None, None, None)


def _nested(absmax_8bit, absmax_code, absmax_offset):
    """Nested statistics as the library takes them: contiguous, the offset in float32."""
    if absmax_8bit is None:
        return _NOT_NESTED
    return absmax_8bit.contiguous(), absmax_code.contiguous(), absmax_offset.float()


def _addresses(nested):
    return _NOT_NESTED if nested is _NOT_NESTED else [tensor.data_ptr() for tensor in nested]


def _partial_sums(like: torch.Tensor, splits: int, count: int):
    """Room for the float sums of each split, or nothing for one."""
    return torch.empty(splits * count, dtype=torch.float32, device=like.device) if splits > 1 else None


def _run_forward(out, A, B, M, shapeB, absmax, blocksize, quant_type, levels, bias, nested, plan) -> None:
    N, K = shapeB
    splits = plan.splits
    partial = None if splits == 1 else torch.empty(splits * M * N, dtype=torch.float32, device=A.device)
    _gemm_4bit(
        A, A.data_ptr(), B.data_ptr(), absmax.data_ptr(), *_addresses(nested), address(levels), address(bias), out.data_ptr(),
        M, N, K, blocksize, QUANT_TYPES[quant_type], DTYPES[A.dtype], *plan, address(partial), 0 if partial is None else partial.numel(),
    )  # fmt: skip


@_kernel("gemm_4bit")
def gemm_4bit(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):  # fmt: skip
    N, K = shapeB
    rows = A.shape[:-1]
    M = rows.numel()
    A, B, absmax = _aligned(A), B.contiguous(), absmax.contiguous()
    bias = None if bias is None else bias.contiguous()
    nested = _nested(absmax_8bit, absmax_code, absmax_offset)
    arch = capability(A)
    on_tensor_cores = B.data_ptr() % 16 == 0 and _suits_tensor_cores(A.dtype, K, N, K, blocksize, arch)
    plan = forward_plan(arch, on_tensor_cores, M, N, K)
    out = torch.empty((*rows, N), dtype=A.dtype, device=A.device)
    if plan is not None:
        _run_forward(out, A, B, M, shapeB, absmax, blocksize, quant_type, None, bias, nested, plan)
    elif out.numel():
        _multiply_slabs(out.view(M, N), A.view(M, K), _Weight(B, (N, K), absmax, blocksize, quant_type, nested), bias, table_of(arch)["slab_bytes"])
    return out


@_kernel("gemm_4bit_backward")
def gemm_4bit_backward(A, B, shapeB, absmax, blocksize, quant_type, absmax_8bit=None, absmax_code=None, absmax_offset=None):
    N, K = shapeB
    rows = A.shape[:-1]
    M = rows.numel()
    A, B, absmax = _aligned(A), B.contiguous(), absmax.contiguous()
    nested = _nested(absmax_8bit, absmax_code, absmax_offset)
    arch = capability(A)
    on_tensor_cores = arch >= 80 and B.data_ptr() % 16 == 0 and _suits_tensor_cores(A.dtype, N, N, K, blocksize, arch)
    plan = backward_plan(arch, on_tensor_cores, M, N, K)
    out = torch.empty((*rows, K), dtype=A.dtype, device=A.device)
    if plan is not None:
        partial = _partial_sums(A, plan.splits, M * K)
        _gemm_4bit_backward(
            A, A.data_ptr(), B.data_ptr(), absmax.data_ptr(), *_addresses(nested), out.data_ptr(), M, N, K, blocksize, QUANT_TYPES[quant_type],
            DTYPES[A.dtype], *plan, address(partial), partial.numel() if partial is not None else 0,
        )  # fmt: skip
    elif out.numel():
        weight = _Weight(B, (N, K), absmax, blocksize, quant_type, nested)
        _multiply_slabs_backward(out.view(M, K), A.view(M, N), weight, table_of(arch)["slab_bytes"])
    return out


def _gemv_into(out, A, B, shapeB, absmax, code, blocksize):
    """The product with the caller's 16 levels, which stay on the device: to look at them would be to wait for it."""
    N, K = shapeB
    A, B, absmax, code = _aligned(A), B.contiguous(), absmax.contiguous(), code.contiguous()
    arch, M = capability(A), A.shape[:-1].numel()
    plan = forward_plan(arch, _suits_tensor_cores(A.dtype, K, N, K, blocksize, arch), M, N, K) or _ANY_NUMBER_OF_TOKENS
    _run_forward(out, A, B, M, shapeB, absmax, blocksize, "nf4", code, None, _NOT_NESTED, plan)
    return out


@_kernel("gemv_4bit")
def gemv_4bit(A, B, shapeB, absmax, code, blocksize):
    if is_cpu_layout(absmax):
        return reference.gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    return _gemv_into(torch.empty((*A.shape[:-1], shapeB[0]), dtype=A.dtype, device=A.device), A, B, shapeB, absmax, code, blocksize)


@_kernel("gemv_4bit.out")
def gemv_4bit_out(A, B, shapeB, absmax, code, blocksize, out):
    if is_cpu_layout(absmax):
        out.copy_(reference.gemv_4bit(A, B, shapeB, absmax, code, blocksize))
    else:
        written(out, lambda buffer: _gemv_into(buffer, A, B, shapeB, absmax, code, blocksize))


# ---------------------------------------------------------------------------------------------------------------- dense, in slabs


class _Weight:
    """A packed weight [N, K] of which parts are dequantised: all of it, or rows or columns whose blocks are whole."""

    def __init__(self, B, shape, absmax, blocksize, quant_type, nested):
        self.packed, self.shape, self.absmax, self.blocksize, self.quant_type, self.nested = B, shape, absmax, blocksize, quant_type, nested

    @property
    def has_whole_blocks(self) -> bool:
        """Whether no block reaches from one row into the next."""
        return self.shape[1] % self.blocksize == 0

    @functools.cached_property
    def scales(self) -> torch.Tensor:
        """float32 [N, blocks of a row]."""
        codes, table, offset = self.nested
        count = blocks(self.shape[0] * self.shape[1], self.blocksize)
        if codes is None:
            flat = self.absmax.view(-1)[:count]
        else:
            flat = dequantize_blockwise(codes.view(-1)[:count], self.absmax, table, NESTED_BLOCKSIZE, torch.float32).add_(offset)
        return flat.view(self.shape[0], -1)

    @functools.cached_property
    def bytes(self) -> torch.Tensor:
        """uint8 [N, K / 2]."""
        N, K = self.shape
        return self.packed.view(-1).view(torch.uint8)[: N * K // 2].view(N, K // 2)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        return dequantize_4bit_into(out, self.packed, self.absmax, self.blocksize, self.quant_type, *self.nested)

    def dense_part(self, rows: slice, columns: slice, buffer: torch.Tensor) -> torch.Tensor:
        """Dequantises a rectangle of whole blocks into the beginning of ``buffer``."""
        packed = self.bytes[rows, columns.start // 2 : columns.stop // 2].contiguous()
        scales = self.scales[rows, columns.start // self.blocksize : columns.stop // self.blocksize].contiguous()
        out = buffer[: 2 * packed.numel()].view(packed.shape[0], -1)
        return dequantize_4bit_into(out, packed, scales, self.blocksize, self.quant_type)


def _slabs(size: int, multiple: int, others: int, dtype: torch.dtype, slab_bytes: int) -> list[slice]:
    """Cuts ``size`` rows or columns of ``others`` elements each into slabs of at most ``slab_bytes``, but of one ``multiple`` at least."""
    step = max(slab_bytes // (others * dtype.itemsize) // multiple, 1) * multiple
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]


@torch.no_grad()
def _multiply_slabs(out, A, weight, bias, slab_bytes) -> None:
    N, K = weight.shape
    slabs = _slabs(N, 1, max(K, 1), A.dtype, slab_bytes) if weight.has_whole_blocks else [slice(0, N)]
    if len(slabs) == 1:
        _linear_into(out, A, weight.dense(A.dtype), bias)
        return
    buffer = torch.empty(slabs[0].stop * K, dtype=A.dtype, device=A.device)
    for rows in slabs:
        part = weight.dense_part(rows, slice(0, K), buffer)
        _linear_into(out[:, rows], A, part, None if bias is None else bias[rows])


def _linear_into(out, A, W, bias) -> None:
    if bias is None:
        torch.mm(A, W.t(), out=out)
    else:
        torch.addmm(bias, A, W.t(), out=out)


@torch.no_grad()
def _multiply_slabs_backward(out, A, weight, slab_bytes) -> None:
    """Slabs are columns of the weight: each makes its columns of the result, and no sum is rounded on the way."""
    N, K = weight.shape
    slabs = _slabs(K, weight.blocksize, max(N, 1), A.dtype, slab_bytes) if weight.has_whole_blocks else [slice(0, K)]
    if len(slabs) == 1:
        torch.mm(A, weight.dense(A.dtype), out=out)
        return
    buffer = torch.empty(N * slabs[0].stop, dtype=A.dtype, device=A.device)
    for columns in slabs:
        torch.mm(A, weight.dense_part(slice(0, N), columns, buffer), out=out[:, columns])
