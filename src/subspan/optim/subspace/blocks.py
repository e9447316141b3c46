"""Whole tensors as a subspace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from subspan.linalg import MatrixOperator
from subspan.optim.method import Found, Geometry, Group, Roster, State, Subspace
from subspan.optim.names import natural_key
from subspan.optim.projection import Nothing


@dataclass(frozen=True)
class Blocks(Subspace):
    """Some tensors keep full state for one period, the others none (FRUGAL's block-wise selection).

    The tensors are taken in descending natural order of their names (the last layer first), cyclically: each period
    takes on where the last one stopped, until the active tensors hold ``density`` of all elements (at least one
    tensor). The rank of a tensor is its whole side while it is active, else 0. Each tensor counts its own periods: one
    that joins later is out of step with the others, and the density then holds on average.
    """

    orthonormal: ClassVar[bool] = False
    fixed_rank = False
    sees = "nothing"

    def rank(self, m: int, group: Group, *, name: str, refreshes: int, roster: Callable[[], Roster]) -> int:
        if group["density"] is None:
            raise ValueError(f"blocks are whole tensors and have no rank; set density instead of rank={group['rank']}")
        return m if name in active_blocks(roster(), group["density"], refreshes) else 0

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        return Found({})

    def projection(self, tensors: State) -> Nothing:
        return Nothing()


@functools.lru_cache(maxsize=64)
def active_blocks(roster: Roster, density: float, period: int) -> frozenset[str]:
    """Names of the tensors with full state in ``period`` (0-based) out of ``roster`` = ((name, elements), ...)."""
    if density <= 0:
        return frozenset()
    order = sorted(roster, key=lambda entry: natural_key(entry[0]), reverse=True)
    wanted = density * sum(elements for _, elements in order)
    position = 0
    for _ in range(period + 1):
        active: list[str] = []
        held = 0
        while len(active) < len(order) and (not active or held < wanted):
            name, elements = order[position % len(order)]
            active.append(name)
            held += elements
            position += 1
    return frozenset(active)
