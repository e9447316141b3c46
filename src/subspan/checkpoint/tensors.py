"""Tensors in safetensors files, whole ones and parts that several processes hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from subspan.checkpoint.states import is_sharded

__all__ = ["Held", "held_tensors", "read_tensors", "write_sharded", "write_whole"]


class Held(NamedTuple):
    """Shape and dtype of a tensor that a checkpoint holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors into one safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the parts that this process holds; every process calls it, and none sees more than its parts.

    Each file is a safetensors file whose header says where in the whole tensors its parts belong, so that there is no
    index, and none in the form of a pickle.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save({name: tensor.contiguous() for name, tensor in tensors.items()}, storage_writer=writer)
    except dcp.CheckpointException as error:  # every process gets it, and it is no Exception
        if dist.get_rank() in error.failures:
            raise error.failures[dist.get_rank()][0] from error


def held_tensors(folder: Path) -> dict[str, Held]:
    """Shapes and dtypes of all tensors in the safetensors files of a folder, from their headers.

    Raises:
        ValueError: a file that cannot be read.
    """
    try:
        found: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds a safetensors file that cannot be read: {error}") from error
    return {name: Held(tuple(entry.size), entry.properties.dtype) for name, entry in found.items()}


def read_tensors(folder: Path, into: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors from the safetensors files of a folder, however these are divided; returns ``into``.

    Each process reads the parts that it holds. With parts, every process calls it.

    Args:
        folder: of the checkpoint.
        into: tensors of the shapes and dtypes that the checkpoint holds under their names.

    Raises:
        ValueError: a file that cannot be read, in any of the processes.
    """
    alone = not (dist.is_available() and dist.is_initialized() and is_sharded(into))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(into, storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner, no_dist=alone)
        except dcp.CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            raise ValueError(f"{folder} cannot be read by process {rank}: {failure[0]}") from error
    return into


def empty_like(held: Held, like: Tensor | None) -> Tensor:
    """A tensor to read into: divided as ``like`` is where that has the same shape, else whole on the CPU."""
    if isinstance(like, DTensor) and tuple(like.shape) == held.shape:
        return torch.empty_like(like, dtype=held.dtype)
    return torch.empty(held.shape, dtype=held.dtype)
