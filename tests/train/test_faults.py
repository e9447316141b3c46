"""What goes wrong in a run, or around it, in one process."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from subspan.train.config import PretrainConfig
from subspan.train.lock import RunLock
from subspan.train.run_folder import shared_batch
from subspan.train.trainer import PretrainTrainer
from tests.train.micro import Killed, metrics, repeatable, run, stop_after


def scale_loss(patch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiply the training losses of some steps."""
    original = PretrainTrainer.compute_loss

    def compute_loss(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * factors.get(self.state.global_step, 1.0) if self.network.training else loss

    patch.setattr(PretrainTrainer, "compute_loss", compute_loss)


def test_a_step_without_a_finite_loss_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    original = PretrainTrainer.training_step

    def training_step(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append((self.state.global_step, self.network.get_parameter("lm_head.weight").detach().clone()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    scale_loss(monkeypatch, {5: float("nan"), 8: float("inf")})
    summary = run(tmp_path, max_grad_norm=0.0)
    same = [step for (step, before), (_, after) in itertools.pairwise(seen) if torch.equal(before, after)]
    assert same == [0, 5, 8]  # the first step has a rate of zero
    assert summary.skipped_steps == 0
    assert [line["bad_steps"] for line in metrics(tmp_path / "run") if "bad_steps" in line] == [0, 0, 1, 2, 2]
    assert [line["loss"] is None for line in metrics(tmp_path / "run") if "loss" in line] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("gradient", ["full", "fused"])
def test_an_infinite_gradient_makes_no_steps_of_momentum(
    gradient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping by an infinite norm would leave zeros of the other gradients, and step with those."""
    seen: list[torch.Tensor] = []
    original = PretrainTrainer.training_step

    def training_step(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        norm = self.network.get_parameter("model.norm.weight")
        seen.append(norm.detach().clone())
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 5:
            head = self.network.get_parameter("lm_head.weight")
            assert head.grad is not None
            head.grad[0, 0] = torch.inf
        return loss

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    summary = run(tmp_path, max_grad_norm=1.0, gradient=gradient)
    same = [step for step, (before, after) in enumerate(itertools.pairwise(seen)) if torch.equal(before, after)]
    assert same == [0, 5]  # the first step has a rate of zero
    assert summary.skipped_steps > 1


def test_too_many_in_a_row_end_the_run_with_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_loss(monkeypatch, dict.fromkeys(range(5, 12), float("nan")))
    with pytest.raises(FloatingPointError, match=r"the loss was not finite in 4 steps in a row, up to step 9\..*--lr"):
        run(tmp_path, max_bad_steps=4, keep_checkpoints=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_spike_is_written_down_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_loss(monkeypatch, {27: 3.0})
    changes: dict[str, Any] = {"steps": 32, "save_every": 8, "eval_every": 0}
    run(tmp_path, output=str(tmp_path / "whole"), **changes)
    lines = metrics(tmp_path / "whole")
    (spike,) = [line for line in lines if "spike" in line]
    assert spike["step"] == 28
    assert spike["spike"] > 1.5 * spike["usual_loss"]
    assert [line["spikes"] for line in lines if "spikes" in line][-2:] == [1, 1]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 26)
        run(tmp_path, output=str(tmp_path / "cut"), **changes)
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    assert repeatable(tmp_path / "cut") == repeatable(tmp_path / "whole")
    run(tmp_path, output=str(tmp_path / "off"), spike=0.0, **changes)
    assert not any("spike" in line for line in metrics(tmp_path / "off"))


def test_a_folder_that_another_run_writes_to(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        lock.sign()
        with pytest.raises(ValueError, match=rf"another run \(process {os.getpid()} on .*\) is writing to"):
            run(tmp_path, steps=4, resume="auto")
    assert run(tmp_path, steps=4, resume="auto").finished


def test_two_runs_that_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspan.train import pretrain

    original = pretrain.load_run

    def load_slowly(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "load_run", original)
            run(tmp_path, steps=4)
        return original(*args)

    monkeypatch.setattr(pretrain, "load_run", load_slowly)
    with pytest.raises(ValueError, match="another run has just been written to"):
        run(tmp_path, steps=4)
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 0)  # nothing is trained
    with pytest.raises(ValueError, match=r"the run folder /proc/nowhere cannot be written to \(.+\): choose another"):
        run(tmp_path, output="/proc/nowhere")


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    stop_after(monkeypatch, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**6))
    with pytest.raises(ValueError, match=r"3 more checkpoints take 1,10\d,\d+ bytes and the disk of .* has 1,000,000"):
        run(tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()
    monkeypatch.undo()
    assert run(tmp_path, steps=1).finished


def test_paths_that_are_not_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "näht 実験 [bold]"
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(folder)
    assert run(folder, resume="auto").finished


@pytest.mark.parametrize(
    ("batch", "accumulation", "then", "now", "expected"),
    [(4, 1, 2, 1, (4, 2)), (4, 1, 1, 4, (1, 1)), (6, 2, 1, 3, (4, 1)), (8, 1, 3, 4, (6, 1)), (5, 1, 2, 2, (5, 1))],
)
def test_a_step_keeps_its_sequences(batch: int, accumulation: int, then: int, now: int, expected: Any) -> None:
    config = PretrainConfig(batch_size=batch, grad_accumulation=accumulation)
    assert shared_batch(config, then, now) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce": "projected", "method": "fira"}, "reduce is 'projected', but the method 'fira' needs whole"),
        ({"shard": "half"}, "shard is 'half'; it must be none, full or bases"),
        ({"timeout": 0.0}, "timeout is 0.0; it must be greater than 0"),
        ({"max_bad_steps": 0}, "max_bad_steps is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": "fused", "reduce": "full"}, "with gradient 'fused' there are only projections to reduce"),
        (
            {"gradient": "projected", "shard": "full"},
            "gradient is 'projected', but with shard 'full' it must be 'full'",
        ),
        ({"method": "q_galore"}, "DDP cannot reduce the whole gradients .* --gradient projected or fused, or --weight"),
        ({"method": "q_galore", "shard": "full"}, "weight_storage is 'int8', but with shard 'full' it must be 'float'"),
        ({"shard": "full", "reduce": "power_sgd"}, "reduce is 'power_sgd', but with shard 'full'"),
    ],
)
def test_settings_that_several_processes_cannot_honour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # refused before they look for each other
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
