"""Gaussian sketches that need no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from subspan.linalg import MatrixOperator, gaussian_sketch
from subspan.optim.method import Found, Geometry, Group, State, Subspace, check_flag
from subspan.optim.projection import Linear


@dataclass(frozen=True)
class Gaussian(Subspace):
    """R = ΩᵀG with entries of Ω (m×r) drawn from N(0, 1/r) (APOLLO, arXiv 2412.05270).

    Args:
        stored: hold Ω in the state (m·r elements). False: draw it again from its seed at every step, which costs time
            instead of memory and gives the same numbers.
    """

    stored: bool = True
    orthonormal: ClassVar[bool] = False
    sees = "nothing"

    def __post_init__(self) -> None:
        check_flag("store_basis", self.stored)

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        basis = gaussian_sketch(
            geometry.m,
            geometry.rank,
            generator=generator,
            batch_shape=geometry.batch,
            scale=1.0 / math.sqrt(geometry.rank),
            device=operator.device,
            dtype=geometry.dtype,
        )
        return Found({"basis": basis})

    def projection(self, tensors: State) -> Linear:
        return Linear(tensors["basis"])
