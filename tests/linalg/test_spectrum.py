from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import subspace_angles

from linalg.spectra import with_spectrum
from subspan.linalg import (
    captured_energy,
    effective_rank,
    energy_curve,
    exact_basis,
    nuclear_norm_bound,
    principal_angles,
    random_stiefel,
    rank_for_energy,
    seeded_generator,
    stable_rank,
    subspace_overlap,
)


def plane(angle: float) -> torch.Tensor:
    """The plane spanned by e₁ and cos(angle) e₂ + sin(angle) e₃."""
    Q = torch.zeros(4, 2, dtype=torch.float64)
    Q[0, 0], Q[1, 1], Q[2, 1] = 1, math.cos(angle), math.sin(angle)
    return Q


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, math.pi / 4, 1.5, math.pi / 2])
def test_principal_angles_small_and_large(angle: float) -> None:
    angles = principal_angles(plane(0), plane(angle))
    assert angles[0] == pytest.approx(0, abs=1e-12)
    assert angles[1] == pytest.approx(angle, rel=1e-9, abs=1e-12)  # an arc cosine would give 0 for 1e-9


def test_principal_angles_against_scipy() -> None:
    Q1 = random_stiefel(30, 6, generator=seeded_generator(0), batch_shape=(2,), dtype=torch.float64)
    Q2 = random_stiefel(30, 9, generator=seeded_generator(1), batch_shape=(2,), dtype=torch.float64)
    angles = principal_angles(Q1, Q2)
    assert angles.shape == (2, 6)
    torch.testing.assert_close(principal_angles(Q2, Q1), angles)
    for i in range(2):
        expected = torch.from_numpy(subspace_angles(Q1[i].numpy(), Q2[i].numpy()).copy()).flip(0)
        torch.testing.assert_close(angles[i], expected)
    torch.testing.assert_close(subspace_overlap(Q1, Q2), angles.cos().square().mean(-1))


def test_overlap() -> None:
    Q = random_stiefel(20, 5, generator=seeded_generator(0), dtype=torch.float64)
    turned = Q @ random_stiefel(5, 5, generator=seeded_generator(1), dtype=torch.float64)
    assert subspace_overlap(Q, turned).item() == pytest.approx(1)
    assert subspace_overlap(Q, Q[:, :2]).item() == pytest.approx(1)
    assert subspace_overlap(torch.eye(6)[:, :3], torch.eye(6)[:, 3:]) == 0
    assert subspace_overlap(torch.eye(4)[:, :2].bfloat16(), torch.eye(4)[:, 1:3]) == 0.5
    random = random_stiefel(20, 5, generator=seeded_generator(2), batch_shape=(300,))
    assert subspace_overlap(random, Q.float()).mean().item() == pytest.approx(5 / 20, abs=0.02)


def test_different_spaces_are_refused() -> None:
    for function in (subspace_overlap, principal_angles):
        with pytest.raises(ValueError, match="length 4 and Q2 of length 5"):
            function(torch.eye(4), torch.eye(5))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_energy(dtype: torch.dtype, scale: float) -> None:
    A = (torch.rand(2, 6, 9) * scale).to(dtype)
    Q = torch.eye(6)[:, :2].expand(2, 6, 2)
    unit = A.double() / scale
    expected = (unit[:, :2].square().sum((1, 2)) / unit.square().sum((1, 2))).sqrt().float()
    torch.testing.assert_close(captured_energy(A, Q), expected)


def test_captured_energy_of_nothing_is_everything() -> None:
    assert captured_energy(torch.zeros(3, 4), torch.eye(3)[:, :1]) == 1


SIGMA = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)  # squares 64, 16, 4, 1


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e36])
def test_ranks_of_a_known_spectrum(shape: tuple[int, int], scale: float) -> None:
    A = (with_spectrum(SIGMA, *shape) * scale).float()
    A = torch.stack([A, torch.zeros_like(A)])
    assert stable_rank(A).tolist() == pytest.approx([85 / 64, 0], rel=1e-5)
    p = SIGMA / 15
    assert effective_rank(A).tolist() == pytest.approx([(-p * p.log()).sum().exp().item(), 0], rel=1e-4)
    expected = (SIGMA.square().cumsum(0) / 85).tolist()
    assert energy_curve(A)[0].tolist() == pytest.approx([*expected, 1, 1], rel=1e-5)
    assert energy_curve(A)[1].tolist() == [1] * 6
    for share, rank in ((0.5, 1), (0.76, 2), (0.95, 3), (0.99, 4)):
        assert rank_for_energy(A, share).tolist() == [rank, 1]
    bound = nuclear_norm_bound(A, n_iter=20) / scale
    assert bound.tolist() == pytest.approx([15, 0], rel=1e-4)


def test_whole_energy_needs_the_whole_rank_and_no_more() -> None:
    assert rank_for_energy(torch.eye(5, 7), 1.0) == 5
    assert rank_for_energy(torch.diag(torch.tensor([1.0, 0.0, 1.0])), 1.0) == 2
    for share in (0.0, 1.01, -1, math.nan):
        with pytest.raises(ValueError, match="share="):
            rank_for_energy(torch.eye(3), share)


def test_energy_curve_is_what_the_best_basis_captures() -> None:
    A = torch.randn(12, 20, dtype=torch.float64)
    curve = energy_curve(A)
    for rank in (1, 5, 12):
        assert captured_energy(A, exact_basis(A, rank).basis).square().item() == pytest.approx(curve[rank - 1].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nuclear_norm_is_bounded_from_below(dtype: torch.dtype) -> None:
    A = torch.randn(3, 20, 30).to(dtype)
    norm = torch.linalg.matrix_norm(A.float(), ord="nuc")
    bounds = torch.stack([nuclear_norm_bound(A, n_iter=n) for n in (0, 3, 10, 25)])
    assert (bounds.diff(dim=0) > -1e-3).all()
    assert (bounds <= norm * (1 + 1e-5)).all()
    assert (bounds[2] > 0.95 * norm).all()
    torch.testing.assert_close(bounds[3], norm, rtol=1e-3, atol=0)
    torch.testing.assert_close(nuclear_norm_bound(A.mT), bounds[2])


@pytest.mark.parametrize("function", [stable_rank, effective_rank, energy_curve, nuclear_norm_bound])
def test_spectra_of_bad_matrices_are_refused(function) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        function(torch.full((3, 4), math.inf))
    with pytest.raises(TypeError, match="int64"):
        function(torch.ones(3, 4, dtype=torch.int64))
