"""A training step of a LLaMA FFN whose layers are factored, or SLTrain's, against the dense one.

The FFN (gate, up and down projection, SiLU) is trained on random numbers with AdamW: forward, backward and step. Each
round times all contenders one after the other, with the dense FFN before and after; figures are medians over the rounds
of processor time over the mean of the two dense ones beside. A balancing of the factors is measured apart: it is done
once in ``--gap`` steps, and its share is added to ``step_with_balancing``.

Example:
    OMP_NUM_THREADS=1 python benchmarks/factored.py
    OMP_NUM_THREADS=1 python benchmarks/factored.py --sizes 256x688 --rounds 3 --output ""
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_record
from torch import Tensor, nn

from subspan.nn.lowrank import LowRankWeights, WeightRecipe, weight_recipe
from subspan.optim import AdamW


class FFN(nn.Module):
    """The feed-forward part of a LLaMA layer."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, mlp, bias=False), nn.Linear(hidden, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Contender:
    """An FFN with its optimizer."""

    def __init__(self, recipe: WeightRecipe | None, hidden: int, mlp: int, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.model = FFN(hidden, mlp).to(args.device)
        self.weights: LowRankWeights | None = None
        if recipe is not None:
            self.weights = recipe.apply(self.model, seed=args.seed)
        self.optimizer = AdamW(self.model.named_parameters(), lr=1e-4, weight_decay=0.0)
        self.device, self.count, self.gap = args.device, 0, args.gap
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, x: Tensor, target: Tensor) -> float:
        """Seconds of one step in which nothing is balanced."""
        start = self._now()
        nn.functional.mse_loss(self.model(x), target).backward()
        if self.weights is not None:
            self.weights.before_step(0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - start

    def balance(self) -> float:
        """Seconds of what is done at the end of a period."""
        assert self.weights is not None
        start = self._now()
        self.weights.end_step(self.gap - 1, self.optimizer)
        return self._now() - start

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # neighbours count less


def measure(hidden: int, mlp: int, args: argparse.Namespace) -> dict[str, Any]:
    recipes: dict[str, WeightRecipe | None] = {
        "dense": None,
        "factored": weight_recipe("factored", ratio=args.ratio, rebalance_gap=args.gap),
        "factored, product decay": weight_recipe(
            "factored", ratio=args.ratio, rebalance_gap=args.gap, product_decay=1e-4
        ),
        "sltrain": weight_recipe("sltrain", rank=hidden // 4),
    }
    contenders = {name: Contender(recipe, hidden, mlp, args) for name, recipe in recipes.items()}
    generator = torch.Generator().manual_seed(args.seed)
    x, target = (torch.randn(args.tokens, hidden, generator=generator).to(args.device) for _ in range(2))
    dense, ratios, seconds = contenders.pop("dense"), {}, {}
    for contender in (dense, *contenders.values()):
        contender.step(x, target)
    for _ in range(args.rounds):
        before = dense.step(x, target)
        for name, contender in contenders.items():
            took = contender.step(x, target)
            after = dense.step(x, target)
            ratios.setdefault(name, []).append(2 * took / (before + after))
            seconds.setdefault(name, []).append(took)
            seconds.setdefault("dense", []).append(after)
            before = after
    balancing = statistics.median(contenders["factored"].balance() for _ in range(3))
    one = statistics.median(seconds["dense"])
    result: dict[str, Any] = {"dense": {"parameters": dense.parameters, "seconds": one}}
    for name, contender in contenders.items():
        step = statistics.median(ratios[name])
        result[name] = {"parameters_of_dense": contender.parameters / dense.parameters, "step_of_dense": step}
        if "factored" in name:
            result[name] |= {
                "rank": contender.model.gate_proj.rank,
                "balancing_of_a_dense_step": balancing / one,
                "step_with_balancing": step + balancing / one / args.gap,
            }
    print(f"\nFFN {hidden}→{mlp}, {args.tokens} tokens: a dense step takes {1e3 * one:.1f} ms")
    for name, row in result.items():
        if name != "dense":
            whole = row.get("step_with_balancing", row["step_of_dense"])
            print(f"{name:25} {row['parameters_of_dense']:6.1%} of the parameters, {whole:.3f} of the step")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512x1376,768x2048,1024x2736", help="hidden x MLP")
    parser.add_argument("--ratio", type=float, default=1 / 3, help="share of the parameters that factors have")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--gap", type=int, default=200, help="steps between balancings")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=str(RESULTS), help="folder for the record; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    results = {size: measure(*map(int, size.split("x")), args) for size in args.sizes.split(",")}
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "factored FFN", "settings": settings, **environment(), "results": results}
        write_record(Path(args.output) / "factored.json", record)


if __name__ == "__main__":
    main()
