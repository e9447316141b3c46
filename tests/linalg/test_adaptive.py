from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linalg.spectra import exponential, slow, with_spectrum
from subspan.linalg import (
    AdaptiveResult,
    CompactWY,
    DenseOperator,
    FixedPrecision,
    adaptive_range_finder,
    blocked_gram_schmidt,
    captured_energy,
    orthogonality_error,
    residual_curve,
    seeded_generator,
    subspace_overlap,
)

M, N = 64, 96
EXACT = ("sketch", "householder", "gram_schmidt")
METHODS = (*EXACT, "householder_left", "vector")
SPECTRA = {
    "slow": slow(M),
    "decaying": exponential(M),
    "below rounding": exponential(M).pow(4),
    "flat": torch.ones(M),
    "low rank": torch.cat([torch.ones(9), torch.zeros(M - 9)]),
    "one direction": torch.cat([torch.ones(1), 1e-6 * torch.ones(M - 1)]),
}


def find(A: Tensor, seed: int = 0, **settings) -> AdaptiveResult:
    settings.setdefault("block_size", 8)
    return adaptive_range_finder(A, generator=seeded_generator(seed), **settings)


def true_error(A: Tensor, Q: Tensor) -> Tensor:
    A, Q = A.double(), Q.double()
    return torch.linalg.matrix_norm(A - Q @ (Q.mT @ A))


def optimal_rank(A: Tensor, tolerance: float) -> int:
    squares = torch.linalg.svdvals(A.double()).square()
    tail = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return int((tail > tolerance**2 * squares.sum()).sum())


# The promise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", EXACT)
def test_error_is_within_the_tolerance_and_is_what_is_said(method: str, spectrum: str, rtol: float) -> None:
    A = with_spectrum(SPECTRA[spectrum], M, N).float()
    norm = A.double().norm()
    found = find(A, rtol=rtol, method=method)
    Q = found.basis()
    error = true_error(A, Q)
    assert found.converged
    assert found.error_kind == "exact"
    assert error <= rtol * norm
    assert found.error.item() == pytest.approx(error.item(), rel=0.05, abs=1e-6 * norm.item())
    assert Q.shape == (M, found.rank)
    assert orthogonality_error(Q) < 5e-6
    assert (found.projected - Q.mT @ A).norm() <= 2e-6 * norm
    optimal = optimal_rank(A, rtol)
    if method == "sketch":
        assert optimal <= found.rank <= math.ceil(1.1 * optimal) + 1
    else:
        assert optimal <= found.rank <= 2 * optimal + 16


@pytest.mark.parametrize("spectrum", ["slow", "decaying", "flat", "low rank"])
def test_an_estimated_error_is_unbiased(spectrum: str) -> None:
    A = with_spectrum(SPECTRA[spectrum], M, N).float()
    rtol = 0.55 if spectrum == "flat" else 0.3
    ratios = []
    for seed in range(20):
        found = find(A, seed, rtol=rtol, method="householder_left")
        assert found.error_kind == "estimate"
        assert found.error <= rtol * A.norm()
        if spectrum != "low rank":
            ratios.append((found.error / true_error(A, found.basis())).square().item())
        else:
            assert true_error(A, found.basis()) <= 0.3 * A.norm() * 1.5
    if ratios:
        # stopping at a small estimate favours small ones
        assert 0.8 < sum(ratios) / len(ratios) < 1.1


@pytest.mark.parametrize("spectrum", ["slow", "decaying", "low rank"])
def test_vector_by_vector_bounds_the_spectral_norm(spectrum: str) -> None:
    A = with_spectrum(SPECTRA[spectrum], M, N)
    for seed in range(5):
        found = find(A, seed, atol=0.5, method="vector")
        Q = found.basis()
        assert found.converged
        assert found.error_kind == "bound"
        assert torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), ord=2) <= found.error
        assert found.error <= 0.5
        assert orthogonality_error(Q) < 1e-12


def test_mixed_random_matrices_are_never_above_the_tolerance() -> None:
    # Shapes, spectra, scales and tolerances at random, as the benchmark does with 1,000 of them.
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        m, n = (int(x) for x in torch.randint(1, 90, (2,), generator=generator))
        k = min(m, n)
        position = torch.arange(1, k + 1, dtype=torch.float64)
        kind = seed % 5
        sigma = (
            position.pow(-torch.rand(1, generator=generator).item() * 2),
            torch.exp(-position * torch.rand(1, generator=generator).item()),
            torch.ones(k),
            (position <= 1 + k // 5) * 1.0,
            torch.rand(k, generator=generator).pow(6),
        )[kind]
        A = (with_spectrum(sigma, m, n, seed) * 10 ** (4 * torch.rand(1, generator=generator).item() - 2)).float()
        rtol = 10 ** (-3 * torch.rand(1, generator=generator).item())
        found = find(A, seed, rtol=rtol)
        error = true_error(A, found.basis())
        assert found.converged
        assert error <= rtol * A.double().norm(), (seed, m, n, rtol)
        optimal = optimal_rank(A, rtol)
        assert optimal <= found.rank <= math.ceil(1.2 * optimal) + 1


@pytest.mark.parametrize("method", [*EXACT, "householder_left"])
@pytest.mark.parametrize(("m", "n", "block_size"), [(16, 13, 8), (24, 22, 3), (18, 16, 8), (21, 12, 2)])
def test_the_last_directions_are_found_too(method: str, m: int, n: int, block_size: int) -> None:
    # The last panel has as many columns as directions are left. These test matrices are all but singular there.
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 100 + n))
    found = find(A, rtol=0.0, method=method, block_size=block_size)
    assert found.rank == n
    assert true_error(A, found.basis()) <= 2e-6 * A.norm()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 9),
    st.sampled_from(METHODS),
    st.sampled_from([0.0, 0.05, 0.7, 1.0]),
)
def test_all_shapes(m: int, n: int, block_size: int, method: str, rtol: float) -> None:
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 100 + n))
    found = find(A, rtol=rtol, method=method, block_size=block_size)
    assert found.basis().shape == (m, found.rank)
    assert found.projected.shape == (found.rank, n)
    assert found.rank <= min(m, n)
    assert found.error.shape == found.converged.shape == ()
    if found.rank:
        assert orthogonality_error(found.basis()) < 5e-6
    if rtol == 0.05 and method in EXACT:
        assert true_error(A, found.basis()) <= 0.05 * A.norm()
    if found.rank == min(m, n) and method != "vector":
        assert true_error(A, found.basis()) <= 2e-6 * A.norm()


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_cap(method: str) -> None:
    A = with_spectrum(SPECTRA["slow"], M, N).float()
    found = find(A, rtol=0.01, max_rank=13, method=method)
    assert found.rank == 13
    assert not found.converged
    assert found.error > 0.01 * A.norm()
    if method in EXACT:
        assert found.error.item() == pytest.approx(true_error(A, found.basis()).item(), rel=1e-4)
    if method == "sketch":  # the cap leaves the best directions
        best = slow(M)[:13].norm() / slow(M).norm()
        assert captured_energy(A, found.basis()) > 0.97 * best
    found = find(A, rtol=0.9, max_rank=13, method=method)
    if method != "vector":
        assert found.converged
        assert found.rank < 13


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_find(method: str) -> None:
    for A, tolerance in ((torch.zeros(6, 8), 0.1), (torch.zeros(6, 8), 0.0), (torch.randn(6, 8), 20.0)):
        found = find(A, rtol=tolerance, method=method)
        assert found.rank == 0
        assert found.converged
        assert found.basis().shape == (6, 0)
        assert found.projected.shape == (0, 8)
        assert found.error <= tolerance * A.norm()


@pytest.mark.parametrize("method", METHODS)
def test_of_two_tolerances_the_larger_counts(method: str) -> None:
    A = with_spectrum(SPECTRA["slow"], M, N)
    norm = A.norm().item()
    ranks = [
        find(A, method=method, **given).rank
        for given in (
            {"atol": 0.5 * norm},
            {"rtol": 0.5},
            {"rtol": 0.5, "atol": 0.01},
            {"rtol": 0.01, "atol": 0.5 * norm},
        )
    ]
    assert len(set(ranks)) == 1
    assert 0 < ranks[0] < M or method == "vector"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-90, 100])
def test_loss_scaling_changes_nothing(method: str, power: int) -> None:
    A = with_spectrum(SPECTRA["decaying"], M, N).float()
    plain, scaled = find(A, rtol=0.1, method=method), find(A * 2.0**power, rtol=0.1, method=method)
    assert torch.equal(plain.basis(), scaled.basis())
    assert (scaled.error / 2.0**power).item() == pytest.approx(plain.error.item())
    assert torch.equal(scaled.projected, plain.projected * 2.0**power)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_operators_and_input(method: str) -> None:
    A = with_spectrum(SPECTRA["decaying"], M, N).float()
    kept = A.clone()
    one, same = find(A, rtol=0.1, method=method), find(DenseOperator(A), rtol=0.1, method=method)
    assert torch.equal(A, kept)
    assert torch.equal(one.basis(), same.basis())
    assert not torch.equal(one.basis(), find(A, 1, rtol=0.1, method=method).basis())
    torch.manual_seed(3)
    first = adaptive_range_finder(A, rtol=0.1, method=method).basis()
    torch.manual_seed(3)
    assert torch.equal(adaptive_range_finder(A, rtol=0.1, method=method).basis(), first)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    A = with_spectrum(SPECTRA["decaying"], M, N).to(dtype)
    found = find(A, rtol=0.05, method=method)
    Q = found.basis()
    assert Q.dtype == found.projected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert orthogonality_error(Q) < (1e-13 if dtype == torch.float64 else 5e-6)
    # rounded entries are the matrix: nothing is lost in products of half precision
    assert true_error(A, Q) <= 0.05 * A.double().norm()
    assert (found.projected - Q.mT @ A.to(Q.dtype)).norm() <= 2e-6 * A.double().norm()


def test_float64_goes_below_the_rounding_of_float32() -> None:
    A = with_spectrum(exponential(M), M, N)
    for method in EXACT:
        found = find(A, rtol=1e-8, method=method)
        assert found.converged
        assert true_error(A, found.basis()) <= 1e-8 * A.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_has_the_rank_of_its_worst_matrix(method: str) -> None:
    batch = torch.stack([with_spectrum(SPECTRA[kind], M, N) for kind in ("slow", "low rank")])
    batch = torch.stack([batch, torch.zeros_like(batch)])
    found = find(batch, rtol=0.2, method=method)
    assert found.basis().shape == (2, 2, M, found.rank)
    assert found.projected.shape == (2, 2, found.rank, N)
    assert found.converged.all()
    assert orthogonality_error(found.basis()).max() < 1e-12
    if method in EXACT:
        assert (true_error(batch, found.basis()) <= 0.2 * torch.linalg.matrix_norm(batch)).all()
    if method == "sketch":
        single = find(batch[0, 0], rtol=0.2)
        assert abs(found.rank - single.rank) <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither rtol nor atol"),
        ({"rtol": -0.1}, "rtol=-0.1"),
        ({"atol": math.nan}, "atol=nan"),
        ({"rtol": math.inf}, "rtol=inf"),
        ({"rtol": 0.1, "max_rank": 0}, "max_rank=0.*from 1 to 4"),
        ({"rtol": 0.1, "max_rank": 5}, "max_rank=5.*from 1 to 4"),
        ({"rtol": 0.1, "block_size": 0}, "block_size=0"),
        ({"rtol": 0.1, "method": "svd"}, "method='svd'.*'householder_left'"),
    ],
)
def test_bad_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive_range_finder(torch.randn(4, 6), **given)


def test_bad_matrices_are_refused() -> None:
    for value in (math.nan, math.inf):
        A = torch.randn(4, 6)
        A[2, 3] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            adaptive_range_finder(A, rtol=0.1)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        adaptive_range_finder(torch.zeros(0, 4), rtol=0.1)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            adaptive_range_finder(torch.ones(4, 6, dtype=dtype), rtol=0.1)


# Householder ----------------------------------------------------------------------------------------------------------


def test_left_and_right_looking_forms_agree() -> None:
    A = with_spectrum(SPECTRA["decaying"], M, N)
    right = find(A, rtol=0.02, max_rank=24, method="householder")
    left = find(A, rtol=0.02, max_rank=24, method="householder_left")
    k = min(left.rank, right.rank)
    assert k >= 16
    # Both meet the same test matrices, and Qᵀ(AΩ) = (QᵀA)Ω.
    torch.testing.assert_close(left.compact_wy.V[:, :k], right.compact_wy.V[:, :k], rtol=0, atol=1e-9)
    torch.testing.assert_close(left.projected[:k], right.projected[:k], rtol=0, atol=1e-9)


def test_compact_wy_is_the_basis() -> None:
    A = with_spectrum(SPECTRA["slow"], M, N).float()
    for method in ("householder", "householder_left"):
        found = find(A, rtol=0.6, method=method)
        assert found.compact_wy is not None
        torch.testing.assert_close(found.compact_wy.project(A), found.projected, rtol=0, atol=1e-5)
        assert found.basis() is found.basis()
    assert find(A, rtol=0.6).compact_wy is None


# The errata of the published listing: each variant is wrong in the way that was measured. -----------------------------


def test_norms_are_subtracted_in_squares() -> None:
    A = with_spectrum(torch.arange(1, 129).double().rsqrt(), 128, 192)
    norm = A.norm()
    found = find(A, rtol=0.1, method="householder", block_size=16)
    assert true_error(A, found.basis()) <= 0.1 * norm
    # E ← E − ‖B_i‖ stops after a few blocks, far too early.
    indicator, columns = norm.clone(), 0
    while indicator > 0.1 * norm:
        indicator -= found.projected[columns : columns + 16].norm()
        columns += 16
    assert true_error(A, found.basis()[:, :columns]) > 0.5 * norm


def test_the_update_takes_the_transposed_triangular_factor() -> None:
    Y = with_spectrum(slow(32), M, 32)
    Q, R = CompactWY.factor(Y)
    right = Y - Q.V @ (Q.T.mT @ (Q.V.mT @ Y))
    torch.testing.assert_close(right, torch.cat([R, torch.zeros(M - 32, 32)]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(Q.apply_transpose(Y), right, rtol=0, atol=1e-14)
    wrong = Y - Q.V @ (Q.T @ (Q.V.mT @ Y))
    assert wrong.tril(-1).norm() > 0.3 * Y.norm()


def test_a_panel_is_taken_from_the_updated_rows() -> None:
    # With raw rows of A the later panels do not know what the earlier ones have found already.
    A = with_spectrum(slow(M), M, N)
    ratios = []
    for seed in range(8):
        found = find(A, seed, atol=0.0, max_rank=24, method="householder", block_size=8)
        generator = seeded_generator(seed)
        B = A.clone()
        for j in range(0, 24, 8):
            Omega = torch.empty(N, 8, dtype=torch.float64).normal_(generator=generator)
            panel, _ = CompactWY.factor(A[j:] @ Omega)
            B[j:] = panel.apply_transpose(B[j:])
        ratios.append(found.projected.norm().item() / B[:24].norm().item())
    assert sum(ratios) / len(ratios) > 1.01


def test_squared_error_survives_the_last_block() -> None:
    # E² − ‖B‖² is negative by rounding at full rank; the error is then computed from what is left.
    A = with_spectrum(SPECTRA["slow"], M, N).float()
    for method in EXACT:
        found = find(A, rtol=0.0, method=method)
        assert found.rank == M
        assert 0 <= found.error <= 2e-6 * A.norm()


# The indicator that does not touch A, and Gram-Schmidt ---------------------------------------------------------------


def problem(A: Tensor, **given) -> FixedPrecision:
    settings = {"rtol": None, "atol": None, "max_rank": None, "block_size": 8} | given
    return FixedPrecision(A, generator=seeded_generator(0), **settings)


def test_indicator_is_recomputed_when_it_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    A = with_spectrum(exponential(M), M, N).float()
    norm = A.double().norm()
    calls = []
    residual = FixedPrecision.residual
    monkeypatch.setattr(FixedPrecision, "residual", lambda *args: calls.append(1) or residual(*args))
    assert blocked_gram_schmidt(problem(A, rtol=0.1)).error <= 0.1 * norm
    assert not calls
    found = blocked_gram_schmidt(problem(A, rtol=1e-4))
    assert calls
    assert found.error.item() == pytest.approx(true_error(A, found.basis()).item(), rel=0.02)
    # the plain difference is wrong there
    difference = norm.square() - found.projected.square().sum().double()
    assert abs(difference - found.error.square()) > 0.5 * found.error.square()


def test_update_gives_the_same_basis() -> None:
    A = with_spectrum(SPECTRA["decaying"], M, N)
    left, updated = (blocked_gram_schmidt(problem(A, rtol=0.05), update=update) for update in (False, True))
    assert left.rank == updated.rank
    assert subspace_overlap(left.basis(), updated.basis()) == pytest.approx(1, abs=1e-9)
    assert updated.error.item() == pytest.approx(left.error.item(), rel=1e-6)


def test_gram_schmidt_once_loses_orthogonality() -> None:
    A = with_spectrum(SPECTRA["below rounding"], M, N).float()
    given = {"atol": 0.0, "max_rank": 48}
    assert orthogonality_error(blocked_gram_schmidt(problem(A, **given)).basis()) < 5e-6
    once = blocked_gram_schmidt(problem(A, **given), reorthogonalize=False)
    assert orthogonality_error(once.basis()) > 1e-2


# The residual curve ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["slow", "decaying", "flat"])
def test_residual_curve_is_unbiased(spectrum: str) -> None:
    A = with_spectrum(SPECTRA[spectrum], M, N)
    ratios = []
    for seed in range(40):
        Y = A @ torch.empty(N, 48, dtype=torch.float64).normal_(generator=seeded_generator(seed))
        Q = torch.linalg.qr(Y).Q
        truth = torch.stack([true_error(A, Q[:, :j]).square() for j in range(0, 48, 16)])
        ratios.append(residual_curve(Y, 16) / truth)
    mean = torch.stack(ratios).mean(0)
    assert ((mean > 0.9) & (mean < 1.1)).all(), mean
    batch = torch.stack([Y, 2 * Y])
    torch.testing.assert_close(residual_curve(batch, 20)[1], 4 * residual_curve(Y, 20))
