"""The engine of all optimizers: settings, state, and one call of the operator for all parameters that are stepped alike."""

from ast import literal_eval
from collections.abc import Sequence
from typing import Any, Optional
import warnings

import torch

from .. import functional as F
from .._ops import OPTIMIZER_BLOCKSIZE, blocks
from ..paging import start_filling
from .algorithms import STATE_KEYS, Moment, moments_of, require_numbers
from .batch import Batch, picked
from .constructors import accepts_removed_arguments
from .manager import GlobalOptimManager
from .sharding import local
from .state import CheckpointedState

# Smaller states are not worth a page of managed memory.
MIN_PAGED_SIZE = 100_000

# Settings beyond those of the published constructors. As keyword arguments of every optimizer, and per parameter group.
OPTIONS = {
    "maximize": False,
    "stochastic_rounding": False,
    "seed": 0,
    "decoupled_weight_decay": True,
    "bias_correction": True,
    "amsgrad": False,
    "nesterov": False,
    "centered": False,
    "lr_decay": 0.0,
    "initial_accumulator_value": 0.0,
}

_ARGS = {"optim_bits": 32, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": False}

_SCHEDULES = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}


class MockArgs:
    """Settings as attributes: ``optim_bits``, ``min_8bit_size``, ``max_unorm``, ``skip_zeros``."""

    def __init__(self, initial_data: dict[str, Any]):
        vars(self).update(initial_data)


class Optimizer8bit(CheckpointedState, torch.optim.Optimizer):
    """Base of all optimizers, with states of 8 or 32 bits.

    ``step`` gathers the parameters that have the same settings, step count and kind of state, and steps them in one native call. Subclasses that
    override ``update_step`` have it called for every parameter instead.

    Args:
        params: parameters, or groups of them. A group may set every hyperparameter, ``optim_bits`` and ``min_8bit_size`` for itself.
        defaults: hyperparameters for the groups that do not.
        optim_bits: 8 or 32: size of the state of parameters with at least ``min_8bit_size`` elements.
        is_paged: keep large states in managed memory that the GPU and the host share.

    Raises:
        TypeError: ``is_paged`` is not a bool, such as an argument of an older version that has moved.
    """

    def __init__(self, params, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False):
        if not isinstance(is_paged, bool):
            raise TypeError(f"is_paged must be True or False, got {is_paged!r}")
        super().__init__(params, defaults)
        self.initialized = False
        self.is_paged = is_paged
        self._warned_unpaged = False
        self.optimizer_name = None
        self.args = MockArgs({**_ARGS, "optim_bits": optim_bits})
        self.options = dict(OPTIONS)
        self.non_castable_tensor_keys = set(STATE_KEYS) | {"max1", "max2", "new_max1", "new_max2", "gnorm_vec"}
        self._attach()
        self.fill_qmap()

    def _attach(self) -> None:
        """What an optimizer shares with its process and does not take along when it is copied or pickled."""
        self.mng = GlobalOptimManager.get_instance()
        self.page_mng = F.GlobalPageManager.get_instance()
        self._overrides, self._overrides_version = {}, None

    def _configure(self, optimizer_name, args, optim_bits, min_8bit_size, max_unorm, skip_zeros, options) -> None:
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {sorted(unknown)[0]!r}")
        if not 0 <= options.get("seed", 0) < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {options['seed']}")
        self.optimizer_name = optimizer_name
        self.options.update(options)
        self.args = args or MockArgs({"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "max_unorm": max_unorm, "skip_zeros": skip_zeros})

    # ----------------------------------------------------------------------------------------------------------------- settings

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters. What it does not say of its hyperparameters is what the constructor was told.

        Raises:
            TypeError: a hyperparameter of the group is not a number.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            require_numbers(param_group)
        super().add_param_group(param_group)

    def fill_qmap(self) -> None:
        """Makes the code tables of 8-bit states: "dynamic" for signed moments, "udynamic" for the others."""
        self.name2qmap = {"dynamic": F.create_dynamic_map(signed=True), "udynamic": F.create_dynamic_map(signed=False)}

    def _qmap(self, signed: bool, device: torch.device) -> torch.Tensor:
        name = "dynamic" if signed else "udynamic"
        if self.name2qmap[name].device != device:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap[name]

    def check_overrides(self) -> None:
        """Looks up which of the parameters have settings of their own in ``GlobalOptimManager``."""
        self._overrides = self.mng.overrides([group["params"] for group in self.param_groups])
        self._overrides_version = self.mng.version

    def _config(self, group: dict[str, Any], override: Optional[dict[str, Any]]) -> dict[str, Any]:
        args = {key: getattr(self.args, key, default) for key, default in _ARGS.items()}
        config = {**_SCHEDULES, **self.options, **args}
        for key in (*config, "lr", "betas", "eps", "weight_decay"):
            if key in group:
                config[key] = group[key]
        return {**config, **override} if override else config

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of one parameter: those of its group, then those of the optimizer, overridden by ``GlobalOptimManager``."""
        if self._overrides_version != self.mng.version:
            self.check_overrides()
        return self._config(group, self._overrides.get(group["params"][pindex]))

    # -------------------------------------------------------------------------------------------------------------------- state

    def to_gpu(self) -> None:
        """Moves the state of every parameter to where the parameter is. Paged state stays: the GPU reaches it."""
        for group in self.param_groups:
            for p in group["params"]:
                for key, value in self.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor) and not getattr(value, "is_paged", False) and not p.is_cpu:
                        self.state[p][key] = value.to(p.device)

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros like ``p``, in managed memory where the optimizer is paged and they are many."""
        return self._zeros(p, p.shape, dtype)

    def _is_paged(self, p: torch.Tensor) -> bool:
        return self.is_paged and p.numel() >= MIN_PAGED_SIZE

    def _zeros(self, p: torch.Tensor, shape, dtype: torch.dtype) -> torch.Tensor:
        if not self._is_paged(p):
            return torch.zeros(shape, dtype=dtype, device=p.device)
        if p.device.type == "cpu":
            if not self._warned_unpaged:
                self._warned_unpaged = True
                warnings.warn("Paged optimizers use ordinary memory for parameters on the CPU.", stacklevel=2)
            return torch.zeros(shape, dtype=dtype)
        buffer = self._pages(p, shape, dtype)
        start_filling(buffer, 0)
        return buffer

    def _pages(self, p: torch.Tensor, shape, dtype: torch.dtype) -> torch.Tensor:
        buffer = F.get_paged(*shape, dtype=dtype, device=p.device)
        self.page_mng.paged_tensors.append(buffer)
        return buffer

    def prefetch_state(self, p: torch.Tensor) -> None:
        """Starts moving the paged state of a parameter to its device."""
        if self.is_paged:
            for value in self.state[p].values():
                if getattr(value, "is_paged", False):
                    F.prefetch_tensor(value)

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Makes the state of a parameter: ``step`` 0 and the moments.

        Raises:
            NotImplementedError: ``optim_bits`` is neither 8 nor 32.
        """
        config = self.get_config(gindex, pindex, group)
        self.state[p]["step"] = 0
        for moment in moments_of(self.optimizer_name, config):
            self._init_moment(p, moment, config, self._wants_8bit(p, config))
        self._init_norm(p, config)

    def _init_norm(self, p: torch.Tensor, config: dict[str, Any]) -> None:
        if config["max_unorm"] > 0.0:
            self.state[p].setdefault("unorm_vec", torch.zeros(1, dtype=torch.float32, device=p.device))

    def _wants_8bit(self, p: torch.Tensor, config: dict[str, Any]) -> bool:
        if config["optim_bits"] not in (8, 32):
            raise NotImplementedError(f"optimizer states have 8 or 32 bits, got optim_bits={config['optim_bits']}")
        return config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"] and not config["centered"]

    def _init_moment(self, p: torch.Tensor, moment: Moment, config: dict[str, Any], in_8bit: bool) -> None:
        state, part = self.state[p], local(p)
        key, absmax_key, qmap_key = moment.keys
        dtype = torch.uint8 if in_8bit else torch.float32
        state[key] = self.get_state_buffer(part, dtype) if moment.rows == 1 else self._zeros(part, (moment.rows, *part.shape), dtype)
        start = config["initial_accumulator_value"] if self.optimizer_name == "adagrad" else 0.0
        if not in_8bit:
            if start:
                start_filling(state[key], start)
            return
        state[qmap_key] = self._qmap(moment.signed, part.device)
        count = blocks(part.numel(), OPTIMIZER_BLOCKSIZE)
        shape = (count,) if moment.rows == 1 else (moment.rows, count)
        state[absmax_key] = torch.full(shape, float(start), dtype=torch.float32, device=part.device)
        if start:
            start_filling(state[key], 255)  # the code of 1

    # --------------------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step.

        Args:
            closure: computes the loss anew; called with gradients enabled.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter is of another type than float32, float16 and bfloat16.
        """
        loss = evaluate(closure)
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True

        if self._overrides_version != self.mng.version:
            self.check_overrides()
        batched = all(getattr(type(self), name) is getattr(Optimizer8bit, name) for name in ("update_step", "get_config", "prefetch_state"))
        batch, passed = Batch(self.optimizer_name, self.is_paged), 0
        for gindex, group in enumerate(self.param_groups):
            places = [pindex for pindex, p in enumerate(group["params"]) if p.grad is not None]
            if batched:
                self._add_group(batch, gindex, places, passed)
            else:
                for pindex in places:
                    self._states(gindex, [pindex])
                    self.prefetch_state(group["params"][pindex])
                    self.update_step(group, group["params"][pindex], gindex, pindex)
            passed += len(group["params"])
        batch.run()
        self._wait_for_pages()  # to look into `state` after a step is common, and for torch these are tensors of the CPU
        return loss

    def _states(self, gindex: int, places: list[int]) -> list[dict[str, Any]]:
        """The states of some parameters of a group. Those they lack are made."""
        group = self.param_groups[gindex]
        states = [self.state[group["params"][pindex]] for pindex in places]
        if all(states):
            return states
        for pindex, state in zip(places, states):
            if not state:
                self.init_state(group, group["params"][pindex], gindex, pindex)
        return [self.state[group["params"][pindex]] for pindex in places]

    def _add_group(self, batch: Batch, gindex: int, places: list[int], passed: int) -> None:
        """Adds those parameters of a group that have gradients. ``passed``: how many parameters the groups before it have."""
        group, states = self.param_groups[gindex], self._states(gindex, places)
        params = [group["params"][pindex] for pindex in places]
        for override, rows in self._by_override(params):
            config = self._config(group, override)
            ordinals = [passed + places[row] for row in rows] if config["stochastic_rounding"] else []
            self._add(batch, picked(params, rows), picked(states, rows), config, ordinals)

    def _by_override(self, params: list[torch.Tensor]) -> list[tuple[Optional[dict[str, Any]], Sequence[int]]]:
        """Settings that parameters have of their own, with the numbers of those parameters; None with the numbers of all others."""
        if not self._overrides:
            return [(None, range(len(params)))] if params else []
        own = [(self._overrides[p], [i]) for i, p in enumerate(params) if p in self._overrides]
        others = [i for i, p in enumerate(params) if p not in self._overrides]
        return [*own, (None, others)] if others else own

    def _add(self, batch: Batch, params: list[torch.Tensor], states: list[dict], config: dict[str, Any], ordinals: Sequence[int]) -> None:
        needed = {"step", *(moment.keys[0] for moment in moments_of(self.optimizer_name, config))}
        if config["max_unorm"] > 0.0:
            needed.add("unorm_vec")
        if not all([key in state for key in needed for state in states]):
            for p in params:
                self._complete_state(p, config)
        batch.add(params, states, config, ordinals)

    def _complete_state(self, p: torch.Tensor, config: dict[str, Any]) -> None:
        """Makes the moments that a state lacks because a setting came later, such as amsgrad from a checkpoint of torch.optim."""
        state = self.state[p]
        if "state1" not in state or "step" not in state:
            raise RuntimeError(
                f"{type(self).__name__}: the state of a parameter of shape {tuple(p.shape)} has no moments, only {sorted(state)}. "
                "Call init_state before update_step, or load a checkpoint of the same algorithm."
            )
        for moment in moments_of(self.optimizer_name, config):
            if moment.keys[0] not in state:
                self._init_moment(p, moment, config, state["state1"].dtype == torch.uint8)
        self._init_norm(p, config)

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Steps one parameter that has a gradient and a state."""
        ordinal = sum(len(g["params"]) for g in self.param_groups[:gindex]) + pindex
        batch = Batch(self.optimizer_name, self.is_paged)
        with torch.no_grad():
            self._add(batch, [p], [self.state[p]], self.get_config(gindex, pindex, group), [ordinal])
            batch.run()


def evaluate(closure):
    """What a closure of ``step`` returns, computed with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_hyperparameters(lr, betas, eps, weight_decay) -> None:
    """
    Raises:
        TypeError: one of them is not a number.
        ValueError: one of them is negative, or a beta is not below 1.
    """
    require_numbers(dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
    for name, value in (("learning rate", lr), ("epsilon", eps), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"Invalid {name}: it must not be negative, got {value}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: it must be in [0, 1), got {beta}")


class Optimizer2State(Optimizer8bit):
    """Base of the optimizers with two moments: ``optimizer_name`` is "adam", "lamb" or "ademamix".

    Args:
        lr, betas, eps, weight_decay: defaults of the groups. ``betas`` may be written as a string, "(0.9, 0.95)".
        optim_bits, min_8bit_size: states of parameters with at least ``min_8bit_size`` elements have ``optim_bits`` bits, 8 or 32.
        args: an object with ``optim_bits``, ``min_8bit_size``, ``max_unorm`` and ``skip_zeros``, which then count instead of the arguments.
        max_unorm: largest norm of an update, without the learning rate, as a multiple of the parameter's norm; 0 for none.
        skip_zeros: leave elements alone whose gradient is exactly zero.
        is_paged: see ``Optimizer8bit``.
        alpha, t_alpha, t_beta3: of AdEMAMix.
        options: ``maximize``, ``stochastic_rounding``, ``seed``, and what single algorithms know: ``decoupled_weight_decay``, ``bias_correction``,
            ``amsgrad``, ``nesterov``, ``centered``, ``lr_decay``, ``initial_accumulator_value``.

    Raises:
        TypeError: a hyperparameter is not a number.
        ValueError: a hyperparameter is out of range.
    """

    @accepts_removed_arguments
    def __init__(
        self, optimizer_name, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, optim_bits=32, args=None, min_8bit_size=4096,
        max_unorm=0.0, skip_zeros=False, is_paged=False, alpha=0.0, t_alpha: Optional[int] = None, t_beta3: Optional[int] = None, **options,
    ):  # fmt: skip
        if isinstance(betas, str):
            betas = [float(beta) for beta in literal_eval(betas)]
        _check_hyperparameters(lr, betas, eps, weight_decay)
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3)
        super().__init__(params, defaults, optim_bits, is_paged)
        self._configure(optimizer_name, args, optim_bits, min_8bit_size, max_unorm, skip_zeros, options)


class Optimizer1State(Optimizer8bit):
    """Base of the optimizers with one moment: ``optimizer_name`` is "momentum", "lars", "lion", "rmsprop" or "adagrad".

    Args:
        betas: Lion's; (momentum, dampening) for momentum and lars; (smoothing, momentum) for rmsprop.

    See ``Optimizer2State`` for the other arguments.
    """

    @accepts_removed_arguments
    def __init__(
        self, optimizer_name, params, lr=1e-3, betas=(0.9, 0.0), eps=1e-8, weight_decay=0.0, optim_bits=32, args=None, min_8bit_size=4096,
        max_unorm=0.0, skip_zeros=False, is_paged=False, **options,
    ):  # fmt: skip
        if isinstance(betas, str):
            raise TypeError(f"betas must be numbers, got the string {betas!r}")
        _check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), optim_bits, is_paged)
        self._configure(optimizer_name, args, optim_bits, min_8bit_size, max_unorm, skip_zeros, options)
