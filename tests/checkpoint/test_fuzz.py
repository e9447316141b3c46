"""Damaged at random: a checkpoint is refused with a message, or loads to the very same numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from subspan.checkpoint import best, latest, load_checkpoint, rotate, save_checkpoint
from subspan.checkpoint.inspect import describe, reports
from subspan.checkpoint.single import to_single_file
from subspan.optim import GaLore
from tests.checkpoint.damage import damaged, resealed
from tests.checkpoint.models import model, train

#: More in a long test.
CASES = int(os.environ.get("SUBSPAN_FUZZ_CASES", "200"))


def state(network: torch.nn.Module, optimizer: torch.optim.Optimizer, extra: Any) -> Any:
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = dict(network.state_dict())
    for index, held in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}/{key}": value for key, value in held.items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}, settings, extra


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


def test_a_manifest_that_fits_is_no_licence(tmp_path: Path) -> None:
    """Who can write a folder can write its checksums too: wrong numbers or a message, and never another error."""
    network = model()
    optimizer = GaLore(network, rank=4, update_proj_gap=3)
    train(network, optimizer, 2)
    extra = {"step": 2, "rng": torch.arange(4)}
    folder = save_checkpoint(tmp_path / "checkpoint-2", network, optimizer, extra=extra, eval_loss=1.0)
    choose = random.Random(0)
    refused = 0
    for case in range(CASES // 2):
        copy = tmp_path / "fuzzed" / "checkpoint-2"
        shutil.copytree(folder, copy)
        what = f"case {case}: {resealed(copy, choose)}"
        target = model(seed=1)
        loaded = GaLore(target, rank=4, update_proj_gap=3)
        other = GaLore(target, rank=3)
        for action in (
            lambda: load_checkpoint(copy, target, loaded),  # noqa: B023
            lambda: load_checkpoint(copy, target, other, carry_over=True),  # noqa: B023
            lambda: json.dumps(describe(reports(copy)[0])),  # noqa: B023
            lambda: to_single_file(copy, tmp_path / "single"),  # noqa: B023
            lambda: (best(copy.parent), rotate(copy.parent, 1), latest(copy.parent, skipped=str)),  # noqa: B023
        ):
            untouched = state(target, loaded, None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    action()
                except (ValueError, OSError) as error:
                    refused += 1
                    assert str(copy) in str(error), what
                    assert state(target, loaded, None) == untouched, what
        shutil.rmtree(copy.parent)
        shutil.rmtree(tmp_path / "single", ignore_errors=True)
    assert refused > CASES // 4
