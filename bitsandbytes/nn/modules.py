"""Quantised parameters and the layers that compute with them."""

import copy
import logging
from math import prod
import weakref

import torch
from torch import nn
import torch.nn.functional as F

import bitsandbytes as bnb

from .. import functional
from .._ops import FLOATS, packed_length
from ..autograd._functions import _autocast_dtype
from ..quant_state import QuantState
from . import checkpoint, dispatch

logger = logging.getLogger(__name__)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_autocast_somewhere = torch._C._is_any_autocast_enabled

# Input dtypes that are computed in as they are, unless the layer or autocast says otherwise.
_COMMON_DTYPES = (torch.bfloat16, torch.float32)


# -------------------------------------------------------------------------------------------------------------- 4-bit parameters


def _statistic(name: str, path: str | None = None) -> property:
    """A read-only attribute that lives in the quant_state, under ``path``; absent (AttributeError) where the path ends early."""

    def get(self):
        value = self.quant_state
        for step in (path or name).split("."):
            if value is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}: it has no such statistics")
            value = getattr(value, step)
        return value

    return property(get)


class Params4bit(nn.Parameter):
    """A weight that is quantised to 4 bit when it first moves to a device.

    Before that it is an ordinary floating-point parameter that carries the recipe. Afterwards ``data`` holds the packed codes, ``quant_state``
    everything else, and products with it (``F.linear``, ``@``, ...) take the 4-bit path. The attributes live in ``__dict__`` under the names
    of the constructor's arguments, so that ``Params4bit(value, **old.__dict__)`` makes another one of the same kind.

    Args:
        data: floating-point values of any shape, or packed codes if ``quant_state`` describes such. Default: empty.
        requires_grad: as for ``nn.Parameter``; packed codes in integer storage cannot require a gradient.
        quant_state: state of packed ``data``. It is dropped when ``data`` are evidently the dense values.
        blocksize: elements that share a scale; default 64.
        compress_statistics: quantise the scales as well (double quantisation).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are seen as.
        module: layer that owns the parameter; told about the quant_state. Held weakly.
        bnb_quantized: ``data`` are packed. With a ``quant_state`` at hand, that decides instead.
        kwargs: ignored.
    """

    def __new__(
        cls, data=None, requires_grad=False, quant_state=None, blocksize=None, compress_statistics=True, quant_type="fp4",
        quant_storage=torch.uint8, module=None, bnb_quantized=False, **kwargs,
    ):  # fmt: skip
        data = torch.empty(0) if data is None else data
        packed = _are_packed(data, quant_state, bnb_quantized)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state if packed else None
        self.quant_storage = quant_storage
        self.bnb_quantized = packed
        self.module = module
        return self

    absmax = _statistic("absmax")
    code = _statistic("code")
    quant_map = _statistic("quant_map", "code")
    offset = _statistic("offset")
    state2 = _statistic("state2")
    nested_absmax = _statistic("nested_absmax", "state2.absmax")
    nested_blocksize = _statistic("nested_blocksize", "state2.blocksize")
    nested_quant_map = _statistic("nested_quant_map", "state2.code")
    nested_dtype = _statistic("nested_dtype", "state2.dtype")
    nested_offset = _statistic("nested_offset", "offset")

    @property
    def module(self) -> nn.Module | None:
        """The layer that owns this parameter, if it is alive."""
        owner = self.__dict__.get("module")
        return owner() if isinstance(owner, weakref.ref) else owner

    @module.setter
    def module(self, owner) -> None:
        self.__dict__["module"] = weakref.ref(owner) if isinstance(owner, nn.Module) else owner

    @classmethod
    def from_prequantized(cls, data, quantized_stats, requires_grad=False, device="cuda", module=None, **kwargs) -> "Params4bit":
        """A parameter from packed codes and their statistics, as a checkpoint holds them.

        Args:
            data: packed codes.
            quantized_stats: entries of ``QuantState.as_dict``, any prefix; not changed.
            device: where the parameter goes.
            module: layer that will own it; its ``quant_state`` is set.

        Raises:
            ValueError: statistics that are incomplete, or do not belong to ``data``.
        """
        data = data.to(device)
        state = QuantState.from_dict(quantized_stats, device=data.device)
        checkpoint.require_consistent(data, state)
        self = cls(data, requires_grad, bnb_quantized=True, module=module)
        self._adopt(state)
        return self

    # ---------------------------------------------------------------------------------------------------- quantising and moving

    def _adopt(self, state: QuantState) -> None:
        """Takes ``state`` as the description of ``data``, and lets the owner know."""
        self.quant_state = state
        self.bnb_quantized = True
        self.blocksize, self.quant_type, self.compress_statistics = state.blocksize, state.quant_type, state.nested
        self.quant_storage = self.data.dtype
        if self.module is not None:
            self.module.quant_state = state

    def _quantize(self, device) -> "Params4bit":
        """Quantises in place, on ``device``."""
        if self.is_meta:
            raise NotImplementedError(
                f"cannot quantise a weight on the meta device: it has no data. Load a checkpoint first, with "
                f"load_state_dict(..., assign=True), or call to_empty(device={str(device)!r}) and fill it."
            )
        if not self.is_floating_point():
            raise RuntimeError(
                f"this weight holds {self.dtype} data but no quant_state: quantising packed codes again would destroy it. Load it with its "
                "statistics (load_state_dict with the full checkpoint, or Params4bit.from_prequantized)."
            )
        values = self.data.contiguous().to(device)
        packed, state = functional.quantize_4bit(
            values if values.dtype in FLOATS else values.to(torch.float32),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self._adopt(state)
        return self

    def to(self, *args, **kwargs) -> "Params4bit":
        """Quantises, moves or casts; takes the arguments of ``Tensor.to``.

        A weight that is not quantised yet is quantised **in place** when a device is named (other than "meta"), wherever it is; dtype and
        non_blocking are then ignored. In every other case the result is a new parameter and this one stays as it is: floating values are
        moved and cast; packed codes are moved with their statistics, and a dtype only changes what dequantisation returns. On the meta device
        a quantised weight keeps its statistics, so that loading its bytes brings it back.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if _are_packed(self, self.quant_state, self.bnb_quantized):
            return self._moved(device, dtype, non_blocking)
        if device is not None and device.type != "meta":
            return self._quantize(device)
        return self._with(self.data.to(device, dtype, non_blocking))

    def _moved(self, device, dtype, non_blocking) -> "Params4bit":
        data, state = self.data, self.quant_state
        if state is not None and state.packing_format_for_cpu and device is not None and device.type not in ("cpu", "meta"):
            data, state = functional._canonical(data, state)
        if device is not None:
            data = data.to(device, non_blocking=non_blocking)
        if state is not None:
            state = _state_on(state, device)
            state = state if dtype is None else _state_for(state, dtype)
        return self._with(data, quant_state=state, bnb_quantized=True)

    def _with(self, data: torch.Tensor, **changes) -> "Params4bit":
        """A parameter like this one, around other data, not owned by a layer."""
        return type(self)(data, **{**self.__dict__, "module": None, "requires_grad": self.requires_grad, **changes})

    def cpu(self):
        return self.to(device="cpu")

    def cuda(self, device=None, non_blocking=False):
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device=None, non_blocking=False):
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def half(self):
        return self.to(torch.float16)

    def bfloat16(self):
        return self.to(torch.bfloat16)

    def float(self):
        return self.to(torch.float32)

    def double(self):
        return self.to(torch.float64)

    def share_memory_(self):
        """Moves the data, and the statistics of a quantised weight, to shared memory."""
        super().share_memory_()
        state = self.quant_state
        while state is not None:
            for tensor in (state.absmax, state.code, state.offset):
                if tensor is not None:
                    tensor.share_memory_()
            state = state.state2
        return self

    def dequantize(self) -> torch.Tensor:
        """The dense values, in ``quant_state.dtype``; of a weight that is not quantised, its data."""
        return self.data if self.quant_state is None else functional.dequantize_4bit(self.data.reshape(-1, 1), self.quant_state)

    # --------------------------------------------------------------------------------------------------------- copying and saving

    def __deepcopy__(self, memo):
        attributes = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name != "module"}
        result = type(self)(self.data.clone(), self.requires_grad)
        result.__dict__.update(attributes)  # the layer that is being copied, if any, claims the copy
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol):
        state = self.__getstate__()
        return type(self), (state["data"], state["requires_grad"]), state

    def __getstate__(self):
        return {**self.__dict__, "module": None, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state):
        state = dict(state)
        self.data = state.pop("data")
        self.requires_grad = state.pop("requires_grad")
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return dispatch.call(func, args, kwargs or {})


def _are_packed(data: torch.Tensor, state: QuantState | None, flagged: bool) -> bool:
    """Whether ``data`` are the codes that ``state`` describes, and not values yet to be quantised.

    The flag alone is not to be trusted: callers pass on that of an older parameter together with dense values, or forget it.
    """
    if state is None or state.shape is None:
        return flagged
    if not data.is_floating_point():
        return True
    if data.shape == torch.Size(state.shape):
        return False
    return flagged or data.numel() == packed_length(prod(state.shape), data.dtype)


def _state_on(state: QuantState, device: torch.device | None) -> QuantState:
    """``state`` on ``device``. On meta it stays where it is: small, and not to be had again from anywhere else."""
    if device is None or device.type == "meta" or state.absmax.device == device:
        return state
    if "to" in vars(state):  # replaced on the object, by FSDP recipes that decide themselves what moves
        state.to(device)
        return state
    return state.moved_to(device)


def _state_for(state: QuantState, dtype: torch.dtype) -> QuantState:
    """``state`` with another dtype for dequantised values; float32 stands in for wider ones."""
    if not dtype.is_floating_point:
        raise TypeError(f"packed 4-bit codes cannot be cast to {dtype}; dequantize() the weight first")
    state = copy.copy(state)
    state.dtype = dtype if dtype in FLOATS else torch.float32
    return state


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
        logger.warning(f"{_described(module)}: the weight is not quantised; move the layer to a device (layer.to('cpu'), .to('cuda')) to do so.")
    if weight.dim() != 2 or weight.shape[1] != 1:
        raise RuntimeError(f"{_described(module)}: expected packed codes [n, 1], but the weight is {weight.dtype} {list(weight.shape)}")
    if not isinstance(weight, Params4bit):
        weight = Params4bit(weight, quant_storage=module.quant_storage, bnb_quantized=True, module=module)
        module.weight = weight
    if state is not None:
        weight._adopt(state)


def _described(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def _require_float(module: nn.Module, x: torch.Tensor) -> None:
    if x.dtype not in FLOATS and x.dtype is not torch.float64:
        raise TypeError(f"{_described(module)} takes float16, bfloat16, float32 or float64 inputs, got {x.dtype}")


class _Holds4bitWeight:
    """What layers with a 4-bit ``weight`` share: they remember its quant_state, move it, save and load it."""

    @property
    def quant_state(self) -> QuantState | None:
        """The state of the weight; None while it is not quantised. Survives the weight's being replaced by a plain packed tensor."""
        state = getattr(self.weight, "quant_state", None)
        return state if state is not None or self._is_dense(self.weight) else self.__dict__.get("quant_state")

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["quant_state"] = state

    @property
    def _dense_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _is_dense(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` holds plain values rather than packed codes."""
        return weight.is_floating_point() and tuple(weight.shape) == self._dense_shape

    def _recipe(self) -> dict:
        """How the weight is, or is going to be, quantised: arguments for Params4bit."""
        state = self.quant_state
        if state is None:
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            return {name: getattr(self.weight, name) for name in names if hasattr(self.weight, name)}
        return {
            "blocksize": state.blocksize,
            "compress_statistics": state.nested,
            "quant_type": state.quant_type,
            "quant_storage": self.weight.dtype,
        }

    def _new_weight(self, data: torch.Tensor, **attributes) -> Params4bit:
        """A weight for this layer, not yet in place."""
        return Params4bit(data, **self._recipe(), **attributes)

    def _take_weight(self, loaded: Params4bit, assign: bool) -> None:
        """Puts a loaded weight in place: as the new parameter, or into the present one so that whoever shares it sees it."""
        weight = self.weight
        if assign or weight.is_meta or not isinstance(weight, Params4bit):
            loaded.module = self
            self.weight = weight = loaded
        elif weight.shape == loaded.shape and weight.dtype == loaded.dtype:
            with torch.no_grad():
                weight.copy_(loaded.data)
        else:
            weight.requires_grad_(weight.requires_grad and loaded.is_floating_point())
            weight.data = loaded.data
        if loaded.quant_state is not None:
            weight._adopt(loaded.quant_state)
            self.quant_state = loaded.quant_state

    def _apply(self, fn, recurse=True):
        # nn.Module moves tensors; it knows nothing of their statistics, and where it cannot move in place it makes a plain Parameter.
        weight, kept = self._parameters.get("weight"), None

        def move(tensor):
            nonlocal kept
            moved = fn(tensor)
            if tensor is weight and isinstance(weight, Params4bit):
                kept = {**weight.__dict__, "quant_state": getattr(moved, "quant_state", weight.quant_state)}
                moved = moved.data
            return moved

        super()._apply(move, recurse)
        if kept is not None:
            weight = self._parameters["weight"]
            if not isinstance(weight, Params4bit):
                self.weight = weight = Params4bit(weight.data, **{**kept, "requires_grad": weight.requires_grad})
            self.quant_state = weight.quant_state = kept["quant_state"]
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        weight = self._parameters["weight"]
        if hasattr(weight, "quant_state") and not isinstance(weight, Params4bit):  # pickled by the published library, which loses the class
            self.weight = weight = Params4bit(weight.data, **{**weight.__dict__, "requires_grad": weight.requires_grad})
        if isinstance(weight, Params4bit):
            weight.module = self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        checkpoint.save_4bit(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args):
        checkpoint.load(self, super()._load_from_state_dict, checkpoint.read_4bit, *args)


class Linear4bit(_Holds4bitWeight, nn.Linear):
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
        quant_storage: dtype that the packed bytes are seen as; a floating one lets FSDP shard them.
        device: where the floating-point weight is created.
    """

    def __init__(
        self, input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True, quant_type="fp4",
        quant_storage=torch.uint8, device=None,
    ):  # fmt: skip
        super().__init__(input_features, output_features, bias, device)
        self.quant_state = None
        self.quant_storage = quant_storage
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.support_avx512bf16_for_cpu = functional.has_avx512bf16()
        self._bias_in_training = False  # whether a graph was built with the bias, so that an optimizer may hold it in its present dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

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
        """Dtype to compute in and dtype of the result, where these are not simply that of x."""
        _require_float(self, x)
        autocast = _autocast_dtype(x.device.type)
        if autocast is not None and x.dtype in FLOATS:
            return autocast, autocast
        if not self.compute_type_is_set and x.dtype in _COMMON_DTYPES:
            return x.dtype, x.dtype
        if x.dtype is torch.float16 and not self.compute_type_is_set:
            self._warn_about_float16(x)
        return self.compute_dtype or (x.dtype if x.dtype in FLOATS else torch.float32), x.dtype

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

    def _warn_once(self, topic: str, message: str) -> None:
        said = self.__dict__.setdefault("_said", set())
        if topic not in said and not _is_compiling():
            said.add(topic)
            logger.warning(f"{_described(self)}: {message}")

    def _recovered_state(self, weight: torch.Tensor) -> QuantState:
        """The state that the layer remembers, for packed codes that lost theirs."""
        state = self.__dict__.get("quant_state")
        if state is None:
            raise RuntimeError(
                f"{_described(self)}: the weight holds packed 4-bit codes ({weight.dtype} {list(weight.shape)}) but its quant_state is missing, "
                "so they have no meaning. Load the complete checkpoint (weight, weight.absmax, weight.quant_map, weight.quant_state.*) with "
                "load_state_dict, or assign a weight made by Params4bit.from_prequantized."
            )
        if isinstance(weight, Params4bit):
            weight._adopt(state)
        return state

    def _dense_forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product with a weight that is not quantised, in full precision."""
        self._warn_once(
            "dense",
            f"the weight is a plain {weight.dtype} matrix and is used as it is, in full precision. "
            "To quantise it, move the layer to a device (layer.to('cpu'), layer.to('cuda')).",
        )
        _require_float(self, x)
        if _autocast_dtype(x.device.type) is not None:
            return F.linear(x, weight, self.bias)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)

    def _bias_in(self, dtype: torch.dtype, bias: torch.Tensor) -> torch.Tensor:
        """The bias in ``dtype``. Outside of training a bias of another dtype is cast for good; every call would pay for it otherwise."""
        in_training = self._bias_in_training or bias.grad is not None
        if not in_training and bias.requires_grad and _is_grad_enabled():
            self._bias_in_training = True
        if bias.dtype is dtype:
            return bias
        if in_training or type(bias) is not nn.Parameter or _is_compiling() or _autocast_dtype(bias.device.type) is not None:
            return bias.to(dtype)
        with torch.inference_mode(False):
            bias.data = bias.data.to(dtype)
        return bias


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
