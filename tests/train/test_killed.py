"""SIGKILL at random moments, in training and in saving, again and again: nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subspan.checkpoint import latest
from tests.train.micro import metrics, repeatable, run, settings

#: More in a long test.
KILLS = int(os.environ.get("SUBSPAN_KILLS", "5"))
CHANGES = {"steps": 24, "save_every": 2, "log_every": 5, "eval_every": 6, "keep_checkpoints": 1}


def start(folder: Path, output: Path) -> multiprocessing.process.BaseProcess:
    """A process that trains, or goes on; a copy of this one, so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder, output))
    process.start()
    return process


def child(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    run(folder, output=str(output), resume="auto", **CHANGES)


def kill_at_random(process: multiprocessing.process.BaseProcess, output: Path, seconds: float, moment: str) -> bool:
    """Kill a run after some time, or while it is saving; whether it was still there."""
    end = time.perf_counter() + random.uniform(0.0, seconds)
    while time.perf_counter() < end and process.is_alive():
        time.sleep(0.002)
    while moment == "saving" and process.is_alive() and not (output / ".incomplete").exists():
        time.sleep(0.0005)
    if moment == "saving":
        time.sleep(random.uniform(0.0, 0.03))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork where threads may run; these hold no lock
def test_killed_at_random_moments(tmp_path: Path) -> None:
    settings(tmp_path)
    start(tmp_path, tmp_path / "warm").join()  # trains the tokenizer
    begun = time.perf_counter()
    start(tmp_path, tmp_path / "whole").join()
    seconds = time.perf_counter() - begun
    assert "state_bytes" in metrics(tmp_path / "whole")[-1]
    random.seed(os.environ.get("SUBSPAN_SEED", 0))
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        output = tmp_path / f"cut-{runs}"
        while kills < KILLS:
            process = start(tmp_path, output)
            if not kill_at_random(process, output, 0.6 * seconds, random.choice(["any", "saving"])):
                assert process.exitcode == 0
                break
            kills += 1
        process = start(tmp_path, output)
        process.join()
        assert process.exitcode == 0, output
        assert repeatable(output) == repeatable(tmp_path / "whole"), output
        newest, expected = latest(output), latest(tmp_path / "whole")
        assert newest is not None and expected is not None and newest.name == expected.name
        for name in ("model.safetensors", "optimizer.safetensors"):
            found, wanted = load_file(newest / name), load_file(expected / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in found), (output, name)
    print(f"{kills} kills in {runs} runs; a whole run takes {seconds:.1f} s")
