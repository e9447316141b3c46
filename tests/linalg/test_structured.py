from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linalg.spectra import exponential, with_spectrum
from subspan.linalg import (
    MatrixOperator,
    OuterProductOperator,
    SumOperator,
    TransposedOperator,
    adaptive_range_finder,
    captured_energy,
    exact_basis,
    gram_basis,
    randomized_svd,
    range_finder,
    seeded_generator,
    stable_rank,
    subspace_overlap,
)

M, N, T = 30, 44, 70


def operators(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, tuple[MatrixOperator, Tensor]]:
    A = (with_spectrum(exponential(M), M, N) * scale).to(dtype)
    Y, X = torch.randn(T, M).mul(scale).to(dtype), (torch.randn(T, N) * torch.logspace(0, -3, N)).to(dtype)
    L, R = torch.randn(M, 3).to(dtype), (torch.randn(3, N) * scale).to(dtype)
    low = 0.9 * (L.double() @ R.double())
    return {
        "transposed": (TransposedOperator(A), A.mT.double()),
        "outer": (OuterProductOperator(Y, X), Y.mT.double() @ X.double()),
        "sum": (SumOperator(A, L, R, alpha=0.1, beta=0.9), 0.1 * A.double() + low),
        "sum of outer": (
            SumOperator(OuterProductOperator(Y, X), L, R, alpha=0.1, beta=0.9),
            0.1 * (Y.mT.double() @ X.double()) + low,
        ),
        "transposed outer": (TransposedOperator(OuterProductOperator(Y, X)), X.mT.double() @ Y.double()),
    }


@pytest.mark.parametrize("kind", operators())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products(kind: str, dtype: torch.dtype) -> None:
    operator, dense = operators(dtype)[kind]
    m, n = dense.shape
    assert operator.shape == dense.shape
    assert operator.dtype == dtype
    assert operator.device == dense.device
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if wide == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    Z, W = torch.randn(n, 5, dtype=wide), torch.randn(m, 5, dtype=wide)
    torch.testing.assert_close(operator.matmul(Z).double(), dense @ Z.double(), **tolerance)
    torch.testing.assert_close(operator.rmatmul(W).double(), dense.mT @ W.double(), **tolerance)
    torch.testing.assert_close(operator.rows(3, 9).double(), dense[3:9], **tolerance)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(operator.to_dense().double(), dense, **tolerance)
    assert operator.amax() >= 0.99 * dense.abs().max()
    assert operator.amax() <= 100 * dense.abs().max()
    norm = operator.squared_norm(torch.full((1, 1), 2.0, dtype=wide))
    assert norm.item() == pytest.approx(4 * dense.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", operators())
def test_all_finders_take_them(kind: str) -> None:
    operator, dense = operators()[kind]
    for find in (
        lambda A: range_finder(A, 5, generator=seeded_generator(0), n_iter=1),
        lambda A: range_finder(A, 5, generator=seeded_generator(0), sketch="sampling"),
        lambda A: exact_basis(A, 5),
        lambda A: gram_basis(A, 5),
    ):
        assert subspace_overlap(find(operator).basis, find(dense).basis) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        randomized_svd(operator, 5, generator=seeded_generator(0)).S,
        randomized_svd(dense, 5, generator=seeded_generator(0)).S,
    )
    torch.testing.assert_close(stable_rank(operator), stable_rank(dense))
    for method in ("sketch", "householder", "householder_left", "gram_schmidt", "vector"):
        found = adaptive_range_finder(operator, rtol=0.05, method=method, block_size=4, generator=seeded_generator(0))
        Q = found.basis()
        torch.testing.assert_close(found.projected, Q.mT @ dense, rtol=1e-8, atol=1e-8)
        if method in ("sketch", "householder", "gram_schmidt"):
            assert found.converged
            assert (dense - Q @ (Q.mT @ dense)).norm() <= 0.05 * dense.norm()


@pytest.mark.parametrize("kind", operators())
@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_extreme_scales(kind: str, scale: float) -> None:
    operator, dense = operators(torch.float32, scale)[kind]
    found = adaptive_range_finder(operator, rtol=0.05, generator=seeded_generator(0))
    assert found.converged
    Q = found.basis().double()
    assert (dense - Q @ (Q.mT @ dense)).norm() <= 0.051 * dense.norm()
    best = captured_energy(dense, exact_basis(dense, 5).basis)
    assert (
        captured_energy(dense, range_finder(operator, 5, generator=seeded_generator(0), n_iter=1).basis) > 0.95 * best
    )


def test_outer_products_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, _ = operators()["sum of outer"]
    for kind in (OuterProductOperator, SumOperator):
        monkeypatch.setattr(kind, "to_dense", None)
    range_finder(operator, 5, generator=seeded_generator(0), n_iter=1)
    for method in ("sketch", "householder_left", "gram_schmidt"):
        assert adaptive_range_finder(operator, rtol=0.1, method=method).projected.isfinite().all()


def test_batch() -> None:
    Y, X = torch.randn(2, T, M, dtype=torch.float64), torch.randn(2, T, N, dtype=torch.float64)
    both = range_finder(OuterProductOperator(Y, X), 4, generator=seeded_generator(0)).basis
    torch.testing.assert_close(both, range_finder(Y.mT @ X, 4, generator=seeded_generator(0)).basis)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and X \(4, 3\)"):
        OuterProductOperator(torch.ones(5, 3), torch.ones(4, 3))
    with pytest.raises(TypeError, match="int64"):
        OuterProductOperator(torch.ones(5, 3), torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3, 4\), A has \(3, 5\)"):
        SumOperator(torch.ones(3, 5), torch.ones(3, 1), torch.ones(1, 4))
    Y = torch.ones(5, 3)
    Y[2, 1] = torch.inf
    for operator in (
        OuterProductOperator(Y, torch.ones(5, 4)),
        SumOperator(torch.ones(5, 4), Y, torch.ones(3, 4)),
        TransposedOperator(Y),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            range_finder(operator, 1, generator=seeded_generator(0))
