"""Uniformly random subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspan.linalg import MatrixOperator, random_stiefel
from subspan.optim.method import Found, Geometry, Group
from subspan.optim.subspace.svd import OrthonormalBasis


@dataclass(frozen=True)
class Stiefel(OrthonormalBasis):
    """A basis drawn uniformly from the Stiefel manifold, whatever the gradient is (GoLore, arXiv 2410.11289)."""

    sees = "nothing"

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        basis = random_stiefel(
            geometry.m,
            geometry.rank,
            generator=generator,
            batch_shape=geometry.batch,
            device=operator.device,
            dtype=geometry.dtype,
        )
        return Found({"basis": basis})
