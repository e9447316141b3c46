from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subspan.analysis.spectrum_settings import SpectrumSettings
from tests.cli.test_main import command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"layers.{i}.up.weight": torch.randn(16, 24) for i in range(2)}, folder / "model.safetensors")
    return folder


def test_help_shows_an_example_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command("spectrum", "--help", capsys=capsys)
    assert status == 0
    assert "subspan spectrum runs/" in out
    names = [field.name for field in dataclasses.fields(SpectrumSettings) if field.name != "source"]
    assert [name for name in names if f"--{name}" not in out] == []


def test_a_model_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command("spectrum", str(model), "--layers", "up", "--full", capsys=capsys)
    assert status == 0, err
    assert "layers.1.up" in out
    assert {file.suffix for file in (model / "spectrum").iterdir()} >= {".csv", ".safetensors"}


def test_an_update(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({f"layers.{i}.up.weight": torch.randn(16, 24) for i in range(2)}, tmp_path / "base.safetensors")
    given = ["--what", "update", "--base", str(tmp_path / "base.safetensors"), f"--output={tmp_path / 'out'}"]
    status, out, err = command("spectrum", str(model), *given, capsys=capsys)
    assert status == 0, err
    assert "Rank of a LoRA adapter: 8 " in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "error: source 'nowhere': no such file or folder; give a run folder"),
        (["--batches", "0"], 1, "error: batches is 0; it must be at least 1."),
        (["--what", "colours"], 2, "colours"),
        (["--steps", "many"], 2, "many"),
        (["--layerz", "x"], 2, "unknown setting 'layerz'. Did you mean 'layers'?"),
    ],
)
def test_errors(arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = command("spectrum", "nowhere", *arguments, capsys=capsys)
    assert found == status
    assert message in err
    assert "Traceback" not in err
