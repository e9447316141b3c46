"""What each process of a pair does beside whole runs: what is refused, and corners of DDP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.runs import Network, batch
from subspan.distributed import compress_gradients, count_traffic, exclude_from_ddp, power_sgd
from subspan.nn import project_gradients, quantize_weights
from subspan.optim import GaLore, QGaLore, create_optimizer
from subspan.state import held


class Branching(Network):
    """Layers that some processes, or all of them, leave out."""

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = torch.tanh(self.tall(torch.tanh(self.wide(x))))
        return self.norm(torch.einsum("bi,eij->bj", x if skip else self.square(x), self.experts))


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def loss_of(model: Any, rank: int, step: int = 0, **keys: Any) -> Tensor:
    x, y = batch(step, 8)
    return (model(x[4 * rank : 4 * rank + 4], **keys) - y[4 * rank : 4 * rank + 4]).square().mean()


def wrapped(how: str, model: nn.Module | None = None, **settings: Any) -> tuple[Any, Any, Any]:
    model = model or Network()
    optimizer = GaLore(model, rank=4, update_proj_gap=3, **settings)
    if how == "fused":
        optimizer.fuse_into_backward()
        exclude_from_ddp(model, optimizer)
    ddp = DistributedDataParallel(model, find_unused_parameters=isinstance(model, Branching))
    if how == "hook":
        compress_gradients(ddp, optimizer)
    return model, ddp, optimizer


def refusals(rank: int, world: int) -> dict[str, str]:
    said = {}
    model = Network()
    optimizer = GaLore(model, rank=4, seed=rank)
    said["seed"] = message(lambda: compress_gradients(DistributedDataParallel(model), optimizer))
    said["not fused"] = message(lambda: exclude_from_ddp(model, optimizer))
    optimizer = GaLore(model, rank=4)
    optimizer.fuse_into_backward()
    said["fused"] = message(lambda: compress_gradients(DistributedDataParallel(model), optimizer))
    said["wrapped"] = message(lambda: exclude_from_ddp(DistributedDataParallel(model), optimizer))
    said["another model"] = message(lambda: exclude_from_ddp(Network(), optimizer))
    said["not excluded"] = message(optimizer.step)
    said["updating in backward"] = message(create_optimizer("fira", Network(), rank=4).fuse_into_backward)
    for how in ("hook", "fused"):
        model, ddp, optimizer = wrapped(how)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(ddp, rank)).backward()
        said[f"scaler {how}"] = message(lambda o=optimizer, s=scaler: s.step(o))
        model, ddp, optimizer = wrapped(how, nonfinite="raise")
        (loss_of(ddp, rank) * (torch.nan if rank else 1)).backward()
        said[f"raise {how}"] = message(optimizer.step)
    model, ddp, optimizer = wrapped("hook")
    loss_of(ddp, rank).backward()
    said["twice at a refresh"] = message(loss_of(ddp, rank).backward)
    said["rank of PowerSGD"] = message(lambda: power_sgd(DistributedDataParallel(Network()), 0))
    return said


def corners(rank: int, world: int) -> dict[str, Any]:
    """Runs whose parameters are compared with those of others."""
    found: dict[str, Any] = {}
    for how in ("plain", "hook", "fused", "late"):
        model, ddp, optimizer = wrapped(how, Branching(), **({"refresh": "late"} if how == "late" else {}))
        for step in range(8):
            # One process leaves the layer out, both do, none does.
            loss_of(ddp, rank, step, skip=(step % 4 == 1 and rank == 1) or step % 4 == 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[f"unused {how}"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for how in ("plain", "hook", "fused", "looked at"):
        model, ddp, optimizer = wrapped("fused" if how == "looked at" else how, stagger=False)
        for step in range(5):
            # Without no_sync(), where no subspace is found from the gradients: that was in step 3.
            for _ in range(2 if step in (1, 4) else 1):
                loss_of(ddp, rank, step).backward()
                if how == "looked at":
                    optimizer.grad_norm()
            optimizer.step()
            optimizer.zero_grad()
        found[f"twice {how}"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight.add_(rank)  # the first process decides
    quantize_weights(model, min_quantized=1)
    int8 = QGaLore(model, rank=4, min_quantized=1, seed=1)
    project_gradients(model, int8)
    exclude_from_ddp(model, int8)
    ddp = DistributedDataParallel(model)
    for step in range(6):
        ddp(torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean().backward()
        int8.step()
        int8.zero_grad()
    found["int8"] = {
        f"{name}.{i}": part.detach().clone() for name, p in model.named_parameters() for i, part in enumerate(held(p))
    }
    return found


def compressed(rank: int, world: int) -> dict[str, Any]:
    """Bytes of PowerSGD and of plain DDP, step by step."""
    found = {}
    for how in ("plain", "power_sgd"):
        ddp = DistributedDataParallel(Network())
        settings = {"start_powerSGD_iter": 2, "min_compression_rate": 1.0}
        traffic = count_traffic(ddp) if how == "plain" else power_sgd(ddp, 2, **settings)
        optimizer = torch.optim.AdamW(ddp.parameters())
        steps = []
        for step in range(4):
            loss_of(ddp, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(traffic.take())
        found[how] = steps
    return found


def everything(rank: int, world: int) -> dict[str, Any]:
    warnings.simplefilter("ignore", RuntimeWarning)
    return {"said": refusals(rank, world), "found": corners(rank, world), "traffic": compressed(rank, world)}
