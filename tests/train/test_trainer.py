"""What happens under the Hugging Face Trainer and accelerate."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from subspan.memory import plan
from subspan.optim import GaLore
from subspan.train.config import PretrainConfig, read_config
from subspan.train.optimizer import projected_names
from subspan.train.presets import build_model
from subspan.train.pretrain import pretrain
from subspan.train.summary import generate_sample
from subspan.train.trainer import PretrainTrainer
from tests.train.micro import metrics, run, settings


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[PretrainTrainer]:
    """The trainers of the runs of a test."""
    made: list[PretrainTrainer] = []
    original = PretrainTrainer.__init__

    def remember(self: PretrainTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PretrainTrainer, "__init__", remember)
    return made


def test_which_tensors_are_projected_under_the_trainer(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    run(tmp_path, steps=3)
    optimizer = trainers[0].low_rank_optimizer
    assert type(optimizer) is GaLore
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    expected = {f"model.layers.{layer}.{part}_proj.weight" for layer in range(2) for part in parts}
    assert set(projected_names(optimizer)) == expected
    # And the state is there to show it: a basis for these, none for the others.
    names = {p: name for name, p in trainers[0].network.named_parameters()}
    assert {names[p] for p, state in optimizer.state.items() if "basis" in state} == expected
    assert len(optimizer.state) == len(names)


def test_a_class_with_settings_would_project_the_embedding(tmp_path: Path) -> None:
    # The reason why the Trainer is handed a factory that sees the model: its own two groups divide by weight decay.
    class Rank8(torch.optim.SGD):
        pass

    model = build_model("llama_9m", vocab_size=300)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments, optimizer_cls_and_kwargs=(Rank8, {"lr": 0.01}))
    first, _ = trainer.create_optimizer().param_groups
    assert any(model.get_input_embeddings().weight is p for p in first["params"])
    with pytest.raises(ValueError, match="cannot be projected"):
        GaLore([{"params": group["params"], "rank": 8} for group in trainer.optimizer.param_groups])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_leaves_state_that_exists_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    from accelerate import Accelerator

    settings(tmp_path)
    model = build_model(str(tmp_path / "model.json"), dtype=dtype, seq_len=16)
    optimizer = GaLore(model, rank=8)
    ids = torch.randint(0, 300, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for state in optimizer.state.values():
        # Values that a cast to bfloat16 does not survive.
        state["step"].fill_(70_001)
        state["exp_avg"].add_(1 + 2**-20)
    before = {p: {key: tensor.clone() for key, tensor in state.items()} for p, state in optimizer.state.items()}
    prepared_model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    inner = prepared.optimizer
    assert list(prepared_model.parameters()) == list(model.parameters())
    assert set(inner.state) == set(before)
    for parameter, state in before.items():
        for key, tensor in state.items():
            assert inner.state[parameter][key].dtype == tensor.dtype, key
            assert torch.equal(inner.state[parameter][key], tensor), key


def test_gradients_are_clipped_to_their_real_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainers: list[PretrainTrainer]
) -> None:
    norms: list[tuple[float, float]] = []
    original_clip, original_step = PretrainTrainer._clip_grad_norm, GaLore.step

    def norm(model: torch.nn.Module) -> float:
        return float(
            torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        )

    def clip(self: PretrainTrainer, model: torch.nn.Module) -> Any:
        norms.append((norm(model), math.nan))
        return original_clip(self, model)

    def step(self: GaLore, closure: Any = None) -> Any:
        norms[-1] = (norms[-1][0], norm(trainers[0].network))
        return original_step(self, closure)

    monkeypatch.setattr(PretrainTrainer, "_clip_grad_norm", clip)
    monkeypatch.setattr(GaLore, "step", step)
    run(tmp_path, steps=4, log_every=1, max_grad_norm=0.25)
    assert len(norms) == 4
    logged = [line["grad_norm"] for line in metrics(tmp_path / "run") if "grad_norm" in line]
    assert logged == pytest.approx([before for before, _ in norms], rel=1e-5)
    assert all(before > 0.25 for before, _ in norms)
    assert [after for _, after in norms] == pytest.approx([0.25] * 4, rel=1e-3)


def test_nothing_is_clipped_at_zero(tmp_path: Path) -> None:
    run(tmp_path, output=str(tmp_path / "off"), max_grad_norm=0.0)
    run(tmp_path, output=str(tmp_path / "high"), max_grad_norm=1e9)
    losses = [[line.get("loss") for line in metrics(tmp_path / name)] for name in ("off", "high")]
    assert losses[0] == losses[1]
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "off") if "grad_norm" in line)


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    run(tmp_path, steps=20, log_every=1, lr=0.5, lr_scale=0.1, warmup=4)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    peak = 0.05

    def cosine(step: int) -> float:
        return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2)

    expected = [peak * step / 4 for step in range(4)] + [cosine(step) for step in range(4, 20)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.01 / 9), ("constant", 0.01)])
def test_other_schedules(tmp_path: Path, schedule: str, last: float) -> None:
    run(tmp_path, steps=10, log_every=1, schedule=schedule)
    assert [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line][-1] == pytest.approx(last)


def test_the_model_learns_and_the_loss_is_that_of_the_validation_text(
    tmp_path: Path, trainers: list[PretrainTrainer]
) -> None:
    summary = run(tmp_path, steps=40, eval_batches=5)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(300), rel=0.05)
    assert summary.eval_loss is not None and summary.eval_loss < 3.5
    assert summary.eval_perplexity == pytest.approx(math.exp(summary.eval_loss))
    trainer = trainers[0]
    model = trainer.network.eval()
    losses = []
    for item in trainer.eval_dataset:  # type: ignore[union-attr]
        with torch.no_grad():
            losses.append(float(model(**{key: ids.unsqueeze(0) for key, ids in item.items()}).loss))
    assert len(losses) == 20
    assert sum(losses) / len(losses) == pytest.approx(summary.eval_loss, rel=1e-4)


def test_the_last_line_of_the_metrics(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    summary = run(tmp_path, grad_accumulation=2)
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 12
    assert last["tokens"] == 12 * 4 * 2 * 16
    assert last["eval_loss"] == summary.eval_loss
    assert last["eval_perplexity"] == summary.eval_perplexity
    assert last["tokens_per_second"] > 0
    allocated = sum(
        t.untyped_storage().nbytes() for s in trainers[0].low_rank_optimizer.state.values() for t in s.values()
    )
    assert last["state_bytes"] == last["planned_state_bytes"] == allocated
    assert last["skipped_steps"] == 0


def test_planned_bytes_are_the_measured_ones(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    run(tmp_path, dtype="bfloat16")
    trainer = trainers[0]
    planned = plan(trainer.network, trainer.low_rank_optimizer)
    weights = sum(p.numel() for p in trainer.network.parameters())
    buffers = sum(b.numel() * b.itemsize for b in trainer.network.buffers())
    assert planned.weights == 2 * weights + buffers
    assert planned.gradients == 2 * weights == trainer.gradient_bytes
    assert planned.state == trainer.low_rank_optimizer.state_bytes()


def test_gradients_that_are_not_finite_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PretrainTrainer._clip_grad_norm

    def poison(self: PretrainTrainer, model: torch.nn.Module) -> Any:
        norm = original(self, model)
        if self.state.global_step in (1, 4):
            model.get_parameter("lm_head.weight").grad[0, 0] = math.nan  # type: ignore[index]
        return norm

    monkeypatch.setattr(PretrainTrainer, "_clip_grad_norm", poison)
    with pytest.warns(RuntimeWarning, match=r"lm_head.weight: .*NaN or Inf"):
        summary = run(tmp_path, log_every=1)
    counts = [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert counts == [0, 1, 1, 1] + [2] * 8
    assert summary.skipped_steps == 2
    assert summary.eval_loss is not None and math.isfinite(summary.eval_loss)


@pytest.mark.filterwarnings("ignore:.*NaN or Inf")
def test_a_diverged_run_writes_json_and_says_so(tmp_path: Path) -> None:
    summary = run(tmp_path, lr=1e30, max_grad_norm=0.0, warmup=0, max_bad_steps=12)
    assert summary.finished
    # json.loads would take NaN, but JSON knows no NaN.
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = metrics(tmp_path / "run")
    assert lines[-1]["eval_loss"] is None
    # Not the mean of the losses before, which the Trainer would show by default.
    assert [line["loss"] for line in lines if "loss" in line][-1] is None


def test_activation_checkpointing_changes_no_number(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    run(tmp_path, output=str(tmp_path / "off"))
    run(tmp_path, output=str(tmp_path / "on"), activation_checkpointing=True)
    losses = [[line.get("loss") for line in metrics(tmp_path / name)] for name in ("off", "on")]
    assert losses[0] == losses[1]
    assert [_recomputes(trainer.network) for trainer in trainers] == [False, True]


def _recomputes(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_amp_keeps_float32_weights(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    run(tmp_path, output=str(tmp_path / "amp"), dtype="amp")
    run(tmp_path, output=str(tmp_path / "fp32"))
    assert {p.dtype for p in trainers[0].network.parameters()} == {torch.float32}
    amp, fp32 = ([line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("amp", "fp32"))
    assert amp != fp32
    assert amp == pytest.approx(fp32, rel=0.02)


def test_the_run_folder(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "run"
    config = read_config(folder / "config.yaml")
    assert (config.rank, config.lr, config.optimizer, config.resume) == (8, 0.01, {"update_proj_gap": 5}, "auto")
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint-8", "checkpoint-12", "config.yaml", "data.json", "metrics.jsonl", "sample.txt", "versions.json"),
        ".lock",
    }


def test_a_checkpoint_is_a_model_to_start_from(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    first = run(tmp_path, steps=40, save_every=0)
    checkpoint = tmp_path / "run" / "checkpoint-40"
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 300
    second = run(tmp_path, model=str(checkpoint), output=str(tmp_path / "further"), steps=4)
    assert trainers[1].processing_class.get_vocab() == trainers[0].processing_class.get_vocab()  # type: ignore
    assert first.eval_loss is not None and second.eval_loss is not None
    assert metrics(tmp_path / "further")[0]["loss"] < 3.5
    assert second.eval_loss < first.eval_loss + 0.5


def test_what_a_run_prints(tmp_path: Path) -> None:
    output = io.StringIO()
    pretrain(PretrainConfig(**settings(tmp_path)), console=Console(file=output, width=120))
    text = output.getvalue()
    for part in (
        "14 of 21 tensors projected",
        "model.layers.*.mlp.down_proj",
        "planned memory",
        "state: basis",
        "step 12/12  validation loss",
        "tokens/s",
        "measured",
        "perplexity",
        "sample",
        str(tmp_path / "run"),
    ):
        assert part in text, part


def test_the_bar_on_a_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=140, force_terminal=True)
    pretrain(PretrainConfig(**settings(tmp_path)), console=console)
    text = output.getvalue()
    assert "12/12" in text
    assert "lr 1" in text
    assert "GiB" in text


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, report_to="tensorboard")
    events = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/loss", "eval/loss", "eval/perplexity", "train/tokens_per_second"} <= set(
        accumulator.Tags()["scalars"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, r"a step takes 5000 sequences .* the training text has \d+"),
        ({"method": "galoer"}, "galoer"),
        ({"model": "llama_8m"}, "llama_9m"),
        ({"seq_len": 100}, "seq_len 100 is longer than the 64 positions"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    # A run that was refused leaves nothing that would stand in the way of the next.
    assert not [path for path in tmp_path.glob("run/*") if path.name != ".lock"]


def test_a_reporter_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to is 'wandb', which is not installed: pip install wandb"):
        run(tmp_path, report_to="wandb")


def test_every_held_out_sequence_is_evaluated(tmp_path: Path, trainers: list[PretrainTrainer]) -> None:
    """Also when they fill no batch, or leave one that is not full."""
    run(tmp_path, steps=2, batch_size=64, output=str(tmp_path / "large"))
    held_out = trainers[0].eval_dataset
    assert len(held_out) % 64
    assert len(trainers[0].get_eval_dataloader().dataset) == len(held_out)
    seen = sum(len(batch["input_ids"]) for batch in trainers[0].get_eval_dataloader())
    assert seen == len(held_out)
    assert math.isfinite(metrics(tmp_path / "large")[-1]["eval_loss"])


def test_the_loss_of_the_last_step_is_logged(tmp_path: Path) -> None:
    run(tmp_path, steps=7, log_every=5)
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert steps == [1, 5, 7]


def test_a_checkpoint_generates_with_a_cache(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True


def test_the_sample_ends_where_a_model_has_no_more_positions() -> None:
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16, **tokens))
    tokenizer: Any = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids.tolist())))
    validation: Any = SimpleNamespace(sequences=torch.arange(16).unsqueeze(0))
    before, after = generate_sample(model, tokenizer, validation, seed=0)
    assert (len(before.split()), len(after.split())) == (8, 8)


def test_the_method_is_checked_before_any_data_is_read(tmp_path: Path) -> None:
    for changes, message in (({"method": "galor"}, "galore"), ({"optimizer": {"scal": 1.0}}, "scale")):
        with pytest.raises(ValueError, match=message):
            pretrain(PretrainConfig(data=str(tmp_path / "missing.txt"), **changes))
