"""Ranks that change during a run: in the metrics, as a mean, and as a picture."""

from __future__ import annotations

import bisect
import statistics
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from subspan.optim import LowRankOptimizer
from subspan.optim.names import natural_key
from subspan.train.callbacks import MetricsFile

__all__ = ["RanksCallback", "mean_rank", "plot_ranks", "varying_ranks"]

PICTURE_FILE = "ranks.png"
# Steps that a picture shows, at most.
_COLUMNS = 1000


def varying_ranks(optimizer: LowRankOptimizer) -> dict[str, int]:
    """Return the ranks in force by name where they are found with the subspaces, else nothing."""
    subspace = optimizer.method.subspace
    return optimizer.ranks() if subspace is not None and subspace.finds_rank else {}


class RanksCallback(TrainerCallback):
    """Writes the ranks that changed in a step to the metrics file, as ``{"step": …, "ranks": {name: rank}}``.

    Args:
        file: of the metrics; what it holds of the run so far is not written again.
        optimizer: whose ranks are watched.
    """

    def __init__(self, file: MetricsFile, optimizer: LowRankOptimizer) -> None:
        self.file = file
        self.optimizer = optimizer
        self.written = {name: rank for line in file.read(file.path) for name, rank in line.get("ranks", {}).items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what changed."""
        ranks = varying_ranks(self.optimizer)
        if changed := {name: rank for name, rank in ranks.items() if self.written.get(name) != rank}:
            self.file.write({"step": state.global_step, "ranks": changed})
            self.written |= changed


def mean_rank(lines: list[dict[str, Any]], steps: int) -> float | None:
    """Return the rank in the mean over all projected matrices and all steps, None where ranks stay as they are.

    Example:
        >>> lines = [{"step": 1, "ranks": {"a": 8, "b": 16}}, {"step": 3, "ranks": {"a": 24}}]
        >>> mean_rank(lines, steps=4)
        16.0
    """
    history = _history(lines)
    if not history:
        return None
    sums = []
    for changes in history.values():
        ends = [step for step, _ in changes[1:]] + [steps + 1]
        sums.append(sum((end - step) * rank for (step, rank), end in zip(changes, ends, strict=True)))
    return statistics.fmean(sums) / steps


def plot_ranks(lines: list[dict[str, Any]], steps: int, output: Path) -> Path | None:
    """Draw the rank of each matrix over the steps, one row a matrix; returns the picture, or None without matplotlib.

    Args:
        lines: of the metrics.
        steps: of the run.
        output: folder of the picture.
    """
    history = _history(lines)
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    if not history:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(history, key=natural_key)
    columns = range(1, steps + 1, -(-steps // _COLUMNS))
    rows = [[_rank_at(history[name], step) for step in columns] for name in names]
    height = min(20.0, 1.5 + 0.16 * len(names))
    figure, plot = pyplot.subplots(figsize=(9, height), layout="constrained")
    image = plot.imshow(rows, aspect="auto", interpolation="nearest", extent=(1, steps + 1, len(names), 0))
    labelled = range(0, len(names), -(-len(names) // 120))
    plot.set_yticks([i + 0.5 for i in labelled], [names[i].removesuffix(".weight") for i in labelled], fontsize=6)
    plot.set(xlabel="step", title="rank of the projected matrices")
    figure.colorbar(image, label="rank")
    temporary = output / f".{PICTURE_FILE}"
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(output / PICTURE_FILE)
    return output / PICTURE_FILE


def _rank_at(changes: list[tuple[int, int]], step: int) -> int:
    position = bisect.bisect_right(changes, step, key=lambda change: change[0])
    return changes[max(0, position - 1)][1]


def _history(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """For each matrix the steps at which its rank changed, and the ranks from then on."""
    history: dict[str, list[tuple[int, int]]] = {}
    for line in lines:
        for name, rank in line.get("ranks", {}).items():
            history.setdefault(name, []).append((line["step"], rank))
    return history
