"""A model, a text and settings so small that a run takes a second."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from subspan.train.config import PretrainConfig
from subspan.train.pretrain import RunSummary, pretrain

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
#: What differs between two equal runs.
TIMINGS = ("tokens_per_second", "peak_memory_bytes")


def sentences(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(6, 18))) for _ in range(count)]


def write_model(folder: Path, **changes: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps(LLAMA | changes))
    return path


def write_text_file(folder: Path, count: int = 900) -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in sentences(count)))
    return path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of 12 steps with 2 checkpoints, over 1.5 epochs of the text."""
    if not (folder / "text.jsonl").exists():
        write_model(folder)
        write_text_file(folder)
    return {
        "model": str(folder / "model.json"),
        "data": str(folder / "text.jsonl"),
        "output": str(folder / "run"),
        "vocab_size": 300,
        "rank": 8,
        "lr_scale": 1.0,
        "seq_len": 16,
        "batch_size": 4,
        "steps": 12,
        "log_every": 3,
        "eval_every": 4,
        "eval_batches": 2,
        "save_every": 4,
        "optimizer": {"update_proj_gap": 5},
    } | changes


def run(folder: Path, **changes: Any) -> RunSummary:
    return pretrain(PretrainConfig(**settings(folder, **changes)), console=Console(file=io.StringIO(), width=120))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock measures."""
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in metrics(folder)]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the process die, as by SIGKILL, before the step after this one."""
    from subspan.train.trainer import PretrainTrainer

    def training_step(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= step:
            raise Killed
        return original(self, *args, **kwargs)

    original = PretrainTrainer.training_step
    monkeypatch.setattr(PretrainTrainer, "training_step", training_step)


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""
