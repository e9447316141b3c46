"""Bases of the leading singular directions: the randomised range finder and the randomised SVD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subspan.linalg.operator import MatrixOperator, as_operator
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.scaling import finite_amax, inverse_scale
from subspan.linalg.sketch import (
    SketchKind,
    gaussian_sketch,
    hadamard_sketch,
    sampling_sketch,
    sparse_sign_sketch,
)
from subspan.linalg.surplus import complete, within_rank

__all__ = ["RangeFinderResult", "SVDResult", "randomized_range_finder", "randomized_svd", "range_finder"]


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
    generator: torch.Generator | None,
    n_oversamples: int = 0,
    n_iter: int = 0,
    rotate: bool = True,
    sketch: SketchKind = "gaussian",
    start: Tensor | None = None,
) -> RangeFinderResult:
    """Orthonormal basis Q with QQᵀA ≈ A from a Gaussian sketch of A.

    Y = AΩ, Q = qr(Y); ``n_iter`` times Z = qr(AᵀQ), Q = qr(AZ); then, with BBᵀ = X diag(λ) Xᵀ and B = QᵀA, the basis
    is turned to the singular directions of B, Q ← QX, which also gives QᵀA = XᵀB. The turn matters to what is not
    rotation-invariant, as Adam. The scale 1/amax|A|, rounded to a power of two, goes into the thin factors, never into
    A, so that nothing over- or underflows and A times a power of two has the same basis. The sketch is taken in the
    dtype of A, everything after it in float32 (float64 for float64).

    Zero A: no error, a (deterministic) orthonormal basis. Rank-deficient A, rank > n: the surplus columns are drawn
    uniformly among the directions orthogonal to the others, from ``generator``, and their rows of ``projected`` are
    zero; rounding would decide on them otherwise. Small singular values, below about 3e-4 of the largest in float32,
    are rounding of the eigenproblem; :func:`randomized_svd` resolves them.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of columns of the basis, from 1 to m.
        generator: CPU generator, advanced by n·(rank + n_oversamples) numbers for each matrix.
        n_oversamples: columns of the sketch beyond ``rank`` (at most m in all); the best ``rank`` directions are kept.
        n_iter: power iterations, each one more product with Aᵀ and one with A.
        rotate: turn the basis to singular directions; without it ``projected`` and ``singular_values`` are None.
        sketch: ``"gaussian"``; ``"sparse_sign"``, eight entries ±1 in each row of Ω; ``"hadamard"``, columns of a
            randomised Hadamard matrix; ``"sampling"``, rows of Aᵀ (columns of A) drawn by their squared norm.
        start: basis (..., m, k) of an earlier, similar A, k at most the width of the sketch: Y = [AAᵀ·start, AΩ], a
            power step for the old directions, and room for new ones if k is less. Nothing but a start of all columns
            keeps directions that A has lost: a quarter of fresh columns cures that.

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
    width = sketch_width(operator, rank, n_oversamples, n_iter)
    if n_oversamples and not rotate:
        raise ValueError(
            f"n_oversamples={n_oversamples} needs rotate=True: without the rotation nothing tells which {rank} columns"
            " to keep"
        )
    # The same scale for the sketch, which is taken in the dtype of A, and for what follows in a wider one.
    scale = inverse_scale(finite_amax(operator), operator.dtype, operator.device)
    Q = _sketched_basis(operator, scale, width, generator=generator, n_iter=n_iter, sketch=sketch, start=start)
    if not rotate:
        return RangeFinderResult(Q.mul_(canonical_signs(Q)), None, None)
    B = operator.rmatmul(Q * scale).mT
    # In float64, since a Gram matrix squares the condition number: in float32 rounding turned neighbouring directions.
    B64 = B.double()
    eigenvalues, X = (found.to(B.dtype) for found in torch.linalg.eigh(B64 @ B64.mT))
    eigenvalues, X = eigenvalues.flip(-1)[..., :rank], X.flip(-1)[..., :rank]
    Q, projected = Q @ X, X.mT @ B
    norms = torch.linalg.vector_norm(projected, dim=-1)
    kept = within_rank(norms, operator.shape[-2], operator.dtype)
    if not bool(kept.all()):  # asked so that yes, the answer of a simulation, is what nearly all gradients answer
        Q = complete(Q, ~kept, m=operator.shape[-2], generator=generator, stack=operator.stack)
        projected = torch.where(kept.mT, projected, 0.0)
    signs = canonical_signs(Q)
    return RangeFinderResult(
        basis=Q.mul_(signs),
        projected=projected.mul_(signs.mT / scale),
        singular_values=eigenvalues.clamp_min(0).sqrt() / scale.squeeze(-1),
    )


@torch.no_grad()
def randomized_svd(
    A: Tensor | MatrixOperator,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    n_oversamples: int = 8,
    n_iter: int = 1,
) -> SVDResult:
    """Leading singular triplets of A from the SVD of B = QᵀA, with Q from the range finder.

    B = WSVᵀ, U = QW; a small SVD in place of the eigenproblem of :func:`range_finder`, hence accurate for small
    singular values too.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of triplets, from 1 to min(m, n).
        generator: CPU generator, advanced by the call; None is torch's own.
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
    width = sketch_width(operator, rank, n_oversamples, n_iter)
    m, n = operator.shape[-2:]
    if rank > n:
        raise ValueError(f"rank={rank} is more than the {n} singular values of a {m}×{n} matrix: at most {min(m, n)}")
    scale = inverse_scale(finite_amax(operator), operator.dtype, operator.device)
    Q = _sketched_basis(operator, scale, width, generator=generator, n_iter=n_iter)
    W, S, Vh = torch.linalg.svd(operator.rmatmul(Q * scale).mT, full_matrices=False)
    U = Q @ W[..., :rank]
    signs = canonical_signs(U)
    return SVDResult(U.mul_(signs), S[..., :rank] / scale.squeeze(-1), Vh[..., :rank, :] * signs.mT)


@torch.no_grad()
def randomized_range_finder(
    A: Tensor | MatrixOperator,
    rank: int,
    *,
    n_oversamples: int = 0,
    n_iter: int = 0,
    sketch: SketchKind = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Basis Q of :func:`range_finder` alone, not rotated unless columns are oversampled.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of columns of the basis, from 1 to m.
        n_oversamples: columns of the sketch beyond ``rank``; the best ``rank`` directions are kept.
        n_iter: power iterations.
        sketch: test matrix, see :func:`range_finder`.
        generator: CPU generator, advanced by the call; None is torch's own.

    Returns:
        Q of shape (..., m, r).

    Raises:
        ValueError: if A has a non-finite entry or an argument is out of its range.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> randomized_range_finder(torch.eye(5, 4), 2, generator=seeded_generator(0)).shape
        torch.Size([5, 2])

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.1 and 4.4.
    """
    return range_finder(
        A,
        rank,
        generator=generator,
        n_oversamples=n_oversamples,
        n_iter=n_iter,
        rotate=n_oversamples > 0,
        sketch=sketch,
    ).basis


def _sketched_basis(
    operator: MatrixOperator,
    scale: Tensor,
    width: int,
    *,
    generator: torch.Generator | None,
    n_iter: int,
    sketch: SketchKind = "gaussian",
    start: Tensor | None = None,
) -> Tensor:
    """Q = qr(AΩ) after ``n_iter`` power iterations, neither rotated nor sign-fixed."""
    if start is None:
        Y = _sketched(operator, width, sketch, scale=scale, generator=generator)
    else:
        if start.shape[:-1] != operator.shape[:-1] or start.shape[-1] > width:
            raise ValueError(
                f"start of shape {tuple(start.shape)} does not fit: {tuple(operator.shape[:-1])} and at most {width}"
                " columns are needed"
            )
        wide = torch.promote_types(operator.dtype, torch.float32)
        # Unit columns, since the condition number of Y is squared already. QR does not mind the length of fresh ones.
        Z = torch.nn.functional.normalize(operator.rmatmul(start.to(wide) * scale), dim=-2)
        Y = operator.matmul((Z * scale).to(operator.dtype))
        if start.shape[-1] < width:
            fresh = _sketched(operator, width - start.shape[-1], sketch, scale=scale, generator=generator)
            Y = torch.cat([Y, fresh], dim=-1)
    Q = orthonormalize(Y)
    for _ in range(n_iter):
        Z = operator.rmatmul(Q * scale)
        # Without this QR the directions below the square root of the rounding unit would be lost. With width > n the
        # rows of A span less than width directions: Z is then square or wide, and its columns a basis of all of them.
        Z = orthonormalize(Z[..., : Z.shape[-2]])
        Y = operator.matmul(Z * scale)
        Q = orthonormalize(torch.nn.functional.pad(Y, (0, width - Y.shape[-1])))
    return Q


def _sketched(
    operator: MatrixOperator, width: int, sketch: SketchKind, *, scale: Tensor, generator: torch.Generator | None
) -> Tensor:
    """AΩ·scale of shape (..., m, width) in the dtype of A.

    All but the sample of columns multiply with an explicit Ω: at the widths of interest, a quarter of m, the dense
    product was measured to be as fast as sparse products and fast transforms, and every operator can do it.
    """
    n, batch = operator.shape[-1], tuple(operator.shape[:-2])
    if sketch == "gaussian":
        whole, part = operator.stack
        Omega = gaussian_sketch(
            n,
            width,
            generator=generator,
            batch_shape=whole,
            part=part,
            scale=scale,
            device=operator.device,
            dtype=operator.dtype,
        )
        return operator.matmul(Omega)
    if sketch == "sampling":
        norms = sum((rows.float() * scale).square().sum(dim=-2) for rows in operator.row_tiles())
        numbers = sampling_sketch(torch.as_tensor(norms).cpu(), min(width, n), generator=generator)
        Omega = torch.zeros(*batch, n, width).scatter_(-2, numbers.unsqueeze(-2), 1.0)
    elif sketch == "sparse_sign":
        Omega = sparse_sign_sketch(n, width, generator=generator, batch_shape=batch)
    elif sketch == "hadamard":
        columns = min(width, 1 << (n - 1).bit_length())
        Omega = hadamard_sketch(n, columns, generator=generator, batch_shape=batch)
        Omega = torch.nn.functional.pad(Omega, (0, width - columns))
    else:
        raise ValueError(f"sketch={sketch!r} is unknown: 'gaussian', 'sparse_sign', 'hadamard' or 'sampling'")
    return operator.matmul((Omega.to(operator.device) * scale).to(operator.dtype))


def sketch_width(operator: MatrixOperator, rank: int, n_oversamples: int, n_iter: int) -> int:
    """Columns of the sketch, after the checks that all finders share."""
    m, n = operator.shape[-2:]
    if not 1 <= rank <= m:
        raise ValueError(
            f"rank={rank} is not possible for a matrix with m={m} rows (shape {m}×{n}): rank must be between 1 and {m}"
        )
    if n_oversamples < 0 or n_iter < 0:
        raise ValueError(f"n_oversamples={n_oversamples} and n_iter={n_iter} must not be negative")
    return min(m, rank + n_oversamples)
