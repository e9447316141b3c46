"""The front door of the fixed-precision problem: a basis of as many columns as a tolerance needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from subspan.linalg.gram_schmidt import blocked_gram_schmidt, vector_by_vector
from subspan.linalg.householder import householder_left, householder_right
from subspan.linalg.operator import MatrixOperator
from subspan.linalg.tolerance import AdaptiveResult, FixedPrecision
from subspan.linalg.truncated import truncated_sketch

__all__ = ["AdaptiveMethod", "adaptive_range_finder"]

AdaptiveMethod = Literal["sketch", "householder", "householder_left", "gram_schmidt", "vector"]

_METHODS: dict[str, Callable[[FixedPrecision], AdaptiveResult]] = {
    "sketch": truncated_sketch,
    "householder": householder_right,
    "householder_left": householder_left,
    "gram_schmidt": blocked_gram_schmidt,
    "vector": vector_by_vector,
}


@torch.no_grad()
def adaptive_range_finder(
    A: Tensor | MatrixOperator,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_rank: int | None = None,
    block_size: int | None = None,
    method: AdaptiveMethod = "sketch",
    generator: torch.Generator | None = None,
) -> AdaptiveResult:
    """Orthonormal basis Q with ‖A − QQᵀA‖_F ≤ max(atol, rtol·‖A‖_F), with as few columns as the method can do.

    ======================  =================================================================  ==============
    method                  how                                                                error
    ======================  =================================================================  ==============
    ``"sketch"``            block Krylov space from a sketch, cut by eigenvalues               exact
    ``"householder"``       right-looking: a copy of A is reflected; QᵀA comes for free        exact
    ``"householder_left"``  left-looking: A is only multiplied; fastest of the blocked ones    estimate
    ``"gram_schmidt"``      blocked randQB, orthogonalised twice, A is only multiplied         exact
    ``"vector"``            Halko, Martinsson, Tropp, algorithm 4.2, in the spectral norm      bound
    ======================  =================================================================  ==============

    The first finds the optimal rank within a few per cent; the others keep raw columns of the sketch and need 1.6 to 2
    times as many. An estimated error exceeds the tolerance in about one case out of ten.
    A batch is given one rank, the largest that a matrix in it needs. A zero matrix, and any A with a tolerance of at
    least ‖A‖, has rank 0.

    Args:
        A: tensor (..., m, n) or operator; not modified.
        rtol: tolerance relative to ‖A‖_F. Below 1e-6 in float32 it cannot be told from rounding.
        atol: absolute tolerance, in the unit of A. One of the two must be given; of both, the larger one counts.
        max_rank: most columns, by default min(m, n); ``converged`` says whether they sufficed.
        block_size: columns added at a time by the blocked methods; by default an eighth of m, at most 128 (CUDA: 256).
        method: see the table.
        generator: CPU generator, advanced by the call; None is torch's own.

    Returns:
        :class:`AdaptiveResult` with ``basis()``, ``rank``, ``error``, ``converged``, ``projected``, ``compact_wy``.

    Raises:
        TypeError: if A is not a floating-point tensor or an operator.
        ValueError: if A is empty or not finite, without a tolerance, or with an argument out of its range.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> A = torch.diag(torch.tensor([4.0, 2.0, 1e-3, 1e-3]))
        >>> found = adaptive_range_finder(A, rtol=0.01, generator=seeded_generator(0))
        >>> found.rank, bool(found.converged)
        (2, True)

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061; Martinsson, Voronin, arXiv:1503.07157; Yu, Gu, Li,
    arXiv:1606.09402.
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(map(repr, _METHODS))}")
    problem = FixedPrecision(A, rtol=rtol, atol=atol, max_rank=max_rank, block_size=block_size, generator=generator)
    return _METHODS[method](problem)
