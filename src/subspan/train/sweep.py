"""A grid of runs over a few settings, resumable, with one table and one picture at the end."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subspan.train.callbacks import MetricsFile, json_line
from subspan.train.config import PretrainConfig, differences, read_config, write_text
from subspan.train.optimizer import check_settings
from subspan.train.pretrain import pretrain
from subspan.train.processes import launched
from subspan.train.run_folder import METRICS_FILE
from subspan.train.summary import RunSummary, finished_summary

__all__ = ["SweepResult", "claim", "run_once", "sweep"]

BASE_FILE = "sweep.yaml"
RESULTS_FILE = "sweep.jsonl"
#: Settings that are mappings, whose values are swept under ``NAME.KEY``.
_MAPPINGS = ("optimizer", "weight_settings", "adapter_settings")
_DOTTED = tuple(f"{name}." for name in _MAPPINGS)
_NOT_SWEPT = frozenset({"output", "resume", *_MAPPINGS})


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Attributes:
        runs: settings of the grid and summary of every finished run, the lowest validation loss first.
        signal: number of the signal that stopped the sweep, or None.
    """

    runs: list[tuple[dict[str, Any], RunSummary]]
    signal: int | None = None


def sweep(config: PretrainConfig, grid: dict[str, Any], *, console: Console | None = None) -> SweepResult:
    """Run every combination of the values in a grid, each in its own folder, and compare the validation losses.

    Called again, finished runs are skipped and an unfinished one continues. The folder `config.output` (default:
    ``runs/sweep-METHOD-MODEL``) gets ``sweep.jsonl``, one line a run, and ``sweep.png`` where matplotlib is installed.

    Args:
        config: settings that all runs share.
        grid: list of values for each swept setting; settings of the optimizer as ``optimizer.NAME``.
        console: where to print (default: standard output).

    Raises:
        ValueError: an unknown setting, values that are no list or cannot be, or a folder that holds a sweep with other
            settings.

    Example:
        >>> result = sweep(PretrainConfig(steps=100), {"lr": [0.005, 0.01]})  # doctest: +SKIP
        >>> result.runs[0]  # doctest: +SKIP
        ({'lr': 0.01}, RunSummary(...))
    """
    console = console or Console()
    if launched() > 1:
        raise ValueError("a sweep runs in one process: start it without torchrun.")
    axes = _axes(grid)
    output = Path(config.output or f"runs/sweep-{config.title}-{Path(config.model).stem}").expanduser()
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for settings in combinations:
        _check(config, settings)
    claim(output, {BASE_FILE: config})
    runs: list[tuple[dict[str, Any], RunSummary]] = []
    for number, settings in enumerate(combinations, start=1):
        folder = output / _name(settings)
        single = _apply(dataclasses.replace(config, output=str(folder), resume="auto"), settings)
        console.print(f"[bold]Run {number} of {len(combinations)}: {escape(_name(settings))}[/]", highlight=False)
        summary = run_once(single, console)
        if summary.finished:
            runs.append((settings, summary))
        if summary.signal is not None:
            console.print("The same command continues the sweep.")
            return SweepResult(_sorted(runs), summary.signal)
        lines = [json_line(settings | dataclasses.asdict(summary)) for settings, summary in runs]
        write_text(output / RESULTS_FILE, "".join(lines))
    result = SweepResult(_sorted(runs))
    _show(console, result, output)
    _plot(result, list(axes), output)
    return result


def _axes(grid: dict[str, Any]) -> dict[str, list[Any]]:
    """Check the grid; ``{"optimizer": {"scale": [...]}}`` becomes ``optimizer.scale``."""
    axes: dict[str, Any] = {}
    for name, values in grid.items():
        if name in _MAPPINGS and isinstance(values, dict):
            axes |= {f"{name}.{key}": value for key, value in values.items()}
        else:
            axes[name] = values
    known = [setting.name for setting in dataclasses.fields(PretrainConfig) if setting.name not in _NOT_SWEPT]
    for name, values in axes.items():
        if name not in known and not name.startswith(_DOTTED):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"grid: {name!r} is no setting that can be swept.{hint} Others: {', '.join(known)}.")
        if not isinstance(values, list) or not values:
            raise ValueError(f'grid.{name} is {values!r}; it must be a list of values, such as "[0.005, 0.01]".')
    if not axes:
        raise ValueError("the grid is empty; give values such as --grid.lr '[0.005, 0.01]'.")
    return axes


def claim(output: Path, configs: dict[str, PretrainConfig], what: str = "sweep") -> None:
    """Write the settings that runs share into their folder, or compare them with those of the runs so far.

    Args:
        output: the folder.
        configs: settings by the name of their file.
        what: the runs are together, for messages.

    Raises:
        ValueError: a folder of something else, or of runs with other settings.
    """
    files = {output / name: config for name, config in configs.items()}
    if not any(file.exists() for file in files) and output.exists() and any(output.iterdir()):
        raise ValueError(f"output {str(output)!r} holds other files and no {what}; choose another folder.")
    found = [differences(read_config(file), config) for file, config in files.items() if file.exists()]
    if differing := list(dict.fromkeys(itertools.chain(*found))):
        raise ValueError(
            f"{output} holds a {what} with other settings ({'; '.join(differing)}); choose another --output."
        )
    for file, config in files.items():
        write_text(file, config.to_yaml())


def run_once(config: PretrainConfig, console: Console) -> RunSummary:
    """Train where no run in the folder of the settings is finished; one that gives up has an infinite loss."""
    folder = Path(str(config.output))
    summary = finished_summary(folder, MetricsFile.read(folder / METRICS_FILE))
    if summary is not None and summary.step == config.steps:
        console.print("finished already")
        return summary
    try:
        return pretrain(config, console=console)
    except FloatingPointError as error:
        console.print(str(error), style="red", markup=False)
        return _diverged(folder)


def _name(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()).replace("/", "_").replace(" ", "")


def _apply(config: PretrainConfig, settings: dict[str, Any]) -> PretrainConfig:
    own = {key: value for key, value in settings.items() if not key.startswith(_DOTTED)}
    for name in _MAPPINGS:
        inside = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
        own[name] = getattr(config, name) | inside
    return dataclasses.replace(config, **own)


def _check(config: PretrainConfig, settings: dict[str, Any]) -> None:
    """Refuse a combination that cannot be before the first run is started."""
    try:
        check_settings(_apply(config, settings))
    except ValueError as error:
        raise ValueError(f"grid, {_name(settings)}: {error}") from error


def _diverged(folder: Path) -> RunSummary:
    """The summary of a run that gave up, from its metrics."""
    last: dict[str, Any] = next(
        (line for line in reversed(MetricsFile.read(folder / METRICS_FILE)) if "tokens" in line), {}
    )
    names = ("step", "tokens", "tokens_per_second", "peak_memory_bytes", "skipped_steps")
    return RunSummary(
        output=str(folder),
        finished=True,
        eval_loss=math.inf,
        eval_perplexity=math.inf,
        state_bytes=0,
        planned_state_bytes=0,
        **{name: last.get(name, 0) for name in names},
    )


def _sorted(runs: list[tuple[dict[str, Any], RunSummary]]) -> list[tuple[dict[str, Any], RunSummary]]:
    """Sort by validation loss, runs that diverged last."""
    return sorted(runs, key=lambda run: _loss(run[1]))


def _loss(summary: RunSummary) -> float:
    """The validation loss, infinite for a run that diverged."""
    loss = summary.eval_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _show(console: Console, result: SweepResult, output: Path) -> None:
    axes = list(result.runs[0][0])
    table = Table(
        *map(escape, axes), "eval loss", "perplexity", "tokens/s", "state bytes", box=None, header_style="bold"
    )
    for settings, summary in result.runs:
        figures = (summary.loss_text, summary.perplexity_text, f"{summary.tokens_per_second:,.0f}")
        table.add_row(*(escape(str(settings[axis])) for axis in axes), *figures, f"{summary.state_bytes:,}")
    console.print(table)
    console.print(f"Results: {output / RESULTS_FILE}", markup=False, soft_wrap=True)


def _plot(result: SweepResult, axes: list[str], output: Path) -> None:
    """Validation loss over the first swept setting, one line for each choice of the others."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, list[tuple[Any, float]]] = {}
    for settings, summary in result.runs:
        if math.isfinite(loss := _loss(summary)):
            rest = _name({axis: settings[axis] for axis in axes[1:]})
            lines.setdefault(rest, []).append((settings[axes[0]], loss))
    figure, plot = pyplot.subplots(figsize=(6, 4), layout="constrained")
    numeric = all(isinstance(x, (int, float)) for points in lines.values() for x, _ in points)
    for label, points in sorted(lines.items()):
        points = sorted(points) if numeric else points
        plot.plot([x if numeric else str(x) for x, _ in points], [y for _, y in points], marker="o", label=label)
    if numeric and axes[0] in ("lr", "lr_scale", "other_lr_scale"):
        plot.set_xscale("log")
    plot.set(xlabel=axes[0], ylabel="validation loss")
    if len(axes) > 1:
        plot.legend()
    temporary = output / ".sweep.png"
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(output / "sweep.png")
