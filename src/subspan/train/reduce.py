"""What the processes of a run send each other of its gradients."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed import Traffic, compress_gradients, count_traffic, exclude_from_ddp, power_sgd
from subspan.optim import LowRankOptimizer
from subspan.train.config import PretrainConfig

__all__ = ["check_reduction", "reduce_after_wrapping", "reduce_before_wrapping", "reduction"]

#: Rank of PowerSGD for methods that have none.
_POWER_SGD_RANK = 4
#: PowerSGD compresses nothing before.
_POWER_SGD_START = 10


def reduction(config: PretrainConfig, optimizer: LowRankOptimizer) -> Literal["projected", "full", "power_sgd"]:
    """Return what is reduced where the processes hold the whole model.

    By default that from which the numbers of a run do not depend on how many processes it has: whole gradients where
    their norm is to be clipped, of which projections know a part; else the projections, if the method needs no more.
    """
    if config.reduce is not None:
        return config.reduce
    folded = config.gradient != "full" or config.max_grad_norm == 0
    return "projected" if optimizer.folds and folded else "full"


def check_reduction(config: PretrainConfig, optimizer: LowRankOptimizer, processes: int) -> None:
    """Refuse settings that several processes cannot honour.

    Args:
        config: settings of the run.
        optimizer: of its method.
        processes: how many there are.

    Raises:
        ValueError: naming the setting.
    """
    if config.reduce == "projected" and not optimizer.folds:
        raise ValueError(
            f"reduce is 'projected', but the method {config.method!r} needs whole gradients: take galore or golore, or "
            "leave reduce out."
        )
    if processes == 1:
        return
    if config.gradient != "full" and not optimizer.folds:
        raise ValueError(
            f"gradient is {config.gradient!r}, but with several processes the method {config.method!r} cannot update "
            "in backward, before gradients are averaged: give --gradient full."
        )
    if config.gradient != "full" and config.reduce not in (None, "projected"):
        raise ValueError(
            f"reduce is {config.reduce!r}, but with gradient {config.gradient!r} there are only projections to reduce: "
            "leave reduce out."
        )
    if config.shard != "none":
        for name, allowed in (("gradient", "full"), ("weight_storage", "float"), ("measure_memory", False)):
            if (value := getattr(config, name)) not in (None, allowed):
                raise ValueError(f"{name} is {value!r}, but with shard {config.shard!r} it must be {allowed!r}.")
        if config.reduce not in (None, "full"):
            raise ValueError(
                f"reduce is {config.reduce!r}, but with shard {config.shard!r} the shares of whole gradients are "
                "reduced: leave reduce out."
            )


def reduce_before_wrapping(config: PretrainConfig, model: nn.Module, optimizer: LowRankOptimizer) -> Traffic | None:
    """Take out of DDP what it could not reduce: gradients that backward takes or never forms."""
    return exclude_from_ddp(model, optimizer) if config.gradient != "full" else None


def reduce_after_wrapping(
    config: PretrainConfig, ddp: DistributedDataParallel, optimizer: LowRankOptimizer, before: Traffic | None
) -> Traffic:
    """Let DDP reduce what the settings say, and return the count of the bytes."""
    how = reduction(config, optimizer)
    if how == "power_sgd":
        return power_sgd(ddp, config.rank or _POWER_SGD_RANK, start_powerSGD_iter=_POWER_SGD_START)
    if how == "projected" and before is None:
        return compress_gradients(ddp, optimizer)
    return count_traffic(ddp, before)
