"""Optimizer state on its way to and from checkpoints.

Three forms are written. An ordinary parameter's state is that of the published library: the moments and what belongs to them in a dictionary of
its own under ``__bnb_optimizer_quant_state__``, beside ``step``. For DTensor parameters, and for torch's distributed checkpoints, which want
to see every tensor, it is one dictionary of tensors that are laid out as the parameter is, see sharding.py. For FSDP1, which can gather only what
has the size of the parameter, the moments are in float32.

All of these are read, and checkpoints of torch.optim for the same algorithm.
"""

from copy import deepcopy
import sys
from typing import Any

import torch

from ..paging import is_paged, wait_for_pages
from .algorithms import MOMENTS, STATE_KEYS, Moment, betas_from_torch, moments_of, require_numbers
from .sharding import (
    absmax_by_granules,
    blocks_from_granules,
    dequantised,
    is_dtensor,
    is_fsdp1_shard,
    like_parameter,
    local,
    part_of_moment,
    quantised,
)

# What torch.optim writes into parameter groups and has no meaning here.
_FOREIGN_SETTINGS = {"foreach", "capturable", "differentiable", "fused", "momentum", "dampening"}

_RUNTIME_ATTRIBUTES = {"mng", "page_mng", "_overrides", "_overrides_version"}

_DISTRIBUTED_CHECKPOINTS = ("torch.distributed.checkpoint.", "torch.distributed.fsdp.")


def _asked_by_torch_distributed() -> bool:
    """Whether ``state_dict`` was called for a distributed checkpoint. Those flatten every dictionary and cannot put an inner one back."""
    frame = sys._getframe(2)
    for _ in range(3):  # a wrapper, such as a subclass or accelerate's optimizer, may be in between
        if frame is not None and frame.f_globals.get("__name__", "").startswith(_DISTRIBUTED_CHECKPOINTS):
            return True
        frame = frame and frame.f_back
    return False


class CheckpointedState:
    """``state_dict``, ``load_state_dict``, copying and pickling, for ``Optimizer8bit``."""

    _FSDP_WRAPPED_QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"

    # ------------------------------------------------------------------------------------------------------------ copy and pickle

    def __getstate__(self) -> dict[str, Any]:
        self._wait_for_pages()
        torch_internals = ("_optimizer_", "_zero_grad_", "_warned_capturable", "_patched_")
        return {key: value for key, value in vars(self).items() if key not in _RUNTIME_ATTRIBUTES and not key.startswith(torch_internals)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()
        for p, values in self._states_of_parameters():
            for key, value in values.items():
                if is_paged(value):  # a copy only says so
                    values[key] = self._paged_again(local(p), value.detach())

    def _wait_for_pages(self) -> None:
        if self.is_paged:
            wait_for_pages([value for _, values in self._states_of_parameters() for value in values.values()])

    def _states_of_parameters(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The states of parameters. Programs may keep entries of any kind beside them, as in torch.optim."""
        return [(p, values) for p, values in self.state.items() if isinstance(p, torch.Tensor)]

    # ---------------------------------------------------------------------------------------------------------------------- save

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings of the groups, as torch.optim has them.

        Tensors are not copied. The state of sharded parameters is sharded. Waits for the kernels that still use paged states.
        """
        self._wait_for_pages()
        distributed = _asked_by_torch_distributed()
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in saved["state"].items():
            if isinstance(index, int):
                saved["state"][index] = self._saved_form(parameters[index], values, distributed)
        return saved

    def _saved_form(self, p: torch.Tensor, state: dict[str, Any], distributed: bool) -> dict[str, Any]:
        if is_fsdp1_shard(p):
            return self._in_float32(state)
        if is_dtensor(p) or distributed:
            return self._distributed(p, state)
        own = {key: value for key, value in state.items() if key in self.non_castable_tensor_keys}
        rest = {key: value for key, value in state.items() if key not in own}
        return {**rest, self._FSDP_WRAPPED_QUANT_STATE_KEY: own} if own else rest

    def _distributed(self, p: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """What torch's distributed checkpoints can gather and cut: every moment and its statistics laid out as the parameter is."""
        saved = dict(state)
        for moment in self._moments_in(state):
            key, absmax, _ = moment.keys
            leading = () if moment.rows == 1 else (moment.rows,)
            saved[key] = like_parameter(state[key], p, (*leading, *p.shape), len(leading))
            if absmax in state:
                saved[absmax] = absmax_by_granules(state[absmax], p)
        return saved

    def _in_float32(self, state: dict[str, Any]) -> dict[str, Any]:
        """The moments in float32 and nothing else: FSDP1 can only gather what has the size of the parameter."""
        kept = {key: value for key, value in state.items() if key not in self.non_castable_tensor_keys}
        for moment in self._moments_in(state):
            values = _float32(state, moment)
            kept.update({moment.keys[0]: values} if moment.rows == 1 else {f"{moment.keys[0]}_{row}": value for row, value in enumerate(values)})
        return kept

    def _moments_in(self, state: dict[str, Any]) -> list[Moment]:
        return [moment for moment in MOMENTS.get(self.optimizer_name, ()) if moment.keys[0] in state]

    # ---------------------------------------------------------------------------------------------------------------------- load

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True, convert_states: bool = False) -> None:
        """Loads what ``state_dict`` returned, here or in the published library, or a state of torch.optim for the same algorithm.

        Args:
            state_dict: is copied.
            move_to_device: move the state to where the parameters are.
            convert_states: bring states to the number of bits that this optimizer would give them. Otherwise they keep what they were saved with;
                those of torch.optim are converted in any case.

        Raises:
            ValueError: the dict has not the form of an optimizer's state, the groups differ in number or in size from those of this optimizer, or
                a state does not fit its parameter.
            TypeError: a hyperparameter is not a number.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result

        _require_form(state_dict)
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"the checkpoint has groups of {[len(group['params']) for group in saved_groups]} parameters, "
                f"this optimizer of {[len(group['params']) for group in self.param_groups]}"
            )
        groups = [self._loaded_group(group, saved) for group, saved in zip(self.param_groups, saved_groups)]
        places = {
            key: (p, gindex, pindex)
            for gindex, (group, saved) in enumerate(zip(groups, saved_groups))
            for pindex, (p, key) in enumerate(zip(group["params"], saved["params"]))
        }
        state = {key: deepcopy(value) for key, value in state_dict["state"].items() if key not in places}
        for key, (p, gindex, pindex) in places.items():
            if key in state_dict["state"]:
                config = self.get_config(gindex, pindex, groups[gindex])
                state[p] = self._loaded_state(state_dict["state"][key], p, config, move_to_device, convert_states)
        self.__setstate__({"param_groups": groups})
        self.state.clear()
        self.state.update(state)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded_group(self, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """A group with the saved settings. What the checkpoint does not say stays as it is."""
        foreign = set() if "betas" in saved else _FOREIGN_SETTINGS | {"alpha"}
        settings = {key: deepcopy(value) for key, value in saved.items() if key not in foreign | _FOREIGN_SETTINGS | {"params", "betas"}}
        betas = betas_from_torch(self.optimizer_name, saved)
        loaded = {**group, **settings, "params": group["params"]}
        if betas is not None:
            loaded["betas"] = betas
        require_numbers(loaded)
        if len(loaded.get("betas", ())) != len(group.get("betas", ())):
            raise ValueError(f"betas of the checkpoint are {betas!r}, those of this optimizer {group.get('betas')!r}: it is of another algorithm")
        return loaded

    @torch.no_grad()
    def _loaded_state(self, saved: dict[str, Any], p: torch.Tensor, config: dict[str, Any], move_to_device: bool, convert: bool) -> dict[str, Any]:
        saved = {key: value for key, value in saved.items() if not (isinstance(value, dict) and not value)}
        saved.update(saved.pop(self._FSDP_WRAPPED_QUANT_STATE_KEY, {}))
        from_torch = "state1" not in saved and self._rename_from_torch(saved)
        state: dict[str, Any] = {}
        for key, value in saved.items():
            own = key in self.non_castable_tensor_keys or key.split("_")[0] in STATE_KEYS
            if isinstance(value, torch.Tensor) and key.startswith(("state", "absmax")):
                rows = any(moment.rows > 1 and key in moment.keys for moment in MOMENTS.get(self.optimizer_name, ()))
                value = part_of_moment(value, p, int(rows), key.startswith("absmax"))
            state[key] = _placed(value, p, own, move_to_device)
        if isinstance(state.get("step"), torch.Tensor) and state["step"].numel() == 1:
            state["step"] = int(state["step"].item())
        if state and not (isinstance(state.get("step"), int) and state["step"] >= 0):
            raise ValueError(f'the state of a parameter must count its steps in "step", got {state.get("step")!r}')
        self._join_rows(state)
        for moment in self._moments_in(state):
            self._fit(state, moment, local(p))
        if from_torch or convert or is_fsdp1_shard(p):
            self._convert(state, p, config)
        for moment in self._moments_in(state):
            state[moment.keys[0]] = self._paged_again(local(p), state[moment.keys[0]])
        return state

    def _paged_again(self, part: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A moment in managed memory, if that is where a new one would be."""
        return value if part.is_cpu or not self._is_paged(part) else self._pages(part, value.shape, value.dtype).copy_(value)

    def _rename_from_torch(self, saved: dict[str, Any]) -> bool:
        """Gives the moments of a torch.optim state our names. Returns whether there were any."""
        names = {moment.torch_name: moment.keys[0] for moment in MOMENTS.get(self.optimizer_name, ())}
        found = [name for name in names if name in saved]
        for name in found:
            value = saved.pop(name)
            if value is not None:
                saved[names[name]] = value
        if found:
            saved.setdefault("step", 1 if "state1" in saved else 0)  # torch.optim.SGD does not count
        return bool(found)

    def _join_rows(self, state: dict[str, Any]) -> None:
        for moment in MOMENTS.get(self.optimizer_name, ()):
            for key in moment.keys[:2]:
                if moment.rows > 1 and f"{key}_0" in state:
                    state[key] = torch.stack([state.pop(f"{key}_{row}") for row in range(moment.rows)])

    def _fit(self, state: dict[str, Any], moment: Moment, part: torch.Tensor) -> None:
        """Checks one moment against its parameter, and brings its statistics into the form that the operator takes.

        Raises:
            ValueError: it is no tensor, has another size than the parameter, or 8 bits and no statistics.
        """
        key, absmax, qmap = moment.keys
        for name in moment.keys:
            if name in state and not isinstance(state[name], torch.Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(state[name]).__name__}")
        shape = part.shape if moment.rows == 1 else (moment.rows, *part.shape)
        if state[key].numel() != torch.Size(shape).numel():
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, the parameter {tuple(part.shape)}: the checkpoint is of another model")
        state[key] = state[key].view(shape) if state[key].is_contiguous() else state[key].reshape(shape)
        if state[key].dtype != torch.uint8:
            return
        standard = self._qmap(moment.signed, state[key].device)
        if absmax not in state:
            raise ValueError(f"{key} holds 8-bit codes, but the checkpoint has no {absmax} for them")
        if qmap not in state or torch.equal(state[qmap], standard):
            state[qmap] = standard
        if moment.rows == 1:
            state[key], state[absmax] = blocks_from_granules(state[key], state[absmax], state[qmap])
        else:
            rows = [blocks_from_granules(*row, state[qmap]) for row in zip(state[key], state[absmax])]
            state[key], state[absmax] = (torch.stack(parts) for parts in zip(*rows))

    def _convert(self, state: dict[str, Any], p: torch.Tensor, config: dict[str, Any]) -> None:
        """Brings the moments to 8 or 32 bits, whichever this optimizer would make for the parameter."""
        to_8bit = self._wants_8bit(p, config)
        for moment in moments_of(self.optimizer_name, config):
            key, absmax, qmap = moment.keys
            if key not in state or (state[key].dtype == torch.uint8) == to_8bit:
                continue
            if not to_8bit:
                state[key] = _float32(state, moment)
                del state[absmax], state[qmap]
                continue
            state[qmap] = self._qmap(moment.signed, state[key].device)
            if moment.rows == 1:
                state[key], state[absmax] = quantised(state[key], state[qmap])
            else:
                state[key], state[absmax] = (torch.stack(parts) for parts in zip(*(quantised(row, state[qmap]) for row in state[key])))


def _require_form(state_dict: dict[str, Any]) -> None:
    """Raises ValueError where a dict has not the form that every optimizer writes: a dict of dicts, and a list of groups."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), (list, tuple)) for group in groups
    ):
        raise ValueError(f'"param_groups" must be a list of dictionaries, each with a list "params"; got {_type_names(groups)}')
    keys = [key for group in groups for key in group["params"]]
    if not isinstance(state, dict) or not all(isinstance(state.get(key, {}), dict) for key in keys):
        raise ValueError(f'"state" must be a dictionary with one dictionary for each parameter; got {_type_names(state)}')


def _type_names(value) -> str:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return f"{type(value).__name__} of {sorted({type(item).__name__ for item in inner})}"


def _float32(state: dict[str, Any], moment: Moment) -> torch.Tensor:
    """A moment as float32, of the shape in which it is stored."""
    key, absmax, qmap = moment.keys
    if state[key].dtype != torch.uint8:
        return state[key]
    if moment.rows == 1:
        return dequantised(state[key], state[absmax], state[qmap])
    return torch.stack([dequantised(*row, state[qmap]) for row in zip(state[key], state[absmax])])


def _placed(value, p: torch.Tensor, own: bool, move_to_device: bool):
    """A copy of a saved value for the state of ``p``: on its device, and in its dtype unless it is one of our own.

    Containers are searched. Integers and 8-bit codes are never cast.
    """
    if isinstance(value, torch.Tensor):
        wait_for_pages([value])
        castable = value.is_floating_point() and p.is_floating_point() and not own
        return value.to(device=p.device if move_to_device else value.device, dtype=p.dtype if castable else value.dtype, copy=True)
    if isinstance(value, dict):
        return {key: _placed(item, p, own, move_to_device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, p, own, move_to_device) for item in value)
    return deepcopy(value)
