"""Checkpoints as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["show_checkpoint", "show_checkpoints"]


def show_checkpoints(console: Console, described: list[dict[str, Any]]) -> None:
    """Print a line for each checkpoint."""
    table = Table("checkpoint", "step", "method", "rank", "eval loss", "bytes", "layout", "state", box=None)
    table.header_style = "bold"
    table.columns[0].overflow = "fold"  # its end is what tells them apart
    for entry in described:
        loss = entry.get("eval_loss")
        state = "[green]whole[/]" if entry["ok"] else f"[red]{_safe('; '.join(entry['problems']))}[/]"
        table.add_row(
            _safe(entry["folder"]),
            str(entry.get("step", "")),
            _safe(str(entry.get("method") or entry.get("optimizer") or "-")),
            _ranks(entry),
            "" if loss is None else f"{loss:.4f}{' (best)' if entry['best'] else ''}",
            f"{entry.get('bytes', 0):,}",
            _safe(str(entry.get("layout", ""))),
            state,
        )
    console.print(table)


def show_checkpoint(console: Console, entry: dict[str, Any]) -> None:
    """Print what one checkpoint holds."""
    show_checkpoints(console, [entry])
    if not entry["ok"]:
        return
    files = Table("file", "bytes", box=None, header_style="bold")
    for name, size in entry["files"].items():
        files.add_row(_safe(name), f"{size:,}")
    table = Table("parameter", "shape", "state", "state bytes", box=None, header_style="bold")
    for parameter in entry["parameters"]:
        state = parameter["state"]
        shown = [f"{key} {_size(value)}" for key, value in state.items() if value["shape"]]
        table.add_row(
            _safe(parameter["name"]),
            _size(parameter) if "shape" in parameter else "",
            _safe(", ".join(shown)),
            f"{sum(value['bytes'] for value in state.values()):,}",
        )
    for part in (files, table):
        console.print()
        console.print(part)
    if entry.get("parts"):
        console.print()
        parts = ", ".join(str(part) for part in entry["parts"].values() if part != "None")
        console.print(_safe(f"{entry['optimizer']}: {parts}, seed {entry['seed']}"), highlight=False)
    for group in entry.get("groups", []):
        settings = ", ".join(f"{key}={value}" for key, value in group.items() if value is not None)
        console.print(_safe(settings), highlight=False)


def _safe(text: str) -> str:
    """Text from a file without markup, and with what would steer the terminal written out."""
    return escape("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def _size(tensor: dict[str, Any]) -> str:
    shape = "×".join(str(length) for length in tensor["shape"])
    return shape if tensor["dtype"] == "float32" else f"{shape} {tensor['dtype']}"


def _ranks(entry: dict[str, Any]) -> str:
    ranks = sorted({str(group["rank"]) for group in entry.get("groups", []) if group.get("rank") is not None})
    return ", ".join(ranks)
