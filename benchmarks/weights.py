"""Validation perplexity of weights of low rank: parallel heads, restarts, factored and sparse-plus-low-rank layers.

The setting of benchmarks/quality.py: `llama_bench` on the Python corpus, equal initial weights and batches for a seed,
`lr` for embeddings, head and norms, f x lr for the factors (or the dense matrices). LTE is measured twice: each of its
heads is given as many sequences as AdamW (``lte``: N times the tokens in as many steps, the paper's setting), and all
of them together (``lte_equal``: as many tokens). Recipes of weights are trained by AdamW; ``--settings`` are their own.

Example:
    python benchmarks/weights.py run --contenders adamw lte --lr 3e-2 --ratio 0.01 0.03 --seeds 0
    python benchmarks/weights.py run --contenders relora --settings rank=64 alpha=64 restart_every=100
    python benchmarks/weights.py summary
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import quality
import torch
from record import RESULTS, environment

from subspan.nn.lowrank import LowRankWeights, weight_recipe
from subspan.optim import create_optimizer, param_groups
from subspan.train.presets import build_model

#: Contender to the recipe of its weights (None: dense), and to the optimizer: with ``_others`` and the like, what it
#: projects beside weights of low rank.
CONTENDERS: dict[str, tuple[str | None, str]] = {
    "adamw": (None, "adamw"),
    "galore": (None, "galore"),
    "lte": ("lte", "adamw"),
    "lte_equal": ("lte", "adamw"),
    "mhlora": ("mhlora", "adamw"),
    "low_rank": ("factored", "adamw"),
    "factored": ("factored", "adamw"),
    "sltrain": ("sltrain", "adamw"),
    "relora": ("relora", "adamw"),
    "lora": ("mhlora", "adamw"),
    **{f"lte_galore_{part}": ("lte", "galore") for part in ("factors", "merged", "others")},
    "loqt": ("loqt", "adamw"),
    "periodic_lora": ("periodic_lora", "adamw"),
}
COMMON = ("model", "steps", "batch_size", "seq_len", "precision", "warm_up", "final_lr")
Run = dict[str, Any]


def build(
    args: argparse.Namespace, contender: str, lr: float, ratio: float, seed: int
) -> tuple[torch.nn.Module, LowRankWeights | None, torch.optim.Optimizer]:
    """The model, its weights of low rank, and the optimizer."""
    model = build_model(args.model, seq_len=args.seq_len, seed=seed)
    model.set_attn_implementation("eager")  # faster than sdpa on the CPU at these sizes
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    recipe, method = CONTENDERS[contender]
    if recipe is None:
        projected = {"rank": args.rank, "update_proj_gap": args.gap} if method == "galore" else {"rank": None}
        groups = param_groups(model, lr_scale=ratio, **projected)
        return model, None, create_optimizer(method, groups, lr=lr, weight_decay=0.0)
    weights = weight_recipe(recipe, **args.settings).apply(model, steps=args.steps, seed=seed)
    factors = weights.factors()
    # Dense weights that are trained for a while, as in ReLoRA's warm start, at the best rate of AdamW.
    dense = {id(getattr(layer, "weight", None)) for layer in weights.layers.values()}
    chosen = {id(parameter) for parameter in factors.values()} | dense
    weights.begin_step(0)
    projected = contender.rpartition("_")[2] if method == "galore" else None
    if projected == "merged":
        for layer in weights.layers.values():
            layer.weight.requires_grad_(True)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [(name, p) for name, p in named if id(p) not in chosen]
    groups: dict[str, dict[str, Any]] = {
        "factors": {"params": list(factors.items()), "lr_scale": ratio},
        "merged": {"params": [(name, p) for name, p in named if id(p) in dense], "lr_scale": args.dense_ratio},
        "others": {"params": [(name, p) for name, p in rest if p.ndim > 1]},
        "vectors": {"params": [(name, p) for name, p in rest if p.ndim == 1]},
    }
    if projected is not None:
        groups[projected] |= {"rank": args.rank, "update_proj_gap": args.gap}
        # The factor that GaLore's scale takes from a learning rate is no part of the comparison.
        groups[projected]["lr_scale"] = groups[projected].get("lr_scale", 1.0) * (4 if projected != "merged" else 10)
    optimizer = create_optimizer(method, [g for g in groups.values() if g["params"]], lr=lr, weight_decay=0.0)
    return model, weights, optimizer


def own_settings(args: argparse.Namespace, contender: str) -> dict[str, Any]:
    """Settings of the recipe of a contender, and the rank of its projections."""
    recipe, method = CONTENDERS[contender]
    projection = {"projection_rank": args.rank, "dense_ratio": args.dense_ratio} if method == "galore" else {}
    return projection | (args.settings if recipe else {})


def train(args: argparse.Namespace, contender: str, lr: float, ratio: float, seed: int) -> Run:
    """Train one model and return its record."""
    heads = args.settings.get("heads", 4) if contender == "lte" else 1
    torch.manual_seed(seed)
    model, weights, optimizer = build(args, contender, lr, ratio, seed)
    batch_size = args.batch_size * heads
    tokens = argparse.Namespace(**{**vars(args), "batch_size": batch_size})
    sequences, validation = quality.load_tokens(tokens, seed)
    warm_up = max(1, round(args.warm_up * args.steps))

    def schedule(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, args.steps - warm_up)
        return args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    rate = schedule if weights is None else lambda step: weights.rate(step, schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    start = time.process_time()
    for step, batch in enumerate(sequences.split(batch_size)):
        if weights is not None:
            weights.begin_step(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if weights is not None:
            weights.before_step(step)
        optimizer.step()
        if weights is not None:
            weights.end_step(step, optimizer)
        optimizer.zero_grad()
        scheduler.step()
    seconds = time.process_time() - start
    validation_loss = quality.evaluate(model, validation) if math.isfinite(losses[-1]) else math.inf
    finite = math.isfinite(validation_loss)
    tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "contender": contender,
        "settings": own_settings(args, contender),
        "lr": lr,
        "ratio": ratio,
        "seed": seed,
        **{key: getattr(args, key) for key in COMMON},
        "tokens": len(losses) * batch_size * args.seq_len,
        "tokens_sha256": quality.fingerprint(sequences, validation),
        "validation_loss": validation_loss if finite else None,
        "perplexity": math.exp(validation_loss) if finite else None,
        "training_loss_last_50": statistics.fmean(losses[-50:]) if finite else None,
        "losses": [round(x, 4) for x in losses[::10]],
        "weight_bytes": sum(t.numel() * t.itemsize for t in tensors),
        "gradient_bytes": sum(p.numel() * p.itemsize for p in trained),
        "state_bytes": quality.state_bytes(optimizer),
        "trainable": sum(p.numel() for p in trained),
        "cpu_seconds": round(seconds, 1),
        **environment(),
    }


def key(run: Run) -> tuple[Any, ...]:
    """What identifies a run."""
    settings = json.dumps(run["settings"], sort_keys=True)
    return (settings, *(run[name] for name in ("contender", "lr", "ratio", "seed", *COMMON)))


def run(args: argparse.Namespace) -> None:
    for contender, lr, ratio, seed in itertools.product(args.contenders, args.lr, args.ratio, args.seeds):
        own = own_settings(args, contender)
        wanted = {**vars(args), "contender": contender, "lr": lr, "ratio": ratio, "seed": seed, "settings": own}
        if key(wanted) in {key(done) for done in quality.read_runs(args.results)}:
            continue
        record = train(args, contender, lr, ratio, seed)
        with args.results.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(record) + "\n")
        shown = "diverged" if record["perplexity"] is None else f"{record['perplexity']:.2f}"
        print(f"{contender} {own} lr {lr:g} f {ratio:g} seed {seed}: {shown}, {record['cpu_seconds']} s", flush=True)


def summary(args: argparse.Namespace) -> None:
    points: dict[tuple[str, str, float, float], list[Run]] = defaultdict(list)
    for item in quality.read_runs(args.results):
        if all(item[name] == getattr(args, name) for name in COMMON):
            settings = json.dumps(item["settings"], sort_keys=True)
            points[item["contender"], settings, item["lr"], item["ratio"]].append(item)
    mean = {point: statistics.fmean(item["perplexity"] or math.inf for item in runs) for point, runs in points.items()}
    print("| contender | settings | lr | f | perplexity by seed | tokens | trained | weights, MB | gradients | state |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for point in sorted(points, key=lambda p: (p[0], mean[p])):
        runs = sorted(points[point], key=lambda item: item["seed"])
        one, (contender, settings, lr, ratio) = runs[0], point
        ppl = ", ".join("-" if i["perplexity"] is None else f"{i['perplexity']:.2f}" for i in runs)
        sizes = " | ".join(f"{one[name] / 1e6:.1f}" for name in ("weight_bytes", "gradient_bytes", "state_bytes"))
        print(
            f"| {contender} | {settings} | {lr:g} | {ratio:g} | {ppl} | {one['tokens']:,} | {one['trainable']:,} "
            f"| {sizes} |"
        )


def main() -> None:
    parser = quality.parser(__doc__)
    parser.set_defaults(results=RESULTS / "weights.jsonl")
    parser.add_argument("--contenders", nargs="+", default=["adamw", "lte"], choices=CONTENDERS)
    parser.add_argument("--rank", type=int, default=64, help="of the projections of galore")
    parser.add_argument("--dense-ratio", type=float, default=0.01, help="f of dense weights that warm a restart up")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE of the recipe of weights")
    args = parser.parse_args()
    pairs = (pair.partition("=") for pair in args.settings)
    args.settings = {name: _value(value) for name, _, value in pairs}
    args.results = Path(args.results)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    {"run": run, "summary": summary}[args.action](args)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
