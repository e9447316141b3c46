"""Models on disk: what is read, what is left out and why, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from subspan.analysis import spectrum_rows
from subspan.analysis.spectrum_run import SpectrumResult, spectrum
from subspan.analysis.spectrum_settings import SpectrumSettings
from subspan.analysis.spectrum_sources import Checkpoint, natural_order
from tests.linalg.spectra import slow, with_spectrum


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of the time; only tests that are called after them draw any."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("subspan.analysis.spectrum_run.draw", lambda spectra, folder: [])


def analyse(source: Path, **settings: Any) -> tuple[SpectrumResult, str]:
    console = Console(file=io.StringIO(), width=80)
    result = spectrum(SpectrumSettings(str(source), **settings), console=console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def save(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder


def shard(folder: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for name, tensors in shards.items():
        save(folder, tensors, name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def lines(folder: Path, what: str = "weights") -> list[dict[str, str]]:
    with (folder / f"{what}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum_rows, "LARGEST_SIDE", 20)
    nan = torch.ones(4, 4)
    nan[0, 0] = torch.nan
    tensors = {
        "matrix": torch.randn(6, 4),
        "norm": torch.ones(4),
        "scale": torch.tensor(1.0),
        "codes": torch.zeros(4, 4, dtype=torch.uint8),
        "eighths": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "nan": nan,
        "inf": torch.full((2, 2), -torch.inf),
        "empty": torch.zeros(0, 4),
        "zero": torch.zeros(4, 4),
        "large": torch.ones(21, 22),
    }
    result, out = analyse(save(tmp_path, tensors))
    reasons = {row.name: row.reason for row in result.spectra["weights"].rows}
    assert reasons == {
        "matrix": "",
        "norm": "a vector",
        "scale": "a number",
        "codes": "of type U8: quantised or integer",
        "eighths": "of type F8_E4M3: quantised or integer",
        "nan": "not finite: it holds NaN or Inf",
        "inf": "not finite: it holds NaN or Inf",
        "empty": "empty",
        "zero": "all zero",
        "large": "too large: its short side is 21, above 20",
    }
    assert {row["name"]: row["reason"] for row in lines(tmp_path / "spectrum")} == reasons
    assert "Left out, all zero: 1 tensor: zero" in out
    assert "Left out, not finite: it holds NaN or Inf: 2 tensors: inf, nan" in out


def test_steps_of_weights_in_int8_are_no_matrices(tmp_path: Path) -> None:
    """They stand in a file of their own beside a run's model, or, after save_pretrained, in the same one."""
    weights = {"up.weight": torch.randn(32, 16), "down.weight": torch.randn(16, 32), "own_steps": torch.randn(8, 8)}
    save(tmp_path / "apart", weights)
    save(tmp_path / "apart", {"up.weight_steps": torch.ones(32, 2)}, "int8_steps.safetensors")
    save(tmp_path / "together", weights | {"up.weight_steps": torch.ones(32, 2)})
    for folder in ("apart", "together"):
        analyse(tmp_path / folder)
        assert {line["name"] for line in lines(tmp_path / folder / "spectrum")} == set(weights)


def test_stacks_and_kernels(tmp_path: Path) -> None:
    experts = torch.stack([with_spectrum(torch.ones(rank), 12, 16).float() for rank in (2, 4, 8)])
    kernel = torch.randn(10, 3, 2, 2)
    result, _ = analyse(save(tmp_path, {"layers.0.experts": experts, "layers.0.conv": kernel}))
    rows = {row.key: row for row in result.spectra["weights"].rows}
    # A uniform spectrum of rank k needs ⌈0.9 k⌉ directions for 90 %.
    found = {key: row.figures.rank_90 for key, row in rows.items() if row.figures and "experts" in key}
    assert found == {"layers.0.experts[0]": 2, "layers.0.experts[1]": 4, "layers.0.experts[2]": 8}
    assert rows["layers.0.conv"].matrix == (10, 12)
    sigma = load_file(tmp_path / "spectrum" / "weights.safetensors")
    torch.testing.assert_close(sigma["layers.0.conv"], torch.linalg.svdvals(kernel.flatten(1)))


def test_sharded_models_are_read_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {
        f"model-{i}-of-3.safetensors": {f"layers.{3 * i + j}.w": torch.randn(8, 8) for j in range(3)} for i in range(3)
    }
    alive: list[weakref.ref[Tensor]] = []
    order: list[str] = []

    def read(self: Checkpoint, name: str) -> Tensor:
        assert [ref for ref in alive if ref() is not None] == [], "an earlier tensor is still in memory"
        tensor = original(self, name)
        alive.append(weakref.ref(tensor))
        order.append(name)
        return tensor

    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read)
    result, _ = analyse(shard(tmp_path, shards))
    assert order == [f"layers.{i}.w" for i in range(9)]
    whole = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    for row in result.spectra["weights"].rows:
        assert row.figures is not None
        assert row.figures.frobenius_norm == pytest.approx(torch.linalg.matrix_norm(whole[row.name]).item())
        assert row.layer == int(row.name.split(".")[1]) and row.kind == "layers.*.w"


def test_checkpoints_are_points_in_time(tmp_path: Path) -> None:
    U, V = torch.linalg.qr(torch.randn(16, 16)).Q, torch.linalg.qr(torch.randn(20, 20)).Q
    first = U[:, :4] @ V[:4]
    for step, matrix in ((10, U[:, 4:8] @ V[:4]), (2, first), (5, first * 3)):
        save(tmp_path / f"checkpoint-{step}", {"w": matrix, f"only{step}.w": torch.ones(3, 3)})
    result, _ = analyse(tmp_path)
    rows = [row for row in result.spectra["weights"].rows if row.name == "w"]
    assert [row.step for row in rows] == [2, 5, 10]
    # A quarter of 16 directions is compared: the same ones, then others.
    assert [row.rank for row in rows] == [4, 4, 4]
    assert rows[0].overlap is None
    assert [row.overlap for row in rows[1:]] == pytest.approx([1, 0], abs=1e-5)
    assert len(result.spectra["weights"].rows) == 6
    assert [line["step"] for line in lines(tmp_path / "spectrum") if line["name"] == "w"] == ["2", "5", "10"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_update(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(64, 96).bfloat16().to(dtype)
    # In bfloat16 the sum has to be exact, so that the update keeps its rank: a block of powers of two.
    if dtype == torch.float32:
        update = with_spectrum(torch.ones(10), 64, 96).float() * 10
    else:
        base, update = torch.zeros(64, 96, dtype=dtype), torch.zeros(64, 96)
        update[:10, :10] = torch.eye(10) * 4
    save(tmp_path / "base", {"a.w": base, "a.b": base[0], "gone": base, "other": base})
    save(tmp_path / "tuned", {"a.w": (base + update).to(dtype), "a.b": base[0], "new": base, "other": base[:5]})
    result, out = analyse(tmp_path / "tuned", what="update", base=str(tmp_path / "base"))
    rows = {row.name: row for row in result.spectra["update"].rows}
    figures = rows["a.w"].figures
    assert figures is not None
    assert (figures.rank_90, figures.rank_95, figures.rank_99) == (9, 10, 10)
    assert rows["a.w"].suggested_rank == 16
    assert "Update of the weights since base" in out
    assert "Rank of a LoRA adapter: 16 " in out
    assert rows["new"].reason == "not in the base"
    assert rows["other"].reason == "of another shape in the base: (64, 96)"
    assert rows["a.b"].reason == "a vector"


def test_updates_of_a_folder_of_checkpoints_count_from_the_first(tmp_path: Path) -> None:
    weights = {step: torch.randn(8, 8) for step in (1, 2, 3)}
    for step, tensor in weights.items():
        save(tmp_path / f"checkpoint-{step}", {"w": tensor})
    result, _ = analyse(tmp_path, what="update")
    norms = {row.step: row.figures.frobenius_norm for row in result.spectra["update"].rows if row.figures}
    expected = {step: torch.linalg.matrix_norm(weights[step] - weights[1]).item() for step in (2, 3)}
    assert norms == pytest.approx(expected)


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    A = with_spectrum(slow(12), 12, 30).float()
    result, _ = analyse(save(tmp_path, {"model.layers.3.q.weight": A}), output=str(tmp_path / "out"))
    (line,) = lines(tmp_path / "out")
    (row,) = result.spectra["weights"].rows
    assert row.figures is not None
    assert (line["name"], line["kind"], line["layer"]) == ("model.layers.3.q.weight", "model.layers.*.q", "3")
    assert (line["shape"], line["rows"], line["columns"], line["step"]) == ("12x30", "12", "30", "")
    assert float(line["stable_rank"]) == row.figures.stable_rank
    assert int(line["rank_95"]) == row.figures.rank_95
    sigma = load_file(tmp_path / "out" / "weights.safetensors")
    torch.testing.assert_close(sigma[line["singular_values"]], slow(12).float())
    assert not list((tmp_path / "out").glob("*tmp*"))


def test_a_model_with_a_config_of_something_else(tmp_path: Path) -> None:
    folder = save(tmp_path, {"w": torch.randn(4, 4)})
    (folder / "config.yaml").write_text("trainer: another\n")
    result, _ = analyse(folder)
    assert list(result.spectra) == ["weights"]


def test_layers_choose(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.{kind}.weight": torch.randn(4, 4) for i in (0, 1, 10) for kind in ("up", "down")}
    folder = save(tmp_path, tensors)
    result, _ = analyse(folder, layers=r"\.1\.up|10")
    names = [row.name for row in result.spectra["weights"].rows]
    assert names == ["layers.1.up.weight", "layers.10.down.weight", "layers.10.up.weight"]
    with pytest.raises(ValueError, match=r"layers 'gate' is found in no name; names look like layers\.0\.down"):
        analyse(folder, layers="gate")


@pytest.mark.parametrize("full", [False, True])
def test_table(tmp_path: Path, full: bool) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(16, 32) for i in range(11)}
    _, out = analyse(save(tmp_path, tensors), full=full)
    names = re.findall(r"^(\S*up_proj)", out, flags=re.MULTILINE)
    assert names == ([f"model.layers.{i}.mlp.up_proj" for i in range(11)] if full else ["mlp.up_proj"])
    assert full or max(map(len, out.splitlines())) <= max(80, len(str(tmp_path)) + 80)


def test_pictures_and_those_that_no_longer_apply(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"checkpoint-{step}", {f"layers.{i}.w": torch.randn(8, 8) for i in range(2)})
    out = tmp_path / "out"
    analyse(tmp_path, output=str(out))
    assert {file.name for file in out.glob("*.png")} == {f"weights-{n}.png" for n in ("decay", "ranks", "overlap")}
    (out / "update-decay.png").touch()
    analyse(tmp_path / "checkpoint-1", output=str(out))
    # One checkpoint has no overlap; what belongs to another quantity stays.
    assert {file.name for file in out.glob("*.png")} == {"weights-decay.png", "weights-ranks.png", "update-decay.png"}


def test_without_matplotlib_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, out = analyse(save(tmp_path, {"w": torch.randn(4, 4)}))
    assert "No pictures, since matplotlib is not installed: pip install 'subspan[report]'" in out
    assert {file.name for file in (tmp_path / "spectrum").iterdir()} == {"weights.csv", "weights.safetensors"}


def test_only_left_out_tensors_make_no_picture_but_a_table(tmp_path: Path) -> None:
    _, out = analyse(save(tmp_path, {"w": torch.ones(4)}))
    assert "Left out, a vector: 1 tensor" in out
    assert not list((tmp_path / "spectrum").glob("*.png"))
    assert len(lines(tmp_path / "spectrum")) == 1


def test_where_results_go(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.randn(4, 4)}, "tuned.safetensors")
    result, _ = analyse(tmp_path / "tuned.safetensors")
    assert result.output == tmp_path / "tuned-spectrum"
    cache = tmp_path / "hub" / "models--a--b" / "snapshots" / "0f"
    save(cache, {"w": torch.randn(4, 4)})
    with pytest.raises(ValueError, match=r"snapshots/0f/spectrum' lies in the cache .* give --output FOLDER"):
        analyse(cache)
    assert not (cache / "spectrum").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output '.*file' cannot be written to"):
        analyse(cache, output=str(tmp_path / "file"))


def broken(folder: Path, case: str) -> Path:
    """A source that cannot be read."""
    folder.mkdir(exist_ok=True)
    good = {"w": torch.randn(4, 4)}
    if case == "pickles":
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    elif case == "a pickle":
        (folder / "model.pt").write_bytes(b"pickle")
        return folder / "model.pt"
    elif case == "another file":
        (folder / "notes.txt").touch()
        return folder / "notes.txt"
    elif case == "a run without checkpoints":
        (folder / "config.yaml").write_text("method: galore\n")
    elif case == "text":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    elif case == "cut short":
        save(folder, good)
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-8])
    elif case == "twice":
        save(save(folder, good), good, "consolidated.safetensors")
    elif case == "a missing shard":
        shard(folder, {"1.safetensors": good, "2.safetensors": {"v": torch.ones(2, 2)}})
        (folder / "2.safetensors").unlink()
    elif case == "a shard elsewhere":
        index = {"weight_map": {"w": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "two models":
        for name in ("a", "b"):
            (folder / f"{name}.safetensors.index.json").write_text("{}")
    elif case == "no index":
        (folder / "model.safetensors.index.json").write_text("[]")
    elif case == "nothing there":
        return folder / "nowhere"
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pickles", r"holds no safetensors, only pickles \(pytorch_model.bin\), which are never opened"),
        ("a pickle", "model.pt' is a pickle, which is never opened; give a run folder"),
        ("another file", "notes.txt' is no .safetensors file; give a run folder"),
        ("an empty folder", "holds neither a run nor safetensors; give a run folder"),
        ("a run without checkpoints", "has no checkpoint yet"),
        ("text", "model.safetensors' is not a whole safetensors file"),
        ("cut short", "model.safetensors' is not a whole safetensors file"),
        ("twice", "holds 'w' in two files"),
        ("a missing shard", "names '2.safetensors', which is not there"),
        ("a shard elsewhere", r"names '\.\./secret.safetensors', which is no file beside it"),
        ("two models", r"holds more than one model \(a.safetensors.index.json, b.safetensors.index.json\)"),
        ("no index", "is not an index of safetensors files"),
        ("nothing there", "nowhere': no such file or folder; give a run folder"),
    ],
)
def test_sources_that_are_refused(tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analyse(broken(tmp_path / "source", case), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "gradients"}, "gradients need a run of subspan pretrain"),
        ({"batches": 2}, "gradients need a run of subspan pretrain"),
        ({"what": "update"}, "an update lies between two checkpoints"),
        ({"what": "update", "base": "nowhere"}, "'nowhere': no such file or folder"),
        ({"batches": 0}, "batches is 0; it must be at least 1"),
        ({"steps": -1}, "steps is -1; it must be at least 1"),
        ({"steps": 4, "batches": 1}, "batches is 1 and steps is 4"),
        ({"every": 2}, "every is 2 without steps"),
        ({"every": 5, "steps": 4}, "every is 5, more than the 4 steps"),
        ({"what": "weights", "steps": 4}, "steps is 4, but with --what weights no gradient is taken"),
        ({"base": "x"}, "base is 'x'; it is used with --what update"),
        (
            {"what": "gradients", "save_gradients": "g.pt"},
            "save_gradients is 'g.pt'; the file must end in .safetensors",
        ),
        ({"layers": "("}, r"layers is '\(', which is not a regular expression"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analyse(save(tmp_path, {"w": torch.randn(4, 4)}), **settings)


def test_a_base_with_nothing_in_common(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.randn(4, 4)})
    save(tmp_path / "b", {"v": torch.randn(4, 4)})
    with pytest.raises(ValueError, match="has no matrix in common"):
        analyse(tmp_path / "a", what="update", base=str(tmp_path / "b"))
    for step in (1, 2):
        save(tmp_path / "b" / f"checkpoint-{step}", {"w": torch.randn(4, 4)})
    with pytest.raises(ValueError, match="has 2 checkpoints; give one of them"):
        analyse(tmp_path / "a", what="update", base=str(tmp_path / "b"))


def test_names_like_markup_are_shown(tmp_path: Path) -> None:
    _, out = analyse(save(tmp_path / "a[red]b", {"w[bold]": torch.randn(4, 4)}))
    assert "a[red]b" in out and "w[bold]" in out


def test_natural_order() -> None:
    names = ["h.10.w", "h.2.w", "a", "h.2.b", "2", "10"]
    assert sorted(names, key=natural_order) == ["2", "10", "a", "h.2.b", "h.2.w", "h.10.w"]
