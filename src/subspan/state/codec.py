"""How a float tensor of optimizer state is held in fewer bytes.

A codec turns a tensor into tensors of codes and scales and back. Blocks of neighbouring elements, counted in the order
of their indices and anew for each matrix of a stack, share one scale: the largest magnitude in the block. So neither
the memory layout nor what else is in a stack changes the result.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from subspan.state.host import on_host
from subspan.state.rounding import round_stochastically
from subspan.state.spec import StateSpec

Coded = dict[str, Tensor]

# Elements that are worked on together: on a CPU temporaries stay in the cache, a device wants fewer launches.
_CPU_CHUNK = 1 << 16
_DEVICE_CHUNK = 1 << 22


class Codec(ABC):
    """A way to hold a float tensor (..., m, n); vectors and tensors of more than three dimensions count as one matrix.

    Decoding what was encoded and encoding it again gives the same codes. NaN and infinities make their whole block NaN
    or infinite.
    """

    #: Elements that are coded together, counted from the first one of a matrix.
    block: int

    @abstractmethod
    def specs(self, shape: tuple[int, ...]) -> dict[str, StateSpec]:
        """Declarations of the tensors that hold one of ``shape``, by the suffix of their state keys."""

    @abstractmethod
    def encode(self, X: Tensor, generator: torch.Generator | None = None) -> Coded:
        """The tensors that hold ``X``, by suffix; rounded to nearest, or with a generator at random, keeping the mean.

        What lies between the largest magnitude of its block and zero is kept up to half the gap between two levels.
        """

    @abstractmethod
    def decode(self, coded: Coded, shape: tuple[int, ...]) -> Tensor:
        """The float32 tensor of ``shape`` that ``coded`` holds."""

    @abstractmethod
    def part(self, coded: Coded, start: int, stop: int) -> Coded:
        """Views that hold the elements from ``start`` (a multiple of `block`) to ``stop`` of one flattened matrix."""


@dataclass(frozen=True)
class BFloat16(Codec):
    """Two bytes an element, a relative error of 2⁻⁹."""

    block = 1

    def specs(self, shape: tuple[int, ...]) -> dict[str, StateSpec]:
        return {"": StateSpec(shape, torch.bfloat16)}

    def encode(self, X: Tensor, generator: torch.Generator | None = None) -> Coded:
        if generator is not None:
            bits = torch.randint(0, 1 << 16, X.shape, generator=generator).to(X.device)
            return {"": round_stochastically(X.float(), bits)}
        return {"": X.to(torch.bfloat16, memory_format=torch.contiguous_format)}

    def decode(self, coded: Coded, shape: tuple[int, ...]) -> Tensor:
        return coded[""].float()

    def part(self, coded: Coded, start: int, stop: int) -> Coded:
        return {"": coded[""].view(-1)[start:stop]}


@dataclass(frozen=True)
class Blockwise(Codec):
    """Codes of 8 or 4 bits and one float32 scale for each block: X = scale·level(code), scale = max|X|.

    Args:
        levels: ``"dynamic"``: a part of the levels for each power of ten, the more the nearer to 1 (arXiv 1511.04561,
            2110.02861), which suits moments; ``"linear"``: equal gaps, which suits bases; ``"normal"``, of 4 bits and
            signed: quantiles of a normal distribution, 8 above zero and 7 below (NF4), which suits weights.
        bits: of one code; two codes of 4 bits share a byte.
        signed: levels come with both signs. Unsigned levels are for tensors without negative entries, and a positive
            entry never becomes zero, whatever its size: Adam divides by its root.
        block: elements that share a scale.

    Example:
        >>> codec = Blockwise("dynamic", bits=8)
        >>> X = torch.tensor([[0.0, -2.0, 1e-6, 0.5]])
        >>> codec.decode(codec.encode(X), X.shape)
        tensor([[ 0.0000e+00, -2.0000e+00,  1.1000e-06,  4.9531e-01]])

    Source: arXiv 2110.02861 (8 bits), 2309.01507 (4 bits), 2407.08296 (linear levels for bases), 2305.14314 (NF4).
    """

    levels: Literal["dynamic", "linear", "normal"]
    bits: Literal[8, 4]
    signed: bool = True
    block: int = 256

    def __post_init__(self) -> None:
        if self.levels == "normal" and not (self.bits == 4 and self.signed):
            raise ValueError(f"levels='normal' are of 4 bits and signed, not bits={self.bits}, signed={self.signed}")

    def specs(self, shape: tuple[int, ...]) -> dict[str, StateSpec]:
        batch, size = _matrices(shape)
        codes = shape if self.bits == 8 else (*batch, math.ceil(size / 2))
        return {"": StateSpec(codes, torch.uint8), "_scale": StateSpec((*batch, math.ceil(size / self.block)))}

    def encode(self, X: Tensor, generator: torch.Generator | None = None) -> Coded:
        specs = self.specs(tuple(X.shape))
        coded = {suffix: spec.allocate(X.device) for suffix, spec in specs.items()}
        batch, _ = _matrices(tuple(X.shape))
        flat, codes, scales = (_by_matrix(tensor, batch) for tensor in (X, *coded.values()))
        packed = 8 // self.bits
        for start, stop in self._chunks(flat):
            values = pad(flat[:, start:stop].float(), (0, -(stop - start) % self.block)).unflatten(1, (-1, self.block))
            scale = values.abs().amax(dim=-1)
            chunk = self._codes(values, scale, generator).flatten(1)[:, : stop - start]
            if packed == 2:
                pairs = pad(chunk, (0, (stop - start) % 2)).unflatten(1, (-1, 2))
                chunk = pairs[..., 0] | pairs[..., 1] << 4
            codes[:, start // packed : math.ceil(stop / packed)] = chunk
            scales[:, start // self.block : math.ceil(stop / self.block)] = scale
        return coded

    def decode(self, coded: Coded, shape: tuple[int, ...]) -> Tensor:
        batch, size = _matrices(shape)
        flat = coded[""].new_empty(math.prod(batch), size, dtype=torch.float32)
        codes, scales = (_by_matrix(coded[suffix], batch) for suffix in ("", "_scale"))
        table, packed = _decoding(self, flat.device), 8 // self.bits
        for start, stop in self._chunks(flat):
            chunk = codes[:, start // packed : math.ceil(stop / packed)]
            values = table.index_select(0, chunk.flatten().int()).view(torch.float32).view(flat.shape[0], -1)
            scale = scales[:, start // self.block : math.ceil(stop / self.block)]
            whole = (stop - start) // self.block
            edge, out = whole * self.block, flat[:, start:stop]
            out.copy_(values[:, : stop - start])
            out[:, :edge].unflatten(1, (whole, self.block)).mul_(scale[:, :whole, None])
            out[:, edge:].mul_(scale[:, whole:])
        return flat.view(shape)

    def part(self, coded: Coded, start: int, stop: int) -> Coded:
        packed = 8 // self.bits
        return {
            "": coded[""].view(-1)[start // packed : math.ceil(stop / packed)],
            "_scale": coded["_scale"].view(-1)[start // self.block : math.ceil(stop / self.block)],
        }

    def _chunks(self, flat: Tensor) -> Iterator[tuple[int, int]]:
        (count, size), chunk = flat.shape, _CPU_CHUNK if on_host(flat.device) else _DEVICE_CHUNK
        length = max(1, chunk // max(1, count) // self.block) * self.block
        for start in range(0, size if count else 0, length):
            yield start, min(start + length, size)

    def _codes(self, values: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
        """uint8 codes of blocks (..., block).

        Code 0 is level 0, and negative levels count down from the last code. Normal levels are numbered from −1 to 1.
        """
        if self.levels == "normal":
            share = values / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
            levels, bounds = _normal(values.device)
            index = torch.bucketize(share, bounds, out_int32=True)
            return (index if generator is None else _stochastic(index, share, levels, generator)).to(torch.uint8)
        encoding = _encoding(self, values.device)
        share = values.abs() / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
        # Cells are bfloat16 numbers, cut off: none has two bounds between levels, so one comparison is enough.
        cell = (share.view(torch.int32) >> 16).sub_(encoding.first_cell).clamp_(0, encoding.below.numel() - 1)
        index = encoding.below.index_select(0, cell.flatten()).view(cell.shape)
        index += share > encoding.bounds.index_select(0, index.flatten()).view(cell.shape)
        if generator is not None:
            index = _stochastic(index, share, encoding.levels, generator)
        if self.signed:
            minus = values.view(torch.int32) >> 31  # 0 or −1: ~index + 1 is −index
            return index.bitwise_xor_(minus).sub_(minus).bitwise_and_((1 << self.bits) - 1).to(torch.uint8)
        return torch.maximum(index, (values > 0).int()).to(torch.uint8)


def moment_codec(storage: str, moment: Literal[1, 2]) -> Codec | None:
    """The codec of a first or second moment for the setting ``moments``; None for float32.

    Raises:
        ValueError: an unknown setting.
    """
    codecs: dict[str, Codec | None] = {
        "float32": None,
        "bfloat16": BFloat16(),
        "8bit": Blockwise("dynamic", 8, signed=moment == 1),
        "4bit": Blockwise("dynamic", 4, signed=moment == 1, block=128),
    }
    if storage not in codecs:
        raise ValueError(f"moments={storage!r}: choose one of {', '.join(map(repr, codecs))}")
    return codecs[storage]


def basis_codec(storage: str) -> Codec | None:
    """The codec of a basis for the setting ``basis_storage``; None for float32.

    Raises:
        ValueError: an unknown setting.
    """
    codecs: dict[str, Codec | None] = {
        "float32": None,
        "bfloat16": BFloat16(),
        "int8": Blockwise("linear", 8),
        "int4": Blockwise("linear", 4),
    }
    if storage not in codecs:
        raise ValueError(f"basis_storage={storage!r}: choose one of {', '.join(map(repr, codecs))}")
    return codecs[storage]


def _matrices(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(number of matrices,) or () for a single one, and the elements of each."""
    batch = shape[:1] if len(shape) == 3 else ()
    return batch, math.prod(shape[len(batch) :])


def _by_matrix(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """One row for each matrix, a view where the memory layout allows it."""
    count = math.prod(batch)
    return tensor.reshape(count, tensor.numel() // max(1, count))


@dataclass(frozen=True)
class _Encoding:
    """Tables for the way from |X|/scale to a level.

    Args:
        levels: magnitudes, ascending from 0 to 1.
        bounds: midpoints between neighbouring levels, and infinity.
        first_cell: number of the cell (a bfloat16 number) before the one that holds the first bound.
        below: how many bounds lie below each cell.
    """

    levels: Tensor
    bounds: Tensor
    first_cell: int
    below: Tensor


@functools.cache
def _encoding(codec: Blockwise, device: torch.device) -> _Encoding:
    levels = _magnitudes(codec)
    bounds = (levels[:-1] + levels[1:]) / 2
    first = int(bounds[:1].float().view(torch.int32) >> 16) - 1
    starts = (torch.arange(first, (0x3F80) + 1, dtype=torch.int32) << 16).view(torch.float32)
    below = torch.searchsorted(bounds.float(), starts, out_int32=True)
    below[0] = 0  # the first cell takes all that is smaller
    padded = torch.cat([bounds, torch.tensor([torch.inf])]).float()
    return _Encoding(levels.float().to(device), padded.to(device), first, below.to(device))


@functools.cache
def _decoding(codec: Blockwise, device: torch.device) -> Tensor:
    """Levels by byte: 256 float32 numbers, or, where a byte holds two codes, 256 pairs of them as one number each."""
    if codec.levels == "normal":
        codes = _normal(torch.device("cpu"))[0]
    else:
        levels = _magnitudes(codec).float()
        codes = torch.zeros(1 << codec.bits)
        codes[: len(levels)] = levels
        if codec.signed:
            codes[1 - len(levels) :] = -levels[1:].flip(0)
    byte = torch.arange(256)
    if codec.bits == 4:
        codes = torch.stack([codes[byte & 15], codes[byte >> 4]], dim=-1).view(torch.int64).flatten()
    return codes.to(device)


def _magnitudes(codec: Blockwise) -> Tensor:
    """Levels from 0 to 1, float64.

    The dynamic ones are means of neighbours in an even division of each power of ten, and 1, as in bitsandbytes; signed
    ones have 1 in place of the last mean, so that they are symmetric.
    """
    count = (1 << codec.bits - 1) - 1 if codec.signed else (1 << codec.bits) - 1
    if codec.levels == "linear":
        return torch.arange(count + 1, dtype=torch.float64) / count
    exponents = codec.bits - 1
    parts = [torch.zeros(1, dtype=torch.float64)]
    for exponent in range(exponents):
        edges = torch.linspace(0.1, 1.0, (1 if codec.signed else 2) * 2**exponent + 1, dtype=torch.float64)
        parts.append(10.0 ** (exponent + 1 - exponents) * (edges[:-1] + edges[1:]) / 2)
    levels = torch.cat(parts)[:count]
    return torch.cat([levels, torch.ones(1, dtype=torch.float64)])


@functools.cache
def _normal(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4 from −1 to 1, and the midpoints between them.

    On each side quantiles of a normal distribution at equal gaps of probability, divided by the largest. The outermost
    one is in the middle between the last cell of 15 and of 16 equal ones; the side above zero has one level more.
    """
    last = 0.9677083  # 1 − (1/30 + 1/32)/2 as it was cut off for the table that all others have
    above, below = (
        torch.special.ndtri(torch.linspace(0.5, last, count + 1, dtype=torch.float64)[1:]) for count in (8, 7)
    )
    levels = torch.cat([-below.flip(0), torch.zeros(1, dtype=torch.float64), above]) / above[-1]
    return levels.float().to(device), ((levels[:-1] + levels[1:]) / 2).float().to(device)


def _stochastic(index: Tensor, share: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Move from the nearest level to the one on the other side with the probability that keeps the mean."""

    def level(of: Tensor) -> Tensor:
        return levels.index_select(0, of.flatten()).view(of.shape)

    nearest = level(index)
    other = (index + (share - nearest).sign().int()).clamp_(0, levels.numel() - 1)
    distance = (share - nearest) / torch.where(other == index, 1.0, level(other) - nearest)
    draw = torch.rand(share.shape, generator=generator).to(share.device)
    return torch.where(draw < distance, other, index)
