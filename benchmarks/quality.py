"""Validation perplexity at equal tokens: every contender with its learning rates swept, over paired seeds.

Model `llama_bench` on the Python corpus. A seed fixes the initial weights and the batches, so that contenders are
compared seed by seed. Two rates are swept: `lr` of the parameters outside the low-rank groups (embeddings, head, norms)
and the ratio f, with which the rate of the projected matrices is f x lr. The same split is swept for AdamW: with one
rate for everything it would be a straw man.

`run` appends one JSON line per finished run and skips what is there already; several of them may work at once.
`summary` prints the tables, `plot` draws perplexity against the rate of the matrices.

Example:
    python benchmarks/quality.py run --contenders adamw galore --lr 1e-2 --ratio 0.1 0.25 --seeds 0
    python benchmarks/quality.py summary
    python benchmarks/quality.py plot
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, import_peer
from torch import Tensor

OURS = (
    "galore", "golore", "fira", "apollo", "apollo_mini", "frugal", "galore_projected", "galore_8bit", "q_galore",
    "q_galore_int8", "q_apollo", "q_apollo_mini", "scale",
)  # fmt: skip
CONTENDERS = ("adamw", "galore_torch", *OURS)
#: What makes two runs comparable; `lr`, `ratio` and `contender` vary within it.
COMMON = ("model", "steps", "batch_size", "seq_len", "rank", "gap", "precision", "warm_up", "final_lr")
Run = dict[str, Any]


@functools.cache
def corpus(vocab_size: int, seq_len: int) -> Any:
    """The Python corpus in packed sequences, loaded once."""
    from subspan.train.data import load_data

    return load_data(vocab_size=vocab_size, seq_len=seq_len)


def load_tokens(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Return training sequences in the order of the seed, and validation sequences spread over the held-out part."""
    from subspan.train.presets import PRESETS

    data = corpus(PRESETS[args.model].vocab_size, args.seq_len)
    count, available = args.steps * args.batch_size, len(data.train)
    if count > available:
        raise SystemExit(f"{count} sequences are needed and the corpus has {available}: use fewer steps.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    every = max(1, len(data.validation) // args.validation_sequences)
    held_out = range(0, every * args.validation_sequences, every)
    return (
        torch.stack([torch.as_tensor(data.train[i]["input_ids"]) for i in order]),
        torch.stack([torch.as_tensor(data.validation[i]["input_ids"]) for i in held_out]),
    )


def fingerprint(*tensors: Tensor) -> str:
    """Short hash of the tokens: runs are only comparable when it agrees."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def make_optimizer(
    name: str, model: torch.nn.Module, *, lr: float, ratio: float, rank: int, gap: int, steps: int
) -> torch.optim.Optimizer:
    """The contender ``name``: rate ``lr`` for dense parameters, ``ratio * lr`` for the matrices, no weight decay."""
    if name not in OURS:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        if name == "adamw":
            groups = [{"params": others}, {"params": matrices, "lr": lr * ratio}]
            return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
        low_rank = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": others}, {"params": matrices, "lr": lr * ratio, **low_rank}]
        return import_peer("galore_torch").GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)

    from subspan.nn import project_gradients, quantize_weights
    from subspan.optim import create_optimizer, param_groups

    if name == "scale":
        return create_optimizer(name, model, lr=lr, lr_scale=ratio, weight_decay=0.0)
    settings: dict[str, Any] = {"rank": rank, "update_proj_gap": gap}
    if name == "apollo_mini":
        settings["rank"] = 1
    elif name == "golore":
        settings["golore_after"] = round(0.8 * steps)
    elif name == "frugal":
        settings["rank"] = None
        settings["density"] = 0.25
    if name in ("q_galore_int8", "q_apollo", "q_apollo_mini"):
        quantize_weights(model, group_size=128 if "apollo" in name else 256)
    if name == "q_apollo_mini":  # the recipe of the least memory
        settings |= {"rank": 1, "other_moments": "8bit"}
    groups = param_groups(model, lr_scale=ratio, **settings)
    if name == "galore_projected":
        optimizer = create_optimizer("galore", groups, lr=lr, weight_decay=0.0)
        project_gradients(model, optimizer)
        return optimizer
    return create_optimizer(name.removesuffix("_int8"), groups, lr=lr, weight_decay=0.0)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, those inside galore-torch's projector objects included."""
    total = 0
    for state in optimizer.state.values():
        values = [x for v in state.values() for x in (vars(v).values() if hasattr(v, "ortho_matrix") else [v])]
        total += sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    return total


@torch.no_grad()
def evaluate(model: torch.nn.Module, sequences: Tensor) -> float:
    """Mean loss per token in nats, in fp32; the number of sequences is a multiple of 8."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in sequences.split(8)]
    model.train()
    return statistics.fmean(losses)


def train(
    args: argparse.Namespace,
    contender: str,
    lr: float,
    ratio: float,
    seed: int,
    *,
    build: Callable[[torch.nn.Module], torch.optim.Optimizer] | None = None,
    each_step: Callable[[torch.optim.Optimizer], None] | None = None,
) -> Run:
    """Train one model and return its record.

    Args:
        args: settings of the run.
        contender, lr, ratio, seed: of the run.
        build: another optimizer than the contender's own.
        each_step: called with the optimizer after each of its steps.
    """
    from subspan.train.presets import build_model

    sequences, validation = load_tokens(args, seed)
    batches = sequences.split(args.batch_size)
    torch.manual_seed(seed)
    model = build_model(args.model, seq_len=args.seq_len, seed=seed)
    model.set_attn_implementation("eager")  # faster than sdpa on the CPU at these sizes
    if args.precision == "pure_bf16":
        model.to(torch.bfloat16)
    optimizer = (
        build(model)
        if build is not None
        else make_optimizer(contender, model, lr=lr, ratio=ratio, rank=args.rank, gap=args.gap, steps=args.steps)
    )
    warm_up = max(1, round(args.warm_up * args.steps))

    def schedule(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, args.steps - warm_up)
        return args.final_lr + (1 - args.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses: list[float] = []
    step_times: list[float] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        step_start = time.process_time()
        optimizer.step()
        step_times.append(time.process_time() - step_start)
        if each_step is not None:
            each_step(optimizer)
        optimizer.zero_grad()
        scheduler.step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    model.float()
    validation_loss = evaluate(model, validation) if math.isfinite(losses[-1]) else math.inf
    finite = math.isfinite(validation_loss)
    return {
        "contender": contender,
        "lr": lr,
        "ratio": ratio,
        "seed": seed,
        **{key: getattr(args, key) for key in COMMON if hasattr(args, key)},
        "tokens": len(losses) * args.batch_size * args.seq_len,
        "validation_tokens": validation.numel(),
        "tokens_sha256": fingerprint(sequences, validation),
        "validation_loss": validation_loss if finite else None,
        "perplexity": math.exp(validation_loss) if finite else None,
        "training_loss_last_50": statistics.fmean(losses[-50:]) if finite else None,
        "losses": [round(x, 4) for x in losses[::10]],
        "state_bytes": state_bytes(optimizer),
        "optimizer_step_cpu_ms": statistics.median(step_times) * 1e3 if step_times else None,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        **environment(),
    }


def key(run: Run) -> tuple[Any, ...]:
    """What identifies a run."""
    return tuple(run[name] for name in ("contender", "lr", "ratio", "seed", *COMMON))


def read_runs(path: Path) -> list[Run]:
    """Return the finished runs; a last line that was cut off by a crash is left out."""
    runs = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                runs.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"skipped a damaged line of {path.name}")
    return runs


@contextmanager
def claim(run_key: tuple[Any, ...]) -> Iterator[bool]:
    """Yield whether this process is the only one at work on the run; the claim ends with the process."""
    folder = Path(tempfile.gettempdir()) / "subspan-quality"
    folder.mkdir(exist_ok=True)
    with (folder / "-".join(map(str, run_key))).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    common = {name: getattr(args, name) for name in COMMON}
    for seed, contender, lr, ratio in itertools.product(args.seeds, args.contenders, args.lr, args.ratio):
        wanted = key({"contender": contender, "lr": lr, "ratio": ratio, "seed": seed, **common})
        with claim(wanted) as mine:
            if not mine or wanted in {key(done) for done in read_runs(args.results)}:
                continue
            record = train(args, contender, lr, ratio, seed)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(record) + "\n")
        perplexity = record["perplexity"]
        print(
            f"{contender} lr {lr:g} f {ratio:g} seed {seed}: "
            f"{'diverged' if perplexity is None else f'perplexity {perplexity:.2f}'} ({record['seconds']:.0f} s)",
            flush=True,
        )


def best_points(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """For each contender the (lr, ratio) with the lowest perplexity on the first seed, with its runs by seed.

    Args:
        runs: comparable runs.
    """
    points: dict[tuple[str, float, float], dict[int, Run]] = defaultdict(dict)
    for item in runs:
        if item["perplexity"] is not None:
            points[item["contender"], item["lr"], item["ratio"]][item["seed"]] = item
    first = min((item["seed"] for item in runs), default=0)
    best: dict[str, dict[int, Run]] = {}
    for (contender, _, _), by_seed in points.items():
        if first not in by_seed:
            continue
        if contender not in best or by_seed[first]["perplexity"] < best[contender][first]["perplexity"]:
            best[contender] = by_seed
    return dict(sorted(best.items(), key=lambda pair: pair[1][first]["perplexity"]))


def relative(best: dict[str, dict[int, Run]], name: str, reference: str) -> list[float]:
    """Perplexity of ``name`` relative to ``reference`` seed by seed, in per cent."""
    if name not in best or reference not in best:
        return []
    shared = sorted(best[name].keys() & best[reference].keys())
    return [100 * (best[name][s]["perplexity"] / best[reference][s]["perplexity"] - 1) for s in shared]


def comparable(args: argparse.Namespace) -> list[Run]:
    """The runs of the results file with the settings of ``args``."""
    return [r for r in read_runs(args.results) if all(r[name] == getattr(args, name) for name in COMMON)]


def summary(args: argparse.Namespace) -> None:
    runs = comparable(args)
    best = best_points(runs)
    print(f"{len(runs)} runs: {', '.join(f'{name} {getattr(args, name)}' for name in COMMON)}\n")
    print("| contender | lr | f | f x lr | perplexity by seed | against AdamW, % | state, MB | step, CPU ms |")
    print("|---|---|---|---|---|---|---|---|")
    for contender, by_seed in best.items():
        one = next(iter(by_seed.values()))
        perplexities = ", ".join(f"{by_seed[s]['perplexity']:.2f}" for s in sorted(by_seed))
        against = ", ".join(f"{x:+.1f}" for x in relative(best, contender, "adamw")) or "-"
        rates = f"{one['lr']:g} | {one['ratio']:g} | {one['lr'] * one['ratio']:.2g}"
        print(
            f"| {contender} | {rates} | {perplexities} | {against} "
            f"| {one['state_bytes'] / 1e6:.1f} | {one['optimizer_step_cpu_ms']:.0f} |"
        )
    peers = {(r["lr"], r["ratio"], r["seed"]): r["perplexity"] for r in runs if r["contender"] == "galore_torch"}
    print("\ngalore against galore_torch at equal rates, batches and initial weights:")
    for r in runs:
        peer = peers.get((r["lr"], r["ratio"], r["seed"]))
        if r["contender"] == "galore" and peer and r["perplexity"]:
            change = 100 * (r["perplexity"] / peer - 1)
            where = f"lr {r['lr']:g} f {r['ratio']:g} seed {r['seed']}"
            print(f"{where}: {r['perplexity']:.2f} / {peer:.2f} = {change:+.1f} %")
    print("\nAll points of the sweep (perplexity, seeds averaged):\n")
    print("| contender | lr | f | perplexity | seeds |")
    print("|---|---|---|---|---|")
    points: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for item in runs:
        points[item["contender"], item["lr"], item["ratio"]].append(item["perplexity"] or math.inf)
    for (contender, lr, ratio), values in sorted(points.items()):
        print(f"| {contender} | {lr:g} | {ratio:g} | {statistics.fmean(values):.2f} | {len(values)} |")


def plot(args: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'subspan[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = comparable(args)
    first = min(item["seed"] for item in runs)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for contender in best_points(runs):
        points = sorted(
            (item["lr"] * item["ratio"], item["perplexity"])
            for item in runs
            if item["contender"] == contender and item["seed"] == first and item["perplexity"] is not None
        )
        axes.plot(*zip(*points, strict=True), "o-", label=contender, linewidth=1, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="learning rate of the matrices, f x lr", ylabel="validation perplexity")
    axes.set_title(f"{args.model}, {args.steps} steps of {args.batch_size} x {args.seq_len} tokens, seed {first}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    path = args.results.with_suffix(".svg")
    figure.savefig(path)
    print(f"wrote {path.name}")


def parser(description: str | None, **rates: Any) -> argparse.ArgumentParser:
    """The settings of a run; ``rates`` are defaults of `lr` and `ratio` where one run has one of each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "summary", "plot"))
    many: dict[str, Any] = {} if rates else {"nargs": "+"}
    parser.add_argument(
        "--lr", type=float, default=rates.get("lr", [1e-2]), help="rate of embeddings, head and norms", **many
    )
    parser.add_argument(
        "--ratio", type=float, default=rates.get("ratio", [0.1, 0.4, 1.0]), help="f: matrices get f x lr", **many
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", default="llama_bench")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--gap", type=int, default=50, help="update_proj_gap")
    parser.add_argument("--warm-up", type=float, default=0.1, help="fraction of the steps")
    parser.add_argument("--final-lr", type=float, default=0.1, help="fraction of the peak, reached by a cosine")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32", "pure_bf16"),
        default="bf16",
        help="of forward and backward; pure_bf16: of weights too",
    )
    parser.add_argument("--validation-sequences", type=int, default=256, help="a multiple of 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.jsonl")
    return parser


def main() -> None:
    settings = parser(__doc__)
    settings.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    settings.add_argument("--rank", type=int, default=64)
    args = settings.parse_args()
    {"run": run, "summary": summary, "plot": plot}[args.action](args)


if __name__ == "__main__":
    main()
