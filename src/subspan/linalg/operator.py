"""Matrices as operators: what the randomised algorithms need to know of A, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["DenseOperator", "MatrixOperator", "as_operator"]

# Elements of a tile that is cast to float32: 4 MiB, small beside a gradient and large enough for a fast product.
_TILE_ELEMENTS = 2**20
_MIN_TILE = 64


class MatrixOperator(ABC):
    """A batch of m×n matrices A that can be multiplied from both sides.

    Products are taken and returned in the wider of the two dtypes: a bfloat16 matrix times a float32 factor is a
    float32 product, a bfloat16 matrix times a bfloat16 factor a bfloat16 product.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape (..., m, n)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the entries, and of the results."""

    @property
    def stack(self) -> tuple[tuple[int, ...], slice]:
        """Leading dimensions for which random numbers are drawn, and the part of the first one that A is."""
        return tuple(self.shape[:-2]), slice(None)

    @abstractmethod
    def matmul(self, X: Tensor) -> Tensor:
        """AX of shape (..., m, k) for X of shape (..., n, k)."""

    @abstractmethod
    def rmatmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (..., n, k) for X of shape (..., m, k)."""

    @abstractmethod
    def amax(self) -> Tensor:
        """Largest |entry| of each matrix, shape (...), or a bound on it; NaN or infinite if an entry is."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """A as a tensor of shape (..., m, n)."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of A, shape (..., stop - start, n), as products with unit vectors."""
        m = self.shape[-2]
        dtype = torch.promote_types(self.dtype, torch.float32)
        unit = torch.zeros(*self.shape[:-1], stop - start, dtype=dtype, device=self.device)
        unit[..., torch.arange(start, min(stop, m)), torch.arange(min(stop, m) - start)] = 1
        return self.rmatmul(unit).mT

    def row_tiles(self) -> Iterator[Tensor]:
        """All rows of A in order, some at a time, (..., k, n) each."""
        m, n = self.shape[-2:]
        step = max(_MIN_TILE, _TILE_ELEMENTS // n)
        return (self.rows(start, min(start + step, m)) for start in range(0, m, step))

    @torch.no_grad()
    def squared_norm(self, scale: Tensor) -> Tensor:
        """‖scale·A‖²_F of shape (...), accumulated in float64, for a ``scale`` of shape (..., 1, 1)."""
        return torch.stack([squared_frobenius(rows * scale) for rows in self.row_tiles()]).sum(0)


class DenseOperator(MatrixOperator):
    """A tensor as an operator; transposed and other non-contiguous views are used as they are, without a copy.

    A half-precision A times a float32 factor is computed in tiles of A, cut along the outer dimension in memory, so
    that A is never cast to float32 as a whole.

    Args:
        A: (..., m, n), floating-point, at least one row and one column.
        part_of: A is a part of a stack of so many matrices, which lies on several processes, from this number on; it
            is treated as it would be there.

    Raises:
        TypeError: if A is not a floating-point tensor.
        ValueError: if A is not at least 2-D or has no entries in a matrix.

    Example:
        >>> DenseOperator(torch.eye(3)).rmatmul(torch.ones(3, 1)).mT
        tensor([[1., 1., 1.]])
    """

    def __init__(self, A: Tensor, part_of: tuple[int, int] | None = None) -> None:
        if not isinstance(A, Tensor) or not A.is_floating_point():
            found = f"a tensor of {A.dtype}" if isinstance(A, Tensor) else f"{type(A).__name__}"
            raise TypeError(f"a floating-point tensor or a MatrixOperator is needed, got {found}")
        if A.ndim < 2 or 0 in A.shape[-2:]:
            raise ValueError(
                f"a matrix or a batch of matrices (..., m, n) with m, n >= 1 is needed, got {tuple(A.shape)}"
            )
        self._A = A.detach()
        self._part_of = part_of

    @property
    def stack(self) -> tuple[tuple[int, ...], slice]:
        """Leading dimensions for which random numbers are drawn, and the part of the first one that A is."""
        if self._part_of is None:
            return super().stack
        size, start = self._part_of
        return (size,), slice(start, start + self._A.shape[0])

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, n)."""
        return self._A.shape

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""
        return self._A.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries, and of the results."""
        return self._A.device

    @torch.no_grad()
    def matmul(self, X: Tensor) -> Tensor:
        """AX of shape (..., m, k) for X of shape (..., n, k)."""
        return _product(self._A, X)

    @torch.no_grad()
    def rmatmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (..., n, k) for X of shape (..., m, k)."""
        return _product(self._A.mT, X)

    @torch.no_grad()
    def amax(self) -> Tensor:
        """Largest |entry| of each matrix, shape (...); NaN or infinite exactly if an entry is."""
        # Two reductions instead of one over |A|, which would be an m×n temporary.
        return torch.maximum(self._A.amax(dim=(-2, -1)), -self._A.amin(dim=(-2, -1)))

    def to_dense(self) -> Tensor:
        """A itself."""
        return self._A

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of A as a view, shape (..., stop - start, n)."""
        return self._A[..., start:stop, :]


def as_operator(A: Tensor | MatrixOperator) -> MatrixOperator:
    """A as an operator: a tensor is wrapped, an operator is returned as it is.

    Args:
        A: tensor (..., m, n) or operator.

    Returns:
        The operator.

    Raises:
        TypeError: if A is neither an operator nor a floating-point tensor.
        ValueError: if A is a tensor that is not a batch of non-empty matrices.

    Example:
        >>> as_operator(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    return A if isinstance(A, MatrixOperator) else DenseOperator(A)


def tiles(A: Tensor, dim: int) -> Iterator[slice]:
    """Slices that cut dimension ``dim`` of A into tiles of about 4 MiB in float32."""
    size = A.shape[dim]
    step = max(_MIN_TILE, _TILE_ELEMENTS * size // max(A.numel(), 1))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def squared_frobenius(X: Tensor) -> Tensor:
    """‖X‖²_F of shape (...) in float64: norms of rows in the dtype of X, their squares summed in float64."""
    return torch.linalg.vector_norm(X, dim=-1).double().square().sum(dim=-1)


def _product(A: Tensor, X: Tensor) -> Tensor:
    dtype = torch.promote_types(A.dtype, X.dtype)
    X = X.to(dtype)
    if A.dtype == dtype:
        return A @ X
    # A tile should be one piece of memory: rows of a row-major matrix, columns of a transposed view.
    if A.stride(-2) >= A.stride(-1):
        return torch.cat([A[..., rows, :].to(dtype) @ X for rows in tiles(A, -2)], dim=-2)
    batch = torch.broadcast_shapes(A.shape[:-2], X.shape[:-2])
    out = A.new_zeros(*batch, A.shape[-2], X.shape[-1], dtype=dtype)
    for columns in tiles(A, -1):
        out += A[..., columns].to(dtype) @ X[..., columns, :]
    return out
