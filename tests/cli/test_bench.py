from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_main import command, options
from tests.train.micro import write_model


def test_subspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--sizes", "24x32,16x16", "--spectra", "pow-1/2", "zero", "--rank-share=0.5", "--rounds", "1"]
    status, out, err = command("bench", "subspace", *given, "--output", str(tmp_path / "out"), capsys=capsys)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert [(matrix["matrix"], matrix.get("rank")) for matrix in record["matrices"]] == [
        (f"{size} {spectrum}", rank if spectrum == "pow 1/2" else None)
        for size, rank in (("24x32", 12), ("16x16", 8))
        for spectrum in ("pow 1/2", "zero")
    ]
    assert "sketch, QR" in out and "exact SVD" in out
    assert (tmp_path / "out" / "subspace.csv").exists()


def test_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(write_model(tmp_path)), "--ranks", "1", "3", "--heads", "1", "2", "--seq-len", "8"]
    given += ["--rounds", "1", "--merge_every", "5", "--target_modules", "attention"]
    status, out, err = command("bench", "heads", *given, "--output", str(tmp_path / "out"), capsys=capsys)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert record["settings"]["merge_every"] == 5 and record["hardware"]["device"] == "cpu"
    rows = record["rows"]
    assert [(row["mode"], row.get("heads"), row.get("rank")) for row in rows] == [
        ("full", None, None),
        *((mode, heads, rank) for mode in ("sequential", "parallel") for heads in (1, 2) for rank in (1, 3)),
    ]
    full = rows[0]["trained"]
    assert all(row["trained"] == full + 8 * (row["heads"] * row["rank"] * 64 - 32 * 32) for row in rows[1:])
    assert all(row["iteration"] > 0 for row in rows)
    assert [row["mode"] for row in rows if "merge" in row] == ["parallel"] * 4
    assert all(row["with_merges"] == row["iteration"] + row["merge"] / 5 for row in rows if "merge" in row)
    assert (tmp_path / "out" / "heads.csv").read_text().count("\n") == 10
    assert (tmp_path / "out" / "heads.png").stat().st_size > 5000
    assert "parallel" in out and "100.0%" in out


@pytest.mark.slow
def test_layers(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, steps=2, eval_every=0, output=str(tmp_path / "out"))
    given = [part for part in given if not part.startswith("--optimizer") and part not in ("--rank", "8")]
    given += ["--layers", "M", "--full.lr", "0.003", "--weight_settings.rank", "2"]
    status, out, err = command("bench", "layers", *given, capsys=capsys)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [row["layers"] for row in record["rows"]] == ["M"]
    assert record["settings"]["weights"] == "mhlora" and record["full"] == {"lr": 0.003}
    assert "test loss" in out and (tmp_path / "out" / "M" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench"], 2, "subspace"),
        (["bench", "nothing"], 2, "choose from 'subspace'"),
        (["bench", "heads", "--hedas", "3"], 2, "unknown setting 'hedas'. Did you mean 'heads'?"),
        (["bench", "heads", "--heads", "3"], 1, "error: batch_size is 4, which 3 parallel heads cannot divide"),
        (["bench", "heads", "--model", "nothing"], 1, "error: unknown model 'nothing'"),
        (["bench", "layers", "--layers", "X"], 1, "error: layers holds 'X'"),
        (["bench", "layers", "--full.heads", "3"], 1, "error: full holds 'heads'"),
        (["bench", "subspace", "--rnak", "3"], 2, "unknown setting 'rnak'. Did you mean 'rank'?"),
        (["bench", "subspace", "--zzz"], 2, "All settings: subspan bench subspace --help"),
        (["bench", "subspace", "--rank", "many"], 2, "many"),
        (["bench", "subspace", "--sizes", "512"], 1, "error: size '512' is not MxN"),
        (["bench", "subspace", "--gradients", "/no/where"], 1, "error: gradients '/no/where': no such file."),
        (["bench", "subspace", "--device", "gpu"], 1, "error: device 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_honoured(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = command(*arguments, capsys=capsys)
    assert (found, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command("bench", "subspace", "--help", capsys=capsys)
    assert status == 0
    assert "subspan bench subspace --sizes 2048x2048" in " ".join(out.split())


@pytest.mark.parametrize("benchmark", ["heads", "layers"])
def test_help_of_the_studies(benchmark: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command("bench", benchmark, "--help", capsys=capsys)
    assert status == 0
    assert f"subspan bench {benchmark} --model gpt2-124m --seq_len 512" in " ".join(out.split())
