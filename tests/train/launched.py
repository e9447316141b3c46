"""What test_launch.py lets torchrun start: runs one after the other in two processes, since a start costs seconds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from subspan.memory import MemoryPlan
from subspan.nn.lowrank import MultiHeadLoRA
from subspan.train import pretrain
from subspan.train.presets import build_model
from subspan.train.processes import join
from subspan.train.shard import shard_model
from subspan.train.trainer import PretrainTrainer
from tests.train.micro import Killed, run, settings, stop_after

RANK = int(os.environ.get("RANK", "0"))
#: 42 held-out sequences: 11 batches of 4 for 2 processes, the last one of 2.
UNEVEN = {"eval_batches": 11}
#: The same steps and evaluations in half as many batches.
HALF = {"batch_size": 8, "eval_batches": 1}
STREAM = {"grad_accumulation": 2}
HEADS: dict[str, Any] = {
    "weights": "mhlora", "weight_settings": {"rank": 4, "heads": 2, "alpha": 8.0}, "rank": None, "optimizer": {},
}  # fmt: skip
#: Parallel heads, which the processes share; a checkpoint in the middle of a cycle, evaluations after merges.
PARALLEL: dict[str, Any] = {
    "weights": "lte", "weight_settings": {"rank": 4, "heads": 4, "alpha": 8.0, "merge_every": 4, "reset": True},
    "rank": None, "optimizer": {}, "lr": 3e-3, "save_every": 6, "batch_size": 4, "eval_batches": 4,
}  # fmt: skip
#: Of one process, whose batches are those of two.
PARALLEL_ALONE = {"batch_size": 8, "eval_batches": 2}
#: Recipes of low-rank weights that fully_shard divides: uneven pieces, and a head that is tied to the embedding.
DIVIDED: dict[str, dict[str, Any]] = {
    "mhlora": HEADS | {
        "weight_settings": {"rank": 4, "heads": 3, "alpha": 8.0}, "target_modules": "attention+logit", "steps": 8,
        "method": "galore", "project": "factors", "rank": 2,
    },
    "factored": HEADS | {
        "weights": "factored", "weight_settings": {"rank": 5, "rebalance_gap": 0, "product_decay": 0.1}, "steps": 8,
    },
    "sltrain": HEADS | {"weights": "sltrain", "weight_settings": {"rank": 5, "alpha": 8.0}, "lr": 1e-2, "steps": 8},
}  # fmt: skip
#: Ways to share the work, each with the run of one process that it has to follow.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "projected": ({"max_grad_norm": 0.0}, {"max_grad_norm": 0.0, "grad_accumulation": 2}),
    "slots": ({"gradient": "projected"}, {"gradient": "projected", "grad_accumulation": 2}),
    "divided": ({"shard": "full", "method": "fira", "chunked_loss": True}, {"method": "fira", "grad_accumulation": 2}),
    "heads": (HEADS | {"reduce": "full"}, HEADS | {"grad_accumulation": 2}),
    "bases": ({"shard": "bases"}, {"grad_accumulation": 2}),
    **{name: (given | {"shard": "full"}, given | {"grad_accumulation": 2}) for name, given in DIVIDED.items()},
}


def record_sequences(patch: pytest.MonkeyPatch, file: Path) -> None:
    """Write down what is trained on: a line with the digests of its sequences for each pass."""
    original = PretrainTrainer.training_step

    def training_step(self: PretrainTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with file.open("a") as lines:
            digests = [hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16] for ids in inputs["input_ids"]]
            lines.write(json.dumps([self.state.global_step, digests]) + "\n")
        return original(self, model, inputs, *args, **kwargs)

    patch.setattr(PretrainTrainer, "training_step", training_step)


def stream(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """Settings of a run over a stream, of a model whose dropout needs random numbers."""
    patch.setattr("subspan.train.stream.BLOCK_DOCUMENTS", 20)
    return STREAM | {"model": str(folder / "dropout.json"), "data": f"hf:{folder / 'set'}"} | changes


def poison(patch: pytest.MonkeyPatch, steps: range) -> None:
    """Give one process a loss that is not finite."""
    original = PretrainTrainer.compute_loss

    def compute_loss(self: PretrainTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        bad = self.processes.rank == 1 and self.network.training and self.state.global_step in steps
        return loss * float("nan") if bad else loss

    patch.setattr(PretrainTrainer, "compute_loss", compute_loss)


def record_bytes(patch: pytest.MonkeyPatch, memory: list[MemoryPlan]) -> None:
    """Keep the bytes that the first process shows at the end, planned and measured."""
    original = pretrain.show_end

    def show_end(console: Any, summary: Any, planned: MemoryPlan, measured: MemoryPlan, *args: Any) -> None:
        memory.extend([planned, measured])
        original(console, summary, planned, measured, *args)

    patch.setattr(pretrain, "show_end", show_end)


def with_model(folder: Path, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a way to share the work; a head with factors is tied to the embedding."""
    return changes | ({"model": str(folder / "tied.json")} if name == "mhlora" else {})


def divide(folder: Path) -> dict[str, Any]:
    """A model that every process draws from a seed of its own, divided, and what becomes of a merge of it."""
    found: dict[str, Any] = {}
    with join(2.0) as processes:
        model = build_model(str(folder / "model.json"), seq_len=16, seed=processes.rank)
        own = float(model.get_input_embeddings().weight.detach().double().sum())
        weights = MultiHeadLoRA(heads=1, rank=2).apply(model)
        shard_model(model)
        found["sums"] = own, float(model.get_input_embeddings().weight.detach().full_tensor().double().sum())
        try:
            weights.merge()
        except ValueError as error:
            found["merge"] = str(error)
    return found


def refused(folder: Path, **changes: Any) -> str:
    try:
        run(folder, **changes)
    except (ValueError, OSError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    answers: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        record_sequences(patch, folder / f"packed-{RANK}.jsonl")
        summary = run(folder, output=str(folder / "two"), **UNEVEN)
        answers["eval_loss"] = summary.eval_loss
    run(folder, output=str(folder / "again"), **UNEVEN)

    for name, changes in (("cut", UNEVEN), ("fewer", UNEVEN)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 7)
            run(folder, output=str(folder / name), **changes)
    run(folder, output=str(folder / "cut"), resume="auto", **UNEVEN)
    run(folder, output=str(folder / "more"), resume="auto", **UNEVEN, batch_size=8)

    with pytest.MonkeyPatch.context() as patch:
        record_sequences(patch, folder / f"streamed-{RANK}.jsonl")
        run(folder, **stream(folder, patch, output=str(folder / "stream")))
    with pytest.MonkeyPatch.context() as patch:
        changes = stream(folder, patch, output=str(folder / "stream-cut"))
        with patch.context() as inner, pytest.raises(Killed):
            stop_after(inner, 7)
            run(folder, **changes)
        run(folder, **changes, resume="auto")

    for name, (changes, _) in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            record_bytes(patch, answers.setdefault("memory", {}).setdefault(name, []))
            run(folder, output=str(folder / name), **with_model(folder, name, changes))
    for name in ("bases-cut", "bases-fewer", "mhlora-cut", "factored-fewer"):
        way = name.partition("-")[0]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 7)
            run(folder, output=str(folder / name), **with_model(folder, way, WAYS[way][0]))
    run(folder, output=str(folder / "bases-cut"), shard="bases", resume="auto")
    run(folder, output=str(folder / "mhlora-cut"), resume="auto", **with_model(folder, "mhlora", WAYS["mhlora"][0]))
    run(folder, output=str(folder / "sltrain-more"), resume="auto", **WAYS["sltrain"][0], **HALF)
    answers["divide"] = divide(folder)

    with pytest.MonkeyPatch.context() as patch:
        record_bytes(patch, answers.setdefault("memory", {}).setdefault("parallel", []))
        run(folder, output=str(folder / "parallel"), **PARALLEL)
    for name in ("parallel-cut", "parallel-fewer"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 7)
            run(folder, output=str(folder / name), **PARALLEL)
    run(folder, output=str(folder / "parallel-cut"), resume="auto", **PARALLEL)
    run(folder, output=str(folder / "parallel-more"), resume="auto", **PARALLEL | PARALLEL_ALONE)

    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(5, 7))
        run(folder, output=str(folder / "poisoned"), optimizer={"update_proj_gap": 5})
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(5, 100))
        answers["diverged"] = refused(folder, output=str(folder / "diverged"), max_bad_steps=3)
    answers["checkpoints"] = sorted(path.name for path in (folder / "diverged").glob("checkpoint-*"))
    run(folder, output=str(folder / "chunked"), chunked_loss=True, grad_accumulation=2)

    answers["settings"] = refused(folder, output=str(folder / "other"), weight_decay=0.1 * RANK)
    answers["folder"] = refused(folder, output="/proc/nowhere")
    answers["taken"] = refused(folder, output=str(folder / "two"))
    answers["batch"] = refused(folder, output=str(folder / "odd"), resume="auto", **UNEVEN, batch_size=3)
    answers["backward"] = refused(folder, output=str(folder / "no"), method="fira", gradient="fused", max_grad_norm=0.0)
    with join(2.0) as processes:
        processes.first_then_all(lambda: time.sleep(3.0 * RANK))  # longer than they wait elsewhere
        answers["patience"] = processes.gather(RANK)
        try:
            processes.from_first(lambda: b"\xff".decode())
        except ValueError as error:
            answers["words"] = str(error)
    answers["group"] = dist.is_initialized()
    (folder / f"answers-{RANK}.json").write_text(json.dumps(answers, default=vars))


def prepare(folder: Path) -> None:
    """What the processes find: data, models, and runs of a single process that were killed."""
    settings(folder)
    (folder / "set").mkdir()
    shutil.copy(folder / "text.jsonl", folder / "set" / "train.jsonl")
    model = json.loads((folder / "model.json").read_text())
    (folder / "dropout.json").write_text(json.dumps(model | {"attention_dropout": 0.2}))
    alone: dict[str, dict[str, Any]] = {
        "more": UNEVEN | {"batch_size": 8}, "odd": UNEVEN | {"batch_size": 3},
        "parallel-more": PARALLEL | PARALLEL_ALONE, "sltrain-more": WAYS["sltrain"][0] | HALF,
    }  # fmt: skip
    (folder / "tied.json").write_text(json.dumps(model | {"tie_word_embeddings": True}))
    for name, changes in alone.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_after(patch, 7)
            run(folder, output=str(folder / name), **changes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
