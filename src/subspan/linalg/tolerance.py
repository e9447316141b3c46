"""Fixed precision: a matrix, how well it has to be approximated, and the answer of an adaptive range finder."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from subspan.linalg.compact_wy import CompactWY
from subspan.linalg.operator import MatrixOperator, as_operator, squared_frobenius
from subspan.linalg.scaling import finite_amax, inverse_scale
from subspan.linalg.sketch import gaussian_sketch

__all__ = ["AdaptiveResult", "FixedPrecision"]

# A difference ‖A‖² − ‖B‖² below this many rounding units of ‖A‖² is not used: the residual is then computed from A.
_TRUST = 100
# Rows of the residual that are formed at once.
_ROWS = 256


class FixedPrecision:
    """Find Q with ‖A − QQᵀA‖_F ≤ max(atol, rtol·‖A‖_F), at most ``max_rank`` columns.

    The matrix is seen through its scale s, a power of two near 1/amax|A|: sketches, coordinates and squared norms are
    those of sA.

    Args:
        A: tensor (..., m, n) or operator; not modified.
        rtol: tolerance relative to ‖A‖_F, or None.
        atol: absolute tolerance in the unit of A, or None. With both, the larger tolerance counts.
        max_rank: most columns, from 1 to min(m, n), which is the default.
        block_size: columns that are added at a time; by default chosen from m and the device.
        generator: CPU generator; None is torch's own.

    Attributes:
        operator: A.
        scale: s, shape (..., 1, 1).
        dtype: type of the computation, float32 or float64.
        total: ‖sA‖²_F, shape (...), float64.
        target: square of the tolerance in the unit of sA, shape (...), float64.
        trust: least squared residual that a difference of squared norms gives, shape (...), float64.
        tight: whether a matrix has a tolerance below that.

    Raises:
        TypeError: if A is not a floating-point tensor or an operator.
        ValueError: if A is empty or not finite, or an argument is out of its range.
    """

    def __init__(
        self,
        A: Tensor | MatrixOperator,
        *,
        rtol: float | None,
        atol: float | None,
        max_rank: int | None,
        block_size: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.operator = as_operator(A)
        self.m, self.n = self.operator.shape[-2:]
        if rtol is None and atol is None:
            raise ValueError("neither rtol nor atol is given: pass rtol=0.1, say, for a residual of a tenth of ‖A‖_F")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a tolerance: pass a finite number that is not negative")
        most = min(self.m, self.n)
        if max_rank is not None and not 1 <= max_rank <= most:
            raise ValueError(f"max_rank={max_rank} is not possible for a {self.m}×{self.n} matrix: from 1 to {most}")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1; None chooses one")
        self.max_rank = most if max_rank is None else max_rank
        self.block_size = min(most, block_size or default_block_size(self.m, self.operator.device))
        self.generator = generator
        self.dtype = torch.promote_types(self.operator.dtype, torch.float32)
        self.scale = inverse_scale(finite_amax(self.operator), self.dtype, self.operator.device)
        self.total = self.operator.squared_norm(self.scale)
        unit = self.scale[..., 0, 0].double()
        self.target = torch.maximum((atol or 0.0) * unit, (rtol or 0.0) * self.total.sqrt()).square()
        self.trust = _TRUST * torch.finfo(self.dtype).eps * self.total
        self.tight = bool((self.target <= self.trust).any())

    def met(self, squared_error: Tensor) -> bool:
        """Whether no matrix of the batch is above its tolerance."""
        return bool((squared_error <= self.target).all())

    def test_matrix(self, width: int) -> Tensor:
        """Gaussian Ω (..., n, width), in the dtype of the computation and times s."""
        return gaussian_sketch(
            self.n,
            width,
            generator=self.generator,
            batch_shape=tuple(self.operator.shape[:-2]),
            scale=self.scale,
            device=self.operator.device,
            dtype=self.dtype,
        )

    def sketch(self, width: int) -> Tensor:
        """sAΩ of shape (..., m, width) for a fresh Gaussian Ω."""
        return self.operator.matmul(self.test_matrix(width))

    def coordinates(self, Q: Tensor) -> Tensor:
        """QᵀsA of shape (..., k, n)."""
        return self.operator.rmatmul(Q * self.scale).mT

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of shape (..., *shape) for the batch, dtype and device of the computation."""
        return torch.zeros(*self.operator.shape[:-2], *shape, dtype=self.dtype, device=self.operator.device)

    def copy(self) -> Tensor:
        """The product sA as a new tensor, for methods that update it."""
        return self.operator.to_dense().to(self.dtype) * self.scale

    def residual(self, Q: Tensor, B: Tensor) -> Tensor:
        """‖sA − QB‖²_F of shape (...), formed from A a few rows at a time: no cancellation."""
        squared = torch.zeros_like(self.total)
        for start in range(0, self.m, _ROWS):
            stop = min(start + _ROWS, self.m)
            rows = self.operator.rows(start, stop).to(self.dtype) * self.scale
            squared += squared_frobenius(rows - Q[..., start:stop, :] @ B)
        return squared

    def trusted_residual(self, Q: Tensor, B: Tensor, indicator: Tensor) -> Tensor:
        """``indicator`` where it is far enough above rounding, else the residual computed from A."""
        if bool((indicator > self.trust).all()):
            return indicator
        return torch.where(indicator > self.trust, indicator, self.residual(Q, B))


class AdaptiveResult:
    """What an adaptive range finder returns; a batch has one rank, the largest that one of its matrices needs.

    It keeps a reference to A, not a copy, for ``projected``: read that before A is changed.

    Attributes:
        rank: number of columns of the basis, 0 if nothing is within the tolerance already.
        error: the error in the unit of A, shape (...), float64. What it is says ``error_kind``.
        error_kind: ``"exact"``: ‖A − QQᵀA‖_F up to rounding; ``"estimate"``: unbiased estimate of its square from a
            few Gaussian samples, which the truth exceeds at times; ``"bound"``: above ‖A − QQᵀA‖₂ with high
            probability.
        converged: whether ``error`` is within the tolerance, shape (...), bool.
        compact_wy: Q as a product of Householder reflectors, from the Householder methods; else None.
    """

    def __init__(
        self,
        problem: FixedPrecision,
        *,
        rank: int,
        squared_error: Tensor,
        error_kind: Literal["exact", "estimate", "bound"] = "exact",
        basis: Tensor | None = None,
        coordinates: Tensor | None = None,
        compact_wy: CompactWY | None = None,
    ) -> None:
        self.rank = rank
        self.error = squared_error.clamp_min(0).sqrt() / problem.scale[..., 0, 0]
        self.error_kind = error_kind
        self.converged = squared_error <= problem.target
        self.compact_wy = compact_wy
        self._operator = problem.operator
        self._basis = basis
        self._projected = None if coordinates is None else coordinates / problem.scale
        self._scale = problem.scale

    @torch.no_grad()
    def basis(self) -> Tensor:
        """Q of shape (..., m, rank); the Householder methods form it at the first call."""
        if self._basis is None:
            assert self.compact_wy is not None
            self._basis = self.compact_wy.columns()
        return self._basis

    @property
    def projected(self) -> Tensor:
        """B = QᵀA of shape (..., rank, n); one product with A at first use where the method does not yield it."""
        if self._projected is None:
            self._projected = self._operator.rmatmul(self.basis() * self._scale).mT / self._scale
        return self._projected

    def __repr__(self) -> str:
        return (
            f"AdaptiveResult(rank={self.rank}, error={self.error.tolist()} ({self.error_kind}),"
            f" converged={self.converged.tolist()})"
        )


def default_block_size(m: int, device: torch.device) -> int:
    """Columns of a panel: an eighth of m, at most what keeps QR of the panel in cache (128), or a GPU busy (256)."""
    most = 256 if device.type == "cuda" else 128
    return max(8, min(most, m // 8 // 8 * 8))
