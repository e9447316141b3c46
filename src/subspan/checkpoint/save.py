"""Write checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from subspan.checkpoint.plain import to_plain, write_plain
from subspan.checkpoint.staging import processes, staged
from subspan.checkpoint.states import is_sharded, model_tensors, optimizer_document, state_names
from subspan.checkpoint.tensors import write_sharded, write_whole

__all__ = [
    "EXTRA",
    "LOW_RANK",
    "LOW_RANK_JSON",
    "MODEL",
    "OPTIMIZER",
    "OPTIMIZER_JSON",
    "TIED",
    "save_checkpoint",
    "write_optimizer",
    "write_parts",
]

MODEL = "model.safetensors"
#: In place of it a model whose weights are of low rank, and what says which they are.
LOW_RANK, LOW_RANK_JSON = "low_rank.safetensors", "low_rank.json"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_JSON = "optimizer.json"
EXTRA = "extra.json"
#: Names in the model that stand for a tensor that is saved under another one.
TIED = "tied.json"


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: dict[str, Any] | None = None,
    eval_loss: float | None = None,
) -> Path:
    """Write a model, its optimizer and what else a training loop needs, all or nothing.

    The folder appears under its name when everything is on the disk, with the SHA-256 of each file in its manifest;
    until then one of the same name stays. Tensors are written as safetensors, all else as JSON. A state that is divided
    over processes (DTensors, as of ``fully_shard``) is written by all of them, each its own parts: every process calls
    this, on a file system that they share. Otherwise process 0 writes, and the others do nothing.

    Args:
        folder: of the checkpoint; `latest` finds those called ``checkpoint-STEP``.
        model: its ``state_dict()`` is saved.
        optimizer: any `torch.optim.Optimizer` whose state is made of tensors and plain values.
        extra: plain values and small tensors that `load_checkpoint` is to return, such as ``{"rng":
            torch.get_rng_state(), "scheduler": scheduler.state_dict()}``.
        eval_loss: loss on held-out data at this step; `rotate` keeps the checkpoint with the lowest.

    Returns:
        The folder.

    Raises:
        CheckpointWriteError: a full disk, or a folder that may not be written to; earlier checkpoints are unharmed.
        ValueError: something in ``extra`` or in a state that is neither a tensor nor a plain value.

    Example:
        >>> import tempfile
        >>> from subspan.checkpoint import load_checkpoint
        >>> from subspan.optim import GaLore
        >>> model = nn.Linear(16, 8)
        >>> optimizer = GaLore(model, rank=2)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     path = save_checkpoint(f"{run}/checkpoint-10", model, optimizer, extra={"epoch": 1})
        ...     load_checkpoint(path, model, optimizer)
        {'epoch': 1}
    """
    target = Path(folder)
    tensors, tied = model_tensors(model)
    together = is_sharded(tensors)
    to_plain(extra, "extra")
    if not together and processes() > 1 and dist.get_rank() != 0:
        return target
    match = re.fullmatch(r".*?-(\d+)", target.name)
    with staged(target, step=int(match[1]) if match else None, together=together) as job:
        job.eval_loss = eval_loss
        if together:
            job.layout = "sharded"
            write_parts(job.folder, model, optimizer)
        else:
            write_whole(job.folder / MODEL, tensors)
            if tied:
                write_plain(job.folder / TIED, tied)
            if optimizer is not None:
                write_optimizer(job.folder, optimizer, model)
        if not together or dist.get_rank() == 0:
            write_plain(job.folder / EXTRA, extra)
    return target


def write_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Write what each process holds of a model and its optimizer into a folder, as `save_checkpoint` does."""
    tensors, tied = model_tensors(model)
    document = None
    if optimizer is not None:
        document, state = optimizer_document(optimizer, state_names(optimizer, model))
        tensors |= state
    write_sharded(folder, tensors)
    if dist.get_rank() == 0:
        if tied:
            write_plain(folder / TIED, tied)
        if document is not None:
            write_plain(folder / OPTIMIZER_JSON, document)


def write_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> None:
    """Write the state of an optimizer that is not divided into a folder, as `save_checkpoint` does."""
    document, state = optimizer_document(optimizer, state_names(optimizer, model))
    write_whole(folder / OPTIMIZER, state)
    write_plain(folder / OPTIMIZER_JSON, document)
