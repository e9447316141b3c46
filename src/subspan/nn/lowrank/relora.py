"""ReLoRA: LoRA layers that are restarted, from dense weights on wish."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from subspan.nn.lowrank.heads import HeadsLinear
from subspan.nn.lowrank.layer import add_product_
from subspan.nn.lowrank.limits import BELOW_ONE, BETWEEN, POSITIVE, Limit, at_least, or_none
from subspan.nn.lowrank.restarts import Every, Restarts, Rewarm, check_rounding
from subspan.nn.lowrank.select import check_own, check_rank
from subspan.nn.lowrank.state_transform import MagnitudePrune, RandomPrune, ResetState, StateTransform
from subspan.nn.lowrank.weights import WeightRecipe

__all__ = ["LORA_LIMITS", "ReLoRA", "RestartedLinear"]

#: What the settings of LoRA layers and their restarts may be.
LORA_LIMITS: Mapping[str, Limit] = {
    "rank": at_least(1),
    "alpha": POSITIVE,
    "restart_every": or_none(at_least(1), "for cycles of a length that follows from that of the run"),
    "rewarm": or_none(at_least(0), "for a part of a cycle"),
    "dropout": BELOW_ONE,
}


class RestartedLinear(HeadsLinear):
    """y = x·(W + s·BA)ᵀ + b with a frozen W, into which s·BA is merged again and again.

    Args:
        layer: the linear layer.
        rank: r.
        scale: s.
        dropout: of the inputs of A.

    Attributes:
        adapts: False while W itself is trained: the factors are left out then, which are B = 0.
    """

    def __init__(self, layer: nn.Module, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, heads=1, rank=rank, scale=scale)
        self.dropout, self.adapts = dropout, True

    @torch.no_grad()
    def reset_(self, generator: torch.Generator) -> None:
        """A uniform in ±1/√in (Kaiming's with a = √5), B = 0."""
        self.lora_B.zero_()
        if not self.lora_A.is_meta:
            drawn = torch.rand(self.lora_A.shape, generator=generator)
            self.lora_A.copy_((2 * drawn - 1) / self.in_features**0.5)

    def merge_(self, key: Tensor | None = None) -> None:
        """W <- W + s·BA, rounded once."""
        add_product_(self.W, self.lora_B[0].mT, self.lora_A[0], alpha=self.scale, key=key)

    def adapt_(self, adapts: bool) -> None:
        """Train the factors, or the weight in their place."""
        self.adapts = adapts
        self.weight.requires_grad_(not adapts)
        for factor in self.factors().values():
            factor.requires_grad_(adapts)

    def forward(self, input: Tensor) -> Tensor:
        """The product x·(W + s·BA)ᵀ + b; x·Wᵀ + b while the weight is trained."""
        if not self.adapts:
            return nn.functional.linear(input, self.W, self.bias)
        if not (self.dropout and self.training):
            return super().forward(input)
        low = nn.functional.linear(nn.functional.dropout(input, self.dropout), self.lora_A[0])
        return nn.functional.linear(input, self.W, self.bias) + self.scale * low @ self.lora_B[0]


class _Switched(Restarts):
    """Restarts of which the first one takes over from dense training, after ``adapters_from`` steps."""

    adapters_from = 0

    def begin_step(self, step: int) -> None:
        """Train the dense weights or the factors."""
        if self.adapters_from:
            for layer in self.layers.values():
                if isinstance(layer, RestartedLinear):
                    layer.adapt_(step >= self.adapters_from)

    def end_step(self, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        """Restart what is due; forget gradients and state of weights that are frozen from now on."""
        lines = super().end_step(step, optimizer)
        if step + 1 != self.adapters_from:
            return lines
        for layer in self.layers.values():
            assert isinstance(layer, RestartedLinear)
            layer.adapt_(True)
            layer.weight.grad = None
            optimizer.state.pop(layer.weight, None)
        return [f"restart 1: factors in place of {len(self.layers)} weights, whose optimizer state is freed"]


@dataclass(frozen=True)
class ReLoRA(WeightRecipe):
    """ReLoRA: LoRA that is merged into the weights and begun anew several times, so that the sum has a high rank.

    h(x) = Wx + s·BAx with s = alpha/rank. After each cycle W <- W + s·BA, A is drawn anew, B = 0, most of the factors'
    optimizer state is dropped, and the learning rate climbs from 0 again.

    Args:
        rank: r.
        alpha: s = alpha/r.
        restart_every: steps of a cycle; None: a quarter of the run, or all steps with adapters where there is ``lazy``.
        full_rank_steps: train the dense weights in so many steps before the factors take over.
        lazy: give this share of the run, its last steps, factors, and train dense weights before; excludes
            ``full_rank_steps``.
        state: what is dropped of the optimizer state: ``magnitude`` (the entries with the smallest first moments),
            ``random``, or ``reset`` (all).
        prune: share that is dropped, where it is not all.
        rewarm: steps in which the learning rate climbs; None: a fiftieth of a cycle, but 10 at least, or half a cycle.
        dropout: of the inputs of A. The paper's 0.1 is for many epochs; in pre-training no sequence comes twice.
        rounding: of bfloat16 weights when they take up s·BA: ``nearest`` or ``stochastic``.

    Raises:
        ValueError: a value that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        >>> weights = ReLoRA(rank=4, restart_every=10).apply(model)
        >>> [round(weights.rate(step, lambda step: 1.0), 1) for step in (9, 10, 12, 15)]
        [1.0, 0.0, 0.4, 1.0]

    Source: arXiv 2307.05695.
    """

    name: ClassVar[str] = "relora"
    title: ClassVar[str] = "ReLoRA: High-Rank Training Through Low-Rank Updates"
    arxiv: ClassVar[str] = "2307.05695"
    summary: ClassVar[str] = "LoRA merged into the weights and restarted"
    limits: ClassVar[Mapping[str, Limit]] = {
        **LORA_LIMITS,
        "full_rank_steps": at_least(0),
        "lazy": or_none(BETWEEN, "for factors from the start"),
    }

    rank: int = 128
    alpha: float = 32.0
    restart_every: int | None = None
    full_rank_steps: int = 0
    lazy: float | None = None
    state: Literal["magnitude", "random", "reset"] = "magnitude"
    prune: float = 0.9
    rewarm: int | None = None
    dropout: float = 0.0
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lazy is not None and self.full_rank_steps:
            raise ValueError("lazy and full_rank_steps both say when factors take over; give one of them")
        if self.state == "reset" and self.prune != ReLoRA.prune:
            raise ValueError(f"prune is {self.prune!r}, but state='reset' drops all: leave prune out, or state")
        self._transform()
        check_rounding(self.rounding)

    def _transform(self) -> StateTransform:
        if self.state == "reset":
            return ResetState()
        prune = {"magnitude": MagnitudePrune, "random": RandomPrune}.get(self.state)
        if prune is None:
            raise ValueError(f"state={self.state!r}: choose 'magnitude', 'random' or 'reset'")
        return prune(self.prune)

    def parts(self, steps: int | None = None) -> dict[str, Any]:
        """Arguments of `Restarts`, also for layers of other kinds, as in `restart_peft`.

        Args:
            steps: of the whole run.

        Raises:
            ValueError: ``steps`` is needed and not there, or a cycle is shorter than its re-warming.
        """
        start = self._adapters_from(steps)
        if steps is not None and start >= steps:
            raise ValueError(
                f"full_rank_steps is {start}, but the run has {steps} steps: make it fewer, or nothing is left for the "
                "factors"
            )
        period = self.restart_every
        if period is None:
            whole = _needed(steps, "restart_every")
            period = max(1, math.ceil(whole / 4) if self.lazy is None else whole - start)
        # The switch to the factors is a restart too.
        when = Every(period, start - period if start else 0)
        rewarm = min(max(10, period // 50), period // 2) if self.rewarm is None else self.rewarm
        if rewarm >= period > 1:
            raise ValueError(
                f"rewarm is {rewarm}, a cycle has {period} steps: make cycles longer than their re-warming"
            )
        settings: dict[str, Any] = {"rounding": self.rounding, "steps": steps}
        return {"when": when, "state": self._transform(), "rewarm": Rewarm(rewarm), **settings}

    def check_run(self, *, processes: int, steps: int, eval_every: int) -> None:
        """The factors take over before the run ends, and cycles are longer than their re-warming."""
        if self.full_rank_steps >= steps:
            raise ValueError(
                f"full_rank_steps is {self.full_rank_steps}, but the run has {steps} steps, so that no factor would "
                "ever be trained: give fewer"
            )
        self.parts(steps)

    def _adapters_from(self, steps: int | None) -> int:
        if self.lazy is None:
            return self.full_rank_steps
        whole = _needed(steps, "lazy")
        return whole - max(1, round(self.lazy * whole))

    def build(self, model: nn.Module, chosen: dict[str, nn.Module], *, steps: int | None, seed: int) -> Restarts:
        """Replace them by `RestartedLinear`.

        With dense training at the start weights and factors are both trainable until the first `begin_step`, so that an
        optimizer which is built from the model holds both.
        """
        parts, start = self.parts(steps), self._adapters_from(steps)
        if start and _processes() > 1:
            raise ValueError(
                "full_rank_steps and lazy change which parameters have gradients, and DistributedDataParallel fixes "
                "them when it is built; train the dense part in a run of its own and start from its checkpoint"
            )
        check_own(model, chosen)
        check_rank(self.rank, chosen)
        weights = _Switched(model, {}, seed, **parts)
        weights.adapters_from = start
        for name, module in chosen.items():
            layer = RestartedLinear(module, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout)
            layer.weight.requires_grad_(start > 0)
            weights.install(name, layer)
        return weights


def _processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _needed(steps: int | None, setting: str) -> int:
    if steps is None:
        raise ValueError(f"{setting} depends on the length of the run: give steps to apply(), or set restart_every")
    return steps
