"""Checkpoints in another form: of another method or rank, or from another package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedModel

from subspan.checkpoint import read_optimizer, staged, verify, write_optimizer
from subspan.checkpoint.foreign import foreign_optimizer
from subspan.checkpoint.load import load_weights
from subspan.checkpoint.save import LOW_RANK_JSON, OPTIMIZER, OPTIMIZER_JSON
from subspan.checkpoint.single import check_free, copy_files
from subspan.train.config import read_config
from subspan.train.optimizer import build_optimizer, resolve
from subspan.train.presets import MERGE_FIRST, build_model

__all__ = ["carry_over", "import_foreign"]

#: Files that say where a run is; what starts another run has none.
_POSITION = ("scheduler.json", "rng_state_*.json", "progress.json", "trainer_state.json")


def carry_over(source: Path, target: Path, method: str | None, rank: int | None) -> None:
    """Write a checkpoint of a run with its optimizer's state taken over by another method or rank.

    The settings are those of the run, in ``config.yaml`` beside the checkpoint, but for the method and the rank; with
    another method its own settings are the defaults. A run starts from the result with ``--carry_over``.

    Raises:
        CheckpointWriteError: ``target`` exists, or cannot be written.
        FileNotFoundError: there is no ``config.yaml``.
        ValueError: ``source`` is not whole or has weights of low rank, or a method or a rank that cannot be.
    """
    manifest = verify(source).raise_if_bad()
    check_free(target, manifest.step)
    if LOW_RANK_JSON in manifest.files:
        raise ValueError(f"{str(source)!r} holds a model with weights of low rank or adapters: {MERGE_FIRST}.")
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
        copy_files(source, job.folder, manifest, without=kept)
        if manifest.layout == "sharded":
            model.save_pretrained(job.folder)
        write_optimizer(job.folder, optimizer, model)


def import_foreign(file: Path, target: Path, package: str, model: str, target_modules: str) -> None:
    """Write a checkpoint from the state of an optimizer of another package and its model.

    Raises:
        CheckpointWriteError: ``target`` exists, or cannot be written.
        FileNotFoundError, ValueError: see `subspan.checkpoint.foreign.foreign_optimizer`.
    """
    check_free(target)
    network: PreTrainedModel = build_model(model, seq_len=2)  # it is not trained here
    optimizer = foreign_optimizer(file, package, network, target_modules)
    with staged(target) as job:
        network.save_pretrained(job.folder)
        write_optimizer(job.folder, optimizer, network)
