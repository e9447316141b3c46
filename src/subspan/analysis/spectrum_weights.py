"""Spectra of weights and of what training has added to them, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from subspan.analysis.spectrum_rows import Spectra, reason_against
from subspan.analysis.spectrum_sources import Checkpoint

__all__ = ["update_spectra", "weight_spectra"]


def weight_spectra(names: Iterable[str], checkpoints: list[Checkpoint], rank: int | None) -> Spectra:
    """Analyse tensors at every checkpoint that has them.

    Args:
        names: of the tensors.
        checkpoints: in the order of training.
        rank: of the run, see `Spectra`.
    """
    spectra = Spectra("weights", rank, overlaps=len(checkpoints) > 1)
    for name in names:
        for checkpoint in checkpoints:
            if name not in checkpoint:
                continue
            shape, dtype = checkpoint.shape_and_type(name)
            if reason := reason_against(shape, dtype):
                spectra.skip(name, shape, checkpoint.step, reason)
            else:
                spectra.add(name, checkpoint.read(name), checkpoint.step)
        spectra.forget()
    return spectra


def update_spectra(names: Iterable[str], base: Checkpoint, checkpoints: list[Checkpoint], rank: int | None) -> Spectra:
    """Analyse the differences W_t − W_0 of the tensors of some checkpoints to those of a base.

    Args:
        names: of the tensors.
        base: holds W_0.
        checkpoints: hold W_t, in the order of training.
        rank: of the run, see `Spectra`.

    Raises:
        ValueError: no tensor is in the base and in a checkpoint.
    """
    spectra = Spectra("update", rank, overlaps=len(checkpoints) > 1)
    spectra.base = base.path.name
    common = False
    for name in names:
        for checkpoint in checkpoints:
            if name not in checkpoint:
                continue
            shape, dtype = checkpoint.shape_and_type(name)
            reason = reason_against(shape, dtype)
            if not reason and name not in base:
                reason = "not in the base"
            elif not reason:
                base_shape, base_dtype = base.shape_and_type(name)
                reason = reason_against(base_shape, base_dtype)
                if base_shape != shape:
                    reason = f"of another shape in the base: {base_shape}"
            if reason:
                spectra.skip(name, shape, checkpoint.step, reason)
                continue
            common = True
            now, before = checkpoint.read(name), base.read(name)
            dtype_of_both = torch.promote_types(torch.promote_types(now.dtype, before.dtype), torch.float32)
            spectra.add(name, now.to(dtype_of_both) - before.to(dtype_of_both), checkpoint.step)
        spectra.forget()
    if not common:
        raise ValueError(
            f"{str(base.path)!r} has no matrix in common with {str(checkpoints[0].path)!r}; give the model that the "
            "training started from as --base."
        )
    return spectra
