"""Random test matrices from a seed: the same numbers for every device, bucket, order and world size."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["gaussian_sketch", "seeded_generator"]


def seeded_generator(*key: int | str) -> torch.Generator:
    """CPU generator whose stream is a function of ``key`` alone.

    The key is encoded without ambiguity (type, length and value of each part), hashed with SHA-256, and the first eight
    bytes of the digest are the seed. Python's own ``hash`` would not do: it is salted per process.
    (torch's CPU generator uses 32 bits of a seed: among 100,000 keys one pair, give or take, shares its stream.)

    Args:
        *key: integers and strings, for instance (seed, parameter name, refresh count).

    Returns:
        A ``torch.Generator`` on the CPU.

    Raises:
        TypeError: if a part of the key is neither an integer nor a string.

    Example:
        >>> a, b = seeded_generator(0, "layers.0.weight", 3), seeded_generator(0, "layers.0.weight", 3)
        >>> bool((torch.randn(4, generator=a) == torch.randn(4, generator=b)).all())
        True
    """
    digest = hashlib.sha256()
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a key consists of integers and strings, got {part!r} of type {type(part).__name__}")
        data = str(part).encode()
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode() + data)
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest.digest()[:8], "big"))
    return generator


@torch.no_grad()
def gaussian_sketch(
    n: int,
    l: int,  # noqa: E741 - the letter of the literature
    *,
    generator: torch.Generator | None,
    batch_shape: tuple[int, ...] = (),
    scale: float | Tensor = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian test matrix Ω with independent entries N(0, scale²).

    The numbers are drawn on the CPU in float32 (float64 for ``dtype=torch.float64``), one matrix after the other, so a
    batch holds what as many single calls would have drawn; only then are they scaled, cast and moved.

    Args:
        n: rows of Ω.
        l: columns of Ω, the width of the sketch.
        generator: CPU generator, advanced by the call; None is torch's own.
        batch_shape: leading dimensions.
        scale: factor, a number or a tensor that broadcasts against (..., n, l).
        device: device of the result, the CPU by default.
        dtype: floating-point type of the result.

    Returns:
        Ω of shape (*batch_shape, n, l).

    Example:
        >>> gaussian_sketch(6, 2, generator=seeded_generator(0)).shape
        torch.Size([6, 2])

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061.
    """
    drawn_as = torch.promote_types(dtype, torch.float32)
    count = torch.Size(batch_shape).numel()
    omega = torch.empty(count, n, l, dtype=drawn_as)
    for matrix in omega:
        matrix.normal_(generator=generator)
    return (omega.reshape(*batch_shape, n, l).to(device) * scale).to(dtype)
