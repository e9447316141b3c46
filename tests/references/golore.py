"""GoLore (arXiv 2410.11289): GaLore whose basis is uniform on the Stiefel manifold from step `golore_after` on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from references.galore import GaLoreReference
from references.parts import Find, exact_basis


class GoLoreReference(GaLoreReference):
    def __init__(self, *, draw: Find, golore_after: int = 0, find: Find = exact_basis, **settings: Any) -> None:
        def switch(G: Tensor, rank: int, step: int, old: Tensor | None) -> Tensor:
            return (find if step < golore_after else draw)(G, rank, step, old)

        super().__init__(find=switch, **settings)

    def carry(self, old: Tensor, new: Tensor) -> None:
        self.inner.M = (new.T @ old) @ self.inner.M  # the momentum is projected anew; V and the counter stay
