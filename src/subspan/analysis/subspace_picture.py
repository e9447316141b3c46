"""The measurements of subspaces as a picture: lost energy over time, every method a numbered point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subspan.analysis.subspace_bench import MatrixResult

__all__ = ["write_picture"]

#: A smaller loss of energy is rounding of float32, and drawn here.
_FLOOR = 1e-7
#: Colours by the beginning of a method's name.
_COLOURS = {"adaptive": "#15803d", "torch": "#c2410c", "scipy": "#7c3aed", "sklearn": "#be185d"}
_OTHERS = "#1d4ed8"
#: Diameter of a number's disc, in points.
_DISC = 13.0


def write_picture(results: Sequence[MatrixResult], path: Path) -> bool:
    """Draw what each method loses of the optimal energy over its time, one panel for each matrix, as PNG.

    Args:
        results: matrices that were not measured are left out.
        path: of the picture, written under a temporary name first.

    Returns:
        Whether a matrix was measured; without one there is no picture.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [(result, named) for result in results if (named := _points(result))]
    if not drawn:
        return False
    names = list(dict.fromkeys(name for _, named in drawn for name in named))
    numbers = {name: str(number) for number, name in enumerate(names, start=1)}
    columns = min(3, math.ceil(math.sqrt(len(drawn))))
    rows = math.ceil(len(drawn) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns + 2.8, max(4.6 * rows, 6.6)), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(drawn) :]:
        panel.set_visible(False)
    for panel, (result, named) in zip(panels.flat, drawn, strict=False):
        panel.set_title(f"{result.matrix}, rank {result.rank}", fontsize=10)
        panel.set(xscale="log", yscale="log", xlabel="time in units of one projection QᵀA")
        panel.set_ylabel("energy lost of the optimum of equal rank")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        panel.scatter(*zip(*named.values(), strict=True), s=6, c=[_colour(name) for name in named])
        panel.margins(0.08)
    figure.suptitle("Bases of subspaces: fast is left, exact is at the bottom (1e-7 is drawn for less)", fontsize=11)
    figure.legend(
        handles=[
            Line2D([], [], linestyle="", marker="o", markersize=8, color=_colour(name), label=f"{number}  {name}")
            for name, number in numbers.items()
        ],
        loc="outside right center",
        frameon=False,
    )
    # The layout is made once; with it every point has its place on the page.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (_, named) in zip(panels.flat, drawn, strict=False):
        _number(panel, named, numbers)
    temporary = path.with_name(f".{path.name}")
    # A PNG of hundreds of panels would have more rows than matplotlib draws.
    figure.savefig(temporary, dpi=min(120, 60_000 / figure.get_figheight()), format="png")
    pyplot.close(figure)
    temporary.replace(path)
    return True


def _points(result: MatrixResult) -> dict[str, tuple[float, float]]:
    """Time and lost energy of the measured methods."""
    return {
        method.method: (method.units, max(1 - method.energy, _FLOOR))
        for method in result.methods
        if method.units is not None and method.energy is not None
    }


def _colour(name: str) -> str:
    return next((colour for beginning, colour in _COLOURS.items() if name.startswith(beginning)), _OTHERS)


def _number(panel: Any, named: dict[str, tuple[float, float]], numbers: dict[str, str]) -> None:
    """Write the number of each method at its point, moved aside where others would cover it."""
    to_points = 72 / panel.figure.dpi
    at = panel.transData.transform(list(named.values())) * to_points
    box = panel.bbox
    placed = _spread(at, box.min * to_points, box.max * to_points)
    for name, place, point in zip(named, placed, at, strict=True):
        panel.annotate(
            numbers[name],
            named[name],
            xytext=place - point,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color="white",
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": _colour(name), "edgecolor": "white", "linewidth": 0.5},
            arrowprops={"arrowstyle": "-", "color": _colour(name), "linewidth": 0.7},
        )


def _spread(points: Any, lowest: Any, highest: Any) -> Any:
    """Places near the points (k, 2), a disc apart from each other and within the panel."""
    import numpy

    # Points at the same place part in different directions.
    angle = numpy.arange(len(points)) * 2.4
    places = points + 0.01 * numpy.stack([numpy.cos(angle), numpy.sin(angle)], axis=1)
    for _ in range(300):
        apart = places[:, None] - places[None]
        distance = numpy.linalg.norm(apart, axis=2) + numpy.eye(len(points)) * 1e9
        overlap = numpy.clip(_DISC - distance, 0, None) / distance
        if not overlap.any():
            break
        places += 0.5 * (overlap[:, :, None] * apart).sum(axis=1)
        places = places.clip(lowest + _DISC / 2, highest - _DISC / 2)
    return places
