"""Callbacks of a run: metrics as JSON lines, progress on the terminal, and stopping in good order."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.train.bad_records import BadRecords
from subspan.train.config import write_text
from subspan.train.processes import ALONE, Processes

__all__ = ["MetricsCallback", "MetricsFile", "ProgressCallback", "StopCallback"]

#: What is kept of all that the Trainer logs.
_METRICS = (
    "loss",
    "eval_loss",
    "eval_perplexity",
    "spike",
    "usual_loss",
    "grad_norm",
    "grad_norm_exact",
    "learning_rate",
    "tokens",
    "skipped_steps",
    "bad_steps",
    "spikes",
    "reduced_bytes",
    "mean_rank",
    "tokens_per_second",
    "peak_memory_bytes",
)


def json_line(values: dict[str, Any]) -> str:
    """Return a line of JSON; JSON has no numbers that are not finite, so they become null.

    Example:
        >>> json_line({"loss": float("nan")})
        '{"loss": null}\\n'
    """
    unwritable = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(values | dict.fromkeys(unwritable)) + "\n"


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed line by line.

    Args:
        path: of the file.
        resume_step: lines after this step are dropped, since the steps will be run again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(map(json_line, kept)))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return the lines of a file, none when there is no file; one cut short by a kill or damaged is left out."""
        lines: list[dict[str, Any]] = []
        if not path.exists():
            return lines
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and "step" in values:
                lines.append(values)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(line))


class MetricsCallback(TrainerCallback):
    """Writes what is logged to the metrics file, and how many records of the data were left out so far."""

    def __init__(self, file: MetricsFile, bad: BadRecords) -> None:
        self.file = file
        self.bad = bad

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line for a training loss, an evaluation or a spike."""
        logs = logs or {}
        if {"loss", "eval_loss", "spike"} & logs.keys():
            counted = {"bad_records": self.bad.count} if self.bad.count else {}
            known = {key: logs[key] for key in _METRICS if key in logs}
            self.file.write({"step": state.global_step, **known, **counted})


class ProgressCallback(TrainerCallback):
    """A bar with loss, learning rate, tokens/s and peak memory; plain lines where there is no terminal.

    Use it as a context manager around the training, so that the terminal is left in order however it ends.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=None, figures="")

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where the run stands."""
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures."""
        logs = logs or {}
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            self.console.print(
                f"{step}  [bold]validation loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}[/]",
                highlight=False,
            )
        elif "spike" in logs:
            self.console.print(f"{step}  [yellow]loss {logs['spike']:.4f}, lately {logs['usual_loss']:.4f}[/]")
        elif "loss" in logs:
            figures = (
                f"loss {logs['loss']:.4f} lr {logs['learning_rate']:.1e} {logs['tokens_per_second']:,.0f} tokens/s "
                f"peak {logs['peak_memory_bytes'] / 2**30:.2f} GiB"
            )
            self.bar.update(self.task, figures=figures)
            if not self.console.is_terminal:
                self.console.print(f"{step}  {figures}", highlight=False)


class StopCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint after the current step; a second one stops at once.

    Use it as a context manager around the training; outside the main thread it does nothing. Of several processes all
    stop after the same step, whichever the signal came to.

    Args:
        processes: that stop together.

    Attributes:
        signal: number of the signal that came, or None.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopCallback:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for other, handler in self._previous.items():
            signal.signal(other, handler)
        # Not through the console: a handler may run in the middle of a print.
        if self.processes.first:
            os.write(2, b"\nStopping: this step is finished and saved. Once more stops at once.\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop when a signal came."""
        # One that comes while the others answer is for the next step.
        if agreed := self.processes.most(self.signal or 0):
            self.signal = agreed
            control.should_save = True
            control.should_training_stop = True
