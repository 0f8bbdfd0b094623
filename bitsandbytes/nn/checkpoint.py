"""How a quantised weight is written to a state dict and read from one, for every layer that has one.

A 4-bit weight under the key ``W`` is stored as its packed codes ``W`` and its statistics ``W.absmax``, ``W.quant_map``,
``W.quant_state.bitsandbytes__<type>`` and, double-quantised, ``W.nested_absmax`` and ``W.nested_quant_map``. An 8-bit weight ``weight`` has
the neighbours ``SCB``, the scales of its rows, and ``weight_format``, the number of the layout that the codes are in; only rows are left.

Reading comes in two steps, so that a layer is either loaded or left as it was: a reader looks at the state dict and says what it found, what
is missing and what is wrong; only then does ``load`` change anything. Dicts that say nothing about the weight (adapter checkpoints)
leave it alone, and the caller's dict is never changed.
"""

from collections import OrderedDict
from collections.abc import Callable
import copy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from .. import functional
from .._ops import BLOCKSIZES_4BIT, NESTED_BLOCKSIZE, STORAGE_DTYPES, packed_length
from ..quant_state import QuantState
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

PACKED_KEYS = tuple(f"quant_state.{key}" for key in QuantState.valid_qs_type_keys)
ROW_FORMAT = torch.tensor(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"], dtype=torch.uint8, device="cpu")
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *PACKED_KEYS)


@dataclass
class Finding:
    """What a state dict says about one quantised weight.

    Attributes:
        keys: entries that were understood; nobody else needs to look at them.
        missing: keys without which the weight cannot be loaded.
        errors: what is wrong with the entries, for the user.
        install: puts the weight in place; None if there is nothing to do. Cannot fail.
    """

    keys: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    install: Callable[[], None] | None = None


# ------------------------------------------------------------------------------------------------------------------------ writing


def save_4bit(layer, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Adds the statistics of a layer's weight to a state dict that holds its codes already."""
    state = layer.quant_state
    if state is None:
        return
    if state.packing_format_for_cpu:
        destination[prefix + "weight"], state = functional._canonical(layer.weight.detach(), state)
    statistics = state.as_dict(packed=True)
    if layer._is_sharded():
        _make_keys_resolvable(layer.weight, state, statistics)
        key = f"quant_state.bitsandbytes__{state.quant_type}"
        statistics[key] = _of_even_length(statistics[key])
    for name, tensor in statistics.items():
        destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()


def save_8bit(layer, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Adds the scales of a layer's weight to a state dict that holds its codes already."""
    scales = layer._known_scales(layer.weight)
    if scales is None or layer.weight.dtype != torch.int8:
        return
    destination[prefix + "SCB"] = scales if keep_vars else scales.detach()
    destination[prefix + "weight_format"] = ROW_FORMAT.clone()


def _of_even_length(blob: torch.Tensor) -> torch.Tensor:
    """Packed JSON with spaces at its end. A distributed checkpoint is read into tensors of the same sizes, and the mean of nested statistics
    is written with more digits for one model than for another."""
    return torch.nn.functional.pad(blob, (0, -blob.numel() % 256), value=ord(" "))


def _make_keys_resolvable(weight: torch.Tensor, state: QuantState, statistics: dict[str, torch.Tensor]) -> None:
    """torch.distributed looks every key of a state dict up as a path of attributes, which a sharded parameter lacks."""
    weight.quant_state = state
    for name in statistics.keys() - set(PACKED_KEYS):
        setattr(weight, name, statistics[name])


# ------------------------------------------------------------------------------------------------------------------------ reading


def load(
    layer, load_rest: Callable, read: Callable, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
) -> None:  # fmt: skip
    """``_load_from_state_dict`` for a layer with a quantised weight.

    Args:
        layer: the layer.
        load_rest: what ``nn.Module`` does for everything but the weight.
        read: ``read(layer, state_dict, prefix, assign) -> Finding``.
        state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs: as ``nn.Module`` passes them.
    """
    for hook in layer._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    own = {prefix + name for name in (*layer._parameters, *layer._buffers)}
    assign = local_metadata.get("assign_to_params_buffers", False)
    if layer.weight.is_meta and not assign:  # there is nothing to copy into, so the layer gets tensors of its own
        assign = True
        local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        state_dict = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state_dict.items()}

    found = read(layer, state_dict, prefix, assign)
    sound = not found.missing and not found.errors
    rest = {key: value for key, value in state_dict.items() if key not in found.keys and (sound or key not in own)}
    missing, errors = [], []
    with _HooksAlreadyRun(layer):
        load_rest(rest, prefix, local_metadata, strict, missing, unexpected_keys, errors)
    missing_keys.extend(key for key in missing if key not in state_dict)
    missing_keys.extend(found.missing)
    error_msgs.extend(found.errors + errors)
    if sound and not errors and found.install is not None:
        found.install()


class _HooksAlreadyRun:
    """Keeps ``nn.Module`` from running a layer's pre-hooks, which must see the state dict once, before the weight is read."""

    def __init__(self, layer):
        self.layer, self.hooks = layer, layer._load_state_dict_pre_hooks

    def __enter__(self):
        self.layer._load_state_dict_pre_hooks = OrderedDict()

    def __exit__(self, *exception):
        self.layer._load_state_dict_pre_hooks = self.hooks


def read_4bit(layer, state_dict: dict[str, Any], prefix: str, assign: bool) -> Finding:
    """Looks for a layer's weight, packed or dense, in a state dict.

    A packed weight makes the layer quantised, whatever it was. A dense one is quantised by the layer's own recipe if the layer is quantised,
    and otherwise left to ``nn.Module``, unless that would replace the parameter and lose the recipe.
    """
    key = prefix + "weight"
    if key not in state_dict:
        return Finding()
    value = state_dict[key]
    statistics = {f"{key}.{name}": state_dict[f"{key}.{name}"] for name in STATISTICS if f"{key}.{name}" in state_dict}
    found = Finding(keys={key, *statistics})
    shape = layer._dense_shape
    if not isinstance(value, torch.Tensor):
        found.errors.append(f'"{key}" must be a tensor, got {type(value).__name__}')
    elif not _can_be_read(value, value if assign else layer.weight):
        found.errors.append(_unreadable(key, value))
    elif not statistics and value.is_floating_point() and tuple(value.shape) == shape:
        return _read_dense(layer, value, found, assign)
    elif statistics or _could_be_packed(value, prod(shape)):
        found.missing = _absent_statistics(key, statistics, layer._recipe().get("quant_type", "fp4"))
        if not found.missing:
            _read_packed(layer, key, value, statistics, found, assign)
    else:
        found.errors.append(
            f"size mismatch for {key}: the checkpoint holds {value.dtype} {list(value.shape)}, the layer takes a floating-point weight of shape "
            f"{list(shape)} or one packed in 4 bit with its statistics"
        )
    return found


def _can_be_read(value: torch.Tensor, destination: torch.Tensor) -> bool:
    """Whether a tensor of a checkpoint has data, in an ordinary layout, for a destination that keeps any."""
    return value.layout == torch.strided and (destination.is_meta or not value.is_meta)


def _unreadable(key: str, value: torch.Tensor) -> str:
    return f'"{key}" must be a dense tensor with data, got layout {value.layout} on device {value.device}'


def _could_be_packed(value: torch.Tensor, count: int) -> bool:
    return value.dtype in STORAGE_DTYPES and value.numel() == packed_length(count, value.dtype)


def _absent_statistics(key: str, statistics: dict[str, Any], quant_type: str) -> list[str]:
    """Keys that a packed weight needs and that are not there."""
    present = {name.removeprefix(f"{key}.") for name in statistics}
    needed = ["absmax", "quant_map"]
    absmax = statistics.get(f"{key}.absmax")
    if present & {"nested_absmax", "nested_quant_map"} or (isinstance(absmax, torch.Tensor) and absmax.dtype == torch.uint8):
        needed += ["nested_absmax", "nested_quant_map"]
    if not present & set(PACKED_KEYS):
        needed.append(f"quant_state.bitsandbytes__{quant_type}")
    return [f"{key}.{name}" for name in needed if name not in present]


def _read_packed(layer, key: str, codes: torch.Tensor, statistics: dict[str, Any], found: Finding, assign: bool) -> None:
    device = codes.device if assign else layer.weight.device
    if layer._is_sharded() and codes.dtype != layer.weight.dtype:
        found.errors.append(f'"{key}" holds packed codes in {codes.dtype}, the sharded layer keeps them in {layer.weight.dtype}')
        return
    try:
        state = QuantState.from_dict(statistics, device=device)
        require_consistent(codes, state, layer._dense_shape)
    except (ValueError, TypeError, AssertionError) as error:
        found.errors.append(f'the quantised weight "{key}" cannot be loaded: {error}')
        return
    if not assign:  # the layer's tensors must not be the caller's
        state = copy.deepcopy(state)
    if layer._is_sharded():
        _leave_codes_to_module(layer, key, state, found)
        return
    codes = codes if assign else codes.to(device, copy=True)
    weight = layer._new_weight(codes, quant_state=state, bnb_quantized=True)
    found.install = lambda: layer._take_weight(weight, assign)


def _leave_codes_to_module(layer, key: str, statistics, found: Finding) -> None:
    """Each process copies its part of the codes, as of any parameter; the statistics are whole everywhere."""
    found.keys.remove(key)
    found.install = layer._installer_when_sharded(statistics)


def _read_dense(layer, values: torch.Tensor, found: Finding, assign: bool) -> Finding:
    quantised = layer._is_quantised()
    if layer._is_sharded():
        if quantised:
            found.errors.append("a floating-point weight cannot be quantised into a layer that is sharded already; load it before sharding")
            return found
        return Finding()
    if not quantised and not (assign and layer._recipe()):
        return Finding()  # an ordinary parameter
    weight = layer._new_weight(values)
    if quantised:
        weight = weight.to(values.device if assign else layer.weight.device)
    found.install = lambda: layer._take_weight(weight, assign)
    return found


def read_8bit(layer, state_dict: dict[str, Any], prefix: str, assign: bool) -> Finding:
    """Looks for a layer's weight, as int8 codes with their scales or dense, in a state dict.

    Codes go into a layer that is quantised already, or become its weight where there is none yet (meta, ``assign``). A dense weight is
    quantised if the layer is, and otherwise left to ``nn.Module``, unless that would replace the parameter and lose its class.

    Raises:
        ValueError: the codes are in a layout of old releases, which depended on the GPU, or an unknown one.
    """
    key, scales_key, format_key = prefix + "weight", prefix + "SCB", prefix + "weight_format"
    if key not in state_dict:
        return Finding(missing=[key] if scales_key in state_dict else [])
    codes, scales = state_dict[key], state_dict.get(scales_key)
    require_row_format(state_dict.get(format_key, "row"))
    found = Finding(keys={key, scales_key, format_key} & state_dict.keys())
    shape = list(layer._dense_shape)
    if not isinstance(codes, torch.Tensor):
        found.errors.append(f'"{key}" must be a tensor, got {type(codes).__name__}')
    elif not _can_be_read(codes, codes if assign else layer.weight):
        found.errors.append(_unreadable(key, codes))
    elif scales is None and codes.is_floating_point() and list(codes.shape) == shape:
        return _read_dense(layer, codes, found, assign)
    elif scales is None and codes.dtype == torch.int8:
        found.missing.append(scales_key)
    elif not (layer._is_quantised() if layer._is_sharded() else layer._takes_codes(assign)):
        found.errors.append(
            f"Loading a quantized checkpoint into non-quantized {type(layer).__name__} is not supported: "
            f'"{scales_key}" belongs to int8 codes. Move the layer to a device first, or load with assign=True.'
        )
    elif codes.dtype != torch.int8 or list(codes.shape) != shape:
        found.errors.append(
            f"size mismatch for {key}: the checkpoint holds {codes.dtype} {list(codes.shape)}, "
            f"the layer takes a floating-point or (with its scales) int8 weight of shape {shape}"
        )
    elif not isinstance(scales, torch.Tensor) or not scales.is_floating_point() or scales.numel() != shape[0]:
        seen = f"{scales.dtype} {list(scales.shape)}" if isinstance(scales, torch.Tensor) else type(scales).__name__
        found.errors.append(f'"{scales_key}" must hold {shape[0]} floating-point scales, one for each row of the weight, got {seen}')
    elif not _can_be_read(scales, codes if assign else layer.weight):
        found.errors.append(_unreadable(scales_key, scales))
    else:
        _read_codes(layer, key, codes, scales, found, assign)
    return found


def require_row_format(stored) -> None:
    """Checks the layout of an int8 weight, a name or the number (or tensor of it) that checkpoints hold.

    Raises:
        ValueError: it is unknown, or not "row".
    """
    number = stored.item() if isinstance(stored, torch.Tensor) else stored
    name = number if isinstance(number, str) else INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(number)
    if name not in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING:
        raise ValueError(f"unknown int8 weight format {number!r}; expected one of {LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING}")
    if name != "row":
        raise ValueError(f"int8 weights in the {name!r} layout are not supported; save the checkpoint again in the row layout")


def _read_codes(layer, key: str, codes: torch.Tensor, scales: torch.Tensor, found: Finding, assign: bool) -> None:
    device = codes.device if assign else layer.weight.device
    scales = scales.detach().reshape(-1).to(device, torch.float32, copy=not assign)
    if layer._is_sharded():
        _leave_codes_to_module(layer, key, scales, found)
        return
    codes = codes.detach() if assign else codes.to(device, copy=True)
    weight = layer._new_weight(codes, SCB=scales, requires_grad=False)
    found.install = lambda: layer._take_weight(weight, assign)


def require_consistent(codes: torch.Tensor, state: QuantState, shape: tuple[int, ...] | None = None) -> None:
    """Checks that packed codes and a state describe the same 4-bit weight. ``QuantState.from_dict`` has checked the state in itself.

    Args:
        codes: packed codes, any storage dtype.
        state: their state.
        shape: the shape that the weight must have; default: any.

    Raises:
        ValueError: they do not belong together.
    """
    if state.quant_type is None or state.shape is None:
        raise ValueError("the statistics are not those of a 4-bit weight: they have no quant_type or no shape")
    if shape is not None and tuple(state.shape) != tuple(shape):
        raise ValueError(f"it has shape {list(state.shape)}, the layer's has {list(shape)}")
    if state.blocksize not in BLOCKSIZES_4BIT:
        raise ValueError(f"its blocksize must be one of {BLOCKSIZES_4BIT}, got {state.blocksize}")
    if codes.dtype not in STORAGE_DTYPES:
        raise ValueError(f"packed codes must be uint8, float16, bfloat16 or float32, got {codes.dtype}")
    needed = packed_length(prod(state.shape), codes.dtype)
    if codes.numel() != needed:
        raise ValueError(f"shape {list(state.shape)} needs {needed} {codes.dtype} elements of packed codes, got {codes.numel()}")
    if state.absmax.dim() != 1:
        raise ValueError(f"absmax must have one dimension, got shape {list(state.absmax.shape)}")
    if state.nested and state.state2.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(f"nested statistics must be in blocks of {NESTED_BLOCKSIZE}, got {state.state2.blocksize}")
