from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lapack

from linalg.spectra import exponential, slow, with_spectrum
from subspan.linalg import CompactWY, captured_energy, orthogonality_error

M, K = 48, 12


def panels() -> dict[str, torch.Tensor]:
    return {
        "gaussian": torch.randn(M, K),
        "pow1": with_spectrum(slow(K).square(), M, K).float(),
        "below rounding": with_spectrum(exponential(K).pow(4), M, K).float(),
        "zero": torch.zeros(M, K),
        "rank 4": torch.randn(M, 4) @ torch.randn(4, K),
        "zero column": torch.randn(M, K) * (torch.arange(K) != 5),
    }


@pytest.mark.parametrize("kind", panels())
def test_equals_the_explicit_orthogonal_matrix(kind: str) -> None:
    Y = panels()[kind]
    Q, R = CompactWY.factor(Y)
    whole = torch.linalg.qr(Y, mode="complete").Q
    torch.testing.assert_close(Q.apply(torch.eye(M)), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(Q.apply_transpose(torch.eye(M)), whole.mT, rtol=0, atol=2e-6)
    torch.testing.assert_close(Q.columns(), whole[:, :K], rtol=0, atol=2e-6)
    torch.testing.assert_close(Q.columns() @ R, Y, rtol=0, atol=1e-5)
    assert torch.equal(R, R.triu())
    assert orthogonality_error(Q.columns()) < 5e-6
    X, small = torch.randn(M, 7), torch.randn(K, 7)
    torch.testing.assert_close(Q.project(X), whole[:, :K].mT @ X, rtol=0, atol=5e-6)
    torch.testing.assert_close(Q.back_project(small), whole[:, :K] @ small, rtol=0, atol=5e-6)
    reflected = X.clone()
    assert Q.reflect_(reflected) is reflected
    torch.testing.assert_close(reflected, whole.mT @ X, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["gaussian", "pow1", "zero column"])
def test_triangular_factor_is_that_of_lapack(kind: str) -> None:
    Y = panels()[kind]
    V, T, _ = lapack.sgeqrt(K, Y.numpy())
    Q, R = CompactWY.factor(Y)
    torch.testing.assert_close(Q.T, torch.from_numpy(T).triu(), rtol=0, atol=1e-6)
    torch.testing.assert_close(Q.V.tril(-1), torch.from_numpy(V).tril(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(R, torch.from_numpy(V)[:K].triu(), rtol=1e-5, atol=1e-5)
    assert torch.equal(Q.T, Q.T.triu())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**31))
def test_appended_blocks_are_one_factorisation(extra: int, first: int, second: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = first + second + extra
    Y = torch.randn(2, m, first + second, generator=generator, dtype=torch.float64)
    Q = CompactWY.factor(Y[..., :first])[0].append(Y[..., first:])
    whole, _ = CompactWY.factor(Y)
    torch.testing.assert_close(Q.V, whole.V)
    torch.testing.assert_close(Q.T, whole.T)
    assert Q.shape == (2, m, first + second)


def test_batch_is_a_loop() -> None:
    Y = torch.randn(2, 3, 10, 4, dtype=torch.float64)
    batch, R = CompactWY.factor(Y)
    single, R12 = CompactWY.factor(Y[1, 2])
    torch.testing.assert_close(batch.columns()[1, 2], single.columns())
    torch.testing.assert_close(R[1, 2], R12)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rounded_vectors_still_give_an_orthonormal_basis(kind: str) -> None:
    A = with_spectrum(slow(64), 64, 96).float()
    Q, _ = CompactWY.factor(A @ torch.randn(96, 16))
    if kind == "bf16":
        rounded = Q.V.bfloat16()
    else:
        scale = Q.V.abs().amax(dim=0) / 127
        rounded = (Q.V / scale).round() * scale
    again = CompactWY.from_vectors(rounded).columns()
    assert orthogonality_error(again) < 5e-6
    assert orthogonality_error(Q.columns().bfloat16()) > 1e-4  # what rounding Q itself costs
    assert captured_energy(A, again) > (0.999 if kind == "bf16" else 0.99) * captured_energy(A, Q.columns())


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 reflectors of length 4"):
        CompactWY.factor(torch.randn(4, 5))
