"""The low-rank direction alone."""

from __future__ import annotations

from dataclasses import dataclass

from subspan.optim.method import Lift, Step, Update


@dataclass(frozen=True)
class ProjectBack(Lift):
    """D = scale·Q·U; the rest of the gradient is dropped (GaLore, arXiv 2403.03507)."""

    def lift(self, step: Step) -> Update:
        scale = step.group["scale"]
        return Update(low_rank=step.direction if scale == 1.0 else step.direction.mul_(scale))
