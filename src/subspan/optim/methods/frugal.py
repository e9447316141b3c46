"""FRUGAL."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from subspan.optim.inner import Adam
from subspan.optim.lift import SignResidual
from subspan.optim.method import Method, Subspace
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import EveryGap
from subspan.optim.subspace import Blocks, ExactSVD, RandomizedSVD, Rows, Stiefel
from subspan.optim.transport import Reset

_SUBSPACES: dict[str, Subspace] = {
    "blocks": Blocks(),
    "rows": Rows(),
    "svd": ExactSVD(),
    "randomized_svd": RandomizedSVD(),
    "stiefel": Stiefel(),
}


class FRUGAL(LowRankOptimizer):
    """FRUGAL: Adam in a part of the space, sign descent in the rest.

    D = P·Adam(PᵀG) + sign_scale·sign(G − P·PᵀG). Every ``update_proj_gap`` steps the part is chosen anew, for all
    parameters at once, and its moments and their bias correction start again from zero.

    Args:
        params: a model, groups from ``param_groups(model, rank=None, density=0.25)``, or group dicts with ``density``.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        density: with a model: share of the directions (for blocks: of the elements) that have state.
        sign_scale: factor on the sign step.
        update_proj_gap: steps between refreshes.
        proj_type: side that is projected, as for `GaLore`; blocks have none.
        subspace: ``"blocks"`` (whole tensors, the last first), ``"rows"`` (coordinates), ``"svd"``,
            ``"randomized_svd"`` or ``"stiefel"``; all but blocks also take a ``rank`` in the group instead of
            ``density``.
        moments, basis_storage, min_quantized, rounding: as for `GaLore`.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``target_modules``.

    Raises:
        ValueError: an unknown subspace, or a rank for blocks.

    Example:
        >>> FRUGAL(nn.Linear(64, 32), density=0.5).param_groups[0]["density"]
        0.5

    Source: arXiv 2411.07837.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float | None = None,
        sign_scale: float = 1.0,
        update_proj_gap: int = 200,
        proj_type: str = "std",
        subspace: str = "blocks",
        moments: str = "float32",
        basis_storage: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        if subspace not in _SUBSPACES:
            raise ValueError(f"subspace={subspace!r}: choose one of {', '.join(_SUBSPACES)}")
        if isinstance(params, nn.Module):
            if grouping.get("rank") is None:
                grouping |= {"rank": None, "density": 0.25 if density is None else density}
        elif density is not None:
            raise TypeError("FRUGAL takes density only together with a model; with groups it is a key of the group")
        method = Method(
            "frugal",
            subspace=_SUBSPACES[subspace],
            refresh=EveryGap(stagger=False),
            transport=Reset(),
            inner=Adam(),
            lift=SignResidual(),
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "density": None,
            "update_proj_gap": update_proj_gap,
            "proj_type": proj_type,
            "sign_scale": sign_scale,
            "moments": moments,
            "basis_storage": basis_storage,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
