"""``subspan spectrum`` from its settings to its results."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from subspan.analysis.gradients import GradientSample, batch_gradients, repeated_gradients, run_data
from subspan.analysis.spectrum_files import write_gradients, write_results
from subspan.analysis.spectrum_plots import draw
from subspan.analysis.spectrum_rows import Spectra, reason_against
from subspan.analysis.spectrum_settings import DEFAULT_BATCHES, SpectrumSettings
from subspan.analysis.spectrum_sources import Checkpoint, Source, find_source, natural_order, output_folder
from subspan.analysis.spectrum_table import show
from subspan.analysis.spectrum_weights import update_spectra, weight_spectra
from subspan.train.config import PretrainConfig

__all__ = ["SpectrumResult", "spectrum"]

#: As safetensors calls them.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclasses.dataclass(frozen=True)
class SpectrumResult:
    """What was found.

    Attributes:
        spectra: rows and singular values, by quantity.
        output: folder of the tables and pictures.
    """

    spectra: dict[str, Spectra]
    output: Path


def spectrum(settings: SpectrumSettings, *, console: Console | None = None) -> SpectrumResult:
    """Analyse the singular values of weights, gradients and updates, and suggest ranks.

    Matrices are read one at a time. The output folder gets for each quantity ``QUANTITY.csv``, the singular values as
    ``QUANTITY.safetensors``, and pictures where matplotlib is installed.

    Args:
        settings: what to analyse.
        console: where to print (default: standard output).

    Returns:
        `SpectrumResult`.

    Raises:
        FileNotFoundError: no such source.
        ValueError: settings that do not fit the source, files that cannot be read, or an output that cannot be written.

    Example:
        >>> found = spectrum(SpectrumSettings("runs/galore-llama_bench", what="weights"))  # doctest: +SKIP
        >>> found.spectra["weights"].rows[0].figures.rank_95  # doctest: +SKIP
        171
    """
    console = console or Console()
    source = find_source(settings.source)
    config = source.config()
    quantities = _quantities(settings, source)
    base = find_source(settings.base) if settings.base is not None else None
    if base is not None and len(base.checkpoints) > 1:
        raise ValueError(f"base {settings.base!r} has {len(base.checkpoints)} checkpoints; give one of them.")
    # A model may call its parameters otherwise than its files do.
    wanted = _wanted(settings.layers, source.checkpoints) if quantities != ["gradients"] else []
    output = output_folder(settings.output, source)
    _describe(console, source, output)

    rank = config.rank if config is not None else None
    spectra: dict[str, Spectra] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        # First, so that data which is gone is found out at once.
        if "gradients" in quantities:
            assert config is not None
            task = progress.add_task("gradients", total=_samples(settings, source))
            collector = _Collector(settings, rank, lambda: progress.advance(task))
            collector.take(source, config)
            spectra["gradients"] = collector.spectra
            if settings.save_gradients is not None:
                write_gradients(Path(settings.save_gradients).expanduser(), collector.last, collector.step)
        if "weights" in quantities:
            names = progress.track(wanted, description="weights")
            spectra["weights"] = weight_spectra(names, source.checkpoints, rank)
        if "update" in quantities:
            first, *later = source.checkpoints if base is None else [*base.checkpoints, *source.checkpoints]
            names = progress.track(wanted, description="update")
            spectra["update"] = update_spectra(names, first, later, rank)
    spectra = {what: spectra[what] for what in quantities}
    for found in spectra.values():
        found.suggest()
        show(console, found, full=settings.full)
        write_results(found, output)
    pictures = draw(list(spectra.values()), output)
    _say_where(console, output, pictures, settings)
    return SpectrumResult(spectra, output)


def _quantities(settings: SpectrumSettings, source: Source) -> list[str]:
    """What to analyse; what was asked for by name and is not possible is an error."""
    if settings.what is None:
        gradients_wanted = settings.steps or settings.batches or settings.save_gradients
        wanted = ["weights", "gradients"] if source.run is not None or gradients_wanted else ["weights"]
    else:
        wanted = ["weights", "update", "gradients"] if settings.what == "all" else [settings.what]
    if "gradients" in wanted and source.run is None:
        raise ValueError(
            f"gradients need a run of subspan pretrain and its data, and {settings.source!r} is no run; take "
            "--what weights."
        )
    if "update" in wanted and settings.base is None and len(source.checkpoints) < 2:
        raise ValueError(
            f"an update lies between two checkpoints and {settings.source!r} has one; give --base OTHER, or for a run "
            "keep more of them (--keep_checkpoints)."
        )
    return wanted


def _wanted(layers: str | None, checkpoints: list[Checkpoint]) -> list[str]:
    names = sorted({name for checkpoint in checkpoints for name in checkpoint.names}, key=natural_order)
    wanted = [name for name in names if layers is None or re.search(layers, name)]
    if not wanted:
        if layers is None:
            raise ValueError(f"{str(checkpoints[0].path)!r} holds no tensors.")
        raise ValueError(
            f"layers {layers!r} is found in no name; names look like {', '.join(names[:: len(names) // 3 + 1])}."
        )
    return wanted


def _describe(console: Console, source: Source, output: Path) -> None:
    points = ", ".join(checkpoint.path.name for checkpoint in source.checkpoints)
    console.print(f"[bold]read[/]    {escape(f'{source.path}: {points}')}", highlight=False, soft_wrap=True)
    console.print(f"[bold]output[/]  {escape(str(output))}\n", highlight=False, soft_wrap=True)


def _say_where(console: Console, output: Path, pictures: list[Path] | None, settings: SpectrumSettings) -> None:
    files = sorted(file.name for file in output.iterdir() if file.suffix in (".csv", ".safetensors", ".png"))
    console.print(f"In {output}: {', '.join(files)}", markup=False, highlight=False, soft_wrap=True)
    if settings.save_gradients is not None:
        console.print(f"Gradients: {settings.save_gradients}", markup=False, highlight=False, soft_wrap=True)
    if pictures is None:
        without = "No pictures, since matplotlib is not installed: pip install 'subspan[report]'"
        console.print(without, markup=False, highlight=False, soft_wrap=True)


def _samples(settings: SpectrumSettings, source: Source) -> int:
    if settings.steps is None:
        return len(source.checkpoints) * (settings.batches or DEFAULT_BATCHES)
    return -(-settings.steps // _every(settings))


def _every(settings: SpectrumSettings) -> int:
    assert settings.steps is not None
    return settings.every or max(1, settings.steps // 10)


class _Collector:
    """Analyses gradients as they come, and keeps the last ones where they are to be saved."""

    def __init__(self, settings: SpectrumSettings, rank: int | None, advance: Callable[[], None]) -> None:
        self.settings = settings
        self.advance = advance
        self.spectra = Spectra("gradients", rank, overlaps=True)
        self.last: dict[str, Tensor] = {}
        self.step = 0

    def take(self, source: Source, config: PretrainConfig) -> None:
        """Take all samples that the settings ask for."""
        settings = self.settings
        if settings.steps is not None:
            repeated_gradients(source, config, settings.steps, _every(settings), self.visit)
            return
        data = run_data(source, config)
        for checkpoint in source.checkpoints:
            for sample in batch_gradients(checkpoint, config, data, settings.batches or DEFAULT_BATCHES):
                self.visit(sample)

    def visit(self, sample: GradientSample) -> None:
        """Analyse a sample."""
        self.spectra.projected = sample.projected
        self.step = sample.step
        names = [name for name in sample.parameters if re.search(self.settings.layers or "", name)]
        for name in sorted(names, key=natural_order):
            parameter = sample.parameters[name]
            shape = tuple(parameter.shape)
            reason = reason_against(shape, _TYPES.get(parameter.dtype, str(parameter.dtype)))
            if reason or parameter.grad is None:
                self.spectra.skip(name, shape, sample.step, reason or "without a gradient", sample.batch)
                continue
            self.spectra.add(name, parameter.grad, sample.step, sample.batch)
            if self.settings.save_gradients is not None:
                self.last[name] = parameter.grad.detach().cpu().clone()
        if not names:
            raise ValueError(f"layers {self.settings.layers!r} is found in the name of no parameter of the model.")
        self.advance()
