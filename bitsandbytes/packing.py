"""The published library's CPU layout of a 4-bit weight, for weights and states that arrive in it.

Our kernels read the canonical layout; nothing here runs unless the caller brings the other one: a state flagged ``packing_format_for_cpu``,
or bfloat16 statistics handed to the ``gemv_4bit`` operator. The layout of a weight with N rows (a multiple of 32) and K columns (even):
uint8 [N, K / 2] where, flat, byte ((n0 * K / 2) + k2) * 32 + j holds in its low nibble the code of row 32 n0 + j // 2, column 2 k2 + j % 2,
and in its high nibble the code sixteen rows further down. Its absmax is bfloat16 [K / blocksize, N].
"""

import torch

from .codebooks import ZERO_CODE
from .quant_state import QuantState

ROWS = 32
_HALF = ROWS // 2


def is_cpu_layout(absmax: torch.Tensor) -> bool:
    """Whether the statistics of a weight say that it is in the CPU layout: canonical ones are float32."""
    return absmax.dtype == torch.bfloat16


def require_layout_holds(shape, blocksize: int) -> None:
    """Raises ValueError where a weight of ``shape`` cannot be brought into the layout."""
    if len(shape) != 2 or shape[0] % ROWS or shape[1] % 2 or shape[1] % blocksize:
        raise ValueError(
            f"the CPU layout holds weights whose rows are a multiple of {ROWS} and whose columns are even and a multiple of the blocksize "
            f"({blocksize}); got shape {tuple(shape)}"
        )


def to_cpu_layout(packed: torch.Tensor, absmax: torch.Tensor, shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical bytes (any storage dtype) and float32 absmax to the CPU layout."""
    rows, columns = shape
    flat = packed.contiguous().view(-1).view(torch.uint8)[: rows * columns // 2]
    codes = torch.stack((flat >> 4, flat & 15), dim=1).view(rows // ROWS, 2, _HALF, columns // 2, 2).permute(0, 3, 2, 4, 1)
    in_layout = (codes[..., 0] | codes[..., 1] << 4).reshape(rows, columns // 2)
    return in_layout, absmax.view(rows, -1).t().to(torch.bfloat16).contiguous()


def from_cpu_layout(in_layout: torch.Tensor, absmax: torch.Tensor, shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of ``to_cpu_layout``: canonical uint8 [N * K / 2], and the bfloat16 statistics as float32 [blocks]."""
    rows, columns = shape
    groups = in_layout.contiguous().view(rows // ROWS, columns // 2, _HALF, 2)
    codes = torch.stack((groups & 15, groups >> 4), dim=1).permute(0, 1, 3, 2, 4).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax.t().float().reshape(-1)


def _convert_weight_packed_for_cpu(qweight: torch.Tensor, quant_state: QuantState) -> tuple[torch.Tensor, QuantState]:
    """Brings a canonical weight into the CPU layout.

    Args:
        qweight: packed codes, any storage dtype.
        quant_state: its state; changed in place. The exact statistics are kept aside in it, so the way back loses nothing.

    Returns:
        uint8 [N, K / 2], and the same state.

    Raises:
        ValueError: the layout cannot hold a weight of this shape.
    """
    require_layout_holds(quant_state.shape, quant_state.blocksize)
    in_layout, absmax = to_cpu_layout(qweight, float_absmax(quant_state), quant_state.shape)
    quant_state.original_statistics = (quant_state.absmax, quant_state.offset, quant_state.state2)
    quant_state.original_dtype = quant_state.dtype
    quant_state.original_nested = quant_state.nested
    quant_state.original_qshape = qweight.shape
    quant_state.original_storage_type = qweight.dtype
    quant_state.absmax, quant_state.offset, quant_state.state2, quant_state.nested = absmax, None, None, False
    quant_state.dtype = torch.bfloat16
    quant_state.packing_format_for_cpu = True
    return in_layout, quant_state


def _convert_weight_packed_for_cpu_inverse(packed_weight: torch.Tensor, quant_state: QuantState) -> tuple[torch.Tensor, QuantState]:
    """Undoes ``_convert_weight_packed_for_cpu``; the state is changed in place.

    A state that was packed elsewhere and kept only its bfloat16 statistics gets those back as float32, not nested.

    Raises:
        ValueError: the state is not flagged as packed, or weight and state do not fit together.
    """
    if not getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("this quantization state is not in the CPU layout")
    shape = torch.Size(quant_state.shape)
    require_layout_holds(shape, quant_state.blocksize)
    if packed_weight.dtype != torch.uint8 or packed_weight.numel() * 2 != shape.numel():
        raise ValueError(f"expected {shape.numel() // 2} uint8 bytes for shape {tuple(shape)}, got {packed_weight.numel()} {packed_weight.dtype}")
    if quant_state.absmax.numel() * quant_state.blocksize != shape.numel():
        raise ValueError(f"expected {shape.numel() // quant_state.blocksize} statistics, got {quant_state.absmax.numel()}")

    canonical, absmax = from_cpu_layout(packed_weight, quant_state.absmax, shape)
    storage = getattr(quant_state, "original_storage_type", torch.uint8)
    canonical = _filled_up(canonical, storage, quant_state.quant_type).view(getattr(quant_state, "original_qshape", (-1, 1)))
    kept = quant_state.__dict__.pop("original_statistics", (absmax, None, None))
    quant_state.absmax, quant_state.offset, quant_state.state2 = kept
    quant_state.nested = quant_state.state2 is not None
    quant_state.dtype = getattr(quant_state, "original_dtype", torch.bfloat16)
    quant_state.packing_format_for_cpu = False
    return canonical, quant_state


def _filled_up(packed_bytes: torch.Tensor, storage: torch.dtype, quant_type: str) -> torch.Tensor:
    """Bytes seen as ``storage``, the last element filled up with zero codes as ``quantize_4bit`` does."""
    missing = -packed_bytes.numel() % storage.itemsize
    zero = ZERO_CODE[quant_type]
    return torch.nn.functional.pad(packed_bytes, (0, missing), value=zero << 4 | zero).view(storage)


def float_absmax(state: QuantState) -> torch.Tensor:
    """The statistics of a state, float32, with double quantisation undone."""
    if not state.nested:
        return state.absmax
    inner = state.state2
    codes_undone = torch.ops.bitsandbytes.dequantize_blockwise(state.absmax, inner.absmax, inner.code, inner.blocksize, torch.float32)
    return codes_undone + state.offset.float()
