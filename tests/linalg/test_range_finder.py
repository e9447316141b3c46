from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linalg.spectra import exponential, slow, with_spectrum
from subspan.linalg import (
    DenseOperator,
    canonical_signs,
    captured_energy,
    exact_basis,
    orthogonality_error,
    randomized_range_finder,
    randomized_svd,
    range_finder,
    seeded_generator,
    subspace_overlap,
)

M, N, R = 96, 144, 24


def find(A: Tensor, rank: int, seed: int = 0, **settings):
    return range_finder(A, rank, generator=seeded_generator(seed), **settings)


# Accuracy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_iter", "floor"), [(0, 0.90), (1, 0.98), (2, 0.99)])
def test_captured_energy_on_slow_decay(n_iter: int, floor: float) -> None:
    A = with_spectrum(slow(512), 512, 512).float()
    best = math.sqrt(slow(128).square().sum() / slow(512).square().sum())
    ratios = [captured_energy(A, find(A, 128, seed, n_iter=n_iter).basis) / best for seed in range(2)]
    assert floor < min(ratios)
    assert max(ratios) <= 1 + 1e-6


def test_residual_on_fast_decay() -> None:
    A = with_spectrum(exponential(M), M, N)
    Q = find(A, R, n_iter=1).basis
    residual = (A - Q @ (Q.mT @ A)).square().sum()
    assert residual <= 1.5 * exponential(M)[R:].square().sum()


def test_power_iterations_keep_small_directions_in_float32() -> None:
    # Without the QR between the half steps, directions below the square root of the rounding unit are lost: 0.6 here.
    A = with_spectrum(torch.logspace(0, -12, 24), M, N)
    U = exact_basis(A, 12).basis.float()
    Q = find(A.float(), 12, n_iter=1).basis
    assert (Q.mT @ U).norm(dim=0).min() > 0.999


@pytest.mark.parametrize("shape", [(M, N), (N, M), (M, M)])
def test_oversampling_helps(shape: tuple[int, int]) -> None:
    A = with_spectrum(slow(M), *shape)
    plain, more = (captured_energy(A, find(A, R, n_oversamples=p).basis) for p in (0, R))
    assert more > plain + 0.01


def test_full_rank_captures_everything() -> None:
    A = torch.randn(20, 30)
    found = find(A, 20)
    torch.testing.assert_close(found.basis @ found.projected, A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(A), rtol=1e-4, atol=1e-5)


def residual_norm(A: Tensor, Q: Tensor) -> float:
    return torch.linalg.matrix_norm(A - Q @ (Q.mT @ A)).item()


@pytest.mark.parametrize("spectrum", [slow, exponential])
@pytest.mark.parametrize("sketch", ["gaussian", "sparse_sign", "hadamard"])
def test_mean_error_is_within_the_bound_of_halko_martinsson_and_tropp(spectrum, sketch: str) -> None:
    # E‖A − QQᵀA‖_F ≤ (1 + k/(p−1))^½ (Σ_{j>k} σ_j²)^½ for every split k + p of the columns; a mean over seeds can fail.
    A = with_spectrum(spectrum(M), M, N)
    tail = spectrum(M).square()
    bound = min((math.sqrt(1 + k / (R - k - 1)) * tail[k:].sum().sqrt()).item() for k in range(R - 1))
    errors = [
        residual_norm(A, randomized_range_finder(A, R, generator=seeded_generator(seed), sketch=sketch))
        for seed in range(40)
    ]
    mean = sum(errors) / len(errors)
    assert tail[R:].sum().sqrt() < mean < bound
    # A test matrix whose columns are all but dependent must be caught.
    spoilt = torch.randn(N, 3, dtype=torch.float64) @ torch.randn(3, R, dtype=torch.float64)
    assert residual_norm(A, torch.linalg.qr(A @ spoilt).Q[:, :3]) > bound


@pytest.mark.parametrize("sketch", ["gaussian", "sparse_sign", "hadamard", "sampling"])
@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_all_sketches_capture_the_same_energy(sketch: str, shape: tuple[int, int]) -> None:
    A = with_spectrum(slow(M), *shape).float()
    best = (slow(M)[:R].norm() / slow(M).norm()).item()
    for n_iter, floor in ((0, 0.83), (1, 0.96)):
        found = find(A, R, sketch=sketch, n_iter=n_iter)
        assert orthogonality_error(found.basis) < 5e-6
        assert captured_energy(A, found.basis) > floor * best
    half = find(A.bfloat16(), R, sketch=sketch).basis
    assert captured_energy(A, half) > 0.83 * best
    batch = torch.stack([A, torch.zeros_like(A)])
    assert orthogonality_error(find(batch, R, sketch=sketch).basis).max() < 5e-6
    full = find(A, min(shape), sketch=sketch)
    # 96 columns of a Hadamard matrix of order 128, cut to 96 rows, need not be independent.
    assert captured_energy(A, full.basis) > (0.95 if sketch == "hadamard" else 1 - 1e-5)


def test_sampling_finds_what_is_in_few_columns() -> None:
    A = torch.zeros(40, 400)
    A[:, [3, 77, 350]] = torch.randn(40, 3)
    assert captured_energy(A, find(A, 3, sketch="sampling").basis) == pytest.approx(1)


def test_the_simple_finder_is_the_other_one() -> None:
    A = torch.randn(M, N)
    for settings in ({}, {"n_iter": 1}, {"n_oversamples": 4}, {"sketch": "hadamard"}):
        Q = randomized_range_finder(A, R, generator=seeded_generator(0), **settings)
        rotate = "n_oversamples" in settings
        assert torch.equal(Q, find(A, R, rotate=rotate, **settings).basis)
    torch.manual_seed(1)
    first = randomized_range_finder(A, R)
    assert not torch.equal(first, randomized_range_finder(A, R))
    torch.manual_seed(1)
    assert torch.equal(first, randomized_range_finder(A, R))


def test_warm_start() -> None:
    A = with_spectrum(slow(M), M, N)
    best = slow(M)[:R].norm() / slow(M).norm()
    cold = find(A, R)
    warm = find(A, R, start=cold.basis)
    assert captured_energy(A, cold.basis) < 0.95 * best
    assert captured_energy(A, warm.basis) > 0.97 * best
    # the power step of the old basis, and no random numbers
    expected = torch.linalg.qr(A @ (A.mT @ cold.basis)).Q
    assert subspace_overlap(warm.basis, expected) == pytest.approx(1)
    assert torch.equal(warm.basis, find(A, R, 1, start=cold.basis).basis)
    # A direction that neither the start nor its rows know is found through fresh columns only.
    U, V = (exact_basis(torch.randn(k, R + 1, dtype=torch.float64), R + 1).basis for k in (M, N))
    moved = U[:, :R] @ V[:, :R].mT + 3 * U[:, R:] @ V[:, R:].mT
    assert (find(moved, R, start=U[:, :R]).basis.mT @ U[:, R]).norm() < 1e-9
    assert (find(moved, R, start=U[:, : 3 * R // 4]).basis.mT @ U[:, R]).norm() > 0.8
    for dtype in (torch.float32, torch.bfloat16):
        low = find(A.to(dtype), R, start=cold.basis.to(dtype))
        assert orthogonality_error(low.basis) < 5e-6
        assert captured_energy(A, low.basis) > 0.965 * best
    batch = find(torch.stack([A, 2 * A]), R, start=torch.stack([cold.basis] * 2))
    torch.testing.assert_close(batch.basis[1], warm.basis)
    zero = find(torch.zeros(M, N), R, start=cold.basis.float())
    assert orthogonality_error(zero.basis) < 5e-6


@pytest.mark.parametrize("start", [torch.zeros(M, R + 1), torch.zeros(M + 1, R), torch.zeros(2, M, R)])
def test_a_start_that_does_not_fit_is_refused(start: Tensor) -> None:
    with pytest.raises(ValueError, match="start of shape"):
        find(torch.randn(M, N), R, start=start)


# The rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"n_iter": 1}, {"n_oversamples": 8}])
@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_rotation_to_singular_directions(shape: tuple[int, int], settings: dict) -> None:
    A = with_spectrum(slow(M), *shape).float()
    Q, projected, singular_values = find(A, R, **settings)
    assert Q.shape == (shape[0], R)
    assert orthogonality_error(Q) < 5e-6
    assert (projected - Q.mT @ A).norm() <= 1e-6 * projected.norm()
    gram = (Q.mT.double() @ A.double()) @ (A.double().mT @ Q.double())
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4 * gram[0, 0]
    assert (singular_values.diff() <= 0).all()
    torch.testing.assert_close(singular_values.double(), gram.diagonal().sqrt(), rtol=1e-4, atol=1e-5)
    assert torch.equal(canonical_signs(Q), torch.ones(1, R))


def test_rotation_keeps_the_span() -> None:
    A = with_spectrum(slow(M), M, N).float()
    plain = find(A, R, rotate=False)
    assert plain.projected is None
    assert plain.singular_values is None
    assert torch.equal(canonical_signs(plain.basis), torch.ones(1, R))
    assert subspace_overlap(plain.basis, find(A, R).basis) == pytest.approx(1, abs=1e-5)


# Views, batches, dtypes ----------------------------------------------------------------------------------------------


def test_input_is_not_modified_and_layout_does_not_matter() -> None:
    A = torch.randn(M, N)
    kept = A.clone()
    rows, columns = find(A, R), find(A.mT.contiguous().mT, R)
    assert torch.equal(A, kept)
    torch.testing.assert_close(rows.basis, columns.basis, rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.projected, columns.projected, rtol=0, atol=1e-3)


def test_a_transposed_matrix_gives_the_transposed_result() -> None:
    # The projected side comes first: the right basis of A is the left basis of Aᵀ, from the same view.
    A = with_spectrum(slow(M), M, N)
    from_view, from_copy = find(A.mT, R), find(A.mT.contiguous(), R)
    torch.testing.assert_close(from_view.basis, from_copy.basis)
    left, right = exact_basis(A, R), exact_basis(A.mT, R)
    torch.testing.assert_close(left.singular_values, right.singular_values)
    # the same rank-one terms: u of A is the (normalised, signed) row of the projection of Aᵀ
    other = right.projected.mT / right.singular_values
    torch.testing.assert_close(other * canonical_signs(other), left.basis)


@pytest.mark.parametrize("settings", [{}, {"n_iter": 1, "n_oversamples": 3}, {"rotate": False}])
def test_batch_is_a_loop(settings: dict) -> None:
    A = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    batch = find(A, 5, **settings)
    generator = seeded_generator(0)
    for index, matrix in enumerate(A.reshape(6, 20, 28)):
        single = range_finder(matrix, 5, generator=generator, **settings)
        for one, all_ in zip(single, batch, strict=True):
            if one is not None:
                torch.testing.assert_close(one, all_.reshape(6, *one.shape)[index])
    exact = exact_basis(A, 5)
    torch.testing.assert_close(exact.basis[1, 2], exact_basis(A[1, 2], 5).basis)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_iter", [0, 1])
def test_half_precision(dtype: torch.dtype, n_iter: int) -> None:
    A = with_spectrum(slow(M), M, N).float()
    A = A / A.abs().max()
    half = find(A.to(dtype), R, n_iter=n_iter)
    assert half.basis.dtype == half.projected.dtype == half.singular_values.dtype == torch.float32
    full = captured_energy(A, find(A, R, n_iter=n_iter).basis)
    assert abs(captured_energy(A, half.basis) - full) < 2e-3
    # the sketch is rounded, the projection is not
    expected = half.basis.mT.double() @ A.to(dtype).double()
    assert (half.projected - expected).norm() < 1e-6 * expected.norm()
    assert orthogonality_error(half.basis) < 5e-6


def test_float64_stays_float64() -> None:
    A = torch.randn(12, 16, dtype=torch.float64)
    for found in (find(A, 4), exact_basis(A, 4)):
        assert {t.dtype for t in found} == {torch.float64}
        assert orthogonality_error(found.basis) < 1e-13
    assert randomized_svd(A, 3, generator=seeded_generator(0)).S.dtype == torch.float64


def test_scaling_by_a_power_of_two_changes_no_bit() -> None:
    # As a loss scale does.
    A = torch.randn(2, 24, 32)
    for settings in ({}, {"n_iter": 1}):
        plain, scaled = find(A, 6, **settings), find(A * 2.0**20, 6, **settings)
        assert torch.equal(plain.basis, scaled.basis)
        assert torch.equal(plain.projected * 2.0**20, scaled.projected)
        assert torch.equal(plain.singular_values * 2.0**20, scaled.singular_values)


def test_gradients_are_not_recorded() -> None:
    A = torch.randn(6, 8, requires_grad=True)
    assert not find(A, 2).basis.requires_grad
    assert not exact_basis(A, 2).projected.requires_grad
    assert not randomized_svd(A, 2, generator=seeded_generator(0)).U.requires_grad


def test_operators_are_accepted() -> None:
    A = torch.randn(12, 16)
    assert torch.equal(find(DenseOperator(A), 3).basis, find(A, 3).basis)
    assert torch.equal(exact_basis(DenseOperator(A), 3).basis, exact_basis(A, 3).basis)


# Degenerate input ----------------------------------------------------------------------------------------------------

NOISE = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
UNIT = NOISE / NOISE.abs().max()
DEGENERATE = {
    "zero": torch.zeros(32, 48),
    "rank 4": NOISE[:, :4] @ NOISE[:4],
    "one row": NOISE[:1],
    "one column": NOISE[:, :1],
    "tall": NOISE.mT,
    "1e-30": NOISE * 1e-30,
    "3e37": UNIT * 3e37,
    "largest": UNIT * 3.4e38,
    "subnormal": UNIT * 1e-41,
    "smallest": torch.full((32, 48), 1e-45),
    "mixed batch": torch.stack([NOISE, NOISE * 0, NOISE * 1e-30, UNIT * 3e37]),
    "fp16 large": (UNIT * 65000).half(),
    "fp16 small": (UNIT * 1e-6).half(),
    "fp16 subnormal": (UNIT * 2e-7).half(),
    "bf16 small": (UNIT * 1e-34).bfloat16(),  # bfloat16 products of the processor flush subnormals to zero
    "fp64 small": NOISE.double() * 1e-300,
    "fp64 large": NOISE.double() * 1e300,
}


@pytest.mark.parametrize("rank", ["one", "four", "min(m, n)", "m"])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate(kind: str, rank: str) -> None:
    A = DEGENERATE[kind]
    m, n = A.shape[-2:]
    r = {"one": 1, "four": min(m, 4), "min(m, n)": min(m, n), "m": m}[rank]
    exact = exact_basis(A, r)
    best = captured_energy(A, exact.basis)
    assert orthogonality_error(exact.basis).max() < 5e-6
    unit = A.double() / A.abs().amax().double().clamp_min(1e-320)
    for settings in ({}, {"n_iter": 1}, {"n_iter": 2, "n_oversamples": 8}, {"rotate": False}):
        found = find(A, r, **settings)
        assert found.basis.shape == (*A.shape[:-2], m, r)
        assert orthogonality_error(found.basis).max() < 5e-6
        # unit vectors, which under- and overflow silently lead to, would be caught by the energy
        assert (captured_energy(A, found.basis) >= 0.6 * best).all()
    for found in (exact, find(A, r), find(A, r, n_iter=1)):
        if kind == "largest":
            continue  # the norm of a row is beyond float32
        assert found.projected.isfinite().all()
        assert found.singular_values.isfinite().all()
        expected = found.basis.mT.double() @ unit
        got = found.projected.double() / A.abs().amax().double().clamp_min(1e-320)
        coarse = {"subnormal": 1e-3, "smallest": 1e-1}  # the spacing of the result's own dtype
        assert (got - expected).norm() <= coarse.get(kind, 2e-6) * expected.norm()


def test_zero_matrix_is_deterministic() -> None:
    for found in (find(torch.zeros(6, 8), 3, seed=1), exact_basis(torch.zeros(6, 8), 3)):
        assert orthogonality_error(found.basis) < 1e-6
        assert not found.projected.any()
        assert not found.singular_values.any()
    assert torch.equal(find(torch.zeros(6, 8), 3, seed=1).basis, find(torch.zeros(6, 8), 3, seed=2).basis)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    A = torch.randn(2, 6, 8, dtype=dtype)
    A[1, 2, 3] = value
    calls = (lambda: find(A, 2), lambda: exact_basis(A, 2), lambda: randomized_svd(A, 2, generator=seeded_generator(0)))
    for call in calls:
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_impossible_rank_is_refused(rank: int) -> None:
    A = torch.randn(6, 8)
    calls = (
        lambda: find(A, rank),
        lambda: exact_basis(A, rank),
        lambda: randomized_svd(A, rank, generator=seeded_generator(0)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"rank={rank} .*m=6.*between 1 and 6"):
            call()


def test_other_bad_settings_are_refused() -> None:
    A = torch.randn(6, 4)
    with pytest.raises(ValueError, match="n_oversamples=-1"):
        find(A, 2, n_oversamples=-1)
    with pytest.raises(ValueError, match="n_iter=-2"):
        find(A, 2, n_iter=-2)
    with pytest.raises(ValueError, match="sketch='dct' is unknown"):
        find(A, 2, sketch="dct")
    with pytest.raises(ValueError, match="rotate=True"):
        find(A, 2, n_oversamples=2, rotate=False)
    with pytest.raises(ValueError, match=r"rank=5 .* 4 singular values"):
        randomized_svd(A, 5, generator=seeded_generator(0))


# Exact basis and randomised SVD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
def test_exact_basis_is_the_svd(shape: tuple[int, int]) -> None:
    A = torch.randn(*shape, dtype=torch.float64)
    U, S, _ = torch.linalg.svd(A, full_matrices=False)
    found = exact_basis(A, 7)
    torch.testing.assert_close(found.basis, U[:, :7] * canonical_signs(U[:, :7]))
    torch.testing.assert_close(found.singular_values, S[:7])
    torch.testing.assert_close(found.projected, found.basis.mT @ A)


def test_exact_basis_is_completed_beyond_n() -> None:
    A = torch.randn(2, 30, 10)
    found = exact_basis(A, 25)
    assert found.basis.shape == (2, 30, 25)
    assert found.projected.shape == (2, 25, 10)
    assert orthogonality_error(found.basis).max() < 5e-6
    torch.testing.assert_close(found.basis[..., :10] @ found.projected[..., :10, :], A, rtol=1e-4, atol=1e-5)
    assert not found.singular_values[..., 10:].any()
    assert (found.basis[..., 10:].mT @ A).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_randomized_svd_against_torch(shape: tuple[int, int]) -> None:
    A = with_spectrum(exponential(60), *shape)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    signs = canonical_signs(U[:, :10])
    found = randomized_svd(A, 10, generator=seeded_generator(0), n_oversamples=10, n_iter=3)
    torch.testing.assert_close(found.S, S[:10], rtol=1e-8, atol=0)
    torch.testing.assert_close(found.U, U[:, :10] * signs, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.Vh, Vh[:10] * signs.mT, rtol=0, atol=1e-4)
    assert orthogonality_error(found.Vh.mT) < 1e-12


def test_randomized_svd_of_a_low_rank_matrix_is_exact() -> None:
    A = with_spectrum(torch.tensor([5.0, 2.0, 1e-4]), 40, 50).float()
    U, S, Vh = randomized_svd(A, 3, generator=seeded_generator(0))
    torch.testing.assert_close(U * S @ Vh, A, rtol=0, atol=1e-6)
    assert S.tolist() == pytest.approx([5, 2, 1e-4], rel=1e-2)


def test_randomized_svd_in_a_batch_at_extreme_scales() -> None:
    A = torch.stack([NOISE * 1e-30, UNIT * 3e37])
    U, S, Vh = randomized_svd(A, 32, generator=seeded_generator(0))
    assert orthogonality_error(U).max() < 5e-6
    largest = A.abs().amax(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(U * (S.unsqueeze(-2) / largest) @ Vh, A / largest, rtol=0, atol=1e-5)
