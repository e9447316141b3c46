from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import subspace_angles

from subspan.linalg import captured_energy, principal_angles, random_stiefel, seeded_generator, subspace_overlap


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
