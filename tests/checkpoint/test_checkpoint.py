"""Saving and loading: exact, atomic, checked, and refused when something does not fit."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspan.checkpoint import (
    CheckpointWriteError,
    best,
    latest,
    load_checkpoint,
    rotate,
    save_checkpoint,
    staged,
    verify,
)
from subspan.checkpoint import staging as staging_module
from subspan.checkpoint.plain import from_plain, to_plain
from subspan.optim import APOLLO, AdamW, GaLore, create_optimizer, list_methods, method_info
from tests.checkpoint.models import Payload, model, train


def galore(network: nn.Module, **settings: Any) -> GaLore:
    return GaLore(network, **({"rank": 4, "lr": 1e-2, "update_proj_gap": 3} | settings))


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}/{key}": value.clone() for key, value in state.items()}
    return tensors


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", list_methods())
def test_every_method_continues_bit_exactly(name: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        network = model()
        size = {"rank": 4} if method_info(name).size == "rank" else {}
        return network, create_optimizer(name, network, lr=1e-2, seed=3, **size)

    network, optimizer = build()
    train(network, optimizer, 4)
    folder = save_checkpoint(tmp_path / "checkpoint-4", network, optimizer)
    expected = train(network, optimizer, 4, seed=2)
    network, optimizer = build()
    load_checkpoint(folder, network, optimizer)
    assert train(network, optimizer, 4, seed=2) == expected


def test_any_optimizer_of_torch_continues_bit_exactly(tmp_path: Path) -> None:
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=torch.tensor(1e-2))
    train(network, optimizer, 4)
    folder = save_checkpoint(tmp_path / "a", network, optimizer)
    expected = train(network, optimizer, 4, seed=2)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.5)
    load_checkpoint(folder, network, optimizer)
    assert train(network, optimizer, 4, seed=2) == expected


def test_what_a_loop_needs_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {"rng": torch.get_rng_state(), "betas": (0.9, 1e-300), "nan": math.inf, "by step": {3: [True, None, "ä"]}}
    folder = save_checkpoint(tmp_path / "checkpoint-1", model(), extra=extra)
    found = load_checkpoint(folder, model(seed=1))
    assert torch.equal(found.pop("rng"), extra.pop("rng"))
    assert found == extra
    assert isinstance(found["betas"], tuple)
    with pytest.raises(ValueError, match=r"extra\['model'\] is a Sequential"):
        save_checkpoint(tmp_path / "checkpoint-2", model(), extra={"model": model()})
    assert os.listdir(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("value", [{"$x": 1}, {"$tuple": 3}, {"$tensor": {"dtype": "object", "shape": [], "data": ""}}])
def test_json_that_was_not_written_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="an object with the key"):
        from_plain(value)
    if "$x" in value:
        assert from_plain(to_plain(value)) == value


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    network = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    network["second"].weight = network["first"].weight
    folder = save_checkpoint(tmp_path / "a", network, AdamW(network))
    other = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    load_checkpoint(folder, other)
    assert torch.equal(other["second"].weight, network["first"].weight)
    other["second"].weight = other["first"].weight
    load_checkpoint(folder, other)
    assert (folder / "model.safetensors").stat().st_size < 8 * 8 * 4 * 2


def test_two_tensors_are_not_loaded_into_one(tmp_path: Path) -> None:
    network = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    optimizer = AdamW(network)
    folder = save_checkpoint(tmp_path / "a", network)
    other = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    other["second"].weight = other["first"].weight
    before = snapshot(other, optimizer)
    with pytest.raises(ValueError, match=r"second\.weight and first\.weight differ there, and are one tensor here"):
        load_checkpoint(folder, other)
    assert_same(snapshot(other, optimizer), before)
    network["second"].load_state_dict(network["first"].state_dict())
    load_checkpoint(save_checkpoint(tmp_path / "b", network), other)
    assert torch.equal(other["first"].weight, network["first"].weight)


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("work")
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoint-1", model())
    for name in ("notes", "file", "run"):
        with pytest.raises(ValueError, match=f"{name} exists and is no checkpoint, so it is not replaced"):
            save_checkpoint(tmp_path / name, model())
    for name in ("kept.replaced", "other.replaced", "other"):
        (tmp_path / name).write_text("work")
    (tmp_path / "folder.replaced").mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if "checkpoint-1" not in path.parts)
    latest(tmp_path)
    for name in ("plain", "plain", "empty", "checkpoint-2"):
        if name != "plain":
            (tmp_path / name).mkdir()
        folder = save_checkpoint(tmp_path / name, model())
        assert verify(folder).ok
        shutil.rmtree(folder) if name != "plain" else None
    shutil.rmtree(tmp_path / "plain")
    assert sorted(path for path in tmp_path.rglob("*") if "checkpoint-1" not in path.parts) == before


def test_one_who_looks_while_a_checkpoint_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process gives the one before its name back at any moment of the exchange."""
    network = model()
    rename = os.rename
    for moment in range(1, 6):
        folder = save_checkpoint(tmp_path / "checkpoint-1", network, extra={"moment": 0})
        calls = 0

        def looked(source: Any, target: Any, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            rename(source, target)
            if calls == moment:
                latest(tmp_path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", looked)
            save_checkpoint(folder, network, extra={"moment": moment})
        assert load_checkpoint(folder, network) == {"moment": moment}
        assert os.listdir(tmp_path) == ["checkpoint-1"]


REFUSALS = [
    (lambda n: galore(n, rank=8), "has rank=4, this optimizer 8"),
    (lambda n: APOLLO(n, rank=4), "by the method 'galore', this one is 'apollo'"),
    (lambda n: galore(n, svd="exact"), "has subspace RandomizedSVD.* this one ExactSVD"),
    (lambda n: torch.optim.AdamW(n.parameters()), "the state of GaLore, this optimizer is AdamW"),
    (lambda n: galore(n, exclude="2"), "this optimizer"),
]


@pytest.mark.parametrize(("build", "message"), REFUSALS)
def test_another_optimizer_is_refused_and_nothing_changes(build: Any, message: str, tmp_path: Path) -> None:
    network = model()
    optimizer = galore(network)
    train(network, optimizer, 2)
    folder = save_checkpoint(tmp_path / "checkpoint-2", network, optimizer)
    network = model(seed=1)
    other = build(network)
    before = snapshot(network, other)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, network, other)
    assert_same(snapshot(network, other), before)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "a", model())
    with pytest.raises(ValueError, match=r"another model: 0.weight is torch.float32 \(32, 64\), in this .*\(24, 64\)"):
        load_checkpoint(folder, model(hidden=24))
    with pytest.raises(ValueError, match=r"in this model torch\.bfloat16"):
        load_checkpoint(folder, model().bfloat16())
    with pytest.raises(ValueError, match=r"0.weight is missing|4.weight is missing"):
        load_checkpoint(folder, nn.Sequential(*model(), nn.Linear(16, 2), nn.Linear(2, 2)))
    with pytest.raises(FileNotFoundError, match=r"optimizer.json is missing"):
        network = model()
        load_checkpoint(folder, network, galore(network))


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint.manifest.SCHEMA",
        "checkpoint.states.OPTIMIZER_SCHEMA",
        "optim.loading.SCHEMA",
    ],
)
def test_a_newer_format_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    optimizer = galore(network)
    with monkeypatch.context() as patch:
        patch.setattr(f"subspan.{place}", 2)
        folder = save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
    with pytest.raises(ValueError, match="has format 2, newer than 1; update subspan"):
        load_checkpoint(folder, network, optimizer)


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors has 100 bytes"),
    "gone": (lambda f: (f / "optimizer.json").unlink(), "optimizer.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "newer": (lambda f: edit(f / "manifest.json", lambda c: c.update(schema=2)), "format 2, newer than 1"),
    "edited": (lambda f: edit(f / "manifest.json", lambda c: c.update(step=7)), "its own checksum differs"),
    "foreign": (lambda f: (f / "manifest.json").write_text("[1]"), "another kind of file"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "cannot be used"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json does not belong"),
    "more parts": (lambda f: shutil.copy(f / "model.safetensors", f / "b.safetensors"), "b.safetensors does not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    network = model()
    optimizer = galore(network)
    for step in (1, 2):
        train(network, optimizer, 1)
        save_checkpoint(tmp_path / f"checkpoint-{step}", network, optimizer)
    act, message = DAMAGES[damage]
    newest = tmp_path / "checkpoint-2"
    act(newest)
    said: list[str] = []
    assert latest(tmp_path, skipped=said.append) == tmp_path / "checkpoint-1"
    assert len(said) == 1 and message in said[0] and str(newest) in said[0]
    with pytest.warns(UserWarning, match="passed over"):
        latest(tmp_path)
    before = snapshot(network, optimizer)
    with pytest.raises(ValueError, match="is no whole checkpoint") as caught:
        load_checkpoint(newest, network, optimizer)
    assert message in str(caught.value)
    assert_same(snapshot(network, optimizer), before)


def test_a_renamed_checkpoint_and_a_path_outside_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint-3", model())
    folder.rename(tmp_path / "checkpoint-9")
    assert verify(tmp_path / "checkpoint-9").problems == ("it holds step 3 and not the one in its name",)
    from subspan.checkpoint.manifest import FileEntry, Manifest

    (folder := tmp_path / "x").mkdir()
    (folder / "manifest.json").write_text(Manifest({"../secret": FileEntry(0, "")}).to_json())
    assert "outside of the folder" in verify(folder).problems[0]
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_checkpoint(tmp_path / "none", model())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, None, 2.0, math.nan, 1.5], start=1):
        folder = save_checkpoint(tmp_path / f"checkpoint-{step}", model(), eval_loss=loss)
        rotate(tmp_path, 2, written=folder)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert best(tmp_path) == tmp_path / "checkpoint-2"
    # Of a run that went back and writes older steps again, the one just written stays.
    folder = save_checkpoint(tmp_path / "checkpoint-3", model())
    rotate(tmp_path, 1, written=folder)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    with pytest.raises(ValueError, match="keep=0"):
        rotate(tmp_path, 0)


def test_one_that_is_not_whole_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save_checkpoint(tmp_path / f"checkpoint-{step}", model())
    (tmp_path / "checkpoint-9" / "model.safetensors").unlink()
    assert rotate(tmp_path, 4) == []
    assert [path.name for path in rotate(tmp_path, 2)] == ["checkpoint-1"]
    assert [path.name for path in rotate(tmp_path, 1)] == ["checkpoint-2"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-9"]


class Killed(BaseException):
    pass


def test_killed_at_any_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that changes the folder, of a save that replaces a checkpoint of the same name."""
    network = model()
    optimizer = galore(network)
    train(network, optimizer, 1)
    save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
    old = snapshot(network, optimizer)
    train(network, optimizer, 1)
    new = snapshot(network, optimizer)

    def interrupted(after: int) -> bool:
        """Save, and die at one moment; whether the save came to its end before."""
        calls = 0

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == after:
                    raise Killed
                return function(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for module, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "mkdir")]:
                patch.setattr(module, name, counted(getattr(module, name)))
            for name in ("write_whole", "write_plain"):
                patch.setattr(f"subspan.checkpoint.save.{name}", counted(getattr(save_module, name)))
            try:
                save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
            except Killed:
                return False
            return True

    from subspan.checkpoint import save as save_module

    moments = 0
    finished = False
    while not finished:
        moments += 1
        assert moments < 60
        finished = interrupted(moments)
        whole = latest(tmp_path)
        assert whole == tmp_path / "checkpoint-1", moments
        other = model(seed=1)
        loaded = galore(other)
        load_checkpoint(whole, other, loaded)
        found = snapshot(other, loaded)
        assert any(all(torch.equal(found[k], s[k]) for k in s) for s in (old, new)), moments
    assert moments > 15
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert_same(found, new)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """With a limit on the size of files, which the system enforces as it does the end of a disk."""
    network = model(hidden=512)
    optimizer = galore(network)
    train(network, optimizer, 1)
    save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError, match=r"checkpoint-2 could not be written.*too large.* are free"):
            save_checkpoint(tmp_path / "checkpoint-2", network, optimizer)
        with pytest.raises(CheckpointWriteError, match="checkpoint-1 could not be written"):
            save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert verify(tmp_path / "checkpoint-1").ok


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_an_error_of_the_disk_at_any_time(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "checkpoint-1", model())

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr("subspan.checkpoint.save.write_plain", full)
        elif moment == "sync":
            patch.setattr(staging_module, "digest_file", full)
        else:
            patch.setattr(os, "rename", full)
        with pytest.raises(CheckpointWriteError, match=r"checkpoint-2 could not be written: .*No space left on device"):
            save_checkpoint(tmp_path / "checkpoint-2", model())
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    save_checkpoint(tmp_path / "checkpoint-2", model())


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "checkpoint-1", model())
    if os.geteuid() != 0:
        (tmp_path / "fixed").mkdir(mode=0o500)
        with pytest.raises(CheckpointWriteError, match="Permission denied"):
            save_checkpoint(tmp_path / "fixed" / "checkpoint-1", model())


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    network = model()
    optimizer = galore(network)
    folder = save_checkpoint(tmp_path / "checkpoint-1", network, optimizer)
    bomb = pickle.dumps(Payload(str(tmp_path / "executed")))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", ".metadata", "extra.pkl"):
        (folder / name).write_bytes(bomb)
    load_checkpoint(folder, network, optimizer)
    for name in ("manifest.json", "optimizer.json", "extra.json", "model.safetensors", "optimizer.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        with pytest.raises(ValueError, match="no whole checkpoint"):
            load_checkpoint(folder, network, optimizer)
        (folder / name).write_bytes(kept)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists(), "the test tests nothing"


def test_other_errors_in_a_save_are_not_those_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "checkpoint-1") as job:
        (job.folder / "a").write_text("a")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_without_warnings(tmp_path: Path) -> None:
    network = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_checkpoint(tmp_path / "checkpoint-1", network, galore(network))
        load_checkpoint(folder, network, galore(network))
