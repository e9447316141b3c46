"""YAML files with settings, looked at before anything else reads them; imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["check_settings_file", "read_settings"]

_LARGEST = 1 << 20
_DEEPEST = 20
_MOST_VALUES = 10_000
_KINDS = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")
_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in _KINDS)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        ValueError: see `check_settings_file`.
        OSError: the file cannot be read.
    """
    content = yaml.safe_load(check_settings_file(path))
    assert isinstance(content, dict)
    return content


def check_settings_file(path: Path) -> str:
    """Return the text of a file that holds plain YAML settings, and not too many of them.

    Raises:
        ValueError: not UTF-8, not YAML, no mapping at the top; a key that is set twice; a tag that asks for an object;
            nesting or repeated anchors that would take all memory. The message names the file, and the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"{path} has more than {_LARGEST:,} bytes, so it is no file of settings.")
    try:
        text = raw.decode("utf-8-sig")
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; settings are text."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ValueError(f"{where}: not YAML ({error.problem}).") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; settings are at most {_DEEPEST} levels deep.") from error
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"{path} holds no settings; a line such as 'steps: 1000' is one.")
    if any(key.value == "config" for key, _ in document.value):
        raise ValueError(f"{path} names another file under 'config'; give that one with --config too, or in its place.")
    _check(document, path)
    return text


def _check(document: yaml.Node, path: Path) -> None:
    seen = 0
    left = [(document, 1)]
    # Anchors are followed each time they are named, as whoever copies the values would.
    while left:
        node, depth = left.pop()
        seen += 1
        where = f"{path}, line {node.start_mark.line + 1}"
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ValueError(f"{where}: {tag} is not allowed; settings are numbers, texts, lists and mappings.")
        if depth > _DEEPEST or seen > _MOST_VALUES:
            raise ValueError(
                f"{where}: too much; settings are at most {_DEEPEST} levels deep and {_MOST_VALUES:,} values, anchors "
                "counted each time they are named."
            )
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{where}: {min(twice)!r} is set twice; keep one of them.")
            left += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += [(part, depth + 1) for part in node.value]
