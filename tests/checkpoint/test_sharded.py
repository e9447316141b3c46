"""Checkpoints of models that are divided over processes, and their way to other numbers of processes."""

from __future__ import annotations

import json
import pickle
from datetime import timedelta
from pathlib import Path

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
from tests.checkpoint.models import Payload


def network() -> nn.Module:
    """Rows that 2 and 4 processes share unevenly, and a bias of which one of 4 gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 3))


def build(world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


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
    answers: dict[str, object] = {}
    group(rank, 4, folder)
    model, optimizer = build(4)
    train(model, optimizer, 3, seed=1)
    save_checkpoint(folder / "of4" / "checkpoint-3", model, optimizer, extra={"epoch": 2}, eval_loss=0.5)
    answers["4"] = train(model, optimizer, 3, seed=2)
    again, other = build(4)
    answers["extra"] = load_checkpoint(folder / "of4" / "checkpoint-3", again, other)
    answers["4 again"] = train(again, other, 3, seed=2)
    load_checkpoint(folder / "single" / "checkpoint-3", again, other)
    answers["single to 4"] = train(again, other, 3, seed=2)

    # A disk that is full in one process is an error in all, and none waits for ever.
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 2:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(CheckpointWriteError) as caught:
            save_checkpoint(folder / "of4" / "checkpoint-6", model, optimizer)
    answers["full"] = str(caught.value)
    dist.barrier()
    answers["unharmed"] = sorted(path.name for path in (folder / "of4").rglob("*"))
    dist.destroy_process_group()

    if rank < 2:
        group(rank, 2, folder)
        model, optimizer = build(2)
        load_checkpoint(folder / "of4" / "checkpoint-3", model, optimizer)
        save_checkpoint(folder / "of2" / "checkpoint-3", model, optimizer)
        answers["4 to 2"] = train(model, optimizer, 3, seed=2)
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(answers))


@pytest.mark.slow  # starts of processes
def test_to_and_from_other_numbers_of_processes(tmp_path: Path) -> None:
    model, optimizer = build(1)
    train(model, optimizer, 3, seed=1)
    save_checkpoint(tmp_path / "single" / "checkpoint-3", model, optimizer)
    expected = train(model, optimizer, 3, seed=2)
    mp.spawn(worker, args=(tmp_path,), nprocs=4)
    shards4 = {path.name for path in (tmp_path / "of4" / "checkpoint-3").glob("*.safetensors")}
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for rank, answers in enumerate(found):
        assert answers.pop("extra") == {"epoch": 2}
        message = answers.pop("full")
        assert "checkpoint-6 could not be written by process 2" in message and "No space left" in message
        assert (
            set(answers.pop("unharmed")) == {"checkpoint-3", "manifest.json", "optimizer.json", "extra.json"} | shards4
        )
        assert answers["4"] == answers["4 again"], "bit for bit"
        assert answers.keys() - {"4 to 2"} == {"4", "4 again", "single to 4"}
        assert ("4 to 2" in answers) == (rank < 2)
        for name, losses in answers.items():
            assert losses == pytest.approx(expected, rel=1e-5), name
    for folder in (tmp_path / "of4" / "checkpoint-3", tmp_path / "of2" / "checkpoint-3"):
        assert verify(folder).ok
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == int(folder.parent.name[-1])
        whole = sum(p.numel() for p in model.parameters()) * 4 * 3
        # No file holds more than its process had.
        assert max(path.stat().st_size for path in shards) < whole / len(shards) * 1.25 + 4000
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
        model, optimizer = build(1)
        load_checkpoint(folder, model, optimizer)
        assert train(model, optimizer, 3, seed=2) == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "executed").exists()
    to_single_file(tmp_path / "of4" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    for name in ("model.safetensors", "optimizer.safetensors"):
        found, wanted = (load_file(tmp_path / run / "checkpoint-3" / name) for run in ("again", "single"))
        assert found.keys() == wanted.keys()
        for key in found:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointWriteError, match="exists already"):
        to_single_file(tmp_path / "of4" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"{shards[-1].name} is missing"):
        load_checkpoint(folder, model, optimizer)
