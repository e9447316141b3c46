"""The list of a checkpoint's files with their sizes and checksums, and the check against it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

__all__ = ["MANIFEST", "SCHEMA", "FileEntry", "Manifest", "Report", "digest_file", "listed_files", "verify"]

MANIFEST = "manifest.json"
#: Version of the folder's layout; a newer one is refused.
SCHEMA = 1
_FORMAT = "subspan checkpoint"
_STEP = re.compile(r"checkpoint-(\d+)")


class FileEntry(NamedTuple):
    """Size of a file in bytes, and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Args:
        files: path in the folder, with ``/``, -> size and checksum.
        layout: ``single`` (model.safetensors, optimizer.safetensors) or ``sharded`` (a file from each process).
        step: optimizer steps taken, where known.
        eval_loss: loss on held-out data at this step, where there was an evaluation.
    """

    files: dict[str, FileEntry]
    layout: str = "single"
    step: int | None = None
    eval_loss: float | None = None

    def to_json(self) -> str:
        """The content of the file; it carries a checksum of itself."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "schema": SCHEMA,
            "layout": self.layout,
            "step": self.step,
            "eval_loss": self.eval_loss if self.eval_loss is None or math.isfinite(self.eval_loss) else None,
            "files": {name: entry._asdict() for name, entry in sorted(self.files.items())},
        }
        return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        folder: the checkpoint.
        problems: what is wrong, one line each; none where it is whole.
        manifest: None where it cannot be read.
    """

    folder: Path
    problems: tuple[str, ...]
    manifest: Manifest | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is whole and unchanged."""
        return not self.problems

    def raise_if_bad(self) -> Manifest:
        """Return the manifest.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the checkpoint is not whole; the message names the files.
        """
        if self.problems:
            kind = ValueError if self.folder.is_dir() else FileNotFoundError
            raise kind(
                f"{self.folder} is no whole checkpoint: {'; '.join(self.problems)}. Choose another one; "
                f"`subspan checkpoint verify {self.folder.parent}` says which are whole."
            )
        assert self.manifest is not None
        return self.manifest


def verify(folder: str | Path, *, files: Iterable[str] | None = None) -> Report:
    """Check that a checkpoint is as it was written: every file there, with its size and its SHA-256.

    Other files in the folder are no fault, since nothing reads them, but for further ``.safetensors``, which would be
    taken for parts of the checkpoint, and ``adapter_config.json``, at which transformers loads another model.

    Args:
        folder: of the checkpoint.
        files: check the sums of these alone (default: all); that all are there, with their sizes, is checked anyway.

    Returns:
        The report; it raises nothing.

    Example:
        >>> import tempfile, torch
        >>> from subspan.checkpoint import save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(f"{folder}/checkpoint-1", torch.nn.Linear(2, 2))
        ...     whole = verify(path).ok
        ...     (path / "extra.json").unlink()
        ...     whole, verify(path).problems
        (True, ('extra.json is missing',))
    """
    folder = Path(folder)
    try:
        manifest = _read(folder)
    except (OSError, ValueError) as error:
        return Report(folder, (str(error),))
    problems = []
    wanted = None if files is None else set(files)
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif (size := path.stat().st_size) != entry.bytes:
                problems.append(f"{name} has {size} bytes, not {entry.bytes}")
            elif (wanted is None or name in wanted) and digest_file(path) != entry.sha256:
                problems.append(f"{name} is not what was written (its SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    # Only the folder itself is searched for parts.
    problems += [
        f"{path.name} does not belong to it"
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")])
        if path.name not in manifest.files
    ]
    match = _STEP.fullmatch(folder.name)
    if match and manifest.step is not None and int(match[1]) != manifest.step:
        problems.append(f"it holds step {manifest.step} and not the one in its name")
    return Report(folder, tuple(problems), manifest)


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    if not path.is_file() and any(_STEP.fullmatch(inside.name) for inside in folder.iterdir()):
        raise ValueError("it is a run, of which one checkpoint is wanted")
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}: its writing was broken off, or another program wrote it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError("another kind of file")
        schema = content.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            newer = schema
        else:
            newer = None
            claimed = content.pop("sha256", None)
            if _digest(content) != claimed:
                raise ValueError("its own checksum differs")
            files = {name: FileEntry(int(f["bytes"]), str(f["sha256"])) for name, f in content["files"].items()}
            step, loss = content["step"], content["eval_loss"]
            if not (step is None or isinstance(step, int)) or not (loss is None or math.isfinite(loss)):
                raise ValueError(f"step={step!r} and eval_loss={loss!r} are not a number each")
            manifest = Manifest(files, str(content["layout"]), step, loss)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{MANIFEST} cannot be used: {error}") from error
    if newer is not None:
        raise ValueError(f"it has format {newer}, newer than {SCHEMA}; update subspan")
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{MANIFEST} names {name!r}, which is outside of the folder")
    return manifest


def digest_file(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file; with ``sync`` it is on the disk when this returns."""
    # To sync, some systems want a file that may be written to.
    digest = hashlib.sha256()
    with open(path, "rb+" if sync else "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def listed_files(folder: Path) -> list[str]:
    """Paths of the files in a folder and below, with ``/``, sorted, without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)
