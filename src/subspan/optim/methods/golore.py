"""GoLore."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from subspan.optim.inner import Adam
from subspan.optim.lift import ProjectBack
from subspan.optim.method import Inner, Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import EveryGap, is_late
from subspan.optim.subspace import Stiefel, Switch, gradient_subspace, tolerance_keys
from subspan.optim.transport import RotateFirst


class GoLore(LowRankOptimizer):
    """GoLore: GaLore whose subspaces are drawn uniformly at random, which converges where the SVD follows noise.

    W <- (1 − lr·wd)·W − lr·scale·Q·Adam(QᵀG) with Q uniform on the Stiefel manifold; at a refresh M <- (Q_newᵀQ_old)M.
    GoLore@x% uses gradient subspaces first and random ones for the last x% of the run: set ``golore_after``.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        golore_after: step from which refreshes draw random subspaces; 0: always.
        update_proj_gap, scale, proj_type, svd, stagger, refresh, inner: as for `GaLore`.
        rank_policy, rtol: as for `GaLore`, while subspaces are those of the gradient; random ones take all of ``rank``.
        moments, basis_storage, min_quantized, rounding: as for `GaLore`.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``rank`` and ``target_modules``.

    Raises:
        ValueError: a rank policy without subspaces of the gradient.

    Example:
        >>> import torch
        >>> GoLore(torch.nn.Linear(64, 32), rank=4, golore_after=800).param_groups[0]["golore_after"]
        800

    Source: arXiv 2410.11289.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        golore_after: int = 0,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: Literal["randomized", "exact"] = "randomized",
        rank_policy: Literal["fixed", "tolerance"] = "fixed",
        rtol: float | None = None,
        stagger: bool = True,
        refresh: Literal["now", "late"] = "now",
        inner: Inner | None = None,
        moments: str = "float32",
        basis_storage: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        if rank_policy == "tolerance" and golore_after == 0:
            raise ValueError(
                "rank_policy='tolerance' needs golore_after > 0: from that step on GoLore draws random subspaces, "
                "which have no tolerance to keep"
            )
        method = Method(
            "golore",
            subspace=Switch(gradient_subspace(svd, rank_policy), Stiefel(), key="golore_after"),
            refresh=EveryGap(stagger, late=is_late(refresh)),
            transport=RotateFirst(),
            inner=inner or Adam(),
            lift=ProjectBack(),
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
            "golore_after": golore_after,
            "moments": moments,
            "basis_storage": basis_storage,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
