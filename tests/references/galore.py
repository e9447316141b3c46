"""GaLore (arXiv 2403.03507): Adam on R = QᵀG, weights move by −lr·scale·Q·N; moments survive a refresh as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from references.parts import SGD, Adam, Find, decayed_step, drop_round_off, exact_basis, projects_left


class GaLoreReference:
    def __init__(
        self,
        *,
        lr: float,
        rank: int,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_placement: str = "after",
        decay: str = "before",
        inner: Adam | SGD | None = None,
        find: Find = exact_basis,
    ) -> None:
        self.lr, self.rank, self.gap, self.scale = lr, rank, update_proj_gap, scale
        self.proj_type, self.weight_decay, self.decay, self.find = proj_type, weight_decay, decay, find
        self.inner = inner if inner is not None else Adam(betas, eps, eps_placement)
        self.Q: Tensor | None = None
        self.t = 0

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        W, G = W.double(), G.double()
        left = projects_left(W.shape, self.proj_type)
        D = self.direction(G if left else G.T)
        self.t += 1
        return decayed_step(W, D if left else D.T, self.lr, self.weight_decay, self.decay)

    def direction(self, G: Tensor) -> Tensor:
        """Oriented gradient (projected side first) -> oriented direction D, with W ← W − lr·D."""
        Q = self.refreshed(G)
        R = drop_round_off(Q.T @ G, len(G))
        return self.lift(Q, R, self.inner(R), G)

    def lift(self, Q: Tensor, R: Tensor, N: Tensor, G: Tensor) -> Tensor:
        return self.scale * Q @ N

    def refreshed(self, G: Tensor) -> Tensor:
        if self.rank >= len(G):  # nothing to project: the whole space, in its own coordinates
            return torch.eye(len(G), dtype=G.dtype)
        if self.t % self.gap == 0:
            new = self.find(G, self.rank, self.t, self.Q).double()
            if self.Q is not None:
                self.carry(self.Q, new)
            self.Q = new
        assert self.Q is not None
        return self.Q

    def carry(self, old: Tensor, new: Tensor) -> None:
        """GaLore keeps both moments, though their coordinates belong to the old basis."""
