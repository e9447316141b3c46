"""Weights, gradients and updates of a real run, against the same computed by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from subspan.analysis.gradients import GradientSample, batch_gradients, repeated_gradients, run_data
from subspan.analysis.spectrum_run import SpectrumResult, spectrum
from subspan.analysis.spectrum_settings import SpectrumSettings
from subspan.analysis.spectrum_sources import Source, find_source
from subspan.linalg import exact_basis, rank_for_energy, seeded_generator, subspace_overlap
from subspan.train.config import PretrainConfig
from subspan.train.data import PackedDataset
from tests.train.micro import metrics, run, write_model, write_text_file

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 12 steps with checkpoints at 4, 8 and 12; gradients are not clipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("spectrum")
        run(folder, keep_checkpoints=4, max_grad_norm=0.0, grad_accumulation=2, log_every=1)
        yield folder / "run"


@pytest.fixture
def source(folder: Path) -> Source:
    return find_source(str(folder))


@pytest.fixture
def config(source: Source) -> PretrainConfig:
    config = source.config()
    assert config is not None
    return config


def analyse(source: Path, output: Path | None, **settings: object) -> tuple[SpectrumResult, str]:
    file = io.StringIO()
    console = Console(file=file, width=80)
    result = spectrum(
        SpectrumSettings(str(source), output=None if output is None else str(output), **settings), console=console
    )  # type: ignore[arg-type]
    return result, file.getvalue()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time."""
    monkeypatch.setattr("subspan.analysis.spectrum_run.draw", lambda spectra, folder: [])


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_gradients_are_those_of_the_batches(source: Source, config: PretrainConfig) -> None:
    data = run_data(source, config)
    assert isinstance(data.train, PackedDataset)
    checkpoint = source.checkpoints[1]
    samples = batch_gradients(checkpoint, config, data, 2)
    found = [{name: p.grad.clone() for name, p in s.parameters.items() if p.grad is not None} for s in samples]

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).double()
    order = torch.randperm(len(data.train), generator=seeded_generator(config.seed, "spectrum"))
    for batch, gradients in enumerate(found):
        ids = data.train.sequences[order[8 * batch : 8 * batch + 8]].long()
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        for (name, parameter), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=1e-7)
            assert parameter.shape == gradients[name].shape
    assert not torch.allclose(found[0][Q_PROJ], found[1][Q_PROJ])


def test_repeated_steps_are_those_of_the_run(source: Source, config: PretrainConfig, folder: Path) -> None:
    before = content(folder)
    norms: dict[int, float] = {}
    last: list[dict[str, Tensor]] = []

    def visit(sample: GradientSample) -> None:
        gradients = [p.grad for p in sample.parameters.values() if p.grad is not None]
        norms[sample.step] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
        last[:] = [dict(sample.parameters)]

    assert repeated_gradients(source, config, 4, 1, visit) == 8
    assert list(norms) == [8, 9, 10, 11]
    # A gradient at step s is the one of which the metrics speak at s + 1.
    logged = {line["step"] - 1: line["grad_norm"] for line in metrics(folder) if "grad_norm" in line}
    assert norms == pytest.approx({step: logged[step] for step in norms}, rel=1e-5)
    # The weights are live: after the last step they are those of the last checkpoint, bit by bit.
    end = source.checkpoints[2]
    assert all(torch.equal(tensor.detach(), end.read(name)) for name, tensor in last[0].items())
    assert content(folder) == before, "the run folder was written to"


def test_repeating_from_the_beginning(source: Source, config: PretrainConfig, folder: Path) -> None:
    norms: dict[int, float] = {}

    def visit(sample: GradientSample) -> None:
        gradients = [p.grad for p in sample.parameters.values() if p.grad is not None]
        norms[sample.step] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()

    assert repeated_gradients(source, config, 11, 5, visit) == 0
    logged = {line["step"] - 1: line["grad_norm"] for line in metrics(folder) if "grad_norm" in line}
    assert norms == pytest.approx({step: logged[step] for step in (0, 5, 10)}, rel=1e-5)


def test_repeating_a_run_with_experts(tmp_path: Path) -> None:
    # Files hold experts one by one and the model holds them as stacks, under other names.
    write_model(tmp_path, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=2)
    write_text_file(tmp_path)
    run(tmp_path, steps=4, save_every=2, keep_checkpoints=2)
    source = find_source(str(tmp_path / "run"))
    config = source.config()
    assert config is not None
    last: dict[str, Tensor] = {}
    assert repeated_gradients(source, config, 2, 1, lambda sample: last.update(sample.parameters)) == 2
    assert {tensor.ndim for name, tensor in last.items() if "experts" in name} == {3}
    end = AutoModelForCausalLM.from_pretrained(source.checkpoints[-1].path)
    assert all(torch.equal(tensor, last[name]) for name, tensor in end.named_parameters())


@pytest.mark.parametrize(("given", "steps", "message"), [
    ("checkpoint-12", 1, "steps is 1, but the run has 12 steps and .*checkpoint-12' is at 12; give an earlier"),
    ("", 13, "steps is 13, but the run has 12; it must be at most that"),
])  # fmt: skip
def test_more_steps_than_there_are(folder: Path, tmp_path: Path, given: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyse(folder / given, tmp_path, what="gradients", steps=steps)


@pytest.mark.parametrize("gradient", ["fused", "projected"])
def test_a_run_without_gradients_between_its_steps(tmp_path: Path, no_pictures: None, gradient: str) -> None:
    run(tmp_path, steps=2, save_every=2, gradient=gradient, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=f"has gradient '{gradient}': it keeps no gradients .* Take --batches"):
        analyse(tmp_path / "run", tmp_path / "out", what="gradients", steps=2)
    result, _ = analyse(tmp_path / "run", tmp_path / "out", what="gradients", batches=1, layers="proj")
    assert all(row.figures is not None for row in result.spectra["gradients"].rows)


def test_all_of_a_run(folder: Path, tmp_path: Path, no_pictures: None) -> None:
    saved = tmp_path / "gradients.safetensors"
    result, out = analyse(folder, tmp_path / "out", what="all", batches=2, save_gradients=str(saved))
    weights = {(row.name, row.step): row for row in result.spectra["weights"].rows}
    ends = {step: load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8, 12)}
    assert {step for _, step in weights} == {4, 8, 12}
    assert {name for name, _ in weights} == set(ends[4])

    row = weights[Q_PROJ, 8]
    assert row.figures is not None and row.rank == 8
    assert row.figures.rank_95 == rank_for_energy(ends[8][Q_PROJ].double(), 0.95).item()
    bases = [exact_basis(ends[step][Q_PROJ].double().mT, 8).basis for step in (4, 8)]
    # Square matrices: the Gram matrix is that of the columns.
    assert row.overlap == pytest.approx(subspace_overlap(*bases).item(), abs=1e-4)

    update = {(row.name, row.step): row for row in result.spectra["update"].rows}
    figures = update[Q_PROJ, 12].figures
    assert figures is not None
    difference = ends[12][Q_PROJ].double() - ends[4][Q_PROJ].double()
    assert figures.frobenius_norm == pytest.approx(torch.linalg.matrix_norm(difference).item(), rel=1e-5)
    assert figures.rank_90 == rank_for_energy(difference, 0.9).item()

    gradients = result.spectra["gradients"].rows
    times = [(row.step, row.batch) for row in gradients if row.name == Q_PROJ]
    assert times == [(step, batch) for step in (4, 8, 12) for batch in (0, 1)]
    compared = {(row.step, row.batch): row for row in gradients if row.name == Q_PROJ}
    # In time the same batch is compared, so the first checkpoint has nothing before it.
    assert [time for time in times if compared[time].overlap is None] == [(4, 0), (4, 1)]
    assert [time for time in times if compared[time].batch_overlap is None] == [(4, 0), (8, 0), (12, 0)]
    assert {row.name for row in gradients if row.projected} == {
        name for name in ends[4] if "proj" in name and "lm_head" not in name
    }
    assert "Rank for projecting gradients: at least " in out
    assert "Rank of a LoRA adapter: " in out

    with safe_open(saved, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "what": "gradients", "step": "12"}
        gradient = file.get_tensor(Q_PROJ)
        assert all(len(file.get_slice(name).get_shape()) == 2 for name in file.keys())  # noqa: SIM118
    sigma = load_file(tmp_path / "out" / "gradients.safetensors")[f"{Q_PROJ}@12.1"]
    torch.testing.assert_close(torch.linalg.svdvals(gradient), sigma, rtol=1e-4, atol=1e-6)


def test_a_run_alone_gives_weights_and_gradients(folder: Path, tmp_path: Path) -> None:
    result, _ = analyse(folder / "checkpoint-8", tmp_path, layers="q_proj")
    assert list(result.spectra) == ["weights", "gradients"]
    assert {row.step for spectra in result.spectra.values() for row in spectra.rows} == {8}
    assert all(row.batch_overlap is not None for row in result.spectra["gradients"].rows if row.batch)
    names = {file.name for file in tmp_path.glob("*.png")}
    # One point in time: drawn over the depth.
    assert names == {f"{what}-{name}.png" for what in ("weights", "gradients") for name in ("decay", "ranks")}


def test_a_stream_of_gradients(folder: Path, tmp_path: Path, no_pictures: None) -> None:
    result, out = analyse(folder, tmp_path, what="gradients", steps=8, every=3, layers="mlp.up")
    rows = result.spectra["gradients"].rows
    assert [(row.layer, row.step, row.batch) for row in rows] == [(i, s, None) for s in (4, 7, 10) for i in (0, 1)]
    assert [row.overlap is None for row in rows] == [True, True, False, False, False, False]
    assert "3 points in time from step 4" in out


def test_results_go_into_the_run(folder: Path, no_pictures: None) -> None:
    result, _ = analyse(folder, None, what="weights", layers="q_proj")
    assert result.output == folder / "spectrum"


@pytest.mark.parametrize("changes", ["gone", "changed"])
def test_data_that_is_not_that_of_the_run(folder: Path, tmp_path: Path, changes: str, no_pictures: None) -> None:
    text = folder.parent / "text.jsonl"
    original = text.read_text()
    if changes == "gone":
        text.unlink()
    else:
        text.write_text(original + "\n" + json.dumps({"text": "another document"}))
    message = "no such file" if changes == "gone" else "has changed"
    try:
        for settings in ({"batches": 1}, {"steps": 2}):
            with pytest.raises(ValueError, match=f"gradients need what the run was trained on: .*{message}"):
                analyse(folder, tmp_path, what="gradients", **settings)
        result, _ = analyse(folder, tmp_path, what="weights", layers="q_proj")
        assert result.spectra["weights"].rows
    finally:
        text.write_text(original)


def test_more_batches_than_text(source: Source, config: PretrainConfig) -> None:
    data = run_data(source, config)
    with pytest.raises(ValueError, match=r"take 800000 sequences and the training text has \d+; take fewer --batches"):
        next(batch_gradients(source.checkpoints[0], config, data, 100_000))
