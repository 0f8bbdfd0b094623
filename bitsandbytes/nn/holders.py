"""What layers with a quantised weight share, whatever they compute with it.

They keep the class and the statistics of their ``weight`` when ``nn.Module`` moves, pickles or replaces it, save and load it (see checkpoint.py),
and while it is a plain floating-point matrix they say so once. ``Holds4bitWeight`` and ``Holds8bitWeight`` are mixins for
layers: each names its kind of parameter, how one is made, and what else the layer has to remember.
"""

from collections.abc import Callable
import logging

import torch
from torch import nn

from .._ops import FLOATS
from ..quant_state import QuantState
from . import checkpoint, sharding
from .parameters import Int8Params, Params4bit, QuantisedParameter, _scales_on, _state_on

logger = logging.getLogger("bitsandbytes.nn.modules")  # where users listen for all of the layers


def described(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def require_float(module: nn.Module, x: torch.Tensor) -> None:
    if x.dtype not in FLOATS and x.dtype is not torch.float64:
        raise TypeError(f"{described(module)} takes float16, bfloat16, float32 or float64 inputs, got {x.dtype}")


class _HoldsQuantisedWeight:
    """A layer whose ``weight`` is a ``parameter_class``, or was and has been replaced by a plain tensor."""

    parameter_class: type[QuantisedParameter]

    @property
    def _dense_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _is_dense(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` holds plain values rather than codes."""
        return weight.is_floating_point() and tuple(weight.shape) == self._dense_shape

    def _recipe(self) -> dict:
        """How the weight is, or is going to be, quantised: arguments for ``parameter_class``."""
        raise NotImplementedError

    def _is_quantised(self) -> bool:
        raise NotImplementedError

    def _is_sharded(self) -> bool:
        return sharding.is_sharded(self.weight)

    def _installer_when_sharded(self, statistics) -> Callable[[], None]:
        """What, called after ``nn.Module`` has loaded this process's part of the codes, gives them their statistics."""
        raise NotImplementedError

    def _write_statistics(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Adds the statistics of the weight to a state dict that holds its codes already."""
        raise NotImplementedError

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """As of every module. While the weight is sharded its statistics are listed too: torch.distributed spreads a checkpoint that only one process
        has over the names it finds here (``broadcast_from_rank0``)."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse and self._is_sharded():
            statistics = {}
            self._write_statistics(statistics, prefix and f"{prefix}.", True)
            yield from statistics.items()

    def _remember(self, weight: QuantisedParameter) -> None:
        """Notes what the layer keeps of its weight's statistics, besides the weight."""

    def register_parameter(self, name, param):
        super().register_parameter(name, param)
        if name == "weight" and isinstance(param, self.parameter_class):
            self._remember(param)

    def train(self, mode: bool = True):
        weight = self._parameters.get("weight")
        if isinstance(weight, self.parameter_class):  # programs also write to _parameters; they all call train or eval
            self._remember(weight)
        return super().train(mode)

    def _move_remembered(self, device: torch.device) -> None:
        """Moves what the layer keeps of the statistics of a sharded weight."""

    def _own(self, weight: QuantisedParameter) -> None:
        """Lets a weight know that it is this layer's."""

    def _new_weight(self, data: torch.Tensor, **attributes) -> QuantisedParameter:
        """A weight for this layer, not yet in place."""
        return self.parameter_class(data, **{**self._recipe(), **attributes})

    def _take_weight(self, loaded: QuantisedParameter, assign: bool) -> None:
        """Puts a loaded weight in place: as the new parameter, or into the present one so that whoever shares it sees it."""
        weight = self.weight
        if assign or weight.is_meta or not isinstance(weight, self.parameter_class):
            self._own(loaded)
            self.weight = weight = loaded
        elif weight.shape == loaded.shape and weight.dtype == loaded.dtype:
            with torch.no_grad():
                weight.copy_(loaded.data)
        else:
            weight.requires_grad_(weight.requires_grad and loaded.is_floating_point())
            weight.data = loaded.data
        weight.take_statistics(loaded)
        self._remember(weight)

    def _apply(self, fn, recurse=True):
        # nn.Module moves tensors; it knows nothing of their statistics, and where it cannot move in place it makes a plain Parameter.
        weight, kept = self._parameters.get("weight"), None

        def move(tensor):
            nonlocal kept
            moved = fn(tensor)
            if tensor is weight and moved.dtype != tensor.dtype and self._is_quantised():
                moved = tensor.to(moved.device)  # codes that FSDP keeps in a plain tensor; those of our parameters are not cast anyway
            if tensor is weight and isinstance(weight, self.parameter_class):
                kept = vars(moved if isinstance(moved, self.parameter_class) else weight) | {n: v for n, v in vars(weight).items() if n == "module"}
                moved = moved.data
            return moved

        super()._apply(move, recurse)
        if kept is not None:
            weight = self._parameters["weight"]
            if not isinstance(weight, self.parameter_class):
                self.weight = weight = self.parameter_class(weight.data, **{**kept, "requires_grad": weight.requires_grad})
            vars(weight).update(kept)
            self._remember(weight)
        elif weight is not None and self._is_sharded() and self._is_quantised():
            self._move_remembered(self.weight.device)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        weight = self._parameters["weight"]
        if self._was_quantisable(weight):  # pickled by the published library, which loses the class
            self.weight = weight = self.parameter_class(weight.data, **{**vars(weight), "requires_grad": weight.requires_grad})
        if isinstance(weight, self.parameter_class):
            self._own(weight)

    def _was_quantisable(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is a plain tensor that carries the attributes of a ``parameter_class``."""
        return not isinstance(weight, self.parameter_class) and vars(self.parameter_class()).keys() - {"module"} <= vars(weight).keys()

    def _warn_once(self, topic: str, message: str) -> None:
        said = self.__dict__.setdefault("_said", set())
        if topic not in said and not torch.compiler.is_compiling():
            said.add(topic)
            logger.warning(f"{described(self)}: {message}")

    def _warn_about_dense_weight(self, weight: torch.Tensor) -> None:
        self._warn_once(
            "dense",
            f"the weight is a plain {weight.dtype} matrix and is used as it is, in full precision. "
            "To quantise it, move the layer to a device (layer.to('cpu'), layer.to('cuda')).",
        )


class Holds4bitWeight(_HoldsQuantisedWeight):
    """A layer with a ``Params4bit``. It remembers the quant_state, so that a weight that lost it (FSDP makes plain parameters) gets it back."""

    parameter_class = Params4bit

    def _hold_in_4bit(self, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype) -> None:
        """Makes the new layer's floating-point weight one that is quantised when it is moved to a device."""
        self.quant_state = None
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data, compress_statistics=compress_statistics, quant_type=quant_type, quant_storage=quant_storage, module=self
        )

    @property
    def quant_state(self) -> QuantState | None:
        """The state of the weight; None while it is not quantised. Survives the weight's being replaced by a plain packed tensor."""
        weight = self.weight
        shard = sharding.shard_of(weight)
        if shard is not None:
            return shard.attributes["quant_state"]
        state = None if sharding.is_sharded(weight) else getattr(weight, "quant_state", None)
        return state if state is not None or self._is_dense(weight) else self.__dict__.get("quant_state")

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["quant_state"] = state

    def _is_quantised(self):
        return self.quant_state is not None

    def _remember(self, weight):
        self.quant_state = weight.quant_state
        if self.quant_state is not None:
            self.quant_storage = weight.dtype

    def _own(self, weight):
        weight.module = self

    def _installer_when_sharded(self, statistics):
        shard = sharding.shard_of(self.weight)

        def install():
            self.quant_state = statistics
            sharding.adopt(self.weight, statistics, shard)

        return install

    def _move_remembered(self, device):
        self.quant_state = state = _state_on(self.quant_state, device)
        sharding.adopt(self.weight, state, sharding.shard_of(self.weight))

    def _recipe(self):
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

    def _recovered_state(self, weight: torch.Tensor) -> QuantState:
        """The state that the layer remembers, for packed codes that lost theirs.

        Raises:
            RuntimeError: it remembers none.
        """
        state = self.__dict__.get("quant_state")
        if state is None:
            raise RuntimeError(
                f"{described(self)}: the weight holds packed 4-bit codes ({weight.dtype} {list(weight.shape)}) but its quant_state is missing, "
                "so they have no meaning. Load the complete checkpoint (weight, weight.absmax, weight.quant_map, weight.quant_state.*) with "
                "load_state_dict, or assign a weight made by Params4bit.from_prequantized."
            )
        if isinstance(weight, Params4bit):
            weight._adopt(state)
        elif weight.dtype is not self.quant_storage:
            raise RuntimeError(
                f"{described(self)}: the weight held packed 4-bit codes in {self.quant_storage}, but was cast to {weight.dtype}, which destroys "
                "them. Under FSDP1 with mixed precision, param_dtype must be the quant_storage of the layers."
            )
        return _state_on(state, weight.device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and self._is_sharded():
            sharding.make_ordinary(destination[prefix + "weight"])
        self._write_statistics(destination, prefix, keep_vars)

    _write_statistics = checkpoint.save_4bit

    def _load_from_state_dict(self, *args):
        checkpoint.load(self, super()._load_from_state_dict, checkpoint.read_4bit, *args)


class Holds8bitWeight(_HoldsQuantisedWeight):
    """A layer with an ``Int8Params``.

    It remembers the attributes of the latest one, in the parameter's own dict, so that codes in a plain tensor (FSDP makes such) get their scales
    back. While the weight is an ``Int8Params``, that alone is asked.
    """

    parameter_class = Int8Params

    def _remember(self, weight):
        self.__dict__["_weight_attributes"] = vars(weight)

    def _own(self, weight):
        self._remember(weight)

    def _installer_when_sharded(self, statistics):
        return lambda: self.__dict__.update(_weight_attributes={"SCB": statistics})

    def _known_scales(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scales of int8 codes: the weight's own, or for a plain tensor those that the layer remembers."""
        scales = getattr(weight, "SCB", None)
        if scales is not None or isinstance(weight, Int8Params) or weight.dtype != torch.int8:
            return scales
        remembered = self.__dict__.get("_weight_attributes", {}).get("SCB")
        return _scales_on(remembered, weight.device)

    # torch.distributed looks the keys of state dicts up as attributes.

    @property
    def SCB(self) -> torch.Tensor:
        """The scales of the rows of a quantised weight, float32 [rows]."""
        scales = self._known_scales(self.weight)
        if scales is None:
            raise AttributeError("the weight has no scales")
        return scales

    @property
    def weight_format(self) -> torch.Tensor:
        """The number of the layout of a quantised weight in checkpoints, a uint8 scalar."""
        return checkpoint.ROW_FORMAT.clone()

    def _recipe(self):
        return {"requires_grad": self.weight.requires_grad, "has_fp16_weights": getattr(self.weight, "has_fp16_weights", False)}

    def _is_quantised(self):
        return self.weight.dtype == torch.int8

    def _takes_codes(self, assign: bool) -> bool:
        """Whether int8 codes from a checkpoint may become the weight, as opposed to one that is shared with others or trained as it is."""
        weight = self.weight
        return isinstance(weight, Int8Params) and not weight.has_fp16_weights and (assign or self._is_quantised())

    def _scales_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The scales of int8 codes.

        Raises:
            RuntimeError: there are none.
        """
        scales = self._known_scales(weight)
        if scales is None:
            raise RuntimeError(
                f"{described(self)}: the weight holds int8 codes but SCB, their scales (the largest magnitude of each row of the original weight), "
                "is missing, and it cannot be computed from the codes. Load the complete checkpoint (weight and SCB) with load_state_dict, "
                "or assign a weight with its scales: layer.weight = Int8Params(codes, requires_grad=False, SCB=scales)."
            )
        return scales

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._write_statistics(destination, prefix, keep_vars)

    _write_statistics = checkpoint.save_8bit

    def _load_from_state_dict(self, *args):
        checkpoint.load(self, super()._load_from_state_dict, checkpoint.read_8bit, *args)
