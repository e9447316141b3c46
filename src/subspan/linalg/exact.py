"""Bases of the leading singular directions by dense factorisations: the SVD, and the eigenproblem of a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator, as_operator
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.range_finder import RangeFinderResult, sketch_width
from subspan.linalg.scaling import finite_amax, inverse_scale

__all__ = ["exact_basis", "gram_basis"]


@torch.no_grad()
def exact_basis(A: Tensor | MatrixOperator, rank: int) -> RangeFinderResult:
    """The ``rank`` leading left singular vectors of A by a thin SVD, with canonical signs.

    A = USVᵀ, Q = U[:, :r], QᵀA = (SVᵀ)[:r]. The oracle of :func:`range_finder`, and 10 to 20 times its price; A is
    copied to float32 (float64 for float64).

    Args:
        A: tensor (..., m, n) or operator; not modified.
        rank: number r of columns of the basis, from 1 to m. Beyond n, columns orthogonal to all of A are appended.

    Returns:
        :class:`RangeFinderResult` with all three fields.

    Raises:
        ValueError: if A has a non-finite entry or ``rank`` is not between 1 and m.

    Example:
        >>> exact_basis(torch.diag(torch.tensor([1.0, 2.0])), 1).basis.mT
        tensor([[0., 1.]])

    Source: Zhao et al., GaLore, arXiv:2403.03507.
    """
    operator = as_operator(A)
    sketch_width(operator, rank, 0, 0)
    amax = finite_amax(operator)
    dense = operator.to_dense()
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    scale = inverse_scale(amax, dense.dtype, operator.device)
    U, S, Vh = torch.linalg.svd(dense * scale, full_matrices=False)
    U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    missing = rank - U.shape[-1]
    if missing > 0:
        # Householder QR of [U 0]: the reflectors of the zero columns are identities, so the surplus columns of its Q
        # are orthonormal and orthogonal to U, at the price of a thin QR.
        padded = torch.nn.functional.pad(U, (0, missing))
        U = torch.cat([U, orthonormalize(padded)[..., -missing:]], dim=-1)
        S = torch.nn.functional.pad(S, (0, missing))
        Vh = torch.nn.functional.pad(Vh, (0, 0, 0, missing))
    signs = canonical_signs(U)
    S = S / scale.squeeze(-1)
    return RangeFinderResult(basis=U * signs, projected=(S.unsqueeze(-1) * signs.mT) * Vh, singular_values=S)


@torch.no_grad()
def gram_basis(A: Tensor | MatrixOperator, rank: int) -> RangeFinderResult:
    """The ``rank`` leading left singular vectors of A from the eigenvectors of its smaller Gram matrix.

    For m ≤ n, AAᵀ = U diag(σ²) Uᵀ; else AᵀA = V diag(σ²) Vᵀ and the basis is that of AV. Two to six times faster than
    the SVD where one side is short; A is multiplied, and a few of its rows at a time are formed. Condition numbers are
    squared: directions below √u·σ₁ (3e-4 σ₁ in float32) are orthonormal, but not singular vectors.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of columns of the basis, from 1 to min(m, n).

    Returns:
        :class:`RangeFinderResult` with all three fields.

    Raises:
        ValueError: if A has a non-finite entry or ``rank`` is not between 1 and min(m, n).

    Example:
        >>> gram_basis(torch.diag(torch.tensor([1.0, 2.0])), 1).basis.mT
        tensor([[0., 1.]])
    """
    operator = as_operator(A)
    m, n = operator.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank={rank} is not possible for a {m}×{n} matrix: rank must be between 1 and {min(m, n)}")
    scale = inverse_scale(finite_amax(operator), torch.promote_types(operator.dtype, torch.float32), operator.device)
    tiles = (rows * scale for rows in operator.row_tiles())
    if m <= n:
        gram = torch.cat([operator.matmul(rows.mT * scale) for rows in tiles], dim=-1)
    else:
        gram = sum((rows.mT @ rows for rows in tiles), torch.zeros((), dtype=scale.dtype, device=scale.device))
    X = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]
    # For eigenvectors a step towards the polar factor: in float32 they are orthonormal to several rounding units only.
    Q = orthonormalize(operator.matmul(X * scale)) if m > n else 1.5 * X - 0.5 * (X @ (X.mT @ X))
    Q = Q * canonical_signs(Q)
    B = operator.rmatmul(Q * scale).mT
    return RangeFinderResult(Q, B / scale, torch.linalg.vector_norm(B, dim=-1) / scale.squeeze(-1))
