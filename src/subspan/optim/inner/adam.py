"""Adam inside the subspace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from subspan.optim.method import Group, Inner, State
from subspan.state import StateSpec


@dataclass(frozen=True)
class Adam(Inner):
    """Adam (arXiv 1412.6980): U = M/(1−β1ᵗ) / (√(V/(1−β2ᵗ)) + ε).

    Args:
        eps_placement: ``"after"``: ε is added after bias correction, as above. ``"before"``: before it,
            U = √(1−β2ᵗ)/(1−β1ᵗ) · M/(√V + ε), as galore-torch, Fira's and APOLLO's code do; ε is then in effect
            divided by √(1−β2ᵗ).
    """

    eps_placement: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if self.eps_placement not in ("after", "before"):
            raise ValueError(f"eps_placement={self.eps_placement!r}: choose 'after' or 'before'")

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(shape, dtype, moment=1), "exp_avg_sq": StateSpec(shape, dtype, moment=2)}

    fuses: ClassVar[bool] = True

    def direction(self, R: Tensor, state: State, age: int, group: Group) -> Tensor:
        # Applied to zero with learning rate −1, the fused kernel leaves the direction itself: one pass over R, M and V.
        # The kernel reads memory in order, whatever the strides are.
        R = R.contiguous()
        U = torch.zeros_like(R)
        self._fused([U], [R], [state], age, group, lr=-1.0)
        return U

    def correction(self, age: int, group: Group) -> float:
        beta1, beta2 = group["betas"]
        return math.sqrt(1.0 - beta2**age) / (1.0 - beta1**age)

    def step_fused(
        self,
        Ws: list[Tensor],
        Gs: list[Tensor],
        states: list[State],
        age: int,
        group: Group,
        *,
        beta: float,
        alpha: float,
    ) -> None:
        # The decoupled decay of the kernel is the factor (1 − lr·weight_decay): one pass over W for both.
        decay = (1.0 - beta) / -alpha if beta != 1.0 else 0.0
        self._fused(Ws, Gs, states, age, group, lr=-alpha, weight_decay=decay)

    def _fused(
        self,
        Ws: list[Tensor],
        Gs: list[Tensor],
        states: list[State],
        age: int,
        group: Group,
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        beta1, beta2 = group["betas"]
        eps = group["eps"]
        if self.eps_placement == "before":
            eps /= math.sqrt(1.0 - beta2**age)
        step = torch.full((), float(age), dtype=torch.float32, device=Ws[0].device)
        torch._fused_adamw_(
            Ws,
            Gs,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(Ws),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
