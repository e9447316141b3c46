"""Moments of a factor in other coordinates: the factors of a product can be turned without changing the product."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.optim import LowRankOptimizer
from subspan.optim.method import State

__all__ = ["carry_moments"]

#: State keys that transform like the gradient, and like its square.
FIRST, SECOND = ("exp_avg", "momentum_buffer"), ("exp_avg_sq",)


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer,
    name: str,
    parameter: Tensor,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> None:
    """Carry the moments of a parameter to coordinates in which its gradient G is left·G·right.

    M <- left·M·right, and V <- max(left²·V·right², M²/c) with the squares of the entries. The products are the second
    moment where entries have no correlation. Where they have, V stays above M²/c, c = (1−β1)²/((1−β2)(1−β1²/β2)), as
    it does for any gradients. (Above M² itself early second moments would be far too large, and stay so.)

    Args:
        optimizer: AdamW, or SGD with momentum.
        name: of the parameter, for the message.
        parameter: whose state; nothing happens where there is none yet.
        left, right: square matrices; None: nothing changes on that side.

    Raises:
        ValueError: the optimizer keeps something else, such as moments of a projected gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> carry_moments(optimizer, "weight", weight, left=torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([[ 1.,  1.,  1.],
                [-1., -1., -1.]])
    """

    def edit(state: State) -> None:
        moments = {key: tensor for key, tensor in state.items() if key != "step" and tensor is not None}
        if foreign := [k for k, t in moments.items() if k not in (*FIRST, *SECOND) or t.shape != parameter.shape]:
            raise ValueError(
                f"{name}: {type(optimizer).__name__} keeps {', '.join(foreign)} of it, which cannot be carried to "
                "other factors; train factors with AdamW, or let nothing be carried (moments='reset')"
            )
        for key, moment in moments.items():
            exponent, carried = 2 if key in SECOND else 1, moment
            if left is not None:
                carried = left.pow(exponent).to(moment.dtype) @ carried
            if right is not None:
                carried = carried @ right.pow(exponent).to(moment.dtype)
            moment.copy_(carried)
        if "exp_avg_sq" in moments:
            beta1, beta2 = next(
                group for group in optimizer.param_groups if any(parameter is p for p in group["params"])
            )["betas"]
            least = (1 - beta2) * (1 - beta1**2 / beta2) / (1 - beta1) ** 2 if beta1**2 < beta2 else 0.0
            moments["exp_avg_sq"].copy_(torch.maximum(moments["exp_avg_sq"], least * moments["exp_avg"].square()))

    if isinstance(optimizer, LowRankOptimizer):
        optimizer.edit_state(parameter, edit)
    elif state := optimizer.state.get(parameter):
        edit(state)
