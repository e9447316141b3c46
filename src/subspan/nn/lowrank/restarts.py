"""Restarts: merge -> choose a new subspace -> transform the optimizer state -> re-warm the learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from subspan.nn.lowrank.state_transform import Keep, Pruned, ResetState, StateTransform, transform_state
from subspan.nn.lowrank.weights import LowRankWeights, Rate

__all__ = ["Every", "GrowingGap", "Never", "Restartable", "Restarts", "Rewarm", "When", "check_rounding"]


class When(ABC):
    """At which steps there is a restart, counted in steps that are done."""

    @abstractmethod
    def last(self, done: int) -> int | None:
        """After how many steps the latest restart is that lies at ``done`` or before; None without one."""

    @abstractmethod
    def count(self, done: int) -> int:
        """How many restarts there are in the first ``done`` steps."""

    def due(self, done: int) -> bool:
        """Whether there is a restart after ``done`` steps."""
        return self.last(done) == done


@dataclass(frozen=True)
class Never(When):
    """No restart at all."""

    def last(self, done: int) -> int | None:
        return None

    def count(self, done: int) -> int:
        return 0


@dataclass(frozen=True)
class Every(When):
    """After start + period, start + 2·period, … steps.

    Args:
        period: steps of a cycle.
        start: steps before the first cycle; negative where that has begun before the run.

    Raises:
        ValueError: a period that is not positive, or a first restart before the first step.

    Example:
        >>> [done for done in range(12) if Every(4, start=1).due(done)]
        [5, 9]
    """

    period: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period is {self.period!r}; a cycle has at least 1 step")
        if self.start + self.period < 1:
            raise ValueError(f"start is {self.start!r}; the first restart has to come after at least 1 step")

    def last(self, done: int) -> int | None:
        cycles = self.count(done)
        return self.start + cycles * self.period if cycles else None

    def count(self, done: int) -> int:
        return max(0, (done - self.start) // self.period)


@dataclass(frozen=True)
class GrowingGap(When):
    """After ``first`` steps, and then with gaps of first + ⌊baseᵏ⌋ steps for k = 0, 1, …

    Args:
        first: T₀ in steps.
        base: ψ.

    Raises:
        ValueError: values that do not make gaps of at least one step.

    Example:
        >>> [done for done in range(600) if GrowingGap().due(done)]
        [100, 201, 302, 403, 504]

    Source: arXiv 2405.16528.
    """

    first: int = 100
    base: float = 1.2

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError(f"first is {self.first!r}; it must be at least 1 step")
        if not (self.base >= 1 and math.isfinite(self.base)):
            raise ValueError(f"base is {self.base!r}; gaps grow with a finite base of at least 1")

    def last(self, done: int) -> int | None:
        return self._walk(done)[0]

    def count(self, done: int) -> int:
        return self._walk(done)[1]

    def _walk(self, done: int) -> tuple[int | None, int]:
        last, after, count = None, self.first, 0
        while after <= done:
            last, after, count = after, after + self.first + math.floor(self.base**count), count + 1
        return last, count


@dataclass(frozen=True)
class Rewarm:
    """After a restart the learning rate climbs from 0 to what the schedule gives at the end of the ramp.

    Args:
        steps: of the ramp; 0 for none.

    Raises:
        ValueError: a negative number of steps.

    Example:
        >>> [Rewarm(4).rate(step, lambda step: 1.0, Every(10)) for step in range(9, 16)]
        [1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Source: arXiv 2307.05695 (jagged cosine).
    """

    steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"the re-warming has {self.steps!r} steps; it must have at least 0")

    def rate(self, step: int, schedule: Rate, when: When) -> float:
        """The learning rate of step ``step``, the first one being 0."""
        last = when.last(step)
        if last is None or step - last >= self.steps:
            return schedule(step)
        return schedule(last + self.steps) * (step - last) / self.steps


class Restartable(Protocol):
    """A layer with a frozen weight that its factors can be merged into."""

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by name in the layer."""

    def merge_(self, key: Tensor | None) -> None:
        """Add what the factors make to the frozen weight, rounded once; `reset_` follows.

        Args:
            key: int64 0-D, of stochastic rounding; None rounds to nearest.
        """

    def reset_(self, generator: torch.Generator) -> None:
        """Choose a new subspace: factors that add nothing, of which one at least has a gradient."""


def check_rounding(rounding: str) -> None:
    """Refuse an unknown rounding of the frozen weights.

    Raises:
        ValueError: naming those that are known.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: choose 'nearest' or 'stochastic'")


class Restarts(LowRankWeights):
    """Layers whose factors are merged and begun anew again and again, in the steps that ``when`` says.

    Args:
        model: the model.
        layers: its `Restartable` layers by name.
        seed: of all that is drawn.
        when: the restarts.
        state: what becomes of the factors' optimizer state.
        rewarm: what becomes of the learning rate.
        rounding: of the frozen weights, ``nearest`` or ``stochastic``.
        steps: of the whole run, where they are known: none follows the last one, after which nothing would be learnt.

    Raises:
        ValueError: an unknown rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Any],
        seed: int = 0,
        *,
        when: When,
        state: StateTransform | None = None,
        rewarm: Rewarm | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        steps: int | None = None,
    ) -> None:
        check_rounding(rounding)
        super().__init__(model, dict(layers), seed)
        self.when, self.rounding, self.steps = when, rounding, steps
        self.state, self.rewarm = state or ResetState(), rewarm or Rewarm()

    def rate(self, step: int, schedule: Rate) -> float:
        """The schedule's rate, re-warmed after each restart."""
        return self.rewarm.rate(step, schedule, self.when)

    def due(self, step: int) -> bool:
        """Whether there is a restart after step ``step``, the first one being 0."""
        return self.when.due(step + 1) and step + 1 != self.steps

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Restart all layers where it is due.

        Raises:
            ValueError: a factor that is not in the optimizer, or whose state cannot be transformed.
            RuntimeError: a factor that `fully_shard` has divided.
        """
        if not self.due(step):
            if step == (self.when.last(step) or 0):  # what the end of the cycle would refuse is refused at its start
                self.transform(step, optimizer, Keep())
            return []
        self.restart(step)
        zeroed, total = self.transform(step, optimizer, self.state)
        share = f"{100 * zeroed / total:.1f} % of the optimizer state pruned" if total else "no optimizer state yet"
        return [f"restart {self.when.count(step + 1)}: {len(self.layers)} layers merged, {share}"]

    def restart(self, step: int) -> None:
        """Merge all layers and choose new subspaces; the function of the model stays."""
        layers: Mapping[str, Any] = self.layers
        for name, layer in layers.items():
            key = None
            if self.rounding == "stochastic":
                key = torch.randint(2**63 - 1, (), generator=self.generator(f"{name}.weight", step))
            layer.merge_(key)
            layer.reset_(self.generator(name, step))

    def transform(self, step: int, optimizer: torch.optim.Optimizer, state: StateTransform) -> Pruned:
        """Transform the optimizer state of all factors."""
        self.check_held(optimizer)
        zeroed = total = 0
        for name, factor in self.factors().items():
            pruned = transform_state(optimizer, factor, state, self.generator(f"{name}.state", step))
            zeroed, total = zeroed + pruned.zeroed, total + pruned.total
        return Pruned(zeroed, total)
