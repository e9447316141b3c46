"""Fira (arXiv 2410.01623): GaLore's step plus the rest of the gradient, scaled per column as Adam scaled R."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from references.galore import GaLoreReference
from references.parts import Limiter


class FiraReference(GaLoreReference):
    def __init__(self, *, official_code: bool = False, limiter: float = 1.01, **settings: Any) -> None:
        super().__init__(**settings)
        self.official_code = official_code
        self.limit = Limiter(limiter)

    def lift(self, Q: Tensor, R: Tensor, N: Tensor, G: Tensor) -> Tensor:
        phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        # The published code subtracts the already scaled back-projection α·QR.
        residual = G - (self.scale if self.official_code else 1.0) * Q @ R
        return self.scale * Q @ N + self.limit(phi * residual)
