from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from subspan.analysis.heads_bench import bench_heads
from subspan.analysis.heads_study import (
    MODES,
    Contender,
    HeadsRow,
    StudiedModel,
    measure_heads,
    recipe_of,
    trained_parameters,
)
from subspan.analysis.timing import PROCESS, Clock
from subspan.nn.lowrank.count import count_trained
from tests.train.micro import LLAMA, write_model

HIDDEN, MLP, LAYERS, VOCABULARY = 32, 64, 2, 300
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: Inputs and outputs of the layers of a kind, in one block or, for the output layer, in all.
LLAMA_SIZES = {
    "attention": LAYERS * [(HIDDEN, HIDDEN)] * 4,
    "mlp": LAYERS * [(HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)],
    "logit": [(HIDDEN, VOCABULARY)],
}
GPT2_SIZES = {
    "attention": LAYERS * [(HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN)],
    "mlp": LAYERS * [(HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN)],
    "logit": [(HIDDEN, VOCABULARY)],
}


def studied(folder: Path, target: str = "all-linear", batch_size: int = 4) -> StudiedModel:
    return StudiedModel(str(write_model(folder)), 8, batch_size, target)


def bench(folder: Path, ranks: list[int], heads: list[int], **changes: Any) -> list[HeadsRow]:
    console = Console(file=io.StringIO(), width=100)
    settings: dict[str, Any] = {"seq_len": 8, "rounds": 1, "output": folder / "out", "console": console}
    return bench_heads(ranks, heads, **settings | {"model": str(write_model(folder))} | changes)


@pytest.mark.parametrize("target", ["attention", "mlp", "logit", "attention+logit", "attention+mlp+logit"])
@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_parameters_that_are_trained(tmp_path: Path, config: dict[str, Any], target: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps(config))
    sizes = LLAMA_SIZES if config is LLAMA else GPT2_SIZES
    chosen = [size for kind in target.split("+") for size in sizes[kind]]
    model = StudiedModel(str(tmp_path / "model.json"), 8, 4, target)
    # The output layer of GPT-2 is the embedding: both are frozen, and their heads are the same.
    frozen = sum(inputs * outputs for inputs, outputs in chosen)
    heads = sum(3 * 2 * (inputs + outputs) for inputs, outputs in chosen)
    assert trained_parameters(model, heads=3, rank=2) == trained_parameters(model) - frozen + heads
    held = Contender(model, recipe_of("sequential", 3, 2)).optimizer.param_groups[0]["params"]
    assert sum(parameter.numel() for parameter in held) == trained_parameters(model, 3, 2)
    assert count_trained(Contender(model, recipe_of("parallel", 3, 2)).model) == trained_parameters(model, 3, 2)


def test_time_is_counted_in_iterations_with_full_weights(tmp_path: Path) -> None:
    full = Contender(studied(tmp_path))

    def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
        owner, name = function.__self__, function.__name__  # type: ignore[attr-defined]
        return (2.0 if owner is full else {"iterate": 3.0, "merge": 1.0}[name]), function()

    def row(mode: Any) -> HeadsRow:
        clock = Clock("made up", seconds)
        return measure_heads(studied(tmp_path), full, mode, 2, 3, merge_every=10, rounds=2, clock=clock)

    parallel, sequential = row("parallel"), row("sequential")
    assert (parallel.iteration, parallel.merge, parallel.with_merges) == (1.5, 0.5, pytest.approx(1.55))
    assert (sequential.iteration, sequential.merge, sequential.with_merges) == (1.5, None, 1.5)
    assert parallel.milliseconds == 3000 and parallel.least_iteration == 1.5 and parallel.rounds == 2
    assert parallel.trained == sequential.trained
    # Each head has its own copy of what has no heads.
    assert parallel.state_bytes > sequential.state_bytes  # type: ignore[operator]


@pytest.mark.parametrize("mode", MODES)
def test_an_iteration_trains_and_a_merge_merges(tmp_path: Path, mode: Any) -> None:
    contender = Contender(studied(tmp_path), recipe_of(mode, 2, 2))
    before = {name: tensor.clone() for name, tensor in contender.model.state_dict().items()}
    for _ in range(3):
        contender.iterate()
    changed = {name for name, tensor in contender.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("lora_B") for name in changed)
    assert not any(name.endswith("_proj.weight") for name in changed)
    if mode == "parallel":
        contender.merge()
        after = contender.model.state_dict()
        assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("_proj.weight"))


@pytest.mark.filterwarnings("ignore:.*gradient holds NaN")
def test_what_is_skipped_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Contender(studied(tmp_path))
    build = StudiedModel.build

    def broken(self: StudiedModel) -> nn.Module:
        model = build(self)
        next(model.parameters()).data.fill_(torch.nan)
        return model

    monkeypatch.setattr(StudiedModel, "build", broken)
    row = measure_heads(studied(tmp_path), full, "sequential", 1, 1, merge_every=10, rounds=1, clock=PROCESS)
    assert row.iteration is None
    assert row.reason == "its loss or gradients are not finite"


def test_a_row_that_does_not_fit_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_memory(self: Contender) -> None:
        if self.weights is not None:
            raise RuntimeError("out of memory: 3 GB\nand more")

    monkeypatch.setattr(Contender, "iterate", full_memory)
    rows = bench(tmp_path, [1], [1])
    assert [row.reason for row in rows] == [None, "out of memory: 3 GB", "out of memory: 3 GB"]
    assert not (tmp_path / "out" / "heads.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": []}, r"ranks is \[\]; it must be at least 1"),
        ({"heads": [2, 0]}, r"heads is \[2, 0\]; it must be at least 1"),
        ({"heads": [3]}, "batch_size is 4, which 3 parallel heads cannot divide evenly: give a multiple of 3"),
        ({"rounds": 0}, "rounds is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"vocab_size": 1}, "vocab_size is 1; it must be at least 2 tokens"),
        ({"ranks": [1, 33]}, r"rank is 33, but .* is a matrix \(32, 32\)"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be float32, bfloat16 or amp"),
        ({"others": "copied"}, "others is 'copied'; it must be replicated or shared"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"target_modules": "nothing"}, "the pattern 'nothing' selects no matrix"),
        ({"model": "llama_9"}, "Did you mean llama_9m"),
    ],
)
def test_what_cannot_be_measured(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"ranks": [1], "heads": [1]} | changes
    with pytest.raises(ValueError, match=message):
        bench(tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def test_what_has_no_heads_may_be_shared(tmp_path: Path) -> None:
    _, sequential, parallel = bench(tmp_path, [2], [2], others="shared")
    assert parallel.state_bytes == sequential.state_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "amp"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    rows = bench(tmp_path, [2], [2], dtype=dtype)
    assert [row.reason for row in rows] == [None] * 3


def test_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    config = StudiedModel(str(write_model(tmp_path)), 8, 4, "logit", vocab_size=500)
    held = Contender(config, recipe_of("sequential", 2, 3))
    assert held.model.config.vocab_size == 500 and int(held.batch.max()) >= VOCABULARY
    assert count_trained(held.model) == trained_parameters(config, 2, 3)
    checkpoint = tmp_path / "checkpoint"
    dataclasses.replace(config, vocab_size=None).build().save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"vocab_size is 200, but model .* has weights for {VOCABULARY} tokens"):
        StudiedModel(str(checkpoint), 8, 4, vocab_size=200).build()
    row = bench(tmp_path, [2], [2], model=str(checkpoint), target_modules="logit")[-1]
    assert row.reason is None and row.trained == trained_parameters(StudiedModel(str(checkpoint), 8, 4, "logit"), 2, 2)
