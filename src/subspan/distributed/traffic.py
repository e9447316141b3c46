"""Bytes that are handed to collectives, counted by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

#: What is reduced or broadcast: whole gradients, projected ones, sketches and other products of a refresh, subspaces
#: that one process has found for all, and who has gradients at all.
KINDS = ("dense", "projected", "sketch", "basis", "flags")


class Traffic:
    """A count of the bytes that this process hands to collectives.

    Payload only: what a ring sends for each byte of it, 2(p − 1)/p bytes with p processes, is the same for all kinds
    but ``basis``, and so are what headers add.

    Attributes:
        total: bytes by kind since the beginning.

    Example:
        >>> traffic = Traffic()
        >>> traffic.count("projected", 256)
        >>> traffic.take()
        {'projected': 256}
        >>> traffic.take(), traffic.total["projected"]
        ({}, 256)
    """

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def count(self, kind: str, values: Tensor | int) -> None:
        """Add a tensor, or a number of bytes."""
        self.total[kind] += values if isinstance(values, int) else values.numel() * values.itemsize

    def take(self) -> dict[str, int]:
        """Bytes by kind since the last call; call it after every step for the bytes of each."""
        since = self.total - self._taken
        self._taken = self.total.copy()
        return dict(since)


def traffic_table(rows: Mapping[str, Mapping[str, int]]) -> str:
    """A table of bytes by kind, each row's sum beside that of the first row.

    Args:
        rows: what `Traffic.take` gave, by name.

    Example:
        >>> for line in traffic_table({"plain": {"dense": 4000}, "hook": {"projected": 1000}}).splitlines():
        ...     print(" ".join(line.split()))
        dense projected total share
        plain 4000 0 4000 1.000
        hook 0 1000 1000 0.250
    """
    kinds = [kind for kind in KINDS if any(row.get(kind) for row in rows.values())]
    width = max(8, *map(len, rows))
    lines = [" " * width + "".join(f"{kind:>11}" for kind in [*kinds, "total"]) + "   share"]
    first = sum(next(iter(rows.values())).values())
    for name, row in rows.items():
        total = sum(row.values())
        cells = "".join(f"{number:>11}" for number in [*(row.get(kind, 0) for kind in kinds), total])
        lines.append(f"{name:<{width}}{cells}{total / first:>8.3f}")
    return "\n".join(lines)


def count_traffic(ddp: DistributedDataParallel, traffic: Traffic | None = None) -> Traffic:
    """Count the bytes of a model that is trained as ever: DDP's own all-reduce, as a hook that counts.

    Args:
        ddp: the wrapped model, without a hook.
        traffic: what to add to, such as what `exclude_from_ddp` gave.

    Returns:
        The count.

    Example:
        >>> def after_wrapping(ddp):  # in each process
        ...     traffic = count_traffic(ddp)
    """
    counted = traffic or Traffic()
    group = ddp.process_group

    def reduce(state: object, bucket):  # type: ignore[no-untyped-def]  # DDP looks at the annotations themselves
        counted.count("dense", bucket.buffer())
        return all_reduce(bucket.buffer().div_(group.size()), group)

    ddp.register_comm_hook(None, reduce)
    return counted


def all_reduce(values: Tensor, group: dist.ProcessGroup) -> Future[Tensor]:
    """The sum over the processes, some time."""
    work = dist.all_reduce(values, group=group, async_op=True)
    assert work is not None
    future: Future[list[Tensor]] = work.get_future()
    return future.then(lambda done: done.value()[0])
