"""``subspan spectrum``."""

from __future__ import annotations

from typing import Any

from subspan.analysis.spectrum_settings import SpectrumSettings

__all__ = ["add_command", "run"]

_EXAMPLES = """\
Singular values of the weights, gradients and updates of a training run, and the ranks to choose.
Examples: subspan spectrum runs/galore-llama_bench.
subspan spectrum runs/galore-llama_bench --what gradients --steps 100 --every 10 --layers mlp.
subspan spectrum tuned/ --base original/ --what update."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(usage="subspan spectrum RUN_OR_CHECKPOINT [--key value ...]", description=_EXAMPLES)
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="run folder of subspan pretrain, one of its checkpoints, a model folder with safetensors, or such a file",
    )
    parser.add_class_arguments(SpectrumSettings, as_group=False, skip={"source", "full"})
    parser.add_argument(
        "--full", action="store_true", help="a row for every tensor and point in time, not for each kind of layer"
    )
    commands.add_subcommand("spectrum", parser, help="show the singular values of a run, and which rank to choose")


def run(arguments: Any) -> int:
    """Analyse."""
    settings = SpectrumSettings(**arguments.as_dict())

    from subspan.analysis.spectrum_run import spectrum

    spectrum(settings)
    return 0
