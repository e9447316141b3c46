"""Parameters that `fully_shard` has divided over processes: what can be stepped in pieces, and what all agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subspan.linalg import Division
from subspan.optim.method import Geometry, Group, Method, Refresh
from subspan.optim.shards import WHOLE, Shards, is_sharded, local, shard_group
from subspan.state import Int8Weight


def shards_of(parameter: Tensor, geometry: Geometry | None, right: bool, divides_basis: bool = False) -> Shards:
    """How a parameter lies on the processes; ``geometry`` is that of the whole one, None where it is dense."""
    if not is_sharded(parameter):
        return WHOLE
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    if geometry is None:
        return Shards(mesh=mesh)
    if geometry.batch:
        return Shards(stack=geometry.batch[0], mesh=mesh)
    division = Division("columns" if right else "rows", geometry.m, geometry.n, shard_group(mesh))
    return Shards(division, not right and geometry.projected, None, divides_basis, mesh)


def check_shardable(name: str, parameter: Tensor, group: Group, method: Method) -> None:
    """Refuse what cannot be stepped in pieces.

    Raises:
        ValueError: naming the parameter, what is not possible and what is.
    """
    if not is_sharded(parameter):
        return
    from torch.distributed.tensor import Replicate, Shard

    *outer, inner = parameter.placements  # type: ignore[attr-defined]
    if type(inner) is not Shard or inner.dim != 0 or any(type(other) is not Replicate for other in outer):
        raise ValueError(
            f"{name}: placements {tuple(parameter.placements)} are not supported; "  # type: ignore[attr-defined]
            "fully_shard divides the first dimension, on a mesh of one dimension or, replicated as well, of two"
        )
    if (reason := unshardable(method, group)) is not None:
        raise ValueError(f"{name}: {reason}, which is not possible with parameters that fully_shard has divided")
    if isinstance(local(parameter), Int8Weight):
        raise ValueError(f"{name}: weights in int8 cannot be divided by fully_shard; keep them in float")


def unshardable(method: Method, group: Group) -> str | None:
    """Why a method cannot step a parameter in pieces; None where it can."""
    for key in ("moments", "basis_storage"):
        if (storage := group.get(key, "float32")) not in ("float32", "bfloat16"):
            return f"{key}={storage!r} has blocks that do not keep to the pieces"
    if group.get("outputs") == "columns":
        return "outputs='columns' normalises along the dimension that is divided"
    if method.subspace is not None:
        assert method.refresh is not None
        if not method.subspace.fixed_rank:
            return f"{type(method.subspace).__name__} changes ranks"
        if method.refresh.late:
            return "a late refresh folds gradients"
        if type(method.refresh).compare is not Refresh.compare:
            return f"{type(method.refresh).__name__} compares bases"
    return None


def agreed(bad: Sequence[str], looked_at: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Names that any process has found among parameters that are divided, with those of whole ones."""
    divided = [(name, parameter) for name, parameter in looked_at if is_sharded(parameter)]
    if not divided:
        return list(bad)
    found = set(bad)
    flags = torch.tensor([name in found for name, _ in divided], dtype=torch.float32, device=divided[0][1].device)
    mesh = divided[0][1].device_mesh  # type: ignore[attr-defined]
    flags = Division("rows", 1, 1, shard_group(mesh)).largest(flags)
    found |= {name for (name, _), flag in zip(divided, flags.tolist(), strict=True) if flag}
    return [name for name, _ in looked_at if name in found]


def squared_norm(X: Tensor) -> Tensor:
    """‖X‖² of a gradient, over all processes where it is divided; 0-D float64."""
    square = torch.linalg.vector_norm(local(X), dtype=torch.promote_types(X.dtype, torch.float32)).double().square()
    return Division("rows", 1, 1, shard_group(X.device_mesh)).total(square) if is_sharded(X) else square  # type: ignore[attr-defined]
