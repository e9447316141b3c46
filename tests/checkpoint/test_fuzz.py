"""Damaged at random: a checkpoint is refused with a message, or loads to the very same numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from subspan.checkpoint import latest, load_checkpoint, save_checkpoint
from subspan.optim import GaLore
from tests.checkpoint.models import model, train

#: More in a long test.
CASES = int(os.environ.get("SUBSPAN_FUZZ_CASES", "200"))


def state(network: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: Any) -> Any:
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = dict(network.state_dict())
    for index, held in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}/{key}": value for key, value in held.items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}, settings, extra


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
            shutil.copy(other / path.name if (other / path.name).exists() else choose.choice(files), path)
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
    place[key] = choose.choice([None, -1, 2**70, "x", [], {"$tuple": 1}, 0.5, "../x", True])
    path.write_text(json.dumps(content))


def test_no_damage_is_silent(tmp_path: Path) -> None:
    network = model()
    optimizer = GaLore(network, rank=4, update_proj_gap=3)
    folders = []
    for step in (1, 2):
        train(network, optimizer, 1)
        extra = {"step": step, "rng": torch.arange(40)}
        folders.append(save_checkpoint(tmp_path / f"checkpoint-{step}", network, optimizer, extra=extra))
    extra["rng"] = extra["rng"].tolist()
    expected = state(network, optimizer, extra)
    choose = random.Random(0)
    refused = 0
    for case in range(CASES):
        run = tmp_path / "fuzzed"
        copy = run / "checkpoint-2"
        shutil.copytree(folders[1], copy)
        what = f"case {case}: {damaged(copy, folders[0], choose)}"
        target = model(seed=1)
        loaded = GaLore(target, rank=4, update_proj_gap=3)
        untouched = state(target, loaded, None)
        skipped: list[str] = []
        found = latest(run, skipped=skipped.append)
        try:
            got = load_checkpoint(copy, target, loaded)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert len(str(error)) > 20 and str(copy) in str(error), what
            assert found is None and len(skipped) == 1, what
            assert state(target, loaded, None) == untouched, what
        else:
            got["rng"] = got["rng"].tolist()
            assert state(target, loaded, got) == expected, what
            assert found == copy, what
        shutil.rmtree(run)
    # Editing or swapping may leave a file as it was.
    assert refused > 0.7 * CASES
