"""Pictures of spectra: how singular values decay, and how ranks and subspaces change over training (extra [report])."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.analysis.spectrum_rows import Spectra, SpectrumRow
from subspan.analysis.spectrum_table import by_kind, short_labels

__all__ = ["draw"]

_PANELS = 12
_COLUMNS = 4
#: Smaller singular values relative to the largest are rounding.
_FLOOR = 1e-6

Kinds = dict[tuple[str, tuple[int, int]], list[SpectrumRow]]


def draw(found: list[Spectra], folder: Path) -> list[Path] | None:
    """Draw the pictures ``QUANTITY-decay.png``, ``-ranks.png`` and ``-overlap.png``, where there is something to show.

    Pictures of the same names that no longer apply are removed.

    Returns:
        The files; None where matplotlib is not installed.
    """
    names = {spectra.what: {name: folder / f"{spectra.what}-{name}.png" for name in _PICTURES} for spectra in found}
    for files in names.values():
        for file in files.values():
            file.unlink(missing_ok=True)
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn: list[Path] = []
    for spectra in found:
        kinds = by_kind(row for row in spectra.rows if row.figures is not None)
        largest = sorted(kinds, key=lambda kind: len(kinds[kind]) * math.prod(kind[1]), reverse=True)[:_PANELS]
        shown = {kind: rows for kind, rows in kinds.items() if kind in largest}
        for name, picture in _PICTURES.items():
            figure = picture(spectra, shown)
            if figure is None:
                continue
            if len(shown) < len(kinds):
                figure.supxlabel(f"the {len(shown)} largest of {len(kinds)} kinds of layers", fontsize="small")
            file = names[spectra.what][name]
            temporary = file.with_name(f".{file.name}")
            figure.savefig(temporary, dpi=130, format="png")
            pyplot.close(figure)
            temporary.replace(file)
            drawn.append(file)
    return drawn


def _decay(spectra: Spectra, kinds: Kinds) -> Any:
    """σ_i / σ_1 for each kind of layer, one line for each point in time, or for each layer if there is but one."""
    if not kinds:
        return None
    place, where = _places(kinds)
    values = sorted({value for rows in kinds.values() for row in rows if (value := place(row)) is not None})
    figure, panels, labels = _panels(kinds)
    colour = _colours(values)
    lowest = 1.0
    for panel, (kind, rows) in zip(panels, kinds.items(), strict=True):
        for value in dict.fromkeys(map(place, rows)):
            curve = _middle([spectra.singular_values[row.key] for row in rows if place(row) == value])
            curve = curve[curve > _FLOOR]
            lowest = min(lowest, curve[-1].item())
            panel.plot(range(1, len(curve) + 1), curve, color=colour(value), linewidth=1.2)
        panel.axvline(rows[0].rank, color="grey", linestyle=":", linewidth=1)
        panel.set(yscale="log", title=labels[kind])
        panel.margins(x=0.01)
    for panel in panels:
        panel.set_ylim(lowest / 2, 2)
    lines = "medians over layers" if where == "step" else "a line for each layer"
    figure.suptitle(f"{spectra.what}: σᵢ/σ₁ over i, {lines}; dotted: r")
    if len(values) > 1:
        _colour_bar(figure, panels, values, where)
    return figure


def _ranks(spectra: Spectra, kinds: Kinds) -> Any:
    """Ranks for 90, 95 and 99 % of the energy over training, or over the depth if there is one point in time."""
    place, where = _places(kinds)
    if where == "layer":
        kinds = {kind: rows for kind, rows in kinds.items() if len(set(map(place, rows))) > 1}
    if not kinds:
        return None
    figure, panels, labels = _panels(kinds)
    highest = 0
    for panel, (kind, rows) in zip(panels, kinds.items(), strict=True):
        places = sorted({place(row) or 0 for row in rows})
        for share, shade in ((99, "#08306b"), (95, "#2171b5"), (90, "#6baed6")):
            at = [[getattr(row.figures, f"rank_{share}") for row in rows if (place(row) or 0) == x] for x in places]
            panel.plot(places, list(map(statistics.median, at)), color=shade, marker="o", ms=3, label=f"{share} %")
            panel.fill_between(places, list(map(min, at)), list(map(max, at)), color=shade, alpha=0.15, lw=0)
            highest = max(highest, rows[0].rank or 0, *map(max, at))
        panel.axhline(rows[0].rank, color="grey", linestyle=":", linewidth=1, label="r")
        panel.set(title=labels[kind])
        _ticks(panel, places)
    for panel in panels:
        panel.set_ylim(0, 1.05 * highest)
    panels[0].legend(fontsize="small", ncols=2)
    figure.suptitle(f"{spectra.what}: rank for 90, 95, 99 % of the energy over the {where}; band: least to most")
    return figure


def _overlap(spectra: Spectra, kinds: Kinds) -> Any:
    """Overlap of the leading r directions with those of the point in time before."""
    compared = [row for rows in kinds.values() for row in rows if row.overlap is not None]
    if not compared:
        return None
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    labels = short_labels(kind for kind, _ in kinds)
    colours = pyplot.get_cmap("tab20" if len(kinds) > 10 else "tab10")
    for number, ((kind, size), rows) in enumerate(kinds.items()):
        for name, style in (("overlap", "-"), ("batch_overlap", "--")):
            there = [row for row in rows if getattr(row, name) is not None]
            steps = sorted({row.step or 0 for row in there})
            heights = [statistics.median(getattr(r, name) for r in there if (r.step or 0) == step) for step in steps]
            label = f"{labels[kind]} {size[0]}×{size[1]}" if name == "overlap" else None
            panel.plot(steps, heights, style, color=colours(number), marker="o", markersize=3, label=label)
    chance = sorted(row.rank / row.short_side for row in compared if row.rank)[len(compared) // 2]
    panel.axhline(chance, color="grey", linestyle=":", label="random subspaces")
    both = any(row.batch_overlap is not None for row in compared)
    dashed = "\n(dashed: with the batch before, at the same weights)" if both else ""
    panel.set(xlabel="step", ylabel="overlap, 1 for the same subspace", ylim=(0, 1.02))
    panel.set_title(
        f"{spectra.what}: overlap of leading subspaces with those of the step before{dashed}", fontsize="medium"
    )
    _ticks(panel, _steps(kinds))
    figure.legend(loc="outside right center", fontsize="small")
    return figure


_PICTURES: dict[str, Callable[[Spectra, Kinds], Any]] = {"decay": _decay, "ranks": _ranks, "overlap": _overlap}


def _steps(kinds: Kinds) -> list[int]:
    return sorted({row.step or 0 for rows in kinds.values() for row in rows})


def _places(kinds: Kinds) -> tuple[Callable[[SpectrumRow], int | None], str]:
    """What rows are laid out over: the step, or the number of the layer if there is one step."""
    if len(_steps(kinds)) > 1:
        return (lambda row: row.step or 0), "step"
    return (lambda row: row.layer), "layer"


def _middle(curves: Iterable[Tensor]) -> Tensor:
    """Median of decays σ/σ₁, entry by entry."""
    return torch.stack([curve / curve[0] for curve in curves]).median(dim=0).values


def _panels(kinds: Kinds) -> tuple[Any, list[Any], dict[tuple[str, tuple[int, int]], str]]:
    """A panel for each kind, and its title."""
    from matplotlib import pyplot

    columns = min(_COLUMNS, math.ceil(math.sqrt(len(kinds))))
    rows = math.ceil(len(kinds) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(max(6.0, 3.1 * columns), 2.5 * rows + 0.6), layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for panel in panels[len(kinds) :]:
        panel.axis("off")
    short = short_labels(kind for kind, _ in kinds)
    titles = {}
    for kind, same in kinds.items():
        count = len({(row.name, row.member) for row in same})
        titles[kind] = f"{short[kind[0]]}\n{kind[1][0]}×{kind[1][1]}" + (f", {count} of them" if count > 1 else "")
    for panel in panels:
        panel.title.set_fontsize("medium")
        panel.tick_params(labelsize="small")
    return figure, panels[: len(kinds)], titles


def _ticks(panel: Any, places: list[int]) -> None:
    if len(places) <= 6:
        panel.set_xticks(places)
    else:
        panel.locator_params(axis="x", integer=True, nbins=6)


def _colours(values: list[int]) -> Callable[[int | None], Any]:
    from matplotlib import pyplot

    scale = pyplot.get_cmap("viridis")
    span = (values[-1] - values[0]) or 1 if values else 1
    # The end of the scale is too pale for a line.
    return lambda value: scale(0.0 if value is None else 0.9 * (value - values[0]) / span)


def _colour_bar(figure: Any, panels: list[Any], values: list[int], label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    colour = _colours(values)
    span = values[-1] - values[0]
    shades = ListedColormap([colour(values[0] + span * i / 255) for i in range(256)])  # type: ignore[arg-type]
    bar = figure.colorbar(ScalarMappable(Normalize(values[0], values[-1]), shades), ax=panels, label=label, shrink=0.8)
    if len(values) <= 6:
        bar.set_ticks(values)
    else:
        bar.locator = MaxNLocator(integer=True)
