"""A training step with parallel heads against the full-rank one: forward, backward, AdamW, and the merges in between.

A LLaMA and a GPT-2 are trained on random tokens in one process, taking turns: full-rank AdamW (torch's fused one),
multi-head LoRA (all heads on all sequences) and LTE (each head on its share), with the same sequences in a step.
Figures are medians of ratios to the full-rank step beside them, in processor time on a CPU; a merge is measured apart
and counted once in ``--merge-every`` steps.

Example:
    OMP_NUM_THREADS=1 python benchmarks/heads_step.py
    OMP_NUM_THREADS=1 python benchmarks/heads_step.py --models llama_bench --ranks 8 --rounds 3 --output ""
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_record
from torch import Tensor

from subspan.nn.lowrank import weight_recipe
from subspan.optim import AdamW
from subspan.train.presets import build_model


class Contender:
    """A model with its optimizer, and its weights of low rank where it has such."""

    def __init__(self, args: argparse.Namespace, preset: str, recipe: str | None, **settings: Any) -> None:
        self.model = build_model(preset, vocab_size=args.vocabulary, seq_len=args.seq_len, seed=args.seed)
        self.model.set_attn_implementation("eager")
        self.model.to(args.device)
        self.device, self.count = args.device, 0
        self.weights = None if recipe is None else weight_recipe(recipe, **settings).apply(self.model)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if self.weights is None:
            self.optimizer: Any = torch.optim.AdamW([p for _, p in trained], lr=1e-4, fused=True)
        else:
            self.optimizer = AdamW([{"params": trained}], lr=1e-4)
        self.trainable = sum(p.numel() for _, p in trained)

    def step(self, batch: Tensor) -> tuple[float, float]:
        """Seconds of a step, and of the merge after it."""
        start = self._now()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        stepped = self._now()
        if self.weights is not None:
            self.weights.end_step(self.count, self.optimizer)
        merged = self._now()
        self.count += 1
        self.optimizer.zero_grad()
        return stepped - start, merged - stepped

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def measure(args: argparse.Namespace, preset: str) -> list[dict[str, Any]]:
    contenders: dict[tuple[str, int, int], Contender] = {("full", 0, 0): Contender(args, preset, None)}
    for heads in args.heads:
        for rank in args.ranks:
            settings = {"heads": heads, "rank": rank, "alpha": float(rank)}
            contenders["mhlora", heads, rank] = Contender(args, preset, "mhlora", **settings)
            contenders["lte", heads, rank] = Contender(args, preset, "lte", **settings, merge_every=1)
            for name, reset in (("lte shared", False), ("lte shared reset", True)):
                shared = {**settings, "others": "shared", "reset": reset}
                contenders[name, heads, rank] = Contender(args, preset, "lte", **shared, merge_every=1)
    generator = torch.Generator().manual_seed(args.seed)
    times: dict[tuple[str, int, int], list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        batch = torch.randint(args.vocabulary, (args.batch_size, args.seq_len), generator=generator).to(args.device)
        for name, contender in contenders.items():
            took = contender.step(batch)
            if number:  # the first round warms up
                times[name].append(took)
    rows = []
    for name, contender in contenders.items():
        base = [full for full, _ in times["full", 0, 0]]
        step = statistics.median(mine / full for (mine, _), full in zip(times[name], base, strict=True))
        merge = statistics.median(mine / full for (_, mine), full in zip(times[name], base, strict=True))
        rows.append(
            {
                "model": preset,
                "contender": name[0],
                "heads": name[1],
                "rank": name[2],
                "trainable": contender.trainable,
                "step_of_full": step,
                "merge_of_full_step": merge,
                "mean_of_full": step + merge / args.merge_every,
            }
        )
        print(
            f"{preset:12} {name[0]:17} heads {name[1]} rank {name[2]:3}  trained {contender.trainable:>11,}  step "
            f"{step:.3f}  merge {merge:.3f}  mean {step + merge / args.merge_every:.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_bench", "gpt2-124m"])
    parser.add_argument("--heads", nargs="+", type=int, default=[4])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--merge-every", type=int, default=10, help="steps between merges, for the mean")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=str(RESULTS), help="folder for the record; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    rows = [row for preset in args.models for row in measure(args, preset)]
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "a step with heads", "settings": settings, **environment(), "results": rows}
        write_record(Path(args.output) / "heads-step.json", record)


if __name__ == "__main__":
    main()
