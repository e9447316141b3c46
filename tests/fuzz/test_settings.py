"""Files of settings and arguments that make no sense: one message and a status, never a traceback, never hours.

SUBSPAN_FUZZ=N runs N times as many, drawn anew.
"""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from subspan.cli.main import main
from subspan.train import plan_report
from subspan.train.config import PretrainConfig
from subspan.train.plan_settings import PlanSettings
from subspan.train.trainer import PretrainTrainer
from tests.train.micro import settings

MORE = int(os.environ.get("SUBSPAN_FUZZ", "0"))
VALUES: list[Any] = [None, True, 0, -1, 2, 3.5, -0.5, 1e30, 10**30, 10**400, float("inf"), float("nan"), 2**31, 2**63]
VALUES += ["", "x", "auto", "[red]", "é漢", "a/b", "../x", "~", "\x00", "1e-3", "hf:", "hf:a:b", "a: b", "x" * 10_000]
VALUES += [[], [1], ["x"], [None], {}, {"a": 1}, {1: 2}, "!!python/object:os.system"]
OPTIMIZER = ["update_proj_gap", "scale", "proj_type", "betas", "eps", "svd", "moments", "rank_policy", "zzz"]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds no settings"),
    "a list": ("[1, 2]", "holds no settings"),
    "a number": ("3", "holds no settings"),
    "two documents": ("steps: 1\n---\nsteps: 2", "not YAML"),
    "not closed": ("a: 1\nb: {", "line 2: not YAML"),
    "a tab": ("\t- x", "not YAML"),
    "binary": (bytes(range(256)), "is not UTF-8"),
    "zeros": (b"\0" * 1000, "not YAML"),
    "utf-16": ("steps: 3".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "large": ("# \n" * 400_000, "more than 1,048,576 bytes"),
    "a function": ("steps: !!python/object/apply:os.system ['touch pwned']", "!!python/object/apply:os.system is not"),
    "a name": ("optimizer:\n  lr: !!python/name:os.system", "line 2: !!python/name:os.system is not allowed"),
    "bytes": ("lr: !!binary aGVsbG8=", "!!binary is not allowed"),
    "many laughs": (BOMB, "too much"),
    "laughs inside": ("optimizer:\n  " + BOMB.replace("\n", "\n  "), "too much"),
    "itself": ("optimizer: &a {a: *a}", "too much"),
    "deep": ("exclude: " + "[" * 400 + "]" * 400, "too"),
    "deeper": ("{" * 600, "nested too deeply"),
    "twice": ("steps: 1\nlr: 1\nsteps: 2", "'steps' is set twice"),
    "no such anchor": ("lr: *nowhere", "line 1: not YAML"),
    "a date": ("steps: 2001-01-01", "steps"),
    "a typo": ("learning_rate: 3", "unknown setting 'learning_rate'"),
    "a class": ("class_path: os.system", "unknown setting 'class_path'"),
    "another file": ("config: other.yaml", "names another file"),
    "nothing": ("steps: null", "steps"),
    "far too many": (f"steps: {10**30}", "smaller than 2^32"),
    "not a number": ("lr: .nan", "lr is nan; it must be"),
    "endless": ("lr: .inf", "lr is inf; it must be"),
}


class Reached(BaseException):
    """Training would begin now."""


@pytest.fixture(autouse=True)
def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any, **kwargs: Any) -> None:
        raise Reached

    monkeypatch.setattr(PretrainTrainer, "train", reached)
    monkeypatch.setattr(plan_report, "plan_report", reached)


def says(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | None, str]:
    """The status and the message; None where training would begin."""
    try:
        status: int | None = main(arguments)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except Reached:
        status = None
    err = capsys.readouterr().err
    if status is not None:
        assert status in (1, 2)
        assert err.startswith("error: ") and err.count("error: ") == 1, err[:500]
        assert "Traceback" not in err and len(err) < 2500
    return status, err


@pytest.mark.parametrize("command", ["pretrain", "sweep"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_makes_no_sense(
    tmp_path: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = FILES[kind]
    (tmp_path / "other.yaml").write_text("steps: 1")
    file = tmp_path / "run.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    grid = ["--grid.lr", "[0.1]"] if command == "sweep" else []
    status, err = says([command, *grid, "--config", str(file)], capsys)
    assert status is not None
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.yaml", "run.yaml"]
    assert says([command, *grid, f"--config={file}"], capsys) == (status, err)


@pytest.mark.parametrize("command", ["pretrain", "sweep"])
def test_changed_files(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = dataclasses.asdict(PretrainConfig()) | settings(tmp_path, steps=3)
    if command == "sweep":
        del whole["resume"]
    choose = random.Random(0 if not MORE else None)
    refused = 0
    for number in range(25 * max(MORE, 1)):
        changed = dict(whole, output=str(tmp_path / f"run{number}"))
        for _ in range(choose.choice([1, 1, 2, 3])):
            value = choose.choice(VALUES)
            if choose.random() < 0.3:
                optimizer = changed["optimizer"] if isinstance(changed["optimizer"], dict) else {}
                changed["optimizer"] = optimizer | {choose.choice(OPTIMIZER): value}
            else:
                changed[choose.choice([name for name in whole if name != "output"])] = value
        raw = bytearray(yaml.safe_dump(changed, allow_unicode=True).encode())
        for _ in range(choose.choice([0, 0, 0, 3])):
            raw[choose.randrange(len(raw))] = choose.randrange(256)
        (tmp_path / "run.yaml").write_bytes(raw)
        grid = ["--grid.lr_scale", "[0.1]"] if command == "sweep" else []
        status, _ = says([command, *grid, "--config", str(tmp_path / "run.yaml")], capsys)
        refused += status is not None
    assert refused > 5


def test_changed_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the commands that take no file."""
    settings(tmp_path)
    choose = random.Random(0 if not MORE else None)
    names = [setting.name for setting in dataclasses.fields(PlanSettings) if setting.name != "json"]
    for _ in range(20 * max(MORE, 1)):
        given = ["--model", str(tmp_path / "model.json")]
        for _ in range(choose.choice([1, 2])):
            given += [f"--{choose.choice(names)}", str(choose.choice(VALUES))]
        says(["plan", *given], capsys)
    for _ in range(20 * max(MORE, 1)):
        name = choose.choice(["what", "layers", "batches", "steps", "every", "base", "save_gradients"])
        source = choose.choice([str(tmp_path), "", "x", "\x00", "~", "hf:x", "[red]"])
        assert says(["spectrum", source, f"--{name}", str(choose.choice(VALUES))], capsys)[0]


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint-4/config.json", "checkpoint-4/model.safetensors"])
def test_a_run_with_a_damaged_file(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`spectrum` and a continued run say which file it is."""
    from safetensors.torch import save_file
    from torch import zeros

    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    values = settings(tmp_path)
    (folder / "config.yaml").write_text(PretrainConfig(**values).to_yaml())
    (folder / "checkpoint-4" / "config.json").write_text((tmp_path / "model.json").read_text())
    save_file({"a.weight": zeros(4, 4)}, folder / "checkpoint-4" / "model.safetensors")
    for content in (b"", b"\xff\x00", b"[" * 100_000, b"{}", b'{"a": 1', b"x" * 100):
        (folder / name).write_bytes(content)
        status, _ = says(["spectrum", str(folder), "--what", "gradients"], capsys)
        assert status is not None
