"""``subspan bench layers``: the test loss where heads stand in attention, MLP and logit layers, or in some of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from subspan.analysis.environment import environment
from subspan.analysis.study_pictures import draw_layers
from subspan.analysis.study_report import layers_table, rows_as_csv, rows_as_record, say_picture
from subspan.train.config import PretrainConfig, write_text
from subspan.train.processes import launched
from subspan.train.summary import RunSummary
from subspan.train.sweep import claim, run_once

__all__ = ["LAYERS", "LayersResult", "LayersRow", "bench_layers"]

_KINDS = {"A": "attention", "M": "mlp", "L": "logit"}
#: The choices of the study, and what they are as ``target_modules``; None: full weights.
LAYERS: dict[str, str | None] = {
    **{
        name: "+".join(_KINDS[letter] for letter in name.split("+"))
        for name in ("A", "M", "L", "A+M", "A+L", "M+L", "A+M+L")
    },
    "full": None,
}
#: Settings that say how weights are held; the full run has their defaults.
_OF_WEIGHTS = ("weights", "weight_settings", "adapter", "adapter_settings", "project", "target_modules", "exclude")
_PACKAGES = ("subspan", "torch", "transformers", "accelerate", "tokenizers", "datasets")


@dataclass(frozen=True)
class LayersRow:
    """One run.

    Attributes:
        layers: which have heads: A, M, L joined by +; or full.
        trained: parameters that are trained, copies of one once; None for a run that diverged.
        loss, perplexity: on the held-out text; None for a run that diverged.
        milliseconds: wall-clock time of a step in training, evaluations and checkpoints left out.
        state_bytes: of the optimizer.
        tokens: trained on.
    """

    layers: str
    trained: int | None
    loss: float | None
    perplexity: float | None
    milliseconds: float | None
    state_bytes: int
    tokens: int


@dataclass(frozen=True)
class LayersResult:
    """What the study came to.

    Attributes:
        rows: finished runs in the order of the table.
        signal: number of the signal that stopped the study, or None.
    """

    rows: list[LayersRow]
    signal: int | None = None


def bench_layers(
    config: PretrainConfig,
    layers: Sequence[str] = tuple(LAYERS),
    *,
    full: dict[str, Any] | None = None,
    console: Console | None = None,
) -> LayersResult:
    """Train the same steps on the same data with heads in some layers, and with full weights; compare the test losses.

    Each run has a folder of its own. Called again, finished runs are skipped and an unfinished one continues. The
    folder `config.output` (default: ``runs/bench-layers-MODEL``) gets ``layers.json`` and ``layers.csv`` after each
    run, and ``layers.png`` where matplotlib is installed.

    Args:
        config: settings that all runs share; its `weights` and `weight_settings` are those of the layers.
        layers: keys of `LAYERS`.
        full: settings that the run with full weights has instead, such as its own lr; its lr_scale is 1
            unless it is given here.
        console: where to print (default: standard output).

    Raises:
        ValueError: an unknown choice of layers or setting, or a folder that holds a study with other settings.

    Example:
        >>> config = PretrainConfig(weights="mhlora", method="adamw", steps=100)  # doctest: +SKIP
        >>> result = bench_layers(config, ["A", "full"], full={"lr": 1e-3})  # doctest: +SKIP
        >>> [(row.layers, row.loss) for row in result.rows]  # doctest: +SKIP
        [('A', 5.71), ('full', 5.32)]
    """
    console = console or Console()
    if launched() > 1:
        raise ValueError("a study runs in one process: start it without torchrun.")
    layers = _known(layers)
    if not config.low_rank:
        raise ValueError(f"weights is {config.weights!r}; it must be a recipe of weights of low rank, such as mhlora.")
    output = Path(config.output or f"runs/bench-layers-{Path(config.model).stem}").expanduser()
    dense = _dense(config, full or {})
    claim(output, {"layers.yaml": config, "full.yaml": dense}, "study")
    record = {"benchmark": "layers", "settings": dataclasses.asdict(config), "full": full or {}}
    rows: list[LayersRow] = []
    for number, name in enumerate(layers, start=1):
        target = LAYERS[name]
        single = dense if target is None else dataclasses.replace(config, target_modules=target)
        console.print(f"[bold]Run {number} of {len(layers)}: {name}[/]", highlight=False)
        summary = run_once(dataclasses.replace(single, output=str(output / name), resume="auto"), console)
        if summary.finished:
            rows.append(_row(name, summary))
        if summary.signal is not None:
            console.print("The same command continues the study.")
            return LayersResult(rows, summary.signal)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        content = record | environment(_PACKAGES, device) | {"rows": rows_as_record(rows)}
        write_text(output / "layers.json", json.dumps(content, indent=1) + "\n")
        write_text(output / "layers.csv", rows_as_csv(rows))
    console.print(layers_table(rows), highlight=False)
    console.print(f"Results: {output / 'layers.json'}, layers.csv", markup=False, soft_wrap=True, highlight=False)
    say_picture(console, lambda path: draw_layers(rows, config.model, path), output / "layers.png")
    return LayersResult(rows)


def _known(layers: Sequence[str]) -> list[str]:
    """The choices in the order of `LAYERS`, each once; L+A is A+L."""
    chosen = []
    for name in layers:
        sorted_name = "+".join(sorted(name.split("+"), key="AML".find)) if set(name) <= set("AML+") else name
        if sorted_name not in LAYERS:
            raise ValueError(f"layers holds {name!r}, which is unknown; choose from {', '.join(LAYERS)}.")
        chosen.append(sorted_name)
    if not chosen:
        raise ValueError(f"layers is empty; choose from {', '.join(LAYERS)}.")
    return [name for name in LAYERS if name in chosen]


def _dense(config: PretrainConfig, full: dict[str, Any]) -> PretrainConfig:
    defaults = PretrainConfig()
    own = {name: getattr(defaults, name) for name in _OF_WEIGHTS}
    known = [setting.name for setting in dataclasses.fields(PretrainConfig)]
    for name in full:
        if name not in known or name in (*_OF_WEIGHTS, "output", "resume"):
            raise ValueError(
                f"full holds {name!r}, which is no setting of full weights alone; lr is one, for instance."
            )
    # Factors want a lower learning rate than the rest of the model, full weights do not.
    return dataclasses.replace(config, **own, **({"lr_scale": 1.0} | full))


def _row(name: str, summary: RunSummary) -> LayersRow:
    loss = summary.eval_loss if summary.eval_loss is not None and math.isfinite(summary.eval_loss) else None
    step_tokens = summary.tokens / summary.step if summary.step else 0.0
    return LayersRow(
        layers=name,
        trained=summary.trained,
        loss=loss,
        perplexity=None if loss is None else math.exp(loss),
        milliseconds=1e3 * step_tokens / summary.tokens_per_second if summary.tokens_per_second else None,
        state_bytes=summary.state_bytes,
        tokens=summary.tokens,
    )
