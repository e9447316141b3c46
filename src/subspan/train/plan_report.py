"""A plan as a table, as JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subspan.memory.processes import ProcessPlan
from subspan.train.config import write_text
from subspan.train.plan import BASELINES, Recipe, largest_that_fits, left_out, recipes
from subspan.train.plan_settings import PlanSettings

__all__ = ["plan_report", "report"]

_ATTENTION = "traced with the flash kernel of the CPU; kernels that form the matrix of scores need more"
_BUFFERS = (
    "buffers: the buckets of DDP, a copy of the gradients that it reduces (gradient_as_bucket_view=False)",
    "buffers: weights while they are gathered and gradients until they are scattered, block by block, traced",
)


def plan_report(settings: PlanSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Plan, solve and print what is asked for, and write it to the output folder.

    Args:
        settings: what to plan.
        console: where to print (default: standard output).

    Returns:
        What ``plan.json`` holds.

    Raises:
        ValueError: settings that cannot be honoured, or a budget that nothing fits.
        FileNotFoundError: a model that does not exist.
    """
    console = console or Console()
    # JSON goes to standard output alone.
    messages = Console(stderr=True) if settings.json else console
    with messages.status("Tracing ...") as status:
        if settings.solve is not None:
            found, first = largest_that_fits(
                settings, lambda value, peak: status.update(f"{settings.solve} {value}: {_size(peak)}")
            )
            planned = [first, *_others(found)]
        else:
            found, planned = settings, list(recipes(settings))
    result = report(found, planned)
    if settings.json:
        console.print_json(json.dumps(result))
    else:
        _print(console, found, planned)
    if settings.output is not None:
        _write(Path(settings.output), found, result, planned, messages)
    return result


def _others(settings: PlanSettings) -> list[Recipe]:
    return list(recipes(settings))[1:] if settings.compare else []


def report(settings: PlanSettings, planned: list[Recipe]) -> dict[str, Any]:
    """Return a plan as plain values: the chosen recipe, and the others under ``compared``."""
    first, *others = (_recipe(recipe, settings.budget_bytes) for recipe in planned)
    run = {
        name: getattr(settings, name)
        for name in (
            "model", "dtype", "batch_size", "seq_len", "grad_accumulation", "activation_checkpointing", "device",
            "world_size", "shard",
        )
    }  # fmt: skip
    solved = {"solved": {settings.solve: getattr(settings, settings.solve)}} if settings.solve else {}
    return {
        **run,
        **solved,
        "budget_bytes": settings.budget_bytes,
        "attention": _ATTENTION,
        **first,
        "compared": others,
        "left_out": left_out(settings),
    }


def _recipe(recipe: Recipe, budget: int) -> dict[str, Any]:
    plan = recipe.bytes
    return {
        "method": recipe.name,
        "size": recipe.size,
        "gradient": recipe.gradient,
        "parameters": recipe.parameters,
        "trainable": recipe.trainable,
        "bytes": plan.most,
        "bytes_at_peak": plan.at_peak,
        "peak_bytes": plan.peak,
        "peak_moment": plan.moment,
        "peak_operation": plan.operation,
        "fits": plan.peak <= budget,
        "margin_bytes": budget - plan.peak,
        **({} if recipe.processes is None else {"processes": dataclasses.asdict(recipe.processes)}),
    }


def _print(console: Console, settings: PlanSettings, planned: list[Recipe]) -> None:
    first = planned[0]
    checkpointing = ", activation checkpointing" if settings.activation_checkpointing else ""
    console.print(
        f"[bold]{escape(settings.model)}[/]: {first.parameters:,} parameters, {settings.dtype}, "
        f"batch {settings.batch_size} × {settings.seq_len} tokens{checkpointing}, on {_device(settings)}",
        highlight=False,
    )
    table = Table(first.title, "most", "at the peak", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in first.bytes.most:
        table.add_row(name, _size(first.bytes.most[name]), _size(first.bytes.at_peak[name]))
    table.add_row("peak", "", _size(first.bytes.peak), style="bold")
    console.print(table)
    console.print(
        f"The peak is {first.bytes.moment} ({first.bytes.operation.removesuffix('.default')}).", highlight=False
    )
    if settings.solve is not None:
        console.print(f"The largest {settings.solve} that fits is [bold]{getattr(settings, settings.solve)}[/].")
    console.print(_fits(first, settings), highlight=False)
    if first.processes is not None:
        console.print()
        console.print(_processes(first.processes))
        console.print(f"[dim]{_BUFFERS[settings.shard != 'none']}[/]", highlight=False)
    if len(planned) > 1:
        console.print()
        console.print(_comparison(planned, settings))
        for recipe in planned:
            if recipe.name in BASELINES:
                console.print(f"[dim]{recipe.name}: {BASELINES[recipe.name]}[/]", highlight=False)
    for name, reason in left_out(settings).items():
        console.print(f"[dim]{name} is left out: {reason}[/]", highlight=False)
    console.print(f"[dim]Attention: {_ATTENTION}.[/]", highlight=False)


def _device(settings: PlanSettings) -> str:
    device = "a CPU" if settings.device == "cpu" else "an accelerator"
    if settings.world_size == 1:
        return device
    divided = {"none": "DDP", "full": "fully_shard, bases whole", "bases": "fully_shard, bases divided"}
    return f"{device}: one of {settings.world_size} processes ({divided[settings.shard]})"


def _processes(plan: ProcessPlan) -> Table:
    """What each of several processes holds of the state, and what they send each other."""
    table = Table(f"{plan.world_size} processes", *plan.layouts, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    layouts = list(plan.layouts.values())
    shares = (f"{layout.state_bytes / plan.alone:.3f}" if plan.alone else "-" for layout in layouts)
    table.add_row("state of each", *(_size(layout.state_bytes) for layout in layouts))
    table.add_row("  of that of one alone", *shares)
    for title, parts in (
        ("sent in a step", [layout.step for layout in layouts]),
        ("a refresh of all adds", [layout.refresh for layout in layouts]),
    ):
        table.add_row(title, *(_size(sum(part.values())) for part in parts))
        for name in dict.fromkeys(name for part in parts for name in part):
            table.add_row(f"  {name}", *(_size(part.get(name, 0)) for part in parts))
    return table


def _fits(recipe: Recipe, settings: PlanSettings) -> str:
    margin = settings.budget_bytes - recipe.bytes.peak
    if margin >= 0:
        return f"Fits in {settings.budget}? [green]yes[/], with {_size(margin)} to spare"
    return f"Fits in {settings.budget}? [red]no[/], {_size(-margin)} too much"


def _comparison(planned: list[Recipe], settings: PlanSettings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe, GiB at the peak")
    several = "buffers" in planned[0].bytes.at_peak
    for name in ("weights", "grads", "state", "work", "activ.", *["buffers"] * several, "peak", "fits"):
        table.add_column(name, justify="right", no_wrap=True)
    for recipe in planned:
        at = recipe.bytes.at_peak
        columns = [
            at["weights"], at["gradients"], at["moments"] + at["bases"] + at["other state"],
            at["refresh workspace"] + at["step workspace"], at["activations"] + at["logits"],
            *[at.get("buffers", 0)] * several, recipe.bytes.peak,
        ]  # fmt: skip
        fits = "yes" if recipe.bytes.peak <= settings.budget_bytes else "no"
        table.add_row(recipe.title, *(f"{count / 2**30:.2f}" for count in columns), fits)
    return table


def _size(count: int) -> str:
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count} B"


def _write(
    folder: Path, settings: PlanSettings, result: dict[str, Any], planned: list[Recipe], console: Console
) -> None:
    write_text(folder / "plan.json", json.dumps(result, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    categories = list(planned[0].bytes.at_peak)
    writer.writerow(["recipe", "gradient", "peak_bytes", "peak_moment", *categories])
    for recipe in planned:
        at = recipe.bytes.at_peak
        row = [recipe.title, recipe.gradient, recipe.bytes.peak, recipe.bytes.moment]
        writer.writerow([*row, *(at[name] for name in categories)])
    write_text(folder / "plan.csv", text.getvalue())
    if importlib.util.find_spec("matplotlib") is None:
        console.print("No plan.png: it needs matplotlib, pip install 'subspan[report]'.", markup=False, highlight=False)
    else:
        _plot(folder / "plan.png", settings, planned)
    console.print(f"Written to {folder}", markup=False, highlight=False, soft_wrap=True)


def _plot(path: Path, settings: PlanSettings, planned: list[Recipe]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.42 * len(planned)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(planned)
    titles = [recipe.title for recipe in planned]
    colours = ("#4c566a", "#c1583f", "#2f6f9f", "#6fa8c9", "#b7cfdd", "#d9a441", "#ecd08f", "#5f9163", "#a9c9a4")
    for name, colour in zip(planned[0].bytes.at_peak, (*colours, "#8a6fa8"), strict=False):
        widths = [recipe.bytes.at_peak[name] / 2**30 for recipe in planned]
        if max(widths) > 0.002 * max(recipe.bytes.peak for recipe in planned) / 2**30:
            axes.barh(titles, widths, left=left, label=name, color=colour, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, recipe in enumerate(planned):
        axes.text(left[position], position, f" {recipe.bytes.peak / 2**30:.2f}", va="center", fontsize=8)
    axes.axvline(settings.budget_bytes / 2**30, color="black", linestyle="--", linewidth=1, label=settings.budget)
    axes.invert_yaxis()
    longest, budget = max(left), settings.budget_bytes / 2**30
    axes.set_xlim(0, 1.12 * (max(longest, budget) if budget < 3 * longest else longest))
    axes.set_xlabel("GiB at the peak")
    axes.set_title(f"{settings.model}, {settings.dtype}, batch {settings.batch_size} × {settings.seq_len}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".tmp.png")
    figure.savefig(staging, dpi=150)
    os.replace(staging, path)
