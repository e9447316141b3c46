"""The command line as a process that is killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_main import options
from tests.train.micro import repeatable

PROGRAM = [sys.executable, "-m", "subspan", "pretrain"]
# Long enough that the run is not over before the signal arrives.
CHANGES = {"steps": 160, "save_every": 20, "eval_every": 40, "log_every": 7, "keep_checkpoints": 1}


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*PROGRAM, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(*options(folder, **CHANGES)))
    return folder / "run"


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, whole: Path) -> None:
    given = options(tmp_path, **CHANGES)
    process = start(*given)
    wait_for_checkpoint(process, tmp_path / "run")
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "planned_state_bytes" not in lines[-1]

    finish(start(*given, "--resume", "auto"))
    assert repeatable(tmp_path / "run") == repeatable(whole)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = ("eval_loss", "eval_perplexity", "tokens", "tokens_per_second", "state_bytes", "planned_state_bytes")
    assert all(last[name] > 0 for name in wanted)


@pytest.mark.slow
def test_stopped_and_resumed(tmp_path: Path, whole: Path) -> None:
    process = start(*options(tmp_path, **CHANGES))
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    config = tmp_path / "run" / "config.yaml"
    assert f"subspan pretrain --config {config} --resume auto" in output
    # As the message says.
    finish(start("--config", str(config), "--resume", "auto"))
    assert repeatable(tmp_path / "run") == repeatable(whole)
