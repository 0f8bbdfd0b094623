"""Parameters that are stepped alike share one call of the operator.

An optimizer may have thousands of small parameters. What must be known of each of them is therefore gathered column by column, one list at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import functional as F
from ..paging import is_paged, paged_rows, prefetched
from .algorithms import Moment, moments_of, scalars
from .sharding import is_dtensor, limited_learning_rate, local, local_gradient

_PLAIN = {torch.Tensor, torch.nn.Parameter}

# Paged states of so many bytes are stepped at a time, while the next ones travel.
PIECE_BYTES = 64 << 20


@dataclass
class _Call:
    """The arguments of one call of ``optimizer_step``; see its reference for what they are and in which order."""

    kept: tuple[Moment, ...]
    settings: dict[str, Any]
    limited: bool  # by max_unorm
    p: list
    g: list
    states: list
    seeds: Sequence[int] = ()

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
        """Steps the parameters, and counts the step."""
        F.optimizer_step(self.p, self.g, *self._tensors(), seeds=self.seeds, **self.settings)
        step = self.settings["step"]
        for state in self.states:
            state["step"] = step

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
        self.calls: list[_Call] = []

    def add(self, params: list[torch.Tensor], states: list[dict[str, Any]], config: dict[str, Any], ordinals: Sequence[int]) -> None:
        """Adds parameters that have gradients, and one configuration.

        Args:
            states: their step counts, moments and what belongs to them.
            config: their settings.
            ordinals: their numbers among the parameters of the optimizer, which only stochastic rounding wants to know.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        kept, limited = moments_of(self.algorithm, config), config["max_unorm"] > 0.0
        p, g = params, [parameter.grad for parameter in params]
        _require_dense(p, g)
        if not _PLAIN.issuperset(map(type, p)) or not _PLAIN.issuperset(map(type, g)):
            p, g = [local(parameter) for parameter in params], [local_gradient(parameter) for parameter in params]
        shared = _what_a_call_shares(p, states, kept)
        if limited and p is not params:
            shared.append([i if is_dtensor(parameter) else None for i, parameter in enumerate(params)])  # each has a norm over all processes
        for rows in _alike(shared):
            first = rows[0]
            settings = scalars(self.algorithm, config, shared[0][first] + 1)
            call = _Call(kept, settings, limited, *(picked(column, rows) for column in (p, g, states)))
            if config["stochastic_rounding"]:
                call.seeds = [(config["seed"] + ordinals[i] * 0x9E3779B1) & 0xFFFFFFFF for i in rows]  # parameters must not round alike
            if limited and is_dtensor(params[first]):
                settings.update(limited_learning_rate(params[first], call))
                call.limited = False
            self.calls.append(call)

    def run(self) -> None:
        calls = self.calls
        if self.is_paged:
            calls = prefetched([(piece, piece.pages()) for call in calls for piece in call.pieces()])
        for call in calls:
            call.run()


def _require_dense(p: list[torch.Tensor], g: list[torch.Tensor]) -> None:
    if {grad.layout for grad in g} != {torch.strided}:
        parameter, grad = next((parameter, grad) for parameter, grad in zip(p, g) if grad.layout != torch.strided)
        raise RuntimeError(
            f"the optimizers of bitsandbytes need dense gradients, got one with layout {grad.layout} for a parameter of shape "
            f"{tuple(parameter.shape)}. Make the layer's gradient dense (torch.nn.Embedding: sparse=False), or use torch.optim.SparseAdam for it."
        )


def _what_a_call_shares(p: list[torch.Tensor], states: list[dict[str, Any]], kept: tuple[Moment, ...]) -> list[list]:
    """Of all parameters: the numbers of steps taken, devices, dtypes, and their code tables, by identity."""
    columns = [[int(state["step"]) for state in states], [part.device for part in p], [part.dtype for part in p]]
    return columns + [[id(state.get(moment.keys[2])) for state in states] for moment in kept]


def picked(column: list, rows: Sequence[int]) -> list:
    """What a column has in some rows, in ascending order."""
    return column if len(rows) == len(column) else [column[row] for row in rows]


def _alike(columns: list[list]) -> list[Sequence[int]]:
    """The numbers of the rows, those together that are equal in every column."""
    if all(column.count(column[0]) == len(column) for column in columns):  # the usual case
        return [range(len(columns[0]))]
    kinds: dict[tuple, list[int]] = {}
    for number, row in enumerate(zip(*columns)):
        kinds.setdefault(row, []).append(number)
    return list(kinds.values())
