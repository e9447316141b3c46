"""What a checkpoint holds, from its headers: nothing is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from subspan.checkpoint.load import read_document
from subspan.checkpoint.manifest import Report, verify
from subspan.checkpoint.runs import best, checkpoints
from subspan.checkpoint.save import OPTIMIZER_JSON
from subspan.checkpoint.tensors import Held, held_tensors

__all__ = ["describe", "reports"]


def reports(path: str | Path) -> list[Report]:
    """Check a checkpoint, or all of a run, the oldest first.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a checkpoint, or a run with folders called checkpoint-STEP")
    inside = checkpoints(path)
    if not inside and not (path / "manifest.json").exists() and not (path / OPTIMIZER_JSON).exists():
        raise FileNotFoundError(f"{path} is no checkpoint, and has no folders called checkpoint-STEP")
    return [verify(folder) for _, folder in inside] or [verify(path)]


def describe(report: Report) -> dict[str, Any]:
    """A checkpoint as plain values: its state, its optimizer and its tensors, as far as they can be read.

    Args:
        report: what `verify` found.

    Returns:
        ``folder, ok, problems, best``; with a manifest ``layout, step, eval_loss, bytes, files``; of a whole one
        ``parameters`` (name, shape, dtype, bytes, state) and, with an optimizer, ``optimizer, method, parts, seed,
        groups``.
    """
    content: dict[str, Any] = {
        "folder": str(report.folder),
        "ok": report.ok,
        "problems": list(report.problems),
        "best": best(report.folder.parent) == report.folder,
    }
    if report.manifest is not None:
        manifest = report.manifest
        content |= {"layout": manifest.layout, "step": manifest.step, "eval_loss": manifest.eval_loss}
        content["bytes"] = sum(entry.bytes for entry in manifest.files.values())
        content["files"] = {name: entry.bytes for name, entry in manifest.files.items()}
    if not report.ok:
        return content
    held = held_tensors(report.folder)
    states: dict[str, dict[str, Any]] = {}
    for key, entry in held.items():
        name, slash, own = key.rpartition("/")
        if slash:
            states.setdefault(name, {})[own] = _tensor(entry)
    names = list(dict.fromkeys([name for name in held if "/" not in name] + list(states)))
    parameters = [{"name": name, **(_tensor(held[name]) if name in held else {})} for name in names]
    content["parameters"] = [{**entry, "state": states.get(str(entry["name"]), {})} for entry in parameters]
    if (report.folder / OPTIMIZER_JSON).is_file():
        document = read_document(report.folder)
        origin = document["origin"] or {}
        content["optimizer"] = document["optimizer"]
        content |= {key: origin.get(key) for key in ("method", "parts", "seed")}
        content["groups"] = [
            {"parameters": len(group["params"]), **{key: _shown(value) for key, value in group["settings"].items()}}
            for group in document["groups"]
        ]
    return content


def _tensor(held: Held) -> dict[str, Any]:
    size = math.prod(held.shape) * held.dtype.itemsize
    return {"shape": list(held.shape), "dtype": str(held.dtype).removeprefix("torch."), "bytes": size}


def _shown(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
