from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from subspan.train import sweep as module
from subspan.train.config import PretrainConfig
from subspan.train.pretrain import pretrain
from subspan.train.sweep import SweepResult, sweep
from subspan.train.trainer import PretrainTrainer
from tests.train.micro import Killed, metrics, settings, stop_after

GRID = {"lr": [0.0001, 0.02], "optimizer": {"scale": [0.25, 1.0]}}


def run_sweep(folder: Path, grid: dict[str, Any] = GRID, **changes: Any) -> tuple[SweepResult, str]:
    output = io.StringIO()
    config = PretrainConfig(**settings(folder, output=str(folder / "sweep"), save_every=6, eval_every=0) | changes)
    return sweep(config, grid, console=Console(file=output, width=160)), output.getvalue()


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep" / "sweep.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_grid_is_run_resumed_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"lr={lr},optimizer.scale={scale}" for lr in (0.0001, 0.02) for scale in (0.25, 1.0)]
    # The second run is killed between two checkpoints.
    calls: list[str] = []

    def second_is_killed(config: PretrainConfig, **kwargs: Any) -> Any:
        calls.append(Path(str(config.output)).name)
        if len(calls) == 2:
            with monkeypatch.context() as patch:
                stop_after(patch, 9)
                return pretrain(config, **kwargs)
        return pretrain(config, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "pretrain", second_is_killed)
        run_sweep(tmp_path)
    assert calls == names[:2]
    assert len(results(tmp_path)) == 1
    before = (tmp_path / "sweep" / names[0] / "metrics.jsonl").stat().st_mtime_ns

    steps: list[int] = []
    original = PretrainTrainer.training_step

    def count(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", count)
    result, text = run_sweep(tmp_path)
    # The first is skipped, the second continues at its checkpoint, the others are run.
    assert steps == [*range(6, 12), *range(12), *range(12)]
    assert (tmp_path / "sweep" / names[0] / "metrics.jsonl").stat().st_mtime_ns == before
    assert "finished already" in text

    losses = [summary.eval_loss for _, summary in result.runs]
    assert losses == sorted(losses)  # type: ignore[type-var]
    assert result.runs[-1][0]["lr"] == 0.0001
    rows = results(tmp_path)
    assert [(row["lr"], row["optimizer.scale"]) for row in rows] == [
        (0.0001, 0.25),
        (0.0001, 1.0),
        (0.02, 0.25),
        (0.02, 1.0),
    ]
    for name, row in zip(names, rows, strict=True):
        assert metrics(tmp_path / "sweep" / name)[-1]["eval_loss"] == row["eval_loss"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_signal_stops_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    original = PretrainTrainer.training_step

    def training_step(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)
    result, text = run_sweep(tmp_path)
    assert (result.runs, result.signal) == ([], signal.SIGINT)
    assert "The same command continues the sweep." in text
    assert len(list((tmp_path / "sweep").glob("lr=*"))) == 1


def test_runs_that_diverged_come_last(tmp_path: Path) -> None:
    result, text = run_sweep(tmp_path, {"lr": [1e30, 0.01]}, max_grad_norm=0.0, warmup=0, max_bad_steps=2)
    assert "the loss was not finite in 2 steps in a row" in text
    assert [settings["lr"] for settings, _ in result.runs] == [0.01, 1e30]
    assert results(tmp_path)[0]["eval_loss"] is None


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "the grid is empty"),
        ({"lrr": [1]}, "'lrr' is no setting that can be swept. Did you mean 'lr'?"),
        ({"output": ["a"]}, "'output' is no setting"),
        ({"lr": 0.1}, "grid.lr is 0.1; it must be a list"),
        ({"lr": []}, r"grid.lr is \[\]"),
        ({"steps": [0]}, "steps is 0"),
    ],
)
def test_a_grid_that_cannot_be_run(tmp_path: Path, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_sweep(tmp_path, grid)


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files and no sweep"):
        run_sweep(tmp_path)
    (tmp_path / "sweep" / "notes.txt").unlink()
    run_sweep(tmp_path, {"lr": [0.01]}, steps=2)
    with pytest.raises(ValueError, match=r"holds a sweep with other settings \(steps: 2 -> 3\)"):
        run_sweep(tmp_path, {"lr": [0.01]}, steps=3)


def test_a_grid_with_a_value_that_cannot_be_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid, weight_settings\.rank=0: weight_settings: rank is 0"):
        run_sweep(tmp_path, {"weight_settings.rank": [4, 0]}, weights="relora", method="adamw", rank=None, optimizer={})
    assert not (tmp_path / "sweep").exists()
