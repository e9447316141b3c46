"""What comes from outside is data: no pickle is opened, no code of a model is run, nothing shown is markup."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import subspan
from subspan.checkpoint import save_checkpoint
from subspan.cli.main import main
from subspan.optim import GaLore
from subspan.train.config import PretrainConfig, read_config
from subspan.train.presets import build_model, skeleton
from subspan.train.pretrain import pretrain
from subspan.train.sweep import sweep
from subspan.train.tokenizer import load_tokenizer
from tests.train.micro import LLAMA, run, settings

SOURCE = Path(subspan.__file__).parent
#: Calls that run what they read, and where one of them may stand.
BANNED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle",
    "cPickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "cloudpickle",
}
BANNED |= {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "os.system", "subprocess"}
BANNED |= {"extractall", "unpack_archive", "torch.hub", "runpy"}
ALLOWED: dict[str, set[str]] = {
    # The converter of foreign optimizer states, with weights_only=True.
    "checkpoint": {"torch.load"},
}


class Malice:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "what was loaded has run code"


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that are called or imported, with their lines; `a.b.c` also as its ends and beginnings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield node.lineno, name
            if "." in name:
                yield node.lineno, name.split(".", 1)[0]
                if (last := name.rsplit(".", 1)[1]) in {"extractall", "unpack_archive"}:
                    yield node.lineno, last
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield node.value.lineno, f"trust_remote_code={ast.unparse(node.value)}"
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            yield node.value.lineno, f"weights_only={ast.unparse(node.value)}"


def dangers(path: Path, layer: str = "") -> list[str]:
    banned = (BANNED | {"trust_remote_code=True", "weights_only=False"}) - ALLOWED.get(layer, set())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{path.name}:{line} {name}" for line, name in calls(tree) if name in banned]


def test_no_source_runs_what_it_reads() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    assert [danger for path in files for danger in dangers(path, path.relative_to(SOURCE).parts[0])] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "yaml.load(text)",
        "from yaml import unsafe_load",
        "eval(text)",
        "exec(text)",
        "archive.extractall(folder)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "read(path, weights_only=False)",
        "subprocess.run(command)",
    ],
)
def test_a_planted_danger_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "planted.py").write_text(line)
    assert dangers(tmp_path / "planted.py")


def test_every_loader_of_transformers_is_told_to_trust_no_code() -> None:
    """The default is off; said aloud, a change of the default changes nothing."""
    unsaid = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto"):
                given = {keyword.arg for keyword in node.keywords}
                if not {"trust_remote_code", None} & given:
                    unsaid.append(f"{path.name}:{node.lineno} {ast.unparse(node.func)}")
    assert unsaid == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_model_in_a_pickle_is_refused(tmp_path: Path, witness: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with (tmp_path / name).open("wb") as file:
        pickle.dump(Malice(witness), file)
    for command in (lambda: build_model(str(tmp_path)), lambda: run(tmp_path, model=str(tmp_path))):
        with pytest.raises(ValueError, match=r"is a pickle; only \*.safetensors weights are loaded"):
            command()
    assert main(["spectrum", str(tmp_path / name)]) == 1
    assert main(["spectrum", str(tmp_path), "--base", str(tmp_path / name), "--what", "update"]) == 1


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_under_another_name(tmp_path: Path, witness: Path, zipped: bool) -> None:
    """Whatever a file says that it is."""
    raw = pickle.dumps(Malice(witness))
    if zipped:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
        raw = stream.getvalue()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="cannot be loaded"):
        build_model(str(model), seq_len=16)
    for name in ("text.jsonl", "text.parquet", "text.txt", "text.jsonl.gz", "text.zst"):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=name):
            run(tmp_path, data=str(tmp_path / name))
    for name in ("tokenizer.json", "config.yaml"):
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"config.yaml"):
        read_config(tmp_path / "config.yaml")


def test_an_optimizer_takes_tensors_and_plain_values(witness: Path) -> None:
    """What is loaded comes as a dict; torch reads a saved one without opening arbitrary objects."""
    model = nn.Linear(8, 6)
    optimizer = GaLore(model, rank=2)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    saved = optimizer.state_dict()
    saved["state"][0] = dict(saved["state"][0], exp_avg=Malice(witness))
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(saved)


def test_code_beside_a_model_or_tokenizer_is_never_run(tmp_path: Path, witness: Path) -> None:
    code = f"import os\nos.mkdir({str(witness)!r})\n"
    (tmp_path / "evil.py").write_text(code + "class Evil: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    for build in (build_model, skeleton, load_tokenizer):
        with pytest.raises(ValueError):
            build(str(tmp_path))
    # With a type that transformers knows, its own code is taken.
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"auto_map": auto_map}))
    assert type(build_model(str(tmp_path), seq_len=16)).__module__.startswith("transformers.")


# -- what is shown ----------------------------------------------------------------------------------------------------


def printed(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


NAME = "x[bold red]y[/bold red][/]z"


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Square brackets in a path are no markup: neither lost nor an error."""
    folder = tmp_path / "x[bold red]y[blue]z"
    folder.mkdir()
    console = printed(400)
    config = PretrainConfig(**settings(folder, steps=2, save_every=1))
    pretrain(config, console=console)
    assert text(console).count("x[bold red]y[blue]z") >= 2
    again = printed(400)
    finished = PretrainConfig(**settings(folder, steps=2, save_every=1, resume="auto"))
    pretrain(finished, console=again)
    assert "The run in" in text(again) and "x[bold red]y[blue]z" in text(again)
    third = printed(400)
    sweep(
        PretrainConfig(**settings(folder, steps=1, output=str(folder / "sweep"))),
        {"data": [str(folder / "text.jsonl")]},
        console=third,
    )
    assert text(third).count("x[bold red]y[blue]z") >= 4


def test_names_in_a_checkpoint_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J[red]b"
    folder = save_checkpoint(tmp_path / "checkpoint-1", nn.ModuleDict({name: nn.Linear(2, 2)}))
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"\x1b[2J[red]b" in shown
    (folder / f"{name}.safetensors").touch()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert main(["checkpoint", "convert", str(folder), str(tmp_path / "converted")]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and r"\x1b[2J[red]b" in captured.err
