"""What a launcher says about a run beside its settings."""

from __future__ import annotations

import dataclasses
import os

from subspan.train.config import PretrainConfig

__all__ = ["launch_settings"]


def launch_settings(config: PretrainConfig) -> PretrainConfig:
    """Return the settings with what ``accelerate launch`` asks for in the environment.

    ``--use_fsdp`` is ``--shard full``: subspan shards the model itself, in the same way on every device, and accelerate
    is told so. (Its own FSDP does nothing on CPUs, without a word.)
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return dataclasses.replace(config, shard="full")
    return config
