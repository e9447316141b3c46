"""Time one optimizer step without refresh over the projected matrices of LLaMA-130M.

Compared in one process, interleaved, on copies of the same weights with the same gradients:

* `bare`: the two matrix products that a low-rank step cannot avoid, R = QᵀG and W += αQU in place, in the same
  orientation and into tensors allocated before;
* our recipes, galore-torch's GaLoreAdamW and torch's fused AdamW.

The ratios are medians over rounds of (time in the round / time of the reference in the same round), from wall-clock
time and from processor time of this process (the latter says more when the cores are shared).

Example:
    python benchmarks/step.py --rounds 11
    python benchmarks/step.py --layers 2 --contenders bare galore adamw_fused --output ""
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import RESULTS, environment, import_peer, write_record

CONTENDERS = ("bare", "galore", "fira", "apollo", "apollo_mini", "frugal", "adamw", "adamw_fused", "galore_torch")


def llama_shapes(hidden: int, mlp: int, layers: int) -> list[tuple[int, int]]:
    """Shapes of the projected weights of a LLaMA: four attention and three MLP matrices per layer."""
    return [*[(hidden, hidden)] * 4, (mlp, hidden), (mlp, hidden), (hidden, mlp)] * layers


def make_parameters(shapes: list[tuple[int, int]], gradients: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Weights of scale 0.02, equal for every contender; the gradients are shared."""
    generator = torch.Generator().manual_seed(1)
    parameters = []
    for shape, gradient in zip(shapes, gradients, strict=True):
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def bare_products(parameters: list[torch.nn.Parameter], rank: int) -> Callable[[], None]:
    """The two products of every matrix; the short side is projected, the right one of a square matrix."""
    work = []
    for parameter in parameters:
        weight, gradient = parameter.data, parameter.grad
        assert gradient is not None
        if weight.shape[0] >= weight.shape[1]:
            weight, gradient = weight.mT, gradient.mT
        basis = torch.linalg.qr(torch.randn(weight.shape[0], rank))[0].contiguous()
        projected = torch.empty(rank, weight.shape[1])
        direction = torch.randn(rank, weight.shape[1]) * 1e-6
        work.append((weight, gradient, basis, projected, direction))

    def step() -> None:
        for weight, gradient, basis, projected, direction in work:
            torch.mm(basis.mT, gradient, out=projected)
            weight.addmm_(basis, direction, beta=1.0, alpha=-0.25)

    return step


def make_step(
    name: str, shapes: list[tuple[int, int]], gradients: list[torch.Tensor], rank: int
) -> Callable[[], object]:
    """Return a function that performs one step of the contender ``name``."""
    parameters = make_parameters(shapes, gradients)
    if name == "bare":
        return bare_products(parameters, rank)
    if name == "adamw_fused":
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True).step
    if name == "galore_torch":
        group = {"params": parameters, "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
        return import_peer("galore_torch").GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True).step
    from subspan.optim import create_optimizer

    named = [(f"matrix_{i}", parameter) for i, parameter in enumerate(parameters)]
    settings: dict[str, object] = {"lr": 1e-4, "weight_decay": 0.0}
    if name == "adamw":
        return create_optimizer(name, [{"params": named}], **settings).step
    group = {"params": named, "update_proj_gap": 10**9, "rank": 1 if name == "apollo_mini" else rank}
    if name == "frugal":
        group |= {"rank": None, "density": 0.25}
    return create_optimizer(name, [group], **settings).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds; every contender steps once in each")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed steps first; the first one finds the bases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS / "step.json"), help="record to write; empty: none")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shapes = llama_shapes(args.hidden, args.mlp, args.layers)
    gradients = [torch.randn(shape) * 1e-3 for shape in shapes]
    load_before = environment()
    steps = {name: make_step(name, shapes, gradients, args.rank) for name in args.contenders}
    for name, step in steps.items():
        for _ in range(args.warm_up):
            step()
        print(f"warmed up {name}", flush=True)

    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(args.rounds):
        order = order[1:] + order[:1]
        for name in order:
            cpu_start, start = time.process_time(), time.perf_counter()
            steps[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)

    def paired(times: dict[str, list[float]], name: str, reference: str) -> dict[str, float] | None:
        if reference not in times:
            return None
        ratios = sorted(a / b for a, b in zip(times[name], times[reference], strict=True))
        return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}

    results = {}
    print(f"{'contender':<14}{'wall ms':>9}{'cpu ms':>9}{'x bare':>9}{'(cpu)':>8}{'x AdamW fused':>15}{'(cpu)':>8}")
    for name in steps:
        results[name] = {
            "wall_ms": statistics.median(wall[name]) * 1e3,
            "cpu_ms": statistics.median(cpu[name]) * 1e3,
            "wall_ratio_to_bare": paired(wall, name, "bare"),
            "cpu_ratio_to_bare": paired(cpu, name, "bare"),
            "wall_ratio_to_adamw_fused": paired(wall, name, "adamw_fused"),
            "cpu_ratio_to_adamw_fused": paired(cpu, name, "adamw_fused"),
            "wall_s": wall[name],
            "cpu_s": cpu[name],
        }
        ratios = [results[name][f"{t}_ratio_to_{r}"] for r in ("bare", "adamw_fused") for t in ("wall", "cpu")]
        text = [f"{ratio['median']:.3f}" if ratio else "-" for ratio in ratios]
        print(
            f"{name:<14}{results[name]['wall_ms']:>9.1f}{results[name]['cpu_ms']:>9.1f}"
            f"{text[0]:>9}{text[1]:>8}{text[2]:>15}{text[3]:>8}"
        )
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        write_record(
            Path(args.output),
            {
                "benchmark": "step",
                "settings": settings,
                "shapes": f"{args.layers} layers of 4x({args.hidden}, {args.hidden}), 2x({args.mlp}, {args.hidden}), "
                f"1x({args.hidden}, {args.mlp}); fp32",
                "load_average_at_start": load_before["hardware"]["load_average"],
                **environment(),
                "results": results,
            },
        )


if __name__ == "__main__":
    main()
