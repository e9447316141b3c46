"""The table of what is projected."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterRow:
    """One parameter as the optimizer treats it.

    Args:
        rank: the rank in force; None when the parameter is dense.
        at_most: whether ``rank`` is the most there can be, because the first gradient will decide.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    side: str
    lr: float
    weight_decay: float
    trainable: bool
    state_bytes: int
    at_most: bool = False

    @property
    def rank_text(self) -> str:
        """The rank, for people."""
        return "dense" if self.rank is None else f"{'≤ ' if self.at_most else ''}{self.rank}"


def alike(rows: list[ParameterRow]) -> list[tuple[str, list[ParameterRow]]]:
    """Rows that differ in nothing but a number within their name (layers) together, with ``*`` for that number."""
    merged: dict[tuple[object, ...], list[ParameterRow]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        key = (pattern, row.shape, row.rank, row.side, row.lr, row.weight_decay, row.trainable)
        merged.setdefault(key, []).append(row)
    return [(str(key[0]), same) for key, same in merged.items()]


def format_table(rows: list[ParameterRow], method: str) -> str:
    """Rows as text, parameters that differ only in a number within their name (layers) on one line."""
    header = ("parameter", "count", "shape", "rank", "side", "lr", "decay", "state")
    lines = [header]
    for pattern, same in alike(rows):
        row = same[0]
        lines.append(
            (
                pattern,
                str(len(same)),
                "×".join(map(str, row.shape)) or "scalar",
                row.rank_text if row.trainable else "frozen",
                row.side,
                f"{row.lr:.3g}",
                f"{row.weight_decay:.3g}",
                format_bytes(sum(other.state_bytes for other in same)),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left_aligned = (0, 4)
    text = [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    projected = sum(1 for row in rows if row.rank is not None and row.trainable)
    total = format_bytes(sum(row.state_bytes for row in rows))
    return "\n".join([*text, f"{method}: {projected} of {len(rows)} tensors projected, optimizer state {total}"])


def format_bytes(count: int) -> str:
    """Bytes with a binary unit.

    >>> format_bytes(3 * 2**20)
    '3.00 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
