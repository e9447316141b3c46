from __future__ import annotations

import math

import pytest
import torch

from linalg.spectra import exponential, slow, with_spectrum
from subspan.linalg import (
    DenseOperator,
    FixedPrecision,
    adaptive_range_finder,
    canonical_signs,
    captured_energy,
    gram_basis,
    krylov_range_finder,
    orthogonality_error,
    range_finder,
    seeded_generator,
)
from subspan.linalg.gram_schmidt import orthogonal_to
from subspan.linalg.krylov import KrylovSpace

M, N, R = 96, 144, 24


def find(A: torch.Tensor, rank: int = R, seed: int = 0):
    return krylov_range_finder(A, rank, generator=seeded_generator(seed))


def problem(A: torch.Tensor, rtol: float = 1.0) -> FixedPrecision:
    return FixedPrecision(A, rtol=rtol, atol=None, max_rank=None, block_size=None, generator=seeded_generator(0))


@pytest.mark.parametrize("shape", [(256, 256), (128, 320), (320, 128)])
def test_it_finds_more_than_a_power_iteration(shape: tuple[int, int]) -> None:
    k = min(shape)
    A = with_spectrum(slow(k), *shape).float()
    best = math.sqrt(slow(k)[: k // 4].square().sum() / slow(k).square().sum())
    krylov = captured_energy(A, find(A, k // 4).basis) / best
    power = captured_energy(A, range_finder(A, k // 4, generator=seeded_generator(0), n_iter=1).basis) / best
    assert krylov > 0.985
    assert power + 0.004 < krylov <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
@pytest.mark.parametrize("spectrum", [slow, exponential])
def test_basis_projection_and_singular_values(shape: tuple[int, int], spectrum) -> None:
    A = with_spectrum(spectrum(M), *shape).float()
    kept = A.clone()
    Q, projected, singular_values = find(A)
    assert torch.equal(A, kept)
    assert orthogonality_error(Q) < 5e-6
    assert torch.equal(canonical_signs(Q), torch.ones(1, R))
    assert (projected - Q.mT @ A).norm() <= 2e-6 * A.norm()
    gram = projected.double() @ projected.double().mT
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4 * gram[0, 0]
    assert (singular_values.diff() <= 0).all()
    torch.testing.assert_close(singular_values[:4].double(), spectrum(M)[:4], rtol=1e-3, atol=0)


def test_most_directions_are_found_exactly() -> None:
    A = torch.randn(12, 20)
    for rank in (8, 12):
        assert torch.equal(find(A, rank).basis, gram_basis(A, rank).basis)


@pytest.mark.parametrize("kind", ["zero", "rank 4", "equal", "1e-30", "3e37"])
def test_degenerate(kind: str) -> None:
    noise = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    A = {
        "zero": torch.zeros(48, 64),
        "rank 4": noise[:, :4] @ noise[:4],
        "equal": torch.linalg.qr(noise.mT).Q.mT,
        "1e-30": noise * 1e-30,
        "3e37": noise / noise.abs().max() * 3e37,
    }[kind]
    found = find(A, 10)
    assert orthogonality_error(found.basis) < 5e-6
    assert found.projected.isfinite().all()
    floor = {"zero": 1, "rank 4": 1, "equal": math.sqrt(10 / 48)}.get(kind, 0.6)
    assert captured_energy(A, found.basis) > floor - 1e-4


def test_batches_dtypes_and_operators() -> None:
    A = with_spectrum(slow(M), M, N)
    assert {t.dtype for t in find(A)} == {torch.float64}
    batch = find(torch.stack([A, torch.zeros_like(A)]))
    assert orthogonality_error(batch.basis).max() < 1e-12
    # The first matrix draws the same numbers alone.
    torch.testing.assert_close(batch.basis[0], find(A).basis)
    half = find(A.bfloat16())
    assert half.basis.dtype == torch.float32
    assert abs(captured_energy(A, half.basis) - captured_energy(A, find(A).basis)) < 2e-3
    assert torch.equal(find(A).basis, krylov_range_finder(DenseOperator(A), R, generator=seeded_generator(0)).basis)
    scaled = find(A.float() * 2.0**20)
    assert torch.equal(scaled.basis, find(A.float()).basis)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_out_of_its_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} .*between 1 and 6"):
        krylov_range_finder(torch.randn(6, 8), rank)


# The space ------------------------------------------------------------------------------------------------------------


def test_the_space_is_the_krylov_space() -> None:
    A = with_spectrum(exponential(M), M, N)
    space = KrylovSpace(problem(A), 5)
    for _ in range(2):
        space.grow(5)
    Y = A @ torch.empty(N, 5, dtype=torch.float64).normal_(generator=seeded_generator(0))
    powers = torch.cat([Y, A @ (A.mT @ Y), A @ (A.mT @ (A @ (A.mT @ Y)))], dim=-1)
    expected = torch.linalg.qr(powers).Q
    assert (powers - space.Q @ (space.Q.mT @ powers)).norm() < 1e-9 * powers.norm()
    assert orthogonality_error(space.Q) < 1e-13
    assert expected.shape == space.Q.shape
    scaled = A * problem(A).scale
    torch.testing.assert_close(space.W, scaled.mT @ space.Q)
    residual = (scaled - space.Q @ space.W.mT).square().sum()
    torch.testing.assert_close(space.residual(), residual)


def test_narrow_blocks_multiply_every_column_once() -> None:
    # Columns that were multiplied already would have nothing new to give: their blocks would be rounding.
    A = with_spectrum(slow(M), M, N)
    space = KrylovSpace(problem(A), 8)
    for columns in (5, 2, 8, 8):
        space.grow(columns)
    residual = space.residual()
    plain = KrylovSpace(problem(A), 8)
    for _ in range(3):
        plain.grow(8)
    assert space.width == plain.width - 1
    assert residual < 1.1 * plain.residual()


def test_a_fresh_sketch_replaces_an_exhausted_space() -> None:
    # All singular values are equal: AAᵀ maps every subspace to itself, and only fresh columns find the rest.
    A = (torch.linalg.qr(torch.randn(N, M, generator=torch.Generator().manual_seed(0))).Q.mT).contiguous()
    A[M // 2 :] = 0
    found = adaptive_range_finder(A, rtol=0.01, generator=seeded_generator(0))
    assert found.converged
    assert found.rank == M // 2


def test_orthogonal_to_completes_what_lies_in_the_span() -> None:
    Q = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(0))).Q
    for block in (Q[:, :3], torch.linalg.qr(Q[:, :3] + 1e-7 * torch.randn(20, 3)).Q, torch.eye(20)[:, :3]):
        both = torch.cat([Q, orthogonal_to(Q, block)], dim=-1)
        assert orthogonality_error(both) < 5e-6
