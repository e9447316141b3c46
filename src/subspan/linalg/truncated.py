"""The default adaptive range finder: a block Krylov space, as wide as the tolerance asks for, cut by eigenvalues."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from subspan.linalg.krylov import KrylovSpace
from subspan.linalg.orthonormal import canonical_signs
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision

__all__ = ["residual_curve", "truncated_sketch"]

# Columns of a block for each direction of A, and the least. Narrow blocks give the better space, wide ones the faster
# products; a last block may be narrower.
_BLOCK = 1 / 16
_WIDE = 32
_NARROWEST = 16
# Share of the squared tolerance that may be outside of the space, and how much wider than that it is made. The wider,
# the fewer directions the cut has to keep for what the space has not found: 1.04 times the optimum instead of 1.07.
_ENOUGH = 0.98
_BEYOND = 1.2
# Columns of the space, at most, for each one of the cap.
_SPARE = 1.5


@torch.no_grad()
def residual_curve(Y: Tensor, block_size: int) -> Tensor:
    """Residuals ‖A − Q_jQ_jᵀA‖²_F of the leading parts of a Gaussian sketch, from one QR and without A.

    Y = AΩ = QR. What the first j columns leave of column i ≥ j has the norm of R[j:i+1, i], so that the diagonal block
    R_jj = R[j:j+b, j:j+b] holds b independent samples of what is left of A: ‖R_jj‖²_F/b is an unbiased estimate, with
    a relative deviation of √(2/b) at most. Nothing is subtracted, hence no cancellation.

    Args:
        Y: (..., m, l) with l <= m: AΩ for Ω with independent N(0, 1) entries; not after a power iteration.
        block_size: columns b of a block; the last one may be narrower.

    Returns:
        Tensor (..., ⌈l/b⌉), float64: the estimate of the residual before each block.

    Example:
        >>> residual_curve(torch.tensor([[3.0, 0.0], [0.0, 0.0]]) @ torch.ones(2, 2), 1).tolist()
        [9.0, 0.0]
    """
    R = torch.linalg.qr(Y, mode="r").R
    blocks = (R[..., j : j + block_size, j : j + block_size] for j in range(0, R.shape[-1], block_size))
    return torch.stack([block.double().square().sum(dim=-2).mean(dim=-1) for block in blocks], dim=-1)


@torch.no_grad()
def truncated_sketch(problem: FixedPrecision) -> AdaptiveResult:
    """Least rank whose exact residual is within the tolerance, up to a few per cent.

    1. A block Krylov space grows from a narrow sketch: Q₁ = qr(AΩ), Q_{i+1} = qr((I − QQᵀ)A(AᵀQ_i)), orthogonalised
       twice, until ‖A‖² − ‖B‖² with B = QᵀA has met the tolerance, and by a fifth wider. Each block takes one product
       with Aᵀ, which is B, and one with A. Where A has nothing new to say to a block, a fresh sketch takes its place.
    2. BBᵀ = X diag(λ) Xᵀ: the rank is the least r with ‖A‖²_F − Σ_{i≤r} λ_i within the tolerance, and QX_r the basis.

    Raw columns of a sketch would have to be 1.6 to 2 times as many as those of the optimal basis, and a power iteration
    of a sketch takes twice as many products as a Krylov space of the same width, for a poorer cut. Where ‖A‖² − ‖B‖² is
    near rounding, the residual is computed from A and the λ in float64.

    Args:
        problem: matrix, tolerance, cap and block size.

    Returns:
        :class:`AdaptiveResult` with exact error and ``projected``; basis in singular directions, canonical signs.

    Source: Golub, Luk, Overton, ACM Trans. Math. Softw. 7 (1981); Musco, Musco, arXiv:1504.05477.
    """
    if problem.met(problem.total):
        return _Eigenbasis(problem, problem.zeros(problem.m, 0), problem.zeros(problem.n, 0), problem.total).cut(0)
    short = min(problem.m, problem.n)
    limit = min(short, math.ceil(_SPARE * problem.max_rank) + 8)
    step = min(math.ceil(limit / 2), max(_WIDE, math.ceil(_BLOCK * short)))
    space = KrylovSpace(problem, step)
    before, outside = problem.total, space.residual()
    columns = step
    while space.width < limit:
        # The residual falls as an exponential, or more slowly: what is predicted too early is corrected block by block.
        ahead = _blocks_to(_ENOUGH * problem.target, before, outside)
        missing = max(step + _NARROWEST, min(limit, _BEYOND * (space.width + columns * ahead))) - space.width
        if missing < _NARROWEST and ahead <= 0:
            break
        columns = min(step, max(_NARROWEST, math.ceil(missing)), limit - space.width)
        space.grow(columns)
        before, outside = outside, space.residual()
    leading = _Eigenbasis(problem, space.Q, space.W, outside)
    rank = min(leading.rank(), problem.max_rank)
    if space.width == short and (problem.tight or not problem.met(outside) or rank == short):
        # As many columns as A has directions, yet some are missing, which were all but rounding where the blocks looked
        # for them.
        space.iterate()
        leading = _Eigenbasis(problem, space.Q, space.W, space.residual())
        rank = min(leading.rank(), problem.max_rank)
    return leading.cut(rank)


def _blocks_to(target: Tensor, before: Tensor, after: Tensor) -> float:
    """Blocks until residuals that fall as from ``before`` to ``after`` meet their targets; not positive if they do."""
    most = -math.inf
    for goal, old, new in torch.stack([target, before, after]).reshape(3, -1).T.tolist():
        if new <= 0:
            blocks = 0.0
        elif goal <= 0 or new >= old:
            blocks = math.inf if new > goal else 0.0
        else:
            blocks = math.log(new / goal) / math.log(old / new)
        most = max(most, blocks)
    return most


class _Eigenbasis:
    """Residuals of A outside of the leading eigenvectors of BBᵀ, for every number of them; W is Bᵀ."""

    def __init__(self, problem: FixedPrecision, Q: Tensor, W: Tensor, outside: Tensor) -> None:
        self._problem, self._Q, self._W, self._outside = problem, Q, W, outside

    @cached_property
    def _vectors_and_residuals(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of BBᵀ, ascending, and the residual of the leading r of them at [..., r]."""
        wide = self._W.double() if self._problem.tight else self._W
        eigenvalues, X = torch.linalg.eigh(wide.mT @ wide)
        # Summed from the small ones up.
        tail = torch.nn.functional.pad(eigenvalues.double().clamp_min(0).cumsum(-1), (1, 0))
        return X.to(self._W.dtype), self._outside.unsqueeze(-1) + tail.flip(-1)

    def rank(self) -> int:
        """Least rank within the tolerance for all matrices; the number of columns of Q if there is none."""
        # What the subtraction may have lost counts against the tolerance.
        slack = 0 if self._problem.tight else 4 * torch.finfo(self._W.dtype).eps * self._problem.total
        residual = self._vectors_and_residuals[1]
        above = residual + torch.as_tensor(slack).unsqueeze(-1) > self._problem.target.unsqueeze(-1)
        return min(int(above.sum(dim=-1).max()), self._Q.shape[-1])

    def cut(self, rank: int) -> AdaptiveResult:
        """The leading ``rank`` eigenvectors as the answer."""
        X, residual = self._vectors_and_residuals
        X = X[..., X.shape[-1] - rank :].flip(-1)
        # One step towards the polar factor: float32 eigenvectors are orthonormal to several rounding units only.
        X = 1.5 * X - 0.5 * (X @ (X.mT @ X))
        Q = self._Q @ X
        signs = canonical_signs(Q) if rank else torch.ones_like(Q[..., :1, :])
        basis, coordinates = Q.mul_(signs), (X * signs).mT @ self._W.mT
        error = self._problem.trusted_residual(basis, coordinates, residual[..., rank])
        return AdaptiveResult(self._problem, rank=rank, squared_error=error, basis=basis, coordinates=coordinates)
