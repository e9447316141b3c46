"""Parameters that fully_shard has divided train as whole ones do, in pieces."""

from __future__ import annotations

import math
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from subspan.linalg import Division, division
from subspan.optim import GaLore, LowRankOptimizer, buckets, create_optimizer
from subspan.optim.method import Geometry
from subspan.optim.sharding import agreed
from subspan.optim.shards import Shards

STEPS, GAP = 50, 10
KINDS = ("above", "below")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "galore": ("galore", {"rank": 6, "scale": 1.0}),
    "galore divided": ("galore", {"rank": 6, "scale": 1.0}),
    "galore exact": ("galore", {"rank": 6, "scale": 1.0, "svd": "exact"}),
    "golore": ("golore", {"rank": 6, "golore_after": 20}),
    "fira": ("fira", {"rank": 6, "scale": 1.0}),
    "apollo": ("apollo", {"rank": 6}),
    "apollo_mini": ("apollo_mini", {"rank": 1}),
    "frugal": ("frugal", {"density": 0.25, "subspace": "rows"}),
}


class Block(nn.Module):
    """Matrices of both sides, one of whose sides is below the rank, and does not reach all processes, and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(19, 30), nn.Linear(30, 19)
        self.square, self.small = nn.Linear(19, 19), nn.Linear(19, 5)
        self.long = nn.Linear(5, 19)
        self.experts = nn.Parameter(torch.randn(3, 19, 19) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tall(torch.tanh(self.wide(x)))
        x = x + torch.tanh(torch.einsum("bi,eio->ebo", x, self.experts)).mean(dim=0)
        return x + self.long(torch.tanh(self.small(torch.tanh(self.square(x)))))


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(19, 7)).to(dtype)


def batches(rank_of_gradients: str) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = 4 if rank_of_gradients == "below" else 24
    teacher = torch.randn(19, 7, generator=generator)
    for _ in range(STEPS):
        x = torch.randn(rows, 19, generator=generator)
        yield x, (x @ teacher).argmax(dim=-1)


def build(case: str, model: nn.Module) -> LowRankOptimizer:
    method, settings = CASES[case]
    lr = 1e-2 if next(model.parameters()).dtype == torch.float32 else 1e-3
    gap = {} if method == "adamw" else {"update_proj_gap": GAP}
    optimizer = create_optimizer(method, model, lr=lr, **gap, **settings)
    if case == "galore divided":
        optimizer.divide_bases()
    return optimizer


def train(
    case: str, model: nn.Module, kind: str, rank: int = 0, world: int = 1
) -> tuple[list[float], LowRankOptimizer]:
    optimizer, losses = build(case, model), []
    dtype, device = (first := next(model.parameters())).dtype, first.device
    for x, y in batches(kind):
        share = len(x) // world
        x, y = (part[rank * share : (rank + 1) * share].to(device) for part in (x, y))
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses, optimizer


def divided(model: nn.Sequential, shape: tuple[int, ...], device: str = "cpu") -> nn.Sequential:
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)


def cases(shape: tuple[int, ...]) -> list[tuple[torch.dtype, str, str]]:
    """Every recipe on two processes; on four, and on one, those that lie differently."""
    if shape == (2,):
        small = [(torch.bfloat16, kind, case) for kind in KINDS for case in ("galore", "fira", "apollo")]
        return [(torch.float32, kind, case) for kind in KINDS for case in CASES] + small
    few = ("galore", "fira", "frugal") if shape == (4,) else ("galore",)
    return [(torch.float32, "above", case) for case in few]


def worker(rank: int, shape: tuple[int, ...], folder: str) -> None:
    world = math.prod(shape)
    start(rank, world, folder)
    found = {}
    for dtype, kind, case in cases(shape):
        found[dtype, kind, case], optimizer = train(case, divided(network(dtype), shape), kind, rank, world)
        assert optimizer.state_bytes() == optimizer.planned_state_bytes()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (2, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_divided_trains_as_whole(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Losses within 1e-5 in float32, 1e-2 in bfloat16, with the rank of the gradients above and below that of the
    subspace."""
    mp.spawn(worker, args=(shape, str(tmp_path)), nprocs=math.prod(shape))
    for (dtype, kind, case), losses in torch.load(tmp_path / "found.pt", weights_only=False).items():
        expected, _ = train(case, network(dtype), kind)
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
        worst = max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))
        assert worst < bound, (dtype, kind, case, worst)


@pytest.mark.gpu
def test_divided_trains_as_whole_on_a_device(tmp_path: Path) -> None:
    """NCCL in place of gloo; one process, since one device is all that may be there."""
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        for case in CASES:
            losses, _ = train(case, divided(network(torch.float32).cuda(), (1,), "cuda"), "above")
            expected, _ = train(case, network(torch.float32).cuda(), "above")
            assert max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True)) < 1e-4, case
    finally:
        dist.destroy_process_group()


def checks(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    x = torch.randn(8, 19, generator=torch.Generator().manual_seed(rank))

    def backward(model: nn.Module, poison: bool = False) -> None:
        loss = model(x).square().mean()
        (loss * float("nan") if poison and rank == 1 else loss).backward()

    # Placements are as declared, and a state dict has them.
    model = divided(network(torch.float32), (world,))
    optimizer = GaLore(model, rank=6)
    backward(model)
    optimizer.step()
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    for name, state in states.items():
        assert all(isinstance(X, DTensor) == (X.ndim > 0) for X in state.values()), name
    wide, tall, small = (states[f"0.{name}.weight"] for name in ("wide", "tall", "small"))
    assert wide["exp_avg"].shape == (6, 30) and wide["exp_avg"].placements == (Shard(1),)
    assert wide["basis"].placements == (Replicate(),) and wide["basis"].shape == (19, 6)
    assert tall["exp_avg"].placements == (Shard(1),) and tall["basis"].placements == (Shard(0),)
    assert small["exp_avg"].placements == (Shard(0),) and small["exp_avg"].shape == (5, 19)  # not projected
    Q = tall["basis"].full_tensor()
    assert torch.allclose(Q.mT @ Q, torch.eye(6), atol=1e-5)

    # A NaN on one process: all skip alike.
    optimizer.zero_grad()
    before = [p.to_local().clone() for p in model.parameters()]
    backward(model, poison=True)
    with pytest.warns(RuntimeWarning, match="NaN or Inf"):
        optimizer.step()
    assert optimizer.skipped_steps == len(before)
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()

    # Saved and loaded, also by an optimizer that divides its bases, and by whole parameters.
    backward(model)
    saved = optimizer.state_dict()
    norms = [
        float(optimizer.grad_norm().value),
        float(nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()),
    ]
    assert abs(norms[0] - norms[1]) < 1e-6 * norms[0]
    other = GaLore(model, rank=6)
    other.divide_bases()
    other.load_state_dict(saved)
    assert other.state[model[0].wide.weight]["basis"].placements == (Shard(0),)
    assert other.state_bytes() == other.planned_state_bytes() != optimizer.state_bytes()
    copies = {}
    for name, stepped in (("held", optimizer), ("divided", other)):
        start_values = [p.to_local().clone() for p in model.parameters()]
        stepped.step()
        copies[name] = [p.to_local().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, value in zip(model.parameters(), start_values, strict=True):
                p.to_local().copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(copies["held"], copies["divided"], strict=True))
    whole = network(torch.float32)
    into = GaLore(whole, rank=6)
    into.load_state_dict(saved)
    assert torch.equal(into.state[whole[0].tall.weight]["basis"], Q)

    # A step of matrices that are projected from the right says a few numbers, whatever their size is.
    calls: list[tuple[str, int]] = []

    def count(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(X: Tensor, *arguments: Any, **keywords: Any) -> Any:
            calls.append((kind, X.numel()))
            return call(X, *arguments, **keywords)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", count("reduce", dist.all_reduce))
        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(division, name, count(name, getattr(division, name)))
        for divides in (False, True):
            right = divided(nn.Sequential(nn.Linear(19, 30, bias=False), nn.Linear(30, 60, bias=False)), (world,))
            optimizer = GaLore(right, rank=6, stagger=False)
            if divides:
                optimizer.divide_bases()
            for _ in range(2):
                backward(right)
                calls.clear()
                optimizer.grad_norm()
                assert calls == [("reduce", 1)]
                calls.clear()
                optimizer.step()
                optimizer.zero_grad()
            assert calls[0] == ("reduce", 2)  # which parameters are not finite
            # Norms of the rows of R: together, or with each basis that is gathered.
            assert calls[1:] == (
                [("_all_gather", 20 * 6), ("reduce", 6), ("_all_gather", 30 * 6), ("reduce", 6)]
                if divides
                else [("reduce", 12)]
            )

    check_small(x)
    check_meshes(rank, world, x)

    # The exact SVD says that it gathers.
    backward(model)
    with pytest.warns(RuntimeWarning, match="is gathered as a whole"):
        GaLore(model, rank=6, svd="exact").step()
    model.zero_grad()

    # What is not possible says so.
    for settings, message in (
        ({"refresh": "late"}, "a late refresh folds gradients"),
        ({"moments": "8bit"}, "moments='8bit' has blocks"),
        ({"rank_policy": "tolerance", "rtol": 0.1}, "changes ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            GaLore(model, rank=6, **settings)
    with pytest.raises(RuntimeError, match="fully_shard has divided"):
        GaLore(model, rank=6).fuse_into_backward()
    with pytest.raises(RuntimeError, match="too late"):
        optimizer.divide_bases()

    # State that was there before the parameters were divided, as with accelerate, follows them.
    plain = network(torch.float32)
    early = GaLore(plain, rank=6)
    early.init_state()
    divided(plain, (world,))
    for group in early.param_groups:
        by_name = dict(plain.named_parameters())
        group["params"] = [by_name[name] for name in group["param_names"]]
    backward(plain)
    early.step()
    assert all(isinstance(p, DTensor) for p in early.state)
    assert early.state[plain[0].tall.weight]["basis"].placements == (Shard(0),)
    assert len(early.state) == len(by_name)
    dist.destroy_process_group()


def check_small(x: Tensor) -> None:
    """Three steps of what has no place in `CASES`, with a matrix of which the second process has nothing."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Conv2d(1, 7, (1, 4), padding=(0, 4))
            self.one, self.out = nn.Linear(24, 1), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.kernel(x[:, None, None, :])).mean(dim=1).flatten(1)[:, :24]
            return self.out(x) + self.one(x)

    everyone = x.clone()
    dist.broadcast(everyone, 0)
    small, targets = {"min_quantized": 1}, {"target_modules": ["kernel", "one", "out"]}
    for method, divides, settings in (
        ("scale", False, {"experts": "rows"}),
        ("apollo", False, {"rank": 3, "store_basis": False, "proj_type": "right"}),
        ("apollo", True, {"rank": 3, "store_basis": False, "proj_type": "right"}),
        ("apollo", False, {"rank": 3, "store_basis": False, "proj_type": "left"}),
        ("fira", False, {"rank": 3, "proj_type": "right", "weight_decay": 0.1}),
        ("galore", False, {"rank": 3, "moments": "bfloat16", **small}),
        ("galore", True, {"rank": 3, "proj_type": "right", "basis_storage": "bfloat16", **small}),
    ):
        found = []
        for divide in (False, True):
            torch.manual_seed(0)
            model: nn.Module = Small()
            if divide:
                fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            optimizer = create_optimizer(method, model, lr=1e-2, **settings, **(targets if "rank" in settings else {}))
            if divides and divide:
                optimizer.divide_bases()
            for _ in range(3):
                model(everyone).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert optimizer.state_bytes() == optimizer.planned_state_bytes()
            found.append([p.full_tensor() if divide else p for p in model.parameters()])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-5), (method, divides, settings)


def check_meshes(rank: int, world: int, x: Tensor) -> None:
    """Parameters of two meshes agree each with those that have the other pieces."""
    meshes = init_device_mesh("cpu", (1, world), mesh_dim_names=("alone", "all"))
    model = nn.Sequential(nn.Linear(19, 19), nn.Linear(19, 19))
    for layer, name in zip(model, ("alone", "all"), strict=True):
        fully_shard(layer, mesh=meshes[name])
    named = list(model.named_parameters())
    assert agreed(["1.weight"] if rank == 1 else [], named) == ["1.weight"]
    model(x).square().mean().backward()
    norms = [float(p.grad.full_tensor().norm()) for _, p in named]
    optimizer = GaLore(model, rank=6)
    assert abs(float(optimizer.grad_norm().value) - math.hypot(*norms)) < 1e-6 * math.hypot(*norms)
    optimizer.step()


def test_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided matrices of one mesh are stepped together until their projected gradients are many; whole ones always."""
    monkeypatch.setattr(buckets, "_PROJECTED", 100)

    def task(name: str, mesh: str | None) -> buckets.Task:
        shards = Shards() if mesh is None else Shards(Division("rows", 8, 20), mesh=mesh)
        return buckets.Task(name, torch.zeros(8, 20), None, {}, Geometry((), 8, 20, 3), False, 1, {}, None, shards)

    tasks = [task(name, {"a": "a", "b": "b"}.get(name[0])) for name in ("a1", "w1", "a2", "b1", "w2", "a3", "b2", "w3")]
    found = [[one.name for one in portion] for portion in buckets.portions(tasks)]
    assert found == [["a1", "a2"], ["w1", "w2", "w3"], ["b1", "b2"], ["a3"]]


def test_share_of_the_state() -> None:
    """What one of four processes will hold, by declaration: a quarter with divided bases, a little more without."""
    with torch.device("meta"):
        shapes = [(256, 256)] * 4 + [(256, 688), (256, 688), (688, 256)]
        model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes * 8))
    whole = sum(GaLore(model, rank=64).planned_state_bytes().values())
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        held, split = GaLore(model, rank=64), GaLore(model, rank=64)
        split.divide_bases()
        assert sum(held.planned_state_bytes().values()) < 0.40 * whole
        assert sum(split.planned_state_bytes().values()) < 0.27 * whole
    finally:
        dist.destroy_process_group()


def test_needs_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may be built without what processes need."""
    for name in ("reduce_scatter_single", "reduce_scatter_tensor", "all_gather_single", "all_gather_into_tensor"):
        monkeypatch.delattr(dist, name, raising=False)
    assert runpy.run_path(division.__file__)["Division"]("rows", 2, 2).m == 2


@pytest.mark.slow  # starts processes
def test_placements_faults_and_states(tmp_path: Path) -> None:
    mp.spawn(checks, args=(2, str(tmp_path)), nprocs=2)
