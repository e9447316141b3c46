"""Row tiles: work on large matrices in pieces that fit the cache, so that no temporary has the matrix's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from subspan.state.host import is_rehearsed, on_host

# Elements of one tile. On a CPU a float32 tile of 1 MiB stays in the second-level cache; a device wants fewer launches.
_CPU_TILE = 1 << 18
_DEVICE_TILE = 1 << 22
# Neighbours in memory that are worth being worked on together: a cache line of float32.
_LINE = 16


@dataclass(frozen=True)
class Tile:
    """A slice of an oriented matrix along the dimension whose slices are contiguous in memory."""

    dim: int
    start: int
    length: int

    def of(self, X: Tensor) -> Tensor:
        """This tile of ``X``, a view; ``X`` itself where it broadcasts along the tiled dimension."""
        return X if X.shape[self.dim] == 1 else X.narrow(self.dim, self.start, self.length)


def tiles(X: Tensor, *, wide: bool = False) -> Iterator[Tile]:
    """Tiles that cover ``X`` (..., m, n), itself or a transposed view, each contiguous in memory for one matrix.

    ``wide`` says that some numbers for each element are of 64 bits, as those are that round stochastically.
    """
    dim = -2 if X.stride(-1) == 1 else -1
    size = X.shape[dim]
    length = max(1, _budget(X) // (WIDE if wide else 1) * size // max(1, X.numel()))
    if wide and length > 4:
        length -= length % 4  # random numbers come four at a time
    for start in _starts(size, length):
        yield Tile(dim, start, min(length, size - start))


def row_tiles(X: Tensor, multiple: int = 1, *, wide: bool = False) -> Iterator[Tile]:
    """Tiles of whole rows that cover ``X`` (m, n), however it lies in memory; each begins at a multiple of a number."""
    rows, columns = X.shape
    least = 1 if X.stride(-1) == 1 else _LINE
    length = max(least, _budget(X) // (WIDE if wide else 1) // max(1, columns))
    length = max(multiple, length - length % multiple)
    for start in _starts(rows, length):
        yield Tile(-2, start, min(length, rows - start))


def _starts(size: int, length: int) -> range:
    return range(0, min(size, 2 * length) if is_rehearsed() else size, length)


#: By so much a tile is smaller whose elements come with numbers of 64 bits.
WIDE = 4


def _budget(X: Tensor) -> int:
    return _CPU_TILE if on_host(X.device) else _DEVICE_TILE
