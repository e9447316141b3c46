"""Adaptive range finders that keep an explicit Q: blocked Gram-Schmidt, and one vector at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.linalg.operator import squared_frobenius
from subspan.linalg.orthonormal import orthonormalize
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision

__all__ = ["blocked_gram_schmidt", "orthogonal_to", "vector_by_vector"]

# Halko, Martinsson, Tropp: with r probes the bound fails with probability at most min(m, n)·10^-r.
_PROBES = 10
# "Twice is enough" for all but columns that are rounding altogether.
_PASSES = 4


def blocked_gram_schmidt(
    problem: FixedPrecision, *, reorthogonalize: bool = True, update: bool = False
) -> AdaptiveResult:
    """The blocked randQB: Householder QR inside a block, Gram-Schmidt between blocks.

        Y = AΩ − Q(BΩ),  Q_i = qr(Y), again qr(Q_i − Q(QᵀQ_i)),  B_i = Q_iᵀA,  E² ← E² − ‖B_i‖²_F.

    Args:
        problem: matrix, tolerance, cap and block size.
        reorthogonalize: without it the loss of orthogonality grows with σ₁/σ_j until Q is no basis at all (2 was
            measured on gradients); only there to be compared with.
        update: subtract Q_iB_i from a copy of A, whose norm is then E without any cancellation (Martinsson, Voronin);
            otherwise A is left alone, and E² is computed from A when the difference is no longer trustworthy
            (below about (4·10⁻³‖A‖)² in float32, Yu, Gu, Li).

    Returns:
        :class:`AdaptiveResult` with exact error and ``projected``.

    Source: Martinsson, Voronin, arXiv:1503.07157; Yu, Gu, Li, arXiv:1606.09402.
    """
    rest = problem.copy() if update else None
    squared_error = problem.total.clone()
    Q = problem.zeros(problem.m, 0)
    B = problem.zeros(0, problem.n)
    while Q.shape[-1] < problem.max_rank and not problem.met(squared_error):
        Omega = problem.test_matrix(min(problem.block_size, problem.max_rank - Q.shape[-1]))
        if rest is None:
            Y = problem.operator.matmul(Omega)
            # sAΩ is what Omega, which is scaled, gives; B is sA in coordinates already.
            Y = Y - Q @ (B @ (Omega / problem.scale))
        else:
            Y = rest @ (Omega / problem.scale)
        block = orthonormalize(Y)
        if reorthogonalize:
            block = orthogonal_to(Q, block)
            if Q.shape[-1] + block.shape[-1] == min(problem.m, problem.n):
                # As many columns as directions are left: a square Gaussian matrix may be all but singular.
                W = orthonormalize(problem.coordinates(block).mT)
                block = orthogonal_to(Q, orthonormalize(problem.operator.matmul(W * problem.scale)))
        if rest is None:
            rows = problem.coordinates(block)
            squared_error = squared_error - squared_frobenius(rows)
        else:
            rows = block.mT @ rest
            rest -= block @ rows
            squared_error = squared_frobenius(rest)
        Q, B = torch.cat([Q, block], dim=-1), torch.cat([B, rows], dim=-2)
        if rest is None:
            squared_error = problem.trusted_residual(Q, B, squared_error)
    return AdaptiveResult(problem, rank=Q.shape[-1], squared_error=squared_error, basis=Q, coordinates=B)


def vector_by_vector(problem: FixedPrecision) -> AdaptiveResult:
    """The adaptive randomised range finder: a column at a time until ten probes in a row are small.

    With ‖(I − QQᵀ)Aω_i‖ ≤ ε/(10√(2/π)) for ten Gaussian ω_i, ‖A − QQᵀA‖₂ ≤ ε fails with probability at most
    min(m, n)·10⁻¹⁰. The norm is the spectral one, and the bound pessimistic by about ten; products are matrix times
    vector. It is here as the reference of the probabilistic criterion.

    Args:
        problem: matrix, tolerance and cap.

    Returns:
        :class:`AdaptiveResult` with ``error`` a bound of the spectral norm.

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.2.
    """
    bound = (10 * math.sqrt(2 / math.pi)) ** 2
    probes = problem.sketch(_PROBES)
    Q = problem.zeros(problem.m, 0)
    while True:
        squared_error = bound * probes.double().square().sum(dim=-2).amax(dim=-1)
        if Q.shape[-1] >= problem.max_rank or problem.met(squared_error):
            break
        column = orthogonal_to(Q, orthonormalize(probes[..., :1]))
        Q = torch.cat([Q, column], dim=-1)
        fresh = problem.sketch(1)
        fresh = fresh - Q @ (Q.mT @ fresh)
        others = probes[..., 1:]
        probes = torch.cat([others - column @ (column.mT @ others), fresh], dim=-1)
    return AdaptiveResult(problem, rank=Q.shape[-1], squared_error=squared_error, error_kind="bound", basis=Q)


def orthogonal_to(Q: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns, orthogonal to Q, from the orthonormal columns of ``block``."""
    for _ in range(_PASSES):
        inside = Q.mT @ block
        block = block - Q @ inside
        # Projecting takes the square of a cosine from the length of a column, which is nothing once it is rounding.
        failed = squared_frobenius(inside) > torch.finfo(block.dtype).eps
        if not bool(failed.any()):
            return block
        block = orthonormalize(block)
    # Columns in the span of Q have nothing to be projected to. The reflectors of the zero columns in [Q 0] are
    # identities, so that their columns of the QR are some complement of Q.
    complement = orthonormalize(torch.cat([Q, torch.zeros_like(block)], dim=-1))[..., Q.shape[-1] :]
    return torch.where(failed[..., None, None], complement, block)
