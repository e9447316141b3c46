"""The examples run as they are, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"bare_loop.py", "hf_trainer.py"}


@pytest.mark.slow
def test_bare_loop() -> None:
    output = example("bare_loop.py", "--steps", "150")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 10
    assert losses[-1] < 0.85 * losses[0]
    assert "8 of" in output and "tensors projected" in output


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path) -> None:
    output = example("hf_trainer.py", "--steps", "40", "--output", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", output)]
    assert len(losses) == 10
    assert losses[-1] < 0.7 * losses[0]
    # Seven matrices in each of two layers; neither the embedding nor the head.
    assert "14 of 21 tensors projected" in output
