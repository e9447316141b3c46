from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.fft import dct
from torch import Tensor

from linalg.spectra import slow, with_spectrum
from subspan.linalg import (
    captured_energy,
    dct_basis,
    exact_basis,
    grassmann_step,
    largest_rows,
    oja_step,
    orthogonality_error,
    power_step,
    principal_angles,
    random_stiefel,
    seeded_generator,
    subspace_overlap,
    svd_update,
)

M, N, R = 40, 60, 8
STEPS = {
    "power": power_step,
    "oja": lambda A, Q: oja_step(A, Q, 5.0),
    "grassmann": lambda A, Q: grassmann_step(A, Q, 10.0),
}


def start(m: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_stiefel(m, R, generator=seeded_generator(0), dtype=dtype)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_tracking_converges_on_both_sides(step: str, transposed: bool) -> None:
    sigma = torch.cat([torch.linspace(4, 3, R), 0.3 * torch.ones(M - R)])
    A = with_spectrum(sigma, M, N)
    A = A.mT if transposed else A
    Q = first = start(A.shape[-2])
    best = sigma[:R].norm() / sigma.norm()
    energies = [captured_energy(A, Q)]
    for _ in range(150):
        Q = STEPS[step](A, Q)
        energies.append(captured_energy(A, Q))
    assert energies[0] < 0.7 * best
    assert energies[-1] > 0.999 * best
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(energies)) or step != "power"
    assert orthogonality_error(Q) < 1e-12
    assert subspace_overlap(first, Q) < 0.9  # the subspace has moved


@pytest.mark.parametrize("step", STEPS)
def test_scale_dtype_batch_and_zero(step: str) -> None:
    A, Q = with_spectrum(slow(M), M, N).float(), start(M, torch.float32)
    moved = STEPS[step](A, Q)
    torch.testing.assert_close(STEPS[step](A * 2.0**90, Q), moved, rtol=0, atol=1e-6)
    assert captured_energy(A, moved) > captured_energy(A, Q) + 0.01
    half = STEPS[step](A.bfloat16(), Q.bfloat16().float())
    assert half.dtype == torch.float32
    assert subspace_overlap(half, moved) > 0.99
    batch = STEPS[step](torch.stack([A, torch.zeros_like(A)]), torch.stack([Q, Q]))
    torch.testing.assert_close(batch[0], moved, rtol=0, atol=1e-5)
    assert orthogonality_error(batch).max() < 5e-6
    if step != "power":
        torch.testing.assert_close(batch[1], Q, rtol=0, atol=1e-6)
    kept = STEPS[step](A, exact_basis(A, R).basis)
    assert subspace_overlap(kept, exact_basis(A, R).basis) > 0.99999


def test_power_step_does_not_flip_columns() -> None:
    A = with_spectrum(slow(M), M, N)
    Q = exact_basis(A, R).basis
    torch.testing.assert_close(power_step(A, -Q), -Q)


def test_grassmann_step_follows_the_geodesic() -> None:
    A, Q = with_spectrum(slow(M), M, N), start(M)
    # One direction turns by φ = step·σ, the others stay.
    D = (A @ A.mT @ Q - Q @ (Q.mT @ A @ A.mT @ Q)) / A.norm() ** 2
    sigma = torch.linalg.matrix_norm(D, ord=2).item()
    angles = principal_angles(Q, grassmann_step(A, Q, 0.7))
    assert angles[-1].item() == pytest.approx(0.7 * sigma, rel=1e-9)
    assert angles[:-1].max() < 1e-9
    # The descent of the error is that of the gradient, to first order: 2σ² for each unit of the step.
    h = 1e-5
    error = [(A - P @ (P.mT @ A)).square().sum() / A.square().sum() for P in (Q, grassmann_step(A, Q, h))]
    assert ((error[0] - error[1]) / h).item() == pytest.approx(2 * sigma**2, rel=1e-3)
    # the whole of a turn at most
    assert principal_angles(Q, grassmann_step(A, Q, 1e6))[-1].item() == pytest.approx(math.pi / 2, abs=1e-6)
    assert torch.equal(grassmann_step(A, Q, 0.0), Q)


def test_oja_step_is_the_gradient_step() -> None:
    A, Q = with_spectrum(slow(M), M, N), start(M)
    X = Q.clone().requires_grad_()
    loss = (A - X @ (X.mT @ A)).square().sum() / (2 * A.square().sum())
    (gradient,) = torch.autograd.grad(loss, X)
    expected = torch.linalg.qr(Q - 0.3 * (gradient - Q @ (Q.mT @ gradient))).Q
    assert subspace_overlap(oja_step(A, Q, 0.3), expected) == pytest.approx(1)
    torch.testing.assert_close(oja_step(A, Q, 0.0), Q)


def test_svd_update_without_truncation_is_the_svd_of_all_columns() -> None:
    blocks = torch.randn(2, 30, 12, dtype=torch.float64).split(3, dim=-1)
    U, S, _ = torch.linalg.svd(blocks[0], full_matrices=False)
    for count, block in enumerate(blocks[1:], start=2):
        U, S = svd_update(U, S, block, rank=3 * count)
    everything = torch.cat(blocks, dim=-1)
    torch.testing.assert_close(S, torch.linalg.svdvals(everything))
    torch.testing.assert_close((U * S.unsqueeze(-2).square()) @ U.mT, everything @ everything.mT)


def test_svd_update_truncated_forgetting_and_degenerate() -> None:
    A = with_spectrum(torch.tensor([5.0, 4.0, 3.0, 1e-3, 1e-3]), 30, 50)
    U, S = torch.eye(30, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for block in A.split(5, dim=1):
        U, S = svd_update(U, S, block)
    assert S.tolist() == pytest.approx([5, 4, 3], rel=1e-3)
    assert captured_energy(A, U) > 0.9999
    # columns in the span of U, none at all, and more than there is room for
    for C in (U @ torch.randn(3, 2, dtype=torch.float64), torch.zeros(30, 2), torch.randn(30, 40)):
        V, s = svd_update(U, S, C)
        assert orthogonality_error(V) < 1e-12
        assert (s.diff() <= 0).all()
    assert svd_update(U, S, torch.zeros(30, 1), forget=0.5)[1].tolist() == pytest.approx((0.5 * S).tolist())
    assert not svd_update(U, S, torch.zeros(30, 1), forget=0.0)[1].any()


def test_largest_rows() -> None:
    A = torch.randn(2, 9, 5) * 1e30
    A[:, 4] *= 100
    A[0, 7] *= 50
    A[1, 0] *= 50
    assert largest_rows(A, 2).tolist() == [[4, 7], [0, 4]]
    assert largest_rows(A.mT.contiguous().mT, 9).tolist() == [list(range(9))] * 2
    assert largest_rows(torch.zeros(3, 2), 1).shape == (1,)
    columns = torch.zeros(3, 4)
    columns[1, 2] = 1
    assert largest_rows(columns.mT, 1).tolist() == [2]


@pytest.mark.parametrize("m", [1, 2, 7, 32])
def test_dct_basis_is_that_of_scipy(m: int) -> None:
    Q = dct_basis(m, dtype=torch.float64)
    x = torch.randn(m, 3, dtype=torch.float64)
    torch.testing.assert_close(Q.mT @ x, torch.from_numpy(dct(x.numpy(), norm="ortho", axis=0)))
    assert orthogonality_error(Q) < 1e-12


def test_bad_input_is_refused() -> None:
    A, Q = torch.randn(6, 8), torch.eye(6, 2)
    for step in STEPS.values():
        with pytest.raises(ValueError, match="does not fit"):
            step(A, torch.eye(8, 2))
        with pytest.raises(ValueError, match="NaN or infinite"):
            step(A / 0, Q)
    for step in (oja_step, grassmann_step):
        for value in (-1.0, math.nan):
            with pytest.raises(ValueError, match="step="):
                step(A, Q, value)
    for r in (0, 7):
        with pytest.raises(ValueError, match=f"r={r}"):
            largest_rows(A, r)
    S = torch.ones(2)
    with pytest.raises(ValueError, match="do not fit"):
        svd_update(Q, torch.ones(3), A)
    with pytest.raises(ValueError, match="forget=2"):
        svd_update(Q, S, A, forget=2)
    with pytest.raises(ValueError, match="rank=7"):
        svd_update(Q, S, A, rank=7)
    with pytest.raises(ValueError, match="C has a NaN"):
        svd_update(Q, S, A / 0)
