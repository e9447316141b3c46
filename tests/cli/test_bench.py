from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_main import command


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


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench"], 2, "subspace"),
        (["bench", "nothing"], 2, "choose from 'subspace'"),
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
