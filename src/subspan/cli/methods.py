"""``subspan methods``."""

from __future__ import annotations

from typing import Any

__all__ = ["add_command", "run"]


def add_command(commands: Any, parser_class: Any) -> None:
    """Add the command to the parser."""
    parser = parser_class(
        usage="subspan methods",
        description="List what --method, --weights and --adapter take. Example: subspan methods.",
    )
    commands.add_subcommand(
        "methods", parser, help="list the optimizers, the recipes of low-rank weights, the adapters"
    )


def run(arguments: Any) -> int:
    """Print the table of methods."""
    from rich.console import Console
    from rich.table import Table

    from subspan.nn.lowrank import list_weights, weight_recipe
    from subspan.optim import list_methods, method_info
    from subspan.train.adapters import ADAPTERS

    shape: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold"}
    table = Table("method", "paper", "arXiv", "what it does", "shards", **shape)
    whole: dict[str, list[str]] = {}
    for name in list_methods():
        info = method_info(name)
        table.add_row(name, info.title, info.arxiv, info.summary, "yes" if info.shards else "no")
        if info.unshardable is not None:
            whole.setdefault(info.unshardable, []).append(name)
    console = Console()
    console.print(table)
    console.print("\nshards: trains what fully_shard has divided, with its default settings. Not so:", highlight=False)
    for reason, names in whole.items():
        console.print(f"  {', '.join(names)}: {reason}", highlight=False)
    held = Table("weights", *("paper", "arXiv", "what it does", "DDP", "shards"), **shape)
    whole.clear()
    for name in list_weights():
        recipe = weight_recipe(name)
        answers = ("yes" if can else "no" for can in (recipe.ddp, recipe.unshardable is None))
        held.add_row(name, recipe.title, recipe.arxiv, recipe.summary, *answers)
        if recipe.unshardable is not None:
            whole.setdefault(recipe.unshardable, []).append(name)
    console.print()
    console.print(held)
    for reason, names in whole.items():
        console.print(f"  {', '.join(names)}: {reason}", highlight=False)
    console.print(f"\nadapters of peft (DDP, no shards): {', '.join(ADAPTERS)}", highlight=False)
    return 0
