from __future__ import annotations

import math

import pytest
import torch

from subspan.linalg import canonical_signs, orthogonality_error, orthonormalize, random_stiefel, seeded_generator


@pytest.mark.parametrize("kind", ["gaussian", "graded", "rank 4", "zero", "equal columns", "subnormal", "huge"])
def test_orthonormalize_any_finite_matrix(kind: str) -> None:
    Y = torch.randn(3, 64, 16)
    Y = {
        "gaussian": Y,
        "graded": Y * torch.logspace(0, -12, 16),
        "rank 4": torch.randn(3, 64, 4) @ torch.randn(3, 4, 16),
        "zero": torch.zeros_like(Y),
        "equal columns": Y[..., :1].expand_as(Y),
        "subnormal": Y * 1e-41,
        "huge": Y * 1e37,
    }[kind]
    Q = orthonormalize(Y)
    assert Q.shape == Y.shape
    assert orthogonality_error(Q).shape == (3,)
    assert orthogonality_error(Q).max() < 5e-6


def test_orthonormalize_spans_the_columns() -> None:
    Y = torch.randn(20, 6, dtype=torch.float64)
    Q = orthonormalize(Y)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q @ (Q.mT @ Y), Y)


def test_orthonormalize_half_precision_in_float32() -> None:
    Q = orthonormalize(torch.randn(64, 16).bfloat16())
    assert Q.dtype == torch.float32
    assert orthogonality_error(Q) < 5e-6


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="5 columns of length 4"):
        orthonormalize(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"r=5 .* m=4"):
        random_stiefel(4, 5, generator=seeded_generator(0))


def test_orthogonality_error_is_the_spectral_norm() -> None:
    Q = torch.eye(5, 2)
    Q[0, 1] = 0.5  # QᵀQ − I = [[0, .5], [.5, .25]], eigenvalues .125 ± sqrt(.265625)
    assert orthogonality_error(Q).item() == pytest.approx(0.125 + math.sqrt(0.265625), rel=1e-6)


def test_canonical_signs() -> None:
    Q = torch.tensor([[1.0, -3.0, 0.0], [-2.0, 2.0, 0.0]])
    assert canonical_signs(Q).tolist() == [[-1.0, -1.0, 1.0]]
    Q = torch.randn(4, 9, 5)
    signs = canonical_signs(Q)
    assert signs.shape == (4, 1, 5)
    fixed = Q * signs
    assert (fixed.amax(-2) >= -fixed.amin(-2)).all()
    assert torch.equal(fixed * canonical_signs(fixed), fixed)
    assert torch.equal(-Q * canonical_signs(-Q), fixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_stiefel_is_orthonormal(dtype: torch.dtype) -> None:
    Q = random_stiefel(32, 8, generator=seeded_generator(0), batch_shape=(2,), dtype=dtype)
    assert Q.shape == (2, 32, 8)
    assert Q.dtype == dtype
    assert orthogonality_error(Q).max() < (2e-2 if dtype == torch.bfloat16 else 5e-6)
    assert not torch.equal(Q[0], Q[1])


def test_random_stiefel_is_haar() -> None:
    # The law of a uniform sample: columns with symmetric signs (LAPACK alone gives Q[0, 0] < 0 always), entries with
    # E[m q²] = 1 and E[(√m q)⁴] = 3m/(m+2), projector with mean (r/m) I. Bounds are five standard errors.
    m, r, count = 8, 3, 4000
    Q = random_stiefel(m, r, generator=seeded_generator(1), batch_shape=(count,), dtype=torch.float64)
    assert abs((Q[:, 0, 0] < 0).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(count)
    assert abs(math.sqrt(m) * Q[:, 0, 0].mean().item()) < 5 / math.sqrt(count)
    assert abs((m * Q.square()).mean().item() - 1) < 1e-12
    assert abs((math.sqrt(m) * Q).pow(4).mean().item() - 3 * m / (m + 2)) < 0.05
    assert ((Q @ Q.mT).mean(0) - torch.eye(m, dtype=torch.float64) * r / m).abs().max() < 0.025


def test_random_stiefel_with_as_many_columns_as_rows_covers_both_components() -> None:
    Q = random_stiefel(3, 3, generator=seeded_generator(2), batch_shape=(400,), dtype=torch.float64)
    assert abs((torch.linalg.det(Q) > 0).double().mean().item() - 0.5) < 0.125
