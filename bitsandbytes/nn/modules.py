"""Linear layers that keep their weights quantised.

In the published library every layer lives in this module, and programs import from it: what is imported here without a use is for them.
"""

from collections.abc import Callable
from typing import TypeVar
import weakref

import torch
from torch import Tensor, device, dtype, nn  # noqa: F401
import torch.nn.functional as F

import bitsandbytes as bnb

from .._ops import FLOATS
from ..autograd._functions import MatmulLtState, _autocast_dtype
from ..functional import _convert_weight_packed_for_cpu, _convert_weight_packed_for_cpu_inverse, has_avx512bf16  # noqa: F401
from ..optim.manager import GlobalOptimManager  # noqa: F401
from ..quant_state import QuantState  # noqa: F401
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer  # noqa: F401
from . import checkpoint
from .embeddings import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding  # noqa: F401
from .holders import Holds4bitWeight, Holds8bitWeight, described, logger, require_float
from .outlier_aware import OutlierAwareLinear  # noqa: F401
from .parameters import Int8Params, Params4bit

T = TypeVar("T", bound=nn.Module)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_autocast_somewhere = torch._C._is_any_autocast_enabled

# Input dtypes that are computed in as they are, unless the layer or autocast says otherwise.
_COMMON_DTYPES = (torch.bfloat16, torch.float32)


class _QuantisedLinear(nn.Linear):
    """What linear layers with a quantised weight do with a bias, and with a weight that is not quantised after all."""

    _bias_in_training = False  # whether a graph was built with the bias, so that an optimizer may hold it in its present dtype

    def _dtypes_for(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Dtype to compute in and dtype of the result, where these are not simply that of x."""
        require_float(self, x)
        if x.dtype not in FLOATS:
            return torch.float32, x.dtype
        dtype = _autocast_dtype(x.device.type) or x.dtype
        return dtype, dtype

    def _dense_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product with a weight that is not quantised, in full precision."""
        self._warn_about_dense_weight(weight)
        require_float(self, x)
        if _autocast_dtype(x.device.type) is not None:
            return F.linear(x, weight, self.bias)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)

    def _bias_in(self, dtype: torch.dtype, bias: torch.Tensor) -> torch.Tensor:
        """The bias in ``dtype``. Outside of training a bias of another dtype is cast for good; every call would pay for it otherwise."""
        in_training = self._bias_in_training or bias.grad is not None
        if not in_training and bias.requires_grad and _is_grad_enabled() and not _is_compiling():
            self._bias_in_training = True
        if bias.dtype is dtype:
            return bias
        if in_training or type(bias) is not nn.Parameter or _is_compiling() or _autocast_dtype(bias.device.type) is not None:
            return bias.to(dtype)
        with torch.inference_mode(False):
            bias.data = bias.data.to(dtype)
        return bias


# ------------------------------------------------------------------------------------------------------------------ 4-bit layers


def fix_4bit_weight_quant_state_from_module(module: nn.Module) -> None:
    """Gives a weight that lost its quant_state (FSDP replaces parameters by plain ones) the one that the layer remembers.

    Nothing happens if the weight has it. Otherwise a weight that is a plain tensor of packed codes becomes a Params4bit. Warns when the layer
    remembers nothing either.

    Raises:
        RuntimeError: the weight does not hold packed codes, one column.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    state = module.quant_state
    if state is None:
        logger.warning(f"{described(module)}: the weight is not quantised; move the layer to a device (layer.to('cpu'), .to('cuda')) to do so.")
    if weight.dim() != 2 or weight.shape[1] != 1:
        raise RuntimeError(f"{described(module)}: expected packed codes [n, 1], but the weight is {weight.dtype} {list(weight.shape)}")
    if not isinstance(weight, Params4bit):
        weight = Params4bit(weight, quant_storage=module.quant_storage, bnb_quantized=True, module=module)
        module.weight = weight
    if state is not None:
        weight._adopt(state)


class Linear4bit(Holds4bitWeight, _QuantisedLinear):
    """A linear layer whose weight is stored in 4 bit (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

    Construct it, load or copy a floating-point weight, and move it to a device: that quantises. A quantised checkpoint can be loaded at any
    time. While the weight is a plain floating-point matrix the layer computes with that, and says so once.

    Args:
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether there is a bias; it is not quantised.
        compute_dtype: dtype in which products are computed; default: that of the input. Autocast takes precedence.
        compress_statistics: quantise the scales as well (double quantisation).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are seen as; FSDP1 shards floating ones only.
        device: where the floating-point weight is created.
    """

    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True, quant_type="fp4",
        quant_storage=torch.uint8, device=None,
    ):  # fmt: skip
        super().__init__(input_features, output_features, bias, device)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.support_avx512bf16_for_cpu = has_avx512bf16()
        self._hold_in_4bit(compress_statistics, quant_type, quant_storage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies with the weight.

        Args:
            x: [..., in_features]; float16, bfloat16, float32, or float64 (computed in float32 unless ``compute_dtype`` says otherwise).

        Returns:
            [..., out_features] in the dtype of x, under autocast in that of autocast.

        Raises:
            TypeError: x of another dtype.
            RuntimeError: the weight holds packed codes whose statistics were lost.
        """
        weight = self._parameters.get("weight")
        if weight is None:  # parametrised, or replaced by a plain attribute
            weight = self.weight
        quant_state = getattr(weight, "quant_state", None)
        if quant_state is None:
            if self._is_dense(weight):
                return self._dense_forward(x, weight)
            quant_state = self._recovered_state(weight)

        result_dtype = compute_dtype = x.dtype
        if result_dtype not in _COMMON_DTYPES or _autocast_somewhere():
            compute_dtype, result_dtype = self._dtypes_for(x)
        elif self.compute_type_is_set:
            compute_dtype = self.compute_dtype or result_dtype
        if compute_dtype is not x.dtype:
            x = x.to(compute_dtype)
        bias = self._parameters.get("bias")
        if bias is not None and (bias.dtype is not compute_dtype or _is_grad_enabled()):
            bias = self._bias_in(compute_dtype, bias)
        result = bnb.matmul_4bit(x, weight, quant_state, bias=bias)
        return result if compute_dtype is result_dtype else result.to(result_dtype)

    def _dtypes_for(self, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
        compute_dtype, result_dtype = super()._dtypes_for(x)
        if _autocast_dtype(x.device.type) is not None and x.dtype in FLOATS:
            return compute_dtype, result_dtype
        if not self.compute_type_is_set and x.dtype in _COMMON_DTYPES:
            return x.dtype, x.dtype
        if x.dtype is torch.float16 and not self.compute_type_is_set:
            self._warn_about_float16(x)
        return self.compute_dtype or compute_dtype, result_dtype

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Fixes ``compute_dtype`` by an input, for forward methods that others put in place of ours; ours decides at every call."""
        if x.dtype in _COMMON_DTYPES:
            self.compute_dtype = x.dtype
        elif x.dtype is torch.float16:
            self._warn_about_float16(x)

    def _warn_about_float16(self, x: torch.Tensor) -> None:
        if self.compute_dtype in (None, torch.float32):
            purpose = "inference" if x.numel() == x.shape[-1] else "inference or training"
            self._warn_once(
                "float16",
                f"inputs are float16, but compute_dtype is {self.compute_dtype}; "
                f"set compute_dtype (bnb_4bit_compute_dtype) to float16 or bfloat16 for fast {purpose}.",
            )


class LinearFP4(Linear4bit):
    """``Linear4bit`` with quant_type "fp4"."""

    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True, quant_storage=torch.uint8, device=None
    ):  # fmt: skip
        super().__init__(input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)


class LinearNF4(Linear4bit):
    """``Linear4bit`` with quant_type "nf4": levels at quantiles of the normal distribution, the better choice for trained weights."""

    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True, quant_storage=torch.uint8, device=None
    ):  # fmt: skip
        super().__init__(input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)


# ------------------------------------------------------------------------------------------------------------------ 8-bit layers


class LayerState(MatmulLtState):
    """The ``state`` of a Linear8bitLt: how its product is computed, and a view of the codes and scales that its weight holds.

    ``CB`` and ``SCB`` are those of the weight, whichever it is at the moment. Writing them writes to the weight; None changes nothing, for
    there is nothing but the weight to forget.
    """

    def __init__(self, layer: "Linear8bitLt", threshold: float, has_fp16_weights: bool):
        self.threshold = threshold
        self.has_fp16_weights = has_fp16_weights
        self.use_pool = threshold > 0.0 and not has_fp16_weights
        self.bind(layer)

    def bind(self, layer: "Linear8bitLt") -> None:
        self.__dict__["layer"] = weakref.ref(layer)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "layer"}

    def __setstate__(self, state):
        self.__dict__.update(state)


def _view_of_weight(name: str, read: Callable) -> property:
    """``state.<name>`` as ``layer.weight.<name>``; ``read(layer, weight)`` finds it for a weight in a plain tensor as well."""

    def get(state):
        layer = state.__dict__["layer"]()
        return read(layer, layer.weight)

    def set(state, value):
        if value is not None:
            setattr(state.__dict__["layer"]().weight, name, value)

    return property(get, set, lambda state: None)


LayerState.CB = _view_of_weight("CB", lambda layer, weight: getattr(weight, "CB", weight if weight.dtype == torch.int8 else None))
LayerState.SCB = _view_of_weight("SCB", lambda layer, weight: layer._known_scales(weight))


def maybe_rearrange_weight(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
    """A pre-hook for ``load_state_dict`` that checks the layout of an int8 weight and takes ``weight_format`` out of the dict.

    Raises:
        ValueError: it is not the row layout.
    """
    if f"{prefix}weight" in state_dict:
        checkpoint.require_row_format(state_dict.pop(f"{prefix}weight_format", "row"))


class Linear8bitLt(Holds8bitWeight, _QuantisedLinear):
    """A linear layer whose weight is stored in int8, and multiplied by LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).

    Construct it, load or copy a floating-point weight, and move it to a device: that quantises. From then on ``weight`` (int8) and ``weight.SCB``
    (the scales of its rows) are all there is; ``weight.CB``, ``state.CB`` and ``state.SCB`` are other names for them. While the weight is a plain
    floating-point matrix the layer computes with that, and says so once.

    Args:
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether there is a bias; it is not quantised.
        has_fp16_weights: keep the weight in floating point, to train it; each product quantises a copy.
        threshold: activations of at least this magnitude are outliers; their columns are multiplied in floating point. 0: no outliers.
        index: kept as an attribute, without a meaning.
        device: where the floating-point weight is created.
    """

    def __init__(self, input_features, output_features, bias=True, has_fp16_weights=True, threshold=0.0, index=None, device=None):
        super().__init__(input_features, output_features, bias, device)
        self.state = LayerState(self, threshold, has_fp16_weights)
        self.index = index
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies with the weight.

        Args:
            x: [..., in_features]; float16, bfloat16, float32, or float64 (computed in float32).

        Returns:
            [..., out_features] in the dtype of x, under autocast in that of autocast.

        Raises:
            TypeError: x of another dtype.
            RuntimeError: the weight holds int8 codes whose scales were lost.
        """
        weight = self.weight
        if weight.dtype is torch.int8:
            self._scales_of(weight)
        elif not self.state.has_fp16_weights:
            return self._dense_forward(x, weight)

        result_dtype = compute_dtype = x.dtype
        if result_dtype not in FLOATS or _autocast_somewhere():
            compute_dtype, result_dtype = self._dtypes_for(x)
            x = x.to(compute_dtype)
        bias = self._parameters.get("bias")
        if bias is not None and (bias.dtype is not compute_dtype or _is_grad_enabled()):
            bias = self._bias_in(compute_dtype, bias)
        result = bnb.matmul(x, weight, bias=bias, state=self.state)
        return result if compute_dtype is result_dtype else result.to(result_dtype)

    def init_8bit_state(self) -> None:
        """Does nothing: the state is a view of the weight. Kept for programs that call it."""

    def train(self, mode: bool = True) -> "Linear8bitLt":
        self.state.is_training = mode
        return super().train(mode)

    def __setstate__(self, state):
        super().__setstate__(state)
        if not isinstance(self.state, LayerState):  # pickled by the published library: after a forward only the state had the scales
            old, weight = self.state, self.weight
            self.state = LayerState(self, old.threshold, old.has_fp16_weights)
            if weight.dtype == torch.int8 and weight.SCB is None:
                weight.SCB = old.SCB
        self.state.bind(self)
