"""The gradient itself, scaled by what the subspace tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from subspan.optim.lift.limiter import limit_growth, limiter_specs
from subspan.optim.lift.norms import column_norms_squared, norm_ratio
from subspan.optim.method import Geometry, Lift, Step, Update, check_flag
from subspan.state import StateSpec


@dataclass(frozen=True)
class GradientScaling(Lift):
    """D = c·√scale·(s∘G), s_j = ‖U_j‖/‖R_j‖ with U before bias correction c (APOLLO, arXiv 2412.05270).

    The norm-growth limiter acts on s∘G.

    Args:
        scale_type: ``"channel"``: one s for each column of the oriented gradient; ``"tensor"``: one for the matrix.
        scale_front: put √scale inside the limited norm.
    """

    scale_type: Literal["channel", "tensor"] = "channel"
    scale_front: bool = False
    needs_gradient = True
    needs_orthonormal = False

    def __post_init__(self) -> None:
        if self.scale_type not in ("channel", "tensor"):
            raise ValueError(f"scale_type={self.scale_type!r}: choose 'channel' or 'tensor'")
        check_flag("scale_front", self.scale_front)

    def specs(self, geometry: Geometry) -> dict[str, StateSpec]:
        return limiter_specs(geometry)

    def lift(self, step: Step) -> Update:
        assert step.gradient is not None
        dim = -2 if self.scale_type == "channel" else (-2, -1)
        gain = norm_ratio(step.direction, step.projected, dim, step.shards) / step.correction
        multiplier = math.sqrt(step.group["scale"])
        if self.scale_front:
            gain = gain * multiplier
        squares = gain.square() * step.shards.columns(column_norms_squared(step.gradient))
        size = step.shards.over_columns(squares.sum((-2, -1))).sqrt()
        factor = limit_growth(size, step.state["residual_norm"], step.group["limiter"]) * step.correction
        if not self.scale_front:
            factor = factor * multiplier
        gain = gain * factor[..., None, None]
        return Update(gain=gain.expand(-1, step.projected.shape[-1]) if step.shards.reduces else gain)
