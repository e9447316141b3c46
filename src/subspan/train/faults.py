"""Losses and gradients that are not finite, and losses that jump: left out or counted, alike in all processes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from subspan.train.trainer import PretrainTrainer

__all__ = ["FaultsCallback"]

#: Steps whose losses say what is usual: few, since a loss that falls is spread widely over many.
_RECENT = 20


class FaultsCallback(TrainerCallback):
    """Leaves out steps whose loss is not finite, ends a run that has too many in a row, and names spikes.

    A step is left out in all processes when the loss of one is not finite, and changes neither weights nor state. A
    finite loss whose gradients are not finite leaves out single tensors, which the optimizer does and counts; such a
    step counts here too.

    Args:
        trainer: of the run; spikes go to its log.

    Attributes:
        bad_steps: steps with a loss or a gradient that is not finite.
        spikes: steps whose loss was far above that of the steps before.
    """

    def __init__(self, trainer: PretrainTrainer) -> None:
        self.trainer = trainer
        self.bad_steps = self.spikes = 0
        self._in_a_row = self._skipped = 0
        self._loss = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def snapshot(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"bad_steps": self.bad_steps, "spikes": self.spikes, "recent": list(self._recent)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.bad_steps, self.spikes = state["bad_steps"], state["spikes"]
        self._recent.extend(state["recent"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the gradients of a step whose loss is not finite."""
        trainer = self.trainer
        self._loss = trainer.processes.sums(trainer.take_step_loss())[0] / trainer.processes.size
        if not math.isfinite(self._loss):
            trainer.low_rank_optimizer.zero_grad()
        self._skipped = trainer.low_rank_optimizer.skipped_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count, and stop where it does not get better.

        Raises:
            FloatingPointError: as many steps in a row as the settings allow.
        """
        trainer = self.trainer
        finite = math.isfinite(self._loss)
        if finite and trainer.low_rank_optimizer.skipped_steps == self._skipped:
            self._in_a_row = 0
        else:
            self.bad_steps += 1
            self._in_a_row += 1
            # Weights that give no finite loss must not push the last good ones out of the folder.
            control.should_save &= state.global_step >= state.max_steps
        if self._in_a_row >= (most := trainer.config.max_bad_steps):
            what = "the loss" if not finite else "a gradient"
            raise FloatingPointError(
                f"{what} was not finite in {most} steps in a row, up to step {state.global_step}. Such steps change "
                "nothing, and the checkpoints from before are kept. Try a lower --lr, a longer --warmup, a smaller "
                "--max_grad_norm or --dtype float32; --max_bad_steps says how many are let pass."
            )
        if finite:
            self._look_for_spike()

    def _look_for_spike(self) -> None:
        loss = self._loss
        if (deviations := self.trainer.config.spike) and len(self._recent) == _RECENT:
            mean = statistics.fmean(self._recent)
            # At least a hundredth of the mean, so that a loss that hardly moves has no spikes of rounding.
            most = mean + deviations * max(statistics.pstdev(self._recent, mean), 0.01 * abs(mean))
            if loss > most:
                self.spikes += 1
                self.trainer.log({"spike": loss, "usual_loss": mean})
                loss = most  # one spike must not hide the next
        self._recent.append(loss)
