"""Fira."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from subspan.optim.inner import Adam
from subspan.optim.lift import ScaledResidual
from subspan.optim.method import Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import EveryGap
from subspan.optim.subspace import gradient_subspace, tolerance_keys
from subspan.optim.transport import Keep


class Fira(LowRankOptimizer):
    """Fira: GaLore plus the rest of the gradient, scaled column by column, with a norm-growth limiter.

    D = scale·Q·U + φ∘(G − QR) with R = QᵀG, U = Adam(R), φ_j = ‖U_j‖/‖R_j‖; the norm of the second term may grow by
    at most the factor ``limiter`` from step to step.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        limiter: γ of the norm-growth limiter; None for none.
        update_proj_gap, scale, proj_type, svd, rank_policy, rtol, stagger, eps_placement: as for `GaLore`.
        official_code: subtract scale·QR instead of QR, as the official code does.
        moments, basis_storage, min_quantized, rounding: as for `GaLore`.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``rank`` and ``target_modules``.

    Example:
        >>> import torch
        >>> Fira(torch.nn.Linear(64, 32), rank=4).param_groups[0]["limiter"]
        1.01

    Source: arXiv 2410.01623.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        limiter: float | None = 1.01,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: Literal["randomized", "exact"] = "randomized",
        rank_policy: Literal["fixed", "tolerance"] = "fixed",
        rtol: float | None = None,
        stagger: bool = True,
        eps_placement: Literal["after", "before"] = "after",
        official_code: bool = False,
        moments: str = "float32",
        basis_storage: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        method = Method(
            "fira",
            subspace=gradient_subspace(svd, rank_policy),
            refresh=EveryGap(stagger),
            transport=Keep(),
            inner=Adam(eps_placement),
            lift=ScaledResidual(official_code),
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            **tolerance_keys(rank_policy, rtol),
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "limiter": limiter,
            "moments": moments,
            "basis_storage": basis_storage,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
