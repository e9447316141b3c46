"""GaLore with ranks from a tolerance: least rank with ‖G − QQᵀG‖ ≤ rtol·‖G‖ by SVD, rounded up to a multiple of 8."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from references.galore import GaLoreReference
from references.parts import SGD, exact_basis


class AdaptiveGaLoreReference(GaLoreReference):
    """Moments keep the rows of leading directions; new rows of V are proportional to the energy of their directions."""

    def __init__(self, *, rtol: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.rtol = rtol
        self.ranks: list[int] = []

    def refreshed(self, G: Tensor) -> Tensor:
        if self.t % self.gap == 0:
            squares = torch.linalg.svdvals(G).square().tolist()
            needed = 0
            while sum(squares[needed:]) > self.rtol**2 * sum(squares):
                needed += 1
            rank = min(self.rank, len(G) - 1, max(8, 8 * math.ceil(needed / 8)))
            self.Q = exact_basis(G, rank)
            self.resize(self.Q.T @ G)
            self.ranks.append(rank)
        assert self.Q is not None
        return self.Q

    def resize(self, R: Tensor) -> None:
        if self.t == 0 or isinstance(self.inner, SGD):
            return
        M, V = self.inner.M, self.inner.V
        assert isinstance(M, Tensor)
        assert isinstance(V, Tensor)
        rows, kept = len(R), min(len(R), len(M))
        ratio = V[:kept].mean(1).sum() / R[:kept].square().mean(1).sum()
        filled = R[kept:].square().mean(1, keepdim=True) * ratio * torch.ones_like(R[kept:])
        self.inner.M = torch.cat([M[:kept], torch.zeros(rows - kept, R.shape[1], dtype=R.dtype)])
        self.inner.V = torch.cat([V[:kept], filled])
