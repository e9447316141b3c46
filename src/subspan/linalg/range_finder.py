"""Bases of the leading singular directions: randomised range finder, randomised SVD, and the exact ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator, as_operator
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.scaling import finite_amax, inverse_scale
from subspan.linalg.sketch import gaussian_sketch

__all__ = ["RangeFinderResult", "SVDResult", "exact_basis", "randomized_svd", "range_finder"]


class RangeFinderResult(NamedTuple):
    """A basis and, where they came for free, the projection on it.

    Attributes:
        basis: Q (..., m, r), orthonormal columns with canonical signs.
        projected: QᵀA (..., r, n), or None.
        singular_values: singular values of QᵀA in descending order (..., r), in the unit of A, or None.
    """

    basis: Tensor
    projected: Tensor | None
    singular_values: Tensor | None


class SVDResult(NamedTuple):
    """Truncated singular value decomposition A ≈ U diag(S) Vh.

    Attributes:
        U: (..., m, r), orthonormal columns with canonical signs.
        S: (..., r), descending.
        Vh: (..., r, n), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@torch.no_grad()
def range_finder(
    A: Tensor | MatrixOperator,
    rank: int,
    *,
    generator: torch.Generator,
    n_oversamples: int = 0,
    n_iter: int = 0,
    rotate: bool = True,
) -> RangeFinderResult:
    """Orthonormal basis Q with QQᵀA ≈ A from a Gaussian sketch of A.

    Y = AΩ, Q = qr(Y); ``n_iter`` times Z = qr(AᵀQ), Q = qr(AZ); then, with BBᵀ = X diag(λ) Xᵀ and B = QᵀA, the basis
    is turned to the singular directions of B, Q ← QX, which also gives QᵀA = XᵀB. The turn matters to what is not
    rotation-invariant, as Adam. The scale 1/amax|A|, rounded to a power of two, goes into the thin factors, never into
    A, so that nothing over- or underflows and A times a power of two has the same basis. The sketch is taken in the
    dtype of A, everything after it in float32 (float64 for float64).

    Zero A: no error, a (deterministic) orthonormal basis. Rank-deficient A, rank > n: the surplus columns are
    orthonormal, and arbitrary. Small singular values, below about 3e-4 of the largest in float32, are rounding of the
    eigenproblem; :func:`randomized_svd` resolves them.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of columns of the basis, from 1 to m.
        generator: CPU generator, advanced by n·(rank + n_oversamples) numbers for each matrix.
        n_oversamples: columns of the sketch beyond ``rank`` (at most m in all); the best ``rank`` directions are kept.
        n_iter: power iterations, each one more product with Aᵀ and one with A.
        rotate: turn the basis to singular directions; without it ``projected`` and ``singular_values`` are None.

    Returns:
        :class:`RangeFinderResult`.

    Raises:
        ValueError: if A has a non-finite entry, if ``rank`` is not between 1 and m, if ``n_oversamples`` or ``n_iter``
            is negative, or if columns are oversampled without the rotation that chooses among them.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> A = torch.outer(torch.arange(1.0, 5.0), torch.ones(6))
        >>> found = range_finder(A, 1, generator=seeded_generator(0))
        >>> bool(torch.allclose(found.basis @ found.projected, A, atol=1e-4))
        True

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 4.4.
    """
    operator = as_operator(A)
    width = _sketch_width(operator, rank, n_oversamples, n_iter)
    if n_oversamples and not rotate:
        raise ValueError(
            f"n_oversamples={n_oversamples} needs rotate=True: without the rotation nothing tells which {rank} columns"
            " to keep"
        )
    amax = finite_amax(operator)
    Q = _sketched_basis(operator, amax, width, generator=generator, n_iter=n_iter)
    if not rotate:
        return RangeFinderResult(Q * canonical_signs(Q), None, None)
    scale = inverse_scale(amax, Q.dtype)
    B = operator.rmatmul(Q * scale).mT
    eigenvalues, X = torch.linalg.eigh(B @ B.mT)
    eigenvalues, X = eigenvalues.flip(-1)[..., :rank], X.flip(-1)[..., :rank]
    Q = Q @ X
    signs = canonical_signs(Q)
    return RangeFinderResult(
        basis=Q * signs,
        projected=(X * signs / scale).mT @ B,
        singular_values=eigenvalues.clamp_min(0).sqrt() / scale.squeeze(-1),
    )


@torch.no_grad()
def randomized_svd(
    A: Tensor | MatrixOperator,
    rank: int,
    *,
    generator: torch.Generator,
    n_oversamples: int = 8,
    n_iter: int = 1,
) -> SVDResult:
    """Leading singular triplets of A from the SVD of B = QᵀA, with Q from the range finder.

    B = WSVᵀ, U = QW; a small SVD in place of the eigenproblem of :func:`range_finder`, hence accurate for small
    singular values too.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of triplets, from 1 to min(m, n).
        generator: CPU generator, advanced by the call.
        n_oversamples: columns of the sketch beyond ``rank``.
        n_iter: power iterations.

    Returns:
        :class:`SVDResult` in float32 (float64 for float64).

    Raises:
        ValueError: if A has a non-finite entry or an argument is out of its range.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> U, S, Vh = randomized_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2, generator=seeded_generator(0))
        >>> [round(s, 3) for s in S.tolist()]
        [3.0, 2.0]

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm 5.1.
    """
    operator = as_operator(A)
    width = _sketch_width(operator, rank, n_oversamples, n_iter)
    m, n = operator.shape[-2:]
    if rank > n:
        raise ValueError(f"rank={rank} is more than the {n} singular values of a {m}×{n} matrix: at most {min(m, n)}")
    amax = finite_amax(operator)
    Q = _sketched_basis(operator, amax, width, generator=generator, n_iter=n_iter)
    scale = inverse_scale(amax, Q.dtype)
    W, S, Vh = torch.linalg.svd(operator.rmatmul(Q * scale).mT, full_matrices=False)
    U = Q @ W[..., :rank]
    signs = canonical_signs(U)
    return SVDResult(U * signs, S[..., :rank] / scale.squeeze(-1), Vh[..., :rank, :] * signs.mT)


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
    _sketch_width(operator, rank, 0, 0)
    amax = finite_amax(operator)
    dense = operator.to_dense()
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    scale = inverse_scale(amax, dense.dtype)
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


def _sketched_basis(
    operator: MatrixOperator, amax: Tensor, width: int, *, generator: torch.Generator, n_iter: int
) -> Tensor:
    """Q = qr(AΩ) after ``n_iter`` power iterations, neither rotated nor sign-fixed."""
    Omega = gaussian_sketch(
        operator.shape[-1],
        width,
        generator=generator,
        batch_shape=tuple(operator.shape[:-2]),
        scale=inverse_scale(amax, operator.dtype),
        device=operator.device,
        dtype=operator.dtype,
    )
    Q = orthonormalize(operator.matmul(Omega))
    scale = inverse_scale(amax, Q.dtype)
    for _ in range(n_iter):
        Z = operator.rmatmul(Q * scale)
        # Without this QR the directions below the square root of the rounding unit would be lost. With width > n the
        # rows of A span less than width directions: Z is then square or wide, and its columns a basis of all of them.
        Z = orthonormalize(Z[..., : Z.shape[-2]])
        Y = operator.matmul(Z * scale)
        Q = orthonormalize(torch.nn.functional.pad(Y, (0, width - Y.shape[-1])))
    return Q


def _sketch_width(operator: MatrixOperator, rank: int, n_oversamples: int, n_iter: int) -> int:
    m, n = operator.shape[-2:]
    if not 1 <= rank <= m:
        raise ValueError(
            f"rank={rank} is not possible for a matrix with m={m} rows (shape {m}×{n}): rank must be between 1 and {m}"
        )
    if n_oversamples < 0 or n_iter < 0:
        raise ValueError(f"n_oversamples={n_oversamples} and n_iter={n_iter} must not be negative")
    return min(m, rank + n_oversamples)
