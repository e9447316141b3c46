"""``subspan pretrain``."""

from __future__ import annotations

from typing import Any

from subspan.train.config import PretrainConfig

__all__ = ["add_command", "config_from", "exit_status", "run"]

_EXAMPLES = """\
Without arguments: a small LLaMA learns Python from the standard library's source, in about five minutes on 2 CPU cores.
Examples: subspan pretrain --method galore --model llama_9m --data texts/ --rank 64 --lr 0.01 --steps 1000.
subspan pretrain --config run.yaml --optimizer.update_proj_gap 50. subspan pretrain --print_config > run.yaml.
subspan pretrain --output runs/first --resume auto."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(usage="subspan pretrain [--config FILE.yaml] [--key value ...]", description=_EXAMPLES)
    parser.add_argument("--config", action="config", help="YAML file with settings; later arguments win over it.")
    parser.add_class_arguments(PretrainConfig, as_group=False)
    commands.add_subcommand("pretrain", parser, help="train a language model with a low-rank optimizer")


def config_from(arguments: Any) -> PretrainConfig:
    """Return the settings of a run from parsed arguments."""
    settings = arguments.as_dict()
    settings.pop("config", None)
    return PretrainConfig(**settings)


def exit_status(signal: int | None) -> int:
    """Return the exit status of a run that a signal stopped, or 0."""
    return 0 if signal is None else 128 + signal


def run(arguments: Any) -> int:
    """Train."""
    config = config_from(arguments)

    from subspan.train.pretrain import pretrain

    summary = pretrain(config)
    return 0 if summary.finished else exit_status(summary.signal)
