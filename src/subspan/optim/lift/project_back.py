"""The low-rank direction alone."""

from __future__ import annotations

from dataclasses import dataclass

from subspan.optim.method import Lift, Step, Update


@dataclass(frozen=True)
class ProjectBack(Lift):
    """D = scale·Q·U; the rest of the gradient is dropped (GaLore, arXiv 2403.03507)."""

    def lift(self, step: Step) -> Update:
        return Update(low_rank=step.direction, factor=step.group["scale"])
