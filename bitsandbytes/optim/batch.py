"""Parameters that are stepped alike share one call of the operator."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import functional as F
from ..paging import is_paged, paged_rows, prefetched
from .algorithms import Moment, moments_of, scalars
from .sharding import is_dtensor, limited_learning_rate, local_gradient

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Paged states of so many bytes are stepped at a time, while the next ones travel.
PIECE_BYTES = 64 << 20


@dataclass
class _Call:
    """The arguments of one call of ``optimizer_step``; see its reference for what they are and in which order."""

    config: dict[str, Any]
    kept: tuple[Moment, ...]
    settings: dict[str, Any]
    limited: bool  # by max_unorm
    p: list = field(default_factory=list)
    g: list = field(default_factory=list)
    states: list = field(default_factory=list)
    seeds: list = field(default_factory=list)

    def add(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], ordinal: int) -> None:
        self.p.append(p)
        self.g.append(g)
        self.states.append(state)
        if self.config["stochastic_rounding"]:
            self.seeds.append((self.config["seed"] + ordinal * 0x9E3779B1) & 0xFFFFFFFF)  # parameters must not round alike

    def _of_each_moment(self, part: int) -> list[torch.Tensor]:
        """Values or statistics (0 or 1 in ``Moment.keys``) of every moment of every parameter."""
        if all(moment.rows == 1 for moment in self.kept):
            keys = [moment.keys[part] for moment in self.kept]
            return [state[key] for state in self.states for key in keys]
        of_moment = lambda tensor, rows: (tensor,) if rows == 1 else paged_rows(tensor)  # noqa: E731
        return [row for state in self.states for moment in self.kept for row in of_moment(state[moment.keys[part]], moment.rows)]

    def _tensors(self) -> list[list[torch.Tensor]]:
        """moments, absmax, qmaps, unorm"""
        first = self.states[0]
        unorm = [state["unorm_vec"] for state in self.states] if self.limited else []
        if first["state1"].dtype != torch.uint8:
            return [self._of_each_moment(0), [], [], unorm]
        qmaps = [first[moment.keys[2]] for moment in self.kept for _ in range(moment.rows)]
        return [self._of_each_moment(0), self._of_each_moment(1), qmaps, unorm]

    def run(self) -> None:
        F.optimizer_step(self.p, self.g, *self._tensors(), seeds=self.seeds, **self.settings)

    def pages(self) -> list[torch.Tensor]:
        """The moments that are paged."""
        moments = [state[moment.keys[0]] for state in self.states for moment in self.kept]
        return [moment for moment in moments if is_paged(moment)]

    def pieces(self) -> Iterator["_Call"]:
        """The same in calls of about ``PIECE_BYTES`` of paged moments."""
        begin = size = 0
        for end, state in enumerate(self.states, start=1):
            size += sum(state[moment.keys[0]].nbytes for moment in self.kept if is_paged(state[moment.keys[0]]))
            if size >= PIECE_BYTES or end == len(self.states):
                part = slice(begin, end)
                yield replace(self, p=self.p[part], g=self.g[part], states=self.states[part], seeds=self.seeds[part])
                begin, size = end, 0

    def norm_of_update(self) -> torch.Tensor:
        """The norm of the first parameter's update, which is made on copies and thrown away."""
        moments, absmax, qmaps, unorm = self._tensors()
        p, moments, absmax = ([tensor.clone() for tensor in tensors] for tensors in (self.p, moments, absmax))
        F.optimizer_step(p, self.g, moments, absmax, qmaps, unorm, **self.settings)
        return unorm[0]

    def decays_with_learning_rate(self) -> bool:
        """Whether weight decay is decoupled from the gradient."""
        return self.settings["algorithm"] in ("adam", "lamb", "ademamix", "lion") and self.settings["decoupled_weight_decay"]


class Batch:
    """Collects what one step does, and does it.

    Args:
        algorithm: name of the algorithm.
        is_paged: whether moments may be paged.
    """

    def __init__(self, algorithm: str, is_paged: bool = False):
        self.algorithm = algorithm
        self.is_paged = is_paged
        self.calls: dict[tuple, _Call] = {}
        self._kept: dict[int, tuple[Moment, ...]] = {}

    def moments(self, config: dict[str, Any]) -> tuple[Moment, ...]:
        """The moments that parameters with these settings need."""
        kept = self._kept.get(id(config))
        if kept is None:
            kept = self._kept[id(config)] = moments_of(self.algorithm, config)
        return kept

    def add(self, p: torch.Tensor, state: dict[str, Any], config: dict[str, Any], ordinal: int) -> None:
        """Adds a parameter that has a gradient, and counts its step.

        Args:
            state: its moments and what belongs to them.
            config: its settings. Parameters share a call only if they share this very dictionary.
            ordinal: its number among the parameters of the optimizer.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        grad = p.grad
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the optimizers of bitsandbytes need dense gradients, got one with layout {grad.layout} for a parameter of shape "
                f"{tuple(p.shape)}. Make the layer's gradient dense (torch.nn.Embedding: sparse=False), or use torch.optim.SparseAdam for it."
            )
        step = state["step"] = int(state["step"]) + 1
        part, sharded_norm = p, False
        if type(p) not in _PLAIN and is_dtensor(p):
            part, grad = p.to_local(), local_gradient(p)
            sharded_norm = config["max_unorm"] > 0.0
        elif type(grad) not in _PLAIN:
            grad = local_gradient(p)
        key = (id(config), step, id(state.get("qmap1")), part.dtype, part.device, id(p) if sharded_norm else None)
        call = self.calls.get(key)
        if call is None:
            settings = scalars(self.algorithm, config, step)
            call = self.calls[key] = _Call(config, self.moments(config), settings, config["max_unorm"] > 0.0)
        call.add(part, grad, state, ordinal)
        if sharded_norm:
            call.settings.update(limited_learning_rate(p, call))
            call.limited = False

    def run(self) -> None:
        calls = self.calls.values()
        if self.is_paged:
            calls = prefetched([(piece, piece.pages()) for call in calls for piece in call.pieces()])
        for call in calls:
            call.run()
