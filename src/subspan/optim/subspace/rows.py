"""Coordinates as a subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from subspan.linalg import MatrixOperator
from subspan.optim.method import Found, Geometry, Group, State, Subspace
from subspan.optim.projection import Selection
from subspan.state import StateSpec


@dataclass(frozen=True)
class Rows(Subspace):
    """r rows of the oriented gradient, drawn uniformly without replacement (FRUGAL's column-wise selection).

    The state is r integers instead of an m×r basis.
    """

    orthonormal: ClassVar[bool] = False
    sees = "nothing"
    sees_all: ClassVar[bool] = False

    def specs(self, geometry: Geometry) -> dict[str, StateSpec]:
        return {"rows": StateSpec((*geometry.batch, geometry.rank), torch.int64)}

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        draws = [
            torch.randperm(geometry.m, generator=generator)[: geometry.rank].sort().values
            for _ in range(math.prod(geometry.batch))
        ]
        rows = torch.stack(draws).reshape(*geometry.batch, geometry.rank)
        return Found({"rows": rows.to(operator.device)})

    def projection(self, tensors: State) -> Selection:
        return Selection(tensors["rows"])
