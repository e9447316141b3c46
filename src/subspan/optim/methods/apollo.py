"""APOLLO and APOLLO-Mini."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from subspan.optim.inner import Adam
from subspan.optim.lift import GradientScaling
from subspan.optim.method import Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import EveryGap
from subspan.optim.subspace import Gaussian
from subspan.optim.transport import Keep


class APOLLO(LowRankOptimizer):
    """APOLLO: the gradient itself, each channel scaled by what Adam would do in a random sketch of it.

    R = ΩᵀG with Ω ~ N(0, 1/r), s_j = ‖M_j/(√V_j + ε)‖/‖R_j‖, D = c·√scale·(s∘G) with Adam's bias correction c and a
    norm-growth limiter on s∘G. No singular value decomposition, and the step has the rank of the gradient.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        limiter: γ of the norm-growth limiter; None for none.
        update_proj_gap: steps after which the sketch is drawn anew; the moments are kept.
        scale: the step is multiplied by its square root.
        proj_type: side that is sketched, as for `GaLore`.
        scale_type: ``"channel"`` or ``"tensor"``: one factor for each column of the oriented gradient, or for all.
        scale_front: put √scale inside the limited norm (for short warm-ups).
        store_basis: False draws Ω again from its seed at each step: m·r numbers less, and slower.
        stagger: spread the redraws over the period.
        moments, basis_storage, min_quantized, rounding: as for `GaLore`.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``rank`` and ``target_modules``.

    Example:
        >>> APOLLO(nn.Linear(64, 32), rank=4).method.lift.scale_type
        'channel'

    Source: arXiv 2412.05270.
    """

    _name = "apollo"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        limiter: float | None = 1.01,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        scale_type: Literal["channel", "tensor"] = "channel",
        scale_front: bool = False,
        store_basis: bool = True,
        stagger: bool = True,
        moments: str = "float32",
        basis_storage: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        method = Method(
            self._name,
            subspace=Gaussian(store_basis),
            refresh=EveryGap(stagger),
            transport=Keep(),
            inner=Adam("before"),
            lift=GradientScaling(scale_type, scale_front),
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
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


class APOLLOMini(APOLLO):
    """APOLLO-Mini: APOLLO with rank 1, one factor for the whole matrix and scale 128.

    Args:
        params: a model, groups from ``param_groups(model, rank=1)``, or group dicts.
        lr: learning rate.
        scale: the step is multiplied by its square root.
        scale_type: see `APOLLO`.
        **settings: all other settings of `APOLLO`; with a model ``rank`` is 1 unless given.

    Example:
        >>> APOLLOMini(nn.Linear(64, 32)).param_groups[0]["rank"]
        1

    Source: arXiv 2412.05270.
    """

    _name = "apollo_mini"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        scale: float = 128.0,
        scale_type: Literal["channel", "tensor"] = "tensor",
        **settings: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            settings.setdefault("rank", 1)
        super().__init__(params, lr, scale=scale, scale_type=scale_type, **settings)
