"""How one dimension of a matrix is divided over processes, and the few collective calls that thin factors need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Division"]

# torch 2.13 renamed both; a torch that was built without processes has neither.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True)
class Division:
    """A (m, n) of which each process of a group has some rows, or some columns.

    Every dimension is cut as `torch.chunk` and DTensor's ``Shard`` cut it: pieces of ⌈size/world⌉, the last ones
    shorter or empty. Methods that reduce or gather are collective calls.

    Args:
        side: what is divided.
        m, n: of the whole matrix.
        group: process group.

    Raises:
        ValueError: neither rows nor columns.
    """

    side: Literal["rows", "columns"]
    m: int
    n: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.side not in ("rows", "columns"):
            raise ValueError(f"side={self.side!r} is not allowed: choose 'rows' or 'columns'")

    @property
    def world(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    @property
    def rows(self) -> slice:
        """The rows of this process, where the matrix or a thin factor is divided by rows."""
        return self.own(self.m)

    @property
    def columns(self) -> slice:
        """The columns of this process."""
        return self.own(self.n)

    def own(self, size: int) -> slice:
        """The piece of a dimension of ``size`` that this process has."""
        piece, rank = -(-size // self.world), dist.get_rank(self.group)
        return slice(min(rank * piece, size), min((rank + 1) * piece, size))

    def total(self, X: Tensor) -> Tensor:
        """The sum over the processes, in place where ``X`` is contiguous."""
        return self._reduced(X, dist.ReduceOp.SUM)

    def largest(self, X: Tensor) -> Tensor:
        """The maximum over the processes, in place where ``X`` is contiguous."""
        return self._reduced(X, dist.ReduceOp.MAX)

    def _reduced(self, X: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        X = X.contiguous()
        dist.all_reduce(X, op=operation, group=self.group)
        return X

    def own_columns_of_sum(self, X: Tensor) -> Tensor:
        """This process's columns of ΣX, for X (r, n) on every process."""
        if self.world == 1:
            return X
        piece = -(-self.n // self.world)
        padded = torch.nn.functional.pad(X, (0, piece * self.world - self.n))
        stacked = padded.view(X.shape[0], self.world, piece).transpose(0, 1).contiguous()
        out = torch.empty_like(stacked[0])
        assert _reduce_scatter is not None
        _reduce_scatter(out, stacked.flatten(0, 1), group=self.group)
        own = self.columns
        return out[:, : own.stop - own.start].contiguous()

    def all_columns(self, X: Tensor) -> Tensor:
        """X (r, n) from the columns that each process has."""
        return self._gathered(X.mT, self.n).mT.contiguous()

    def all_rows(self, X: Tensor, size: int | None = None) -> Tensor:
        """X (m, k) from the rows that each process has; ``size`` says how many there are, if not m."""
        return self._gathered(X, self.m if size is None else size)

    def _gathered(self, X: Tensor, size: int) -> Tensor:
        if self.world == 1:
            return X
        piece = -(-size // self.world)
        mine = torch.nn.functional.pad(X, (0, 0, 0, piece - X.shape[0])).contiguous()
        out = X.new_empty(piece * self.world, X.shape[1])
        assert _all_gather is not None
        _all_gather(out, mine, group=self.group)
        return out[:size]
