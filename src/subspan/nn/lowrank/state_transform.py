"""What a restart does to the optimizer state of the factors: their moments belong to the subspace before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspan.optim import LowRankOptimizer
from subspan.optim.method import State
from subspan.optim.shards import is_sharded
from subspan.optim.subspace.switch import Switch

__all__ = [
    "Keep",
    "MagnitudePrune",
    "Pruned",
    "RandomPrune",
    "ResetState",
    "StateTransform",
    "edit_state",
    "transform_state",
]

#: State that is no moment: the clock of a parameter, and what belongs to a projection of its gradient.
_CLOCKS = ("step", "next_refresh", "refreshes", "turned", "rank", "gap", "overlaps", "basis", "residual_norm")


class Pruned(NamedTuple):
    """How many numbers of an optimizer's moments were set to zero, and how many there are."""

    zeroed: int
    total: int


class StateTransform(ABC):
    """Chooses which entries of a factor keep their moments.

    One choice holds for all moments of an entry. Were first and second moments pruned apart, an entry with v = 0 and
    m ≠ 0 would take a step of m/eps. With any entry gone ``step`` begins anew: with the bias correction of an old state
    a fresh entry would take steps of up to six times its size; those that stay are smaller for a while.
    """

    @abstractmethod
    def kept(self, moment: Tensor, generator: torch.Generator) -> Tensor | None:
        """Which entries stay, bool in the shape of the first ``moment``; None for all of them."""


@dataclass(frozen=True)
class Keep(StateTransform):
    """Everything stays as it is."""

    def kept(self, moment: Tensor, generator: torch.Generator) -> Tensor | None:
        return None


@dataclass(frozen=True)
class ResetState(StateTransform):
    """Nothing stays."""

    def kept(self, moment: Tensor, generator: torch.Generator) -> Tensor | None:
        return torch.zeros_like(moment, dtype=torch.bool)


@dataclass(frozen=True)
class _Prune(StateTransform):
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share is {self.share!r}; the share of entries that is pruned must be greater than 0 and at most 1"
            )


@dataclass(frozen=True)
class RandomPrune(_Prune):
    """Each entry is dropped with a probability.

    Args:
        share: the probability.
    """

    def kept(self, moment: Tensor, generator: torch.Generator) -> Tensor | None:
        return (torch.rand(moment.shape, generator=generator) >= self.share).to(moment.device)


@dataclass(frozen=True)
class MagnitudePrune(_Prune):
    """The entries with the smallest first moments are dropped.

    Args:
        share: of the entries of each factor.
    """

    def kept(self, moment: Tensor, generator: torch.Generator) -> Tensor | None:
        dropped = round(self.share * moment.numel())
        if dropped == 0:
            return None
        size = moment.abs()
        # Not torch.quantile, which refuses more than 16 million entries.
        return size > size.flatten().kthvalue(dropped).values


def transform_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, transform: StateTransform, generator: torch.Generator
) -> Pruned:
    """Apply a transform to the state of one parameter, in place, also where moments are held in 8 bits.

    Args:
        optimizer: one of subspan's, or one whose state consists of ``step`` and tensors in the shape of the parameter.
        parameter: whose state; nothing happens where there is none yet.
        transform: which entries stay.
        generator: of what is drawn.

    Returns:
        How many numbers became zero, of how many.

    Raises:
        RuntimeError: a parameter that `fully_shard` has divided.
        ValueError: an optimizer with other state, or one that counts the steps of a projected factor.

    Example:
        >>> W = torch.nn.Parameter(torch.ones(4, 4))
        >>> optimizer = torch.optim.AdamW([W])
        >>> W.sum().backward()
        >>> optimizer.step()
        >>> transform_state(optimizer, W, ResetState(), torch.Generator())
        Pruned(zeroed=32, total=32)
        >>> float(optimizer.state[W]["step"])
        0.0
    """
    pruned = Pruned(0, 0)

    def edit(state: State) -> None:
        nonlocal pruned
        pruned = _transform(state, transform, generator)

    edit_state(optimizer, parameter, edit)
    return pruned


def edit_state(optimizer: torch.optim.Optimizer, parameter: Tensor, edit: Callable[[State], None]) -> None:
    """Change the state of one parameter, also where moments are held in 8 bits; nothing happens where there is none.

    Args:
        optimizer, parameter: see `transform_state`.
        edit: changes the tensors of the state that it is given, in place.

    Raises:
        RuntimeError: a parameter that `fully_shard` has divided.
        ValueError: an optimizer with other state.
    """
    if is_sharded(parameter):
        raise RuntimeError(
            "a restart transforms whole moments, and fully_shard has divided this parameter; train it with DDP"
        )
    if isinstance(optimizer, LowRankOptimizer):
        if isinstance(optimizer.method.subspace, Switch) and "basis" in optimizer.state.get(parameter, {}):
            raise ValueError(
                f"{optimizer.method.name} changes its subspaces after a number of steps, which a restart counts anew; "
                "project factors that are restarted with another method"
            )
        optimizer.edit_state(parameter, edit)
    elif optimizer.state.get(parameter):
        _check(optimizer, parameter)
        edit(optimizer.state[parameter])


def _transform(state: State, transform: StateTransform, generator: torch.Generator) -> Pruned:
    moments = [tensor for key, tensor in state.items() if key not in _CLOCKS and isinstance(tensor, Tensor)]
    total = sum(moment.numel() for moment in moments)
    kept = transform.kept(moments[0], generator) if moments else None
    if kept is None:
        return Pruned(0, total)
    for moment in moments:
        moment.masked_fill_(~kept, 0)
    if "next_refresh" in state:  # counted from step 0: as far off as it was
        state["next_refresh"] -= state["step"].to(state["next_refresh"].dtype)
    if "step" in state:
        state["step"].zero_()
    return Pruned(int((~kept).sum()) * len(moments), total)


def _check(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    for key, value in optimizer.state[parameter].items():
        moment = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
        if not moment and not (key == "step" and isinstance(value, Tensor)):
            raise ValueError(
                f"a restart does not know the state {key!r} of {type(optimizer).__name__}; use an optimizer of "
                "subspan, or one such as torch.optim.AdamW whose moments have the shape of the parameter"
            )
