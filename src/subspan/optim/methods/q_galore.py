"""Q-GaLore."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from subspan.optim.inner import Adam
from subspan.optim.lift import ProjectBack
from subspan.optim.method import Method
from subspan.optim.optimizer import LowRankOptimizer, Params
from subspan.optim.refresh import LazyGap, is_late
from subspan.optim.subspace import gradient_subspace
from subspan.optim.transport import Keep


class QGaLore(LowRankOptimizer):
    """Q-GaLore: GaLore with weights and moments of 8 bits, bases of 4, and fewer refreshes where subspaces stay alike.

    W <- (1 − lr·wd)·W − lr·scale·Q·Adam(QᵀG). The period of a matrix is multiplied by ``gamma_proj`` when
    ``queue_size`` refreshes in a row found a subspace whose overlap with the one before was at least
    ``cos_threshold``. The paper's weights of 8 bits are those of `subspan.nn.quantize_weights`, called first; other
    weights are trained in their dtype.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        betas, eps, weight_decay: of Adam.
        cos_threshold: overlap ‖Q_oldᵀQ_new‖²_F/r from which two subspaces are alike; random ones have r/m.
        gamma_proj: factor on the period.
        queue_size: number of refreshes in a row.
        update_proj_gap: steps between refreshes at first.
        official_code: the period follows the official code, see `LazyGap`.
        scale, proj_type, svd, stagger, refresh, moments, basis_storage, min_quantized, rounding: as for `GaLore`.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups` such as ``rank`` and ``target_modules``.

    Example:
        >>> import torch
        >>> optimizer = QGaLore(torch.nn.Linear(512, 512), rank=64)
        >>> optimizer.planned_state_bytes()["basis"]  # 512 × 64 codes, two of them in a byte
        16384

    Source: arXiv 2407.08296.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        cos_threshold: float = 0.4,
        gamma_proj: float = 2.0,
        queue_size: int = 5,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        svd: Literal["randomized", "exact"] = "randomized",
        stagger: bool = True,
        refresh: Literal["now", "late"] = "now",
        official_code: bool = False,
        moments: str = "8bit",
        basis_storage: str = "int4",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        method = Method(
            "q_galore",
            subspace=gradient_subspace(svd),
            refresh=LazyGap(stagger, late=is_late(refresh), official_code=official_code),
            transport=Keep(),
            inner=Adam(),
            lift=ProjectBack(),
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
            "cos_threshold": cos_threshold,
            "gamma_proj": gamma_proj,
            "queue_size": queue_size,
            "moments": moments,
            "basis_storage": basis_storage,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, method, defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
