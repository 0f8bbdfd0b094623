"""Settings for single parameters, kept for the whole process.

A setting belongs to a parameter and goes when the parameter goes. Three ways lead to one: the tensor itself, its place in a list of parameters
that is registered before they are moved to a device (the moved ones are other tensors), and a module with the name of the parameter in it.
"""

from collections.abc import Iterable
from typing import Any, Optional
import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..singleton import Singleton

Config = dict[str, Any]


class _Registration:
    """A list of parameters in groups: what their shapes are, and the settings that some of them have."""

    def __init__(self, groups: list[list[torch.Tensor]]):
        self.shapes = [[tuple(p.shape) for p in group] for group in groups]
        self.parameters = WeakTensorKeyDictionary()
        for gindex, group in enumerate(groups):
            for pindex, p in enumerate(group):
                self.parameters[p] = (gindex, pindex)
        self.configs: dict[tuple[int, int], Config] = {}

    def describes(self, groups: list[list[torch.Tensor]]) -> bool:
        """Whether these can be the registered parameters: same shapes, and those that still live are among them."""
        return self.shapes == [[tuple(p.shape) for p in group] for group in groups] and all(
            groups[gindex][pindex] is p for p, (gindex, pindex) in self.parameters.items()
        )


class GlobalOptimManager(Singleton):
    """Overrides of optimizer settings for single parameters, such as 32-bit states for an embedding in an 8-bit optimizer.

    There is one for the process: ``GlobalOptimManager.get_instance()``. An override holds for its parameter in every optimizer, as long as the
    parameter lives, and for no other.

    Example::

        manager = GlobalOptimManager.get_instance()
        manager.register_parameters(model.parameters())     # on the CPU
        model = model.cuda()
        manager.override_config(model.fc1.weight, "optim_bits", 32)
        optimizer = Adam8bit(model.parameters())
    """

    def _set_up(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        """Forgets everything."""
        self.optimizer = None
        self.uses_config_override = False
        self.version = getattr(self, "version", 0) + 1
        self._configs = WeakTensorKeyDictionary()
        self._registrations: list[_Registration] = []
        self._modules: list[tuple[weakref.ref, str, Config]] = []

    @property
    def pid2config(self) -> dict[int, Config]:
        """The overrides of parameters, by ``id``."""
        return {id(p): config for p, config in self._configs.items()}

    @property
    def index2config(self) -> dict[tuple[int, int], Config]:
        """The overrides by place, (group, index), that no optimizer has taken up yet."""
        return {place: config for registration in self._registrations for place, config in registration.configs.items()}

    @property
    def module_weight_config_triple(self) -> list[tuple[torch.nn.Module, str, Config]]:
        """The overrides of modules that live."""
        return [(module, name, config) for reference, name, config in self._modules if (module := reference()) is not None]

    def register_parameters(self, params: Iterable) -> None:
        """Makes the places of parameters known before they are moved to a device.

        Overrides of these tensors then also hold for the first optimizer whose groups have the same shapes, though its tensors be others.

        Args:
            params: what an optimizer takes: tensors, or groups of them.

        Raises:
            IndexError: there are none.
        """
        groups = list(params)
        if not groups:
            raise IndexError("register_parameters was given no parameters")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        members = [[group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"]) for group in groups]
        registration = _Registration(members)
        for p, place in registration.parameters.items():
            if p in self._configs:
                registration.configs[place] = self._configs[p]
        self._registrations.append(registration)
        self.version += 1

    def override_config(self, parameters, key: Optional[str] = None, value: Any = None, key_value_dict: Optional[Config] = None) -> None:
        """Sets one or several settings of some parameters.

        ``optim_bits`` and ``min_8bit_size`` decide about new states only: override them before the first step.

        Args:
            parameters: a tensor, or a list of them.
            key, value: a setting: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``optim_bits``, ``min_8bit_size``, ``max_unorm``, ``skip_zeros``.
            key_value_dict: several settings, instead of ``key`` and ``value``.

        Raises:
            ValueError: both forms were given, or none.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("override_config needs either key and value, or key_value_dict")
        changes = {key: value} if key is not None else key_value_dict
        self.uses_config_override = True
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            config = self._configs.setdefault(p, {})
            config.update(changes)
            for registration in self._registrations:
                if p in registration.parameters:
                    registration.configs[registration.parameters[p]] = config
        self.version += 1

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Config) -> None:
        """Overrides settings of ``module.<param_name>``, whatever tensor that is when an optimizer takes its first step."""
        self._modules = [entry for entry in self._modules if entry[0]() is not None]
        self._modules.append((weakref.ref(module), param_name, dict(config)))
        self.version += 1

    def overrides(self, groups: list[list[torch.Tensor]]) -> dict[torch.Tensor, Config]:
        """The overrides of these parameters. A registered list of the same shapes is taken up and forgotten."""
        for registration in self._registrations:
            if registration.describes(groups):
                for (gindex, pindex), config in registration.configs.items():
                    self._configs.setdefault(groups[gindex][pindex], config)
                self._registrations.remove(registration)
                break
        found = {p: self._configs[p] for group in groups for p in group if p in self._configs} if len(self._configs) else {}
        members = {p for group in groups for p in group}
        for module, name, config in self.module_weight_config_triple:
            p = getattr(module, name, None)
            if isinstance(p, torch.Tensor) and p in members:
                found[p] = {**found.get(p, {}), **config}
        return found
