"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from subspan.checkpoint.manifest import MANIFEST, FileEntry, Manifest, digest_file, listed_files

__all__ = ["STAGING", "CheckpointWriteError", "Staged", "processes", "remove", "restore", "staged"]

#: Folder beside the checkpoints in which they are written; nothing is ever loaded from it.
STAGING = ".incomplete"
_REPLACED = ".replaced"
_NAME = re.compile(r"checkpoint-\d+")
T = TypeVar("T")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Staged:
    """A checkpoint that is being written.

    Args:
        folder: where its files go.
        step, eval_loss, layout: for the manifest; they may be set until it is written.
    """

    def __init__(self, folder: Path, step: int | None = None, eval_loss: float | None = None) -> None:
        self.folder = folder
        self.step = step
        self.eval_loss = eval_loss
        self.layout = "single"


def processes() -> int:
    """Number of processes that belong together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def staged(target: Path, *, step: int | None = None, together: bool = False) -> Iterator[Staged]:
    """A folder to write a checkpoint into; when the block ends it is complete, synced and named ``target``.

    The folder stands in `STAGING` beside ``target``. Its manifest is written last, after every file is on the disk; a
    checkpoint of the same name is replaced by renaming. When anything goes wrong nothing else is touched.

    Args:
        target: folder that the checkpoint becomes.
        step: for the manifest.
        together: every process of the default group takes part and writes its own files; all see the same folder.

    Raises:
        CheckpointWriteError: a full disk, a folder that may not be written to; with ``together`` in all processes.
        ValueError: ``target`` is a file, or a folder of something else than a checkpoint.
    """
    target = Path(target)
    leads = not together or dist.get_rank() == 0
    job = Staged(target.parent / STAGING / target.name, step)
    with _agreed(target, job, together):
        if leads:
            restore(target.parent)
            _check_replaceable(target)
            shutil.rmtree(job.folder, ignore_errors=True)
            job.folder.mkdir(parents=True)
    with _agreed(target, job, together):
        yield job
    entries: dict[str, FileEntry] = {}
    names = _shared(listed_files(job.folder) if leads else [], together)[0]
    with _agreed(target, job, together):
        share = names[dist.get_rank() :: dist.get_world_size()] if together else names
        for name in share:
            digest = digest_file(job.folder / name, sync=True)
            entries[name] = FileEntry((job.folder / name).stat().st_size, digest)
    files = {name: entry for part in _shared(entries, together) for name, entry in part.items()}
    with _agreed(target, job, together):
        if leads:
            _publish(job, Manifest(files, job.layout, job.step, job.eval_loss), target)


def _publish(job: Staged, manifest: Manifest, target: Path) -> None:
    (job.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    digest_file(job.folder / MANIFEST, sync=True)
    for folder in {job.folder, *((job.folder / name).parent for name in manifest.files)}:
        _sync_folder(folder)
    before = target.with_name(target.name + _REPLACED)
    while True:
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.rename(target, before)
        try:
            os.rename(job.folder, target)
            break
        except OSError:
            # Another process that looked in between gave the one before its name back.
            if not target.exists():
                restore(target.parent)
                raise
    _sync_folder(target.parent)
    with contextlib.suppress(FileNotFoundError):  # as above
        if before.exists():
            remove(before)
    _discard(job.folder)


def _is_checkpoint(folder: Path, name: str) -> bool:
    """Whether a folder is a checkpoint, whole or not, by its name or its manifest, and none of a run's."""
    if not folder.is_dir() or any(_NAME.fullmatch(path.name) for path in folder.iterdir()):
        return False
    return _NAME.fullmatch(name) is not None or (folder / MANIFEST).is_file()


def _check_replaceable(target: Path) -> None:
    if target.exists() and not _is_checkpoint(target, target.name) and (target.is_file() or any(target.iterdir())):
        raise ValueError(
            f"{target} exists and is no checkpoint, so it is not replaced; choose another name, such as "
            f"{target / 'checkpoint-STEP'}."
        )


def restore(run: Path) -> None:
    """Give back its name to a checkpoint that was about to be replaced when the process was killed."""
    for before in run.glob(f"*{_REPLACED}"):
        target = before.with_name(before.name.removesuffix(_REPLACED))
        if not _is_checkpoint(before, target.name):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if target.exists():
                remove(before)
            else:
                os.rename(before, target)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it is out of sight before its first file goes."""
    away = folder.parent / STAGING / f"{folder.name}.old"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    os.rename(folder, away)
    _discard(away)


def _discard(folder: Path) -> None:
    """Delete a folder in `STAGING`, and that as well where it was the only one."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # which opens no folders
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _shared(value: T, together: bool) -> list[T]:
    """What each process gives, in their order."""
    if not together:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def _agreed(target: Path, job: Staged, together: bool) -> Iterator[None]:
    """Run the block in every process, and go on only when it succeeded in all."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures = _shared(None if own is None else str(own), together)
    failed = next((rank for rank, message in enumerate(failures) if message is not None), None)
    if failed is None:
        return
    written, free = _bytes(job.folder), _free(target.parent)
    _shared(None, together)  # every process has looked before the folder goes
    if not together or dist.get_rank() == 0:
        _discard(job.folder)
    if own is not None and not isinstance(own, OSError | SafetensorError):
        raise own
    who = f" by process {failed}" if together else ""
    raise CheckpointWriteError(
        f"{target} could not be written{who}: {failures[failed]} ({written:,} bytes were written, {free} are free). "
        "Checkpoints before it are as they were: free some space, or let the folder be written to, and go on from them."
    ) from own


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "unknown"
