"""The spectrum of one matrix: singular values, the figures read off them, and the ranks they suggest."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MatrixSpectrum", "SpectrumFigures", "lora_rank", "matrix_spectrum", "projection_rank", "spectrum_figures"]

#: A longer short side would take gigabytes for its Gram matrix, and many minutes for the eigenvalues of it.
LARGEST_SIDE = 8192
#: Elements that are converted to float64 at a time.
_TILE = 2**22
#: Ranks are suggested in steps of this, which is what matrix units of devices like.
_MULTIPLE = 8


class MatrixSpectrum(NamedTuple):
    """Singular values of a matrix, and the leading directions of its short side.

    Attributes:
        singular_values: (k,), k = min(m, n), float64, on the CPU, descending.
        basis: (k, r) orthonormal, float32, fewer columns where the matrix has fewer directions; None if not asked for.
    """

    singular_values: Tensor
    basis: Tensor | None


@torch.no_grad()
def matrix_spectrum(A: Tensor, rank: int | None = None) -> MatrixSpectrum:
    """All singular values of A: the roots of the eigenvalues of the Gram matrix of its short side, in float64.

    A is read in tiles, so that no float64 copy of it is made. Squaring costs half of the digits of float64: singular
    values are right to about 1e-8 σ₁, which is below the rounding of float32 entries.

    Args:
        A: (m, n), floating point of any precision, not empty.
        rank: also return a basis of the leading directions of the short side, with at most this many columns.

    Returns:
        `MatrixSpectrum`.

    Raises:
        ValueError: A is no matrix, is empty, is not finite, or its short side is longer than `LARGEST_SIDE`.

    Example:
        >>> matrix_spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).singular_values.tolist()
        [4.0, 3.0]
    """
    if A.ndim != 2 or A.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(A.shape)} has no spectrum: give a matrix that is not empty")
    tall = A if A.shape[0] >= A.shape[1] else A.mT
    if tall.shape[1] > LARGEST_SIDE:
        raise ValueError(f"the short side is {tall.shape[1]}; up to {LARGEST_SIDE} can be analysed")
    low, high = A.aminmax()
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        raise ValueError("the matrix holds NaN or Inf")
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=A.device)
    scale = largest or 1.0  # so that no square under- or overflows
    for rows in tall.split(max(1, _TILE // tall.shape[1])):
        tile = rows.double() / scale
        gram.addmm_(tile.mT, tile)
    if rank is None:
        return MatrixSpectrum(_roots(torch.linalg.eigvalsh(gram)) * scale, None)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    sigma = _roots(eigenvalues) * scale
    # Beyond the numerical rank eigenvectors are arbitrary, and so would be what is said about their span.
    directions = int((sigma > sigma[0] * max(A.shape) * torch.finfo(torch.float32).eps).sum())
    return MatrixSpectrum(sigma, eigenvectors.flip(-1)[:, : min(rank, directions)].float())


def _roots(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.clamp_min(0).sqrt().flip(-1).cpu()


@dataclasses.dataclass(frozen=True)
class SpectrumFigures:
    """What is read off the singular values σ of a matrix; energy is the share of ‖A‖²_F.

    Attributes:
        frobenius_norm: √Σσ².
        spectral_norm: σ₁.
        stable_rank: Σσ² / σ₁².
        effective_rank: exp(−Σ p ln p) with p = σ / Σσ.
        rank_90: least rank that holds 90 % of the energy.
        rank_95: of 95 %.
        rank_99: of 99 %.
        energy_at_quarter: energy of the leading quarter of the directions.
        energy_at_rank: energy of the leading r directions.
    """

    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int
    energy_at_quarter: float
    energy_at_rank: float


def spectrum_figures(singular_values: Tensor, rank: int) -> SpectrumFigures:
    """Read the figures off all singular values of a matrix.

    Args:
        singular_values: (k,), descending, the first one above 0.
        rank: r of `SpectrumFigures.energy_at_rank`, from 1.

    Raises:
        ValueError: the matrix is zero.

    Example:
        >>> figures = spectrum_figures(torch.tensor([4.0, 3.0, 0.0, 0.0]), rank=2)
        >>> figures.frobenius_norm, figures.rank_90, figures.energy_at_quarter, figures.energy_at_rank
        (5.0, 2, 0.64, 1.0)

    Source: Rudelson, Vershynin, arXiv:math/0503442 (stable rank); Roy, Vetterli, EUSIPCO 2007 (effective rank).
    """
    sigma = singular_values.double()
    largest = sigma[0].item()
    if largest == 0:
        raise ValueError("a zero matrix has no leading directions")
    unit = sigma / largest
    squares = unit.square()
    curve = squares.cumsum(0) / squares.sum()
    p = unit / unit.sum()

    def rank_for(share: float) -> int:
        return int((curve < share * (1 - 4 * torch.finfo(curve.dtype).eps)).sum()) + 1

    return SpectrumFigures(
        frobenius_norm=largest * math.sqrt(squares.sum().item()),
        spectral_norm=largest,
        stable_rank=squares.sum().item(),
        effective_rank=math.exp(-torch.special.xlogy(p, p).sum().item()),
        rank_90=rank_for(0.90),
        rank_95=rank_for(0.95),
        rank_99=rank_for(0.99),
        energy_at_quarter=curve[max(1, len(curve) // 4) - 1].item(),
        energy_at_rank=curve[min(rank, len(curve)) - 1].item(),
    )


def projection_rank(ranks: Iterable[Sequence[int]], short_side: int) -> int:
    """Rank to project gradients to: the largest over training of the ranks for 95 % of their energy, a multiple of 8.

    At each point in time the median over the batches counts, so that an odd batch decides nothing, and of the points
    in time the largest, since gradients gain directions as training goes on. The cap is half of the short side: beyond
    it a projection saves next to nothing.

    Args:
        ranks: `SpectrumFigures.rank_95` of the gradients of one parameter, those of each point in time together.
        short_side: min(m, n) of it.

    Example:
        >>> projection_rank([[5, 90, 6], [30, 41, 35]], short_side=256), projection_rank([[200]], short_side=256)
        (40, 128)
    """
    return _multiple(max(statistics.median(at_once) for at_once in ranks), short_side)


def lora_rank(ranks: Sequence[int], short_side: int) -> int:
    """Rank of a LoRA adapter: the median of the ranks for 90 % of the energy of an update, as a multiple of 8.

    Args:
        ranks: `SpectrumFigures.rank_90` of the accumulated update, of each matrix of a stack.
        short_side: min(m, n); half of it is the cap.

    Example:
        >>> lora_rank([13], short_side=256)
        16
    """
    return _multiple(statistics.median(ranks), short_side)


def _multiple(rank: float, short_side: int) -> int:
    return min(math.ceil(math.ceil(rank) / _MULTIPLE) * _MULTIPLE, max(1, short_side // 2))
