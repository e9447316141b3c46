"""Q-GaLore (arXiv 2407.08296) without its 8-bit weights: rounded bases, and a period that doubles when they persist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from references.galore import GaLoreReference
from references.quantised import linear_levels, quantised


class QGaLoreReference(GaLoreReference):
    """Alike are subspaces by the mean of the squared cosines of their angles; the code looks at two vectors instead."""

    def __init__(
        self, *, cos_threshold: float, gamma_proj: float, queue_size: int, official_code: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.threshold, self.factor, self.count = cos_threshold, gamma_proj, queue_size
        self.official_code = official_code
        self.queue: list[float] = []
        self.refreshes: list[int] = []
        self.due = 0

    def refreshed(self, G: Tensor) -> Tensor:
        if self.t == self.due:
            self.refreshes.append(self.t)
            new = quantised(self.find(G, self.rank, self.t, self.Q).double(), linear_levels(4), block=256)
            if self.Q is not None:
                self.look(self.Q, new)
            self.Q = new
            self.due += self.gap
        assert self.Q is not None
        return self.Q

    def look(self, old: Tensor, new: Tensor) -> None:
        if self.official_code:
            self.queue.append(float(old[:, 0] @ new[:, 0]))
        else:
            self.queue.append(float(torch.linalg.svdvals(old.T @ new).square().mean()))
        self.queue = self.queue[-self.count :]
        if len(self.queue) < self.count:
            return
        if self.official_code:
            if sum(self.queue) / self.count >= self.threshold:
                self.gap = int(self.gap * self.factor)
        elif all(overlap >= self.threshold for overlap in self.queue):
            self.gap = int(self.gap * self.factor)
            self.queue = []
