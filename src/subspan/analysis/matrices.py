"""Matrices to measure on: of a known spectrum, and gradients saved in a safetensors file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from subspan.linalg import random_stiefel, seeded_generator

if TYPE_CHECKING:
    from subspan.analysis.spectrum_sources import Checkpoint

__all__ = ["SPECTRA", "MatrixSource", "parse_size", "saved_matrices", "sigma", "synthetic_matrices", "with_spectrum"]

SPECTRA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pow 1/2": lambda i, k: i.rsqrt(),
    "pow 1": lambda i, k: 1 / i,
    "exp": lambda i, k: torch.exp(-20 * (i - 1) / k),
    "exp below rounding": lambda i, k: torch.exp(-80 * (i - 1) / k),
    "flat": lambda i, k: torch.ones(k),
    "rank 4": lambda i, k: (i <= 4) * 1.0,
    "zero": lambda i, k: torch.zeros(k),
}


class MatrixSource(NamedTuple):
    """A matrix that is made or read when its turn comes.

    Attributes:
        name: for tables and records.
        load: returns it (m, n) in float32 on the CPU; ValueError says why it cannot be measured.
    """

    name: str
    load: Callable[[], Tensor]


def sigma(spectrum: str, k: int) -> Tensor:
    """Singular values of a named spectrum.

    Args:
        spectrum: a name in ``SPECTRA``.
        k: how many.

    Returns:
        float64 tensor of shape (k,), descending.

    Example:
        >>> sigma("pow 1", 4).tolist()[:2]
        [1.0, 0.5]
    """
    return SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64), k).double()


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """Matrix with given singular values and Haar singular vectors, so that no coordinate is special.

    Args:
        values: singular values, at most min(m, n) of them.
        m: rows.
        n: columns.
        seed: of the singular vectors.

    Returns:
        float32 tensor (m, n).

    Example:
        >>> torch.linalg.svdvals(with_spectrum(torch.tensor([2.0, 1.0]), 3, 5)).round(decimals=4)
        tensor([2., 1., 0.])
    """
    generator = seeded_generator(seed, "benchmark")
    U = random_stiefel(m, len(values), generator=generator)
    V = random_stiefel(n, len(values), generator=generator)
    return (U * values.float()) @ V.mT


def parse_size(text: str) -> tuple[int, int]:
    """MxN as two numbers.

    Raises:
        ValueError: if the text is anything else.

    Example:
        >>> parse_size("1024x2736")
        (1024, 2736)
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, flags=re.ASCII)
    if not match:
        raise ValueError(f"size {text!r} is not MxN, rows and columns; write 1024x2736, for instance.")
    return int(match[1]), int(match[2])


def synthetic_matrices(sizes: Sequence[tuple[int, int]], spectra: Sequence[str]) -> list[MatrixSource]:
    """One matrix for every size and spectrum.

    Args:
        sizes: rows and columns.
        spectra: names in ``SPECTRA``; a hyphen may stand for a space.

    Raises:
        ValueError: if a spectrum is unknown.

    Example:
        >>> [source.name for source in synthetic_matrices([(4, 6)], ["pow-1/2", "exp"])]
        ['4x6 pow 1/2', '4x6 exp']
    """
    names = [text.replace("-", " ") for text in spectra]
    for text, name in zip(spectra, names, strict=True):
        if name not in SPECTRA:
            known = ", ".join(name.replace(" ", "-") for name in SPECTRA)
            raise ValueError(f"spectrum {text!r} is unknown; choose from {known}.")
    return [MatrixSource(f"{m}x{n} {name}", partial(_synthetic, name, m, n)) for m, n in sizes for name in names]


def saved_matrices(file: str | Path) -> list[MatrixSource]:
    """The tensors of a safetensors file; a tall matrix is transposed, as optimizers project the short side.

    Args:
        file: tensor name -> gradient.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no whole safetensors file, or holds no tensor.

    Example:
        >>> saved_matrices("gradients.safetensors")  # doctest: +SKIP
        [MatrixSource(name='model.layers.0.mlp.up_proj.weight', load=...), ...]
    """
    # Imports transformers, which matrices of a known spectrum do without.
    from subspan.analysis.spectrum_sources import Checkpoint

    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"gradients {str(file)!r}: no such file.")
    tensors = Checkpoint(path)
    if not tensors.names:
        raise ValueError(f"gradients {str(file)!r} holds no tensor.")
    return [MatrixSource(name, partial(_as_matrix, tensors, name)) for name in tensors.names]


def _synthetic(spectrum: str, m: int, n: int) -> Tensor:
    return with_spectrum(sigma(spectrum, min(m, n)), m, n)


def _as_matrix(tensors: Checkpoint, name: str) -> Tensor:
    gradient = tensors.read(name)
    if gradient.ndim != 2:
        raise ValueError(f"its shape is {tuple(gradient.shape)}: only matrices are measured")
    if not gradient.dtype.is_floating_point:
        raise ValueError(
            f"its dtype is {str(gradient.dtype).removeprefix('torch.')}: only floating-point numbers are measured"
        )
    matrix = gradient.float()
    return matrix.mT.contiguous() if matrix.shape[0] > matrix.shape[1] else matrix
