"""Checkpoints that are damaged, or changed by someone who knows how they are made."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path

from subspan.checkpoint.manifest import digest_file

#: In place of a value in a JSON file.
WRONG = [None, -1, 2**70, "x", [], {}, {"$tuple": 1}, 0.5, "../x", True, math.inf, math.nan]


def damaged(folder: Path, other: Path, choose: random.Random) -> str:
    """Change one or two things about a checkpoint; what was done."""
    done = []
    for _ in range(choose.choice([1, 1, 2])):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            break
        path = choose.choice(files)
        content = bytearray(path.read_bytes())
        kind = choose.choice(["flip", "flip", "truncate", "swap", "edit", "delete", "extend", "zero", "exchange"])
        if kind == "flip" and content:
            for _ in range(choose.choice([1, 1, 8])):
                content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
            path.write_bytes(content)
        elif kind == "truncate":
            path.write_bytes(content[: choose.randrange(len(content) + 1)])
        elif kind == "swap":
            source = other / path.name if (other / path.name).exists() else choose.choice(files)
            path.write_bytes(source.read_bytes())
        elif kind == "exchange":
            second = choose.choice(files)
            path.write_bytes(second.read_bytes())
            second.write_bytes(content)
        elif kind == "edit" and path.suffix == ".json":
            edit(path, choose)
        elif kind == "delete":
            path.unlink()
        elif kind == "extend":
            path.write_bytes(content + choose.randbytes(choose.randrange(1, 64)))
        elif kind == "zero":
            start = choose.randrange(len(content) + 1)
            content[start:] = bytes(len(content) - start)
            path.write_bytes(content)
        done.append(f"{kind} {path.name}")
    return ", ".join(done)


def edit(path: Path, choose: random.Random) -> None:
    """Change one value somewhere in a JSON file."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return
    place, key = {"root": content}, "root"
    while isinstance(place[key], dict | list) and place[key]:
        place = place[key]
        key = choose.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = choose.choice(WRONG)
    path.write_text(json.dumps(content))


def resealed(folder: Path, choose: random.Random) -> str:
    """Change one value in a file, and write a manifest that fits; what was changed."""
    path = choose.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    content = path.read_bytes()
    start, end = (0, len(content)) if path.suffix == ".json" else (8, 8 + int.from_bytes(content[:8], "little"))
    root = json.loads(content[start:end])
    place, key = {"root": root}, "root"
    for _ in range(choose.randrange(1, 6)):
        if isinstance(place[key], dict | list) and place[key]:
            place = place[key]
            key = choose.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place, dict) and choose.random() < 0.3:
        del place[key]
    else:
        place[key] = choose.choice(WRONG)
    text = json.dumps(root).encode()
    path.write_bytes(text if start == 0 else len(text).to_bytes(8, "little") + text + content[end:])
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())
    if path != manifest:
        listed["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
    if isinstance(listed, dict):
        listed.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps(listed | {"sha256": digest}))
    return f"{path.name}: {key}"
