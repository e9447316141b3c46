"""Bases of subspaces: time in units of one projection QᵀA, captured energy, tolerance and orthogonality.

A unit is the time of QᵀA for the same shape and rank, measured right before the method in the same process; methods
take turns, and a figure is the median of ratios. Times are those of the calling thread (one thread is set).

`fixed`: finders of a given rank beside torch's, scipy's and scikit-learn's (where installed) on matrices of known
spectrum. `adaptive`: a tolerance beside the fixed-rank finder at the optimal rank. `promise`: random matrices of mixed
spectra; how often the true error is above the tolerance. `orthogonality`: ‖QᵀQ − I‖₂ of the finders on hard spectra,
and of the orthonormalisation methods against the condition number. `gradients`: energy, ranks and orthogonality on
gradients of `llama_bench` after some steps.

Example:
    OMP_NUM_THREADS=1 python benchmarks/linalg.py fixed adaptive promise orthogonality gradients
    OMP_NUM_THREADS=1 python benchmarks/linalg.py fixed --shapes 512x512 --rounds 9 --output ""
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_record
from torch import Tensor

from subspan.analysis.finders import fixed_rank_finders, peers
from subspan.analysis.matrices import SPECTRA, parse_size, sigma, with_spectrum
from subspan.analysis.timing import THREAD, in_units, projection
from subspan.linalg import (
    adaptive_range_finder,
    captured_energy,
    exact_basis,
    gram_basis,
    orthogonality_error,
    orthonormalize,
    range_finder,
    rank_for_energy,
    seeded_generator,
)
from subspan.linalg.polar import gram_schmidt_twice

# Finders of a given rank that are compared.
FIXED = (
    "sketch, QR",
    "sketch, QR, rotation",
    "one power iteration, rotation",
    "one power iteration",
    "block Krylov",
    "sparse sign, QR",
    "column sampling, QR",
    "eigh of Gram",
    "torch.svd_lowrank niter=1",
    "torch.svd_lowrank niter=2",
    "torch.linalg.svd",
    "sklearn n_iter=1, p=0",
    "sklearn defaults",
)


def measure_fixed(args: argparse.Namespace) -> dict[str, Any]:
    """Time and energy of the finders of a given rank on σ_i = i^-1/2."""
    result: dict[str, Any] = {}
    for m, n in args.shapes:
        rank = min(m, n) // 4
        values = sigma("pow 1/2", min(m, n))
        A = with_spectrum(values, m, n)
        best = (values[:rank].norm() / values.norm()).item()

        finders = fixed_rank_finders(A, rank) | peers(A, rank)
        methods = {name: finder for name in FIXED if callable(finder := finders[name])}
        rows = {
            name: {
                "units": statistics.median(timings.units),
                "least": min(timings.units),
                "energy_of_optimum": captured_energy(A, methods[name]()).item() / best,
            }
            for name, timings in in_units(methods, projection(A, rank), args.rounds, once_above=args.once_above).items()
        }
        result[f"{m}x{n}"] = rows
        print(f"\n{m}x{n}, rank {rank}: units, energy relative to the optimum")
        for name, row in rows.items():
            print(f"  {name:32} {row['units']:8.2f} {row['energy_of_optimum']:8.4f}", flush=True)
    return result


def optimal_rank(values: Tensor, rtol: float) -> int:
    """Least rank within the tolerance, from the singular values."""
    squares = values.double().square()
    tail = torch.nn.functional.pad(squares.flip(0).cumsum(0), (1, 0)).flip(0)
    return int((tail > rtol**2 * squares.sum()).sum())


def measure_adaptive(args: argparse.Namespace) -> dict[str, Any]:
    """Time and rank of the adaptive finders at the tolerance that needs a quarter of the directions."""
    result: dict[str, Any] = {}
    for m, n in args.shapes:
        for spectrum in ("pow 1/2", "pow 1", "exp"):
            values = sigma(spectrum, min(m, n))
            rank = min(m, n) // 4
            rtol = (values[rank:].norm() / values.norm()).item() * (1 + 1e-4)
            A = with_spectrum(values, m, n)

            def adaptive(method: str, matrix: Tensor = A, tol: float = rtol) -> Callable[[], Any]:
                return lambda: adaptive_range_finder(matrix, rtol=tol, method=method, generator=seeded_generator(0))

            methods: dict[str, Callable[[], Any]] = {
                "fixed, rotation": lambda matrix=A, r=rank: range_finder(matrix, r, generator=seeded_generator(0)),
                **{name: adaptive(name) for name in ("sketch", "householder", "householder_left", "gram_schmidt")},
            }
            timings = in_units(methods, projection(A, rank), args.rounds)
            ratios = {name: timing.units for name, timing in timings.items()}
            fixed = ratios.pop("fixed, rotation")
            rows: dict[str, Any] = {"fixed, rotation": {"units": statistics.median(fixed)}}
            for name, mine in ratios.items():
                found = methods[name]()
                Q = found.basis().double()
                error = ((A - Q @ (Q.mT @ A.double())).norm() / A.double().norm()).item()
                rows[name] = {
                    "units": statistics.median(mine),
                    "of_fixed_at_optimal_rank": statistics.median(x / y for x, y in zip(mine, fixed, strict=True)),
                    "rank_of_optimum": found.rank / rank,
                    "error_of_tolerance": error / rtol,
                }
            result[f"{m}x{n} {spectrum}"] = {"rtol": rtol, "optimal_rank": rank, "methods": rows}
            print(f"\n{m}x{n} {spectrum}, optimal rank {rank}: {rows['fixed, rotation']['units']:.2f} units fixed")
            for name, row in rows.items():
                if name in ratios:
                    print(
                        f"  {name:18} {row['of_fixed_at_optimal_rank']:6.2f} x fixed, rank {row['rank_of_optimum']:.3f}"
                        f" x optimum, error {row['error_of_tolerance']:.3f} x tolerance",
                        flush=True,
                    )
    return result


def measure_promise(args: argparse.Namespace) -> dict[str, Any]:
    """How often the true error is above the tolerance, on random shapes, spectra, scales and tolerances."""
    generator = torch.Generator().manual_seed(args.seed)

    def uniform() -> float:
        return torch.rand(1, generator=generator).item()

    counts = {
        name: {"above": 0, "worst": 0.0} for name in ("sketch", "householder", "gram_schmidt", "householder_left")
    }
    excess: list[float] = []
    for i in range(args.matrices):
        m, n = (int(x) for x in torch.randint(8, 200, (2,), generator=generator))
        k = min(m, n)
        position = torch.arange(1, k + 1, dtype=torch.float64)
        values = (
            position.pow(-2 * uniform()),
            torch.exp(-position * uniform()),
            torch.ones(k),
            (position <= 1 + k // 5) * 1.0,
            torch.rand(k, generator=generator).pow(6),
        )[i % 5].double()
        A = with_spectrum(values.sort(descending=True).values, m, n, seed=i) * 10 ** (4 * uniform() - 2)
        rtol = 10 ** (-3 * uniform())
        norm = A.double().norm()
        for name, count in counts.items():
            found = adaptive_range_finder(A, rtol=rtol, method=name, generator=seeded_generator(i))
            Q = found.basis().double()
            share = ((A - Q @ (Q.mT @ A.double())).norm() / (rtol * norm)).item()
            count["above"] += share > 1
            count["worst"] = max(count["worst"], share)
            if name == "sketch":
                optimum = optimal_rank(torch.linalg.svdvals(A.double()), rtol)
                excess.append(found.rank / max(optimum, 1))
    result = {
        "matrices": args.matrices,
        "methods": counts,
        "rank_of_optimum": {
            "mean": statistics.fmean(excess),
            "largest": max(excess),
            "share_within_5_percent": statistics.fmean(x <= 1.05 for x in excess),
        },
    }
    print(f"\nof {args.matrices} random matrices the true error was above the tolerance, and at worst times it")
    for name, count in counts.items():
        print(f"  {name:18} {count['above']:5d} {count['worst']:8.3f}")
    print(f"  rank of the optimum: {result['rank_of_optimum']}")
    return result


def measure_orthogonality(args: argparse.Namespace) -> dict[str, Any]:
    """‖QᵀQ − I‖₂ of finders on hard spectra, and of orthonormalisers against the condition number."""
    finders: dict[str, dict[str, float]] = {}
    for spectrum in SPECTRA:
        A = with_spectrum(sigma(spectrum, 256), 256, 384)
        row: dict[str, float] = {}
        for name, basis in {
            "range_finder": lambda A=A: range_finder(A, 64, generator=seeded_generator(0)).basis,
            "one power iteration": lambda A=A: range_finder(A, 64, generator=seeded_generator(0), n_iter=1).basis,
            "exact_basis": lambda A=A: exact_basis(A, 64).basis,
            "gram_basis": lambda A=A: gram_basis(A, 64).basis,
            **{
                name: lambda A=A, name=name: adaptive_range_finder(
                    A, rtol=1e-3, method=name, max_rank=128, generator=seeded_generator(0)
                ).basis()
                for name in ("sketch", "householder", "householder_left", "gram_schmidt")
            },
        }.items():
            Q = basis()
            row[name] = orthogonality_error(Q.double()).item() if Q.shape[-1] else 0.0
        finders[spectrum] = row
        print(f"{spectrum:20} " + ", ".join(f"{name} {value:.1e}" for name, value in row.items()), flush=True)
    raw: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda Y, name=name: orthonormalize(Y, method=name, fallback=False)
        for name in (
            "householder",
            "cholesky",
            "shifted_cholesky",
            "sketched_cholesky",
            "gram_schmidt",
            "newton_schulz",
        )
    }
    raw["CholeskyQR once"] = lambda Y: torch.linalg.solve_triangular(
        torch.linalg.cholesky_ex(Y.mT @ Y, upper=True).L, Y, upper=True, left=False
    )
    raw["classical Gram-Schmidt once"] = lambda Y: gram_schmidt_twice(Y, passes=1)
    raw["modified Gram-Schmidt"] = modified_gram_schmidt
    raw["with fallback (cholesky)"] = lambda Y: orthonormalize(Y, method="cholesky")
    against: dict[str, dict[str, float]] = {name: {} for name in raw}
    for exponent in range(0, 11):
        Y = with_spectrum(torch.logspace(0, -exponent, 64, dtype=torch.float64), 512, 64)
        for name, method in raw.items():
            Q = method(Y).double()
            against[name][f"1e{exponent}"] = orthogonality_error(Q).item() if Q.isfinite().all() else math.inf
    print("\n‖QᵀQ − I‖ for κ = 1, 1e1, … (512×64)")
    for name, row in against.items():
        print(f"  {name:28} " + " ".join(f"{value:.0e}" for value in row.values()), flush=True)
    return {"finders": finders, "against_condition_number": against}


def modified_gram_schmidt(Y: Tensor) -> Tensor:
    """Modified Gram-Schmidt, the textbook's: only compared with."""
    Q = Y.clone()
    for j in range(Q.shape[1]):
        Q[:, j] /= Q[:, j].norm()
        Q[:, j + 1 :] -= torch.outer(Q[:, j], Q[:, j] @ Q[:, j + 1 :])
    return Q


def measure_gradients(args: argparse.Namespace) -> dict[str, Any]:
    """Energy, rank and orthogonality on gradients of llama_bench, early and later."""
    from refresh import real_gradients

    result: dict[str, Any] = {}
    for steps in args.training_steps:
        args_there = argparse.Namespace(seed=args.seed, training_steps=steps)
        gradients = [g if g.shape[0] <= g.shape[1] else g.mT for g in real_gradients(args_there).values()]
        energy: dict[str, list[float]] = {"sketch": [], "one power iteration": [], "warm start": []}
        orthogonality = 0.0
        failed = 0
        ranks: dict[str, list[float]] = {}
        above = 0
        ratios: list[float] = []
        for i, G in enumerate(gradients):
            rank = G.shape[0] // 4
            best = captured_energy(G, exact_basis(G, rank).basis).item()
            plain = range_finder(G, rank, generator=seeded_generator(i))
            for name, found in {
                "sketch": plain,
                "one power iteration": range_finder(G, rank, generator=seeded_generator(i), n_iter=1),
                "warm start": range_finder(G, rank, generator=seeded_generator(i), start=plain.basis),
            }.items():
                energy[name].append(captured_energy(G, found.basis).item() / best)
                orthogonality = max(orthogonality, orthogonality_error(found.basis).item())
            scale = G.abs().max()
            Y = (G / scale) @ torch.empty(G.shape[1], rank).normal_(generator=seeded_generator(i))
            for method in ("cholesky", "sketched_cholesky"):
                orthogonality = max(orthogonality, orthogonality_error(orthonormalize(Y, method=method)).item())
            unchecked = orthonormalize(Y, method="cholesky", fallback=False)
            failed += not (unchecked.isfinite().all() and orthogonality_error(unchecked) < 5e-6)
            for share in (0.9, 0.95, 0.99):
                rtol = math.sqrt(1 - share)
                took, found = THREAD.seconds(
                    lambda G=G, i=i, rtol=rtol: adaptive_range_finder(G, rtol=rtol, generator=seeded_generator(i))
                )
                optimum = int(rank_for_energy(G.double(), share))
                fixed, _ = THREAD.seconds(lambda G=G, k=optimum, i=i: range_finder(G, k, generator=seeded_generator(i)))
                ratios.append(took / fixed)
                ranks.setdefault(str(share), []).append(found.rank / optimum)
                Q = found.basis().double()
                above += bool((G.double() - Q @ (Q.mT @ G.double())).norm() > rtol * G.double().norm())
                orthogonality = max(orthogonality, orthogonality_error(found.basis()).item())
        result[f"after {steps} steps"] = {
            "matrices": len(gradients),
            "energy_of_optimum_at_quarter": {
                k: {"mean": statistics.fmean(v), "min": min(v)} for k, v in energy.items()
            },
            "worst_orthogonality": orthogonality,
            "plain_cholesky_qr2_failures": failed,
            "adaptive_rank_of_optimum": {k: {"mean": statistics.fmean(v), "max": max(v)} for k, v in ranks.items()},
            "adaptive_above_tolerance": above,
            "adaptive_time_of_fixed_at_optimal_rank": statistics.median(ratios),
        }
        print(f"after {steps} steps: {result[f'after {steps} steps']}", flush=True)
    return result


def main() -> None:
    measures = {
        "fixed": measure_fixed,
        "adaptive": measure_adaptive,
        "promise": measure_promise,
        "orthogonality": measure_orthogonality,
        "gradients": measure_gradients,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(measures))
    parser.add_argument("--shapes", type=parse_size, nargs="+", default=[(512, 512), (1024, 2736), (2048, 2048)])
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first, which warms up")
    parser.add_argument("--once-above", type=float, default=60, help="seconds of a call that is not repeated (fixed)")
    parser.add_argument("--matrices", type=int, default=1000, help="random matrices (promise)")
    parser.add_argument(
        "--training-steps", type=int, nargs="+", default=[10, 100], help="before the gradients are taken"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS), help="folder for the records; empty: none")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "parts")}
    for part in args.parts:
        results = measures[part](args)
        if args.output:
            record = {
                "benchmark": f"linalg {part}",
                "settings": settings,
                "units": "time of one projection QᵀA of the same shape and rank, one thread, medians of ratios",
                **environment(),
                "results": results,
            }
            write_record(Path(args.output) / f"linalg-{part}.json", record)


if __name__ == "__main__":
    main()
