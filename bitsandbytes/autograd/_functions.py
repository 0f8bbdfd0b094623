"""Matrix products with quantised weights, differentiable in everything that is not quantised."""

from contextlib import nullcontext
import logging
import warnings

import torch
import torch.nn.functional as torch_functional

from .. import functional as F
from .._ops import FLOATS, NESTED_BLOCKSIZE, invoke
from ..quant_state import QuantState

logger = logging.getLogger(__name__)

_is_compiling = torch.compiler.is_compiling
_autocast_somewhere = torch._C._is_any_autocast_enabled


class MatMul4Bit(torch.autograd.Function):
    """``A @ W.T + bias`` for a 4-bit weight W, differentiable in A and bias.

    ``apply(A, B, out, bias, quant_state)``; ``out`` is ignored. The backward pass needs no activation: it saves the packed weight with its
    statistics, all of them as saved tensors, so that checkpointing, offloading hooks and the detection of in-place changes see them.
    """

    @staticmethod
    def forward(A, B, out, bias, quant_state):
        return _product(A, B, quant_state, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, B, _, bias, state = inputs
        _save_weight(ctx, B, state)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            with _without_autocast(grad.device.type):
                product = _backward_product if _is_compiling() else _InputGradient.apply
                grad_A = product(grad, *_saved_weight(ctx))
        if ctx.needs_input_grad[3]:
            rows = grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None

    @staticmethod
    def vmap(info, in_dims, A, B, out, bias, quant_state):
        A_dim, B_dim, _, bias_dim, _ = in_dims
        if B_dim is not None:
            raise NotImplementedError("vmap over the packed weight is not supported; map over the activations or the bias")
        if A_dim is not None:
            A = A.movedim(A_dim, 0)
        if bias_dim is None:
            return MatMul4Bit.apply(A, B, None, bias, quant_state), (None if A_dim is None else 0)
        product = MatMul4Bit.apply(A, B, None, None, quant_state)
        middle = A.dim() - 1 - (A_dim is not None)
        return product + bias.movedim(bias_dim, 0).reshape(info.batch_size, *[1] * middle, -1), 0


class _InputGradient(torch.autograd.Function):
    """``grad @ W``: a function of its own, so that it can be differentiated again. ``apply(grad, B, quant_state)``."""

    @staticmethod
    def forward(grad, B, quant_state):
        return _backward_product(grad, B, quant_state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_weight(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        B, state = _saved_weight(ctx)
        return MatMul4Bit.apply(grad, B, None, None, state), None, None

    @staticmethod
    def vmap(info, in_dims, grad, B, quant_state):
        return _InputGradient.apply(grad.movedim(in_dims[0], 0), B, quant_state), 0


def _save_weight(ctx, B: torch.Tensor, state: QuantState) -> None:
    nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
    ctx.save_for_backward(B, state.absmax, *nested)
    ctx.format = (state.shape, state.blocksize, state.quant_type)


def _saved_weight(ctx) -> tuple[torch.Tensor, QuantState]:
    """The packed weight and its state, from what the forward pass saved."""
    B, absmax, *nested = ctx.saved_tensors
    shape, blocksize, quant_type = ctx.format
    offset = state2 = None
    if nested:
        offset, nested_absmax, nested_code = nested
        state2 = QuantState(nested_absmax, code=nested_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    return B, QuantState(absmax, shape=shape, blocksize=blocksize, quant_type=quant_type, offset=offset, state2=state2)


def _product(A: torch.Tensor, B: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor:
    """``A @ W.T + bias`` without a gradient."""
    with torch._C.DisableTorchFunctionSubclass():  # a quantised parameter's own dispatch would cost more than a small product
        if not state.nested:
            return invoke("gemm_4bit", A, B, state.shape, state.absmax, state.blocksize, state.quant_type, bias)
        inner = _inner_state(state)
        return invoke(
            "gemm_4bit", A, B, state.shape, inner.absmax, state.blocksize, state.quant_type, bias, state.absmax, inner.code, state.offset
        )  # fmt: skip


def _backward_product(grad: torch.Tensor, B: torch.Tensor, state: QuantState) -> torch.Tensor:
    """``grad @ W`` without a gradient."""
    with torch._C.DisableTorchFunctionSubclass():
        if not state.nested:
            return invoke("gemm_4bit_backward", grad, B, state.shape, state.absmax, state.blocksize, state.quant_type)
        inner = _inner_state(state)
        return invoke(
            "gemm_4bit_backward", grad, B, state.shape, inner.absmax, state.blocksize, state.quant_type, state.absmax, inner.code, state.offset
        )  # fmt: skip


def _inner_state(state: QuantState) -> QuantState:
    """The state of nested statistics, in the one block size that the operators know."""
    inner = state.state2
    if inner.blocksize != NESTED_BLOCKSIZE:
        raise NotImplementedError(f"nested statistics must be in blocks of {NESTED_BLOCKSIZE}, got {inner.blocksize}")
    return inner


def matmul_4bit(
    A: torch.Tensor, B: torch.Tensor, quant_state: QuantState, out: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """``A @ W.T + bias`` for a 4-bit weight W of shape [out_features, in_features].

    Under autocast A and bias are cast to its dtype first, as ``torch.nn.functional.linear`` does.

    Args:
        A: [..., in_features], float16, bfloat16 or float32.
        B: packed weight as a column [n, 1] or as its transpose [1, n]; any storage dtype.
        quant_state: the state of the weight.
        out: receives a copy of the result and is returned.
        bias: [out_features], dtype of A.

    Returns:
        [..., out_features], dtype of A. Gradients flow to A and bias.

    Raises:
        ValueError: no quant_state, or one of a weight that is not a matrix.
        TypeError: A of another dtype.
        RuntimeError: sizes that do not fit together.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit needs the quant_state of the weight, got None; quantise the weight first")
    shape = quant_state.shape
    if len(shape) != 2:
        raise ValueError(f"matmul_4bit multiplies with matrices; the weight has shape {tuple(shape)}")
    if _autocast_somewhere():
        A, bias = _as_autocast_wants(A, bias)
    if A.dtype not in FLOATS:
        raise TypeError(f"matmul_4bit takes float16, bfloat16 or float32 activations, got {A.dtype}")

    if quant_state.packing_format_for_cpu:
        B, quant_state = F._canonical(B, quant_state)
    sizes = A.shape
    if sizes and sizes[-1] != shape[1] and sizes[-1] == shape[0]:
        result = _product_with_transposed(A, B, quant_state, bias)
    elif torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        result = MatMul4Bit.apply(A, B, None, bias, quant_state)
    else:
        result = _product(A, B, quant_state, bias)
    return result if out is None else out.copy_(result)


def _product_with_transposed(A: torch.Tensor, B: torch.Tensor, state: QuantState, bias: torch.Tensor | None) -> torch.Tensor:
    """The product with a weight that was quantised as [in_features, out_features]: its blocks run the wrong way, so it is dense."""
    if not _is_compiling():
        warnings.warn(
            f"matmul_4bit got a weight quantized as [in_features, out_features] = {list(state.shape)}; this orientation is deprecated and slow. "
            "Re-quantize from the weight laid out as [out_features, in_features].",
            DeprecationWarning,
            stacklevel=3,
        )
    weight = F.dequantize_4bit(_as_column(B), state).to(A.dtype)
    return torch_functional.linear(A, weight.t(), bias)


def _as_column(B: torch.Tensor) -> torch.Tensor:
    return B.reshape(-1, 1)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast wants on this kind of device, or None where it is off."""
    if _autocast_somewhere() and torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _as_autocast_wants(A: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = _autocast_dtype(A.device.type)
    if dtype is None or A.dtype not in FLOATS:
        return A, bias
    return A.to(dtype), None if bias is None else bias.to(dtype)


def _without_autocast(device_type: str):
    """A backward pass computes in the dtype of the gradient, whatever surrounds the call of ``backward``."""
    return nullcontext() if _autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
