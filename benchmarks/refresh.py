"""Refresh of the subspaces: its time beside galore-torch's SVD, what the bases capture, and how flat the steps are.

`time`: all projected matrices of LLaMA-130M are refreshed in one step (staggering off) by our GaLore and by
galore-torch's GaLoreAdamW, in one process; the plain steps before and after are subtracted to give the refresh alone.
`energy`: `llama_bench` is trained for some steps; our optimizer finds its bases from the gradients of the next batch,
and their energy ‖QᵀG‖²_F is compared with that of the exact singular vectors, the largest one possible.
`flat`: with staggering on, step times are sorted by the position in the period; each position gets its median over the
periods, the first period left out.

Example:
    python benchmarks/refresh.py time energy flat
    python benchmarks/refresh.py energy --training-steps 50 --output ""
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, import_peer, write_record
from step import llama_shapes, make_parameters
from torch import Tensor

from subspan.optim import GaLore


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and processor seconds of one call."""
    cpu_start, start = time.process_time(), time.perf_counter()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start


def our_galore(
    shapes: list[tuple[int, int]], gradients: list[Tensor], args: argparse.Namespace, **settings: Any
) -> GaLore:
    """Our GaLore over fresh weights of these shapes with these gradients."""
    named = [(f"matrix_{i}", p) for i, p in enumerate(make_parameters(shapes, gradients))]
    gap = settings.pop("gap")
    return GaLore([{"params": named, "rank": args.rank, "update_proj_gap": gap}], lr=1e-4, weight_decay=0.0, **settings)


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Refresh of all matrices at once, ours beside galore-torch's."""
    shapes = llama_shapes(args.hidden, args.mlp, args.layers)
    gradients = [torch.randn(shape) * 1e-3 for shape in shapes]
    gap = 3  # the first step of a period refreshes, the other two are plain
    groups = [{"params": make_parameters(shapes, gradients), "rank": args.rank, "update_proj_gap": gap}]
    groups[0] |= {"scale": 0.25, "proj_type": "std"}
    peer = import_peer("galore_torch").GaLoreAdamW(groups, lr=1e-4, no_deprecation_warning=True)
    ours = our_galore(shapes, gradients, args, gap=gap, stagger=False)
    bases = [state["basis"] for state in ours.state.values() if "basis" in state]
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "galore_torch": []}
    for i in range(gap * (args.refreshes + 1)):
        before = [basis.clone() for basis in bases]
        times["ours"].append(timed(ours.step))
        bases = [state["basis"] for state in ours.state.values()]
        changed = not before or any(not torch.equal(a, b) for a, b in zip(before, bases, strict=True))
        assert changed == (i % gap == 0), f"step {i}: expected the refresh at multiples of {gap}"
        times["galore_torch"].append(timed(peer.step))
        print(
            f"step {i}: ours {times['ours'][-1][0]:.2f} s, galore-torch {times['galore_torch'][-1][0]:.2f} s",
            flush=True,
        )
    result: dict[str, Any] = {}
    for clock, name in enumerate(("wall", "cpu")):
        for who, pairs in times.items():
            step = [pair[clock] for pair in pairs[gap:]]  # without the first period, which also allocates
            plain = statistics.median(t for i, t in enumerate(step) if i % gap)
            whole = statistics.median(step[::gap])
            result[f"{who}_{name}_s"] = {"plain_step": plain, "refresh_step": whole, "refresh_alone": whole - plain}
        a, b = result[f"galore_torch_{name}_s"], result[f"ours_{name}_s"]
        result[f"{name}_speedup"] = {key: a[key] / b[key] for key in ("refresh_step", "refresh_alone")}
        print(
            f"{name}: refresh alone {b['refresh_alone']:.2f} s against {a['refresh_alone']:.2f} s, "
            f"{result[f'{name}_speedup']['refresh_alone']:.1f} x faster; whole refresh step "
            f"{result[f'{name}_speedup']['refresh_step']:.1f} x"
        )
    return result


def real_gradients(args: argparse.Namespace) -> dict[str, Tensor]:
    """Gradients of the projected matrices of `llama_bench` after some steps of AdamW on the Python corpus."""
    from subspan.train.data import load_data
    from subspan.train.presets import PRESETS, build_model

    data = load_data(vocab_size=PRESETS["llama_bench"].vocab_size, seq_len=128)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    model = build_model("llama_bench", seq_len=128, seed=args.seed)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
    others = [p for n, p in model.named_parameters() if n not in matrices]
    groups = [{"params": others}, {"params": list(matrices.values()), "lr": 3e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 40))
    for i in range(args.training_steps + 1):
        batch = torch.stack([torch.as_tensor(data.train[j]["input_ids"]) for j in order[4 * i : 4 * i + 4]])
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if i < args.training_steps:
            optimizer.step()
            scheduler.step()
    print(f"loss {loss.item():.3f} after {args.training_steps} steps")
    return {name: parameter.grad for name, parameter in matrices.items() if parameter.grad is not None}


def measure_energy(args: argparse.Namespace) -> dict[str, Any]:
    """Energy in our bases relative to the optimal one, on real gradients."""
    gradients = real_gradients(args)
    named = [(name, torch.nn.Parameter(torch.zeros_like(gradient))) for name, gradient in gradients.items()]
    for name, parameter in named:
        parameter.grad = gradients[name]
    optimizer = GaLore([{"params": named, "rank": args.energy_rank, "update_proj_gap": 200}], lr=1e-4)
    optimizer.step()
    by_kind: dict[str, list[float]] = {}
    captured: list[float] = []
    optimal: list[float] = []
    for name, parameter in named:
        gradient, basis = gradients[name], optimizer.state[parameter]["basis"]
        oriented = gradient.mT if gradient.shape[0] >= gradient.shape[1] else gradient
        total = gradient.square().sum().item()
        best = torch.linalg.svdvals(gradient)[: args.energy_rank].square().sum().item()
        found = (basis.mT @ oriented).square().sum().item()
        captured.append(found / total)
        optimal.append(best / total)
        by_kind.setdefault(name.split(".")[-2], []).append(found / best)
    ratios = [a / b for a, b in zip(captured, optimal, strict=True)]
    result = {
        "rank": args.energy_rank,
        "matrices": len(ratios),
        "optimal_energy_mean": statistics.fmean(optimal),
        "relative_energy": {"mean": statistics.fmean(ratios), "min": min(ratios), "median": statistics.median(ratios)},
        "relative_norm": {"mean": statistics.fmean(r**0.5 for r in ratios), "min": min(ratios) ** 0.5},
        "relative_energy_by_kind": {kind: statistics.fmean(values) for kind, values in by_kind.items()},
    }
    print(
        f"energy relative to the optimal one (rank {args.energy_rank}, which holds "
        f"{result['optimal_energy_mean']:.3f} of the gradient's): mean {result['relative_energy']['mean']:.4f}, "
        f"smallest {min(ratios):.4f}"
    )
    return result


def measure_flatness(args: argparse.Namespace) -> dict[str, Any]:
    """Step times by position in the period, staggering on."""
    shapes = llama_shapes(args.hidden, args.mlp, args.layers)
    gradients = [torch.randn(shape) * 1e-3 for shape in shapes]
    optimizer = our_galore(shapes, gradients, args, gap=args.gap)
    optimizer.step()
    times = [timed(optimizer.step) for _ in range(args.gap * (args.periods + 1))][args.gap :]
    result: dict[str, Any] = {"gap": args.gap, "periods": args.periods}
    for clock, name in enumerate(("wall", "cpu")):
        step = [pair[clock] for pair in times]
        positions = [statistics.median(step[position :: args.gap]) for position in range(args.gap)]
        middle = statistics.median(positions)
        result[f"{name}_ms_by_position"] = [round(1e3 * t, 2) for t in positions]
        result[f"{name}_largest_over_median"] = max(positions) / middle
        print(f"{name}: median step {middle * 1e3:.1f} ms, largest position {max(positions) / middle:.3f} x the median")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("time", "energy", "flat"))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--refreshes", type=int, default=2, help="timed refreshes after the first (time)")
    parser.add_argument("--gap", type=int, default=20, help="update_proj_gap (flat)")
    parser.add_argument("--periods", type=int, default=5, help="timed periods after the first (flat)")
    parser.add_argument("--energy-rank", type=int, default=64, help="rank on llama_bench (energy)")
    parser.add_argument("--training-steps", type=int, default=200, help="before the gradients are taken (energy)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS), help="folder for the records; empty: none")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    measure = {"time": measure_time, "energy": measure_energy, "flat": measure_flatness}
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "parts")}
    for part in args.parts:
        results = measure[part](args)
        if args.output:
            model = f"{args.layers} layers of 4x({args.hidden}, {args.hidden}), 2x({args.mlp}, {args.hidden}), "
            model += f"1x({args.hidden}, {args.mlp})"
            record = {
                "benchmark": f"refresh {part}",
                "settings": settings,
                "shapes": f"{'llama_bench' if part == 'energy' else model}; fp32",
                **environment(),
                "results": results,
            }
            write_record(Path(args.output) / f"refresh-{part}.json", record)


if __name__ == "__main__":
    main()
