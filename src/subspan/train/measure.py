"""The memory of a run's first steps, traced while it trains, beside the plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.memory.plan import CATEGORIES, PeakPlan
from subspan.memory.training import TrainingTrace
from subspan.train.config import PretrainConfig
from subspan.train.plan import plan_recipe
from subspan.train.plan_settings import PlanSettings
from subspan.train.trainer import PretrainTrainer

__all__ = ["MeasureCallback", "plan_run", "show_peaks"]

_STEPS = 2


class MeasureCallback(TrainerCallback):
    """Traces the first two steps of a run; the numbers of the run do not change.

    Attributes:
        measured: the bytes, once the steps are done.
    """

    def __init__(self, trainer: PretrainTrainer, vocab_size: int) -> None:
        self.trainer, self.vocab_size = trainer, vocab_size
        self.measured: PeakPlan | None = None
        self._training: TrainingTrace | None = None
        self._hook: Any = None
        self._steps, self._active = 0, False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.measured is not None:
            return
        network = self.trainer.network
        if self._training is None:
            self._training = TrainingTrace(network, self.trainer.low_rank_optimizer, self.vocab_size)
            self._hook = network.register_forward_hook(self._forward_done)
        self._training.trace.__enter__()
        self._active = True
        self._begin("forward")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._begin("forward")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._begin("step")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self._active and self._training is not None:
            self._training.end()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._active or self._training is None:
            return
        self._training.trace.__exit__(None, None, None)
        self._active = False
        self._steps += 1
        if self._steps == _STEPS or state.global_step >= state.max_steps:
            self._hook.remove()
            self.measured = PeakPlan.of(self._training.close())

    def _forward_done(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._begin("backward")

    def _begin(self, phase: str) -> None:
        if self._active and self._training is not None:
            self._training.begin(phase if self._steps else f"first {phase}")


def plan_run(config: PretrainConfig, vocab_size: int) -> PeakPlan:
    """Plan a run from its resolved settings, for the device that it will take."""
    names = {field.name for field in dataclasses.fields(PlanSettings)} & set(vars(config)) - {
        "vocab_size",
        "output",
        "shard",
    }
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    device: Any = "accelerator" if torch.accelerator.is_available() else "cpu"
    return plan_recipe(PlanSettings(**shared, vocab_size=vocab_size, device=device)).bytes


def show_peaks(console: Console, planned: PeakPlan, measured: PeakPlan) -> None:
    """Print the most of every category and the peak, planned and measured."""
    table = Table(f"first {_STEPS} steps", "planned", "measured", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in CATEGORIES:
        values = planned.most[name], measured.most[name]
        table.add_row(name, *(f"{value:,}" for value in values), style=None if values[0] == values[1] else "yellow")
    table.add_row("peak", f"{planned.peak:,}", f"{measured.peak:,}", style="bold")
    console.print()
    console.print(table)
    difference = planned.peak / measured.peak - 1
    console.print(f"planned {planned.moment}, measured {measured.moment}, {difference:+.2%}", highlight=False)
