"""The studies of low-rank weights as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspan.analysis.heads_study import HeadsRow
    from subspan.analysis.layers_bench import LayersRow

__all__ = ["draw_heads", "draw_layers"]

_MODES = {"sequential": ("#c2410c", "--"), "parallel": ("#1d4ed8", "-")}
_FULL = "#374151"
_MARKERS = "os^Dvp"


def draw_heads(rows: Sequence[HeadsRow], model: str, path: Path) -> bool:
    """Draw the time of an iteration over trained parameters, a line for each mode and number of heads, as PNG.

    Args:
        rows: the rows, that of full weights first; what was not measured is left out.
        model: its name.
        path: of the picture, written under a temporary name first.

    Returns:
        Whether anything was measured.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    full, *others = [row for row in rows if row.iteration is not None]
    if not others:
        return False
    figure, plot = _figure()
    numbers = sorted({row.heads or 0 for row in others})
    for mode, (colour, style) in _MODES.items():
        for place, heads in enumerate(numbers):
            same = [row for row in others if (row.mode, row.heads) == (mode, heads)]
            if not same:
                continue
            line = sorted((row.trained, row.iteration, row.rank) for row in same)
            x, y, _ = zip(*line, strict=True)
            look: Any = {"color": colour, "alpha": 0.45 + 0.55 * (place + 1) / len(numbers)}
            look |= {"linestyle": style, "marker": _MARKERS[place % len(_MARKERS)]}
            plot.plot(x, y, **look, label=f"{mode}, {heads} head{'s' if heads > 1 else ''}")
            for trained, iteration, rank in line:
                plot.annotate(f"r={rank}", (trained, iteration), xytext=(3, 4), textcoords="offset points", fontsize=7)
    plot.axhline(1, color=_FULL, linewidth=0.8)
    plot.plot([full.trained], [1], "*", color=_FULL, markersize=12, label="full weights")
    plot.set_ylabel("time of an iteration, full weights = 1")
    plot.set_title(f"{Path(model).name}: LoRA heads against full weights, merges not counted", fontsize=10)
    plot.legend(fontsize=8)
    _write(figure, path)
    return True


def draw_layers(rows: Sequence[LayersRow], model: str, path: Path) -> bool:
    """Draw the test loss over trained parameters, a point for each choice of layers, as PNG.

    Args:
        rows: the rows; runs that diverged are left out.
        model: its name.
        path: of the picture, written under a temporary name first.

    Returns:
        Whether there is a point.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    points = [(row.layers, row.trained, row.loss) for row in rows if row.loss is not None and row.trained is not None]
    if not points:
        return False
    figure, plot = _figure()
    for layers, trained, loss in points:
        full = layers == "full"
        look: Any = {"marker": "*", "color": _FULL, "markersize": 12} if full else {"marker": "o", "color": "#1d4ed8"}
        plot.plot([trained], [loss], **look)
        plot.annotate(layers, (trained, loss), xytext=(6, 5), textcoords="offset points", fontsize=9)
        if full:
            plot.axhline(loss, color=_FULL, linewidth=0.8)
    plot.set_ylabel("test loss (nats a token)")
    plot.margins(0.12)
    plot.set_title(f"{Path(model).name}: heads in attention (A), MLP (M) and logit (L) layers", fontsize=10)
    _write(figure, path)
    return True


def _figure() -> tuple[Any, Any]:
    """A figure with one panel over trained parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, plot = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    plot.set(xlabel="trained parameters", xscale="log")
    plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.grid(alpha=0.3)
    return figure, plot


def _write(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    temporary.replace(path)
