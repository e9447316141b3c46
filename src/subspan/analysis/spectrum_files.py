"""Rows as CSV, singular values and gradients as safetensors."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from subspan.analysis.spectrum import SpectrumFigures
from subspan.analysis.spectrum_rows import Spectra, SpectrumRow
from subspan.optim.matrix import as_matrix
from subspan.train.config import write_text

__all__ = ["write_gradients", "write_results"]

_FIGURES = [field.name for field in dataclasses.fields(SpectrumFigures)]


def write_results(spectra: Spectra, folder: Path) -> None:
    """Write ``QUANTITY.csv``, a line for each row, and ``QUANTITY.safetensors``, singular values under ``row.key``."""
    lines = [_line(row) for row in spectra.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / f"{spectra.what}.csv", text.getvalue())
    _save(
        spectra.singular_values, folder / f"{spectra.what}.safetensors", {"what": f"singular values of {spectra.what}"}
    )


def _line(row: SpectrumRow) -> dict[str, Any]:
    figures = dataclasses.asdict(row.figures) if row.figures is not None else dict.fromkeys(_FIGURES)
    rows, columns = row.matrix or (None, None)
    return {
        "what": row.what,
        "name": row.name,
        "kind": row.kind,
        "layer": row.layer,
        "member": row.member,
        "step": row.step,
        "batch": row.batch,
        "shape": "x".join(map(str, row.shape)),
        "rows": rows,
        "columns": columns,
        "projected": row.projected,
        **figures,
        "rank": row.rank,
        "overlap": row.overlap,
        "batch_overlap": row.batch_overlap,
        "suggested_rank": row.suggested_rank,
        "singular_values": row.key if row.figures is not None else None,
        "reason": row.reason,
    }


def write_gradients(file: Path, gradients: dict[str, Tensor], step: int) -> None:
    """Write gradients as matrices by name, those of a stack as ``NAME[0]``, ``NAME[1]``, ...; metadata: the step.

    Raises:
        ValueError: the file cannot be written.
    """
    matrices: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        matrix = as_matrix(gradient)
        members = {name: matrix} if matrix.ndim == 2 else {f"{name}[{i}]": one for i, one in enumerate(matrix)}
        matrices |= {key: one.contiguous().clone().cpu() for key, one in members.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _save(matrices, file, {"what": "gradients", "step": str(step)})
    except OSError as error:
        raise ValueError(
            f"save_gradients {str(file)!r} cannot be written ({error.strerror}); give another file."
        ) from error


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    os.replace(temporary, file)
