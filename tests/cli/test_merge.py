from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_main import command, options

HEADS = ["--weights", "mhlora", "--weight-settings.heads", "2", "--weight_settings.rank=4"]


def test_a_run_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [part for part in options(tmp_path, steps=2) if "update-proj-gap" not in part]
    at = given.index("--rank")
    status, out, err = command("pretrain", *given[:at], *given[at + 2 :], *HEADS, capsys=capsys)
    assert status == 0, err
    assert "mhlora (heads 2, rank 4, alpha 4096.0)" in " ".join(out.split())
    run = tmp_path / "run"
    status, out, err = command("merge", str(run), capsys=capsys)
    assert status == 0, err
    assert out.startswith(f"14 layers merged into {run / 'merged-2'}; its logits differ by at most")
    for source, output, message in (
        (run, tmp_path, "exists; a model is never overwritten"),
        (run / "merged-2", tmp_path / "x", "holds no whole checkpoint"),
        (tmp_path / "nowhere", tmp_path / "x", "nowhere"),
    ):
        status, _, err = command("merge", str(source), str(output), capsys=capsys)
        assert status == 1 and message in err
    status, _, err = command("checkpoint", "convert", str(run / "checkpoint-2"), str(tmp_path / "x"), capsys=capsys)
    assert status == 1 and "subspan merge" in err and not (tmp_path / "x").exists()
    weights = run / "checkpoint-2" / "low_rank.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, _, err = command("merge", str(run / "checkpoint-2"), str(tmp_path / "x"), capsys=capsys)
    assert status == 1 and "low_rank.safetensors" in err and not (tmp_path / "x").exists()


def test_plans_beside_dense_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.train.micro import write_model

    given = ["plan", "--model", str(write_model(tmp_path)), "--seq_len", "16", "--json"]
    status, out, err = command(*given, *HEADS, "--compare", "adamw,galore", capsys=capsys)
    assert status == 0, err
    found = json.loads(out)
    assert [found["method"], *(other["method"] for other in found["compared"])] == ["mhlora", "adamw", "galore"]
    assert found["trainable"] < found["parameters"] and found["bytes"]["moments"] == 8 * found["trainable"]
    status, out, err = command(*given, "--adapter", "vera", "--compare", "adamw", capsys=capsys)
    assert status == 0, err
    assert json.loads(out)["method"] == "vera"
    found = json.loads(command(*given, "--compare", "mhlora", capsys=capsys)[1])
    assert [found["method"], found["compared"][0]["method"]] == ["galore", "mhlora"]
    for arguments, message in (
        (["--weights", "mhlor"], "did you mean 'mhlora'"),
        (["--weights", "mhlora", "--method", "adamw_torch"], "which trains dense weights"),
        (["--compare", "mhlor"], "unknown recipe in compare"),
    ):
        status, _, err = command(*given, *arguments, capsys=capsys)
        assert status == 1 and message in err
