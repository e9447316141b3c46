"""``subspan bench heads``: trained parameters against the time of an iteration, for numbers and ranks of heads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from subspan.analysis.bench_place import device_named, on_device, progress, threads_of_cpu, writable
from subspan.analysis.environment import environment
from subspan.analysis.heads_study import Contender, HeadsRow, StudiedModel, combinations, measure_heads
from subspan.analysis.heads_study import trained_parameters as count
from subspan.analysis.study_pictures import draw_heads
from subspan.analysis.study_report import heads_table, rows_as_csv, rows_as_record, say_picture
from subspan.analysis.timing import clock_for
from subspan.train.config import write_text

__all__ = ["bench_heads"]

_PACKAGES = ("subspan", "torch", "transformers")


def bench_heads(
    ranks: Sequence[int] = (1, 4, 16),
    heads: Sequence[int] = (1, 2, 4),
    *,
    model: str = "llama_bench",
    vocab_size: int | None = None,
    seq_len: int = 128,
    batch_size: int = 4,
    target_modules: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = (),
    merge_every: int = 10,
    others: Literal["replicated", "shared"] = "replicated",
    dtype: Literal["float32", "bfloat16", "amp"] = "float32",
    rounds: int = 5,
    device: str = "cpu",
    threads: int = 1,
    seed: int = 0,
    output: str | Path = "runs/bench-heads",
    console: Console | None = None,
) -> list[HeadsRow]:
    """Measure iterations with LoRA heads against those with full weights, for every rank, number of heads and mode.

    Sequential: all heads see the whole batch (``mhlora``). Parallel: each sees its share of it, and they are averaged
    every ``merge_every`` iterations (``lte``). An iteration is forward, backward and a step of AdamW; what a merge adds
    to it is told apart. The folder gets ``heads.json`` and ``heads.csv`` after each row, and ``heads.png`` where
    matplotlib is installed, in place of those of an earlier call.

    Args:
        ranks: r of a head.
        heads: N; in parallel they divide the batch.
        model: preset, config.json, folder, or name on the hub.
        vocab_size: tokens in the vocabulary of a preset or config; None: its own. It counts in a study with heads in
            the logit layer.
        seq_len: tokens in a sequence.
        batch_size: sequences of an iteration.
        target_modules, exclude: layers that get heads, see `subspan.nn.lowrank.select_layers`.
        merge_every: T.
        others: what has no heads: replicated, each parallel head trains a copy of it; or shared, there is one.
        dtype: float32, bfloat16, or amp (float32 weights, bfloat16 arithmetic).
        rounds: timed iterations, each beside one with full weights, after one that warms up.
        device: "cpu" or "cuda" ("cuda:1").
        threads: of the CPU; on more than one, wall-clock time counts.
        seed: of the weights and the tokens, which are random.
        output: folder of the files.
        console: where to print (default: standard output).

    Returns:
        The rows, that of full weights first.

    Raises:
        ValueError: an argument that is out of its range, or a folder that cannot be written.
        FileNotFoundError: no such model.

    Example:
        >>> rows = bench_heads([4], [1, 4])  # doctest: +SKIP
        >>> {(row.mode, row.heads): row.iteration for row in rows}  # doctest: +SKIP
        {('full', None): 1.0, ('sequential', 1): 0.93, ('sequential', 4): 1.02, ...}
    """
    console = console or Console()
    place = device_named(device)
    _check(ranks, heads, vocab_size, seq_len, batch_size, merge_every, rounds, threads)
    if dtype not in ("float32", "bfloat16", "amp"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16 or amp.")
    if others not in ("replicated", "shared"):
        raise ValueError(f"others is {others!r}; it must be replicated or shared.")
    studied = StudiedModel(model, seq_len, batch_size, target_modules, exclude, dtype, device, seed, others, vocab_size)
    every = list(combinations(ranks, heads))
    # What cannot be built is said before anything is measured.
    total = count(studied)
    for number in heads:
        count(studied, number, max(ranks))
    folder = writable(Path(output).expanduser())
    settings = dataclasses.asdict(studied) | {"merge_every": merge_every, "threads": threads}
    clock = clock_for(place, threads)
    with threads_of_cpu(threads), on_device(place):
        record = {"benchmark": "heads", "settings": settings | {"ranks": list(ranks), "heads": list(heads)}}
        record |= {"clock": clock.description, **environment(_PACKAGES, place)}
        console.print(f"Time counted: {clock.description}; {threads} thread(s), {place}.", highlight=False)
        with progress(console) as bar:
            task = bar.add_task("full weights", total=len(every) + 1)
            full = Contender(studied)
            full.iterate()
            took = sorted(clock.seconds(full.iterate)[0] for _ in range(rounds))[rounds // 2]
            one = HeadsRow("full", None, None, total, full.state_bytes(), 1.0, 1.0, 1e3 * took, None, 1.0, rounds)
            rows = [one]
            for mode, number, rank in every:
                bar.update(task, advance=1, description=f"{mode}, {number} heads of rank {rank}", refresh=True)
                rows.append(
                    measure_heads(
                        studied, full, mode, number, rank, merge_every=merge_every, rounds=rounds, clock=clock
                    )
                )
                content = record | {"rows": rows_as_record(rows)}
                write_text(folder / "heads.json", json.dumps(content, indent=1) + "\n")
                write_text(folder / "heads.csv", rows_as_csv(rows))
                if place.type == "cuda":
                    torch.cuda.empty_cache()
    console.print(heads_table(rows), highlight=False)
    console.print(f"Results: {folder / 'heads.json'}, heads.csv", markup=False, soft_wrap=True, highlight=False)
    say_picture(console, lambda path: draw_heads(rows, model, path), folder / "heads.png")
    return rows


def _check(
    ranks: Sequence[int],
    heads: Sequence[int],
    vocab_size: int | None,
    seq_len: int,
    batch_size: int,
    merge_every: int,
    rounds: int,
    threads: int,
) -> None:
    counts = {"batch_size": batch_size, "merge_every": merge_every, "rounds": rounds, "threads": threads}
    for name, values in {"ranks": ranks, "heads": heads, **{name: [value] for name, value in counts.items()}}.items():
        if not values or min(values) < 1:
            shown = list(values) if name in ("ranks", "heads") else values[0]
            raise ValueError(f"{name} is {shown}; it must be at least 1.")
    for name, value in (("vocab_size", vocab_size), ("seq_len", seq_len)):
        if value is not None and value < 2:
            raise ValueError(f"{name} is {value}; it must be at least 2 tokens.")
    if uneven := [number for number in heads if batch_size % number]:
        raise ValueError(
            f"batch_size is {batch_size}, which {uneven[0]} parallel heads cannot divide evenly: give a multiple of "
            f"{uneven[0]}, or other heads."
        )
