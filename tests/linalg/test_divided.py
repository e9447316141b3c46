"""Matrices that are divided over processes: finders and bases are those of the whole matrix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from subspan.linalg import (
    DividedOperator,
    Division,
    divided_range_finder,
    exact_basis,
    orthogonality_error,
    range_finder,
    seeded_generator,
)

M, N, RANK = 9, 37, 5  # the last of four processes has no row


def matrix(case: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rank = 3 if case == "below" else 12
    scales = torch.logspace(0, -2, rank)
    A = torch.randn(M, rank, generator=generator) * scales @ torch.randn(rank, N, generator=generator)
    if case == "zero rows":
        A[7:] = 0
    return (A * 1e-12 if case == "tiny" else A).to(dtype)


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    found: dict[str, torch.Tensor] = {}
    for case in ("above", "below", "tiny", "zero rows"):
        for side in ("rows", "columns"):
            A = matrix(case)
            division = Division(side, M, N)
            operator = DividedOperator(A[division.rows] if side == "rows" else A[:, division.columns], division)
            result = divided_range_finder(operator, RANK, generator=seeded_generator("test", case))
            Q = division.all_rows(result.basis) if side == "rows" else result.basis
            found |= {
                f"{case} {side} basis": Q,
                f"{case} {side} projected": division.all_columns(result.projected),
                f"{case} {side} values": result.singular_values,
                f"{case} {side} exact": exact_basis(operator, RANK).basis,
                f"{case} {side} amax": operator.amax(),
                f"{case} {side} norm": operator.squared_norm(torch.ones(1, 1)),
                f"{case} {side} generic": range_finder(operator, RANK, generator=seeded_generator("test", case)).basis,
                f"{case} {side} whole": operator.to_dense(),
            }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("world", [1, 2, 4])
def test_divided_is_whole(world: int, tmp_path: Path) -> None:
    mp.spawn(worker, args=(world, str(tmp_path)), nprocs=world)
    first = torch.load(tmp_path / "0.pt")
    for rank in range(1, world):
        other = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(first[key], other[key]) for key in first)
    for case in ("above", "below", "tiny", "zero rows"):
        A = matrix(case)
        whole = range_finder(A, RANK, generator=seeded_generator("test", case))
        for side in ("rows", "columns"):
            of = {
                key.removeprefix(f"{case} {side} "): value
                for key, value in first.items()
                if key.startswith(f"{case} {side} ")
            }
            size = float(A.norm())
            torch.testing.assert_close(of["whole"], A)
            torch.testing.assert_close(of["basis"], whole.basis, atol=2e-4, rtol=0)
            torch.testing.assert_close(of["generic"], whole.basis, atol=2e-4, rtol=0)
            torch.testing.assert_close(of["projected"] / size, whole.projected / size, atol=2e-6, rtol=0)
            torch.testing.assert_close(of["values"][:3], whole.singular_values[:3], rtol=1e-5, atol=0)
            assert float(orthogonality_error(of["basis"])) < 1e-5
            torch.testing.assert_close(
                of["exact"], exact_basis(A, RANK).basis, atol=2e-3 if case != "below" else 2, rtol=0
            )
            assert float(of["amax"]) == float(A.abs().max())
            torch.testing.assert_close(of["norm"], A.double().square().sum(), rtol=1e-6, atol=0)
