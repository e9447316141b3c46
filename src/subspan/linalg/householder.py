"""Blocked Householder adaptive range finders in compact-WY form, right- and left-looking: Q is never formed."""

from __future__ import annotations

import torch

from subspan.linalg.compact_wy import CompactWY
from subspan.linalg.operator import squared_frobenius
from subspan.linalg.orthonormal import orthonormalize
from subspan.linalg.overlap import SketchQueue
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision

__all__ = ["householder_left", "householder_right"]


def householder_right(problem: FixedPrecision) -> AdaptiveResult:
    """Right-looking form: a copy of A is reflected panel by panel until what is left of it is small.

    With j columns done, the rows from j on of the copy are QᵀA outside of the basis:

        Y = B[j:, :] Ω,  Y = (I − VTVᵀ) [R; 0],  B[j:, :] ← B[j:, :] − V(Tᵀ(VᵀB[j:, :])),  E² ← E² − ‖B[j:j+b, :]‖²_F.

    The rows j to j+b are final then: B = QᵀA comes for free. The recurrence for E² is replaced by ‖B[j:, :]‖²_F,
    which has no cancellation, once it is near rounding and at the end.

    Args:
        problem: matrix, tolerance, cap and block size.

    Returns:
        :class:`AdaptiveResult` with exact error, ``projected`` and ``compact_wy``.
    """
    B = problem.copy()
    squared_error = problem.total.clone()
    Q: CompactWY | None = None
    done = 0
    with SketchQueue(problem, multiply=False) as test_matrices:
        while done < problem.max_rank and not problem.met(squared_error):
            width = min(problem.block_size, problem.max_rank - done)
            following = min(problem.block_size, problem.max_rank - done - width) or None
            rest = B[..., done:, :]
            # B holds sA already: the test matrix must not be scaled again.
            Y = rest @ (test_matrices.take(width, following) / problem.scale)
            if done + width == min(problem.m, problem.n):
                # As many columns as directions are left: a square Gaussian matrix may be all but singular.
                Y = rest @ orthonormalize(rest.mT @ orthonormalize(Y))
            panel, _ = CompactWY.factor(Y)
            panel.reflect_(rest)
            squared_error = squared_error - squared_frobenius(B[..., done : done + width, :])
            Q = panel if Q is None else Q.then(panel)
            done += width
            if done >= problem.max_rank or bool((squared_error <= torch.maximum(problem.target, problem.trust)).any()):
                squared_error = squared_frobenius(B[..., done:, :])
    return AdaptiveResult(
        problem,
        rank=done,
        squared_error=squared_error,
        compact_wy=Q or _no_reflectors(problem),
        coordinates=B[..., :done, :],
    )


def householder_left(problem: FixedPrecision) -> AdaptiveResult:
    """Left-looking form: A is only multiplied, each sketch is reflected by what is there already.

        Y = Qᵀ(AΩ),  E² ≈ ‖Y[j:, :]‖²_F / b,  Q ← Q (I − VTVᵀ) with V, T from the Householder QR of Y[j:, :].

    The estimate is that of the basis before the panel, unbiased, with a relative deviation of about √(2/b) at most;
    nothing is subtracted, so it has no rounding floor. The true error is above the tolerance in about one case out of
    ten; the default method has none.

    Args:
        problem: matrix, tolerance, cap and block size.

    Returns:
        :class:`AdaptiveResult` with an estimate of the error and ``compact_wy``.
    """
    Q = _no_reflectors(problem)
    done = 0
    with SketchQueue(problem) as sketches:
        while True:
            # At the cap one more sketch is drawn, only to estimate the error.
            width = min(problem.block_size, problem.max_rank - done) or problem.block_size
            following = min(problem.block_size, problem.max_rank - done - width) or problem.block_size
            Y = Q.apply_transpose(sketches.take(width, following))
            panel = Y[..., done:, :]
            squared_error = squared_frobenius(panel) / width
            if done >= problem.max_rank or problem.met(squared_error):
                break
            if done + width == min(problem.m, problem.n):
                # As many columns as directions are left: a square Gaussian matrix may be all but singular.
                last = Q.apply(torch.nn.functional.pad(orthonormalize(panel), (0, 0, done, 0)))
                W = orthonormalize(problem.coordinates(last).mT)
                panel = Q.apply_transpose(problem.operator.matmul(W * problem.scale))[..., done:, :]
            Q = Q.append_panel(panel)
            done += width
    return AdaptiveResult(problem, rank=done, squared_error=squared_error, error_kind="estimate", compact_wy=Q)


def _no_reflectors(problem: FixedPrecision) -> CompactWY:
    return CompactWY(problem.zeros(problem.m, 0), problem.zeros(0, 0))
