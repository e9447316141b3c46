"""Short runs of a small network, by one process or by several."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed import compress_gradients, count_traffic, exclude_from_ddp
from subspan.nn import project_gradients
from subspan.optim import create_optimizer, param_groups

Answers = list[dict[str, Any]]


class Network(nn.Module):
    """Linear layers wide, tall and square, experts, and dense parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall, self.square = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 16, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 16, 20) * 0.2)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.square(self.tall(torch.tanh(self.wide(x)))))
        return self.norm(torch.einsum("bi,eij->bj", x, self.experts.to(x.dtype)))


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 12, generator=generator) * torch.logspace(0, -1, 12)
    return x, torch.randn(size, 20, generator=generator)


@dataclass(frozen=True)
class Run:
    """A run: its method, and how gradients reach the optimizer.

    Args:
        how: ``plain``, ``hook``, ``fused`` or ``projected``.
        size: sequences of the joint batch; with fewer of them than ``rank`` gradients are rank-deficient.
        pieces: micro-batches.
        poison: step in which the last process has a gradient that is not a number.
        ddp: settings of DDP.
    """

    method: str = "galore"
    how: str = "hook"
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = 4
    size: int = 32
    steps: int = 8
    pieces: int = 1
    clip: float = 0.0
    poison: int | None = None
    dtype: torch.dtype = torch.float32
    ddp: dict[str, Any] = field(default_factory=dict)


def train(run: Run, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Losses, parameters, states and bytes of one process."""
    model = Network().to(run.dtype)
    keys = {"rank": run.rank, "update_proj_gap": 5}
    groups: Any = param_groups(model, **keys)
    if run.method == "frugal":
        groups = param_groups(model, rank=None, density=0.4, update_proj_gap=5)
    if run.method in ("adamw", "scale"):
        groups = [{"params": list(model.named_parameters())}]
    optimizer = create_optimizer(run.method, groups, lr=1e-2, weight_decay=0.1, **run.settings)
    if run.how == "fused":
        optimizer.fuse_into_backward()
    if run.how == "projected":
        project_gradients(model, optimizer)
    call: Any = model
    traffic = None
    if world > 1:
        if optimizer.fused:
            traffic = exclude_from_ddp(model, optimizer)
        call = DistributedDataParallel(model, **run.ddp)
        if run.how == "hook":
            with warnings.catch_warnings(record=True) as caught:
                traffic = compress_gradients(call, optimizer)
        else:
            traffic = count_traffic(call, traffic)
    losses, norms, counted = [], [], []
    for step in range(run.steps):
        x, y = batch(step, run.size)
        mine = slice(rank * run.size // world, (rank + 1) * run.size // world)
        x, y = x[mine].to(run.dtype), y[mine].to(run.dtype)
        loss = torch.zeros(())
        pieces = list(zip(x.chunk(run.pieces), y.chunk(run.pieces), strict=True))
        for number, (part, target) in enumerate(pieces):
            last = number == len(pieces) - 1
            with call.no_sync() if world > 1 and not last else nullcontext():
                piece = (call(part) - target).float().square().mean() / run.pieces
                poisoned = step == run.poison and rank == world - 1 and last
                (piece * (torch.nan if poisoned else 1.0)).backward()
                loss += piece.detach()
        if run.clip:
            norms.append(optimizer.clip_grad_norm_(run.clip).value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(loss)
            counted.append(traffic.take() if traffic is not None else {})
        losses.append(float(loss) / world)
    state = {
        f"{name}.{key}": value.clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {
        "losses": losses,
        "norms": norms,
        "skipped": optimizer.skipped_steps,
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "state": state,
        "traffic": counted,
        "warnings": [str(item.message) for item in caught] if world > 1 and run.how == "hook" else [],
    }


def in_processes(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, world, *arguments)`` returns in each process; tensors, numbers and containers of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(world, port, str(folder), work, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(
    rank: int, world: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_all(rank: int, world: int, runs: dict[str, Run]) -> dict[str, Any]:
    return {name: train(run, rank, world) for name, run in runs.items()}
