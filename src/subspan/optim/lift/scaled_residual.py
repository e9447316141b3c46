"""The residual scaled column by column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.optim.lift.limiter import limit_growth, limiter_specs
from subspan.optim.lift.norms import column_norms_squared, norm_ratio
from subspan.optim.method import Geometry, Lift, Step, Update, check_flag
from subspan.optim.tiling import tiles
from subspan.state import StateSpec

# ‖G_j‖² − ‖R_j‖² loses its digits when the subspace holds nearly everything: below this share of the squared norm the
# residual is formed in row tiles instead.
_TRUSTED_SHARE = 1e-2


@dataclass(frozen=True)
class ScaledResidual(Lift):
    """D = scale·Q·U + φ∘(G − QR), φ_j = ‖U_j‖/‖R_j‖, with the norm-growth limiter on the second term (Fira).

    The m×n residual is not formed: φ∘(G − QR) = φ∘G − Q(R∘φ), and its norm follows from ‖G_j‖² − ‖R_j‖² where that
    can be trusted, from row tiles elsewhere.

    Args:
        official_code: subtract scale·QR instead of QR from the gradient, as the official code does.
    """

    official_code: bool = False
    needs_gradient = True

    def __post_init__(self) -> None:
        check_flag("official_code", self.official_code)

    def specs(self, geometry: Geometry) -> dict[str, StateSpec]:
        return limiter_specs(geometry)

    def lift(self, step: Step) -> Update:
        R, U, scale = step.projected, step.direction, step.group["scale"]
        inside = scale if self.official_code else 1.0
        R_squared = step.shards.over_rows(R.square().sum(-2, keepdim=True))
        phi = norm_ratio(U, R, -2, step.shards)
        norm = self._residual_norm(step, phi, R_squared, inside)
        phi = phi * limit_growth(norm, step.state["residual_norm"], step.group["limiter"])[..., None, None]
        return Update(low_rank=U.mul_(scale).addcmul_(R, phi, value=-inside), gain=phi)

    @staticmethod
    def _residual_norm(step: Step, phi: Tensor, R_squared: Tensor, inside: float) -> Tensor:
        """‖φ∘(G − inside·QR)‖_F, which is Σ φ_j²(‖G_j‖² − (2·inside − inside²)‖R_j‖²) under the root.

        With a rounded basis ‖QR_j‖² is not ‖R_j‖², so the residual is formed in row tiles.
        """
        assert step.gradient is not None
        shards = step.shards
        G_squared = shards.columns(column_norms_squared(step.gradient))
        weights = phi.square()
        squares = weights * (G_squared - (2.0 * inside - inside * inside) * R_squared)
        sums = torch.stack([(weights * G_squared).sum((-2, -1)), squares.sum((-2, -1))])
        whole, outside = shards.over_columns(sums)
        exact = step.group.get("basis_storage", "float32") == "float32"
        # Asked so that yes, the answer of a simulation, is the way that needs more memory.
        if exact and not bool((outside <= _TRUSTED_SHARE * whole).any()):
            return outside.sqrt()
        outside = torch.zeros_like(whole)
        R, phi = shards.whole(step.projected), shards.whole(phi)
        for tile in tiles(step.gradient):
            G = tile.of(step.gradient).to(step.projected.dtype)
            residual = G - step.projection.back(R, tile, step.gradient).mul(inside)
            phi_tile = tile.of(phi) if tile.dim == -1 else phi
            outside += residual.mul_(phi_tile).square_().sum((-2, -1))
        return shards.total(outside).sqrt()
