"""Parameters that `fully_shard` has divided over processes: what can be stepped in pieces, and what all agree on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

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
    found, divided = set(bad), defaultdict(list)
    for name, parameter in looked_at:
        if is_sharded(parameter):
            divided[parameter.device_mesh].append((name, parameter.device))  # type: ignore[attr-defined]
    for mesh, same in divided.items():
        flags = torch.tensor([name in found for name, _ in same], dtype=torch.float32, device=same[0][1])
        flags = _everyone(mesh).largest(flags)
        found |= {name for (name, _), flag in zip(same, flags.tolist(), strict=True) if flag}
    return [name for name, _ in looked_at if name in found]


def squared_norms(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Numbers whose sum is that of all ‖G‖²: one for each whole gradient, one for all that a mesh divides.

    They are 0-D and float64; one collective call a mesh.
    """
    result: list[Tensor] = []
    divided: dict[Any, list[Tensor]] = defaultdict(list)
    for G in gradients:
        norm = torch.linalg.vector_norm(local(G), dtype=torch.promote_types(G.dtype, torch.float32))
        (divided[G.device_mesh] if is_sharded(G) else result).append(norm.double().square())  # type: ignore[attr-defined]
    return result + [_everyone(mesh).total(torch.stack(squares).sum()) for mesh, squares in divided.items()]


def _everyone(mesh: Any) -> Division:
    """The processes over which a mesh divides parameters, for sums and maxima of what is as large on each of them."""
    return Division("rows", 1, 1, shard_group(mesh))
