"""Both sides of a matrix, and all sides of a tensor: two-sided range finder, HOSVD, sequentially truncated HOSVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.linalg.adaptive import adaptive_range_finder
from subspan.linalg.operator import MatrixOperator, as_operator, squared_frobenius
from subspan.linalg.range_finder import range_finder
from subspan.linalg.scaling import finite_amax, inverse_scale

__all__ = ["TuckerResult", "TwoSidedResult", "hosvd", "st_hosvd", "two_sided_range_finder", "unfold"]


@dataclass(frozen=True)
class TwoSidedResult:
    """A ≈ left · core · rightᵀ.

    Attributes:
        left: (..., m, r₁), orthonormal columns.
        right: (..., n, r₂), orthonormal columns.
        core: leftᵀ A right, (..., r₁, r₂).
        error: ‖A − left·core·rightᵀ‖_F = (‖A‖² − ‖core‖²)^½, shape (...), float64; rounding below 5e-4 ‖A‖ in float32.
    """

    left: Tensor
    right: Tensor
    core: Tensor
    error: Tensor


@dataclass(frozen=True)
class TuckerResult:
    """X ≈ core ×₁ U₁ ×₂ U₂ …, the Tucker form.

    Attributes:
        core: one side for each mode.
        factors: for each mode a basis (n_k, r_k) with orthonormal columns, or None for a mode that was left as it is.
        error: ‖X − X̂‖_F = (‖X‖² − ‖core‖²)^½, 0-D, float64; rounding below 5e-4 ‖X‖ in float32.
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]
    error: Tensor

    def to_dense(self) -> Tensor:
        """The approximation as a tensor of the original shape."""
        X = self.core
        for mode, U in enumerate(self.factors):
            if U is not None:
                X = _mode_product(X, U, mode)
        return X


@torch.no_grad()
def two_sided_range_finder(
    A: Tensor | MatrixOperator,
    ranks: tuple[int, int],
    *,
    n_iter: int = 0,
    generator: torch.Generator | None = None,
) -> TwoSidedResult:
    """Bases of both sides of A: Q₁ from a sketch of A, Q₂ from one of the r₁×n matrix Q₁ᵀA.

    State of r₁×r₂ numbers instead of r×n, at the price of what the second side loses.

    Args:
        A: tensor (..., m, n) or operator.
        ranks: (r₁, r₂), r₁ from 1 to m, r₂ from 1 to min(n, r₁).
        n_iter: power iterations of the first sketch.
        generator: CPU generator; None is torch's own.

    Returns:
        :class:`TwoSidedResult`; both bases in descending singular directions.

    Raises:
        ValueError: if A has a non-finite entry or a rank is out of its range.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> two_sided_range_finder(torch.eye(4, 6), (3, 2), generator=seeded_generator(0)).core.shape
        torch.Size([3, 2])

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, section 5.
    """
    operator = as_operator(A)
    r1, r2 = ranks
    n = operator.shape[-1]
    if not 1 <= r2 <= min(n, r1):
        raise ValueError(f"r2={r2} is not possible: {r1} rows of length {n} have 1 to {min(n, r1)} directions")
    left = range_finder(operator, r1, generator=generator, n_iter=n_iter)
    assert left.projected is not None
    # Q₁ᵀA is small and known: its own right singular directions are exact after one power iteration or nearly so.
    right = range_finder(left.projected.mT, r2, generator=generator, n_iter=1)
    core = left.projected @ right.basis
    dtype = torch.promote_types(operator.dtype, torch.float32)
    scale = inverse_scale(finite_amax(operator), dtype, operator.device)
    squared = operator.squared_norm(scale) - squared_frobenius(core * scale)
    return TwoSidedResult(left.basis, right.basis, core, squared.clamp_min(0).sqrt() / scale[..., 0, 0])


def unfold(X: Tensor, mode: int) -> Tensor:
    """Mode-k unfolding: (n_k, product of the other sides), the others in their order.

    Args:
        X: tensor of any order.
        mode: k, from 0.

    Returns:
        Matrix; a view where X allows one.

    Example:
        >>> unfold(torch.arange(8).reshape(2, 2, 2), 1).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    return X.movedim(mode, 0).reshape(X.shape[mode], -1)


@torch.no_grad()
def hosvd(
    X: Tensor, ranks: Sequence[int | None], *, n_iter: int = 1, generator: torch.Generator | None = None
) -> TuckerResult:
    """Higher-order SVD: a basis for each mode from the unfolding of X itself, and the core that they project X on.

    ‖X − X̂‖² is at most the sum over modes of what each basis loses.

    Args:
        X: real tensor, order 3 and 4 for experts and convolution kernels, any in fact.
        ranks: a rank for each mode; None leaves the mode as it is.
        n_iter: power iterations of the range finder.
        generator: CPU generator; None is torch's own.

    Returns:
        :class:`TuckerResult`.

    Raises:
        TypeError: if X is not a floating-point tensor.
        ValueError: if X is empty or not finite, or the ranks do not fit.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> hosvd(torch.ones(3, 4, 5), (1, 2, None), generator=seeded_generator(0)).core.shape
        torch.Size([1, 2, 5])

    Source: De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal. Appl. 21 (2000).
    """
    X = _checked(X, ranks)
    factors = tuple(_basis(X, mode, rank, n_iter, generator) for mode, rank in enumerate(ranks))
    core = X
    for mode, U in enumerate(factors):
        if U is not None:
            core = _mode_product(core, U.mT, mode)
    return TuckerResult(core, factors, _lost(X, core))


@torch.no_grad()
def st_hosvd(
    X: Tensor,
    ranks: Sequence[int | None] | None = None,
    *,
    rtol: float | None = None,
    n_iter: int = 1,
    generator: torch.Generator | None = None,
) -> TuckerResult:
    """Sequentially truncated higher-order SVD: each basis comes from what the modes before it have left, ever smaller.

    Cheaper than :func:`hosvd` and usually more accurate. With a tolerance instead of ranks each of the d modes may lose
    rtol·‖X‖_F/√d, so that ‖X − X̂‖_F ≤ rtol·‖X‖_F.

    Args:
        X: real tensor of any order.
        ranks: a rank for each mode; None leaves the mode as it is.
        rtol: tolerance relative to ‖X‖_F; either this or ``ranks``.
        n_iter: power iterations of the range finder, for given ranks.
        generator: CPU generator; None is torch's own.

    Returns:
        :class:`TuckerResult`.

    Raises:
        TypeError: if X is not a floating-point tensor.
        ValueError: if X is empty or not finite, the ranks do not fit, or not exactly one of ranks and rtol is given.

    Example:
        >>> from subspan.linalg import seeded_generator
        >>> st_hosvd(torch.ones(3, 4, 5), rtol=1e-3, generator=seeded_generator(0)).core.shape
        torch.Size([1, 1, 1])

    Source: Vannieuwenhoven, Vandebril, Meerbergen, SIAM J. Sci. Comput. 34 (2012); Minster, Saibaba, Kilmer,
    arXiv:1905.07311.
    """
    if (ranks is None) == (rtol is None):
        raise ValueError("pass either ranks or rtol")
    order = X.ndim
    X = _checked(X, [None] * order if ranks is None else ranks)
    core = X
    norm = math.sqrt(squared_frobenius(X.reshape(1, -1)).item())
    factors: list[Tensor | None] = []
    for mode in range(order):
        U: Tensor | None
        if rtol is not None:
            atol = rtol * norm / math.sqrt(order)
            # A core has no mode of rank zero: of a zero tensor one arbitrary direction is kept.
            found = adaptive_range_finder(unfold(core, mode), atol=atol, generator=generator)
            U = found.basis() if found.rank else _basis(core, mode, 1, 0, generator)
        else:
            assert ranks is not None
            U = _basis(core, mode, ranks[mode], n_iter, generator)
        factors.append(U)
        if U is not None:
            core = _mode_product(core, U.mT, mode)
    return TuckerResult(core, tuple(factors), _lost(X, core))


def _checked(X: Tensor, ranks: Sequence[int | None]) -> Tensor:
    if not isinstance(X, Tensor) or not X.is_floating_point():
        raise TypeError(
            f"a floating-point tensor is needed, got {X.dtype if isinstance(X, Tensor) else type(X).__name__}"
        )
    if X.ndim < 2 or X.numel() == 0:
        raise ValueError(f"a tensor of at least two modes with entries is needed, got shape {tuple(X.shape)}")
    if len(ranks) != X.ndim:
        raise ValueError(f"{len(ranks)} ranks for {X.ndim} modes of {tuple(X.shape)}: one for each, None to leave it")
    for mode, rank in enumerate(ranks):
        if rank is not None and not 1 <= rank <= X.shape[mode]:
            raise ValueError(f"rank {rank} of mode {mode} is not possible: from 1 to {X.shape[mode]}")
    if not bool(X.isfinite().all()):
        raise ValueError(f"the tensor of shape {tuple(X.shape)} has a NaN or infinite entry")
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _basis(X: Tensor, mode: int, rank: int | None, n_iter: int, generator: torch.Generator | None) -> Tensor | None:
    if rank is None:
        return None
    return range_finder(unfold(X, mode), rank, generator=generator, n_iter=n_iter).basis


def _mode_product(X: Tensor, U: Tensor, mode: int) -> Tensor:
    """X ×_k U, which multiplies every column of the mode-k unfolding with U."""
    return torch.tensordot(U, X, dims=([1], [mode])).movedim(0, mode)


def _lost(X: Tensor, core: Tensor) -> Tensor:
    squared = squared_frobenius(X.reshape(1, -1)) - squared_frobenius(core.reshape(1, -1))
    return squared.clamp_min(0).sqrt()[()]
