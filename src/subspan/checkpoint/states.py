"""The states of a model and of an optimizer as flat names -> tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from subspan.optim.names import canonical_name

__all__ = [
    "OPTIMIZER_SCHEMA",
    "checked_document",
    "is_sharded",
    "model_tensors",
    "optimizer_document",
    "optimizer_state",
    "state_names",
]

#: Version of ``optimizer.json``; what a state itself means is versioned in its origin.
OPTIMIZER_SCHEMA = 1


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of the tensors is divided over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a model without wrappers' names, and which names stand for a tensor that has another one.

    Raises:
        ValueError: a state that holds something else than tensors.
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, tensor in model.state_dict().items():
        name = canonical_name(key)
        if not isinstance(tensor, Tensor) or "/" in name:
            raise ValueError(
                f"{name}: a checkpoint holds tensors of a model under names without '/', and this is a "
                f"{type(tensor).__name__}"
            )
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (local.data_ptr(), local.device, local.dtype, tuple(local.shape), local.stride(), tuple(tensor.shape))
        if local.numel() > 0 and place in seen:
            tied[name] = seen[place]
        else:
            tensors[name] = tensor.detach()
            seen[place] = name
    return tensors, tied


def state_names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[list[str]]:
    """Names of the parameters of each group: its own, else those in the model, else group and position."""
    known = {} if model is None else {id(p): canonical_name(name) for name, p in model.named_parameters()}
    names = []
    for index, group in enumerate(optimizer.param_groups):
        own = group.get("param_names")
        if own is None:
            own = [known.get(id(p), f"{index}.{position}") for position, p in enumerate(group["params"])]
        names.append([canonical_name(name) for name in own])
    return names


def optimizer_document(
    optimizer: torch.optim.Optimizer, names: list[list[str]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of an optimizer as plain values and tensors, which have the names ``PARAMETER/KEY``."""
    state_dict = optimizer.state_dict()
    groups: list[dict[str, Any]] = []
    by_index: dict[int, str] = {}
    for group, group_names in zip(state_dict["param_groups"], names, strict=True):
        by_index |= dict(zip(group["params"], group_names, strict=True))
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"settings": settings, "params": group_names, "named": "param_names" in group})
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for key, value in state.items():
            held = tensors if isinstance(value, Tensor) else values
            held[f"{by_index[index]}/{key}"] = value
    document = {
        "schema": OPTIMIZER_SCHEMA,
        "optimizer": type(optimizer).__name__,
        "origin": state_dict.get("subspan"),
        "groups": groups,
        "tensors": sorted(tensors),
        "values": values,
    }
    return document, tensors


def checked_document(document: object) -> dict[str, Any]:
    """What `optimizer_document` returned, with everything in its place; the values of settings are not looked at.

    Raises:
        ValueError: a newer format, or another kind of value; for a message that begins with the file.
    """
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise ValueError("is no state of an optimizer")
    if document["schema"] > OPTIMIZER_SCHEMA:
        raise ValueError(f"has format {document['schema']}, newer than {OPTIMIZER_SCHEMA}; update subspan")
    groups, origin = document.get("groups"), document.get("origin")
    fits = isinstance(document.get("optimizer"), str) and isinstance(groups, list) and "origin" in document
    fits = fits and all(
        isinstance(group, dict)
        and isinstance(group.get("settings"), dict)
        and isinstance(group.get("named"), bool)
        and _are_names(group.get("params"))
        for group in groups or ()
    )
    if fits and origin is not None:
        fits = isinstance(origin, dict) and isinstance(origin.get("parts"), dict)
        fits = fits and isinstance(origin.get("method"), str)
        fits = fits and all(isinstance(origin.get(key), int) for key in ("schema", "seed", "skipped_steps"))
    if not fits or not _are_names(document.get("tensors")) or not isinstance(document.get("values"), dict):
        raise ValueError("is not as a checkpoint has it: some of its parts are missing or of another kind")
    known = [name for group in document["groups"] for name in group["params"]]
    keys = [*document["tensors"], *document["values"]]
    if len(set(known)) < len(known) or (strange := {key.rpartition("/")[0] for key in keys}.difference(known)):
        named = "a parameter twice" if len(set(known)) < len(known) else f"{sorted(strange)[:5]}, which no group has"
        raise ValueError(f"is not as a checkpoint has it: it names {named}")
    return document


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def optimizer_state(
    document: dict[str, Any], tensors: Mapping[str, Tensor], names: list[list[str]] | None = None
) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` returned.

    Args:
        document, tensors: what `optimizer_document` returned.
        names: parameters of each group of the optimizer that is to load it; groups with the same parameters take their
            order.
    """
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    index_of: dict[str, int] = {}
    for position, group in enumerate(document["groups"]):
        order = list(group["params"])
        if names is not None and position < len(names) and sorted(names[position]) == sorted(order):
            order = names[position]
        indices = list(range(len(index_of), len(index_of) + len(order)))
        index_of |= dict(zip(order, indices, strict=True))
        named = {"param_names": order} if group["named"] else {}
        groups.append({**group["settings"], "params": indices, **named})
    for key, value in {**document["values"], **tensors}.items():
        name, _, own = key.rpartition("/")
        state.setdefault(index_of[name], {})[own] = value
    origin = {} if document["origin"] is None else {"subspan": document["origin"]}
    return {"state": state, "param_groups": groups, **origin}
