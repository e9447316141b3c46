"""Group small equal matrices so that each operation runs once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan.optim.method import Geometry, State
from subspan.optim.projection import Projection
from subspan.optim.shards import WHOLE, Shards
from subspan.state import Int8Weight
from subspan.state.host import on_host

# Above this many elements a matrix is worked on alone: stacking copies its gradient, which on a CPU soon costs more
# than the calls that it saves (measured: 128×128 gains, 256×256 loses). A device waits for its launches instead.
_STACKABLE_CPU = 1 << 14
_STACKABLE_DEVICE = 1 << 16
# Elements of one stack, which bounds its copies.
_STACK = 1 << 22
# Elements, of all processes, of projected gradients that wait together for what all of them say.
_PROJECTED = 1 << 26


@dataclass(frozen=True)
class Work:
    """One parameter that has a gradient: its geometry (None when it is dense), and whether a refresh is due.

    The gradient is None where it was folded away.
    """

    name: str
    parameter: Tensor
    gradient: Tensor | None
    group: dict[str, Any]
    geometry: Geometry | None
    due: bool


@dataclass(frozen=True)
class Task:
    """One projected parameter in this step; ``projected`` is R, and ``projection`` P, where they are known already.

    Of one that is divided over processes all tensors are the pieces of this process.
    """

    name: str
    parameter: Tensor
    gradient: Tensor | None
    group: dict[str, Any]
    geometry: Geometry
    right: bool
    age: int
    state: State
    projected: Tensor | None = None
    shards: Shards = WHOLE
    projection: Projection | None = None


def buckets(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that may be stacked, together; all others alone. Order within the result does not matter to the numbers."""
    stacks: dict[tuple[Any, ...], list[Task]] = {}
    result: list[list[Task]] = []
    for task in tasks:
        geometry, device = task.geometry, task.parameter.device
        elements = geometry.m * geometry.n
        limit = _STACKABLE_CPU if on_host(device) else _STACKABLE_DEVICE
        alone = geometry.batch or isinstance(task.parameter, Int8Weight) or task.shards.division is not None
        if alone or elements > limit or geometry.rank in (0, geometry.m):
            result.append([task])
            continue
        key = (id(task.group), geometry, task.right, task.age, task.parameter.dtype, device, task.projected is None)
        stack = stacks.setdefault(key, [])
        if not stack:
            result.append(stack)
        stack.append(task)
        if len(stack) * elements >= _STACK:
            del stacks[key]
    return result


def portions(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that are stepped together: whole ones, and those that one mesh divides, until their R are many.

    All processes come to the same portions, since they follow from whole shapes.
    """
    growing: dict[Any, list[Task]] = {}
    result: list[list[Task]] = []
    for task in tasks:
        divided = task.shards.division is not None
        mesh = task.shards.mesh if divided else None
        portion = growing.setdefault(mesh, [])
        if not portion:
            result.append(portion)
        portion.append(task)
        if divided and sum(other.geometry.rank * other.geometry.n for other in portion) >= _PROJECTED:
            del growing[mesh]
    return result


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor as it is, several stacked."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def scatter(stacked: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write back what `gather` copied."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(stacked.unbind(0)))
