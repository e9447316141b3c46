"""The measurements of subspaces as a table, as values for JSON and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from subspan.analysis.subspace_bench import MatrixResult, Measurement

__all__ = ["as_csv", "as_record", "as_table"]


def as_table(result: MatrixResult) -> Group:
    """One matrix for the terminal: its table, then what was not measured."""
    if result.reason is not None:
        return Group(Text(f"{result.matrix}: not measured, {result.reason}", style="dim"))
    assert result.shape and result.optimum is not None and result.unit_milliseconds is not None
    heading = (
        f"{result.matrix}: rank {result.rank} of {min(result.shape)}, optimum {result.optimum:.4f} of ‖A‖, "
        f"unit {_short(result.unit_milliseconds)} ms"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    for column in ("units", "ms", "energy", "lost", "rank", "‖QᵀQ − I‖"):
        table.add_column(column, justify="right", no_wrap=True)
    for method in result.methods:
        if method.units is None or method.milliseconds is None or method.energy is None:
            continue
        table.add_row(
            method.method,
            _short(method.units),
            _short(method.milliseconds),
            f"{method.energy:.4f}",
            f"{max(1 - method.energy, 0):.0e}",
            str(method.rank),
            f"{method.orthogonality:.0e}",
        )
    missing = [f"{method.method}: {method.reason}" for method in result.methods if method.reason is not None]
    return Group(Text(heading, style="bold"), table, *(Text(line, style="dim") for line in missing), "")


def as_record(results: Sequence[MatrixResult]) -> list[dict[str, Any]]:
    """The measurements as values that JSON can hold, without what there is no figure for."""
    return [dataclasses.asdict(result, dict_factory=_present) for result in results]


def as_csv(results: Sequence[MatrixResult]) -> str:
    """One line for every matrix and method; a matrix that was not measured has one line."""
    columns = [field.name for field in dataclasses.fields(Measurement)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["matrix", "m", "n", *columns], lineterminator="\n")
    writer.writeheader()
    for result in results:
        m, n = result.shape or (None, None)
        matrix = {"matrix": result.matrix, "m": m, "n": n}
        if result.reason is not None:
            writer.writerow(matrix | {"reason": result.reason})
        writer.writerows(matrix | dataclasses.asdict(method) for method in result.methods)
    return text.getvalue()


def _short(value: float) -> str:
    """Three digits or more: 0.123, 4.57, 123."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _present(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None}
