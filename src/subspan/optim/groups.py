"""Keys of a parameter group: aliases, defaults and checks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from subspan.optim.matrix import PROJ_TYPES
from subspan.optim.method import Geometry, Group, Method
from subspan.state import basis_codec, moment_codec

ALIASES = {"alpha": "scale", "projection_type": "proj_type"}
# Keys that torch, its schedulers and users put into groups beside the settings of a method.
BOOKKEEPING = frozenset({"params", "param_names", "initial_lr", "max_lr", "min_lr", "lr_scale", "name"})
# Keys that decide the shape of the state: they must agree between a checkpoint and the optimizer that loads it.
STRUCTURAL = ("rank", "density", "proj_type", "outputs", "moments", "basis_storage", "min_quantized", "queue_size")


#: Where the outputs of a layer are in its matrix.
OUTPUTS = ("rows", "columns", None)


def is_projected(group: Group) -> bool:
    """Whether the matrices of this group are projected."""
    return group.get("rank") is not None or group.get("density") is not None


def keeps_whole_moments(group: Group, method: Method) -> bool:
    """Whether ``moments`` of the optimizer do not count: for embeddings, heads and vectors, and where none are kept."""
    whole = method.projects or group.get("name") == "others" or group.get("momentum") == 0
    return not is_projected(group) and whole


def complete_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``group`` with aliases resolved and ``lr_scale`` multiplied into its learning rate.

    Raises:
        ValueError: an unknown key, or an alias beside the key that it stands for.
        TypeError: ``group`` is not a dict.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, not {type(group).__name__}")
    complete: dict[str, Any] = {}
    for key, value in group.items():
        name = ALIASES.get(key, key) if key not in defaults else key
        if name not in defaults and name not in BOOKKEEPING:
            raise ValueError(unknown_setting(key, [*defaults, *ALIASES], "key of a parameter group"))
        if name in complete:
            aliases = [alias for alias in group if ALIASES.get(alias) == name]
            raise ValueError(f"a parameter group has both {name!r} and its alias {aliases[0]!r}; keep one of them")
        complete[name] = value
    # Taken out, so that groups which are used again are not scaled again.
    factor = complete.pop("lr_scale", 1.0)
    if factor < 0.0:
        raise ValueError(f"lr_scale={factor!r} is not allowed; it must be a number >= 0")
    if factor != 1.0:
        complete["lr"] = complete.get("lr", defaults["lr"]) * factor
    return complete


def check_group(group: Group, method: Method) -> None:
    """Check the values of a complete group.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    def demand(good: bool, key: str, allowed: str) -> None:
        if not good:
            raise ValueError(f"{method.name}: {key}={group[key]!r} is not allowed; it must be {allowed}")

    def number(key: str, low: float, allowed: str) -> None:
        if key in group:
            demand(_is_number(group[key]) and group[key] >= low, key, allowed)

    lr = group["lr"]
    single = isinstance(lr, Tensor) and lr.numel() == 1
    demand(_is_number(lr) or single, "lr", "a number or a tensor with one element")
    demand(float(lr) >= 0.0, "lr", "a number >= 0")
    for key in ("eps", "weight_decay", "sign_scale", "scale"):
        number(key, 0.0, "a number >= 0")
    if group.get("limiter") is not None:
        number("limiter", 1.0, "a number >= 1, or None for no limit")
    if "golore_after" in group:
        after = group["golore_after"]
        demand(after == 0 or _is_count(after), "golore_after", "a step: an integer >= 0")
    if "queue_size" in group:
        demand(_is_count(group["queue_size"]), "queue_size", "an integer >= 1")
        number("gamma_proj", 1.0, "a number >= 1")
        demand(_is_number(group["cos_threshold"]), "cos_threshold", "a number; 1 is the overlap of equal subspaces")
    if "rtol" in group:
        demand(_is_number(group["rtol"]) and 0.0 < group["rtol"] < 1.0, "rtol", "a number between 0 and 1")
    if group.get("warm_start"):
        _check_warm_start(group, method)
    if "outputs" in group:
        demand(group["outputs"] in OUTPUTS, "outputs", "'rows' or 'columns', or None where all takes Adam")
        momentum = group["momentum"]
        demand(_is_number(momentum) and 0.0 <= momentum < 1.0, "momentum", "a number in [0, 1); 0 keeps no state")
    _check_storage(group, method)
    betas = group.get("betas", (0.0, 0.0))
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    demand(pair and all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in betas), "betas", "two numbers in [0, 1)")
    if not method.projects:
        return
    gap, rank, density = group["update_proj_gap"], group["rank"], group.get("density")
    demand(_is_count(gap), "update_proj_gap", "an integer >= 1")
    demand(group["proj_type"] in PROJ_TYPES, "proj_type", f"one of {', '.join(PROJ_TYPES)}")
    demand(rank is None or _is_count(rank), "rank", "an integer >= 1, or None for a dense group")
    if density is not None:
        share = _is_number(density) and 0.0 <= density <= 1.0
        demand(share, "density", "a number in [0, 1], or None for a dense group")
        demand(rank is None, "rank", "None where a density is given")


def _check_warm_start(group: Group, method: Method) -> None:
    """Check the share of a sketch that is not random; more than three quarters would lock onto old noise."""
    share = group["warm_start"]
    if not (_is_number(share) and 0.0 <= share <= 0.75):
        raise ValueError(
            f"{method.name}: warm_start={share!r} is not allowed; it must be a number from 0 to 0.75: at least a "
            "quarter of a sketch has to be fresh"
        )
    assert method.refresh is not None
    if not method.refresh.late:
        raise ValueError(
            f"{method.name}: warm_start={share!r} is for late refreshes; give refresh='late' too, or leave it out"
        )
    if all(spec.moment != 1 for spec in method.inner.specs((1, 1), torch.float32, group).values()):
        raise ValueError(
            f"{method.name}: warm_start={share!r}, but {method.inner} keeps no first moment; leave it out, or take Adam"
        )


def _check_storage(group: Group, method: Method) -> None:
    """Check how the state of a group is to be held."""
    least = group.get("min_quantized", 1)
    if not _is_count(least):
        raise ValueError(f"{method.name}: min_quantized={least!r} is not allowed; it must be an integer >= 1")
    moments, basis = group.get("moments", "float32"), group.get("basis_storage", "float32")
    moment_codec(moments, 1)
    basis_codec(basis)
    if moments != "float32" and not method.inner.specs((1, 1), torch.float32, group):
        raise ValueError(
            f"{method.name}: moments={moments!r}, but {method.inner} keeps no moments; leave moments out, or take Adam"
        )
    rounding = group.get("rounding", "nearest")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{method.name}: rounding={rounding!r}: choose 'nearest' or 'stochastic'")
    if rounding == "stochastic" and any(parameter.dtype == torch.float16 for parameter in group["params"]):
        raise ValueError(
            f"{method.name}: rounding='stochastic' is for bfloat16 weights, and there are float16 ones; leave it out, "
            "or train in bfloat16"
        )
    if basis == "float32" or not is_projected(group):
        return
    assert method.subspace is not None
    has_basis = method.subspace.stored and "basis" in method.subspace.specs(Geometry((), 2, 2, 1))
    if not has_basis:
        raise ValueError(
            f"{method.name}: basis_storage={basis!r}, but {method.subspace} stores no basis; leave basis_storage out"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def unknown_setting(name: str, allowed: Iterable[str], kind: str) -> str:
    """Message for a setting that does not exist, with the nearest one that does."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown {kind} {name!r}{f'; did you mean {close[0]!r}?' if close else ''}; allowed: {', '.join(names)}"
