"""A matrix whose rows lie on several processes; each one sees the same operator and gets the same results."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.linalg.operator import DenseOperator, MatrixOperator

__all__ = ["RowShardedOperator"]


class RowShardedOperator(MatrixOperator):
    """Rows of A, in the order of the ranks; every product is one local product and one all-reduce.

    AᵀX = Σ AᵢᵀXᵢ is summed; AX is put together from the rows of each rank. Results are the same on all ranks, and so
    are bases if all ranks call with equal generators. Every method but the properties is a collective call.

    Args:
        local: rows of this process, (..., mᵢ, n); the numbers of rows may differ, none may be empty.
        group: process group, the default one if None.

    Raises:
        TypeError: if ``local`` is not a floating-point tensor.
        ValueError: if ``local`` is empty, or the ranks disagree in batch shape, columns or dtype.
        RuntimeError: if torch.distributed is not initialised.
    """

    def __init__(self, local: Tensor, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call init_process_group first, or use DenseOperator"
            )
        self._local = DenseOperator(local)
        self._group = group
        everyone: list[tuple[int, tuple[int, ...], str]] = [(0, (), "")] * dist.get_world_size(group)
        mine = (local.shape[-2], (*local.shape[:-2], local.shape[-1]), str(local.dtype))
        dist.all_gather_object(everyone, mine, group=group)
        if len({theirs[1:] for theirs in everyone}) > 1:
            raise ValueError(
                f"the ranks hold rows that do not fit together: (rows, other dimensions, dtype) {everyone}"
            )
        counts = [theirs[0] for theirs in everyone]
        rank = dist.get_rank(group)
        self._start, self._m = sum(counts[:rank]), sum(counts)
        self._stop = self._start + counts[rank]

    @property
    def shape(self) -> torch.Size:
        """Shape (..., m, n) of the whole matrix."""
        return torch.Size((*self._local.shape[:-2], self._m, self._local.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the entries."""
        return self._local.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows of this process, and of the results."""
        return self._local.device

    @torch.no_grad()
    def matmul(self, X: Tensor) -> Tensor:
        """AX of shape (..., m, k), on all ranks."""
        return self._gathered(self._local.matmul(X))

    @torch.no_grad()
    def rmatmul(self, X: Tensor) -> Tensor:
        """AᵀX of shape (..., n, k), on all ranks, for the whole X of shape (..., m, k)."""
        return self._reduced(self._local.rmatmul(X[..., self._start : self._stop, :]), dist.ReduceOp.SUM)

    @torch.no_grad()
    def amax(self) -> Tensor:
        """Largest |entry| of each whole matrix, shape (...); NaN or infinite exactly if an entry is."""
        # A maximum drops NaN on some backends, a sum does not.
        largest = self._local.amax()
        finite = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
        poison = self._reduced((largest - finite).to(torch.float32), dist.ReduceOp.SUM)
        return self._reduced(finite, dist.ReduceOp.MAX) + poison.to(largest.dtype)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The whole matrix, on all ranks; for tests and small matrices."""
        return self._gathered(self._local.to_dense())

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the whole matrix, on all ranks."""
        out = torch.zeros(*self.shape[:-2], stop - start, self.shape[-1], dtype=self.dtype, device=self.device)
        first, last = max(start, self._start), min(stop, self._stop)
        if first < last:
            out[..., first - start : last - start, :] = self._local.to_dense()[
                ..., first - self._start : last - self._start, :
            ]
        return self._reduced(out, dist.ReduceOp.SUM)

    @torch.no_grad()
    def squared_norm(self, scale: Tensor) -> Tensor:
        """‖scale·A‖²_F of the whole matrix, shape (...), float64."""
        return self._reduced(self._local.squared_norm(scale), dist.ReduceOp.SUM)

    def _gathered(self, local: Tensor) -> Tensor:
        whole = torch.zeros(*local.shape[:-2], self._m, local.shape[-1], dtype=local.dtype, device=local.device)
        whole[..., self._start : self._stop, :] = local
        return self._reduced(whole, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.contiguous()
        dist.all_reduce(values, op=operation, group=self._group)
        return values
