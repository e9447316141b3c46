"""How two subspaces lie to each other, how much of a matrix a subspace holds, and how many directions a matrix has."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg.operator import DenseOperator, MatrixOperator, as_operator, tiles
from subspan.linalg.scaling import finite_amax, inverse_scale

__all__ = [
    "captured_energy",
    "effective_rank",
    "energy_curve",
    "nuclear_norm_bound",
    "principal_angles",
    "rank_for_energy",
    "stable_rank",
    "subspace_overlap",
]


@torch.no_grad()
def subspace_overlap(Q1: Tensor, Q2: Tensor) -> Tensor:
    """Overlap ‖Q1ᵀQ2‖²_F / r of two subspaces: 1 for the same, 0 for orthogonal ones, r/m for random ones.

    Args:
        Q1: (..., m, r1), orthonormal columns.
        Q2: (..., m, r2), orthonormal columns; r is the smaller of r1 and r2.

    Returns:
        Tensor of shape (...), the mean of cos² of the principal angles.

    Raises:
        ValueError: if the columns of Q1 and Q2 differ in length.

    Example:
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000)
    """
    Q1, Q2 = _same_space(Q1, Q2)
    return (Q1.mT @ Q2).square().sum(dim=(-2, -1)) / min(Q1.shape[-1], Q2.shape[-1])


@torch.no_grad()
def principal_angles(Q1: Tensor, Q2: Tensor) -> Tensor:
    """Principal angles between two subspaces.

    cos θ are the singular values of Q1ᵀQ2 and sin θ those of Q2 − Q1Q1ᵀQ2; each angle is taken from the one that is
    well conditioned, since the arc cosine loses half of the digits near zero.

    Args:
        Q1: (..., m, r1), orthonormal columns.
        Q2: (..., m, r2), orthonormal columns.

    Returns:
        Tensor of shape (..., min(r1, r2)) in radians, ascending, from 0 to π/2.

    Raises:
        ValueError: if the columns of Q1 and Q2 differ in length.

    Example:
        >>> principal_angles(torch.eye(3)[:, :1], torch.eye(3)[:, 1:2])
        tensor([1.5708])

    Source: Björck, Golub, Math. Comp. 27 (1973); Knyazev, Argentati, SIAM J. Sci. Comput. 23 (2002).
    """
    Q1, Q2 = _same_space(Q1, Q2)
    if Q2.shape[-1] > Q1.shape[-1]:
        Q1, Q2 = Q2, Q1
    C = Q1.mT @ Q2
    cosines = torch.linalg.svdvals(C).clamp_max(1)
    sines = torch.linalg.svdvals(Q2 - Q1 @ C).flip(-1).clamp_max(1)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


@torch.no_grad()
def captured_energy(A: Tensor, Q: Tensor) -> Tensor:
    """Share ‖QᵀA‖_F / ‖A‖_F of A that lies in the span of Q; 1 for a zero matrix, of which nothing is lost.

    Args:
        A: (..., m, n), any floating-point dtype; norms are accumulated in float64.
        Q: (..., m, r), orthonormal columns.

    Returns:
        Tensor of shape (...), float32 or float64.

    Example:
        >>> captured_energy(torch.diag(torch.tensor([4.0, 3.0])), torch.eye(2)[:, :1])
        tensor(0.8000)
    """
    captured = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    total = captured.clone()
    largest = DenseOperator(A).amax().double()[..., None, None].clamp_min(torch.finfo(torch.float64).tiny)
    for part in tiles(A, -1):
        tile = A[..., part] / largest  # squares of very small or large entries would under- or overflow
        total += tile.square().sum(dim=(-2, -1))
        captured += (Q.double().mT @ tile).square().sum(dim=(-2, -1))
    return torch.where(total > 0, (captured / total).sqrt(), torch.ones_like(total)).to(
        torch.promote_types(A.dtype, torch.float32)
    )


@torch.no_grad()
def energy_curve(A: Tensor | MatrixOperator) -> Tensor:
    """Share of ‖A‖²_F that the best r directions hold, for r = 1 … min(m, n), from the singular values.

    Args:
        A: tensor (..., m, n) or operator.

    Returns:
        Tensor (..., min(m, n)), float64, ascending to 1; ones for a zero matrix.

    Raises:
        ValueError: if A has a non-finite entry.

    Example:
        >>> energy_curve(torch.diag(torch.tensor([3.0, 4.0]))).tolist()
        [0.64, 1.0]
    """
    squares = _unit_singular_values(A).square()
    total = squares.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, squares.cumsum(-1) / total, 1.0)


def rank_for_energy(A: Tensor | MatrixOperator, share: float) -> Tensor:
    """Least rank whose best approximation holds ``share`` of ‖A‖²_F.

    Args:
        A: tensor (..., m, n) or operator.
        share: from 0 (exclusive) to 1, of the square of the norm.

    Returns:
        int64 tensor of shape (...), at least 1.

    Raises:
        ValueError: if ``share`` is out of its range or A has a non-finite entry.

    Example:
        >>> rank_for_energy(torch.diag(torch.tensor([3.0, 4.0])), 0.9)
        tensor(2)
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1, 0.95 for instance")
    # At 1, the sum of all squares is the answer up to its rounding.
    curve = energy_curve(A)
    return (curve < share * (1 - 4 * torch.finfo(curve.dtype).eps)).sum(dim=-1) + 1


def stable_rank(A: Tensor | MatrixOperator) -> Tensor:
    """Stable rank ‖A‖²_F / ‖A‖²₂: at most the rank, and insensitive to small singular values; 0 for a zero matrix.

    Args:
        A: tensor (..., m, n) or operator.

    Returns:
        Tensor of shape (...), float64.

    Raises:
        ValueError: if A has a non-finite entry.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0])))
        tensor(1.2500, dtype=torch.float64)

    Source: Rudelson, Vershynin, arXiv:math/0503442.
    """
    squares = _unit_singular_values(A).square()
    return squares.sum(dim=-1) / squares[..., 0].clamp_min(torch.finfo(squares.dtype).tiny)


def effective_rank(A: Tensor | MatrixOperator) -> Tensor:
    """Effective rank exp(−Σ p_i ln p_i) with p_i = σ_i / Σσ: from 1 to the rank; 0 for a zero matrix.

    Args:
        A: tensor (..., m, n) or operator.

    Returns:
        Tensor of shape (...), float64.

    Raises:
        ValueError: if A has a non-finite entry.

    Example:
        >>> round(effective_rank(torch.eye(3, 5)).item(), 6)
        3.0

    Source: Roy, Vetterli, EUSIPCO 2007.
    """
    sigma = _unit_singular_values(A)
    total = sigma.sum(dim=-1, keepdim=True)
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


@torch.no_grad()
def nuclear_norm_bound(A: Tensor, n_iter: int = 10) -> Tensor:
    """Lower bound of the nuclear norm Σσ_i by products alone: ⟨A, X⟩ with ‖X‖₂ ≤ 1 near the polar factor of A.

    X comes from ``n_iter`` steps X ← X(3I − XᵀX)/2 from A/‖A‖_F. Each step makes the bound tighter and lets directions
    1.5 times smaller count: those above ‖A‖_F/1.5^n_iter, 2 % of it by default, count all but fully.

    Args:
        A: (..., m, n), any floating-point dtype.
        n_iter: steps.

    Returns:
        Tensor of shape (...), float32 or float64.

    Raises:
        ValueError: if A has a non-finite entry.

    Example:
        >>> round(nuclear_norm_bound(torch.diag(torch.tensor([3.0, 1.0]))).item(), 3)
        4.0
    """
    operator = as_operator(A)
    dtype = torch.promote_types(operator.dtype, torch.float32)
    scale = inverse_scale(finite_amax(operator), dtype, operator.device)
    unit = operator.to_dense().to(dtype) * scale
    wide = unit if unit.shape[-2] >= unit.shape[-1] else unit.mT
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    X = wide / norm.clamp_min(torch.finfo(dtype).tiny)
    for _ in range(n_iter):
        X = 1.5 * X - 0.5 * (X @ (X.mT @ X))
    return (wide * X).sum(dim=(-2, -1)) / scale[..., 0, 0]


@torch.no_grad()
def _unit_singular_values(A: Tensor | MatrixOperator) -> Tensor:
    """Singular values of A times a power of two, in float64."""
    operator = as_operator(A)
    dtype = torch.promote_types(operator.dtype, torch.float32)
    scale = inverse_scale(finite_amax(operator), dtype, operator.device)
    return torch.linalg.svdvals(operator.to_dense().to(dtype) * scale).double()


def _same_space(Q1: Tensor, Q2: Tensor) -> tuple[Tensor, Tensor]:
    if Q1.shape[-2] != Q2.shape[-2]:
        raise ValueError(f"Q1 has columns of length {Q1.shape[-2]} and Q2 of length {Q2.shape[-2]}: they must be equal")
    dtype = torch.promote_types(torch.promote_types(Q1.dtype, Q2.dtype), torch.float32)
    return Q1.to(dtype), Q2.to(dtype)
