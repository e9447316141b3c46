"""``subspan checkpoint`` and runs that start from what another one has learnt."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from subspan.analysis.spectrum_sources import _weight_files
from subspan.checkpoint import CheckpointWriteError, latest, staging, verify
from subspan.cli.main import main
from subspan.train.presets import build_model
from tests.checkpoint.models import Payload
from tests.train.micro import metrics, repeatable, run


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with AdamW, and the files that it was made of."""
    folder = tmp_path_factory.mktemp("dense")
    run(folder, method="adamw", rank=None, optimizer={}, lr=3e-3)
    return folder


def test_inspect_and_verify(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(dense / "run"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in described] == [8, 12]
    assert described[1]["best"] and described[1]["eval_loss"] < described[0]["eval_loss"]
    assert all(entry["ok"] and entry["method"] == "adamw" for entry in described)
    checkpoint = dense / "run" / "checkpoint-12"
    assert not [path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".bin", ".pth")]
    assert main(["checkpoint", "inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.safetensors" in shown and "exp_avg" in shown and "whole" in shown
    assert main(["checkpoint", "verify", str(dense / "run")]) == 0
    copy = dense / "copy" / "checkpoint-12"
    shutil.copytree(checkpoint, copy)
    with open(copy / "model.safetensors", "rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(copy.parent), "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["problems"] == ["model.safetensors is not what was written (its SHA-256 differs)"]
    assert main(["checkpoint", "inspect", str(dense / "nothing")]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_what_cannot_be_converted(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(dense / "run" / "checkpoint-12")
    for arguments, message in {
        (source, str(tmp_path / "checkpoint-13")): "is the name of step 13 and this is step 12",
        (source, str(tmp_path / "checkpoint-13"), "--rank", "2"): "is the name of step 13 and this is step 12",
        (source, str(tmp_path / "a"), "--target_modules", "x"): "--target_modules are for --from",
        (str(dense / "run"), str(tmp_path / "a")): "it is a run, of which one checkpoint is wanted",
    }.items():
        assert main(["checkpoint", "convert", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["versions.json", "data.json"])
def test_a_damaged_file_of_a_run_is_named(
    name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(dense / "run", copied)
    for content in ("[]", '{"', None):
        (copied / name).unlink()
        if content is not None:
            (copied / name).write_text(content)
        assert main(["pretrain", "--config", str(copied / "config.yaml"), "--output", str(copied)]) == 1
        assert f"{name} cannot be used" in capsys.readouterr().err
        (copied / name).write_text(content or "")


def test_another_method_starts_from_a_checkpoint(dense: Path, tmp_path: Path) -> None:
    source = dense / "run" / "checkpoint-12"
    converted = tmp_path / "warm"
    assert main(["checkpoint", "convert", str(source), str(converted), "--to-method", "galore", "--rank", "8"]) == 0
    assert verify(converted).ok
    assert not (converted / "trainer_state.json").exists()
    state = json.loads((converted / "optimizer.json").read_text())
    assert state["origin"]["method"] == "galore"
    changes: dict[str, Any] = {"method": "galore", "rank": 8, "steps": 4, "log_every": 1, "warmup": 0.0}
    first = run(dense, output=str(tmp_path / "first"), carry_over=str(source), **changes)
    second = run(dense, output=str(tmp_path / "second"), carry_over=str(converted), **changes)
    cold = run(dense, output=str(tmp_path / "cold"), **changes)
    assert first.eval_loss is not None and cold.eval_loss is not None
    losses = [line["loss"] for line in metrics(tmp_path / "first") if "loss" in line]
    before = [line["loss"] for line in metrics(dense / "run") if "loss" in line]
    assert abs(losses[0] - before[-1]) < 0.5 < before[0] - losses[0]
    assert first.eval_loss < cold.eval_loss - 0.2
    assert second.eval_loss == pytest.approx(first.eval_loss, abs=0.02)
    assert main(["checkpoint", "convert", str(source), str(converted), "--rank", "8"]) == 1  # it is there already


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(dense: Path, tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from subspan.train.config import PretrainConfig
    from subspan.train.pretrain import pretrain
    from tests.train.micro import settings

    whole = run(dense, output=str(tmp_path / "cut"))
    newest = tmp_path / "cut" / "checkpoint-12"
    os.truncate(newest / "optimizer.safetensors", 1000)
    output = io.StringIO()
    config = PretrainConfig(**settings(dense, output=str(tmp_path / "cut"), resume="auto"))
    again = pretrain(config, console=Console(file=output, width=500))
    assert f"{newest} is passed over: optimizer.safetensors has 1000 bytes" in output.getvalue()
    assert again.eval_loss == whole.eval_loss
    assert latest(tmp_path / "cut") == newest
    os.truncate(newest / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"checkpoint-12 is no whole checkpoint: model\.safetensors has 1000 bytes"):
        run(dense, output=None, resume=str(newest))


def test_pickles_in_a_run_are_never_opened(dense: Path, tmp_path: Path) -> None:
    run(dense, output=str(tmp_path / "run"), steps=4)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    bomb = pickle.dumps(Payload(str(tmp_path / "executed")))
    names = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin")
    for name in (*names, "pytorch_model.bin", ".metadata"):
        (checkpoint / name).write_bytes(bomb)
        (tmp_path / "run" / name).write_bytes(bomb)
    run(dense, output=str(tmp_path / "next"), steps=4, carry_over=str(checkpoint))
    for line in (tmp_path / "run" / "metrics.jsonl", tmp_path / "next" / "metrics.jsonl"):
        assert line.exists()
    # As if it had been killed before it had finished.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    run(dense, output=str(tmp_path / "run"), steps=4, resume="auto")
    assert not (tmp_path / "executed").exists()


def test_a_disk_that_fills_up_in_a_run(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(dense, output=str(tmp_path / "whole"))
    original = staging.digest_file

    def full(path: Path, **keywords: Any) -> str:
        if path.parent.name == "checkpoint-8" and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "digest_file", full)
        with pytest.raises(CheckpointWriteError, match=r"checkpoint-8 could not be written: .*No space left"):
            run(dense, output=str(tmp_path / "cut"))
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    run(dense, output=str(tmp_path / "cut"), resume="auto")
    assert repeatable(tmp_path / "cut") == repeatable(tmp_path / "whole")


def test_projected_gradients_go_on_from_a_dense_run(dense: Path, tmp_path: Path) -> None:
    source = dense / "run" / "checkpoint-12"
    changes: dict[str, Any] = {"carry_over": str(source), "gradient": "projected", "steps": 4, "log_every": 1}
    run(dense, output=str(tmp_path / "run"), **changes)
    before = [line["loss"] for line in metrics(dense / "run") if "loss" in line]
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert max(losses) < before[0] - 0.5


class Projector:
    """Looks like the classes of galore-torch and apollo-torch."""

    def __init__(self, ortho_matrix: torch.Tensor) -> None:
        self.rank, self.update_proj_gap, self.scale, self.proj_type = 4, 5, 0.25, "std"
        self.ortho_matrix = ortho_matrix


def test_parts_are_taken_for_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.ones(2, 2)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    for read in (build_model, _weight_files):
        with pytest.raises(ValueError, match=r"parts that several processes wrote; .*subspan checkpoint convert"):
            read(str(tmp_path) if read is build_model else tmp_path)  # type: ignore[operator]


#: Package: module and class of its projector, what its groups have beside, and the subspace that takes over.
PACKAGES: dict[str, tuple[str, str, dict[str, str], str]] = {
    "galore-torch": ("galore_torch.galore_projector", "GaLoreProjector", {}, "ExactSVD"),
    "apollo-torch": (
        "apollo_torch.random_projector",
        "GradientProjector",
        {"proj": "random", "scale_type": "tensor"},
        "Gaussian",
    ),
}


#: What may be wrong in such a state, and what is said then.
CHANGES: dict[Callable[[Any], object], str] = {
    lambda content: content["param_groups"][1].pop("proj_type"): "proj_type",
    lambda content: content["param_groups"][0].pop("params"): "params",
    lambda content: content["param_groups"][0].update(correct_bias=False): "correct_bias=False is not converted",
    lambda content: content["state"][0].pop("exp_avg"): "exp_avg",
    lambda content: content["state"][0].pop("step"): "step",
    lambda content: content["state"].update({0: [1]}): "is not as",
    lambda content: content.update(param_groups=3): "is not as",
}


def foreign_file(
    file: Path,
    network: torch.nn.Module,
    projector: type,
    more: dict[str, str],
    payload: object = None,
    change: Callable[[Any], object] = bool,
) -> None:
    """What the AdamW of these packages saves after 7 steps."""
    targets = [p for name, p in network.named_parameters() if "layers" in name and p.ndim == 2]
    others = [p for p in network.parameters() if all(p is not t for t in targets)]
    common = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
    low = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std", **more}
    groups = [
        {**common, "params": list(range(len(others)))},
        {**common, **low, "params": list(range(len(others), len(others) + len(targets)))},
    ]
    state: dict[int, dict[str, object]] = {}
    for index, p in enumerate([*others, *targets]):
        shape = tuple(p.shape)
        held: dict[str, object] = {"step": 7}
        if index >= len(others):
            rows, columns = shape
            right = rows >= columns
            Q = torch.linalg.qr(torch.randn(columns if right else rows, 4)).Q
            held["projector"] = projector(Q.mT if right else Q)
            shape = (rows, 4) if right else (4, columns)
        state[index] = held | {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)}
    if payload is not None:
        state[0]["extra"] = payload
    content = {"state": state, "param_groups": groups}
    change(content)
    torch.save({"optimizer": content}, file)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_state_of_another_package(
    package: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense / "run" / "checkpoint-12"
    network = build_model(str(model), seq_len=16)
    place, name, more, subspace = PACKAGES[package]
    with monkeypatch.context() as patch:
        # Pickles name a class by where it is, so this one has to be there while they are written.
        module = types.ModuleType(place)
        kind = type(name, (Projector,), {"__module__": place})
        setattr(module, name, kind)
        patch.setitem(sys.modules, place.split(".")[0], types.ModuleType(place.split(".")[0]))
        patch.setitem(sys.modules, place, module)
        foreign_file(tmp_path / "optimizer.pt", network, kind, more)
        foreign_file(tmp_path / "evil.pt", network, kind, more, Payload(str(tmp_path / "executed")))
        for number, change in enumerate(CHANGES):
            foreign_file(tmp_path / f"changed-{number}.pt", network, kind, more, change=change)
    convert = ["checkpoint", "convert", "--from", package, "--model", str(model)]
    assert main([*convert, str(tmp_path / "optimizer.pt"), str(tmp_path / "imported")]) == 0
    assert main(["checkpoint", "inspect", str(tmp_path / "imported"), "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert described["method"] == package.split("-")[0] and subspace in described["parts"]["subspace"]
    states = {entry["name"]: entry["state"] for entry in described["parameters"]}
    assert states["model.layers.0.mlp.up_proj.weight"]["basis"]["shape"][1] == 4
    assert "basis" not in states["model.embed_tokens.weight"]
    changes: dict[str, Any] = {"method": described["method"], "steps": 2, "rank": 4}
    changes["carry_over"] = str(tmp_path / "imported")
    assert run(dense, output=str(tmp_path / "next"), **changes).finished

    capsys.readouterr()
    assert main([*convert, str(tmp_path / "evil.pt"), str(tmp_path / "bad")]) == 1
    error = capsys.readouterr().err
    assert "asks for more than tensors and projectors" in error and "open" in error
    assert not (tmp_path / "executed").exists() and not (tmp_path / "bad").exists()
    # A file that is not as the package writes it is refused by its name, whatever is wrong with it.
    for number, message in enumerate(CHANGES.values()):
        assert main([*convert, str(tmp_path / f"changed-{number}.pt"), str(tmp_path / "bad")]) == 1
        error = capsys.readouterr().err
        assert f"changed-{number}.pt" in error and message in error
    (tmp_path / "text.pt").write_text("no such file")
    assert main([*convert, str(tmp_path / "text.pt"), str(tmp_path / "bad")]) == 1
    assert main([*convert, str(tmp_path / "none.pt"), str(tmp_path / "bad")]) == 1
