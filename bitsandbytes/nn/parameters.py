"""Parameters that hold quantised weights, in 4 and in 8 bit.

A quantised parameter begins as floating-point values that know how they are going to be quantised, and becomes codes when it first moves to a
device. What the codes need to have a meaning, their statistics, are attributes of the parameter: they move, copy and pickle with it.
"""

import copy
from math import prod
import weakref

import torch
from torch import nn

from .. import functional
from .._ops import FLOATS, packed_length
from ..quant_state import QuantState
from . import checkpoint, dispatch

_NONE = type(None)
_OF_ALL = {"data": (torch.Tensor,), "requires_grad": (bool,)}
_OF_STATE = {
    "absmax": (torch.Tensor,), "code": (torch.Tensor,), "blocksize": (int,), "quant_type": (str,), "dtype": (torch.dtype,), "shape": (tuple, list),
    "state2": (QuantState, _NONE),
}  # fmt: skip
_OF_NESTED_STATE = {name: _OF_STATE[name] for name in ("absmax", "code", "blocksize")}


def _require_kinds(owner: str, values: dict, kinds: dict[str, tuple]) -> None:
    """Raises TypeError where one of the values is of another type than those named."""
    for name, wanted in kinds.items():
        if name in values and not isinstance(values[name], wanted):
            names = " or ".join(kind.__name__.replace("NoneType", "None") for kind in wanted)
            raise TypeError(f"{owner}: {name} must be {names}, got {type(values[name]).__name__}")


class QuantisedParameter(nn.Parameter):
    """What quantised parameters have in common.

    The attributes live in ``__dict__`` under the names of the constructor's arguments, so that ``type(p)(value, **p.__dict__)`` makes another
    parameter of the same kind. A subclass defines ``to``, ``take_statistics``, and what types its attributes have.
    """

    _KINDS: dict[str, tuple] = {}

    def take_statistics(self, other: "QuantisedParameter") -> None:
        """Makes the statistics of ``other`` this parameter's own: its codes have been put here."""
        raise NotImplementedError

    def _with(self, data: torch.Tensor, **changes) -> "QuantisedParameter":
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

    def _require_data(self, device) -> None:
        if self.is_meta:
            raise NotImplementedError(
                f"cannot quantise a weight on the meta device: it has no data. Load a checkpoint first, with "
                f"load_state_dict(..., assign=True), or call to_empty(device={str(device)!r}) and fill it."
            )

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
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state):
        """Takes what ``__getstate__`` returned.

        Raises:
            TypeError: an attribute is of another type: the file is damaged, or was made by hand.
            ValueError: codes and statistics do not belong together.
        """
        state = dict(state)
        data, requires_grad = state.pop("data", None), state.pop("requires_grad", None)
        _require_kinds(type(self).__name__, {"data": data, "requires_grad": requires_grad, **state}, {**_OF_ALL, **self._KINDS})
        self._require_meaning(data, state)
        self.data, self.requires_grad = data, requires_grad
        self.__dict__.update(state)

    def _require_meaning(self, data: torch.Tensor, attributes: dict) -> None:
        """Raises TypeError or ValueError where attributes, each of the right type, do not fit together."""


# ------------------------------------------------------------------------------------------------------------------------- 4 bit


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


class Params4bit(QuantisedParameter):
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

    _KINDS = {
        "quant_state": (QuantState, _NONE), "blocksize": (int,), "compress_statistics": (bool,), "quant_type": (str,),
        "quant_storage": (torch.dtype,), "bnb_quantized": (bool,),
    }  # fmt: skip

    def __new__(
        cls, data=None, requires_grad=False, quant_state=None, blocksize=None, compress_statistics=True, quant_type="fp4",
        quant_storage=torch.uint8, module=None, bnb_quantized=False, **kwargs,
    ):  # fmt: skip
        data = torch.empty(0) if data is None else data
        _require_kinds(cls.__name__, {"data": data}, _OF_ALL)
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

    def _require_meaning(self, data, attributes):
        state = attributes.get("quant_state")
        if state is None:
            return
        _require_kinds("quant_state", vars(state), _OF_STATE)
        if state.state2 is not None:
            _require_kinds("quant_state", vars(state), {"offset": (torch.Tensor,)})
            _require_kinds("quant_state.state2", vars(state.state2), _OF_NESTED_STATE)
        if not state.packing_format_for_cpu:
            checkpoint.require_consistent(data, state)

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

    def take_statistics(self, other):
        if other.quant_state is not None:
            self._adopt(other.quant_state)

    def _quantize(self, device) -> "Params4bit":
        """Quantises in place, on ``device``."""
        self._require_data(device)
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
            state = _state_on(state, None if device is None else data.device)  # "cuda" is one of several; the data know which
            state = state if dtype is None else _state_for(state, dtype)
        return self._with(data, quant_state=state, bnb_quantized=True)

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
        """The dense values, in ``quant_state.dtype``; of a weight that is not quantised, its data.

        Raises:
            RuntimeError: codes without a quant_state.
        """
        if self.quant_state is not None:
            return functional.dequantize_4bit(self.data.reshape(-1, 1), self.quant_state)
        if self.bnb_quantized:
            raise RuntimeError(
                f"this weight holds packed 4-bit codes ({self.dtype} {list(self.shape)}) without a quant_state, so they have no meaning. "
                "A piece of a weight has one only if it consists of whole blocks."
            )
        return self.data

    def __getstate__(self):
        return {**super().__getstate__(), "module": None}

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


# ------------------------------------------------------------------------------------------------------------------------- 8 bit


class Int8Params(QuantisedParameter):
    """A weight [out_features, in_features] that is quantised row by row to int8 when it first moves to a device (LLM.int8()).

    The int8 codes in ``data`` and ``SCB``, float32 [out_features], the largest magnitude of each row, are all there is: entry (i, j) is
    ``data[i, j] * SCB[i] / 127``. ``CB`` is another name for ``data``.

    Args:
        data: floating-point values, or int8 codes, which are used as they are. Default: empty.
        requires_grad: as for ``nn.Parameter``; int8 codes cannot require a gradient.
        has_fp16_weights: never quantise; the products quantise a copy, and the weight can be trained.
        CB: accepted for callers that pass a parameter's ``__dict__``; the codes are ``data``.
        SCB: scales of int8 ``data``. Dropped when ``data`` are floating-point values.
        kwargs: ignored.
    """

    _KINDS = {"SCB": (torch.Tensor, _NONE), "has_fp16_weights": (bool,)}

    def __new__(cls, data=None, requires_grad=True, has_fp16_weights=False, CB=None, SCB=None, **kwargs):
        data = torch.empty(0) if data is None else data
        _require_kinds(cls.__name__, {"data": data}, _OF_ALL)
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and data.is_floating_point())
        self.__dict__.update(CB=None, SCB=SCB if data.dtype == torch.int8 else None, has_fp16_weights=has_fp16_weights)
        return self

    def _require_meaning(self, data, attributes):
        scales = attributes.get("SCB")
        if data.dtype == torch.int8 and scales is not None and (not scales.is_floating_point() or scales.numel() != len(data)):
            raise ValueError(f"Int8Params: SCB must be {len(data)} floats, one for each row, got {scales.numel()} of {scales.dtype}")

    @property
    def CB(self) -> torch.Tensor | None:
        """The codes, sharing memory with the parameter; None while it is not quantised."""
        return self.data if self.dtype == torch.int8 else None

    @CB.setter
    def CB(self, codes: torch.Tensor | None) -> None:
        if codes is None:
            return
        if codes.dtype != torch.int8:
            raise TypeError(f"CB must hold int8 codes, got {codes.dtype}")
        self.data = codes

    def take_statistics(self, other):
        self.SCB = other.SCB

    def _quantize(self, device) -> "Int8Params":
        """Quantises in place, on ``device``."""
        self._require_data(device)
        values = self.data.contiguous().to(device)
        codes, scales, _ = functional.int8_vectorwise_quant(values if values.dtype in FLOATS else values.to(torch.float32))
        self.requires_grad_(False)
        self.data, self.SCB = codes, scales
        return self

    def to(self, *args, **kwargs) -> "Int8Params":
        """Quantises, moves or casts; takes the arguments of ``Tensor.to``.

        A weight that is not quantised yet is quantised **in place** when a device is named (other than "meta"), wherever it is; dtype and
        non_blocking are then ignored. In every other case the result is a new parameter and this one stays as it is: floating values are
        moved and cast; int8 codes are moved with their scales, and not cast. On the meta device the scales stay where they are, so that loading the
        codes brings the weight back. A device number means the CPU where there is no accelerator: accelerate sends weights that it offloads
        through device 0.
        """
        if args and isinstance(args[0], int) and not torch.accelerator.is_available():
            args = ("cpu", *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype == torch.int8:
            data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
            return self._with(data, SCB=_scales_on(self.__dict__.get("SCB"), device))
        if device is not None and device.type != "meta" and not self.has_fp16_weights and self.is_floating_point():
            return self._quantize(device)
        return self._with(self.data.to(device, dtype, non_blocking))

    def share_memory_(self):
        """Moves the codes and the scales to shared memory."""
        super().share_memory_()
        if self.SCB is not None:
            self.SCB.share_memory_()
        return self

    def dequantize(self) -> torch.Tensor:
        """The dense values, float32; of a weight that is not quantised, its data."""
        return functional.int8_vectorwise_dequant(self.data, self.SCB) if self.dtype == torch.int8 else self.data


def _scales_on(scales: torch.Tensor | None, device: torch.device | None) -> torch.Tensor | None:
    return scales if scales is None or device is None or device.type == "meta" or scales.is_meta else scales.to(device)
