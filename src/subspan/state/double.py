"""Scales of a blockwise codec that are held in fewer bytes themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.state.codec import Blockwise, Codec, Coded
from subspan.state.spec import StateSpec

_SCALES = Blockwise("linear", 8, signed=False)


@dataclass(frozen=True)
class DoubleBlockwise(Codec):
    """Codes in blocks, whose scales are codes in blocks: 4.13 bits an element of NF4 in place of 4.5.

    Scales are positive and within a few times of each other, so they take equal levels from 0 to the largest of their
    block; a positive one never becomes zero.

    Args:
        codes: of the elements.
        scales: of their scales; unsigned.

    Example:
        >>> codec = DoubleBlockwise(Blockwise("normal", 4, block=64))
        >>> StateSpec((512, 512), codec=codec).nbytes * 8 / 512**2
        4.126953125

    Source: double quantisation is that of QLoRA, arXiv 2305.14314, which subtracts the mean of the scales and keeps
    signed dynamic levels.
    """

    codes: Blockwise
    scales: Blockwise = _SCALES

    @property
    def block(self) -> int:  # type: ignore[override]
        """Elements whose scales share a scale."""
        return self.codes.block * self.scales.block

    def specs(self, shape: tuple[int, ...]) -> dict[str, StateSpec]:
        codes, scale = self.codes.specs(shape).values()
        held = self.scales.specs(_stacked(scale.shape))
        return {"": codes} | {f"_scale{suffix}": spec for suffix, spec in held.items()}

    def encode(self, X: Tensor, generator: torch.Generator | None = None) -> Coded:
        codes, scale = self.codes.encode(X, generator).values()
        held = self.scales.encode(scale.view(_stacked(tuple(scale.shape))))
        return {"": codes} | {f"_scale{suffix}": tensor for suffix, tensor in held.items()}

    def decode(self, coded: Coded, shape: tuple[int, ...]) -> Tensor:
        size = self.codes.specs(shape)["_scale"].shape
        scale = self.scales.decode(_of_scales(coded), _stacked(size)).view(size)
        return self.codes.decode({"": coded[""], "_scale": scale}, shape)

    def part(self, coded: Coded, start: int, stop: int) -> Coded:
        block = self.codes.block
        held = self.scales.part(_of_scales(coded), start // block, math.ceil(stop / block))
        packed = 8 // self.codes.bits
        codes = coded[""].view(-1)[start // packed : math.ceil(stop / packed)]
        return {"": codes} | {f"_scale{suffix}": tensor for suffix, tensor in held.items()}


def _of_scales(coded: Coded) -> Coded:
    return {suffix.removeprefix("_scale"): tensor for suffix, tensor in coded.items() if suffix}


def _stacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The scales of a stack as a stack of rows, so that no block reaches from one matrix to the next."""
    return (*shape[:-1], 1, shape[-1]) if len(shape) > 1 else shape
