"""GaLore with moments of 8 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subspan.optim.methods.galore import GaLore
from subspan.optim.optimizer import Params


class GaLore8bit(GaLore):
    """8-bit GaLore: GaLore whose moments are held in blocks of 256 codes of 8 bits.

    W <- (1 − lr·wd)·W − lr·scale·Q·Adam(QᵀG); M and V are decoded before each step and encoded after it.

    Args:
        params: a model (with ``rank=...``), groups from `param_groups`, or group dicts.
        lr: learning rate.
        update_proj_gap, moments: see `GaLore`.
        **settings: all other settings of `GaLore`, and with a model those of `param_groups`.

    Example:
        >>> import torch
        >>> optimizer = GaLore8bit(torch.nn.Linear(512, 512), rank=64)
        >>> optimizer.planned_state_bytes()["exp_avg"], optimizer.planned_state_bytes()["exp_avg_scale"]
        (34816, 512)

    Source: arXiv 2403.03507, with the states of arXiv 2110.02861.
    """

    _name = "galore_8bit"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        update_proj_gap: int = 200,
        moments: str = "8bit",
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, update_proj_gap=update_proj_gap, moments=moments, **settings)
