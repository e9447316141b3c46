from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from subspan.memory.plan import CATEGORIES
from subspan.train.plan import largest_that_fits
from subspan.train.plan_settings import PlanSettings, parse_bytes
from tests.cli.test_main import command
from tests.train.micro import write_model

SHARDED = ["--world_size", "2", "--shard", "full"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path))


def planned(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict:
    status, out, err = command("plan", *arguments, "--json", capsys=capsys)
    assert status == 0, err
    return json.loads(out)


def test_the_table_names_every_category_and_says_whether_it_fits(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = command("plan", "--model", model, "--rank", "8", "--seq_len", "16", capsys=capsys)
    assert status == 0, err
    words = " ".join(out.split())
    for name in (*CATEGORIES, "peak", "galore (rank 8)", "Fits in 24GiB? yes, with", "Attention"):
        assert name in words


def test_json_adds_up(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--model", model, "--rank", "8", "--seq_len", "16", "--budget", "100KiB", capsys=capsys)
    assert sum(found["bytes_at_peak"].values()) == found["peak_bytes"]
    assert not found["fits"]
    assert found["margin_bytes"] == 100 * 1024 - found["peak_bytes"]
    assert found["bytes"]["gradients"] == 4 * found["parameters"]


def test_comparison_and_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plan"
    compare = "galore,adamw,adamw_torch,adamw_8bit,lora,fira,scale"
    given = ["--model", model, "--rank", "8", "--seq_len", "16", "--dtype", "bfloat16", "--compare", compare]
    status, _, err = command("plan", *given, "--gradient", "projected", "--output", str(folder), capsys=capsys)
    assert status == 0, err
    result = json.loads((folder / "plan.json").read_text())
    others = {entry["method"]: entry for entry in result["compared"]}
    assert list(others) == ["adamw", "adamw_torch", "adamw_8bit", "lora", "fira", "scale"]
    moments = {name: entry["bytes"]["moments"] for name, entry in others.items()}
    assert moments["adamw"] == 2 * moments["adamw_torch"], "float32 beside the dtype of the weights"
    assert others["fira"]["gradient"] == others["scale"]["gradient"] == "fused"
    assert moments["scale"] < moments["adamw_8bit"]
    assert others["lora"]["trainable"] < others["adamw"]["trainable"]
    with (folder / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert int(rows[0]["peak_bytes"]) == result["peak_bytes"]
    pytest.importorskip("matplotlib")
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_weights_in_int8(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--model", "llama_9m", "--rank", "8", "--seq_len", "16", "--json"]
    for method in ("adamw_torch", "adamw_8bit", "lora"):
        status, _, err = command(*given, "--method", method, "--weight_storage", "int8", capsys=capsys)
        assert status != 0 and f"weight_storage is 'int8', which '{method}' cannot train" in err
    status, out, err = command(*given, "--compare", "q_apollo_mini,q_apollo", capsys=capsys)
    assert status == 0, err
    others = {entry["method"]: entry for entry in json.loads(out)["compared"]}
    assert "rank 1" in others["q_apollo_mini"]["size"] and "rank 8" in others["q_apollo"]["size"]
    assert others["q_apollo"]["bytes"]["weights"] < json.loads(out)["bytes"]["weights"]


def test_the_largest_batch_that_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", model, "--rank", "8", "--seq_len", "16", "--budget", "700KiB"]
    found = planned(*base, "--solve", "batch_size", capsys=capsys)
    value = found["solved"]["batch_size"]
    assert found["fits"]
    assert not planned(*base, "--batch_size", str(value + 1), capsys=capsys)["fits"]


@pytest.mark.parametrize(("name", "most"), [("batch_size", 1 << 20), ("rank", 32), ("seq_len", 64)])
@pytest.mark.parametrize("budget", [1000, 1037, 1999, 5000, 10**7])
def test_the_search_ends_at_the_last_value_that_fits(
    name: str, most: int, budget: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(value: int) -> int:
        return 900 + 37 * value + value**2 // 100

    def traced(settings: PlanSettings) -> SimpleNamespace:
        return SimpleNamespace(bytes=SimpleNamespace(peak=peak(getattr(settings, name))))

    monkeypatch.setattr("subspan.train.plan.plan_recipe", traced)
    calls: list[int] = []
    settings = PlanSettings(model=model, solve=name, budget=str(budget), seq_len=16)
    found, recipe = largest_that_fits(settings, lambda value, peak: calls.append(value))
    value = getattr(found, name)
    assert peak(value) == recipe.bytes.peak <= budget
    assert value == most or peak(value + 1) > budget
    assert len(calls) < 40


def test_checkpointing_and_mixed_precision_change_the_plan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", model, "--rank", "8", "--seq_len", "32", "--batch_size", "8"]
    plain = planned(*base, capsys=capsys)
    assert plain["bytes"]["logits"] > plain["bytes"]["activations"] / 10
    recomputed = planned(*base, "--activation_checkpointing", "true", capsys=capsys)
    assert recomputed["bytes"]["activations"] < plain["bytes"]["activations"]
    mixed = planned(*base, "--dtype", "amp", capsys=capsys)
    assert mixed["bytes"]["weights"] == plain["bytes"]["weights"]
    assert mixed["bytes"] != plain["bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama_7x"], "unknown model 'llama_7x'. Did you mean"),
        (["--method", "galor"], "unknown method 'galor'; did you mean 'galore'?"),
        (["--method", "adamw", "--rank", "8"], "rank is 8, but the method 'adamw' projects nothing"),
        (["--method", "fira", "--gradient", "projected"], "needs the gradients themselves"),
        (["--compare", "galore,adm"], "unknown recipe in compare 'adm'"),
        (["--budget", "much"], "budget is 'much'; give a size such as 24GiB"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1."),
        (["--optimizer.rho", "1"], "rho"),
        (["--shard", "full"], "shard is 'full', but there is one process: give --world_size 2 or more."),
        (["--world_size", "0"], "world_size is 0; it must be at least 1."),
        ([*SHARDED, "--method", "galore_8bit"], "moments='8bit' has blocks that do not keep to the pieces"),
        ([*SHARDED, "--method", "lora"], "'lora': planned with whole models alone"),
        ([*SHARDED, "--method", "q_galore"], "weight_storage is 'int8', but with shard 'full'"),
        ([*SHARDED, "--gradient", "projected"], "gradient is 'projected', but with shard 'full'"),
        (["--method", "adamw", "--solve", "rank"], "solve is 'rank', but 'adamw' has none"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command("plan", *arguments, capsys=capsys)
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_divided_over_processes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", model, "--rank", "8", "--seq_len", "16"]
    alone = planned(*given, capsys=capsys)
    compare = ["--compare", "adamw,adamw_torch,galore_8bit"]
    shared = ["--world_size", "4", "--shard", "bases", "--output", str(tmp_path / "plan")]
    status, out, err = command("plan", *given, *shared, *compare, capsys=capsys)
    assert status == 0, err
    for words in ("one of 4 processes", "bases whole", "bases divided", "weights gathered", "block by block"):
        assert words in " ".join(out.split())
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [entry["method"] for entry in found["compared"]] == ["adamw"]
    assert list(found["left_out"]) == ["adamw_torch", "galore_8bit"]
    assert found["processes"]["alone"] == sum(alone["bytes"][kind] for kind in ("moments", "bases", "other state"))
    whole, divided = found["processes"]["layouts"].values()
    assert sum(found["bytes"][kind] for kind in ("moments", "bases", "other state")) == sum(divided["state"].values())
    assert sum(divided["state"].values()) < sum(whole["state"].values())
    added = set(divided["step"].items()) ^ set(whole["step"].items())
    assert {name for name, _ in added} == {"optimizer: gathered"}
    assert 4 * found["bytes"]["weights"] == pytest.approx(alone["bytes"]["weights"], rel=0.01)


def test_copied_by_ddp(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", model, "--rank", "8", "--seq_len", "16", "--world_size", "2"]
    found = planned(*given, "--compare", "fira,adamw_torch", capsys=capsys)
    assert found["bytes"]["buffers"] == found["bytes"]["gradients"] == 4 * found["parameters"]
    whole, projected = found["processes"]["layouts"].values()
    assert whole["step"] == {"gradients all-reduced": 4 * found["parameters"]}
    assert sum(projected["step"].values()) < sum(whole["step"].values())
    fira, adamw = found["compared"]
    assert list(fira["processes"]["layouts"]) == ["gradients whole"] and "processes" not in adamw
    folded = planned(*given, "--gradient", "projected", capsys=capsys)
    assert list(folded["processes"]["layouts"]) == ["gradients projected"]
    assert folded["bytes"]["buffers"] < found["bytes"]["buffers"]


def test_a_budget_that_nothing_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(
        "plan", "--model", model, "--seq_len", "16", "--budget", "50KiB", "--solve", "batch_size", capsys=capsys
    )
    assert status == 1
    assert "not even batch_size 1 fits into 50KiB" in err


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys\nfrom subspan.cli.main import main\ntry: main(['plan', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "subspan plan --model llama_7b" in " ".join(done.stdout.split())


def test_sizes() -> None:
    assert parse_bytes("1.5 KiB") == 1536
    assert PlanSettings(budget="80GB").budget_bytes == 80 * 10**9
