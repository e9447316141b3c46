"""The figures of one matrix, against singular values that are known and against linalg."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspan.analysis import spectrum
from subspan.analysis.spectrum import lora_rank, matrix_spectrum, projection_rank, spectrum_figures
from subspan.linalg import effective_rank, rank_for_energy, stable_rank, subspace_overlap
from tests.linalg.spectra import exponential, slow, with_spectrum

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]


def oracle_rank(sigma: Tensor, share: float) -> int:
    """Add up squares until there are enough."""
    total, wanted = 0.0, share * float((sigma.double() ** 2).sum()) * (1 - 1e-12)
    for count, value in enumerate(sigma.tolist(), start=1):
        total += value**2
        if total >= wanted:
            return count
    return len(sigma)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [slow, exponential, torch.ones])
def test_known_spectra_give_known_figures(shape: tuple[int, int], decay) -> None:
    sigma = decay(min(shape)).double()
    found = matrix_spectrum(with_spectrum(sigma, *shape)).singular_values
    torch.testing.assert_close(found, sigma, rtol=0, atol=1e-7)
    figures = spectrum_figures(found, rank=3)
    assert [figures.rank_90, figures.rank_95, figures.rank_99] == [oracle_rank(sigma, s) for s in (0.9, 0.95, 0.99)]
    share = sigma.square().cumsum(0) / sigma.square().sum()
    quarter = max(1, len(sigma) // 4)
    assert figures.energy_at_rank == pytest.approx(share[min(3, len(sigma)) - 1].item())
    assert figures.energy_at_quarter == pytest.approx(share[quarter - 1].item())
    assert figures.frobenius_norm == pytest.approx(sigma.square().sum().sqrt().item())
    assert figures.spectral_norm == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 30), (30, 48)])
def test_figures_are_those_of_linalg(shape: tuple[int, int], dtype: torch.dtype) -> None:
    A = with_spectrum(slow(30), *shape).to(dtype)
    figures = spectrum_figures(matrix_spectrum(A).singular_values, rank=8)
    A = A.double()
    assert figures.stable_rank == pytest.approx(stable_rank(A).item())
    assert figures.effective_rank == pytest.approx(effective_rank(A).item())
    for share in (90, 95, 99):
        assert getattr(figures, f"rank_{share}") == rank_for_energy(A, share / 100).item()


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.randn(100, 20)
    whole = matrix_spectrum(A).singular_values
    monkeypatch.setattr(spectrum, "_TILE", 20 * 7)
    torch.testing.assert_close(matrix_spectrum(A).singular_values, whole, rtol=1e-12, atol=0)


def test_transposition_changes_no_figure() -> None:
    A = torch.randn(37, 90)
    of_A, of_transpose = matrix_spectrum(A, 9), matrix_spectrum(A.mT.contiguous(), 9)
    torch.testing.assert_close(of_A.singular_values, of_transpose.singular_values, rtol=1e-12, atol=0)
    assert of_A.basis is not None and of_transpose.basis is not None
    # The basis is that of the short side, whichever that is.
    torch.testing.assert_close(subspace_overlap(of_A.basis, of_transpose.basis), torch.tensor(1.0))


@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e150])
def test_scale_changes_no_rank(factor: float) -> None:
    A = with_spectrum(slow(20), 20, 30)
    figures = [spectrum_figures(matrix_spectrum(X).singular_values, 5) for X in (A, A * factor)]
    assert figures[0].rank_95 == figures[1].rank_95
    assert figures[1].frobenius_norm == pytest.approx(figures[0].frobenius_norm * factor)


def test_basis_holds_the_leading_directions_and_no_others() -> None:
    A = with_spectrum(exponential(20), 20, 50)
    U = torch.linalg.svd(A).U[:, :6]
    basis = matrix_spectrum(A, 6).basis
    assert basis is not None and basis.shape == (20, 6)
    torch.testing.assert_close(subspace_overlap(U.float(), basis), torch.tensor(1.0))
    # A matrix of rank 2 has two directions; the others would be arbitrary, and so would an overlap with them.
    deficient = matrix_spectrum((torch.randn(20, 2) @ torch.randn(2, 50)), 6).basis
    assert deficient is not None and deficient.shape == (20, 2)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.zeros(3, 0), "not empty"),
        (torch.zeros(3), "give a matrix"),
        (torch.tensor([[1.0, torch.nan]]), "NaN or Inf"),
        (torch.tensor([[1.0, -torch.inf]]), "NaN or Inf"),
    ],
)
def test_what_has_no_spectrum(A: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix_spectrum(A)


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "LARGEST_SIDE", 4)
    assert matrix_spectrum(torch.ones(4, 50)).singular_values.shape == (4,)
    with pytest.raises(ValueError, match="short side is 5; up to 4"):
        matrix_spectrum(torch.ones(50, 5))


def test_a_zero_matrix_has_no_figures() -> None:
    sigma = matrix_spectrum(torch.zeros(3, 4)).singular_values
    assert sigma.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="zero matrix"):
        spectrum_figures(sigma, 1)


@pytest.mark.parametrize(
    ("ranks", "side", "expected"),
    [
        ([8], 64, 8),
        ([9], 64, 16),
        ([3, 100, 9], 256, 16),  # the median, not the largest
        ([8, 9], 64, 16),  # a median between two is rounded up
        ([60], 64, 32),  # half of the side
        ([1], 3, 1),
        ([1], 1, 1),
    ],
)
def test_suggested_ranks(ranks: list[int], side: int, expected: int) -> None:
    assert projection_rank([ranks], side) == lora_rank(ranks, side) == expected


def test_the_rank_for_gradients_is_the_largest_over_time() -> None:
    assert projection_rank([[3, 100, 9], [20, 17, 1], [2]], 256) == 24
