"""``subspan checkpoint``: look at checkpoints, check them, and bring them into another form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

__all__ = ["add_command", "run"]

_INSPECT = """\
Step, method, rank, sizes and the state of every parameter, from the headers of the files; of a run, its checkpoints.
Examples: subspan checkpoint inspect runs/galore-llama_bench.
subspan checkpoint inspect runs/galore-llama_bench/checkpoint-800 --json."""
_VERIFY = """\
Check every file of a checkpoint, or of all checkpoints of a run, against its SHA-256. The exit status is 1 where one is
not whole. Example: subspan checkpoint verify runs/galore-llama_bench."""
_CONVERT = """\
Write a checkpoint in another form. Without settings: what several processes wrote in parts as single files.
Examples: subspan checkpoint convert runs/adamw-llama_bench/checkpoint-800 warm --to_method galore --rank 64,
and then subspan pretrain --method galore --rank 64 --carry_over warm.
subspan checkpoint convert optimizer.pt imported --from galore-torch --model exported/."""


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command and its own commands to the parser."""
    parser = parser_class(
        description="Look at checkpoints, check and convert them. Example: subspan checkpoint inspect runs/first."
    )
    commands.add_subcommand("checkpoint", parser, help="inspect, verify and convert checkpoints")
    actions = parser.add_subcommands(required=True, title="commands")
    for name, text, usage, short in (
        ("inspect", _INSPECT, "RUN_OR_CHECKPOINT [--json]", "say what checkpoints hold"),
        ("verify", _VERIFY, "RUN_OR_CHECKPOINT [--json]", "check every file against its SHA-256"),
        ("convert", _CONVERT, "SOURCE TARGET [--key value ...]", "write a checkpoint in another form"),
    ):
        action = parser_class(usage=f"subspan checkpoint {name} {usage}", description=text)
        add = action.add_argument
        if name == "convert":
            add("source", metavar="SOURCE", type=str, help="checkpoint, or with --from a file of torch.save")
            add("target", metavar="TARGET", type=str, help="new folder")
            add("--to_method", type=str, help="method that takes the optimizer's state over")
            add("--rank", type=int, help="rank at which it is taken over")
            package = Literal["galore-torch", "apollo-torch"] | None
            add("--from", type=package, help="package that wrote the file")
            add("--model", type=str, help="with --from: folder of the model with its weights")
            add("--target_modules", type=str, help="with --from: which matrices were projected (all-linear)")
        else:
            add("path", metavar="RUN_OR_CHECKPOINT", type=str, help="run folder, or one of its checkpoints")
            add("--json", action="store_true", help="print JSON instead of a table")
        actions.add_subcommand(name, action, help=short)


def run(arguments: Any) -> int:
    """Inspect, verify or convert."""
    settings = arguments[arguments.subcommand].as_dict()
    if arguments.subcommand == "convert":
        return _convert(settings)

    from subspan.checkpoint.inspect import describe, reports

    found = reports(settings["path"])
    status = 0 if all(report.ok for report in found) else 1
    if settings["json"]:
        if arguments.subcommand == "verify":
            content = [{"folder": str(r.folder), "ok": r.ok, "problems": list(r.problems)} for r in found]
        else:
            content = [describe(report) for report in found]
        print(json.dumps(content, indent=2))
        return status if arguments.subcommand == "verify" else 0

    from rich.console import Console

    from subspan.train.checkpoint_report import show_checkpoint, show_checkpoints

    console = Console()
    described = [describe(report) for report in found]
    if arguments.subcommand == "inspect" and len(described) == 1:
        show_checkpoint(console, described[0])
        return 0
    show_checkpoints(console, described)
    return status if arguments.subcommand == "verify" else 0


def _convert(settings: dict[str, Any]) -> int:
    source, target = Path(settings["source"]).expanduser(), Path(settings["target"]).expanduser()
    package, carried = settings["from"], settings["to_method"] is not None or settings["rank"] is not None
    if package is not None and (carried or settings["model"] is None):
        raise ValueError("--from needs --model, and neither --to_method nor --rank: convert its result once more.")
    if package is None and (settings["model"] is not None or settings["target_modules"] is not None):
        raise ValueError("--model and --target_modules are for --from; a checkpoint has its own model and settings.")

    from subspan.checkpoint.save import LOW_RANK_JSON
    from subspan.checkpoint.single import to_single_file
    from subspan.train import convert
    from subspan.train.presets import MERGE_FIRST

    if (source / LOW_RANK_JSON).is_file() and not any(source.glob("shard-*.safetensors")):
        raise ValueError(f"{source} holds a model with weights of low rank or adapters: {MERGE_FIRST}.")
    if package is not None:
        convert.import_foreign(source, target, package, settings["model"], settings["target_modules"] or "all-linear")
    elif carried:
        convert.carry_over(source, target, settings["to_method"], settings["rank"])
    else:
        to_single_file(source, target)
    print(f"Written: {target}")
    return 0
