"""How two subspaces lie to each other, and how much of a matrix a subspace holds."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg.operator import DenseOperator, tiles

__all__ = ["captured_energy", "principal_angles", "subspace_overlap"]


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


def _same_space(Q1: Tensor, Q2: Tensor) -> tuple[Tensor, Tensor]:
    if Q1.shape[-2] != Q2.shape[-2]:
        raise ValueError(f"Q1 has columns of length {Q1.shape[-2]} and Q2 of length {Q2.shape[-2]}: they must be equal")
    dtype = torch.promote_types(torch.promote_types(Q1.dtype, Q2.dtype), torch.float32)
    return Q1.to(dtype), Q2.to(dtype)
