"""Read checkpoints, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from subspan.checkpoint.manifest import Report, verify
from subspan.checkpoint.plain import read_plain
from subspan.checkpoint.save import EXTRA, OPTIMIZER_JSON, TIED
from subspan.checkpoint.staging import processes
from subspan.checkpoint.states import checked_document, is_sharded, model_tensors, optimizer_state, state_names
from subspan.checkpoint.tensors import Held, empty_like, held_tensors, read_tensors
from subspan.optim import LowRankOptimizer
from subspan.optim.carry import carried
from subspan.optim.names import canonical_name

__all__ = ["load_checkpoint", "load_weights", "read_document", "read_optimizer"]

_ADVICE = ". With carry_over=True what fits would be taken over"


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    carry_over: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint that `save_checkpoint` or a run wrote, after every file was checked against its SHA-256.

    Nothing is unpickled. The number of processes, and how they divide the model, need not be those that wrote it: each
    reads the parts that it holds. With a divided model every process calls this. When anything does not fit, nothing is
    changed.

    Args:
        folder: of the checkpoint.
        model: gets the weights; names, shapes and dtypes must agree.
        optimizer: gets the state, or None to leave it.
        carry_over: take the state of another method, rank or kind of optimizer over as well as it can be: see
            `subspan.optim.carry.carried`. The settings stay those of ``optimizer``.

    Returns:
        What was given as ``extra``.

    Raises:
        FileNotFoundError: no such folder, or it holds no state of an optimizer.
        ValueError: the checkpoint is not whole, or is one of another model, method, rank or newer format; the message
            says what differs.
    """
    folder = Path(folder)
    _verify(folder, together=is_sharded(dict(model.named_parameters()))).raise_if_bad()
    held = held_tensors(folder)
    extra = (read_plain(folder / EXTRA) if (folder / EXTRA).is_file() else None) or {}
    weights = _read_weights(folder, model, held)
    if optimizer is not None:
        read_optimizer(folder, optimizer, model, carry_over=carry_over, held=held)
    model.load_state_dict(weights)
    return extra


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint whose files have been checked; see `load_checkpoint`.

    Raises:
        ValueError: they are those of another model.
    """
    model.load_state_dict(_read_weights(folder, model, held_tensors(folder)))


def _read_weights(folder: Path, model: nn.Module, held: dict[str, Held]) -> dict[str, Tensor]:
    """The state of a model from a checkpoint, compared with what the model has."""
    tied = _check_model(folder, model, held)
    tensors, shared = model_tensors(model)
    weights = {name: entry for name, entry in held.items() if "/" not in name}
    saved = read_tensors(folder, {name: empty_like(entry, tensors.get(name)) for name, entry in weights.items()})
    saved |= {name: saved[first] for name, first in tied.items()}
    for name, first in shared.items():
        if not _equal(saved[name], saved[first]):
            raise ValueError(f"{folder} holds another model: {name} and {first} differ there, and are one tensor here.")
    return {key: saved[canonical_name(key)] for key in model.state_dict()}


def _equal(first: Tensor, second: Tensor) -> bool:
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (first, second)]
    return parts[0] is parts[1] or (parts[0].shape == parts[1].shape and torch.equal(*parts))


def _verify(folder: Path, *, together: bool) -> Report:
    """Check a checkpoint; processes that load it together divide its files among them."""
    if not together:
        return verify(folder)
    own = verify(folder, files=())
    if own.manifest is not None and own.ok:
        own = verify(folder, files=sorted(own.manifest.files)[dist.get_rank() :: processes()])
    problems: list[tuple[str, ...]] = [()] * processes()
    dist.all_gather_object(problems, own.problems)
    return Report(folder, tuple(dict.fromkeys(problem for part in problems for problem in part)), own.manifest)


def _check_model(folder: Path, model: nn.Module, held: dict[str, Held]) -> dict[str, str]:
    """Compare a model's state with what a checkpoint holds; returns what is tied to a tensor under another name."""
    expected = {canonical_name(key): value for key, value in model.state_dict().items()}
    tied: dict[str, str] = read_plain(folder / TIED) if (folder / TIED).is_file() else {}
    # transformers saves what a model ties once, and says nothing about it.
    tied = {name: first for name, first in (model_tensors(model)[1] | tied).items() if name not in held}
    known = {name: entry for name, entry in held.items() if "/" not in name}
    known |= {name: held[first] for name, first in tied.items() if first in held}
    differing = [f"{name} is missing" for name in expected if name not in known]
    differing += [f"{name} is not in this model" for name in known if name not in expected]
    for name, tensor in expected.items():
        if name in known and (tuple(tensor.shape), tensor.dtype) != known[name]:
            shape, dtype = known[name]
            differing.append(f"{name} is {dtype} {shape}, in this model {tensor.dtype} {tuple(tensor.shape)}")
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{folder} holds another model: {'; '.join(differing[:5])}{more}.")
    return tied


def read_document(folder: Path) -> dict[str, Any]:
    """The groups, settings and origin of the optimizer in a checkpoint.

    Raises:
        FileNotFoundError: the checkpoint holds none.
        ValueError: a newer format, or not such a file.
    """
    document = read_plain(folder / OPTIMIZER_JSON)
    try:
        return checked_document(document)
    except ValueError as error:
        raise ValueError(f"{folder / OPTIMIZER_JSON} {error}") from error


def read_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    carry_over: bool = False,
    held: dict[str, Held] | None = None,
) -> None:
    """Load the optimizer of a checkpoint whose files have been checked; see `load_checkpoint`."""
    folder = Path(folder)
    document = read_document(folder)
    held = held_tensors(folder) if held is None else held
    names = state_names(optimizer, model)
    if missing := [key for key in document["tensors"] if key not in held]:
        raise ValueError(f"{folder}: the state of the optimizer is incomplete: {', '.join(missing[:5])} is missing")
    if not carry_over:
        _check_kind(folder, document, optimizer, names)
    into = {key: empty_like(held[key], like) for key, like in _likes(document["tensors"], optimizer, names).items()}
    tensors = read_tensors(folder, into)
    if carry_over and not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"{type(optimizer).__name__} takes over no other state; carry it over to one of subspan")
    if isinstance(optimizer, LowRankOptimizer) and carry_over and not _is_divided(optimizer):
        optimizer.load_state_dict(_carried(optimizer, document, tensors, names))
        return
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(optimizer_state(document, tensors, names))
    except ValueError as error:
        advice = _ADVICE if isinstance(optimizer, LowRankOptimizer) else ""
        if carry_over:
            advice = ". What is divided over processes takes over the same shapes only: convert the checkpoint first"
        raise ValueError(f"{folder}: {error}{advice}") from error
    if carry_over:
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update(kept)


def _is_divided(optimizer: torch.optim.Optimizer) -> bool:
    return any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


def _carried(
    optimizer: LowRankOptimizer, document: dict[str, Any], tensors: dict[str, Tensor], names: list[list[str]]
) -> dict[str, Any]:
    # Parameters of groups without names have others in the optimizer than in the model.
    own = {
        name: own
        for group, group_names in zip(optimizer.param_groups, names, strict=True)
        for name, (own, _) in zip(group_names, optimizer._named(group), strict=True)
    }
    saved: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for group in document["groups"]:
        for name in group["params"]:
            saved[own.get(name, name)] = ({}, group["settings"])
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        saved[own.get(name, name)][0][kind] = tensor
    return carried(optimizer, saved, document["origin"])


def _check_kind(
    folder: Path, document: dict[str, Any], optimizer: torch.optim.Optimizer, names: list[list[str]]
) -> None:
    """Refuse the state of another kind of optimizer; one of subspan compares the rest itself."""
    ours = isinstance(optimizer, LowRankOptimizer)
    if ours != (document["origin"] is not None) or (not ours and document["optimizer"] != type(optimizer).__name__):
        advice = _ADVICE if ours else ""
        raise ValueError(
            f"{folder} holds the state of {document['optimizer']}, this optimizer is {type(optimizer).__name__}{advice}"
        )
    saved = [group["params"] for group in document["groups"]]
    if not ours and [sorted(group) for group in saved] != [sorted(group) for group in names]:
        there, here = ({name for group in groups for name in group} for groups in (saved, names))
        raise ValueError(
            f"{folder}: the parameters of the optimizer differ; only in the checkpoint: {sorted(there - here)[:5]}; "
            f"only here: {sorted(here - there)[:5]}; their groups must be the same too"
        )


def _likes(keys: list[str], optimizer: torch.optim.Optimizer, names: list[list[str]]) -> dict[str, Tensor | None]:
    """For each state tensor one that is divided as it is to be: the one there is, else the parameter."""
    if isinstance(optimizer, LowRankOptimizer) and _is_divided(optimizer):
        optimizer.init_state()
    likes: dict[str, Tensor | None] = {}
    parameters = {
        name: parameter
        for group, group_names in zip(optimizer.param_groups, names, strict=True)
        for name, parameter in zip(group_names, group["params"], strict=True)
    }
    for key in keys:
        name, _, own = key.rpartition("/")
        parameter = parameters.get(name)
        state = {} if parameter is None else optimizer.state.get(parameter, {})
        likes[key] = state.get(own, parameter)
    return likes
