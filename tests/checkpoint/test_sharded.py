"""Checkpoints of models that are divided over processes, and their way to other numbers of processes."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from subspan.checkpoint import CheckpointWriteError, load_checkpoint, save_checkpoint, verify
from subspan.checkpoint.single import to_single_file
from subspan.optim import Fira, GaLore
from tests.checkpoint.damage import damaged
from tests.checkpoint.models import Payload
from tests.checkpoint.test_fuzz import CASES, state


def network() -> nn.Module:
    """Rows that 2 and 4 processes share unevenly, and a bias of which one of 4 gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 3))


#: What a state may hold: pieces as those of the parameter, pieces of other shapes, whole tensors and scalars.
KINDS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
    "galore": lambda model: GaLore(model, rank=4, lr=1e-2, update_proj_gap=2),
    "fira": lambda model: Fira(model, rank=4, lr=1e-2, update_proj_gap=2, proj_type="reverse_std"),
}


def build(kind: str, *world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Divided over as many processes; with two numbers the first is that of replicas."""
    model = network()
    if world != (1,):
        mesh = init_device_mesh("cpu", world, mesh_dim_names=("replicate", "shard")[-len(world) :])
        for layer in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
    optimizer = KINDS[kind](model)
    if kind == "fira":
        optimizer.divide_bases()  # type: ignore[attr-defined]
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    """Every process has the same batch, so that the gradients are those of one process."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 64, generator=generator)) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def group(rank: int, world: int, folder: Path) -> None:
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world)


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    answers: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    group(rank, 4, folder)
    for kind, answer in answers.items():
        of4 = folder / kind / "of4" / "checkpoint-3"
        model, optimizer = build(kind, 4)
        train(model, optimizer, 3, seed=1)
        save_checkpoint(of4, model, optimizer, extra={"epoch": 2}, eval_loss=0.5)
        answer["4"] = train(model, optimizer, 3, seed=2)
        model, optimizer = build(kind, 4)
        answer["extra"] = load_checkpoint(of4, model, optimizer)
        answer["4 again"] = train(model, optimizer, 3, seed=2)
        model, optimizer = build(kind, 4)
        load_checkpoint(folder / kind / "single" / "checkpoint-3", model, optimizer)
        answer["single to 4"] = train(model, optimizer, 3, seed=2)
        if kind == "galore":
            model, optimizer = build(kind, 4)
            optimizer.param_groups[0]["lr"] = 3e-2
            load_checkpoint(of4, model, optimizer, carry_over=True)
            assert optimizer.param_groups[0]["lr"] == 3e-2
            optimizer.param_groups[0]["lr"] = 1e-2
            answer["carried over"] = train(model, optimizer, 3, seed=2)
            with pytest.raises(ValueError, match=r"rank=4, this optimizer 3.*convert the checkpoint first"):
                load_checkpoint(of4, model, GaLore(model, rank=3), carry_over=True)
            model, optimizer = build(kind, 2, 2)
            load_checkpoint(of4, model, optimizer)
            replicated = save_checkpoint(folder / "replicated", model, optimizer)
            answer["4 to replicas"] = train(model, optimizer, 3, seed=2)
            model, optimizer = build(kind, 4)
            load_checkpoint(replicated, model, optimizer)
            answer["replicas to 4"] = train(model, optimizer, 3, seed=2)

    # A disk that is full in one process is an error in all, and none waits for ever.
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 2:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(CheckpointWriteError) as caught:
            save_checkpoint(of4.with_name("checkpoint-6"), model, optimizer)
    answer["full"] = str(caught.value)
    dist.barrier()
    answer["left"] = sorted(path.name for path in of4.parent.rglob("*"))
    dist.destroy_process_group()

    if rank < 2:
        group(rank, 2, folder)
        for kind, answer in answers.items():
            model, optimizer = build(kind, 2)
            load_checkpoint(folder / kind / "of4" / "checkpoint-3", model, optimizer)
            save_checkpoint(folder / kind / "of2" / "checkpoint-3", model, optimizer)
            answer["4 to 2"] = train(model, optimizer, 3, seed=2)
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A folder that 1, 2 and 4 processes have written into, and the losses that follow each kind of checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    expected = {}
    for kind in KINDS:
        model, optimizer = build(kind, 1)
        train(model, optimizer, 3, seed=1)
        save_checkpoint(folder / kind / "single" / "checkpoint-3", model, optimizer)
        expected[kind] = train(model, optimizer, 3, seed=2)
    mp.spawn(worker, args=(folder,), nprocs=4)
    return folder, expected


@pytest.mark.slow  # starts of processes
def test_no_damage_to_parts_is_silent(written: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    whole, other = (written[0] / "galore" / run / "checkpoint-3" for run in ("of4", "of2"))
    model, optimizer = build("galore", 1)
    extra = load_checkpoint(whole, model, optimizer)
    expected = state(model, optimizer, extra)
    choose = random.Random(0)
    refused = 0
    for case in range(CASES):
        copy = tmp_path / "checkpoint-3"
        shutil.copytree(whole, copy)
        what = f"case {case}: {damaged(copy, other, choose)}"
        model, optimizer = build("galore", 1)
        untouched = state(model, optimizer, None)
        try:
            extra = load_checkpoint(copy, model, optimizer)
        except ValueError as error:
            refused += 1
            assert str(copy) in str(error) and not verify(copy).ok, what
            assert state(model, optimizer, None) == untouched, what
        else:
            assert state(model, optimizer, extra) == expected, what
        shutil.rmtree(copy)
    assert refused > 0.7 * CASES


@pytest.mark.slow  # starts of processes
def test_to_and_from_other_numbers_of_processes(written: tuple[Path, dict[str, list[float]]]) -> None:
    tmp_path, expected = written
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    *_, last = KINDS
    shards = {path.name for path in (tmp_path / last / "of4" / "checkpoint-3").glob("*.safetensors")}
    for rank, answers in enumerate(found):
        message = answers[last].pop("full")
        assert "checkpoint-6 could not be written by process 2" in message and "No space left" in message
        written = {"checkpoint-3", "manifest.json", "optimizer.json", "extra.json"}
        assert set(answers[last].pop("left")) == written | shards
        for kind, answer in answers.items():
            assert answer.pop("extra") == {"epoch": 2}
            assert answer["4"] == answer["4 again"], "bit for bit"
            assert {"4", "4 again", "single to 4"} <= answer.keys()
            assert ("replicas to 4" in answer) == (kind == "galore")
            assert ("4 to 2" in answer) == (rank < 2)
            for name, losses in answer.items():
                assert losses == pytest.approx(expected[kind], rel=1e-5), (kind, name)
    for kind in KINDS:
        for run in ("of4", "of2"):
            folder = tmp_path / kind / run / "checkpoint-3"
            assert verify(folder).ok
            assert len(list(folder.glob("*.safetensors"))) == int(run[-1])
            (folder / ".metadata").write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
            model, optimizer = build(kind, 1)
            load_checkpoint(folder, model, optimizer)
            assert train(model, optimizer, 3, seed=2) == pytest.approx(expected[kind], rel=1e-5), (kind, run)
        to_single_file(tmp_path / kind / "of4" / "checkpoint-3", tmp_path / kind / "again" / "checkpoint-3")
        for name in ("model.safetensors", "optimizer.safetensors"):
            parts, whole = (load_file(tmp_path / kind / run / "checkpoint-3" / name) for run in ("again", "single"))
            assert parts.keys() == whole.keys()
            for key in parts:
                torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "executed").exists()
    # No file holds more than its process had: of the state of AdamW, its share.
    of4 = tmp_path / "torch" / "of4" / "checkpoint-3"
    numbers = sum(p.numel() for p in network().parameters()) * 3
    assert max(path.stat().st_size for path in of4.glob("*.safetensors")) < numbers * 4 / 4 * 1.25 + 4000
    with pytest.raises(CheckpointWriteError, match="exists already"):
        to_single_file(of4, of4)
    min(of4.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"shard-00001.* is missing"):
        load_checkpoint(of4, *build("torch", 1))
