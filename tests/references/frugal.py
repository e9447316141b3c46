"""FRUGAL (arXiv 2411.07837): Adam inside a subspace, sign descent on the rest; the moments restart at every refresh."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from references.galore import GaLoreReference
from references.parts import Adam, Find, decayed_step


class FRUGALReference(GaLoreReference):
    """One matrix and `density`·m directions: an orthonormal basis, or unit vectors (`rows_basis`) of chosen rows."""

    def __init__(self, *, density: float, side: int, sign_scale: float = 1.0, find: Find, **settings: Any) -> None:
        rank = max(1, round(density * side)) if density > 0 else 0
        super().__init__(rank=rank, find=find, **settings)
        self.sign_scale = sign_scale

    def direction(self, G: Tensor) -> Tensor:
        if self.rank == 0:
            return self.sign_scale * G.sign()
        return super().direction(G)

    def lift(self, Q: Tensor, R: Tensor, N: Tensor, G: Tensor) -> Tensor:
        residual = torch.zeros_like(G) if self.rank >= len(G) else G - Q @ (Q.T @ G)
        return Q @ N + self.sign_scale * residual.sign()

    def carry(self, old: Tensor, new: Tensor) -> None:
        self.inner.reset()


def rows_basis(indices: Tensor, m: int) -> Tensor:
    """Unit vectors e_i as columns, so that QᵀG picks rows of G."""
    return torch.eye(m, dtype=torch.float64)[:, indices]


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """`layers.10` comes after `layers.9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


class FRUGALBlocksReference:
    """Whole tensors take turns, last name first: active ones run Adam, the others descend along the sign."""

    def __init__(
        self,
        shapes: dict[str, torch.Size],
        *,
        lr: float,
        density: float = 0.25,
        update_proj_gap: int = 200,
        sign_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.density, self.gap, self.sign_scale = lr, density, update_proj_gap, sign_scale
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.numel = {name: shape.numel() for name, shape in shapes.items()}
        self.queue = sorted(shapes, key=natural_key, reverse=True)
        self.active: dict[str, Adam] = {}
        self.t = 0

    def select(self) -> None:
        """Take names from the head of the queue until their elements reach the density; they go to its tail."""
        self.active, taken = {}, 0
        while taken < self.density * sum(self.numel.values()) and len(self.active) < len(self.queue):
            name = self.queue.pop(0)
            self.queue.append(name)
            self.active[name] = Adam(self.betas, self.eps)
            taken += self.numel[name]

    def step(self, W: dict[str, Tensor], G: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.t % self.gap == 0:
            self.select()
        self.t += 1
        new = {}
        for name, weight in W.items():
            gradient = G[name].double()
            adam = self.active.get(name)
            D = adam(gradient) if adam else self.sign_scale * gradient.sign()
            new[name] = decayed_step(weight.double(), D, self.lr, self.weight_decay)
        return new
