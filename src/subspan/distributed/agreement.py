"""Processes that are to compute the same have to be set the same."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from subspan.optim import LowRankOptimizer


def check_agreement(optimizer: LowRankOptimizer, group: dist.ProcessGroup | None) -> None:
    """Refuse optimizers that would find other subspaces, or step otherwise, on some process.

    Raises:
        ValueError: naming what differs.
    """
    rows = optimizer.rows()
    aspects: dict[str, object] = {
        "seed": optimizer.seed,
        "method": optimizer.method.parts(),
        "parameters": [(row.name, row.shape, row.rank, row.side, row.trainable) for row in rows],
        "learning rates": [(row.lr, row.weight_decay) for row in rows],
    }
    digests = [int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7]) for value in aspects.values()]
    device = optimizer.param_groups[0]["params"][0].device
    bounds = torch.tensor([digests, [-digest for digest in digests]], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    differ = [name for name, same in zip(aspects, (bounds[0] == -bounds[1]).tolist(), strict=True) if not same]
    if differ:
        values = "; ".join(f"{name}: {aspects[name]}"[:200] for name in differ)
        raise ValueError(
            f"the processes have optimizers that differ in {', '.join(differ)} (here {values}); build them alike, with "
            "the same seed, on all processes"
        )
