"""Runs with weights of low rank: stopped and continued, merged, carried over."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from subspan.checkpoint.save import LOW_RANK as WEIGHTS_FILE
from subspan.nn.lowrank import LowRankWeights, list_weights
from subspan.optim import LowRankOptimizer
from subspan.train.config import PretrainConfig
from subspan.train.low_rank_files import check_carried, check_low_rank, merge_run
from subspan.train.presets import build_model
from subspan.train.pretrain import pretrain
from subspan.train.trainer import PretrainTrainer
from subspan.train.weights import build_weights
from tests.train.low_rank_runs import SHORT, assert_planned, logits, low_rank, small
from tests.train.micro import Killed, metrics, repeatable, run, settings, stop_after, write_model

pytestmark = pytest.mark.usefixtures("one_layer")


def trained_model(checkpoint: Path) -> nn.Module:
    """The model as it was trained, from the settings and tensors of a checkpoint alone."""
    base = build_model(str(checkpoint / "config.json"), seq_len=8)
    model, weights = build_weights(base, check_low_rank(checkpoint))
    assert weights is not None
    weights.begin_step(8)
    missing, unexpected = model.load_state_dict(load_file(checkpoint / WEIGHTS_FILE), strict=False)
    assert not unexpected and not (missing and not base.config.tie_word_embeddings)
    return model  # type: ignore[no-any-return]


def assert_continues(folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """A run that is killed in the middle of a cycle gives the numbers of one that is not."""
    run(folder, output=str(folder / "whole"), **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 5)
        run(folder, output=str(folder / "cut"), **changes)
    run(folder, output=str(folder / "cut"), resume="auto", **changes)
    assert repeatable(folder / "whole") == repeatable(folder / "cut")
    for file in (WEIGHTS_FILE, "optimizer.safetensors"):
        whole, cut = (load_file(folder / name / "checkpoint-8" / file) for name in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        for name, tensor in whole.items():
            assert torch.equal(cut[name], tensor), name


@pytest.mark.parametrize("name", list_weights())
def test_a_killed_run_continues_bit_exactly_and_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert_continues(tmp_path, monkeypatch, low_rank(name))
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    merged = merge_run(tmp_path / "whole")
    assert merged.output == tmp_path / "whole" / "merged-8" and len(merged.layers) == 7
    ordinary, report = AutoModelForCausalLM.from_pretrained(merged.output, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(ordinary), logits(trained_model(checkpoint)), rtol=1e-5, atol=1e-5)
    assert (merged.output / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="exists; a model is never overwritten"):
        merge_run(checkpoint, merged.output)
    with pytest.raises(ValueError, match="subspan merge RUN_OR_CHECKPOINT"):
        build_model(str(checkpoint))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_an_adapter_continues_bit_exactly_and_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    base = build_model(str(tmp_path / "model.json"), vocab_size=300, seq_len=16)
    base.save_pretrained(tmp_path / "base")
    given = {"r": 4, "lora_plus_ratio": 16, "lora_dropout": 0.1}
    changes = SHORT | {"model": str(tmp_path / "base"), "adapter": "lora", "adapter_settings": given, "rank": None}
    assert_continues(tmp_path, monkeypatch, changes | {"vocab_size": 300})
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    merged = merge_run(checkpoint, tmp_path / "merged")
    ordinary = AutoModelForCausalLM.from_pretrained(merged.output)
    after = logits(ordinary)
    assert not torch.allclose(after, logits(base), atol=1e-4)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), checkpoint / "adapter")
    torch.testing.assert_close(after, logits(loaded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ordinary.lm_head.weight, base.lm_head.weight, rtol=0, atol=0)


def test_dense_weights_before_the_factors_continue_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"rank": 4, "full_rank_steps": 4, "restart_every": 3, "rewarm": 1}
    assert_continues(tmp_path, monkeypatch, low_rank("relora", weight_settings=given))
    lines = [text for line in metrics(tmp_path / "cut") for text in line.get("weights", [])]
    assert len(lines) == 2 and "factors in place of 7 weights" in lines[0] and lines[1].startswith("restart 2")


def test_an_adapter_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = low_rank("relora", adapter="lora", adapter_settings={"r": 4})
    changes["weight_settings"] = {"restart_every": 4, "rewarm": 2}
    assert_continues(tmp_path, monkeypatch, changes)
    assert any("restart 1: 7 layers" in str(line.get("weights")) for line in metrics(tmp_path / "cut"))
    merged = merge_run(tmp_path / "cut")
    trained = trained_model(tmp_path / "whole" / "checkpoint-8")
    ordinary = AutoModelForCausalLM.from_pretrained(merged.output)
    torch.testing.assert_close(logits(ordinary), logits(trained), rtol=1e-5, atol=1e-5)
    assert_planned(tmp_path, **{name: changes[name] for name in ("weights", "weight_settings", "adapter")})


@pytest.mark.parametrize("dtype", ["bfloat16", "amp"])
def test_other_precisions_continue_bit_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    assert_continues(tmp_path, monkeypatch, low_rank("lte", dtype=dtype, grad_accumulation=2))
    assert merge_run(tmp_path / "cut").difference < 0.05


def test_what_is_done_to_the_weights_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []

    def has_gradients(weights: LowRankWeights) -> bool:
        return all(p.grad is not None for p in weights.model.parameters() if p.requires_grad)

    def begin(self: LowRankWeights, step: int) -> None:
        called.append(("begin", step))

    def before(self: LowRankWeights, step: int) -> None:
        assert has_gradients(self)
        called.append(("before", step))

    def end(self: LowRankWeights, step: int, optimizer: torch.optim.Optimizer) -> list[str]:
        assert has_gradients(self) and isinstance(optimizer, LowRankOptimizer)
        called.append(("end", step))
        return ["half of it is done"] if step == 1 else []

    def rate(self: LowRankWeights, step: int, schedule: Any) -> float:
        return 0.5 * schedule(step)  # type: ignore[no-any-return]

    for name, spy in (("begin_step", begin), ("before_step", before), ("end_step", end), ("rate", rate)):
        monkeypatch.setattr(LowRankWeights, name, spy)
    given = settings(tmp_path, **low_rank("mhlora", steps=3, log_every=1, grad_accumulation=2))
    given |= {"schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
    output = io.StringIO()
    pretrain(PretrainConfig(**given), console=Console(file=output, width=150))
    assert called == [("begin", 0), *((what, step) for step in range(3) for what in ("begin", "before", "end"))]
    assert "step 2/3  half of it is done" in output.getvalue()
    assert "replaced: model.layers.*.self_attn.q_proj" in output.getvalue()
    lines = metrics(tmp_path / "run")
    assert {"step": 2, "weights": ["half of it is done"]} in lines
    assert [line["learning_rate"] for line in lines if "loss" in line] == [0.5e-3] * 3


def test_a_head_that_is_tied_is_merged(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    run(tmp_path, **low_rank("mhlora", steps=2, target_modules="attention+logit"))
    merged = merge_run(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(merged.output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trained = trained_model(tmp_path / "run" / "checkpoint-2")
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-5, atol=1e-5)


def test_an_adapter_on_a_tied_head_is_not_merged_wrongly(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    changes = SHORT | {"steps": 2, "adapter": "lora", "target_modules": "logit", "rank": None, "lr": 0.1, "warmup": 0.0}
    run(tmp_path, **changes)
    with pytest.raises(ValueError, match="share"):
        merge_run(tmp_path / "run")
    assert not (tmp_path / "run" / "merged-2").exists()


def test_carry_over(tmp_path: Path) -> None:
    run(tmp_path, output=str(tmp_path / "first"), **low_rank("mhlora", steps=2))
    first = str(tmp_path / "first" / "checkpoint-2")
    run(tmp_path, output=str(tmp_path / "next"), carry_over=first, **low_rank("mhlora", steps=2, lr=1e-9))
    before, after = (load_file(tmp_path / name / "checkpoint-2" / WEIGHTS_FILE) for name in ("first", "next"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="subspan merge"):
        run(tmp_path, output=str(tmp_path / "dense"), carry_over=first, steps=1)
    run(tmp_path, output=str(tmp_path / "full"), steps=1)
    with pytest.raises(ValueError, match="holds an ordinary model"):
        dense = str(tmp_path / "full" / "checkpoint-1")
        run(tmp_path, output=str(tmp_path / "other"), carry_over=dense, **low_rank("mhlora", steps=1))
    with pytest.raises(ValueError, match="holds an ordinary model"):
        merge_run(tmp_path / "full")
    with pytest.raises(ValueError, match=r"holds weights 'mhlora', and this run has weights 'factored'.*subspan merge"):
        unlike = low_rank("factored", steps=1, data=str(tmp_path / "nowhere"))
        run(tmp_path, output=str(tmp_path / "unlike"), carry_over=first, **unlike)
    assert not any((tmp_path / name).exists() for name in ("dense", "other", "unlike"))
    with pytest.raises(ValueError, match="another model"):
        again = low_rank("mhlora", steps=1, weight_settings={"rank": 2})
        run(tmp_path, output=str(tmp_path / "narrow"), carry_over=first, **again)
    # Of the same sizes, but with another factor on what has been learnt.
    nowhere = str(tmp_path / "nowhere")
    given = small("mhlora") | {"alpha": 80.0}
    with pytest.raises(ValueError, match=r"whose weight_settings.alpha is 8.0, and this run has 80.0"):
        check_carried(PretrainConfig(**low_rank("mhlora", weight_settings=given, carry_over=first, data=nowhere)))
    lora = {**SHORT, "steps": 1, "rank": None, "adapter": "lora", "adapter_settings": {"r": 2}}
    run(tmp_path, output=str(tmp_path / "lora"), **lora)
    adapted = {"carry_over": str(tmp_path / "lora" / "checkpoint-1"), "adapter": "lora"}
    check_carried(PretrainConfig(**adapted, adapter_settings={"r": 2, "lora_dropout": 0.1}))
    for changed, message in (({"lora_alpha": 16}, "lora_alpha is 8"), ({"use_rslora": True}, "use_rslora is False")):
        with pytest.raises(ValueError, match=f"whose adapter_settings.{message}"):
            check_carried(PretrainConfig(**adapted, adapter_settings={"r": 2} | changed))


def test_a_killed_run_of_which_only_the_summary_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = low_rank("mhlora", steps=2)

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("subspan.train.pretrain.generate_sample", die)
        run(tmp_path, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train", die)
        assert run(tmp_path, resume="auto", **changes).finished
    assert "sample" not in json.dumps(metrics(tmp_path / "run")) and (tmp_path / "run" / "sample.txt").is_file()


def test_chunked_loss_beside_layers_of_low_rank(tmp_path: Path) -> None:
    plain = run(tmp_path, output=str(tmp_path / "plain"), **low_rank("mhlora", steps=2))
    chunked = run(tmp_path, output=str(tmp_path / "chunked"), chunked_loss=True, **low_rank("mhlora", steps=2))
    assert chunked.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)
