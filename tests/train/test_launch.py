"""Runs that torchrun and accelerate start, in two real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from subspan.checkpoint.save import LOW_RANK, MODEL
from subspan.checkpoint.single import to_single_file
from subspan.train.low_rank_files import merge_run
from tests.train import launched
from tests.train.micro import metrics, repeatable, run, settings

ROOT = Path(__file__).parents[2]
#: A loss of two processes, of which each sums over half of the sequences, against that of one.
CLOSE = {"rel": 1e-5}

pytestmark = pytest.mark.slow  # starts of processes


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    options = ["--nproc-per-node", "2", "--master-port", free_port(), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]


def accelerate(*arguments: str) -> list[str]:
    # With --cpu it starts one process, whatever it is told, unless MPI does it.
    options = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *arguments]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == status, output
    return output


def command_line(folder: Path, **changes: Any) -> list[str]:
    given = ["-m", "subspan", "pretrain"]
    for name, value in settings(folder, **changes).items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for key, one in pairs:
            given += [f"--{name}.{key}" if key else f"--{name}", str(one)]
    return given


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind, see launched.py."""
    folder = tmp_path_factory.mktemp("launched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(folder / "cache"))
        launched.prepare(folder)
        finish(start(torchrun(str(ROOT / "tests" / "train" / "launched.py"), str(folder))))
    return folder


@pytest.fixture
def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in (0, 1)]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], key, line[key]) for line in metrics(folder) for key in ("loss", "eval_loss") if key in line]


def assert_close(folder: Path, expected: Path) -> None:
    found = losses(folder)
    assert found == [(step, key, pytest.approx(value, **CLOSE)) for step, key, value in losses(expected)]


def sequences(folder: Path, name: str) -> dict[int, list[str]]:
    """What was trained on in each step, pass by pass in the order of a single process."""
    files = sorted(folder.glob(f"{name}-*.jsonl"))
    steps: dict[int, list[str]] = {}
    for passes in zip(*(file.read_text().splitlines() for file in files), strict=True):
        for step, digests in map(json.loads, passes):
            steps.setdefault(step, []).extend(digests)
    return steps


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same steps in one process, with as many sequences in each."""
    with pytest.MonkeyPatch.context() as patch:
        launched.record_sequences(patch, folder / "alone_packed-0.jsonl")
        run(folder, output=str(folder / "alone"), grad_accumulation=2, **launched.UNEVEN)
    return folder / "alone"


def test_the_losses_are_those_of_one_process(folder: Path, alone: Path, answers: list[dict[str, Any]]) -> None:
    assert_close(folder / "two", alone)
    first, other = metrics(folder / "two")[0], metrics(alone)[0]
    assert first["tokens"] == other["tokens"] == 2 * 4 * 16
    assert answers[0]["eval_loss"] == answers[1]["eval_loss"] == metrics(folder / "two")[-1]["eval_loss"]


def test_the_sequences_are_those_of_one_process(folder: Path, alone: Path) -> None:
    trained = sequences(folder, "packed")
    assert trained == sequences(folder, "alone_packed")
    assert len({digest for digests in trained.values() for digest in digests}) == 12 * 8
    with pytest.MonkeyPatch.context() as patch:
        launched.record_sequences(patch, folder / "alone_streamed-0.jsonl")
        changes = launched.stream(folder, patch, output=str(folder / "alone-stream"))
        run(folder, **changes | {"grad_accumulation": 4})
    assert sequences(folder, "streamed") == sequences(folder, "alone_streamed")


@pytest.mark.parametrize("way", launched.WAYS)
def test_every_way_to_share_the_work_gives_the_same_losses(folder: Path, way: str) -> None:
    changes = launched.with_model(folder, way, launched.WAYS[way][1])
    run(folder, output=str(folder / f"{way}-alone"), **changes)
    assert_close(folder / way, folder / f"{way}-alone")


@pytest.mark.parametrize("way", launched.DIVIDED)
def test_low_rank_weights_that_are_divided_are_merged(folder: Path, tmp_path: Path, way: str) -> None:
    """As those of one process are, of parts and of what is converted to single files."""
    checkpoint, alone = folder / way / "checkpoint-8", folder / f"{way}-alone"
    assert not (checkpoint / LOW_RANK).exists() and len(list(checkpoint.glob("shard-*.safetensors"))) == 2
    if not alone.exists():
        run(folder, output=str(alone), **launched.with_model(folder, way, launched.WAYS[way][1]))
    to_single_file(checkpoint, tmp_path / "whole")
    assert (tmp_path / "whole" / LOW_RANK).is_file() and not (tmp_path / "whole" / MODEL).exists()
    outputs = [merge_run(source, tmp_path / str(n)).output for n, source in enumerate((checkpoint, alone))]
    outputs.append(merge_run(tmp_path / "whole", tmp_path / "2").output)
    parts, expected, whole = (load_file(output / MODEL) for output in outputs)
    assert parts.keys() == expected.keys() == whole.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(parts[name], whole[name])


def test_low_rank_weights_that_are_divided_continue(folder: Path) -> None:
    assert repeatable(folder / "mhlora") == repeatable(folder / "mhlora-cut")
    run(folder, output=str(folder / "factored-fewer"), resume="auto", **launched.WAYS["factored"][0])
    assert_close(folder / "factored-fewer", folder / "factored")
    assert_close(folder / "sltrain-more", folder / "sltrain")


def test_a_divided_model_is_that_of_the_first_process(answers: list[dict[str, Any]]) -> None:
    (own, first), (other, second) = (answer["divide"]["sums"] for answer in answers)
    assert first == second == pytest.approx(own, rel=1e-6) and other != own
    assert all("divided over processes and cannot be merged" in answer["divide"]["merge"] for answer in answers)


@pytest.mark.parametrize("way", ["divided", "bases"])
def test_planned_bytes_are_those_of_this_process(way: str, answers: list[dict[str, Any]]) -> None:
    planned, measured = answers[0]["memory"][way]
    assert planned == measured
    whole, buffers = 4 * 39_840, 64
    assert (planned["weights"], planned["gradients"]) == (whole // 2 + buffers, whole // 2)
    assert not answers[1]["memory"][way]


def test_bytes_that_are_reduced(folder: Path) -> None:
    def between_refreshes(name: str) -> int:
        # Staggered refreshes of all matrices are in the steps 2 to 6, and 7 to 11.
        lines = {line["step"]: line["reduced_bytes"] for line in metrics(folder / name) if "reduced_bytes" in line}
        return lines[12] - lines[9]

    assert between_refreshes("two") == 3 * 4 * 39_840
    dense = 2 * 300 * 32 + 5 * 32
    matrices = 39_840 - dense
    projected = between_refreshes("projected") - 3 * 4 * dense
    # Rank 8 of 32, and the sketches of what was refreshed.
    assert 3 * 4 * matrices // 4 < projected < 3 * 4 * matrices * 0.5
    assert [line["grad_norm_exact"] for line in metrics(folder / "projected") if "loss" in line] == [False] * 5
    assert not any("grad_norm_exact" in line for line in metrics(folder / "two"))


def test_equal_runs_are_equal_to_the_bit(folder: Path) -> None:
    assert repeatable(folder / "two") == repeatable(folder / "again")


def test_a_run_that_was_killed_continues_to_the_bit(folder: Path) -> None:
    assert repeatable(folder / "two") == repeatable(folder / "cut")
    assert repeatable(folder / "bases") == repeatable(folder / "bases-cut")
    # With dropout: each process has random numbers of its own, and finds them again.
    assert repeatable(folder / "stream") == repeatable(folder / "stream-cut")


def test_a_run_continues_on_another_number_of_processes(folder: Path, alone: Path) -> None:
    assert_close(folder / "more", alone)
    run(folder, output=str(folder / "fewer"), resume="auto", **launched.UNEVEN)
    assert_close(folder / "fewer", alone)
    run(folder, output=str(folder / "bases-fewer"), resume="auto", shard="bases")
    assert_close(folder / "bases-fewer", folder / "bases")
    # Afterwards the settings are those that it was started with.
    assert "batch_size: 4\ngrad_accumulation: 1\n" in (folder / "fewer" / "config.yaml").read_text()


def test_processes_with_heads_of_their_own(folder: Path, answers: list[dict[str, Any]]) -> None:
    run(folder, output=str(folder / "parallel-alone"), **launched.PARALLEL | launched.PARALLEL_ALONE)
    assert_close(folder / "parallel", folder / "parallel-alone")
    assert repeatable(folder / "parallel") == repeatable(folder / "parallel-cut")
    planned, measured = answers[0]["memory"]["parallel"]
    assert planned == measured
    # From one process to two, and from two to one, whose passes deal the sequences out to other heads.
    assert_close(folder / "parallel-more", folder / "parallel-alone")
    run(folder, output=str(folder / "parallel-fewer"), resume="auto", **launched.PARALLEL)
    found, expected = (losses(folder / name) for name in ("parallel-fewer", "parallel"))
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=0.02)

    merged = [merge_run(folder / name).output for name in ("parallel", "parallel-alone")]
    ids = torch.arange(24).remainder(300).view(2, 12)
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in merged)
    assert torch.allclose(first, second, atol=1e-4)


def test_sequences_that_cannot_be_shared(answers: list[dict[str, Any]]) -> None:
    assert "a step of this run takes 3 sequences" in answers[0]["batch"]
    assert "2 processes cannot share evenly" in answers[0]["batch"]


def test_a_loss_that_is_not_finite_in_one_process(folder: Path, answers: list[dict[str, Any]]) -> None:
    lines = metrics(folder / "poisoned")
    assert [line["bad_steps"] for line in lines if "bad_steps" in line] == [0, 0, 1, 2, 2]
    assert [line["loss"] is None for line in lines if "loss" in line] == [False, False, True, True, False]
    assert lines[-1]["eval_loss"] == pytest.approx(metrics(folder / "two")[-1]["eval_loss"], rel=0.2)
    for answer in answers:
        assert "the loss was not finite in 3 steps in a row, up to step 8" in answer["diverged"]
        assert answer["checkpoints"] == ["checkpoint-4"]


def test_the_chunked_loss_goes_through_the_wrapper(folder: Path) -> None:
    run(folder, output=str(folder / "chunked-alone"), chunked_loss=True, grad_accumulation=4)
    assert_close(folder / "chunked", folder / "chunked-alone")


def test_what_is_refused_is_refused_everywhere(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert "the settings of process 1 differ from those of process 0" in answer["settings"]
        assert "the run folder /proc/nowhere cannot be written to" in answer["folder"]
        assert "already holds a run" in answer["taken"]
        assert "cannot update in backward" in answer["backward"]
        assert answer["group"] is False


def test_the_first_process_waits_while_the_others_load(answers: list[dict[str, Any]]) -> None:
    assert [answer["patience"] for answer in answers] == [[0, 1], [0, 1]]


def test_what_the_first_process_raises_is_raised_in_all(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["words"] == answers[1]["words"]
    assert "can't decode byte 0xff" in answers[0]["words"]


def test_a_worker_that_dies_is_restarted(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 60, "save_every": 10, "eval_every": 30, "log_every": 7, "resume": "auto"}
    process = start(torchrun(*command_line(tmp_path, **changes), restarts=1))
    wait_for_checkpoint(process, tmp_path / "run")
    worker(process, rank=1).kill()
    output = finish(process)
    assert "continues at step" in output
    assert output.count("run folder") == 1
    run(tmp_path, output=str(tmp_path / "alone"), **changes | {"grad_accumulation": 2, "resume": "none"})
    assert_close(tmp_path / "run", tmp_path / "alone")
    assert len(losses(tmp_path / "run")) == len(losses(tmp_path / "alone"))


def test_a_worker_that_hangs_is_named(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5000, "save_every": 10, "eval_every": 0, "log_every": 5000, "timeout": 2}
    process = start(accelerate(*command_line(tmp_path, **changes)))
    wait_for_checkpoint(process, tmp_path / "run")
    held_up = worker(process, rank=1)
    held_up.suspend()
    assert process.stdout is not None
    lines = []
    while not any("died or hangs" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    held_up.send_signal(signal.SIGKILL)  # else the launcher waits half a minute for it
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert "process 1 of 2 died or hangs. The others wait for at most 2 s (--timeout)" in lines[-1]
    assert "error: in step" in lines[-1]
    assert "each holds a share of the model" in "".join(lines)


def test_one_message_for_a_setting_that_does_not_exist(tmp_path: Path) -> None:
    output = finish(start(torchrun("-m", "subspan", "pretrain", "--stepps", "3")), status=1)
    assert output.count("error: unknown setting 'stepps'. Did you mean 'steps'?") == 1
    assert 'File "/' not in output.split("torch/distributed/elastic")[0]
