"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the raw gradient, scaled as Adam would scale a Gaussian sketch of it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from references.galore import GaLoreReference
from references.parts import Adam, Find, Limiter


class APOLLOReference(GaLoreReference):
    """`find` returns Ω (m×r) with entries N(0, 1/r); `tensor=True`: one scale for the whole matrix (APOLLO-Mini)."""

    def __init__(
        self,
        *,
        find: Find,
        scale: float = 1.0,
        tensor: bool = False,
        scale_front: bool = False,
        limiter: float = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **settings: Any,
    ) -> None:
        super().__init__(find=find, scale=scale, inner=Adam(betas, eps, corrected=False), **settings)
        self.tensor, self.scale_front = tensor, scale_front
        self.limit = Limiter(limiter)

    def direction(self, G: Tensor) -> Tensor:
        R = self.refreshed(G).T @ G
        N = self.inner(R)
        s = N.norm() / (R.norm() + 1e-8) if self.tensor else N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        multiplier = math.sqrt(self.scale)
        S = self.limit(multiplier * s * G) if self.scale_front else multiplier * self.limit(s * G)
        return self.inner.correction * S
