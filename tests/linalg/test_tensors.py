from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linalg.spectra import exponential, with_spectrum
from subspan.linalg import (
    OuterProductOperator,
    captured_energy,
    exact_basis,
    hosvd,
    orthogonality_error,
    seeded_generator,
    st_hosvd,
    two_sided_range_finder,
    unfold,
)

SHAPES = [(6, 7, 8), (8, 5, 3, 3)]


def decaying(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose every unfolding decays exponentially."""
    X = torch.randn(shape, dtype=torch.float64)
    for mode, size in enumerate(shape):
        weight = with_spectrum(exponential(size).sqrt(), size, size, seed=mode)
        X = torch.tensordot(weight, X, dims=([1], [mode])).movedim(0, mode)
    return X


def test_two_sided() -> None:
    A = with_spectrum(exponential(30), 30, 50)
    found = two_sided_range_finder(A, (10, 8), generator=seeded_generator(0), n_iter=1)
    assert (found.left.shape, found.right.shape, found.core.shape) == ((30, 10), (50, 8), (10, 8))
    torch.testing.assert_close(found.core, found.left.mT @ A @ found.right)
    error = (A - found.left @ found.core @ found.right.mT).norm()
    assert found.error.item() == pytest.approx(error.item(), rel=1e-6)
    assert error < 1.1 * exponential(30)[8:].norm()
    for Q, matrix in ((found.left, A), (found.right, A.mT)):
        assert orthogonality_error(Q) < 1e-12
        best = captured_energy(matrix, exact_basis(matrix, Q.shape[-1]).basis)
        assert captured_energy(matrix, Q) > 0.999 * best


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e36])
def test_two_sided_batches_operators_and_scales(scale: float) -> None:
    Y, X = torch.randn(2, 20, 9) * scale, torch.randn(2, 20, 12)
    found = two_sided_range_finder(OuterProductOperator(Y, X), (9, 9), generator=seeded_generator(0), n_iter=1)
    assert orthogonality_error(found.left).max() < 5e-6
    assert orthogonality_error(found.right).max() < 5e-6
    exact = Y.mT.double() @ X.double()
    norm = torch.linalg.matrix_norm(exact)
    rebuilt = found.left.double() @ found.core.double() @ found.right.double().mT
    assert (torch.linalg.matrix_norm(rebuilt - exact) <= 1e-5 * norm).all()
    assert (found.error <= 1e-3 * norm).all()
    for ranks in ((9, 10), (9, 0), (3, 4), (10, 3)):
        with pytest.raises(ValueError, match="not possible"):
            two_sided_range_finder(exact, ranks)


@pytest.mark.parametrize("shape", SHAPES)
def test_unfolding(shape: tuple[int, ...]) -> None:
    X = torch.randn(shape)
    for mode, size in enumerate(shape):
        matrix = unfold(X, mode)
        assert matrix.shape == (size, X.numel() // size)
        for i in range(size):
            assert torch.equal(matrix[i], X.select(mode, i).flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [hosvd, st_hosvd])
def test_full_ranks_give_the_tensor_back(shape: tuple[int, ...], method) -> None:
    X = torch.randn(shape, dtype=torch.float64)
    for ranks in (shape, (None, *shape[1:]), (shape[0], *[None] * (len(shape) - 1))):
        found = method(X, ranks, generator=seeded_generator(0))
        torch.testing.assert_close(found.to_dense(), X)
        assert found.error < 1e-6 * X.norm()
        assert [U is None for U in found.factors] == [rank is None for rank in ranks]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [hosvd, st_hosvd])
def test_truncation_is_quasi_optimal(shape: tuple[int, ...], method) -> None:
    X = decaying(shape)
    ranks = tuple(max(1, size // 2) for size in shape)
    found = method(X, ranks, generator=seeded_generator(0), n_iter=2)
    assert found.core.shape == ranks
    error = (X - found.to_dense()).norm()
    assert found.error.item() == pytest.approx(error.item(), rel=1e-6)
    lost = [torch.linalg.svdvals(unfold(X, mode))[rank:].norm() for mode, rank in enumerate(ranks)]
    # what no approximation of these ranks can avoid, and what the method promises
    assert max(lost) <= error * (1 + 1e-12)
    assert error <= 1.05 * math.sqrt(sum(x.item() ** 2 for x in lost))
    for U in found.factors:
        assert orthogonality_error(U) < 1e-12


def test_exactly_low_rank() -> None:
    X = torch.einsum("ia,jb,kc,abc->ijk", *(torch.randn(n, 2) for n in (6, 7, 8)), torch.randn(2, 2, 2))
    for method in (hosvd, st_hosvd):
        found = method(X, (2, 2, 2), generator=seeded_generator(0))
        torch.testing.assert_close(found.to_dense(), X, rtol=0, atol=1e-5 * X.abs().max().item())
    assert st_hosvd(X, rtol=1e-3, generator=seeded_generator(0)).core.shape == (2, 2, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-3])
def test_tolerance(shape: tuple[int, ...], rtol: float) -> None:
    X = decaying(shape)
    found = st_hosvd(X, rtol=rtol, generator=seeded_generator(0))
    assert (X - found.to_dense()).norm() <= rtol * X.norm()
    if rtol == 0.5:
        assert found.core.numel() < X.numel() / 4


def test_zero_tensor_and_half_precision() -> None:
    found = st_hosvd(torch.zeros(3, 4, 5), rtol=0.1)
    assert found.core.shape == (1, 1, 1)
    assert not found.to_dense().any()
    half = st_hosvd(decaying((6, 7, 8)).bfloat16(), (3, 3, 3), generator=seeded_generator(0))
    assert half.core.dtype == torch.float32
    assert max(orthogonality_error(U) for U in half.factors) < 5e-6


def test_bad_input_is_refused() -> None:
    X = torch.randn(3, 4, 5)
    for method in (hosvd, st_hosvd):
        with pytest.raises(ValueError, match="2 ranks for 3 modes"):
            method(X, (1, 2))
        with pytest.raises(ValueError, match=r"rank 5 of mode 1 .* from 1 to 4"):
            method(X, (1, 5, 2))
        with pytest.raises(ValueError, match="NaN or infinite"):
            method(X / 0, (1, 1, 1))
        with pytest.raises(TypeError, match="complex64"):
            method(X.to(torch.complex64), (1, 1, 1))
        with pytest.raises(ValueError, match=r"\(0, 4, 5\)"):
            method(X[:0], (1, 1, 1))
    for given in ({}, {"ranks": (1, 1, 1), "rtol": 0.1}):
        with pytest.raises(ValueError, match="either ranks or rtol"):
            st_hosvd(X, **given)
