"""AdamW (arXiv 1711.05101) as torch writes it: decay first, ε after the bias correction."""

from __future__ import annotations

from torch import Tensor

from references.parts import Adam, decayed_step


class AdamWReference:
    def __init__(
        self,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.adam = Adam(betas, eps)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        return decayed_step(W.double(), self.adam(G.double()), self.lr, self.weight_decay)
