"""Leading singular directions of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspan.linalg import MatrixOperator, exact_basis, range_finder
from subspan.optim.method import Found, Geometry, Group, State, Subspace
from subspan.optim.projection import Orthonormal


class OrthonormalBasis(Subspace):
    """A subspace held as an orthonormal ``basis`` (..., m, r)."""

    def projection(self, tensors: State) -> Orthonormal:
        return Orthonormal(tensors["basis"])


@dataclass(frozen=True)
class ExactSVD(OrthonormalBasis):
    """The r leading left singular vectors of G, signs made canonical (GaLore, arXiv 2403.03507)."""

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        return Found({"basis": exact_basis(operator, geometry.rank).basis.to(geometry.dtype)})


@dataclass(frozen=True)
class RandomizedSVD(OrthonormalBasis):
    """The range of GΩ for a fresh Gaussian Ω, rotated to the singular directions of QᵀG (arXiv 0909.4061, Alg. 4.1).

    With no power iteration it captures almost the energy of the SVD on real gradients, at the price of two or three
    projections, and it does not lock onto gradient noise as the exact SVD does.

    Args:
        n_oversamples: extra columns of the sketch.
        n_iter: power iterations.
    """

    n_oversamples: int = 0
    n_iter: int = 0

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        result = range_finder(
            operator,
            geometry.rank,
            generator=generator,
            n_oversamples=min(self.n_oversamples, geometry.m - geometry.rank),
            n_iter=self.n_iter,
        )
        return Found({"basis": result.basis.to(geometry.dtype)}, result.projected)


def gradient_subspace(svd: str) -> OrthonormalBasis:
    """The finder named by a recipe's ``svd`` setting.

    Raises:
        ValueError: neither ``"randomized"`` nor ``"exact"``.
    """
    finders: dict[str, OrthonormalBasis] = {"randomized": RandomizedSVD(), "exact": ExactSVD()}
    if svd not in finders:
        raise ValueError(f"svd={svd!r}: choose 'randomized' or 'exact'")
    return finders[svd]
