"""Plain values as JSON and back, unchanged: what pickle is not needed for."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip


def to_plain(value: object, where: str = "value") -> Any:
    """``value`` as something that JSON holds.

    JSON knows no tuples, no keys other than strings and no tensors; they become objects with one key that starts with
    ``$``. Tensors are written out whole, so they should be small: random states, learning rates.

    Raises:
        ValueError: anything else, such as a function or an object; ``where`` is named.

    Example:
        >>> to_plain({"betas": (0.9, 0.999)})
        {'betas': {'$tuple': [0.9, 0.999]}}
        >>> from_plain(to_plain({1: torch.tensor([2.0])}))
        {1: tensor([2.])}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, dict):
        items = [(key, to_plain(item, f"{where}[{key!r}]")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$items": [[to_plain(key, where), item] for key, item in items]}
    if isinstance(value, Tensor):
        host = value.detach().cpu().contiguous()
        name = str(host.dtype).removeprefix("torch.")
        if name in _DTYPES:
            data = base64.b64encode(host.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
            return {"$tensor": {"dtype": name, "shape": list(host.shape), "data": data}}
    raise ValueError(
        f"{where} is a {type(value).__name__}; a checkpoint holds numbers, strings, None, tensors, and lists, tuples "
        "and dicts of these"
    )


def from_plain(value: Any) -> Any:
    """What `to_plain` was given.

    Raises:
        ValueError: JSON that `to_plain` does not make.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: from_plain(item) for key, item in value.items()}
    content = value[tag]
    try:
        if len(value) > 1:
            raise ValueError("one key is expected")
        if tag == "$tuple":
            return tuple(from_plain(item) for item in content)
        if tag == "$items":
            return {from_plain(key): from_plain(item) for key, item in content}
        if tag == "$tensor":
            data = bytearray(base64.b64decode(content["data"], validate=True))
            shape = [int(length) for length in content["shape"]]
            dtype = _DTYPES[content["dtype"]]
            return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"an object with the key {tag!r} is not as a checkpoint has it: {error}") from error
    raise ValueError(f"an object with the key {tag!r} is nothing that a checkpoint holds")


def write_plain(path: Path, value: object) -> None:
    """Write plain values to a JSON file, under a temporary name that is then changed.

    Raises:
        ValueError: see `to_plain`; the file is not touched.
    """
    text = json.dumps(to_plain(value, path.stem), indent=1) + "\n"
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_plain(path: Path) -> Any:
    """Plain values from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what `write_plain` writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the checkpoint was written without it, or by another program")
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
