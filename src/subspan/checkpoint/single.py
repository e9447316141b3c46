"""Parts that several processes wrote, as single files."""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path

from subspan.checkpoint.manifest import Manifest, verify
from subspan.checkpoint.save import LOW_RANK, LOW_RANK_JSON, MODEL, OPTIMIZER
from subspan.checkpoint.staging import CheckpointWriteError, staged
from subspan.checkpoint.tensors import empty_like, held_tensors, read_tensors, write_whole

__all__ = ["check_free", "copy_files", "to_single_file"]


def to_single_file(source: Path, target: Path) -> None:
    """Write a checkpoint whose parts several processes wrote as one that is in one file each.

    Either kind can be loaded by any number of processes; this one is a model that transformers loads, unless its
    weights are of low rank.

    Raises:
        CheckpointWriteError: ``target`` exists, or cannot be written.
        ValueError: ``source`` is not whole.
    """
    manifest = verify(source).raise_if_bad()
    check_free(target, manifest.step)
    held = held_tensors(source)
    with staged(target, step=manifest.step) as job:
        job.eval_loss = manifest.eval_loss
        tensors = read_tensors(source, {name: empty_like(entry, None) for name, entry in held.items()})
        state = {name: tensor for name, tensor in tensors.items() if "/" in name}
        weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
        copy_files(source, job.folder, manifest, without=("*.safetensors",))
        write_whole(job.folder / (LOW_RANK if LOW_RANK_JSON in manifest.files else MODEL), weights)
        if state:
            write_whole(job.folder / OPTIMIZER, state)


def copy_files(source: Path, target: Path, manifest: Manifest, without: tuple[str, ...]) -> None:
    """Copy the files of a checkpoint into a folder, but for those that match a pattern."""
    for name in manifest.files:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in without):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def check_free(target: Path, step: int | None = None) -> None:
    """Refuse to write over anything, or a checkpoint of one step under the name of another.

    Raises:
        CheckpointWriteError: ``target`` exists.
        ValueError: ``target`` is the name of another step.
    """
    match = re.fullmatch(r"checkpoint-(\d+)", target.name)
    if match and step is not None and int(match[1]) != step:
        raise ValueError(f"{target} is the name of step {match[1]} and this is step {step}; choose another name.")
    if target.exists():
        raise CheckpointWriteError(f"{target} exists already; choose another folder for what is converted.")
