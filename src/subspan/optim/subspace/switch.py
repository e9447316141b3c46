"""One finder after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspan.linalg import MatrixOperator
from subspan.optim.method import Found, Geometry, Group
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

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        finder = self.first if step < group[self.key] else self.second
        return finder.find(operator, geometry, generator=generator, step=step, group=group)
