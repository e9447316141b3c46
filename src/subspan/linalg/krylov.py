"""Block Krylov spaces: each block of columns takes one product with A and one with Aᵀ, and no column is thrown away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspan.linalg.exact import gram_basis
from subspan.linalg.gram_schmidt import orthogonal_to
from subspan.linalg.operator import MatrixOperator, as_operator, squared_frobenius
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.range_finder import RangeFinderResult
from subspan.linalg.tolerance import FixedPrecision

__all__ = ["KrylovSpace", "krylov_range_finder"]

# Blocks of the space of a given rank, and its columns for each one of the rank.
_BLOCKS = 4
_WIDTH = 1.5


@torch.no_grad()
def krylov_range_finder(
    A: Tensor | MatrixOperator, rank: int, *, generator: torch.Generator | None = None
) -> RangeFinderResult:
    """The ``rank`` leading singular directions within a block Krylov space of half as many columns more.

    Four blocks of the space of :class:`KrylovSpace`, and the rotation of :func:`subspan.linalg.range_finder`: three
    products with A and as many with Aᵀ of half of the rank each, QᵀA among them. It takes the time of a range finder
    with one power iteration, and finds nearly what two find: 0.993 of the energy at σ_i = i^-1/2 instead of 0.985.
    Directions below √u·σ₁ (3e-4 σ₁ in float32) are orthonormal, but not singular vectors.

    Args:
        A: tensor (..., m, n) or operator; not modified, not copied.
        rank: number r of columns of the basis, from 1 to min(m, n). From two thirds of that on the space is all there
            is, and :func:`subspan.linalg.gram_basis` finds it.
        generator: CPU generator, advanced by the call; None is torch's own.

    Returns:
        :class:`RangeFinderResult` with all three fields, in float32 (float64 for float64).

    Raises:
        ValueError: if A has a non-finite entry or ``rank`` is not between 1 and min(m, n).

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> A = torch.diag(torch.tensor([1.0, 3.0, 2.0, 0.1, 0.1, 0.1]))
        >>> [round(s, 3) for s in krylov_range_finder(A, 2, generator=seeded_generator(0)).singular_values.tolist()]
        [3.0, 2.0]

    Source: Musco, Musco, arXiv:1504.05477; Tropp, Webber, arXiv:2306.12418.
    """
    operator = as_operator(A)
    m, n = operator.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank={rank} is not possible for a {m}×{n} matrix: rank must be between 1 and {min(m, n)}")
    width = max(math.ceil(_WIDTH * rank), rank + _BLOCKS)
    if width >= min(m, n):
        return gram_basis(operator, rank)
    # A tolerance of all of A: there is none to be met.
    problem = FixedPrecision(operator, rtol=1.0, atol=None, max_rank=None, block_size=None, generator=generator)
    space = KrylovSpace(problem, math.ceil(width / _BLOCKS))
    while space.width < width:
        space.grow(min(space.step, width - space.width))
    eigenvalues, X = torch.linalg.eigh(space.W.mT @ space.W)
    eigenvalues, X = eigenvalues[..., -rank:].flip(-1), X[..., -rank:].flip(-1)
    Q = space.Q @ X
    signs = canonical_signs(Q)
    return RangeFinderResult(
        basis=Q.mul_(signs),
        projected=(X * (signs / problem.scale)).mT @ space.W.mT,
        singular_values=eigenvalues.clamp_min(0).sqrt() / problem.scale.squeeze(-1),
    )


class KrylovSpace:
    """Orthonormal basis Q of span(AΩ, (AAᵀ)AΩ, (AAᵀ)²AΩ, …) and its coordinates, a block of columns at a time.

    Q₁ = qr(AΩ), Q_{i+1} = qr((I − QQᵀ)A(AᵀQ_i)), orthogonalised twice. AᵀQ_i is kept: it is a part of B = QᵀA and
    half of the way to the next block. Where A has nothing new to say to a block, a fresh sketch takes its place.

    Args:
        problem: the matrix.
        step: columns of the first block, the most that a later one may have.

    Attributes:
        step: columns of the first block.
        Q: (..., m, k), orthonormal columns.
        W: (..., n, k), (QᵀsA)ᵀ.

    Example:
        >>> problem = FixedPrecision(torch.eye(3), rtol=0.1, atol=None, max_rank=None, block_size=None, generator=None)
        >>> space = KrylovSpace(problem, 1)
        >>> space.grow(1)
        >>> space.width
        2

    Source: Golub, Luk, Overton, ACM Trans. Math. Softw. 7 (1981); Musco, Musco, arXiv:1504.05477.
    """

    def __init__(self, problem: FixedPrecision, step: int) -> None:
        self._problem, self.step = problem, step
        self.Q = orthonormalize(problem.sketch(step))
        self.W = problem.coordinates(self.Q).mT
        self._residual = problem.trusted_residual(self.Q, self.W.mT, problem.total - squared_frobenius(self.W))

    @property
    def width(self) -> int:
        """Columns of Q."""
        return self.Q.shape[-1]

    def residual(self) -> Tensor:
        """‖sA − QB‖²_F of shape (...), float64."""
        return self._residual

    def grow(self, columns: int) -> None:
        """Adds columns, at most as many as the first block has."""
        problem = self._problem
        # Columns of Q are multiplied in the order in which they were found; those of one block are always waiting.
        waiting = self.W[..., self.width - self.step :][..., :columns]
        if problem.tight:
            # A tight tolerance needs the directions that the square of the condition number would drown.
            waiting = orthonormalize(waiting)
        Y = problem.operator.matmul(waiting * problem.scale)
        new = Y - self.Q @ (self.Q.mT @ Y)
        # What is left of a space that A maps to itself, as of equal singular values, is rounding.
        left, there = (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) for X in (new, Y))
        exhausted = left <= math.sqrt(torch.finfo(Y.dtype).eps) * there
        if bool(exhausted.any()):
            new = torch.where(exhausted, problem.sketch(columns), new)
        block = orthogonal_to(self.Q, orthonormalize(new))
        coordinates = problem.coordinates(block).mT
        # Joined as rows of Qᵀ: the columns of a QR lie one after the other in memory.
        self.Q = torch.cat([self.Q.mT, block.mT], dim=-2).mT
        self.W = torch.cat([self.W, coordinates], dim=-1)
        residual = self._residual - squared_frobenius(coordinates)
        self._residual = problem.trusted_residual(self.Q, self.W.mT, residual)

    def iterate(self) -> None:
        """One subspace iteration of all columns, at the price of as many products as the space has taken so far."""
        problem = self._problem
        self.Q = orthonormalize(problem.operator.matmul(orthonormalize(self.W) * problem.scale))
        self.W = problem.coordinates(self.Q).mT
        residual = problem.total - squared_frobenius(self.W)
        self._residual = problem.trusted_residual(self.Q, self.W.mT, residual)
