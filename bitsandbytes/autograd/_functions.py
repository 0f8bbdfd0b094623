"""Matrix products with quantised weights, in 4 and in 8 bit, differentiable in everything that is not quantised."""

from contextlib import nullcontext
from dataclasses import dataclass
import logging
from math import prod  # noqa: F401  (a published name of this module)
import warnings
from warnings import warn  # noqa: F401  (a published name of this module)

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
import torch.nn.functional as torch_functional

from .. import functional as F
from .._ops import FLOATS, NESTED_BLOCKSIZE, invoke
from ..quant_state import QuantState
from ..singleton import Singleton

logger = logging.getLogger(__name__)

_is_compiling = torch.compiler.is_compiling
_autocast_somewhere = torch._C._is_any_autocast_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active


def _may_have_tangents() -> bool:
    return not _is_compiling() and (forward_ad._current_level >= 0 or _are_transforms_active())


def _apply(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)``. Torch's asks ``forward`` for its signature at every call, which takes longer than a small product.

    Compilers, transforms of torch.func and forward mode need it so; for others what stands behind it is called.
    """
    if _is_compiling():
        return function.apply(*args)
    if _may_have_tangents():
        return _IN_FORWARD_MODE.get(function, function).apply(*args)
    args = unwrap_dead_wrappers(args)
    if not torch.is_grad_enabled():  # as in a backward pass that is not itself differentiated
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)


# -------------------------------------------------------------------------------------------------------------------------------------------- 4 bit


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
        ctx.result = (output.shape, output.dtype, output.device)

    @staticmethod
    def backward(ctx, grad):
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            with _without_autocast(grad.device.type):
                weight = _saved_weight(ctx)
                grad_A = _backward_product(grad, *weight) if _is_compiling() else _apply(_InputGradient, grad, *weight)
        if ctx.needs_input_grad[3]:
            grad_bias = _bias_gradient(grad, ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None

    @staticmethod
    def vmap(info, in_dims, A, B, out, bias, quant_state):
        return _mapped_product(MatMul4Bit, info, in_dims, A, B, bias, quant_state)


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
        return _apply(MatMul4Bit, grad, B, None, None, state), None, None

    @staticmethod
    def vmap(info, in_dims, grad, B, quant_state):
        return _apply(_InputGradient, grad.movedim(in_dims[0], 0), B, quant_state), 0


def _save_weight(ctx, B: torch.Tensor, state: QuantState) -> None:
    nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
    _save(ctx, B, state.absmax, *nested)
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
    elif (torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad))) or _may_have_tangents():
        result = _apply(MatMul4Bit, A, B, None, bias, quant_state)
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


# -------------------------------------------------------------------------------------------------------------------------------------------- 8 bit


@dataclass(eq=False)
class MatmulLtState:
    """What ``matmul`` has to know of an int8 weight, besides the weight.

    Fields that are not described here have no meaning any more; they can be set for the sake of programs that do. So can any other attribute.

    Attributes:
        CB: int8 codes of the weight, [out_features, in_features].
        SCB: their scales, float32 [out_features].
        threshold: activations of at least this magnitude are outliers, whose columns are multiplied in floating point; 0: there are none.
        has_fp16_weights: the weight stays in floating point and is quantised for each product, so that it can be trained.
        idx: columns of the latest activations that held outliers, int64, ascending; None before the first product with a threshold.
        is_training: of the layer; for information.
        use_pool: for information.
    """

    force_no_igemmlt: bool = False
    CB: torch.Tensor | None = None
    SB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    SBt: torch.Tensor | None = None
    CBt: torch.Tensor | None = None
    subB: torch.Tensor | None = None
    outlier_pool: "GlobalOutlierPooler | None" = None
    idx: torch.Tensor | None = None

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False

    def reset_grads(self) -> None:
        """Forgets the codes of the weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def __eq__(self, other) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)

    __hash__ = None

    def __getattr__(self, name: str):
        if name in ("CxB", "CxBt", "formatB", "_tile_indices"):
            warnings.warn(f"MatmulLtState.{name} is deprecated and always None: weights have one layout", FutureWarning, stacklevel=2)
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)


def _outlier_columns(state: MatmulLtState) -> torch.Tensor | None:
    """The indices; they are looked up in the mask of columns when somebody asks, because counting them makes a GPU wait."""
    found = state.__dict__.get("idx")
    if found is not None and found.dtype == torch.bool:
        state.__dict__["idx"] = found = found.nonzero().flatten()
    return found


def _set_outlier_columns(state: MatmulLtState, columns: torch.Tensor | None) -> None:
    state.__dict__["idx"] = columns


MatmulLtState.idx = property(_outlier_columns, _set_outlier_columns)  # not in the class, where it would be the field's default


class GlobalOutlierPooler(Singleton):
    """A set of outlier dimensions that layers of one width share. Kept for programs that use it; nothing here does."""

    def _set_up(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        self.outliers = set()
        self.model_dim = None

    def add_outliers(self, outlier_idx: torch.Tensor, feature_dim: int) -> None:
        """Adds indices. The first call decides for which width; those of other widths are ignored."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> torch.Tensor:
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


class MatMul8bitLt(torch.autograd.Function):
    """``A @ W.T + bias`` by LLM.int8(): the rows of A are quantised for the product, outlier columns multiplied in floating point.

    ``apply(A, B, out, bias, state)``; ``out`` is ignored. With codes for B nothing but them is saved for the backward pass: the gradient
    of A is ``grad @ W``, the quantisation of A counting as the identity. With floating-point B (``state.has_fp16_weights``) what is saved
    is B, and A if B wants a gradient; both gradients are those of the floating-point product.
    """

    @staticmethod
    def forward(A, B, out=None, bias=None, state=None):
        codes, scales = _codes_and_scales(B, state)
        threshold = 0.0 if state is None else state.threshold
        result, outliers = invoke("int8_linear", A, codes, scales, bias, threshold)
        if threshold > 0.0 and not _is_compiling():
            state.idx = outliers
        return result

    @staticmethod
    def setup_context(ctx, inputs, output):
        A, B, _, bias, state = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.result = (output.shape, output.dtype, output.device)
        ctx.in_floating_point = _multiplies_floating_point(B, state)
        if not ctx.in_floating_point:
            _save(ctx, *_codes_and_scales(B, state))
        elif _may_have_tangents():
            _save(ctx, A, B)
        else:
            _save(ctx, *(tensor if wanted else None for tensor, wanted in ((A, B.requires_grad), (B, A.requires_grad))))

    @staticmethod
    def backward(ctx, grad):
        grad_A = grad_B = grad_bias = None
        first, second = ctx.saved_tensors
        with _without_autocast(grad.device.type):
            if ctx.needs_input_grad[0] and ctx.in_floating_point:
                grad_A = grad @ second.to(grad.dtype)
            elif ctx.needs_input_grad[0]:
                grad_A = _int8_backward_product(grad, first, second) if _is_compiling() else _apply(_Int8InputGradient, grad, first, second)
            if ctx.needs_input_grad[1] and ctx.in_floating_point:
                grad_B = _rows(grad).t() @ _rows(first).to(grad.dtype)
            if ctx.needs_input_grad[3]:
                grad_bias = _bias_gradient(grad, ctx.bias_dtype)
        return grad_A, grad_B, None, grad_bias, None

    @staticmethod
    def vmap(info, in_dims, A, B, out, bias, state):
        return _mapped_product(MatMul8bitLt, info, in_dims, A, B, bias, state)


class MatMul8bitFp(MatMul8bitLt):
    """As ``MatMul8bitLt``, but the activations stay in floating point: more exact, slower, and ``state.threshold`` has no meaning."""

    @staticmethod
    def forward(A, B, out=None, bias=None, state=None):
        weight = B if _multiplies_floating_point(B, state) else _dense(*_codes_and_scales(B, state))
        return torch_functional.linear(A, weight.to(A.dtype), None if bias is None else bias.to(A.dtype))

    @staticmethod
    def vmap(info, in_dims, A, B, out, bias, state):
        return _mapped_product(MatMul8bitFp, info, in_dims, A, B, bias, state)


class _Int8InputGradient(torch.autograd.Function):
    """``grad @ W``: a function of its own, so that it can be differentiated again. ``apply(grad, codes, scales)``."""

    @staticmethod
    def forward(grad, codes, scales):
        return _int8_backward_product(grad, codes, scales)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return torch_functional.linear(grad, _dense(*ctx.saved_tensors).to(grad.dtype)), None, None

    @staticmethod
    def vmap(info, in_dims, grad, codes, scales):
        return _apply(_Int8InputGradient, grad.movedim(in_dims[0], 0), codes, scales), 0


def _int8_backward_product(grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``grad @ W`` without a gradient."""
    return invoke("int8_linear_backward", grad, codes, scales)


def _dense(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return invoke("int8_vectorwise_dequant", codes, scales)


def _multiplies_floating_point(B: torch.Tensor, state: MatmulLtState | None) -> bool:
    """Whether the weight is B itself and not codes for it."""
    return B.is_floating_point() and (state is None or state.has_fp16_weights)


def _codes_and_scales(B: torch.Tensor, state: MatmulLtState | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantised weight: B if it carries its scales, else what the state holds, else B quantised now.

    Raises:
        RuntimeError: codes without scales.
    """
    if _multiplies_floating_point(B, state):
        codes, scales, _ = invoke("int8_vectorwise_quant", B.detach(), 0.0)
        return codes, scales
    scales = getattr(B, "SCB", None)
    if scales is not None and B.dtype == torch.int8:
        return B, scales
    if state is None or state.CB is None:
        if not B.is_floating_point():
            raise RuntimeError(
                "matmul got an int8 weight without scales; pass a MatmulLtState with CB = the codes and SCB = their scales "
                "(the largest magnitude of each row of the original weight). They cannot be computed from the codes."
            )
        state.CB, state.SCB, _ = invoke("int8_vectorwise_quant", B.detach(), 0.0)
    if state.SCB is None:
        raise RuntimeError("matmul got a MatmulLtState with codes CB but without SCB, their scales, which cannot be computed from the codes")
    return state.CB, state.SCB


def _with_scales_of(B: torch.Tensor, state: MatmulLtState) -> MatmulLtState:
    """A state for B inside a transform, where a parameter is a plain tensor and has lost its scales."""
    scales = getattr(B, "SCB", None)
    if scales is None or B.dtype != torch.int8 or state.CB is not None:
        return state
    complete = MatmulLtState(CB=B.data, SCB=scales)
    complete.threshold = state.threshold
    return complete


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ B.T + bias`` by LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), the same in training and evaluation.

    Under autocast A and bias are cast to its dtype first, as ``torch.nn.functional.linear`` does.

    Args:
        A: [..., in_features], float16, bfloat16 or float32. It is not changed.
        B: [out_features, in_features]: int8 codes, or floating-point values to be quantised.
        out: ignored.
        state: how to multiply, and the codes and scales of a B that does not carry its scales itself (as Int8Params does); see
            ``MatmulLtState``. Default: B is a floating-point weight that can be trained.
        threshold: outlier threshold; a positive one is stored in ``state``.
        bias: [out_features], floating point.

    Returns:
        [..., out_features], dtype of A. Gradients flow to A, bias and a floating-point B.

    Raises:
        TypeError: A of another dtype.
        RuntimeError: sizes that do not fit together; int8 codes without scales.
    """
    if state is None:
        state = MatmulLtState()
    if threshold > 0.0:
        state.threshold = threshold
    if _autocast_somewhere():
        A, bias = _as_autocast_wants(A, bias)
    if A.dtype not in FLOATS:
        raise TypeError(f"matmul takes float16, bfloat16 or float32 activations, got {A.dtype}")
    if _may_have_tangents():
        return _apply(MatMul8bitLt, A, B, None, bias, _with_scales_of(B, state))
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(MatMul8bitLt, A, B, None, bias, state)
    return MatMul8bitLt.forward(A, B, None, bias, state)


# ------------------------------------------------------------------------------------------------------------------------------------- forward mode
#
# Classes of their own, because torch.compile refuses functions that have a jvp.


class _MatMul4BitForward(MatMul4Bit):
    @staticmethod
    def jvp(ctx, A, B, out, bias, quant_state):
        weight, state = _saved_weight(ctx)
        return _sum_of_tangents(ctx.result, None if A is None else _apply(MatMul4Bit, A, weight, None, None, state), bias)


class _InputGradientForward(_InputGradient):
    @staticmethod
    def jvp(ctx, grad, B, quant_state):
        return _apply(_InputGradient, grad, *_saved_weight(ctx))


class _MatMul8bitLtForward(MatMul8bitLt):
    @staticmethod
    def jvp(ctx, A, B, out, bias, state):
        first, second = ctx.saved_tensors
        by_A = by_B = None
        if A is not None:
            weight = second if ctx.in_floating_point else _dense(first, second)
            by_A = torch_functional.linear(A, weight.to(A.dtype))
        if B is not None and ctx.in_floating_point:
            by_B = torch_functional.linear(first, B.to(first.dtype))
        return _sum_of_tangents(ctx.result, by_A, by_B, bias)


class _Int8InputGradientForward(_Int8InputGradient):
    @staticmethod
    def jvp(ctx, grad, codes, scales):
        return _apply(_Int8InputGradient, grad, *ctx.saved_tensors)


_IN_FORWARD_MODE = {
    MatMul4Bit: _MatMul4BitForward,
    _InputGradient: _InputGradientForward,
    MatMul8bitLt: _MatMul8bitLtForward,
    _Int8InputGradient: _Int8InputGradientForward,
}


def _sum_of_tangents(result: tuple[torch.Size, torch.dtype, torch.device], *tangents: torch.Tensor | None) -> torch.Tensor:
    """Of those that there are, like the result."""
    shape, dtype, device = result
    return sum((tangent for tangent in tangents if tangent is not None), torch.zeros((), device=device)).to(dtype).expand(shape)


# ------------------------------------------------------------------------------------------------------------------------------------------- common


def _rows(A: torch.Tensor) -> torch.Tensor:
    return A.unsqueeze(0) if A.dim() == 1 else A.flatten(0, -2)


def _save(ctx, *tensors: torch.Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    if _may_have_tangents():
        ctx.save_for_forward(*tensors)


def _bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _rows(grad).sum(0, dtype=dtype)


def _mapped_product(function: type[torch.autograd.Function], info, in_dims, A, B, bias, state) -> tuple[torch.Tensor, int | None]:
    """``torch.vmap`` of a product: one product with all the rows, and a bias for each of them if that is mapped over too."""
    A_dim, B_dim, _, bias_dim, _ = in_dims
    if B_dim is not None:
        raise NotImplementedError("vmap over a quantised weight is not supported; map over the activations or the bias")
    if A_dim is not None:
        A = A.movedim(A_dim, 0)
    if bias_dim is None:
        return _apply(function, A, B, None, bias, state), (None if A_dim is None else 0)
    product = _apply(function, A, B, None, None, state)
    middle = A.dim() - 1 - (A_dim is not None)
    return product + bias.movedim(bias_dim, 0).reshape(info.batch_size, *[1] * middle, -1), 0


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
