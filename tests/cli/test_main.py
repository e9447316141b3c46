from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import subspan
from subspan.cli.main import main
from subspan.train.config import PretrainConfig
from tests.train.micro import metrics, settings


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line in this process; the status, what it printed, and its errors."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def options(folder: Path, **changes: object) -> list[str]:
    values = settings(folder, **changes)
    optimizer = values.pop("optimizer")
    given = [f"--optimizer.{name.replace('_', '-')}={value}" for name, value in optimizer.items()]
    return given + [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command("--version", capsys=capsys)
    assert (status, out) == (0, f"subspan {subspan.__version__}\n")


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    from subspan.nn.lowrank import list_weights
    from subspan.optim import list_methods

    status, out, _ = command("methods", capsys=capsys)
    assert status == 0
    methods, left_out, weights, adapters = out.split("\n\n")
    for table, names in ((methods, ["method", *list_methods()]), (weights, ["weights", *list_weights()])):
        assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == names
    assert "galore_8bit: moments='8bit' has blocks" in left_out
    assert "dora" in adapters
    assert "relora, periodic_lora, loqt: whole matrices take up the factors" in weights
    assert {line.split()[0]: line.split()[-1] for line in weights.splitlines() if line[0] != " "}["mhlora"] == "yes"


@pytest.mark.parametrize("name", ["pretrain", "sweep"])
def test_help_shows_an_example_and_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(name, "--help", capsys=capsys)
    assert status == 0
    assert f"subspan {name} --" in " ".join(out.split())
    missing = [key for key in yaml.safe_load(PretrainConfig().to_yaml()) if f"--{key}" not in out]
    assert missing == (["resume"] if name == "sweep" else [])


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys\nfrom subspan.cli.main import main\ntry: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "subspan", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("subspan ")


def test_without_the_extra() -> None:
    code = "import sys\nsys.modules['jsonargparse'] = None\nfrom subspan.cli.main import main\nsys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'subspan[train]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "--lrr", "0.1"],
            "unknown setting 'lrr'. Did you mean 'lr'?\nAll settings: subspan pretrain --help",
        ),
        (["pretrain", "--batchsize=3"], "unknown setting 'batchsize'. Did you mean 'batch_size'?"),
        (["sweep", "--grid.lr", "[1]", "--zzz", "1"], "unknown setting 'zzz'.\nAll settings: subspan sweep --help"),
        (["pretrain", "--lr", "high"], "high"),
        (["pretrain", "--dtype", "float16"], "float16"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["pretrane"], "pretrane"),
        ([], "subcommand"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = command(*arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_an_unknown_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 3\n")
    status, _, err = command("pretrain", "--config", str(tmp_path / "run.yaml"), capsys=capsys)
    assert status == 2
    assert "unknown setting 'learning_rate'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "error: steps is 0; it must be at least 1."),
        (["--data", "/no/where.txt"], "error: data '/no/where.txt': no such file or folder."),
    ],
)
def test_settings_that_cannot_be_honoured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = command("pretrain", *arguments, capsys=capsys)
    assert status == 1
    assert err.startswith(message)


def test_print_config_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--lr", "1e-5", "--exclude", "[a,b]", "--rank=7", "--optimizer.scale", "0.5", "--optimizer.eps", "1e-6"]
    status, first, _ = command("pretrain", *changes, "--print_config", capsys=capsys)
    assert status == 0
    (tmp_path / "run.yaml").write_text(first)
    _, second, _ = command("pretrain", "--config", str(tmp_path / "run.yaml"), "--print-config", capsys=capsys)
    assert second == first
    config = PretrainConfig(**yaml.safe_load(first))
    assert config == PretrainConfig(lr=1e-5, exclude=["a", "b"], rank=7, optimizer={"scale": 0.5, "eps": 1e-6})


def test_a_run_from_a_file_and_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command("pretrain", *options(tmp_path, steps=4), capsys=capsys)
    assert status == 0, err
    assert "perplexity" in out
    resolved = tmp_path / "run" / "config.yaml"
    other = str(tmp_path / "other")
    status, _, err = command("pretrain", "--config", str(resolved), "--output", other, "--lr=0.02", capsys=capsys)
    assert status == 0, err
    first, second = metrics(tmp_path / "run"), metrics(tmp_path / "other")
    assert second[1]["learning_rate"] == 2 * first[1]["learning_rate"]
    assert second[-1]["tokens"] == 4 * 4 * 16


def test_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, steps=2)
    status, out, err = command("sweep", "--grid.optimizer.scale", "[0.5,1.0]", *given, capsys=capsys)
    assert status == 0, err
    assert {path.name for path in (tmp_path / "run").glob("optimizer*")} == {
        "optimizer.scale=0.5",
        "optimizer.scale=1.0",
    }
    assert "eval loss" in out
