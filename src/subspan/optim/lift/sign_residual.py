"""Sign descent outside the subspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subspan.optim.method import Lift, Step, Update


@dataclass(frozen=True)
class SignResidual(Lift):
    """D = P·U + sign_scale·sign(G − P·R) (FRUGAL, arXiv 2411.07837); the residual is formed in row tiles only."""

    needs_gradient = True
    needs_orthonormal = False

    def lift(self, step: Step) -> Update:
        scale = step.group["sign_scale"]

        def sign(residual: Tensor) -> Tensor:
            return residual.sign_().mul_(scale)

        return Update(low_rank=step.direction, residual=sign, projected=step.projected)
