"""Matrices that are never formed: transposes, sums of outer products, and a matrix plus a low-rank term."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.linalg.operator import DenseOperator, MatrixOperator, as_operator

__all__ = ["OuterProductOperator", "SumOperator", "TransposedOperator"]


class TransposedOperator(MatrixOperator):
    """Aᵀ for an operator A, so that a finder for the left basis finds the right one.

    Args:
        A: tensor (..., m, n) or operator.

    Example:
        >>> TransposedOperator(torch.ones(2, 3)).matmul(torch.ones(2, 1)).shape
        torch.Size([3, 1])
    """

    def __init__(self, A: Tensor | MatrixOperator) -> None:
        self._A = as_operator(A)

    @property
    def shape(self) -> torch.Size:
        """Shape (..., n, m)."""
        *batch, m, n = self._A.shape
        return torch.Size((*batch, n, m))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""
        return self._A.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries, and of the results."""
        return self._A.device

    def matmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (..., n, k) for X of shape (..., m, k)."""
        return self._A.rmatmul(X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """AX of shape (..., m, k) for X of shape (..., n, k)."""
        return self._A.matmul(X)

    def amax(self) -> Tensor:
        """That of A."""
        return self._A.amax()

    def to_dense(self) -> Tensor:
        """Aᵀ, a view where A is a tensor."""
        return self._A.to_dense().mT

    def squared_norm(self, scale: Tensor) -> Tensor:
        """That of A."""
        return self._A.squared_norm(scale)


class OuterProductOperator(MatrixOperator):
    """YᵀX, a sum of outer products over tokens, given as its two factors: the gradient dYᵀX of a linear layer.

    Products cost 2t(m + n)k instead of 2mnk operations, and no m×n matrix exists.

    Args:
        Y: (..., t, m), gradients of the outputs, floating-point.
        X: (..., t, n), inputs, of the same leading dimensions.

    Raises:
        ValueError: if the factors do not fit.
        TypeError: if one is not a floating-point tensor.

    Example:
        >>> OuterProductOperator(torch.ones(5, 2), torch.ones(5, 3)).to_dense().tolist()
        [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """

    def __init__(self, Y: Tensor, X: Tensor) -> None:
        self._Y, self._X = DenseOperator(Y), DenseOperator(X)
        if Y.shape[:-1] != X.shape[:-1]:
            raise ValueError(f"Y {tuple(Y.shape)} and X {tuple(X.shape)} must agree in all but the last dimension")

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, n)."""
        return torch.Size((*self._Y.shape[:-2], self._Y.shape[-1], self._X.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The wider type of the two factors."""
        return torch.promote_types(self._Y.dtype, self._X.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self._Y.device

    def matmul(self, X: Tensor) -> Tensor:
        """Yᵀ(XZ) of shape (..., m, k) for Z of shape (..., n, k)."""
        return self._Y.rmatmul(self._X.matmul(X))

    def rmatmul(self, X: Tensor) -> Tensor:
        """Xᵀ(YZ) of shape (..., n, k) for Z of shape (..., m, k)."""
        return self._X.rmatmul(self._Y.matmul(X))

    @torch.no_grad()
    def amax(self) -> Tensor:
        """Bound max‖y_i‖·max‖x_j‖ on the entries over columns of the factors (Cauchy-Schwarz)."""
        longest = []
        for factor in (self._Y, self._X):
            largest = factor.amax()
            unit = torch.where(largest > 0, largest, torch.ones_like(largest))
            scaled = factor.to_dense() / unit[..., None, None]
            wide = torch.promote_types(factor.dtype, torch.float32)
            norm = torch.linalg.vector_norm(scaled, dim=-2, dtype=wide).amax(dim=-1)
            longest.append(norm.double() * largest.double())
        finest = torch.promote_types(self.dtype, torch.float32)
        # A bound beyond the range of the type still says nothing about the entries: the largest number stands for it.
        bound = (longest[0] * longest[1]).to(finest)
        finite = longest[0].isfinite() & longest[1].isfinite()
        return torch.where(finite, bound.clamp_max(torch.finfo(finest).max), bound)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """YᵀX as a tensor; for tests and small matrices."""
        return (self._Y.to_dense().to(self.dtype).mT) @ self._X.to_dense().to(self.dtype)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, in float32 or wider."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self._X.rmatmul(self._Y.to_dense()[..., start:stop].to(wide)).mT


class SumOperator(MatrixOperator):
    """αA + βLR of a matrix and a low-rank term: ρ·QM + (1 − ρ)·G, the momentum in its subspace and the new gradient.

    Args:
        A: tensor (..., m, n) or operator.
        L: (..., m, k).
        R: (..., k, n).
        alpha: factor of A.
        beta: factor of LR.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> SumOperator(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), alpha=0.5, beta=1.0).to_dense().tolist()
        [[1.5, 1.0], [1.0, 1.5]]
    """

    def __init__(
        self, A: Tensor | MatrixOperator, L: Tensor, R: Tensor, *, alpha: float = 1.0, beta: float = 1.0
    ) -> None:
        self._A = as_operator(A)
        self._low = OuterProductOperator(L.mT, R)
        if self._low.shape != self._A.shape:
            raise ValueError(f"LR has shape {tuple(self._low.shape)}, A has {tuple(self._A.shape)}")
        self._alpha, self._beta = alpha, beta

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, n)."""
        return self._A.shape

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of A, L and R."""
        return torch.promote_types(self._A.dtype, self._low.dtype)

    @property
    def device(self) -> torch.device:
        """Device of A."""
        return self._A.device

    def matmul(self, X: Tensor) -> Tensor:
        """(αA + βLR)X of shape (..., m, k)."""
        return self._alpha * self._A.matmul(X) + self._beta * self._low.matmul(X)

    def rmatmul(self, X: Tensor) -> Tensor:
        """(αA + βLR)ᵀX of shape (..., n, k)."""
        return self._alpha * self._A.rmatmul(X) + self._beta * self._low.rmatmul(X)

    def amax(self) -> Tensor:
        """The sum of the bounds of both terms."""
        return abs(self._alpha) * self._A.amax() + abs(self._beta) * self._low.amax()

    def to_dense(self) -> Tensor:
        """The sum as a tensor; for tests and small matrices."""
        return self._alpha * self._A.to_dense() + self._beta * self._low.to_dense()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, in float32 or wider."""
        return self._alpha * self._A.rows(start, stop) + self._beta * self._low.rows(start, stop)
