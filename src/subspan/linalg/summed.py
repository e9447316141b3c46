"""A sum of matrices that lie on several processes; each one sees the same operator and gets the same results."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.linalg.operator import DenseOperator, MatrixOperator

__all__ = ["SummedOperator"]


class SummedOperator(MatrixOperator):
    """A = Σᵢ Aᵢ of the matrices Aᵢ of all processes; every product is one local product and one all-reduce of it.

    With the gradient of each process, divided by their number, it is the gradient of the joint batch: a finder needs
    sketches of it, and nobody forms it. Results are the same on all ranks, and so are bases if all ranks call with
    equal generators. Every method but the properties is a collective call; only `to_dense`, and finders that need it
    (the exact SVD), reduce all of the matrix.

    Args:
        local: matrix of this process, (..., m, n), of the same shape and dtype on all of them.
        group: process group, the default one if None.

    Raises:
        TypeError: if ``local`` is not a floating-point tensor.
        ValueError: if ``local`` is empty.
        RuntimeError: if torch.distributed is not initialised.
    """

    def __init__(self, local: Tensor, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call init_process_group first, or use DenseOperator"
            )
        self._local = DenseOperator(local)
        self._group = group
        self._amax: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, n)."""
        return self._local.shape

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""
        return self._local.dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix of this process, and of the results."""
        return self._local.device

    @torch.no_grad()
    def matmul(self, X: Tensor) -> Tensor:
        """AX of shape (..., m, k), on all ranks, for the same X on all of them."""
        return self.reduced(self._local.matmul(X))

    @torch.no_grad()
    def rmatmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (..., n, k), on all ranks, for the same X on all of them."""
        return self.reduced(self._local.rmatmul(X))

    @torch.no_grad()
    def amax(self) -> Tensor:
        """Bound on the entries, the sum of the largest |entry| of each rank; NaN or infinite if an entry is.

        A bound will do where it sets a power of two. It is found once.
        """
        if self._amax is None:
            self._amax = self.reduced(self._local.amax().to(torch.promote_types(self.dtype, torch.float32)))
        return self._amax

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The whole matrix, on all ranks: m·n numbers are reduced."""
        return self.reduced(self._local.to_dense().clone())

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the whole matrix, on all ranks."""
        return self.reduced(self._local.rows(start, stop).clone())

    def reduced(self, values: Tensor) -> Tensor:
        """The sum over all ranks of what each of them computed."""
        values = values.contiguous()
        dist.all_reduce(values, group=self._group)
        return values
