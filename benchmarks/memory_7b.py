"""Peak memory of pre-training LLaMA-7B in bfloat16, recipe by recipe: planned, and measured where there is a GPU.

Each recipe trains from random weights on real tokens for a few steps, the first of which refreshes every subspace, in a
process of its own. Printed are `torch.cuda.max_memory_allocated`, reserved bytes, tokens/s and the plan of
`subspan plan`. Without a GPU the plans alone are made, on the meta device.

Example:
    python benchmarks/memory_7b.py
    python benchmarks/memory_7b.py --model llama_bench --rank 64 --seq-lens 128 --output ""
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_record

_SMALL = {"other_moments": "8bit"}
#: Method, rank where it takes one, how weights are held, and what becomes of the gradients.
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"method": "adamw", "gradient": "full"},
    "galore": {"method": "galore", "rank": 1024, "gradient": "full"},
    "galore_projected": {"method": "galore", "rank": 1024, "gradient": "projected"},
    "galore_8bit": {"method": "galore_8bit", "rank": 1024, "gradient": "fused"},
    "galore_8bit_256": {"method": "galore_8bit", "rank": 256, "gradient": "projected"},
    "apollo": {"method": "apollo", "rank": 256, "gradient": "fused"},
    "apollo_mini": {"method": "apollo_mini", "rank": 1, "gradient": "fused"},
    "q_galore": {"method": "q_galore", "rank": 1024, "gradient": "projected"},
    "q_galore_256": {"method": "q_galore", "rank": 256, "gradient": "projected", "optimizer": _SMALL},
    "q_galore_256_accumulated": {
        "method": "q_galore",
        "rank": 256,
        "gradient": "projected",
        "optimizer": _SMALL,
        "grad_accumulation": 8,
    },
    "scale_int8": {
        "method": "scale",
        "gradient": "fused",
        "weight_storage": "int8",
        "optimizer": {"moments": "bfloat16", "rounding": "stochastic"},
    },
    "q_apollo_mini": {"method": "q_apollo_mini", "gradient": "fused", "optimizer": _SMALL},
    "q_apollo_mini_accumulated": {
        "method": "q_apollo_mini",
        "gradient": "full",
        "optimizer": _SMALL,
        "grad_accumulation": 8,
    },
}


def recipe_of(name: str, rank: int | None) -> dict[str, Any]:
    """A recipe, at another rank if one is given."""
    recipe = RECIPES[name]
    return recipe | {"rank": rank} if rank is not None and recipe.get("rank", 1) > 1 else recipe


def planned(recipe: dict[str, Any], args: argparse.Namespace, seq_len: int) -> int:
    """Peak bytes of the plan."""
    from subspan.train.plan import plan_recipe
    from subspan.train.plan_settings import PlanSettings

    settings = PlanSettings(
        model=args.model,
        dtype="bfloat16",
        seq_len=seq_len,
        activation_checkpointing=not args.keep_activations,
        **recipe,
    )
    return plan_recipe(settings).bytes.peak


def measure(recipe: dict[str, Any], args: argparse.Namespace, seq_len: int) -> dict[str, Any]:
    """Peak bytes and tokens/s of some steps on the GPU."""
    from subspan.train.config import PretrainConfig
    from subspan.train.data import load_data
    from subspan.train.optimizer import build_optimizer, hold_weights, resolve
    from subspan.train.plan import prepare
    from subspan.train.presets import build_model

    settings = {"optimizer": {}, **recipe}
    data = load_data(vocab_size=4096, seq_len=seq_len)
    config = PretrainConfig(model=args.model, dtype="bfloat16", max_grad_norm=0.0, seq_len=seq_len, **settings)
    # On the host, where there is room for float weights before they are held in int8.
    model = build_model(args.model, seq_len=seq_len, dtype=torch.bfloat16)
    hold_weights(model, config)
    model.cuda()
    prepare(model, not args.keep_activations)
    optimizer = build_optimizer(model, resolve(config, model.config.hidden_size))
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(args.steps):
        batch = torch.as_tensor(data.train[step]["input_ids"]).unsqueeze(0).cuda()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(config.grad_accumulation):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "max_allocated": torch.cuda.max_memory_allocated(),
        "max_reserved": torch.cuda.max_memory_reserved(),
        "tokens_per_second": config.grad_accumulation * seq_len / min(times[1:]),
        "first_step_seconds": times[0],
        "loss": loss.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_7b")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=tuple(RECIPES))
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--rank", type=int, help="in place of the ranks of the recipes")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--keep-activations", action="store_true", help="no activation checkpointing")
    parser.add_argument("--output", default=str(RESULTS), help="folder for the record; empty: none")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child process: measures one recipe
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first step refreshes all subspaces and is timed apart")
    if args.one:
        print(json.dumps(measure(recipe_of(args.one, args.rank), args, args.seq_lens[0])))
        return
    rows = []
    print(f"{'recipe':25} {'tokens':>6} {'planned GiB':>12} {'measured':>9} {'reserved':>9} {'tokens/s':>9}")
    for name in args.recipes:
        for seq_len in args.seq_lens:
            plan = planned(recipe_of(name, args.rank), args, seq_len)
            row: dict[str, Any] = {"recipe": name, "seq_len": seq_len, "planned": plan}
            if torch.cuda.is_available():
                own = [__file__, "--model", args.model, "--steps", str(args.steps), "--seq-lens", str(seq_len)]
                own += [] if args.rank is None else ["--rank", str(args.rank)]
                own += ["--one", name, *(["--keep-activations"] if args.keep_activations else [])]
                done = subprocess.run([sys.executable, *own], capture_output=True, text=True)
                lines = done.stdout.splitlines()
                row |= json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
            rows.append(row)
            gib = [f"{row[key] / 2**30:.2f}" if key in row else "-" for key in ("max_allocated", "max_reserved")]
            speed = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else row.get("error", "-")
            print(
                f"{name:25} {seq_len:6} {row['planned'] / 2**30:12.2f} {gib[0]:>9} {gib[1]:>9} {speed:>9}", flush=True
            )
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "one")}
        record = {"benchmark": "memory 7b", "settings": settings, **environment(), "results": rows}
        write_record(Path(args.output) / "memory-7b.json", record)


if __name__ == "__main__":
    main()
