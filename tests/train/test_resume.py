"""Stopping and continuing gives the numbers of a run that was never stopped."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from subspan.train.config import PretrainConfig
from subspan.train.pretrain import pretrain
from subspan.train.trainer import STEPS_FILE, PretrainTrainer
from tests.train.micro import Killed, metrics, repeatable, run, settings, stop_after, write_model


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def assert_equal_runs(first: Path, second: Path, step: int) -> None:
    assert repeatable(first) == repeatable(second)
    a, b = weights(first, step), weights(second, step)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def optimizer_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "optimizer.safetensors")


# The checkpoint at step 4 is between two lines of metrics (3 and 6), so a loss that spans it must come out right too.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "amp"},
        {"method": "fira", "grad_accumulation": 2, "schedule": "linear"},
        {"method": "frugal", "rank": None, "optimizer": {"update_proj_gap": 3}},
        {"rank": 30, "optimizer": {"rank_policy": "tolerance", "rtol": 0.05, "update_proj_gap": 3}},
        {"gradient": "fused", "grad_accumulation": 2},
        {"gradient": "projected", "share_inputs": True, "grad_accumulation": 2, "activation_checkpointing": True},
        {"gradient": "fused", "method": "apollo", "max_grad_norm": 0.0},
    ],
    ids=["fp32", "bf16", "amp", "accumulation", "frugal", "tolerance", "folded", "projected", "updated in backward"],
)
def test_a_killed_run_continues_bit_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = run(tmp_path, output=str(tmp_path / "whole"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"), **changes)
    # Lines after the last checkpoint were written and are to be dropped.
    assert [line["step"] for line in metrics(tmp_path / "cut") if "ranks" not in line][-1] == 6
    summary = run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
    assert summary.eval_loss == whole.eval_loss
    state, expected = optimizer_state(tmp_path / "cut", 12), optimizer_state(tmp_path / "whole", 12)
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "q_galore", "dtype": "bfloat16"},
        {"method": "q_apollo_mini", "rank": None, "gradient": "fused", "max_grad_norm": 0.0},
    ],
    ids=["bf16", "updated in backward"],
)
def test_weights_in_int8_continue_bit_exactly_from_an_ordinary_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings(tmp_path)
    write_model(tmp_path, hidden_size=64, intermediate_size=128)
    run(tmp_path, output=str(tmp_path / "whole"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"), **changes)
    steps_file = tmp_path / "cut" / "checkpoint-4" / STEPS_FILE
    steps_file.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"{STEPS_FILE} is missing"):
        run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    (tmp_path / "away").rename(steps_file)
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values())
    steps = load_file(checkpoint / STEPS_FILE)
    up = "model.layers.0.mlp.up_proj.weight"
    codes = model.state_dict()[up].double() / steps[f"{up}_steps"].double()
    assert len(steps) == 14
    assert (codes - codes.round()).abs().max() < 0.5 and codes.abs().max() > 100
    assert (codes - codes.round()).abs().mean() < 0.1


def test_killed_in_the_second_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.micro import sentences

    settings(tmp_path)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(28)))
    changes = {"validation": 0.3}
    run(tmp_path, output=str(tmp_path / "whole"), **changes)
    trained = json.loads((tmp_path / "whole" / "data.json").read_text())["train_sequences"]
    assert trained // 4 < 8, "the text must be over before the checkpoint at step 8"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 9)
        run(tmp_path, output=str(tmp_path / "cut"), **changes)
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)


def test_a_stream_continues_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("subspan.train.stream.BLOCK_DOCUMENTS", 20)
    settings(tmp_path)
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "text.jsonl", tmp_path / "set" / "train.jsonl")
    changes = {"data": f"hf:{tmp_path / 'set'}", "grad_accumulation": 2}
    run(tmp_path, output=str(tmp_path / "whole"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"), **changes)
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto", **changes)
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)


@pytest.mark.filterwarnings("ignore:.*NaN or Inf")
def test_the_count_of_skipped_steps_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PretrainTrainer._clip_grad_norm

    def poison(self: PretrainTrainer, model: torch.nn.Module) -> Any:
        norm = original(self, model)
        if self.state.global_step == 1:
            model.get_parameter("lm_head.weight").grad.fill_(torch.nan)  # type: ignore[union-attr]
        return norm

    monkeypatch.setattr(PretrainTrainer, "_clip_grad_norm", poison)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path)
    assert run(tmp_path, resume="auto").skipped_steps == 1
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 1, 1, 1, 1]


def test_a_model_with_dropout_continues_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings(tmp_path)
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    (tmp_path / "model.json").write_text(json.dumps(gpt2))
    run(tmp_path, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"))
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = run(tmp_path, output=str(tmp_path / "whole"))
    original = PretrainTrainer.training_step

    def training_step(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    output = io.StringIO()
    config = PretrainConfig(**settings(tmp_path, output=str(tmp_path / "cut")))
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", training_step)
        stopped = pretrain(config, console=Console(file=output, width=200))
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert (stopped.finished, stopped.signal, stopped.step) == (False, number, 5)
    assert stopped.eval_loss is None
    assert (tmp_path / "cut" / "checkpoint-5").is_dir()
    assert f"subspan pretrain --config {tmp_path / 'cut' / 'config.yaml'} --resume auto" in output.getvalue()

    finished = run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert finished.finished
    assert finished.eval_loss == whole.eval_loss
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)


def test_killed_after_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from subspan.train import pretrain as module

    run(tmp_path, output=str(tmp_path / "whole"))

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "generate_sample", die)
        run(tmp_path, output=str(tmp_path / "cut"))
    assert (tmp_path / "cut" / "checkpoint-12").is_dir()
    assert "state_bytes" not in metrics(tmp_path / "cut")[-1]
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train", die)
        run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
    assert (tmp_path / "cut" / "sample.txt").read_text() == (tmp_path / "whole" / "sample.txt").read_text()


def test_killed_before_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 3)
        run(tmp_path, output=str(tmp_path / "cut"))
    assert len(metrics(tmp_path / "cut")) == 2
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert repeatable(tmp_path / "whole") == repeatable(tmp_path / "cut")


def test_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, output=str(tmp_path / "whole"))
    original = PretrainTrainer._save_rng_state

    def die(self: PretrainTrainer, output_dir: str) -> None:
        # The weights and the optimizer are written already.
        if self.state.global_step == 8:
            assert (Path(output_dir) / "optimizer.safetensors").exists()
            raise Killed
        original(self, output_dir)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PretrainTrainer, "_save_rng_state", die)
        run(tmp_path, output=str(tmp_path / "cut"))
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
    assert not (tmp_path / "cut" / ".incomplete").exists()


def test_a_half_written_folder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"))
    # As a copy that broke off, or another program, may leave it.
    broken = tmp_path / "cut" / "checkpoint-11"
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", broken)
    (broken / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-11 is no whole checkpoint: .*progress\.json is missing"):
        run(tmp_path, output=None, resume=str(broken))
    run(tmp_path, output=str(tmp_path / "cut"), resume="auto")
    assert repeatable(tmp_path / "whole") == repeatable(tmp_path / "cut")


def test_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, output=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    summary = run(tmp_path, output=None, resume=str(tmp_path / "again" / "checkpoint-8"))
    assert Path(summary.output) == tmp_path / "again"
    assert_equal_runs(tmp_path / "whole", tmp_path / "again", 12)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, save_every=2, keep_checkpoints=3)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-8",
        "checkpoint-10",
        "checkpoint-12",
    }


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        again = run(tmp_path, resume="auto")
    assert again == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_with_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=r"lr: 0.01 -> 0.02; optimizer.update_proj_gap: 5 -> 4"):
        run(tmp_path, resume="auto", lr=0.02, optimizer={"update_proj_gap": 4})
    with pytest.raises(ValueError, match="already holds a run, and a run is never overwritten"):
        run(tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_how_often_to_log_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path, output=str(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, output=str(tmp_path / "cut"))
    summary = run(tmp_path, output=str(tmp_path / "cut"), resume="auto", log_every=1, eval_every=6, save_every=6)
    assert summary.eval_loss == whole.eval_loss
    lines = metrics(tmp_path / "cut")
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [line["step"] for line in lines if "eval_loss" in line][:-1] == [4, 6, 12]


def test_data_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('\n{"text": "one more document of several words"}')
    with pytest.raises(ValueError, match=r"the data of the run in .* has changed \(.*train"):
        run(tmp_path, resume="auto")


def test_other_versions_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path)
    file = tmp_path / "run" / "versions.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch": "1.0"}))
    output = io.StringIO()
    pretrain(PretrainConfig(**settings(tmp_path, resume="auto")), console=Console(file=output, width=300))
    assert f"torch: 1.0 -> {torch.__version__}" in output.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "nowhere"}, "resume 'nowhere': no such checkpoint folder"),
        ({"output": "text.jsonl"}, r"text.jsonl' is a file"),
        ({"output": "full"}, r"full' holds other files and no run"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    settings(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    if "output" in changes:
        changes = {"output": str(tmp_path / changes["output"])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, **changes)


def test_a_checkpoint_is_continued_in_its_own_folder(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="continued in its own folder"):
        run(tmp_path, output=str(tmp_path / "other"), resume=str(tmp_path / "run" / "checkpoint-8"))


def test_the_folder_without_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, output=None, steps=2).output == "runs/galore-model"
    assert run(tmp_path, output=None, steps=2).output == "runs/galore-model-2"
    assert run(tmp_path, output=None, steps=2, resume="auto").output == "runs/galore-model-2"
    assert run(tmp_path, output=None, steps=2).output == "runs/galore-model-3"


def test_a_mixture_of_experts_continues_with_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are saved under other names than they have in memory."""
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
    changes = settings(tmp_path) | {"rank": 4}
    config = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(config | experts | {"num_experts_per_tok": 1}))
    whole = run(tmp_path, **changes | {"output": str(tmp_path / "whole")})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 7)
        run(tmp_path, **changes | {"output": str(tmp_path / "cut")})
    resumed = run(tmp_path, **changes | {"output": str(tmp_path / "cut"), "resume": "auto"})
    assert resumed.eval_loss == whole.eval_loss
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", 12)
