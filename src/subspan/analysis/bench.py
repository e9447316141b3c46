"""``subspan bench subspace``: what is measured, in which order, and which files hold it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from subspan.analysis.bench_place import device_named, on_device, progress, threads_of_cpu, writable
from subspan.analysis.environment import environment
from subspan.analysis.matrices import MatrixSource, parse_size, saved_matrices, synthetic_matrices
from subspan.analysis.subspace_bench import MatrixResult, measure_matrix
from subspan.analysis.subspace_picture import write_picture
from subspan.analysis.subspace_report import as_csv, as_record, as_table
from subspan.analysis.timing import Clock, clock_for
from subspan.train.config import write_text

__all__ = ["bench_subspace"]

_PACKAGES = ("subspan", "torch", "numpy", "scipy", "scikit-learn")


def bench_subspace(
    sizes: Sequence[str] = (),
    spectra: Sequence[str] = ("pow 1/2", "exp"),
    *,
    gradients: str | Path | None = None,
    rank: int | None = None,
    rank_share: float = 0.25,
    rounds: int = 3,
    device: str = "cpu",
    threads: int = 1,
    longest: float = 60.0,
    output: str | Path = "runs/bench-subspace",
    console: Console | None = None,
) -> list[MatrixResult]:
    """Measure every finder of a subspace, and those of other libraries, on matrices of known spectra and on gradients.

    The folder gets ``subspace.json``, ``subspace.csv`` and, where matplotlib is installed, ``subspace.png``, in place
    of those of an earlier call; the first two after each matrix.

    Args:
        sizes: rows and columns, as "512x512"; one matrix for every spectrum.
        spectra: names in :data:`subspan.analysis.matrices.SPECTRA`; a hyphen may stand for a space.
        gradients: safetensors file, tensor name -> gradient. What is no matrix is left out, with the reason.
        rank: columns of a basis; None: by ``rank_share``.
        rank_share: rank over min(m, n).
        rounds: timed calls of a method, after one that warms up; methods that take over a second are called once.
        device: "cpu" or "cuda" ("cuda:1").
        threads: of the CPU; on more than one, wall-clock time counts.
        longest: seconds; a method that would take longer for one call is left out, with the reason.
        output: folder of the files.
        console: where to print (default: standard output).

    Returns:
        One result for each matrix.

    Raises:
        FileNotFoundError: if there is no file ``gradients``.
        ValueError: if an argument is out of its range, the device is not there, the file cannot be read or the folder
            not be written.

    Example:
        >>> results = bench_subspace(["512x512"], ["exp"])  # doctest: +SKIP
        >>> {method.method: method.energy for method in results[0].methods}  # doctest: +SKIP
        {'sketch, QR': 0.9999, ...}
    """
    console = console or Console()
    place = device_named(device)
    _check(rank, rank_share, rounds, threads, longest)
    parsed = [parse_size(size) for size in sizes]
    for m, n in parsed:
        if rank is not None and rank > min(m, n):
            raise ValueError(f"rank {rank} is more than the {min(m, n)} directions of a {m}x{n} matrix.")
    sources = synthetic_matrices(parsed, spectra) + (saved_matrices(gradients) if gradients is not None else [])
    if not sources:
        raise ValueError("there is no matrix to measure: give sizes and spectra, or gradients.")
    folder = writable(Path(output).expanduser())
    settings = {
        "sizes": list(sizes),
        "spectra": list(spectra),
        "gradients": None if gradients is None else str(gradients),
        "rank": rank,
        "rank_share": rank_share,
        "rounds": rounds,
        "device": device,
        "threads": threads,
        "longest": longest,
    }
    clock = clock_for(place, threads)
    results: list[MatrixResult] = []
    with threads_of_cpu(threads), on_device(place):
        record = {"benchmark": "subspace", "settings": settings, "clock": clock.description}
        record |= environment(_PACKAGES, place)
        console.print(f"Time counted: {clock.description}; {threads} thread(s), {place}.", highlight=False)
        for i, source in enumerate(sources, start=1):
            with progress(console) as bar:
                name = f"{i} of {len(sources)}: {source.name}"
                task = bar.add_task(name, total=None)

                def before(method: str, calls: int, bar: Progress = bar, task: Any = task, name: str = name) -> None:
                    bar.update(task, total=calls, advance=1, description=f"{name}: {method}", refresh=True)

                results.append(_measure(source, place, rank, rank_share, rounds, longest, clock, before))
            console.print(as_table(results[-1]), highlight=False)
            write_text(folder / "subspace.json", json.dumps(record | {"matrices": as_record(results)}, indent=1) + "\n")
            write_text(folder / "subspace.csv", as_csv(results))
    console.print(f"Results: {folder / 'subspace.json'}, subspace.csv", markup=False, soft_wrap=True, highlight=False)
    try:
        if write_picture(results, folder / "subspace.png"):
            console.print(f"Picture: {folder / 'subspace.png'}", markup=False, soft_wrap=True, highlight=False)
    except ModuleNotFoundError as error:
        console.print(f"No picture ({error}): it needs pip install 'subspan\\[report]'.", soft_wrap=True)
    return results


def _measure(
    source: MatrixSource,
    device: torch.device,
    rank: int | None,
    rank_share: float,
    rounds: int,
    longest: float,
    clock: Clock,
    before: Callable[[str, int], None],
) -> MatrixResult:
    """Load a matrix and measure on it; one that cannot be loaded or held is a result with the reason."""
    try:
        A = source.load().to(device)
        columns = rank or max(1, int(rank_share * min(A.shape)))
        return measure_matrix(source.name, A, columns, clock=clock, rounds=rounds, longest=longest, before=before)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        return MatrixResult(source.name, str(error).partition("\n")[0] or type(error).__name__)


def _check(rank: int | None, rank_share: float, rounds: int, threads: int, longest: float) -> None:
    for name, value in (("rank", rank), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 0 < rank_share <= 1:
        raise ValueError(f"rank_share is {rank_share}; it must be above 0 and at most 1, 0.25 for instance.")
    if not longest > 0:
        raise ValueError(f"longest is {longest}; it must be a number of seconds above 0.")
