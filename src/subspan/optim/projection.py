"""Projections P between a matrix (..., m, n) and its r directions (..., r, n)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from subspan.linalg import DenseOperator, round_off_floor
from subspan.optim.tiling import Tile
from subspan.state.host import on_host


class Projection(ABC):
    """A linear map R = Pᵀ G with its way back P R."""

    @abstractmethod
    def project(self, G: Tensor) -> Tensor:
        """R = Pᵀ G in float32 (float64 for float64), contiguous, a tensor of its own or G itself."""

    def without_round_off(self, R: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        """R with rows that are rounding of a gradient of ``m`` rows in ``dtype`` set to zero; R may be overwritten."""
        return R

    def divided_without_round_off(self, R: Tensor, squares: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        """The same of a piece of the columns of R, for squared norms (r,) of whole rows."""
        return R

    @abstractmethod
    def back(self, R: Tensor, tile: Tile, like: Tensor) -> Tensor:
        """One tile of P R; ``like`` is the tile's matrix (..., m, n), for its shape."""

    @abstractmethod
    def add_back_(self, W: Tensor, R: Tensor, *, beta: float, alpha: float) -> None:
        """W <- beta·W + alpha·P R in place, for float32 or float64 ``W``."""


class Identity(Projection):
    """P = I: the rank has reached the projected side."""

    def project(self, G: Tensor) -> Tensor:
        return G.to(_compute_dtype(G)).contiguous()

    def back(self, R: Tensor, tile: Tile, like: Tensor) -> Tensor:
        return tile.of(R)

    def add_back_(self, W: Tensor, R: Tensor, *, beta: float, alpha: float) -> None:
        if beta != 1.0:
            W.mul_(beta)
        W.add_(R, alpha=alpha)


class Linear(Projection):
    """P = a dense matrix, stored or drawn from a seed; no claim about its columns."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis

    def project(self, G: Tensor) -> Tensor:
        if G.dtype == self.basis.dtype:
            return self.basis.mT @ G
        if not G.numel():  # a piece of a divided matrix may be empty
            return G.new_zeros(self.basis.shape[-1], G.shape[-1], dtype=self.basis.dtype)
        return DenseOperator(G).rmatmul(self.basis).mT.contiguous()

    def back(self, R: Tensor, tile: Tile, like: Tensor) -> Tensor:
        if tile.dim == -2:
            return tile.of(self.basis) @ R
        return self.basis @ tile.of(R)

    def add_back_(self, W: Tensor, R: Tensor, *, beta: float, alpha: float) -> None:
        if W.ndim == 2:
            W.addmm_(self.basis, R, beta=beta, alpha=alpha)
        else:
            flat = W.flatten(0, -3) if W.ndim > 3 else W
            flat.baddbmm_(
                self.basis.reshape(-1, *self.basis.shape[-2:]), R.reshape(-1, *R.shape[-2:]), beta=beta, alpha=alpha
            )


class Orthonormal(Linear):
    """P = Q with orthonormal columns.

    Rows of R that are round-off are set to zero: when rank(G) < r the surplus rows hold nothing else, and Adam would
    turn them into full-size steps. A row is round-off when its norm is at most `round_off_floor`·‖R‖_F.
    """

    def divided_without_round_off(self, R: Tensor, squares: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        norms = squares.sqrt()
        return R.mul_((norms > round_off_floor(m, dtype, R.dtype) * squares.sum().sqrt()).unsqueeze(-1))

    def without_round_off(self, R: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        floor = round_off_floor(m, dtype, R.dtype)
        norms = torch.linalg.vector_norm(R, dim=-1, keepdim=True)
        if on_host(R.device):
            # ‖R‖_F is at most √r times the longest row: nearly always two numbers show that no row is to be dropped. A
            # device would have to wait for them.
            smallest, largest = (float(norm) for norm in norms.aminmax())
            if not math.isfinite(largest):
                return R  # left as it is for the executor to see
            if smallest > floor * math.sqrt(R.shape[-2]) * largest:
                return R
        return R.mul_(norms > floor * torch.linalg.vector_norm(norms, dim=-2, keepdim=True))


class Selection(Projection):
    """P = r columns of the identity: R is r rows of G.

    Args:
        rows: their numbers.
        partial: G is a piece of the whole, and numbers outside it are of rows that it does not have: zero in R.
    """

    def __init__(self, rows: Tensor, partial: bool = False) -> None:
        self.rows, self.partial = rows, partial

    def _index(self, n: int) -> Tensor:
        return self.rows.unsqueeze(-1).expand(*self.rows.shape, n)

    def project(self, G: Tensor) -> Tensor:
        if self.partial:
            # One row more than the piece has stands for all that it has not.
            count = G.shape[-2]
            rows = torch.where((self.rows >= 0) & (self.rows < count), self.rows, count)
            G = torch.nn.functional.pad(G, (0, 0, 0, 1))
            return Selection(rows).project(G)
        return G.gather(-2, self._index(G.shape[-1])).to(_compute_dtype(G)).contiguous()

    def back(self, R: Tensor, tile: Tile, like: Tensor) -> Tensor:
        if tile.dim == -1:
            R = tile.of(R)
            out = R.new_zeros(*R.shape[:-2], like.shape[-2], R.shape[-1])
            return out.scatter_(-2, self._index(R.shape[-1]), R)
        # One row more than the tile takes what lies outside it, so that no stack needs masks of different lengths.
        inside = (self.rows >= tile.start) & (self.rows < tile.start + tile.length)
        rows = torch.where(inside, self.rows - tile.start, tile.length)
        out = R.new_zeros(*R.shape[:-2], tile.length + 1, R.shape[-1])
        out.scatter_(-2, rows.unsqueeze(-1).expand(*rows.shape, R.shape[-1]), R)
        return out.narrow(-2, 0, tile.length)

    def add_back_(self, W: Tensor, R: Tensor, *, beta: float, alpha: float) -> None:
        if beta != 1.0:
            W.mul_(beta)
        if self.partial:
            W.add_(self.back(R, Tile(-2, 0, W.shape[-2]), W), alpha=alpha)
            return
        W.scatter_add_(-2, self._index(R.shape[-1]), R * alpha)


class Nothing(Projection):
    """Rank 0: no direction is kept."""

    def project(self, G: Tensor) -> Tensor:
        return G.new_zeros(*G.shape[:-2], 0, G.shape[-1], dtype=_compute_dtype(G))

    def back(self, R: Tensor, tile: Tile, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=R.dtype, device=R.device)

    def add_back_(self, W: Tensor, R: Tensor, *, beta: float, alpha: float) -> None:
        if beta != 1.0:
            W.mul_(beta)


def _compute_dtype(G: Tensor) -> torch.dtype:
    return torch.float64 if G.dtype == torch.float64 else torch.float32
