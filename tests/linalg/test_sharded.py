from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from subspan.linalg import (
    DenseOperator,
    RowShardedOperator,
    SummedOperator,
    TransposedOperator,
    adaptive_range_finder,
    randomized_svd,
    range_finder,
    seeded_generator,
)

SHAPE = (23, 31)


def matrix() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, k, 8, dtype=torch.float64, generator=generator) for k in SHAPE)
    return left @ right.mT + 1e-3 * torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator)


def results(operator, transposed) -> dict[str, torch.Tensor]:
    X, Z = torch.arange(2 * 31 * 3).reshape(2, 31, 3).double(), torch.arange(2 * 23 * 3).reshape(2, 23, 3).double()
    found = {
        "matmul": operator.matmul(X),
        "rmatmul": operator.rmatmul(Z),
        "amax": operator.amax(),
        "dense": operator.to_dense(),
        "rows": operator.rows(2, 20),
        "norm": operator.squared_norm(torch.ones(2, 1, 1)),
        "basis": range_finder(operator, 4, generator=seeded_generator(0), n_iter=1).basis,
        "right": range_finder(transposed, 4, generator=seeded_generator(0)).basis,
        "singular values": randomized_svd(operator, 4, generator=seeded_generator(0)).S,
    }
    for method in ("sketch", "householder", "householder_left", "gram_schmidt"):
        answer = adaptive_range_finder(operator, rtol=0.2, method=method, block_size=4, generator=seeded_generator(0))
        found[method] = answer.basis()
        found[f"projected {method}"] = answer.projected
    return found


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    A = matrix()
    bounds = [0, 9, 10, 18, 23] if world == 4 else [0, 9, 23]  # uneven, one of a single row
    local = A[:, bounds[rank] : bounds[rank + 1]]
    operator = RowShardedOperator(local)
    found = results(operator, TransposedOperator(operator))
    whole = SummedOperator(A * ((rank + 1) / sum(range(world + 1))))  # a share of the matrix each
    for name, value in results(whole, TransposedOperator(whole)).items():
        found[f"summed {name}"] = value
    bad = local.clone()
    if rank == world - 1:
        bad[1, 0, 0] = torch.nan
    found["poisoned"] = RowShardedOperator(bad).amax()
    bad = torch.zeros_like(A)
    bad[1, 0, 0] = torch.nan if rank == 0 else 1.0
    found["poisoned sum"] = SummedOperator(bad).amax()
    try:
        RowShardedOperator(local[..., : 30 + (rank == 0)])
        found["refused"] = torch.tensor(False)
    except ValueError:
        found["refused"] = torch.tensor(True)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow  # starts of processes
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_is_unsharded(world: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(world, port, str(tmp_path)), nprocs=world)
    A = matrix()
    expected = results(DenseOperator(A), DenseOperator(A.mT))
    answers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for answer in answers:
        assert answer.pop("refused")
        assert answer.pop("poisoned").isfinite().tolist() == [True, False]
        assert answer.pop("poisoned sum").isfinite().tolist() == [True, False]
        assert answer.keys() == expected.keys() | {f"summed {name}" for name in expected}
        for name, value in answer.items():
            right = expected[name.removeprefix("summed ")]
            torch.testing.assert_close(value, right, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(value, answers[0][name]), f"{name} differs between ranks"


def test_without_processes_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        RowShardedOperator(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="init_process_group"):
        SummedOperator(torch.ones(2, 2))
