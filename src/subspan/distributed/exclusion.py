"""Parameters whose gradient is folded in backward or never formed: averaged by us in place of DDP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspan.distributed.agreement import check_agreement
from subspan.distributed.traffic import Traffic
from subspan.optim import LowRankOptimizer
from subspan.optim.averaged import Averaged
from subspan.optim.late import Folded
from subspan.state import held


def exclude_from_ddp(model: nn.Module, optimizer: LowRankOptimizer, group: dist.ProcessGroup | None = None) -> Traffic:
    """Let the optimizer average the gradients that it takes in backward, and DDP all others.

    DDP would see gradients that are gone, or make some of zeros where none is formed. So the projected parameters are
    taken out of what it reduces and broadcasts; their values are broadcast here, from the first process. When `step`,
    `grad_norm` or `clip_grad_norm_` looks at what was folded, R and the sketches are averaged, in the dtype of the
    weights, in one all-reduce for each dtype, after one of the flags that say who has gradients at all. These three are
    therefore collective calls: all processes make them alike. Accumulation needs no ``no_sync()`` for these parameters.

    Call it in every process after ``optimizer.fuse_into_backward()`` or `subspan.nn.project_gradients`, and before the
    model is wrapped.

    Args:
        model: the model, not yet wrapped.
        optimizer: with `fuse_into_backward`, of the same settings on all processes.
        group: process group, the one that DDP is given; the default one if None.

    Returns:
        The count of bytes, without those of DDP: give it to `count_traffic`.

    Raises:
        TypeError: the model is wrapped already.
        ValueError: an optimizer that does not take gradients in backward or belongs to another model, or settings that
            differ between processes.

    Example:
        >>> def wrap(model):  # in each process, after init_process_group
        ...     optimizer = GaLore(model, rank=128)
        ...     optimizer.fuse_into_backward()
        ...     traffic = exclude_from_ddp(model, optimizer)
        ...     return DistributedDataParallel(model), optimizer, traffic
    """
    if isinstance(model, DistributedDataParallel):
        raise TypeError("exclude_from_ddp() comes before DDP: pass the model itself, then wrap it")
    if not (optimizer.fused and optimizer.folds):
        raise ValueError(
            f"{optimizer.method.name} takes no gradients in backward: call optimizer.fuse_into_backward() first, or "
            "wrap the model in DDP as it is and call compress_gradients(ddp, optimizer)"
        )
    check_agreement(optimizer, group)
    projected = optimizer.projected_parameters()
    names = _names_for_ddp(model, set(projected.values()))
    missing = [name for name, parameter in projected.items() if parameter not in set(model.parameters())]
    if missing:
        raise ValueError(f"{', '.join(missing[:5])}: the optimizer holds parameters that are not in this model")
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    for parameter in projected.values():
        for part in held(parameter):
            dist.broadcast(part.detach(), group=group, group_src=0)
    traffic = Traffic()
    optimizer.average_with(lambda owner, local: _average(owner, local, group, traffic))
    return traffic


def _names_for_ddp(model: nn.Module, parameters: set[Tensor]) -> list[str]:
    """All names under which DDP may know the parameters; it calls those of the outermost module ``.name`` at times."""
    names = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in parameters:
                names += [f"{prefix}.{name}"] if prefix else [name, f".{name}"]
    return names


@torch.no_grad()
def _average(
    optimizer: Averaged, local: Mapping[str, Folded], group: dist.ProcessGroup | None, traffic: Traffic
) -> dict[str, Folded]:
    """The averages of what all processes have folded of parameters of which one of them has."""
    entries = optimizer.projected_entries()
    kept = [name for name, parameter, _ in entries if parameter.grad is not None]
    if kept:
        raise RuntimeError(
            f"{', '.join(kept[:5])}: gradients that were not taken in backward, so nobody averages them; add groups "
            "and unfreeze parameters before exclude_from_ddp()"
        )
    flags = torch.tensor([float(name in local) for name, _, _ in entries], device=entries[0][1].device)
    traffic.count("flags", flags)
    dist.all_reduce(flags, group=group)
    averages: dict[str, Folded] = {}
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for entry, processes in zip(entries, flags.tolist(), strict=True):
        name, parameter, _ = entry
        if not processes:
            continue
        folded = local.get(name) or optimizer.nothing_folded(entry)
        R, Y = folded.gradient().contiguous(), folded.whole_sketch()
        averages[name] = Folded(R, None if Y is None else Y.contiguous(), folded.squared_norm)
        pieces = by_dtype.setdefault(parameter.dtype, [])
        pieces.append(R)
        traffic.count("projected", R.numel() * parameter.itemsize)
        if Y is not None:
            pieces.append(Y)
            traffic.count("sketch", Y.numel() * parameter.itemsize)
    for dtype, pieces in by_dtype.items():
        flat = torch.cat([piece.flatten() for piece in pieces]).div_(dist.get_world_size(group)).to(dtype)
        dist.all_reduce(flat, group=group)
        for piece, mean in zip(pieces, flat.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(mean.view_as(piece))
    return {name: Folded.unformed(item.projected, item.sketch) for name, item in averages.items()}
