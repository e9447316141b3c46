"""Load optimizer state without torch's cast.

`torch.optim.Optimizer.load_state_dict` casts every state tensor except ``step`` to the dtype of its parameter, integers
too, which loses digits before anything can repair it. Here nothing is cast: every tensor is checked against its
declaration and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from subspan.optim.groups import STRUCTURAL
from subspan.optim.method import Method
from subspan.optim.shards import Shards
from subspan.state import StateSpec

Declare = Callable[[str, Tensor, dict[str, Any], Mapping[str, Tensor]], dict[str, StateSpec]]
Divide = Callable[[str, Tensor, dict[str, Any]], Shards]
SCHEMA = 1


def match_groups(
    groups: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> dict[Any, tuple[str, Tensor, dict[str, Any]]]:
    """Map each saved parameter index to the parameter it belongs to: by name where both have names, else by position.

    Raises:
        ValueError: groups, parameters or structural settings differ; the message says how.
    """
    if len(groups) != len(saved):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(groups)}; "
            "build it from the same groups as the run that wrote the checkpoint"
        )
    mapping: dict[Any, tuple[str, Tensor, dict[str, Any]]] = {}
    for index, (group, old) in enumerate(zip(groups, saved, strict=True)):
        for key in STRUCTURAL:
            if key in group and group[key] != old.get(key, group[key]):
                raise ValueError(f"group {index}: the checkpoint has {key}={old[key]!r}, this optimizer {group[key]!r}")
        names, old_names = group.get("param_names"), old.get("param_names")
        if names is not None and old_names is not None:
            missing, unexpected = sorted(set(names) - set(old_names)), sorted(set(old_names) - set(names))
            if missing or unexpected:
                raise ValueError(
                    f"group {index}: parameters differ; only in this optimizer: {_some(missing)}; "
                    f"only in the checkpoint: {_some(unexpected)}"
                )
            by_name = dict(zip(names, group["params"], strict=True))
            for saved_index, name in zip(old["params"], old_names, strict=True):
                mapping[saved_index] = (name, by_name[name], group)
            continue
        if len(group["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index}: the checkpoint has {len(old['params'])} parameters, "
                f"this optimizer {len(group['params'])}"
            )
        for position, saved_index in enumerate(old["params"]):
            name = names[position] if names is not None else f"{index}.{position}"
            mapping[saved_index] = (name, group["params"][position], group)
    return mapping


def load_parameters(
    groups: list[dict[str, Any]],
    saved_groups: list[dict[str, Any]],
    saved_state: Mapping[Any, Any],
    declare: Declare,
    divide: Divide,
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Checked copies of the saved state as name -> (parameter, state).

    Raises:
        ValueError: groups, keys, shapes or dtypes differ from the declarations.
    """
    mapping = match_groups(groups, saved_groups)
    unknown = [key for key in saved_state if key not in mapping]
    if unknown:
        raise ValueError(f"the checkpoint holds state for parameters {unknown[:5]} that are in none of its groups")
    loaded = {}
    for index, (name, parameter, group) in mapping.items():
        state = _load_parameter(name, parameter, group, saved_state.get(index, {}), declare, divide)
        if state:
            loaded[name] = (parameter, state)
    return loaded


def _load_parameter(
    name: str, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, object], declare: Declare, divide: Divide
) -> dict[str, Tensor]:
    """The state of one parameter, each tensor checked and copied to where it belongs.

    Raises:
        ValueError: keys, shapes or dtypes differ from the declaration.
    """
    if not saved:
        return {}
    # The rank in force, where it changes, is part of the state that is to be declared.
    tensors = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    specs = declare(name, parameter, group, tensors if "refreshes" in tensors else {})
    if saved.keys() != specs.keys():
        raise ValueError(
            f"{name}: the checkpoint holds the state {_some(sorted(saved))}, this optimizer declares "
            f"{_some(sorted(specs))}; was it written by another method or with other settings?"
        )
    checked = {key: spec.check(saved[key], f"{name}: state {key!r}") for key, spec in specs.items()}
    shards = divide(name, parameter, group)
    state = {key: shards.copied(key, specs[key], value, parameter.device) for key, value in checked.items()}
    return state


def check_origin(state_dict: Mapping[str, Any], method: Method) -> Mapping[str, Any] | None:
    """The origin (method, parts, seed, schema) that a state records, None where it records none.

    Raises:
        ValueError: no optimizer state at all, another method, other parts, or a newer format.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"this is no optimizer state: it has no {key!r}")
    origin = state_dict.get("subspan")
    if origin is not None:
        if origin["schema"] > SCHEMA:
            raise ValueError(f"the checkpoint has format {origin['schema']}, newer than {SCHEMA}; update subspan")
        if origin["method"] != method.name:
            raise ValueError(
                f"the checkpoint was written by the method {origin['method']!r}, this one is {method.name!r}"
            )
        for part, here in method.parts().items():
            if origin["parts"][part] != here:
                raise ValueError(f"{method.name}: the checkpoint has {part} {origin['parts'][part]}, this one {here}")
    return origin


def _some(names: list[str], limit: int = 5) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
