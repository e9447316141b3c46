"""One finder after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from subspan.linalg import MatrixOperator
from subspan.optim.method import Found, Geometry, Group, Roster
from subspan.optim.subspace.svd import OrthonormalBasis


@dataclass(frozen=True)
class Switch(OrthonormalBasis):
    """``first`` for refreshes before the step named by the group key ``key``, ``second`` from then on (GoLore@x%).

    Args:
        first, second: finders of orthonormal bases.
        key: group key that holds the step.
    """

    first: OrthonormalBasis
    second: OrthonormalBasis
    key: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "fixed_rank", self.first.fixed_rank and self.second.fixed_rank)
        object.__setattr__(self, "finds_rank", self.first.finds_rank or self.second.finds_rank)
        both = (self.first.sees, self.second.sees)
        object.__setattr__(self, "sees", next(what for what in ("gradient", "sketch", "nothing") if what in both))

    def at(self, step: int, group: Group) -> OrthonormalBasis:
        return self.first if step < group[self.key] else self.second

    def rank(self, m: int, group: Group, *, name: str, refreshes: int, roster: Callable[[], Roster]) -> int:
        ranks = (
            part.rank(m, group, name=name, refreshes=refreshes, roster=roster) for part in (self.first, self.second)
        )
        return min(ranks)

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        found = self.at(step, group).find(operator, geometry, generator=generator, step=step, group=group)
        return found
