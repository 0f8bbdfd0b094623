"""Public functions: quantise and dequantise tensors, multiply with quantised weights.

They check what a user can get wrong, manage QuantState, and leave the work to the operators in ``torch.ops.bitsandbytes``.
Names that live in small modules of their own (code tables, QuantState, paging, deprecated functions) are re-exported here.
"""

import copy

import torch
from torch import Tensor

from ._ops import BLOCKSIZES_4BIT, FLOATS, NESTED_BLOCKSIZE, QUANT_TYPES_4BIT, invoke_on_lists
from .cextension import lib
from .codebooks import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map, get_4bit_type  # noqa: F401
from .deprecated import batched_igemm, check_matmul, igemm  # noqa: F401
from .devices import FIRST_CUDA_DEVICE, CUBLAS_Context, _cuda_device_of, _get_tensor_stream, get_ptr, is_on_gpu  # noqa: F401
from .packing import _convert_weight_packed_for_cpu, _convert_weight_packed_for_cpu_inverse, float_absmax  # noqa: F401
from .paging import GlobalPageManager, _mul, elementwise_func, fill, get_paged, prefetch_tensor  # noqa: F401
from .quant_state import QuantState
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict  # noqa: F401

C = 127.0
DEFAULT_BLOCKSIZE_4BIT = 64

# Code tables by name; "dynamic" appears when it is first needed.
name2qmap: dict[str, Tensor] = {}


def _dynamic_code(device: torch.device) -> Tensor:
    """The default 8-bit table on ``device``; a copy, so that no state can change another's."""
    if "dynamic" not in name2qmap:
        name2qmap["dynamic"] = create_dynamic_map().to(device)
    return name2qmap["dynamic"].to(device, copy=True)


def _delivered(result: Tensor, wanted: Tensor | None) -> Tensor:
    """``result``, or the caller's tensor with ``result`` copied into it (converting the dtype)."""
    return result if wanted is None else wanted.copy_(result.view_as(wanted))


def _require_float_input(A: Tensor) -> None:
    if A.dtype not in FLOATS:
        raise ValueError(f"Blockwise quantization only supports 16/32-bit floats, but got {A.dtype}")


def _require_positive(blocksize: int) -> None:
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")


def _require_4bit_format(blocksize: int, quant_type: str) -> None:
    if blocksize not in BLOCKSIZES_4BIT:
        raise ValueError(f"invalid blocksize {blocksize}; choose one of {BLOCKSIZES_4BIT}")
    if quant_type not in QUANT_TYPES_4BIT:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES_4BIT}, got {quant_type!r}")


# ------------------------------------------------------------------------------------------------------------- 8-bit blockwise


def quantize_blockwise(
    A: Tensor, code: Tensor | None = None, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int = 4096, nested: bool = False
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """Quantises to 8 bit: each block of ``blocksize`` consecutive elements is scaled by its largest magnitude, each element becomes the
    index of the nearest entry of ``code``.

    Args:
        A: float16, bfloat16 or float32, any shape.
        code: 256 ascending float32 values; default: the signed dynamic map.
        absmax: float32 [blocks]; receives the statistics.
        out: uint8, A's number of elements; receives the codes.
        nested: quantise the statistics as well, in blocks of the same size.

    Returns:
        uint8 codes of A's shape, and the state that ``dequantize_blockwise`` needs.

    Raises:
        ValueError: block size not positive, or A of another dtype.
    """
    _require_positive(blocksize)
    _require_float_input(A)
    code = _dynamic_code(A.device) if code is None else code.to(A.device, copy=True)
    codes, statistics = torch.ops.bitsandbytes.quantize_blockwise(A, code, blocksize)
    offset = state2 = None
    if nested:
        statistics, offset, state2 = _quantize_statistics(statistics, blocksize)
    state = QuantState(absmax=_delivered(statistics, absmax), code=code, blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return _delivered(codes, out), state


def _quantize_statistics(absmax: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantisation: absmax without its mean as 8-bit codes. Returns codes, mean (0-dim) and the state of the codes."""
    offset = absmax.mean()
    codes, state2 = quantize_blockwise(absmax - offset, blocksize=blocksize)
    return codes, offset, state2


def dequantize_blockwise(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, code: Tensor | None = None, out: Tensor | None = None,
    blocksize: int = 4096, nested: bool = False,
) -> Tensor:  # fmt: skip
    """Undoes ``quantize_blockwise``.

    Args:
        A: uint8 codes.
        quant_state: as returned by ``quantize_blockwise``. Without it ``absmax`` (and ``code``, ``blocksize``) say how, the result is float32.
        out: receives the result.
        nested: ignored; the state knows.

    Raises:
        ValueError: neither state nor absmax, codes that are not uint8, block size not positive.
    """
    if quant_state is None and absmax is None:
        raise ValueError("dequantize_blockwise needs quant_state or absmax")
    if A.dtype != torch.uint8:
        raise ValueError(f"A must hold uint8 codes, got {A.dtype}")
    if quant_state is None:
        code = _dynamic_code(A.device) if code is None else code
        quant_state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    _require_positive(quant_state.blocksize)

    arguments = (A, float_absmax(quant_state), quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype)
    if out is None:
        return torch.ops.bitsandbytes.dequantize_blockwise(*arguments)
    torch.ops.bitsandbytes.dequantize_blockwise.out(*arguments, out=out)
    return out


# ----------------------------------------------------------------------------------------------------------------------- 4 bit


def quantize_4bit(
    A: Tensor, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None, compress_statistics: bool = False,
    quant_type: str = "fp4", quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:  # fmt: skip
    """Quantises to 4 bit, two codes a byte, the first in the high nibble.

    Args:
        A: float16, bfloat16 or float32, any shape.
        absmax, out: receive statistics and packed codes.
        blocksize: elements that share a scale: 32 to 4096, a power of two; default 64.
        compress_statistics: quantise the statistics to 8 bit as well (QLoRA's double quantisation).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are seen as.

    Returns:
        Packed codes, ``quant_storage`` [n, 1], and the state that ``dequantize_4bit`` needs.

    Raises:
        ValueError: block size, type or dtype of A not supported.
    """
    blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    _require_4bit_format(blocksize, quant_type)
    _require_float_input(A)
    packed, statistics = torch.ops.bitsandbytes.quantize_4bit(A, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        statistics, offset, state2 = _quantize_statistics(statistics, NESTED_BLOCKSIZE)
    state = QuantState(
        absmax=_delivered(statistics, absmax),
        shape=A.shape,
        code=get_4bit_type(quant_type, device=A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return _delivered(packed, out), state


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """``quantize_4bit`` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """``quantize_4bit`` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor, quant_state: QuantState | None = None, absmax: Tensor | None = None, out: Tensor | None = None, blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:  # fmt: skip
    """Undoes ``quantize_4bit``.

    Args:
        A: packed codes; a packed tensor laid out as a row ([1, n], the transpose of what ``quantize_4bit`` returns) asks for the transposed
            result, as matrix products with a transposed weight do.
        quant_state: as returned by ``quantize_4bit``; the arguments after it are then ignored, except ``out``.
        absmax, out: both needed without a state; shape and dtype of the result are those of ``out``.

    Returns:
        A tensor of the state's shape and dtype. On the CPU one of 32 MiB or more has storage that cannot be resized: its memory is used again.

    Raises:
        ValueError: arguments missing, or block size, type or dtype not supported.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs quant_state, or else both absmax and out")
        blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        quant_state = QuantState(absmax=absmax, shape=out.shape, dtype=out.dtype, blocksize=blocksize, quant_type=quant_type)
    _require_4bit_format(quant_state.blocksize, quant_state.quant_type)
    if quant_state.dtype not in FLOATS:
        raise ValueError(f"Blockwise dequantization only supports 16/32-bit floats, but got {quant_state.dtype}")
    if getattr(quant_state, "packing_format_for_cpu", False):
        A, quant_state = _canonical(A, quant_state)

    arguments = (A, float_absmax(quant_state), quant_state.blocksize, quant_state.quant_type, quant_state.shape, quant_state.dtype)
    if out is None:
        result = torch.ops.bitsandbytes.dequantize_4bit(*arguments)
    else:
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        result = out
    return result.t() if _is_transposed(A) else result


def _is_transposed(packed: Tensor) -> bool:
    """A packed column has shape [n, 1]; a row of more than one element can only be a transposed column."""
    return packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] > 1


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """``dequantize_4bit`` with quant_type "fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """``dequantize_4bit`` with quant_type "nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False, state: QuantState | None = None
) -> Tensor:  # fmt: skip
    """``A @ weight.T`` for a 4-bit weight.

    Args:
        A: [..., in_features], float16, bfloat16 or float32.
        B: packed weight.
        out: receives the result.
        transposed_A, transposed_B: ignored.
        state: state of the weight, of shape (out_features, in_features).

    Raises:
        ValueError: no state.
    """
    if state is None:
        raise ValueError("gemv_4bit needs the quantization state of B")
    if getattr(state, "packing_format_for_cpu", False):
        B, state = _canonical(B, state)
    arguments = (A, B, state.shape, float_absmax(state), state.code.to(A.device), state.blocksize)
    if out is None:
        return torch.ops.bitsandbytes.gemv_4bit(*arguments)
    torch.ops.bitsandbytes.gemv_4bit.out(*arguments, out=out)
    return out


def _canonical(B: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    """A weight in the published CPU layout, brought back to the canonical one; the caller's objects stay as they are."""
    return _convert_weight_packed_for_cpu_inverse(B, copy.copy(state))


def has_avx512bf16() -> bool:
    """Whether the native library runs here and the CPU multiplies bfloat16 natively."""
    try:
        return bool(lib.has_avx512bf16_cpu())
    except RuntimeError:
        return False


# -------------------------------------------------------------------------------------------------------------------- LLM.int8


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantises the rows of A to int8, each scaled by its largest magnitude (LLM.int8(), Dettmers et al. 2022).

    Args:
        A: float16, bfloat16 or float32, [..., columns]; not modified.
        threshold: if positive, elements of at least this magnitude are outliers: left out of the statistics and of the codes, with their whole
            column when there are several rows.

    Returns:
        int8 codes of A's shape; float32 [rows], the largest magnitude of each row; int64 outlier columns, ascending, or None without threshold.
    """
    return torch.ops.bitsandbytes.int8_vectorwise_quant(A, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Undoes ``int8_vectorwise_quant``: int8 codes and float32 [rows] to float32."""
    return torch.ops.bitsandbytes.int8_vectorwise_dequant(A, stats)


def int8_double_quant(
    A: Tensor, col_stats: Tensor | None = None, row_stats: Tensor | None = None, out_col: Tensor | None = None, out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Quantises A by rows and by columns.

    Returns:
        int8 codes by row, int8 codes by column, float32 [rows], float32 [columns], and int64 outlier columns or None.

    Raises:
        ValueError: one of the pre-allocated buffers of early releases was given; they are not supported.
    """
    for name, buffer in (("col_stats", col_stats), ("row_stats", row_stats), ("out_col", out_col), ("out_row", out_row)):
        if buffer is not None:
            raise ValueError(f"int8_double_quant does not take a pre-allocated {name}; leave it out and use the returned tensors")
    return torch.ops.bitsandbytes.int8_double_quant(A, threshold=threshold)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """Exact integer product ``A @ B.T``: int8 [..., K] and int8 [N, K] to int32 [..., N]. ``dtype`` is ignored."""
    if out is None:
        return torch.ops.bitsandbytes.int8_linear_matmul(A, B)
    torch.ops.bitsandbytes.int8_linear_matmul.out(A, B, out)
    return out


def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Scales an int8 product back: int32 [..., N], float32 [rows], float32 [N] to float16, plus bias."""
    return _delivered(torch.ops.bitsandbytes.int8_mm_dequant(A, row_stats, col_stats, dtype=torch.float16, bias=bias), out)


# ------------------------------------------------------------------------------------------------------------------- optimizers


def optimizer_update_32bit(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, beta1: float, eps: float, step: int, lr: float, state2: Tensor | None = None,
    beta2: float = 0.0, beta3: float = 0.0, alpha: float = 0.0, weight_decay: float = 0.0, gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None, max_unorm: float = 0.0, skip_zeros: bool = False,
) -> None:  # fmt: skip
    """One step of an optimizer with float32 state, in place on ``p`` and the state.

    Args:
        optimizer_name: adam, lamb, ademamix, momentum, lars, lion, rmsprop or adagrad.
        g, p: gradient and parameter, one of float16, bfloat16, float32.
        state1, state2: float32 moments of p's shape; AdEMAMix keeps two in state1.
        step: number of this step, from 1.
        gnorm_scale: factor on the gradient.
        unorm_vec: float32 [1], receives the norm of the update; with ``max_unorm`` the update is kept below that fraction of p's norm.
        skip_zeros: leave elements with a zero gradient alone.
    """
    param_norm = torch.linalg.vector_norm(p, dtype=torch.float32).item() if max_unorm > 0.0 else 0.0
    is_on_gpu([g, p, state1, state2, unorm_vec])
    torch.ops.bitsandbytes.optimizer_update_32bit(
        optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr,
        gnorm_scale, skip_zeros,
    )  # fmt: skip


def optimizer_update_8bit_blockwise(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, beta1: float, beta2: float, beta3: float, alpha: float,
    eps: float, step: int, lr: float, qmap1: Tensor, qmap2: Tensor | None, absmax1: Tensor, absmax2: Tensor | None, weight_decay: float = 0.0,
    gnorm_scale: float = 1.0, skip_zeros: bool = False,
) -> None:  # fmt: skip
    """One step of an optimizer with 8-bit state (blocks of 256), in place. See ``optimizer_update_32bit``; the states are uint8 codes of the
    tables ``qmap1`` and ``qmap2`` with statistics ``absmax1`` and ``absmax2``, float32 [blocks].
    """
    is_on_gpu([g, p, state1, state2, qmap1, qmap2, absmax1, absmax2])
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, weight_decay,
        gnorm_scale, skip_zeros,
    )  # fmt: skip


def optimizer_step(
    p: list[Tensor], g: list[Tensor], moments: list[Tensor], absmax: list[Tensor], qmaps: list[Tensor], unorm: list[Tensor], **settings
) -> None:  # fmt: skip
    """One step of many parameters in place, in one call: what the optimizers of ``bitsandbytes.optim`` do.

    Args:
        p, g: parameters of one dtype, and their gradients.
        moments, absmax, qmaps: the K moments of the first parameter, of the second, ...: float32, or uint8 codes with their statistics, and the
            K code tables.
        unorm: one tensor a parameter with ``max_unorm``, else empty.
        settings: the algorithm and its hyperparameters, named as in the operator ``torch.ops.bitsandbytes.optimizer_step``.
    """
    invoke_on_lists("optimizer_step", (p, g, moments, absmax, qmaps, unorm), **settings)
