"""The checkpoints of a run: the newest, the best, and which are kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from subspan.checkpoint.manifest import verify
from subspan.checkpoint.staging import remove, restore

__all__ = ["best", "checkpoints", "latest", "rotate"]

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(run: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of all folders called ``checkpoint-STEP``, oldest step first, whole or not."""
    run = Path(run)
    found = run.iterdir() if run.is_dir() else iter(())
    return sorted((int(match[1]), path) for path in found if (match := _NAME.fullmatch(path.name)) and path.is_dir())


def latest(run: str | Path, *, skipped: Callable[[str], object] | None = None) -> Path | None:
    """The newest checkpoint of a run that is whole, every file checked.

    Args:
        run: folder with folders called ``checkpoint-STEP``.
        skipped: called with a message for each newer one that is corrupt, half-written, of a newer format or of another
            program (default: `warnings.warn`).

    Returns:
        Its folder, or None where there is none.

    Example:
        >>> latest("no/such/run") is None
        True
    """
    run = Path(run)
    if run.is_dir():
        restore(run)
    for _, path in reversed(checkpoints(run)):
        report = verify(path)
        if report.ok:
            return path
        (skipped or warnings.warn)(f"{path} is passed over: {'; '.join(report.problems)}")
    return None


def best(run: str | Path) -> Path | None:
    """The checkpoint with the lowest loss on held-out data, among those whose manifest tells one; the newest of equals.

    Their files are looked for, their checksums not compared.
    """
    losses = []
    for step, path in checkpoints(run):
        report = verify(path, files=())
        if report.ok and report.manifest is not None and report.manifest.eval_loss is not None:
            losses.append((report.manifest.eval_loss, -step, path))
    return min(losses)[2] if losses else None


def rotate(run: str | Path, keep: int, *, written: Path | None = None) -> list[Path]:
    """Delete all checkpoints of a run but the newest ``keep``, the best one and ``written``.

    Those that lack files or have some of another size do not count as kept; newer ones of that kind stay as they are.

    Returns:
        The folders that are gone.

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} is not allowed; it must be at least 1")
    spared = {best(run), None if written is None else Path(written)}
    found = [path for _, path in checkpoints(run)]
    whole = [number for number, path in enumerate(found) if verify(path, files=()).ok]
    gone = [path for path in found[: whole[-keep]] if path not in spared] if len(whole) > keep else []
    for path in gone:
        remove(path)
    return gone
