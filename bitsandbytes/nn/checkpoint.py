"""How a quantised weight is written to a state dict and read from one, for every layer that has one.

A 4-bit weight under the key ``W`` is stored as its packed codes ``W`` and its statistics ``W.absmax``, ``W.quant_map``,
``W.quant_state.bitsandbytes__<type>`` and, double-quantised, ``W.nested_absmax`` and ``W.nested_quant_map``.

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

PACKED_KEYS = tuple(f"quant_state.{key}" for key in QuantState.valid_qs_type_keys)
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
    if _is_sharded(layer.weight):
        _make_keys_resolvable(layer.weight, state, statistics)
    for name, tensor in statistics.items():
        destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()


def _is_sharded(weight: torch.Tensor) -> bool:
    """Whether FSDP2 put a distributed parameter in place of the layer's own."""
    return type(weight.data) is not torch.Tensor


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
    elif not statistics and value.is_floating_point() and tuple(value.shape) == shape:
        return _read_dense(layer, value, found, assign)
    elif statistics or _could_be_packed(value, prod(shape)):
        found.missing = _absent_statistics(key, statistics, layer._recipe().get("quant_type", "fp4"))
        if not found.missing:
            _read_packed(layer, key, value, statistics, found, assign)
    else:
        found.errors.append(
            f'size mismatch for {key}: the checkpoint holds {value.dtype} {list(value.shape)}, the layer takes a floating-point weight of shape '
            f"{list(shape)} or one packed in 4 bit with its statistics"
        )
    return found


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
    try:
        state = QuantState.from_dict(statistics, device=device)
        require_consistent(codes, state, layer._dense_shape)
    except (ValueError, TypeError, AssertionError) as error:
        found.errors.append(f'the quantised weight "{key}" cannot be loaded: {error}')
        return
    if not assign:  # the layer's tensors must not be the caller's
        state = copy.deepcopy(state)
    if _is_sharded(layer.weight):  # each rank copies its shard of the codes, as of any parameter; the statistics are whole everywhere
        found.keys.remove(key)
        found.install = lambda: setattr(layer, "quant_state", state)
        return
    codes = codes if assign else codes.to(device, copy=True)
    weight = layer._new_weight(codes, quant_state=state, bnb_quantized=True)
    found.install = lambda: layer._take_weight(weight, assign)


def _read_dense(layer, values: torch.Tensor, found: Finding, assign: bool) -> Finding:
    quantised = layer.quant_state is not None
    if not quantised and not (assign and layer._recipe()):
        return Finding()  # an ordinary parameter
    weight = layer._new_weight(values)
    if quantised:
        weight = weight.to(values.device if assign else layer.weight.device)
    found.install = lambda: layer._take_weight(weight, assign)
    return found


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
