"""Validation perplexity against mean rank: GaLore with ranks from a tolerance beside GaLore with fixed ranks.

Model, batches and schedule are those of `quality.py`; a seed fixes the initial weights and the batches, so that runs
are paired. `run` appends one JSON line per finished run to the results and skips what is there already. `summary`
prints the table and compares each tolerance with the fixed ranks at its mean rank (interpolated in log rank, seed by
seed); `plot` draws both curves.

Example:
    python benchmarks/adaptive_rank.py run --ranks 8 16 32 64 --rtols 0.05 0.1 0.2 --seeds 0 1
    python benchmarks/adaptive_rank.py summary
    python benchmarks/adaptive_rank.py plot
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import statistics
from collections import defaultdict
from typing import Any

import quality
import torch
from record import RESULTS

COMMON = (*(name for name in quality.COMMON if name != "rank"), "lr", "ratio", "cap")


def make(model: torch.nn.Module, args: argparse.Namespace, rank: int | None, rtol: float | None) -> Any:
    """GaLore at a fixed rank, or within a tolerance."""
    from subspan.optim import create_optimizer, param_groups

    groups = param_groups(model, lr_scale=args.ratio, rank=rank or args.cap, update_proj_gap=args.gap)
    policy = {} if rtol is None else {"rank_policy": "tolerance", "rtol": rtol}
    return create_optimizer("galore", groups, lr=args.lr, weight_decay=0.0, **policy)


class Watched:
    """Mean rank over the projected matrices and bytes of state, step by step."""

    def __init__(self) -> None:
        self.ranks: list[float] = []
        self.bytes: list[int] = []

    def look(self, optimizer: Any) -> None:
        self.ranks.append(statistics.fmean(optimizer.ranks().values()))
        self.bytes.append(sum(optimizer.state_bytes().values()))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    common = {name: getattr(args, name) for name in COMMON}
    points: list[tuple[int | None, float | None]] = [(rank, None) for rank in args.ranks]
    points += [(None, rtol) for rtol in args.rtols]
    for seed in args.seeds:
        for rank, rtol in points:
            wanted = {**common, "rank": rank, "rtol": rtol, "seed": seed}
            with quality.claim(tuple(wanted.values())) as mine:
                if not mine or any(wanted.items() <= done.items() for done in quality.read_runs(args.results)):
                    continue
                watched = Watched()
                optimizer = None

                def build(model: Any, rank: int | None = rank, rtol: float | None = rtol) -> Any:
                    nonlocal optimizer
                    optimizer = make(model, args, rank, rtol)
                    return optimizer

                record = quality.train(args, "galore", args.lr, args.ratio, seed, build=build, each_step=watched.look)
                record |= wanted | {
                    "mean_rank": statistics.fmean(watched.ranks),
                    "rank_by_step": [round(x, 2) for x in watched.ranks[::10]],
                    "mean_state_bytes": statistics.fmean(watched.bytes),
                    "peak_state_bytes": max(watched.bytes),
                }
                args.results.parent.mkdir(parents=True, exist_ok=True)
                with args.results.open("a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(json.dumps(record) + "\n")
            print(
                f"{'rank ' + str(rank) if rank else f'rtol {rtol}'} seed {seed}: mean rank {record['mean_rank']:.1f}, "
                f"perplexity {record['perplexity']:.2f} ({record['seconds']:.0f} s)",
                flush=True,
            )


def comparable(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished runs with the settings of ``args``, by mean rank."""
    runs = [r for r in quality.read_runs(args.results) if all(r[name] == getattr(args, name) for name in COMMON)]
    return sorted(runs, key=lambda r: r["mean_rank"])


def fixed_at(runs: list[dict[str, Any]], seed: int, size: float, of: str) -> float | None:
    """Loss of fixed ranks where ``of`` is ``size``, interpolated in its logarithm; None outside of the curve."""
    curve = sorted((r[of], r["validation_loss"]) for r in runs if r["rank"] and r["seed"] == seed)
    for (x, y), (u, v) in itertools.pairwise(curve):
        if x <= size <= u:
            return y + (v - y) * (math.log(size) - math.log(x)) / (math.log(u) - math.log(x))
    return None


def summary(args: argparse.Namespace) -> None:
    runs = comparable(args)
    points: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for r in runs:
        points[r["rank"], r["rtol"]].append(r)
    print(
        "| ranks | mean rank | state, MB (mean / peak) | perplexity by seed | against fixed, % at equal rank / state |"
    )
    print("|---|---|---|---|---|")
    for (rank, rtol), of_point in points.items():
        of_point.sort(key=lambda r: r["seed"])
        perplexities = ", ".join(f"{r['perplexity']:.1f}" for r in of_point)
        against = "-"
        if rtol is not None:
            compared = []
            for of in ("mean_rank", "mean_state_bytes"):
                fixed = [(r, fixed_at(runs, r["seed"], r[of], of)) for r in of_point]
                changes = [100 * (math.exp(r["validation_loss"] - y) - 1) for r, y in fixed if y is not None]
                compared.append(", ".join(f"{change:+.1f}" for change in changes) or "outside")
            against = " / ".join(compared)
        mean, peak = (statistics.fmean(r[k] for r in of_point) / 1e6 for k in ("mean_state_bytes", "peak_state_bytes"))
        name = f"rtol {rtol}" if rank is None else f"fixed {rank}"
        mean_rank = statistics.fmean(r["mean_rank"] for r in of_point)
        print(f"| {name} | {mean_rank:.1f} | {mean:.1f} / {peak:.1f} | {perplexities} | {against} |")


def plot(args: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'subspan[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = comparable(args)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for panel, of, label in zip(
        panels, ("mean_rank", "mean_state_bytes"), ("mean rank", "optimizer state, bytes in the mean"), strict=True
    ):
        for marker, seed in zip("osv^", sorted({r["seed"] for r in runs}), strict=False):
            for color, name, key in (("C0", "fixed rank", "rank"), ("C1", "rank from a tolerance", "rtol")):
                chosen = [r for r in runs if r[key] is not None and r["seed"] == seed]
                points = sorted((r[of], r["perplexity"]) for r in chosen)
                if points:
                    panel.plot(*zip(*points, strict=True), f"{marker}-", color=color, label=f"{name}, seed {seed}")
        panel.set(xscale="log", xlabel=label)
        panel.grid(which="both", alpha=0.3)
    panels[0].set_ylabel("validation perplexity")
    panels[0].legend()
    figure.suptitle(f"GaLore, {args.model}, {args.steps} steps of {args.batch_size} x {args.seq_len} tokens")
    path = args.results.with_suffix(".svg")
    figure.savefig(path)
    print(f"wrote {path.name}")


def main() -> None:
    parser = quality.parser(__doc__, lr=3e-2, ratio=0.1)
    parser.add_argument("--ranks", nargs="*", type=int, default=[], help="fixed ranks")
    parser.add_argument("--rtols", nargs="*", type=float, default=[], help="tolerances")
    parser.add_argument("--cap", type=int, default=128, help="the most that a rank from a tolerance may be")
    parser.set_defaults(results=RESULTS / "adaptive-rank.jsonl")
    args = parser.parse_args()
    {"run": run, "summary": summary, "plot": plot}[args.action](args)


if __name__ == "__main__":
    main()
