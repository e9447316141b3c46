"""``subspan sweep``."""

from __future__ import annotations

from typing import Any

from subspan.cli.pretrain import config_from, exit_status
from subspan.train.config import PretrainConfig

__all__ = ["add_command", "run"]

_EXAMPLES = """\
Every combination of the values in the grid is a run in a folder of its own; called again, finished runs are skipped and
the unfinished one continues.
Example: subspan sweep --grid.lr "[0.005,0.01]" --grid.lr_scale "[0.5,1.0]" --steps 300 --output runs/rates.
Further settings of the method are swept as --grid.optimizer.scale "[0.25,1.0]"."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(
        usage='subspan sweep --grid.KEY "[value, ...]" [--config FILE.yaml] [--key value ...]', description=_EXAMPLES
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; later arguments win over it.")
    parser.add_argument(
        "--grid", type=dict[str, Any], required=True, help="values by setting: one run for every combination"
    )
    parser.add_class_arguments(PretrainConfig, as_group=False, skip={"resume"})
    commands.add_subcommand("sweep", parser, help="run a grid of settings and compare the results")


def run(arguments: Any) -> int:
    """Sweep."""
    grid = arguments.pop("grid")
    config = config_from(arguments)

    from subspan.train.sweep import sweep

    return exit_status(sweep(config, grid).signal)
