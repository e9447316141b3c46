"""Spectra on the terminal: a table, what was left out and why, and the ranks to choose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subspan.analysis.spectrum_rows import EXPECTED, Spectra, SpectrumRow

__all__ = ["by_kind", "short_labels", "show"]


_WIDEST = 240


def show(console: Console, spectra: Spectra, *, full: bool) -> None:
    """Print the table of a quantity and what follows from it.

    Args:
        console: where to.
        spectra: rows with suggestions.
        full: a line for each row, instead of one for each kind of layer at the last point in time.
    """
    analysed = [row for row in spectra.rows if row.figures is not None]
    if analysed:
        if full:
            # As wide as it has to be, for a pager or a file.
            table = _full(spectra, analysed)
            table.width = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
            console.print(table, crop=False)
        else:
            console.print(_summary(spectra, analysed))
        for line in _suggestions(spectra.what, analysed):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for reason in dict.fromkeys(row.reason for row in spectra.rows if row.reason):
        names = list(dict.fromkeys(row.name for row in spectra.rows if row.reason == reason))
        listed = "" if reason in EXPECTED else f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        some = "tensor" if len(names) == 1 else "tensors"
        console.print(f"Left out, {reason}: {len(names)} {some}{listed}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def by_kind(rows: Iterable[SpectrumRow]) -> dict[tuple[str, tuple[int, int]], list[SpectrumRow]]:
    """Rows of the same kind of layer and the same size together."""
    kinds: dict[tuple[str, tuple[int, int]], list[SpectrumRow]] = {}
    for row in rows:
        assert row.matrix is not None
        kinds.setdefault((row.kind, row.matrix), []).append(row)
    return kinds


def short_labels(kinds: Iterable[str]) -> dict[str, str]:
    """Names of kinds without what stands before the number of the layer, where they stay different.

    Example:
        >>> short_labels(["model.layers.*.mlp.up_proj", "lm_head"])
        {'model.layers.*.mlp.up_proj': 'mlp.up_proj', 'lm_head': 'lm_head'}
    """
    kinds = list(dict.fromkeys(kinds))
    short = {kind: kind.split(".*." if ".*." in kind else ".", 1)[-1] for kind in kinds}
    counts = list(short.values())
    return {kind: label if counts.count(label) == 1 else kind for kind, label in short.items()}


def median(rows: Iterable[SpectrumRow], value: Callable[[SpectrumRow], float | None]) -> float | None:
    """Median of the rows that have the value."""
    values = [found for row in rows if (found := value(row)) is not None]
    return statistics.median(values) if values else None


def _figure(name: str) -> Callable[[SpectrumRow], float | None]:
    return lambda row: getattr(row.figures, name)


def _summary(spectra: Spectra, analysed: list[SpectrumRow]) -> Table:
    steps = sorted({row.step or 0 for row in analysed})
    batches = {row.batch for row in analysed}
    times = f" at step {steps[-1]}" if steps[-1] else ""
    since = f", of {len(steps)} points in time from step {steps[0]}" if len(steps) > 1 else ""
    # No wider than 80 columns, what every terminal has; the effective rank and the norms are in the full table.
    table = Table(title=f"{_title(spectra)}{times}{since}", title_justify="left", box=None, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.header_style = table.title_style = "bold"
    compared = any(row.overlap is not None for row in analysed)
    compared_batches = any(row.batch_overlap is not None for row in analysed)
    optional = {
        f"95 %\nat {steps[0]}": len(steps) > 1,
        "share\nat r": True,
        "overlap\nin time": compared,
        "overlap\nbatches": compared_batches,
        "take\nrank": spectra.what != "weights",
    }
    always = ("layers", "", "size", "stable\nrank", "rank for\n90/95/99 %")
    for header in (*always, *(header for header, there in optional.items() if there)):
        table.add_column(header, justify="left" if header == "layers" else "right", no_wrap=header != "layers")
    kinds = by_kind(analysed)
    labels = short_labels(kind for kind, _ in kinds)
    for (kind, size), rows in kinds.items():
        last = [row for row in rows if (row.step or 0) == steps[-1]] or rows
        first = [row for row in rows if (row.step or 0) == steps[0]] or rows
        count = len({(row.name, row.member) for row in rows})
        cells = [
            number(median(first, _figure("rank_95")), ".0f"),
            number(median(last, _figure("energy_at_rank")), ".3f"),
            number(median(last, lambda row: row.overlap), ".2f"),
            number(median(last, lambda row: row.batch_overlap), ".2f"),
            number(median(last, lambda row: row.suggested_rank), ".0f"),
        ]
        table.add_row(
            escape(labels[kind]),
            str(count) if count > 1 else "",
            "×".join(map(str, size)),
            number(median(last, _figure("stable_rank")), ".1f"),
            "/".join(number(median(last, _figure(f"rank_{share}")), ".0f") for share in (90, 95, 99)),
            *(cell for cell, there in zip(cells, optional.values(), strict=True) if there),
        )
    ranks = sorted({row.rank for row in analysed if row.rank})
    r = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    over = "layers" + (f" and {len(batches)} batches" if len(batches) > 1 else "")
    table.caption = f"Medians over {over}. r = {r}" + (
        "" if spectra.rank is not None else ", a quarter of the short side"
    )
    table.caption_justify = "left"
    return table


def _full(spectra: Spectra, analysed: list[SpectrumRow]) -> Table:
    table = Table(title=_title(spectra), title_justify="left", box=None, pad_edge=False, header_style="bold")
    columns: dict[str, Callable[[SpectrumRow], str]] = {
        "tensor": lambda row: row.name.removesuffix(".weight") + ("" if row.member is None else f"[{row.member}]"),
        "step": lambda row: number(row.step, "d"),
        "batch": lambda row: number(row.batch, "d"),
        "size": lambda row: "×".join(map(str, row.matrix or ())),
        "‖A‖_F": lambda row: number(_figure("frobenius_norm")(row), ".3g"),
        "‖A‖₂": lambda row: number(_figure("spectral_norm")(row), ".3g"),
        "stable": lambda row: number(_figure("stable_rank")(row), ".1f"),
        "effective": lambda row: number(_figure("effective_rank")(row), ".1f"),
        "90/95/99 %": lambda row: "/".join(number(_figure(f"rank_{share}")(row), ".0f") for share in (90, 95, 99)),
        "at quarter": lambda row: number(_figure("energy_at_quarter")(row), ".1%"),
        "r": lambda row: number(row.rank, "d"),
        "at r": lambda row: number(_figure("energy_at_rank")(row), ".1%"),
        "overlap": lambda row: number(row.overlap, ".2f"),
        "of batches": lambda row: number(row.batch_overlap, ".2f"),
        "take rank": lambda row: number(row.suggested_rank, "d"),
    }
    used = {header: cell for header, cell in columns.items() if any(cell(row) for row in analysed)}
    for header in used:
        table.add_column(header, justify="left" if header == "tensor" else "right", overflow="fold")
    for row in analysed:
        table.add_row(*(escape(cell(row)) for cell in used.values()))
    return table


def _title(spectra: Spectra) -> str:
    since = f" of the weights since {escape(spectra.base)}" if spectra.base else ""
    return f"{spectra.what.capitalize()}{since}"


def _suggestions(what: str, analysed: list[SpectrumRow]) -> list[str]:
    """What the ranks come to for the whole model."""
    suggested = {row.name: row for row in analysed if row.suggested_rank is not None and row.projected is not False}
    if not suggested:
        return []
    ranks = sorted(row.suggested_rank for row in suggested.values() if row.suggested_rank)
    span = f"median of {len(ranks)} matrices, from {ranks[0]} to {ranks[-1]}"
    if what == "update":
        return [f"Rank of a LoRA adapter: {statistics.median_high(ranks)} holds 90 % of the update ({span})."]
    capped = sum(row.suggested_rank == row.short_side // 2 for row in suggested.values())
    energies = [(row.figures.energy_at_rank, row) for row in analysed if row.figures and row.name in suggested]
    least, where = min(energies, key=lambda pair: pair[0])
    lines = [
        f"Rank for projecting gradients: at least {statistics.median_high(ranks)} ({span}; "
        + (
            f"{capped} of them need more than half of their side and are capped there)."
            if capped
            else "95 % of energy)."
        )
    ]
    middle = statistics.median(energy for energy, _ in energies)
    r = f"r = {where.rank}" if len({row.rank for _, row in energies}) == 1 else "r"
    lines.append(
        f"{r} holds {100 * middle:.1f} % of the energy in the median, and {100 * least:.1f} % at least ({where.name})."
    )
    return lines


def number(value: float | None, format: str) -> str:
    """A number for the table, empty for none."""
    return "" if value is None else f"{value:{format}}"
