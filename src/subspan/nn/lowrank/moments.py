"""The moments that an optimizer keeps of a factor: read as floats, changed and written back, however they are held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspan.optim import LowRankOptimizer
from subspan.optim.dense import state_dtype
from subspan.state import StateSpec

__all__ = ["carry_moments", "read_moments", "reset_moments", "write_moments"]

#: State keys that transform like the gradient, and like its square.
FIRST, SECOND = ("exp_avg", "momentum_buffer"), ("exp_avg_sq",)


def read_moments(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of a parameter, shaped like it; none where the optimizer has not stepped it.

    Raises:
        ValueError: the optimizer keeps something else of it, such as moments of a projected gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> sorted(read_moments(optimizer, "weight", weight))
        ['exp_avg', 'exp_avg_sq']
    """
    specs = _specs(optimizer, name, parameter)
    return {key: spec.decode(key, optimizer.state[parameter]) for key, spec in specs.items()}


@torch.no_grad()
def write_moments(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, moments: dict[str, Tensor]) -> None:
    """Write back what `read_moments` gave, into the tensors that are there."""
    state = optimizer.state.get(parameter, {})
    for key, spec in _specs(optimizer, name, parameter).items():
        for held, tensor in spec.encode(key, moments[key]).items():
            state[held].copy_(tensor)


@torch.no_grad()
def carry_moments(
    optimizer: torch.optim.Optimizer,
    name: str,
    parameter: Tensor,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> None:
    """Carry moments to other coordinates, in which a gradient G is left·G·right.

    M <- left·M·right, and V <- max(left²·V·right², M²) with the squares of the entries. The products are the second
    moment where entries have no correlation, M² the least that it can be where they have.

    Args:
        optimizer, name, parameter: whose moments.
        left, right: square matrices; None: nothing changes on that side.
    """
    moments = read_moments(optimizer, name, parameter)
    for key, moment in moments.items():
        exponent = 2 if key in SECOND else 1
        if left is not None:
            moments[key] = moment = left.pow(exponent).to(moment.dtype) @ moment
        if right is not None:
            moments[key] = moment @ right.pow(exponent).to(moment.dtype)
    if "exp_avg_sq" in moments:
        moments["exp_avg_sq"] = torch.maximum(moments["exp_avg_sq"], moments["exp_avg"].square())
    write_moments(optimizer, name, parameter, moments)


def reset_moments(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> None:
    """Begin anew: moments are zero and no step was done, so that the bias correction fits."""
    moments = read_moments(optimizer, name, parameter)
    write_moments(optimizer, name, parameter, {key: torch.zeros_like(moment) for key, moment in moments.items()})
    step: Any = optimizer.state.get(parameter, {}).get("step")
    if isinstance(step, Tensor):
        step.zero_()
    elif step is not None:
        optimizer.state[parameter]["step"] = 0


def _specs(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> dict[str, StateSpec]:
    state = optimizer.state.get(parameter, {})
    shape, dtype = tuple(parameter.shape), state_dtype(parameter)
    specs = {key: StateSpec(shape, dtype) for key in (*FIRST, *SECOND) if isinstance(state.get(key), Tensor)}
    if isinstance(optimizer, LowRankOptimizer) and specs:
        group = next(group for group in optimizer.param_groups if any(parameter is p for p in group["params"]))
        declared = optimizer.method.dense_moments(shape, dtype, group)
        specs = {key: declared.get(key, spec) for key, spec in specs.items()}
    known = {"step", *(held for key, spec in specs.items() for held in spec.stored(key))}
    if foreign := [key for key, value in state.items() if key not in known and value is not None]:
        raise ValueError(
            f"{name}: {type(optimizer).__name__} keeps {', '.join(foreign)} of it, which cannot be carried to other "
            "factors; train factors with AdamW, or rebalance and reset nothing"
        )
    return specs
