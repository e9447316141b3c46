"""SCALE (arXiv 2506.16659): every output of a layer by itself; W is seen as the paper writes it, (in, out)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from references.parts import Adam, decayed_step


class SCALEReference:
    """One parameter. `outputs` says how torch holds it; `hold` is what is kept of the momentum (out, in)."""

    def __init__(
        self,
        *,
        lr: float,
        outputs: str | None = "rows",
        momentum: float = 0.9,
        norm: str = "rms",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold: Callable[[Tensor], Tensor] = lambda M: M,
    ) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.outputs, self.momentum, self.norm, self.eps, self.hold = outputs, momentum, norm, eps, hold
        self.adam = Adam(betas, eps)
        self.M: dict[int, Tensor] = {}

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        W, G = W.double(), G.double()
        if W.ndim < 2 or self.outputs is None:
            return decayed_step(W, self.adam(G), self.lr, self.weight_decay)
        if W.ndim == 3:  # experts know nothing of each other
            D = torch.stack([self.direction(gradient, expert) for expert, gradient in enumerate(G)])
        else:
            D = self.direction(G.reshape(len(G), -1), 0).reshape(W.shape)
        return decayed_step(W, D, self.lr, self.weight_decay)

    def direction(self, G: Tensor, expert: int) -> Tensor:
        paper = G.T if self.outputs == "rows" else G
        if self.momentum > 0:
            old = self.M.get(expert, torch.zeros_like(paper))
            paper = self.momentum * old + (1 - self.momentum) * paper
            self.M[expert] = self.hold(paper.T).T
        columns = []
        for column in paper.unbind(1):
            rms = (column @ column / len(column)) ** 0.5
            unit = column / rms if rms > self.eps else column / self.eps
            columns.append(unit if self.norm == "rms" else unit / len(column) ** 0.5)
        D = torch.stack(columns, dim=1)
        return D.T if self.outputs == "rows" else D
