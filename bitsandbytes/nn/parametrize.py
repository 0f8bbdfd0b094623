"""Any parameter of any module in 4 bit, as a parametrisation of PyTorch: reading ``module.name`` dequantises.

Meant for weights that no layer of ours holds, such as the stacked expert weights of mixture-of-experts models. The packed codes are the
parametrisation's ``original``; in a state dict they stand under the parameter's own name, with their statistics beside them, as those of
``Linear4bit`` do. The module moves, casts, copies and pickles as before, and ``torch.nn.utils.parametrize.remove_parametrizations`` gives the
plain parameter back.

The dense weight is short-lived. Within a forward pass of its module it is computed once a thread; for a backward pass it is computed again where
it is needed, see recomputed.py.
"""

import copy
from functools import partial
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import functional
from .._ops import FLOATS
from ..quant_state import QuantState
from . import checkpoint
from .recomputed import Source, functorch_level, recomputed


class Bnb4bitParametrization(nn.Module):
    """Packed codes to values.

    Args:
        quant_state: the state of the codes.
    """

    def __init__(self, quant_state: QuantState):
        super().__init__()
        self.quant_state = quant_state

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Dequantises: codes to a tensor of ``quant_state.shape`` and ``.dtype`` that does not require a gradient."""
        if torch.compiler.is_compiling() or functorch_level() is not None:  # these keep books of their own
            return self._dequantised(packed)
        running = _running.passes.get(self, _Pass())
        if running.source is None or running.source.state is not self.quant_state:
            running.dense = self._dequantised(packed)
            running.source = Source(running.dense, packed, self.quant_state)
        return recomputed(running.dense, running.source) if torch.is_grad_enabled() else running.dense

    def _dequantised(self, packed: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return functional.dequantize_4bit(packed.reshape(-1, 1), self.quant_state).view(self.quant_state.shape)

    def right_inverse(self, values: torch.Tensor) -> torch.Tensor:
        """Values to codes, which is what an assignment to the parameter stores.

        Raises:
            ValueError: values of another shape.
        """
        state = self.quant_state
        if not values.is_floating_point():  # codes, when the parametrisation is registered: these are stored as they are
            raise NotImplementedError(f"a 4-bit parameter takes floating-point values, got {values.dtype}")
        if values.shape != state.shape:
            raise ValueError(f"the 4-bit parameter has shape {list(state.shape)}, cannot assign values of shape {list(values.shape)}")
        packed, self.quant_state = _quantised(values.to(state.absmax.device), state.nested, state.quant_type, state.blocksize)
        self.quant_state.dtype = state.dtype
        return packed

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        state = self.quant_state
        moved = fn(torch.empty(0, dtype=state.dtype, device=state.absmax.device))
        if not moved.is_meta:  # statistics stay, so that loading the codes brings the weight back
            self.quant_state = state.moved_to(moved.device)
            self.quant_state.dtype = moved.dtype if moved.dtype in FLOATS else torch.float32
        return self

    def extra_repr(self) -> str:
        state = self.quant_state
        return f"shape={tuple(state.shape)}, quant_type={state.quant_type!r}, blocksize={state.blocksize}, nested={state.nested}"


def _quantised(values: torch.Tensor, nested: bool, quant_type: str, blocksize: int | None) -> tuple[torch.Tensor, QuantState]:
    values = values.detach().contiguous()
    return functional.quantize_4bit(
        values if values.dtype in FLOATS else values.float(), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )  # fmt: skip


class _PackedParameter(nn.Parameter):
    """Packed codes that become an ordinary parameter when ``remove_parametrizations`` leaves the dense values in their place."""

    def set_(self, values: torch.Tensor) -> torch.Tensor:
        if values.dtype == self.dtype:
            return super().set_(values)
        self.data = values.detach().as_subclass(torch.Tensor)
        self.__class__ = nn.Parameter
        return self


# ----------------------------------------------------------------------------------------------------------------------- replacing


def replace_parameter_4bit(
    module: nn.Module, param_name: str, compress_statistics: bool = False, quant_type: str = "nf4", blocksize: int | None = None
) -> None:  # fmt: skip
    """Quantises a parameter, in place.

    Args:
        module: the module that has it.
        param_name: its name there; any shape.
        compress_statistics: quantise the scales as well (double quantisation).
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale; default 64.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: it is not a parameter.
        ValueError: values that cannot be quantised so.
    """
    values = _parameter(module, param_name)
    _install(module, param_name, *_quantised(values, compress_statistics, quant_type, blocksize))


def replace_parameter_4bit_prequantized(module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device) -> None:
    """Declares that a parameter holds packed codes already.

    Args:
        module: the module that has it.
        param_name: its name there.
        qs_dict: the statistics, as ``QuantState.as_dict`` gives them; keys may have a prefix. Not changed.
        device: where codes and statistics go.

    Raises:
        AttributeError, TypeError: as for ``replace_parameter_4bit``.
        ValueError: statistics that are incomplete, or do not belong to the codes.
    """
    codes = _parameter(module, param_name).detach().to(device)
    state = QuantState.from_dict(qs_dict, device=codes.device)
    checkpoint.require_consistent(codes, state)
    _install(module, param_name, _as_bytes(codes), state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes in floating storage would be converted by a cast of the module; bytes are left alone."""
    return codes.contiguous().view(-1).view(torch.uint8).view(-1, 1)


def _install(module: nn.Module, name: str, packed: torch.Tensor, state: QuantState) -> None:
    setattr(module, name, _PackedParameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _make_copyable(type(module))
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """What a module with a 4-bit parameter does around its forward pass and its state dict."""
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)  # also when the pass is cut short, as checkpointing does
    module._register_state_dict_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module._register_load_state_dict_pre_hook(partial(_load_pre_hook, param_name=param_name), with_module=True)


# ---------------------------------------------------------------------------------------------------- one dense weight a forward pass


class _Pass:
    """A parametrisation's weight in the forward pass of its module that a thread is in: how deep, and the dense weight once there is one."""

    def __init__(self):
        self.depth = 0
        self.dense = self.source = None


class _Running(threading.local):
    def __init__(self):
        self.passes: dict[Bnb4bitParametrization, _Pass] = {}


_running = _Running()


def _parametrizations(module: nn.Module) -> list[Bnb4bitParametrization]:
    if torch.compiler.is_compiling() or not parametrize.is_parametrized(module):
        return []
    return [chain[0] for chain in module.parametrizations.values() if isinstance(chain[0], Bnb4bitParametrization)]


def _enable_parametrization_cache(module: nn.Module, inputs: tuple) -> None:
    for parametrization in _parametrizations(module):
        _running.passes.setdefault(parametrization, _Pass()).depth += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple, output: Any) -> None:
    for parametrization in _parametrizations(module):
        running = _running.passes.get(parametrization)
        if running is not None:  # None: an earlier hook failed, so that the pass never began
            running.depth -= 1
            if not running.depth:
                del _running.passes[parametrization]
    if parametrize._cache_enabled <= 0:  # PyTorch's own cache, which has no owner here
        parametrize._cache_enabled, parametrize._cache = 0, {}


# ------------------------------------------------------------------------------------------------------------------------ state dict


def _original_key(prefix: str, name: str) -> str:
    return f"{prefix}parametrizations.{name}.original"


def _parametrized_state_dict_post_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *, param_name: str = "weight"
) -> None:  # fmt: skip
    """Writes codes and statistics under the parameter's own name."""
    key = _original_key(prefix, param_name)
    if key not in state_dict:
        return
    state_dict[prefix + param_name] = state_dict.pop(key)
    state = module.parametrizations[param_name][0].quant_state
    for name, tensor in state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{name}"] = tensor


def _load_pre_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata, strict, missing_keys, unexpected_keys, error_msgs, *,
    param_name: str,
) -> None:  # fmt: skip
    """Reads what the post-hook writes, or dense values, which are quantised; without the parameter, nothing.

    ``nn.Module`` copies the codes afterwards: it finds them under the name of the parametrisation's own parameter.
    """
    key, own_key = prefix + param_name, _original_key(prefix, param_name)
    if not parametrize.is_parametrized(module, param_name):
        return
    chain = module.parametrizations[param_name]
    if key not in state_dict:
        if own_key not in state_dict:
            state_dict[own_key] = chain.original
            missing_keys.append(key)
            return
        state_dict[key] = state_dict[own_key]  # saved where there were no hooks for state dicts, hence without statistics
    entries = {name: state_dict.pop(f"{key}.{name}") for name in checkpoint.STATISTICS if f"{key}.{name}" in state_dict}
    statistics = {f"{key}.{name}": tensor for name, tensor in entries.items()}
    values = state_dict.pop(key)
    state_dict[own_key] = chain.original  # loading a parameter into itself changes nothing
    missing = [] if _is_dense(values, chain[0].quant_state) else checkpoint._absent_statistics(key, statistics, chain[0].quant_state.quant_type)
    missing_keys.extend(missing)
    if missing:
        return
    try:
        codes, state = _read(values, statistics, chain)
    except (ValueError, TypeError, AssertionError) as error:
        error_msgs.append(f'the quantised parameter "{key}" cannot be loaded: {error}')
        return
    chain[0].quant_state = state
    state_dict[own_key] = _PackedParameter(codes, requires_grad=False)
    if chain.original.is_meta and not local_metadata.get("assign_to_params_buffers", False):  # there is nothing to copy into
        chain.original = state_dict[own_key] = _PackedParameter(codes.clone(), requires_grad=False)


def _is_dense(values, state: QuantState) -> bool:
    return isinstance(values, torch.Tensor) and values.is_floating_point() and values.shape == state.shape


def _read(values: torch.Tensor, statistics: dict[str, torch.Tensor], chain: nn.ModuleList) -> tuple[torch.Tensor, QuantState]:
    """Codes and state from what a state dict holds; dense values are quantised as the present ones are."""
    old = chain[0].quant_state
    if not statistics and _is_dense(values, old):
        codes, state = _quantised(values.to(chain.original.device), old.nested, old.quant_type, old.blocksize)
        state.dtype = old.dtype
        return codes, state
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(values).__name__}")
    state = copy.deepcopy(QuantState.from_dict(statistics, device=values.device if chain.original.is_meta else chain.original.device))
    checkpoint.require_consistent(values, state, tuple(old.shape))
    return _as_bytes(values), state


# ------------------------------------------------------------------------------------------------------------------ copies and pickles


def _make_copyable(parametrized_class: type) -> None:
    """Lets a module whose class PyTorch made for its parametrisations be copied and pickled, which PyTorch leaves out."""
    parametrized_class.__reduce_ex__ = _reduce
    parametrized_class.__deepcopy__ = _deepcopy
    parametrized_class.__setstate__ = _setstate


def _reduce(module: nn.Module, protocol) -> tuple:
    plain_class = parametrize.type_before_parametrizations(module)
    state = plain_class.__getstate__(module) if hasattr(plain_class, "__getstate__") else module.__dict__
    return _empty_parametrized, (plain_class,), state


def _empty_parametrized(plain_class: type) -> nn.Module:
    """A module of the class, with nothing in it yet, that can have parametrised parameters."""
    module = plain_class.__new__(plain_class)
    parametrize._inject_new_class(module)
    _make_copyable(type(module))
    return module


def _setstate(module: nn.Module, state: dict[str, Any]) -> None:
    plain_class = type(module).__bases__[0]
    plain_class.__setstate__(module, state)
    for name, chain in module.parametrizations.items():
        parametrize._inject_property(module, name)
        if isinstance(chain[0], Bnb4bitParametrization) and type(chain.original) is nn.Parameter:  # how parameters come out of a pickle
            chain.original = _PackedParameter(chain.original.data, requires_grad=False)


def _deepcopy(module: nn.Module, memo: dict) -> nn.Module:
    replica = _empty_parametrized(parametrize.type_before_parametrizations(module))
    memo[id(module)] = replica
    _setstate(replica, copy.deepcopy(module.__dict__, memo))
    return replica
