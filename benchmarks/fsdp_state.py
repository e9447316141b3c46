"""Optimizer state of each process under FSDP2, with bases that every process holds and with divided ones: plans.

Every LLaMA preset is planned at a quarter of its width as rank. The shares are those of the state that one process
alone would hold; they are promised to be at most a quarter and 2 % (divided), and 0.40 (whole), of it with four
processes. Beside them stands what the optimizer sends in a step, as a share of what fully_shard sends in any case.
Nothing is trained: what a plan says, two processes hold to the byte (tests/memory/test_processes.py).

Example:
    python benchmarks/fsdp_state.py
    python benchmarks/fsdp_state.py --models llama_60m --output ""
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from record import RESULTS, environment, write_record

from subspan.train.plan import plan_recipe
from subspan.train.plan_settings import PlanSettings
from subspan.train.presets import PRESETS

MODELS = [name for name in PRESETS if name.startswith("llama_") and name != "llama_bench"]
#: The most that a process may hold of the state of one alone, by layout, for four processes.
PROMISED = {"bases whole": 0.40, "bases divided": 0.25 * 1.02}


def measure(model: str, method: str, world_size: int) -> dict[str, Any]:
    """One row: state and traffic of both layouts."""
    settings = PlanSettings(model=model, method=method, dtype="bfloat16", world_size=world_size, shard="full")
    recipe = plan_recipe(settings)
    plan = recipe.processes
    assert plan is not None
    row: dict[str, Any] = {"model": model, "size": recipe.size, "state_alone": plan.alone}
    for name, layout in plan.layouts.items():
        own = {kind: count for kind, count in layout.step.items() if not kind.startswith("optimizer")}
        row[name] = {
            "state": layout.state_bytes,
            "share": layout.state_bytes / plan.alone,
            "step": layout.step,
            "step_optimizer_share": sum(layout.step.values()) / sum(own.values()) - 1,
            "refresh": layout.refresh,
        }
    return row


def main() -> None:
    """Plan, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(PRESETS), metavar="MODEL")
    parser.add_argument("--method", default="galore")
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--output", default=str(RESULTS), help="folder of the record; empty: print only")
    args = parser.parse_args()
    rows = []
    print(f"{'model':12} {'rank':>10} {'alone MiB':>10} {'whole':>7} {'divided':>8}  sent: whole   divided")
    for model in args.models:
        row = measure(model, args.method, args.world_size)
        whole, divided = (row[name] for name in PROMISED)
        print(
            f"{model:12} {row['size']:>10} {row['state_alone'] / 2**20:10.1f} {whole['share']:7.4f} "
            f"{divided['share']:8.4f} {whole['step_optimizer_share']:+12.2%} {divided['step_optimizer_share']:+9.2%}",
            flush=True,
        )
        if args.world_size == 4:
            row["kept"] = all(row[name]["share"] <= most for name, most in PROMISED.items())
        rows.append(row)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "fsdp state", "settings": settings, "promised": PROMISED, **environment()}
        write_record(Path(args.output) / "fsdp-state.json", record | {"results": rows})


if __name__ == "__main__":
    main()
