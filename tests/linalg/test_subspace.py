from __future__ import annotations

import pytest
import torch

from linalg.spectra import slow, with_spectrum
from subspan.linalg import (
    OuterProductOperator,
    canonical_signs,
    captured_energy,
    choose_method,
    exact_basis,
    gram_basis,
    orthogonality_error,
    range_finder,
    seeded_generator,
    subspace,
)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24), (1, 9), (9, 1)])
def test_gram_basis_is_that_of_the_svd(shape: tuple[int, int]) -> None:
    A = torch.randn(2, *shape, dtype=torch.float64)
    rank = min(5, *shape)
    gram, exact = gram_basis(A, rank), exact_basis(A, rank)
    torch.testing.assert_close(gram.basis, exact.basis)
    torch.testing.assert_close(gram.singular_values, exact.singular_values)
    torch.testing.assert_close(gram.projected, exact.projected)


@pytest.mark.parametrize("shape", [(150, 8000), (8000, 150)])
def test_gram_basis_never_forms_the_matrix(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    Y, X = torch.randn(20, shape[0]), torch.randn(20, shape[1])
    dense = gram_basis(Y.mT @ X, 6)
    monkeypatch.setattr(OuterProductOperator, "to_dense", lambda self: pytest.fail("the matrix was formed"))
    found = gram_basis(OuterProductOperator(Y, X), 6)
    torch.testing.assert_close(found.basis, dense.basis, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.singular_values, dense.singular_values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e37])
def test_gram_basis_of_degenerate_matrices(shape: tuple[int, int], scale: float) -> None:
    A = torch.rand(shape).add(0.1) * scale
    found = gram_basis(A, 24)
    assert orthogonality_error(found.basis) < 5e-6
    assert found.projected.isfinite().all()
    assert captured_energy(A, found.basis) == pytest.approx(1, abs=1e-5)
    assert torch.equal(canonical_signs(found.basis), torch.ones(1, 24))
    with pytest.raises(ValueError, match=r"rank=25 .* between 1 and 24"):
        gram_basis(A, 25)


@pytest.mark.parametrize(
    ("shape", "rank", "method", "words"),
    [
        ((1024, 2736), 256, "sketch", "fewest"),
        ((1024, 2736), 16, "power", "few of 1024"),
        ((512, 512), 480, "gram", "most of 512"),
        ((16, 4096), 4, "svd", "16"),
        ((64, 20), 30, "svd", "more than the 20"),
    ],
)
def test_auto_is_what_choose_method_says(shape: tuple[int, int], rank: int, method: str, words: str) -> None:
    choice = choose_method(shape, rank)
    assert choice.method == method
    assert words in choice.reason
    small = (shape[0] // 8, shape[1] // 8)
    if choose_method(small, rank // 8 or 1).method == method:
        A = with_spectrum(slow(min(small)), *small)
        auto = subspace(A, rank // 8 or 1, generator=seeded_generator(0))
        assert torch.equal(auto.basis, subspace(A, rank // 8 or 1, method, generator=seeded_generator(0)).basis)


def test_methods() -> None:
    A = with_spectrum(slow(64), 64, 80)
    for method, floor in (("sketch", 0.8), ("power", 0.95), ("krylov", 0.98), ("gram", 1 - 1e-9), ("svd", 1 - 1e-9)):
        found = subspace(A, 16, method, generator=seeded_generator(0))
        best = slow(64)[:16].norm() / slow(64).norm()
        assert floor < captured_energy(A, found.basis) / best < 1 + 1e-9
        assert (found.singular_values.diff() <= 0).all()
        torch.testing.assert_close(found.projected, found.basis.mT @ A)
    assert torch.equal(
        subspace(A, 16, "power", generator=seeded_generator(0)).basis,
        range_finder(A, 16, n_iter=1, generator=seeded_generator(0)).basis,
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="method='qr'"):
        subspace(torch.randn(40, 50), 3, "qr")
    for rank in (0, 41):
        with pytest.raises(ValueError, match=f"rank={rank}"):
            subspace(torch.randn(40, 50), rank)
    with pytest.raises(ValueError, match="NaN"):
        subspace(torch.full((40, 50), torch.nan), 3)
    with pytest.raises(TypeError, match="complex64"):
        subspace(torch.ones(3, 4, dtype=torch.complex64), 1)
