"""Checkpoints in another form: of another method or rank, in one file in place of parts, or from another package."""

from __future__ import annotations

import dataclasses
import fnmatch
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from subspan.checkpoint import CheckpointWriteError, read_optimizer, staged, verify, write_optimizer
from subspan.checkpoint.foreign import foreign_optimizer
from subspan.checkpoint.load import load_weights, read_document
from subspan.checkpoint.plain import read_plain, write_plain
from subspan.checkpoint.save import MODEL, OPTIMIZER, OPTIMIZER_JSON, TIED
from subspan.checkpoint.tensors import empty_like, held_tensors, read_tensors, write_whole
from subspan.train.config import read_config
from subspan.train.optimizer import build_optimizer, resolve
from subspan.train.presets import build_model

__all__ = ["carry_over", "import_foreign", "to_single_file"]

#: Files that say where a run is; what starts another run has none.
_POSITION = ("scheduler.json", "rng_state_*.json", "progress.json", "trainer_state.json")


def to_single_file(source: Path, target: Path) -> None:
    """Write a checkpoint whose parts several processes wrote as one that is in one file each.

    Either kind can be loaded by any number of processes; this one is a model that transformers loads.

    Raises:
        FileExistsError: ``target`` exists.
        ValueError: ``source`` is not whole.
    """
    manifest = verify(source).raise_if_bad()
    _check_free(target)
    held = held_tensors(source)
    tied = read_plain(source / TIED) if (source / TIED).is_file() else {}
    with staged(target, step=manifest.step) as job:
        job.eval_loss = manifest.eval_loss
        tensors = read_tensors(source, {name: empty_like(entry, None) for name, entry in held.items()})
        state = {name: tensor for name, tensor in tensors.items() if "/" in name}
        weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
        # What the checkpoint has beside: transformers looks for tied weights under one of their names.
        _copy(source, job.folder, manifest.files, without=("*.safetensors",))
        write_whole(job.folder / MODEL, weights)
        if state:
            write_whole(job.folder / OPTIMIZER, state)
        if tied:
            write_plain(job.folder / TIED, tied)


def carry_over(source: Path, target: Path, method: str | None, rank: int | None) -> None:
    """Write a checkpoint of a run with its optimizer's state taken over by another method or rank.

    The settings are those of the run, in ``config.yaml`` beside the checkpoint, but for the method and the rank; with
    another method its own settings are the defaults. A run starts from the result with ``--carry_over``.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: there is no ``config.yaml``.
        ValueError: ``source`` is not whole, or a method or a rank that cannot be.
    """
    manifest = verify(source).raise_if_bad()
    _check_free(target)
    settings = source.resolve().parent / "config.yaml"
    if not settings.is_file():
        raise FileNotFoundError(
            f"{settings} is missing, which tells how the optimizer of the run was built. In a loop of your own call "
            "load_checkpoint(folder, model, optimizer, carry_over=True) with the new optimizer."
        )
    config = read_config(settings)
    config = dataclasses.replace(config, rank=rank if rank is not None else config.rank, gradient="full")
    if method is not None and method != config.method:
        config = dataclasses.replace(config, method=method, optimizer={}, lr=None, rank=rank, weight_storage="float")
    model = build_model(str(source if manifest.layout == "single" else source / "config.json"), seq_len=config.seq_len)
    if manifest.layout == "sharded":
        load_weights(source, model)
    config = resolve(config, int(model.config.get_text_config().hidden_size))
    optimizer = build_optimizer(model, dataclasses.replace(config, share_inputs=False))
    read_optimizer(source, optimizer, model, carry_over=True)
    with staged(target, step=manifest.step) as job:
        job.eval_loss = manifest.eval_loss
        kept = (*_POSITION, OPTIMIZER, OPTIMIZER_JSON, *(("*.safetensors",) if manifest.layout == "sharded" else ()))
        _copy(source, job.folder, manifest.files, without=kept)
        if manifest.layout == "sharded":
            model.save_pretrained(job.folder)
        write_optimizer(job.folder, optimizer, model)


def import_foreign(file: Path, target: Path, package: str, model: str, target_modules: str) -> None:
    """Write a checkpoint from the state of an optimizer of another package and its model.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError, ValueError: see `subspan.checkpoint.foreign.foreign_optimizer`.
    """
    _check_free(target)
    network: PreTrainedModel = build_model(model)
    optimizer = foreign_optimizer(file, package, network, target_modules)
    with staged(target) as job:
        network.save_pretrained(job.folder)
        write_optimizer(job.folder, optimizer, network)
    read_document(target)


def _copy(source: Path, target: Path, names: object, without: tuple[str, ...]) -> None:
    for name in list(names):  # type: ignore[call-overload]
        if not any(fnmatch.fnmatch(name, pattern) for pattern in without):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _check_free(target: Path) -> None:
    if target.exists():
        raise CheckpointWriteError(f"{target} exists already; choose another folder for what is converted.")
