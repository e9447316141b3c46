"""``subspan merge``."""

from __future__ import annotations

from typing import Any

__all__ = ["add_command", "run"]

_TEXT = """\
Make an ordinary dense model, as transformers loads it, of a run with weights of low rank or an adapter. Of a run, its
newest whole checkpoint is taken; without OUTPUT the model is written to merged-STEP in the run's folder.
Examples: subspan merge runs/adamw-llama_bench. subspan merge runs/first/checkpoint-800 models/first."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(usage="subspan merge RUN_OR_CHECKPOINT [OUTPUT]", description=_TEXT)
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", type=str, help="run folder, or one of its checkpoints")
    parser.add_argument("output", metavar="OUTPUT", type=str, nargs="?", help="new folder")
    commands.add_subcommand("merge", parser, help="make an ordinary model of low-rank weights or an adapter")


def run(arguments: Any) -> int:
    """Merge."""
    from subspan.train.low_rank_files import merge_run

    merged = merge_run(arguments.source, arguments.output)
    print(
        f"{len(merged.layers)} layers merged into {merged.output}; its logits differ by at most "
        f"{merged.difference:.2g} from those of the trained model."
    )
    return 0
