"""A model and its optimizer's state divided over the processes of a run (FSDP2)."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from subspan.train.config import PretrainConfig

__all__ = ["launch_settings", "shard_model"]


def launch_settings(config: PretrainConfig) -> PretrainConfig:
    """Return the settings with what ``accelerate launch`` asks for in the environment.

    ``--use_fsdp`` is ``--shard full``: subspan divides the model itself, in the same way on every device, and
    accelerate is told so. (Its own FSDP does nothing on CPUs, without a word.) ``--mixed_precision bf16`` is ``--dtype
    amp``, and so it stands in the settings of the run.

    Raises:
        ValueError: a mixed precision that subspan does not have.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" and config.shard == "none":
        config = dataclasses.replace(config, shard="full")
    # Else transformers would take it from there, whatever the settings say.
    precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision of accelerate is {precision!r}, which subspan does not have: give accelerate launch "
            "--mixed_precision no (or bf16, which is --dtype amp)."
        )
    if precision == "bf16" and config.dtype == "float32":
        config = dataclasses.replace(config, dtype="amp")
    return config


def shard_model(model: PreTrainedModel, mesh: DeviceMesh | None = None) -> None:
    """Divide the parameters over all processes, block by block, so that one block at a time is whole.

    The blocks are those that the model says must not be split over devices. The numbers are those of the first process:
    factors that were computed may differ in rounding between machines, and would not fit each other.

    Args:
        model: the model.
        mesh: of the processes, on whose device the model is; None: that of all, on the accelerator if there is one.
    """
    if mesh is None:
        if (accelerator := torch.accelerator.current_accelerator()) is not None:
            model.to(accelerator)  # type: ignore[arg-type]
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
