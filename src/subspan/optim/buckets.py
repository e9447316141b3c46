"""Group small equal matrices so that each operation runs once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan.optim.method import Geometry, State

# Above this many elements a matrix is worked on alone: stacking would copy its gradient and gain nothing.
_STACKABLE = 1 << 16
# Elements of one stack, which bounds its copies.
_STACK = 1 << 22


@dataclass(frozen=True)
class Task:
    """One projected parameter in this step; ``projected`` is R where the refresh gave it."""

    name: str
    parameter: Tensor
    gradient: Tensor
    group: dict[str, Any]
    geometry: Geometry
    right: bool
    age: int
    state: State
    projected: Tensor | None = None


def buckets(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that may be stacked, together; all others alone. Order within the result does not matter to the numbers."""
    stacks: dict[tuple[Any, ...], list[Task]] = {}
    result: list[list[Task]] = []
    for task in tasks:
        geometry = task.geometry
        elements = geometry.m * geometry.n
        if geometry.batch or elements > _STACKABLE or geometry.rank in (0, geometry.m):
            result.append([task])
            continue
        key = (
            id(task.group),
            geometry,
            task.right,
            task.age,
            task.parameter.dtype,
            task.parameter.device,
        )
        stack = stacks.setdefault(key, [])
        if not stack:
            result.append(stack)
        stack.append(task)
        if len(stack) * elements >= _STACK:
            del stacks[key]
    return result


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, several stacked."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def scatter(stacked: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write back what `gather` copied."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(stacked.unbind(0)))
