"""A model and its optimizer's state divided over the processes of a run (FSDP2)."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from subspan.train.config import PretrainConfig

__all__ = ["launch_settings", "shard_model"]


def launch_settings(config: PretrainConfig) -> PretrainConfig:
    """Return the settings with what ``accelerate launch`` asks for in the environment.

    ``--use_fsdp`` is ``--shard full``: subspan divides the model itself, in the same way on every device, and
    accelerate is told so. (Its own FSDP does nothing on CPUs, without a word.)
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" and config.shard == "none":
        return dataclasses.replace(config, shard="full")
    return config


def shard_model(model: PreTrainedModel, mesh: DeviceMesh | None = None) -> None:
    """Divide the parameters over all processes, block by block, so that one block at a time is whole.

    The blocks are those that the model says must not be split over devices.

    Args:
        model: the model.
        mesh: of the processes, on whose device the model is; None: that of all, on the accelerator if there is one.
    """
    if mesh is None and (accelerator := torch.accelerator.current_accelerator()) is not None:
        model.to(accelerator)  # type: ignore[arg-type]
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
