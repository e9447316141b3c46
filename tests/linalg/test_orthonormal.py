from __future__ import annotations

import math

import pytest
import torch

from linalg.spectra import with_spectrum
from subspan.linalg import canonical_signs, orthogonality_error, orthonormalize, random_stiefel, seeded_generator

METHODS = ("householder", "cholesky", "shifted_cholesky", "sketched_cholesky", "gram_schmidt", "newton_schulz")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gaussian", "graded", "rank 4", "zero", "equal columns", "subnormal", "huge"])
def test_orthonormalize_any_finite_matrix(kind: str, method: str) -> None:
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
    Q = orthonormalize(Y, method=method)
    assert Q.shape == Y.shape
    assert orthogonality_error(Q).shape == (3,)
    assert orthogonality_error(Q).max() < 10 * 6e-8 * math.sqrt(16)


@pytest.mark.parametrize("method", METHODS)
def test_orthonormalize_spans_the_columns(method: str) -> None:
    Y = torch.randn(20, 6, dtype=torch.float64)
    Q = orthonormalize(Y, method=method)
    assert Q.dtype == torch.float64
    torch.testing.assert_close(Q @ (Q.mT @ Y), Y)


def test_orthonormalize_half_precision_in_float32() -> None:
    Q = orthonormalize(torch.randn(64, 16).bfloat16())
    assert Q.dtype == torch.float32
    assert orthogonality_error(Q) < 5e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 6e-8), (torch.float64, 1.2e-16), (torch.bfloat16, 6e-8)])
@pytest.mark.parametrize("kappa", [1, 1e2, 1e4, 1e6, 1e10])
def test_every_method_is_orthonormal_to_rounding(method: str, dtype: torch.dtype, unit: float, kappa: float) -> None:
    for m, r in ((120, 30), (20, 20), (50, 1)):
        Y = with_spectrum(torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64), m, r).to(dtype)
        Q = orthonormalize(Y, method=method)
        assert orthogonality_error(Q) <= 10 * unit * math.sqrt(r)
        assert Q.dtype == torch.promote_types(dtype, torch.float32)
        if kappa * unit < 1e-3:
            Y = Y.to(Q.dtype)
            assert torch.linalg.matrix_norm(Y - Q @ (Q.mT @ Y)) < 1e2 * unit * kappa


@pytest.mark.parametrize(
    ("method", "safe", "broken"),
    [
        ("cholesky", 1e2, 1e6),
        ("shifted_cholesky", 1e5, 1e10),
        ("sketched_cholesky", 1e6, math.inf),
        ("gram_schmidt", 1e6, math.inf),
        ("newton_schulz", 1e4, 1e8),
    ],
)
def test_without_the_fallback_the_condition_number_decides(method: str, safe: float, broken: float) -> None:
    def error(kappa: float) -> float:
        sigma = torch.logspace(0, -math.log10(kappa), 24, dtype=torch.float64)
        Y = with_spectrum(sigma, 100, 24).float() if kappa < math.inf else torch.zeros(100, 24)
        Q = orthonormalize(Y, method=method, fallback=False)
        return orthogonality_error(Q).item() if Q.isfinite().all() else math.inf

    assert error(safe) < 3e-6
    assert error(broken) > 1e-2


def test_the_fallback_replaces_what_failed_and_nothing_else() -> None:
    good, bad = torch.randn(30, 5), torch.zeros(30, 5)
    Q = orthonormalize(torch.stack([good, bad]), method="cholesky")
    torch.testing.assert_close(Q[0], orthonormalize(good, method="cholesky"), rtol=0, atol=1e-6)
    torch.testing.assert_close(Q[1], orthonormalize(bad))


def test_cholesky_qr_has_a_positive_diagonal() -> None:
    Y = torch.randn(2, 30, 5, dtype=torch.float64)
    R = orthonormalize(Y, method="cholesky").mT @ Y
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_newton_schulz_is_the_polar_factor() -> None:
    Y = torch.randn(30, 5, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(Y, full_matrices=False)
    torch.testing.assert_close(orthonormalize(Y, method="newton_schulz"), U @ Vh)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method='qr'.*'newton_schulz'"):
        orthonormalize(torch.randn(4, 2), method="qr")


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
    assert canonical_signs(torch.tensor([[-2.0, 0.0], [2.0, -0.0]])).tolist() == [[1.0, 1.0]]  # ties
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
