"""The studies of low-rank weights as tables, as CSV and as values for JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from subspan.analysis.heads_study import HeadsRow
    from subspan.analysis.layers_bench import LayersRow

__all__ = ["heads_table", "layers_table", "rows_as_csv", "rows_as_record", "say_picture"]


def heads_table(rows: Sequence[HeadsRow]) -> Group:
    """The rows of ``subspan bench heads`` for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("mode", no_wrap=True)
    for column in ("heads", "rank", "trained", "of full", "ms", "of full", "merges", "state MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.iteration is None or row.with_merges is None or row.milliseconds is None:
            continue
        table.add_row(
            row.mode,
            _or_dash(row.heads, "d"),
            _or_dash(row.rank, "d"),
            f"{row.trained:,}",
            f"{row.trained / rows[0].trained:.1%}",
            f"{row.milliseconds:,.1f}",
            f"{row.iteration:.3f}",
            "-" if row.merge is None else f"+{row.with_merges - row.iteration:.3f}",
            "-" if row.state_bytes is None else f"{row.state_bytes / 1e6:,.1f}",
        )
    missing = [
        f"{row.mode}, {row.heads} heads of rank {row.rank}: not measured, {row.reason}" for row in rows if row.reason
    ]
    return Group(table, *(Text(line, style="dim") for line in missing))


def layers_table(rows: Sequence[LayersRow]) -> Table:
    """The rows of ``subspan bench layers`` for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("layers")
    for column in ("trained", "of full", "test loss", "perplexity", "ms a step", "state bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    full = next((row.trained for row in rows if row.layers == "full"), None)
    for row in rows:
        share = row.trained / full if row.trained is not None and full else None
        table.add_row(
            row.layers,
            _or_dash(row.trained, ","),
            _or_dash(share, ".1%"),
            "diverged" if row.loss is None else f"{row.loss:.4f}",
            _or_dash(row.perplexity, ".2f"),
            _or_dash(row.milliseconds, ",.1f"),
            _or_dash(row.state_bytes, ","),
        )
    return table


def rows_as_record(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows as values that JSON can hold, without what there is no figure for."""
    return [{k: value for k, value in dataclasses.asdict(row).items() if value is not None} for row in rows]


def rows_as_csv(rows: Sequence[Any]) -> str:
    """Rows, which are of one dataclass, as CSV with their fields for columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def say_picture(console: Console, draw: Callable[[Path], bool], path: Path) -> None:
    """Draw a picture where matplotlib is installed, and say where it is."""
    try:
        if draw(path):
            console.print(f"Picture: {path}", markup=False, soft_wrap=True, highlight=False)
    except ModuleNotFoundError as error:
        console.print(f"No picture ({error}): it needs pip install 'subspan\\[report]'.", soft_wrap=True)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
