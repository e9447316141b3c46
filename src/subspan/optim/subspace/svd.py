"""Leading singular directions of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.linalg import (
    DividedOperator,
    MatrixOperator,
    adaptive_range_finder,
    canonical_signs,
    complete,
    divided_range_finder,
    exact_basis,
    gaussian_sketch,
    orthonormalize,
    range_finder,
    within_rank,
)
from subspan.linalg.gram_schmidt import orthogonal_to
from subspan.optim.method import Found, Geometry, Group, Roster, State, Subspace
from subspan.optim.projection import Orthonormal

_MULTIPLE = 8


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
        basis, _, singular_values = exact_basis(operator, geometry.rank)
        assert singular_values is not None
        kept = within_rank(singular_values, geometry.m, operator.dtype)
        if not bool(kept.all()):
            basis = complete(basis, ~kept, m=geometry.m, generator=generator, stack=operator.stack)
            basis = basis * canonical_signs(basis)
        return Found({"basis": basis.to(geometry.dtype)})


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "sees", "gradient" if self.n_oversamples or self.n_iter else "sketch")

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        if isinstance(operator, DividedOperator) and not self.n_oversamples and not self.n_iter:
            result = divided_range_finder(operator, geometry.rank, generator=generator)
            return Found({"basis": result.basis.to(geometry.dtype)}, result.projected)
        result = range_finder(
            operator,
            geometry.rank,
            generator=generator,
            n_oversamples=min(self.n_oversamples, geometry.m - geometry.rank),
            n_iter=self.n_iter,
        )
        return Found({"basis": result.basis.to(geometry.dtype)}, result.projected)


@dataclass(frozen=True)
class AdaptiveSVD(OrthonormalBasis):
    """As many leading singular directions as leave at most ``rtol``·‖G‖_F outside; the ``rank`` is the most.

    Ranks are rounded up to a multiple of 8, for the sake of matrix units and of few different shapes, with columns of
    a fresh sketch. The most is one less than the projected side, so that more rank is always more state.

    Args:
        exact: decide by the exact SVD; else by `subspan.linalg.adaptive_range_finder`, which keeps the tolerance too.
    """

    exact: bool = False
    fixed_rank = False
    finds_rank = True

    def rank(self, m: int, group: Group, *, name: str, refreshes: int, roster: Callable[[], Roster]) -> int:
        most = super().rank(m, group, name=name, refreshes=refreshes, roster=roster)
        return min(most, max(1, m - 1))

    def find(
        self, operator: MatrixOperator, geometry: Geometry, *, generator: torch.Generator, step: int, group: Group
    ) -> Found:
        most, rtol = geometry.rank, group["rtol"]
        if self.exact:
            svd = exact_basis(operator, max(most, min(operator.shape[-2:])))
            assert svd.projected is not None and svd.singular_values is not None
            rank = _rounded_up(_rank_within(svd.singular_values, rtol), most)
            basis, projected = svd.basis[..., :rank], svd.projected[..., :rank, :]
        else:
            most_found = min(most, *operator.shape[-2:])
            found = adaptive_range_finder(operator, rtol=rtol, max_rank=most_found, generator=generator)
            rank = _rounded_up(found.rank, most)
            basis, projected = found.basis(), found.projected
            if rank > found.rank:
                fresh = _fresh_columns(operator, basis, rank - found.rank, generator)
                basis = torch.cat([basis, fresh], dim=-1)
                projected = torch.cat([projected, operator.rmatmul(fresh).mT], dim=-2)
        return Found({"basis": basis.to(geometry.dtype)}, projected, rank)


def _rounded_up(rank: int, most: int) -> int:
    return min(most, max(1, math.ceil(rank / _MULTIPLE)) * _MULTIPLE)


def _rank_within(singular_values: Tensor, rtol: float) -> int:
    """Least rank whose residual is within the tolerance for all matrices of a stack, from all singular values."""
    residual = singular_values.double().square().flip(-1).cumsum(dim=-1)
    return int((residual > rtol**2 * residual[..., -1:]).sum(dim=-1).max())


def _fresh_columns(operator: MatrixOperator, Q: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns of a sketch of A, orthogonal to those of Q."""
    Omega = gaussian_sketch(
        operator.shape[-1],
        count,
        generator=generator,
        batch_shape=tuple(operator.shape[:-2]),
        device=operator.device,
        dtype=Q.dtype,
    )
    return orthogonal_to(Q, orthonormalize(operator.matmul(Omega)))


def tolerance_keys(rank_policy: str, rtol: float | None) -> dict[str, float]:
    """The group keys of a rank policy with their defaults: ``rtol`` where a tolerance decides on the rank.

    Raises:
        ValueError: a tolerance that would not be used.
    """
    if rank_policy == "tolerance":
        return {"rtol": 0.2 if rtol is None else rtol}
    if rtol is not None:
        raise ValueError(f"rtol={rtol!r} is for rank_policy='tolerance', and rank_policy={rank_policy!r}")
    return {}


def gradient_subspace(svd: str, rank_policy: str = "fixed") -> OrthonormalBasis:
    """The finder named by a recipe's settings ``svd`` and ``rank_policy``.

    Raises:
        ValueError: ``svd`` is neither ``"randomized"`` nor ``"exact"``, ``rank_policy`` neither ``"fixed"`` nor
            ``"tolerance"``.
    """
    finders: dict[tuple[str, str], OrthonormalBasis] = {
        ("randomized", "fixed"): RandomizedSVD(),
        ("exact", "fixed"): ExactSVD(),
        ("randomized", "tolerance"): AdaptiveSVD(),
        ("exact", "tolerance"): AdaptiveSVD(exact=True),
    }
    if svd not in ("randomized", "exact"):
        raise ValueError(f"svd={svd!r}: choose 'randomized' or 'exact'")
    if rank_policy not in ("fixed", "tolerance"):
        raise ValueError(f"rank_policy={rank_policy!r}: choose 'fixed' or 'tolerance'")
    return finders[svd, rank_policy]
