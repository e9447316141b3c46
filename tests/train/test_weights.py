"""Runs with weights of low rank: stopped and continued, planned, merged; and what is refused."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from subspan.checkpoint.save import LOW_RANK as WEIGHTS_FILE
from subspan.memory.plan import PeakPlan
from subspan.memory.training import trace_training
from subspan.nn.lowrank import LowRankWeights, list_weights, weight_recipe_class
from subspan.optim import LowRankOptimizer
from subspan.train.config import PretrainConfig
from subspan.train.low_rank_files import check_carried, check_low_rank, merge_run
from subspan.train.optimizer import build_optimizer, check_settings, resolve
from subspan.train.plan import _between_steps, plan_recipe, prepare
from subspan.train.plan_settings import PlanSettings
from subspan.train.presets import build_model
from subspan.train.pretrain import pretrain
from subspan.train.run_folder import shared_batch
from subspan.train.trainer import PretrainTrainer
from subspan.train.weights import batch_shares, build_weights
from tests.train.micro import Killed, metrics, repeatable, run, settings, stop_after, write_model

#: Values for a model of width 32, with a cycle that ends at step 4 of 8.
SMALL = {
    "rank": 4, "heads": 2, "alpha": 8.0, "merge_every": 4, "restart_every": 4, "first_gap": 4, "rewarm": 2,
    "rebalance_gap": 4, "product_decay": 0.01, "unload_every": 4,
}  # fmt: skip
#: A checkpoint in the middle of the first cycle, and one in that of the second.
SHORT = {"steps": 8, "save_every": 3, "eval_every": 8, "log_every": 2, "optimizer": {}, "lr": 1e-3}


@pytest.fixture(autouse=True)
def one_layer(tmp_path: Path) -> None:
    """A text, and a model of a single layer."""
    settings(tmp_path)
    write_model(tmp_path, num_hidden_layers=1)


def small(name: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(weight_recipe_class(name))}
    return {key: value for key, value in SMALL.items() if key in known}


def low_rank(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a short run with a recipe."""
    return {**SHORT, "weights": name, "weight_settings": small(name), "rank": None} | changes


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(24).remainder(300).view(2, 12)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found


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


def built(folder: Path, **changes: Any) -> tuple[Any, LowRankWeights, LowRankOptimizer]:
    """Model, weights and optimizer of a run."""
    config = PretrainConfig(model=str(folder / "model.json"), seq_len=16, **changes)
    check_settings(config)
    config = resolve(config, 32)
    model = build_model(config.model, seq_len=16, dtype=getattr(torch, config.dtype))
    prepare(model, False)
    trained, weights = build_weights(model, config)
    assert weights is not None
    return trained, weights, build_optimizer(trained, config)


def assert_planned(folder: Path, **changes: Any) -> None:
    """The plan is what two steps take; each layer learns, and the merged model computes the same."""
    model, weights, optimizer = built(folder, **changes)
    tokens = torch.arange(64).remainder(300).view(4, 16)
    loss, _ = _between_steps(weights, optimizer, lambda: model(input_ids=tokens, labels=tokens).loss, 1)
    learnt: set[str] = set()
    steps = itertools.count()

    def step() -> None:
        now = next(steps)
        weights.before_step(now)
        for name, factor in weights.factors().items():
            if factor.grad is not None and factor.grad.any():
                learnt.add(name.rpartition(".")[0].partition("_proj")[0])
        optimizer.step()
        weights.end_step(now, optimizer)

    real = PeakPlan.of(trace_training(model, optimizer, loss, step=step, logits_size=300))
    given = {"model": str(folder / "model.json"), "batch_size": 4, "seq_len": 16, "device": "cpu", **changes}
    if changes.get("adapter") not in ("boft", "fourierft", "vblora"):
        plan = plan_recipe(PlanSettings(**given)).bytes
        assert plan.most == real.most and plan.peak == real.peak
    assert len(learnt) == 7 or "vblora" in str(changes)
    before = logits(model)
    weights.merge()
    close = 0.05 if changes.get("dtype") == "bfloat16" else 1e-4
    torch.testing.assert_close(logits(weights.model), before, rtol=close, atol=close)


@pytest.mark.parametrize(("name", "dtype"), [("mhlora", "bfloat16"), *((name, "float32") for name in list_weights())])
def test_planned_bytes_are_those_of_a_run(tmp_path: Path, name: str, dtype: str) -> None:
    assert_planned(tmp_path, weights=name, weight_settings=small(name), dtype=dtype)


#: Of adapters whose defaults are too large for the model.
ADAPTER_SETTINGS: dict[str, dict[str, Any]] = {
    "randlora": {"r": 4},
    "vera": {"r": 4},
    "boft": {"boft_block_size": 4},
    "oft": {"oft_block_size": 4},
    "fourierft": {"n_frequency": 20},
    "vblora": {"num_vectors": 20, "vector_length": 16},
}


@pytest.mark.parametrize(
    "name",
    ["lora", "rslora", "dora", "pissa", "olora", "loha", "lokr", "vera", "randlora", "hra", "oft", "boft", "ia3",
     "fourierft", "vblora", "hira"],
)  # fmt: skip
def test_adapters_are_planned_and_merged(tmp_path: Path, name: str) -> None:
    assert_planned(tmp_path, adapter=name, adapter_settings=ADAPTER_SETTINGS.get(name, {}))


@pytest.mark.parametrize("project", ["factors", "others", "merged"])
def test_projected_gradients(tmp_path: Path, project: Any) -> None:
    chosen = {"weights": "mhlora", "weight_settings": small("mhlora"), "method": "galore", "rank": 3}
    assert_planned(tmp_path, project=project, **chosen)
    _, _, optimizer = built(tmp_path, project=project, **chosen)
    projected = [row.name for row in optimizer.rows() if row.rank is not None]
    parts = {"factors": "lora_", "others": ("embed", "lm_head"), "merged": "proj.weight"}[project]
    expected = [
        row.name
        for row in optimizer.rows()
        if any(part in row.name for part in ([parts], parts)[isinstance(parts, tuple)])
    ]
    assert projected == expected and len(projected) == {"factors": 14, "others": 2, "merged": 7}[project]


def test_groups(tmp_path: Path) -> None:
    scales = {"lr": 1.0, "lr_scale": 0.5, "other_lr_scale": 2.0, "weight_decay": 0.1}
    *_, optimizer = built(tmp_path, adapter="lora", adapter_settings={"lora_plus_ratio": 16}, **scales)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "factors": (0.5, 0.1),
        "factors, B": (8.0, 0.1),
    }
    *_, optimizer = built(tmp_path, weights="mhlora", weight_settings=small("mhlora"), **scales)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "factors": (0.5, 0.1),
        "others": (2.0, 0.1),
        "vectors": (2.0, 0.0),
    }


def test_biases_of_parallel_heads_are_vectors(tmp_path: Path) -> None:
    write_model(tmp_path, num_hidden_layers=1, attention_bias=True)
    *_, optimizer = built(tmp_path, weights="lte", weight_settings=small("lte"), weight_decay=0.1)
    decayed = {row.name for row in optimizer.rows() if row.weight_decay}
    assert not [name for name in decayed if name.endswith("bias")]
    assert any(name.endswith("lora_A") for name in decayed)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "mhlor"}, "did you mean 'mhlora'"),
        ({"weights": "mhlora", "weight_settings": {"head": 2}}, "did you mean 'heads'"),
        ({"weights": "mhlora", "weight_settings": {"heads": "two"}}, "weight_settings"),
        ({"weights": "mhlora", "weight_settings": {"heads": 0}}, "heads is 0; it must be at least 1"),
        ({"weights": "relora", "weight_settings": {"rank": "two"}}, "rank is 'two'; it must be a whole number"),
        ({"weights": "lte", "weight_settings": {"heads": 3}}, "batch_size is 4, which 3 parallel heads"),
        ({"weight_settings": {"heads": 2}}, "choose a recipe with --weights"),
        ({"adapter_settings": {"r": 2}}, "choose one with --adapter"),
        ({"adapter": "lorra"}, "did you mean 'lora'"),
        ({"adapter": "lora", "adapter_settings": {"lora_dropou": 0.1}}, "did you mean 'lora_dropout'"),
        ({"adapter": "lora", "adapter_settings": {"target_modules": "all"}}, "give --target_modules instead"),
        ({"adapter": "lora", "adapter_settings": {"r": "two"}}, "adapter_settings.r is 'two'; it must be a number"),
        ({"adapter": "lora", "adapter_settings": {"lora_alpha": math.nan}}, "lora_alpha is nan; it must be finite"),
        ({"weights": "relora", "weight_settings": {"full_rank_steps": 800}}, "no factor would ever be trained"),
        ({"weights": "relora", "weight_settings": {"restart_every": 5, "rewarm": 5}}, "longer than their re-warming"),
        ({"adapter": "hra", "adapter_settings": {"lora_plus_ratio": 4}}, "has no A and B"),
        ({"adapter": "lora", "adapter_settings": {"lora_plus_ratio": 0}}, "greater than 0"),
        ({"adapter": "lora", "weights": "mhlora"}, "only relora, periodic_lora can restart an adapter"),
        ({"adapter": "lora", "weights": "relora", "weight_settings": {"rank": 8}}, "give it with --adapter_settings"),
        ({"weights": "relora", "weight_settings": {"state": "reset", "prune": 0.5}}, "leave prune out"),
        ({"weights": "mhlora", "rank": 4}, "--weight_settings.rank is that of factors"),
        ({"weights": "mhlora", "method": "galore"}, "give --project factors, others or merged"),
        ({"weights": "mhlora", "method": "scale"}, "takes adamw or a method that has a rank"),
        ({"weights": "mhlora", "project": "factors"}, "the method 'adamw' projects nothing"),
        ({"project": "factors"}, "weights is 'dense': leave project out"),
        ({"weights": "mhlora", "method": "galore", "project": "factors", "rank": 32}, "must be smaller"),
        ({"adapter": "lora", "method": "galore", "project": "others"}, "leave it out"),
        ({"weights": "mhlora", "gradient": "fused", "max_grad_norm": 0.0}, "gradient is 'fused'"),
        ({"weights": "mhlora", "gradient": "projected"}, "gradient is 'projected'"),
        ({"weights": "mhlora", "weight_storage": "int8"}, "weight_storage is 'int8'"),
        ({"weights": "relora", "shard": "full"}, "whole matrices take up the factors between steps"),
        ({"weights": "lte", "shard": "full"}, "it divides its heads over the processes"),
        ({"weights": "factored", "shard": "full"}, "rebalance_gap=200: that takes whole factors and moments; give 0"),
        ({"adapter": "lora", "shard": "full"}, "adapter 'lora' cannot be divided over processes"),
        ({"adapter": "lora", "chunked_loss": True}, "chunked_loss is True"),
        ({"adapter": "boft", "measure_memory": True}, "leave measure_memory out"),
        ({"weights": "lte", "batch_size": 6}, "batch_size is 6, which 4 parallel heads cannot divide evenly"),
        ({"project": "none"}, "project is 'none'; it must be factors, others or merged"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(PretrainConfig(**given), 2 if given.get("shard") else 1)


def test_what_several_processes_with_heads_of_their_own_refuse() -> None:
    given = {"weights": "lte", "batch_size": 4, "weight_settings": {"heads": 4, "merge_every": 10}}
    given |= {"steps": 100, "eval_every": 50, "method": "galore", "project": "others", "rank": 4}
    check_settings(PretrainConfig(**given), 2)
    with pytest.raises(ValueError, match="rank_policy is 'tolerance', which gives copies"):
        check_settings(PretrainConfig(**given, optimizer={"rank_policy": "tolerance"}), 2)
    with pytest.raises(ValueError, match="processes share parallel heads: plan one of them"):
        plan_recipe(PlanSettings(model="llama_9m", weights="lte", batch_size=4, world_size=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": "logit", "chunked_loss": True}, "chunked_loss is true"),
        ({"target_modules": "convolution"}, "selects no matrix"),
        ({"method": "galore", "project": "factors", "rank": 6, "weight_settings": {"rank": 8, "heads": 2}}, None),
        ({"method": "galore", "project": "others", "rank": 32}, "the rank must be smaller than its sides"),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path: Path, given: dict[str, Any], message: str | None) -> None:
    changes = {"weights": "mhlora", "weight_settings": small("mhlora")} | given
    if message is None:
        built(tmp_path, **changes)
        return
    with pytest.raises(ValueError, match=message):
        built(tmp_path, **changes)


def test_a_rank_that_an_adapter_divides_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter 'randlora' does not fit LlamaForCausalLM: division by zero"):
        built(tmp_path, adapter="randlora", adapter_settings={"r": 0})


def test_heads_that_cannot_divide_a_batch_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    changes = low_rank("lte", batch_size=3, data=str(tmp_path / "nowhere"), output=str(tmp_path / "none"))
    for resume in ("none", "auto"):
        with pytest.raises(ValueError, match="batch_size is 3, which 2 parallel heads cannot divide evenly"):
            run(tmp_path, resume=resume, **changes)
    assert not (tmp_path / "none").exists()
    # Two processes with a head each, continued by one with both.
    config = PretrainConfig(**low_rank("lte", batch_size=1, resume="auto"))
    check_settings(config, 1)
    assert shared_batch(config, then=2, now=1, shares=batch_shares(config, 1)) == (2, 1)


def test_chunked_loss_beside_layers_of_low_rank(tmp_path: Path) -> None:
    plain = run(tmp_path, output=str(tmp_path / "plain"), **low_rank("mhlora", steps=2))
    chunked = run(tmp_path, output=str(tmp_path / "chunked"), chunked_loss=True, **low_rank("mhlora", steps=2))
    assert chunked.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)


def test_the_method_by_default() -> None:
    assert PretrainConfig().method == "galore" and PretrainConfig(weights="mhlora").method == "adamw"
    assert PlanSettings(adapter="lora").method == "adamw" and PlanSettings().method == "galore"
