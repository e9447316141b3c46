"""The default adaptive range finder: rank from one sketch, basis from subspace iteration, cut by eigenvalues."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from subspan.linalg.gram_schmidt import orthogonal_to
from subspan.linalg.operator import squared_frobenius
from subspan.linalg.orthonormal import canonical_signs, orthonormalize
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision

__all__ = ["residual_curve", "truncated_sketch"]

# Raw columns of a sketch for each column of the optimal basis, at most.
_RAW = 1.8
# Share of the predicted width that a sketch of another width makes do with.
_ENOUGH = 1.05
# Columns of the iteration for each one of the predicted rank, and how many are needed to call the cut optimal.
_SPARE = 1.3
_LEFT = 1.04
# Columns that are added when those of the iteration do not suffice.
_MORE = 0.125


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
    return _diagonal_blocks(torch.linalg.qr(Y, mode="r").R, block_size)


@torch.no_grad()
def truncated_sketch(problem: FixedPrecision) -> AdaptiveResult:
    """Least rank whose exact residual is within the tolerance, up to a few per cent.

    1. A sketch Y = AΩ grows until its residual curve, continued as an exponential, tells the rank that is needed.
    2. One subspace iteration, Q = qr(A(AᵀQ)), starts from it with a third more columns than that.
    3. B = QᵀA, BBᵀ = X diag(λ) Xᵀ: the rank is the least r with ‖A‖²_F − Σ_{i≤r} λ_i within the tolerance, and QX_r
       the basis. If there is none, or hardly a column to spare, columns of a fresh sketch are added.

    Raw columns of a sketch would have to be 1.6 to 2 times as many. Where ‖A‖² − ‖B‖² is near rounding, the residual
    is computed from A and the λ in float64.

    Args:
        problem: matrix, tolerance, cap and block size.

    Returns:
        :class:`AdaptiveResult` with exact error and ``projected``; basis in singular directions, canonical signs.
    """
    if problem.met(problem.total):
        return _Eigenbasis(problem, problem.zeros(problem.m, 0), problem.zeros(0, problem.n)).cut(0)
    limit = min(problem.m, problem.n, math.ceil(_SPARE * problem.max_rank) + 8)
    Q = _iterate(problem, _start(problem, limit))
    B = problem.coordinates(Q)
    while True:
        width = Q.shape[-1]
        found = _Eigenbasis(problem, Q, B)
        if width >= limit:
            break
        if problem.met(found.outside) and width >= _LEFT * found.rank():
            break
        fresh = orthogonal_to(Q, orthonormalize(problem.sketch(min(limit - width, math.ceil(_MORE * width)))))
        Q, B = torch.cat([Q, fresh], dim=-1), torch.cat([B, problem.coordinates(fresh)], dim=-2)
    return found.cut(min(found.rank(), problem.max_rank))


def _start(problem: FixedPrecision, limit: int) -> Tensor:
    """Coordinates B = QᵀsA for a sketch Q of about as many columns as are needed after one iteration."""
    Y = problem.sketch(min(limit, max(16, problem.m // 16)))
    while True:
        width = Y.shape[-1]
        packed, tau = torch.geqrf(Y)
        wanted = math.ceil(min(limit, _SPARE * _optimal_rank(problem, packed) + 4))
        if wanted <= _ENOUGH * width or width >= limit:
            wanted = min(wanted, width)
            break
        # Curves are convex more often than exponential: what they predict is too little while it is far away.
        target = min(limit, max(math.ceil(1.15 * wanted), math.ceil(1.3 * width)), 2 * width)
        Y = torch.cat([Y, problem.sketch(target - width)], dim=-1)
    Q = torch.linalg.householder_product(packed[..., :wanted], tau[..., :wanted])
    return problem.coordinates(Q)


def _optimal_rank(problem: FixedPrecision, R: Tensor) -> float:
    """Optimal rank for the tolerance, predicted from the residual curve of a Gaussian sketch with this R factor."""
    step = max(1, R.shape[-1] // 8)
    curves = _diagonal_blocks(R, step).reshape(-1, math.ceil(R.shape[-1] / step))
    wanted = 0.0
    for curve, total, target in zip(
        curves.tolist(), problem.total.flatten().tolist(), problem.target.flatten().tolist(), strict=True
    ):
        curve[0] = total  # known exactly
        raw, decay = _crossing(curve, step, target)
        # Residuals that fall by exp(-δ) with each column cost a sketch about ln(ejδ)/δ columns more than the optimum
        # (the minimum over k of the bound (1 + k/(j-k-1)) exp(δ(j-k)) of Halko, Martinsson and Tropp), at most _RAW.
        more = math.log(max(1.0, math.e * raw * decay)) / decay if 0 < decay < math.inf else 0.0
        wanted = max(wanted, raw - more, raw / _RAW)
    return wanted


def _diagonal_blocks(R: Tensor, step: int) -> Tensor:
    """Mean squared column norm of the upper triangle of each diagonal block, shape (..., number of blocks)."""
    blocks = (R[..., j : j + step, j : j + step].triu() for j in range(0, R.shape[-1], step))
    return torch.stack([block.double().square().sum(dim=-2).mean(dim=-1) for block in blocks], dim=-1)


def _crossing(curve: list[float], step: float, target: float) -> tuple[float, float]:
    """Where a decreasing curve, sampled at multiples of ``step``, meets ``target``, and its logarithmic slope there.

    Beyond its end it is continued as an exponential with the mean slope of its second half.
    """
    if curve[0] <= target:
        return 0.0, math.inf
    above, below = 0, len(curve) - 1
    if curve[below] <= target:
        below = next(i for i, value in enumerate(curve) if value <= target)
        above = below - 1
    else:
        above = below // 2
    if target <= 0 or curve[below] >= curve[above]:
        return (below * step, math.inf) if curve[below] <= target else (math.inf, 0.0)
    decay = math.log(curve[above] / max(curve[below], 1e-6 * target)) / ((below - above) * step)
    return above * step + math.log(curve[above] / target) / decay, decay


def _iterate(problem: FixedPrecision, B: Tensor) -> Tensor:
    """Q = qr(A Bᵀ), one step of subspace iteration from coordinates B = QᵀsA."""
    Z = B.mT
    if bool((problem.target <= problem.trust).any()):
        # A tight tolerance needs the directions that the square of the condition number would drown.
        Z = orthonormalize(Z)
    return orthonormalize(problem.operator.matmul(Z * problem.scale))


class _Eigenbasis:
    """Residuals of A outside of the leading eigenvectors of BBᵀ, for every number of them."""

    def __init__(self, problem: FixedPrecision, Q: Tensor, B: Tensor) -> None:
        self._problem, self._Q, self._B = problem, Q, B
        self._tight = bool((problem.target <= problem.trust).any())
        self.outside = problem.residual(Q, B) if self._tight else problem.total - squared_frobenius(B)

    @cached_property
    def _vectors_and_residuals(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of BBᵀ, descending, and the residual of the leading r of them at [..., r]."""
        wide = self._B.double() if self._tight else self._B
        eigenvalues, X = torch.linalg.eigh(wide @ wide.mT)
        # Summed from the small ones up.
        tail = torch.nn.functional.pad(eigenvalues.double().clamp_min(0).cumsum(-1), (1, 0))
        return X.flip(-1).to(self._B.dtype), self.outside.unsqueeze(-1) + tail.flip(-1)

    def rank(self) -> int:
        """Least rank within the tolerance for all matrices; the number of columns of Q if there is none."""
        # What the subtraction may have lost counts against the tolerance.
        slack = 0 if self._tight else 4 * torch.finfo(self._B.dtype).eps * self._problem.total
        residual = self._vectors_and_residuals[1]
        above = residual + torch.as_tensor(slack).unsqueeze(-1) > self._problem.target.unsqueeze(-1)
        return min(int(above.sum(dim=-1).max()), self._Q.shape[-1])

    def cut(self, rank: int) -> AdaptiveResult:
        """The leading ``rank`` eigenvectors as the answer."""
        X, residual = self._vectors_and_residuals
        X = X[..., :rank]
        # One step towards the polar factor: float32 eigenvectors are orthonormal to several rounding units only.
        X = 1.5 * X - 0.5 * (X @ (X.mT @ X))
        Q = self._Q @ X
        signs = canonical_signs(Q) if rank else torch.ones_like(Q[..., :1, :])
        basis, coordinates = Q * signs, (X * signs).mT @ self._B
        error = self._problem.trusted_residual(basis, coordinates, residual[..., rank])
        return AdaptiveResult(self._problem, rank=rank, squared_error=error, basis=basis, coordinates=coordinates)
