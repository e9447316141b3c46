"""From tensors to rows: one for every matrix and point in time, or the reason why there are no figures."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import Tensor

from subspan.analysis.spectrum import (
    LARGEST_SIDE,
    SpectrumFigures,
    lora_rank,
    matrix_spectrum,
    projection_rank,
    spectrum_figures,
)
from subspan.linalg import subspace_overlap
from subspan.optim.matrix import as_matrix

__all__ = ["Spectra", "SpectrumRow", "kind_of", "layer_of", "reason_against"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
#: Types of safetensors that hold real numbers; others are codes of a quantisation, integers or truth values.
_REAL_TYPES = ("F64", "F32", "F16", "BF16")
#: Reasons that every model has.
EXPECTED = ("a vector", "a number")


@dataclasses.dataclass
class SpectrumRow:
    """One matrix at one point in time.

    Attributes:
        what: weights, gradients or update.
        name: of the tensor.
        kind: the name with ``*`` for the number of the layer.
        layer: that number, or None.
        member: number of the matrix in a stack (experts), or None.
        step: of training, or None where that is not known.
        batch: number of the batch of a gradient, or None.
        shape: of the tensor.
        matrix: rows and columns of the matrix; None where there is none.
        rank: r of ``energy_at_rank`` and of the overlaps: the run's rank, or a quarter of the short side.
        projected: whether the run projects it; None where no run says so.
        figures: what its singular values say, or None.
        overlap: with the subspace of the point in time before, from 0 to 1.
        batch_overlap: with the subspace of the batch before, at the same weights.
        suggested_rank: for projecting gradients, or for an adapter.
        reason: why there are no figures; empty otherwise.
    """

    what: str
    name: str
    kind: str
    layer: int | None
    member: int | None
    step: int | None
    batch: int | None
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None = None
    rank: int | None = None
    projected: bool | None = None
    figures: SpectrumFigures | None = None
    overlap: float | None = None
    batch_overlap: float | None = None
    suggested_rank: int | None = None
    reason: str = ""

    @property
    def key(self) -> str:
        """Name of the singular values of this row."""
        member = "" if self.member is None else f"[{self.member}]"
        batch = "" if self.batch is None else f".{self.batch}"
        step = "" if self.step is None else f"@{self.step}"
        return f"{self.name}{member}{step}{batch}"

    @property
    def short_side(self) -> int:
        """The smaller of rows and columns."""
        assert self.matrix is not None
        return min(self.matrix)


def kind_of(name: str) -> str:
    """Name of a tensor with ``*`` for the numbers of layers and without ``.weight``.

    Example:
        >>> kind_of("model.layers.3.mlp.up_proj.weight")
        'model.layers.*.mlp.up_proj'
    """
    return _NUMBER.sub("*", name).removesuffix(".weight")


def layer_of(name: str) -> int | None:
    """Number of the layer of a tensor.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight")
        3
    """
    match = _NUMBER.search(name)
    return int(match[0]) if match else None


def reason_against(shape: tuple[int, ...], dtype: str) -> str:
    """Say why a tensor is not analysed, by its shape and its type in safetensors; empty if nothing is against it.

    Example:
        >>> reason_against((4,), "F32"), reason_against((4, 4), "I8"), reason_against((4, 4), "F32")
        ('a vector', 'of type I8: quantised or integer', '')
    """
    if dtype not in _REAL_TYPES:
        return f"of type {dtype}: quantised or integer"
    if len(shape) < 2:
        return EXPECTED[0] if shape else EXPECTED[1]
    if 0 in shape:
        return "empty"
    rows, columns = shape[-2:] if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    if min(rows, columns) > LARGEST_SIDE:
        return f"too large: its short side is {min(rows, columns)}, above {LARGEST_SIDE}"
    return ""


class Spectra:
    """Collects rows and singular values of one quantity (weights, gradients or update).

    Args:
        what: the quantity.
        rank: of the run; None takes a quarter of each short side.
        overlaps: whether there is more than one point in time or batch to compare.

    Attributes:
        rows: in the order in which they were added.
        singular_values: descending, by ``row.key``.
        projected: names of the tensors that the run projects, where that is known.
        base: what an update is counted from.
    """

    def __init__(self, what: str, rank: int | None = None, *, overlaps: bool = False) -> None:
        self.what = what
        self.rank = rank
        self.rows: list[SpectrumRow] = []
        self.singular_values: dict[str, Tensor] = {}
        self.projected: frozenset[str] | None = None
        self.base = ""
        self._overlaps = overlaps
        # What was there before: by tensor, matrix in the stack, and batch.
        self._bases: dict[tuple[str, int | None, int | None], Tensor] = {}

    def forget(self) -> None:
        """Drop the subspaces that later points in time would be compared with."""
        self._bases.clear()

    def skip(self, name: str, shape: tuple[int, ...], step: int | None, reason: str, batch: int | None = None) -> None:
        """Add a row without figures."""
        self.rows.append(self._row(name, shape, None, step, batch, reason=reason))

    def add(self, name: str, X: Tensor, step: int | None, batch: int | None = None) -> None:
        """Analyse a tensor: a matrix, a stack of matrices (3-D), or a convolution kernel (more)."""
        matrices = as_matrix(X)
        members = [(None, matrices)] if matrices.ndim == 2 else list(enumerate(matrices))
        for member, matrix in members:
            row = self._row(name, tuple(X.shape), member, step, batch)
            row.matrix = (matrix.shape[0], matrix.shape[1])
            self._analyse(row, matrix)
            self.rows.append(row)

    def _analyse(self, row: SpectrumRow, matrix: Tensor) -> None:
        row.rank = max(1, row.short_side // 4) if self.rank is None else min(self.rank, row.short_side)
        # Other devices than CUDA's have no float64.
        matrix = matrix.cuda() if torch.cuda.is_available() else matrix.cpu()
        low, high = matrix.aminmax()
        if not (low.isfinite() and high.isfinite()):
            row.reason = "not finite: it holds NaN or Inf"
            return
        sigma, basis = matrix_spectrum(matrix, row.rank if self._overlaps else None)
        if sigma[0] == 0:
            row.reason = "all zero"
            return
        row.figures = spectrum_figures(sigma, row.rank)
        self.singular_values[row.key] = sigma.float()
        if basis is not None:
            row.overlap = self._overlap(basis, (row.name, row.member, row.batch))
            if row.batch:
                row.batch_overlap = self._overlap(basis, (row.name, row.member, row.batch - 1))
            self._bases[row.name, row.member, row.batch] = basis

    def _overlap(self, basis: Tensor, before: tuple[str, int | None, int | None]) -> float | None:
        previous = self._bases.get(before)
        if previous is None or previous.shape[0] != basis.shape[0]:
            return None
        return subspace_overlap(previous, basis).item()

    def suggest(self) -> None:
        """Fill in the suggested ranks, one for each tensor, from all of its rows."""
        by_name: dict[str, list[SpectrumRow]] = {}
        for row in self.rows:
            if row.figures is not None:
                by_name.setdefault(row.name, []).append(row)
        for rows in by_name.values():
            if self.what == "gradients":
                by_step: dict[int | None, list[int]] = {}
                for row in rows:
                    assert row.figures is not None
                    by_step.setdefault(row.step, []).append(row.figures.rank_95)
                suggested = projection_rank(by_step.values(), rows[0].short_side)
            elif self.what == "update":
                last = rows[-1].step
                ranks = [row.figures.rank_90 for row in rows if row.figures and row.step == last]
                suggested = lora_rank(ranks, rows[0].short_side)
            else:
                return
            for row in rows:
                row.suggested_rank = suggested

    def _row(
        self,
        name: str,
        shape: tuple[int, ...],
        member: int | None,
        step: int | None,
        batch: int | None,
        reason: str = "",
    ) -> SpectrumRow:
        projected = None if self.projected is None else name in self.projected
        return SpectrumRow(
            self.what,
            name,
            kind_of(name),
            layer_of(name),
            member,
            step,
            batch,
            shape,
            projected=projected,
            reason=reason,
        )
