"""AdamW through the same executor."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from subspan.optim.inner import Adam
from subspan.optim.method import Method
from subspan.optim.optimizer import LowRankOptimizer, Params


class AdamW(LowRankOptimizer):
    """AdamW: Adam with decoupled weight decay, without any projection.

    W <- (1 − lr·wd)·W − lr·M̂/(√V̂ + ε).

    Args:
        params: a model, parameters, named parameters or group dicts without ``rank``.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        moments, min_quantized, rounding: as for `GaLore`; of a model's matrices all but embeddings and heads count.
        seed, nonfinite: see `LowRankOptimizer`.
        **grouping: with a model: settings of `param_groups`.

    Example:
        >>> AdamW(nn.Linear(8, 8), lr=1e-3).method.projects
        False

    Source: arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: str = "float32",
        min_quantized: int = 4096,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        nonfinite: Literal["skip", "raise"] = "skip",
        **grouping: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            grouping = {"rank": None, **grouping}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "min_quantized": min_quantized,
            "rounding": rounding,
        }
        super().__init__(params, Method("adamw", Adam()), defaults, seed=seed, nonfinite=nonfinite, grouping=grouping)
