"""Stochastic gradient descent inside the subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.optim.method import Group, Inner, State
from subspan.state import StateSpec


@dataclass(frozen=True)
class SGD(Inner):
    """U = R, or with a momentum β the moving average M <- β·M + (1 − β)·R, U = M (GoLore's MSGD, arXiv 2410.11289).

    Args:
        momentum: β in [0, 1); 0 keeps no state.
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum}: must be in [0, 1)")

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        return {"momentum_buffer": StateSpec(shape, dtype, moment=1)} if self.momentum else {}

    def direction(self, R: Tensor, state: State, age: int, group: Group) -> Tensor:
        if not self.momentum:
            return R.clone()
        return state["momentum_buffer"].lerp_(R, 1.0 - self.momentum).clone()
