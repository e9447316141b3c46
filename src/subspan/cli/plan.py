"""``subspan plan``."""

from __future__ import annotations

from typing import Any

from subspan.train.plan_settings import PlanSettings

__all__ = ["add_command", "run"]

_EXAMPLES = """\
The memory of a training run before it is started, by category, from two traced steps of tensors without memory.
Examples: subspan plan --model llama_7b --method galore --rank 1024 --dtype bfloat16 --compare all.
subspan plan --model llama_7b --rank 1024 --dtype bfloat16 --activation_checkpointing true --solve batch_size
--budget 80GB. subspan plan --model config.json --gradient projected --json --output plans/first."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(usage="subspan plan --model MODEL [--key value ...]", description=_EXAMPLES)
    parser.add_class_arguments(PlanSettings, as_group=False, skip={"json"})
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands.add_subcommand("plan", parser, help="say what memory a training run will need")


def run(arguments: Any) -> int:
    """Plan."""
    settings = PlanSettings(**arguments.as_dict())

    from subspan.train.plan_report import plan_report

    plan_report(settings)
    return 0
