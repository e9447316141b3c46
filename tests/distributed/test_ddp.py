"""Training by several processes equals training by one on the joint batch, with fewer bytes on the wire."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.checks import everything
from distributed.runs import Run, in_processes, train, train_all

LATE = {"refresh": "late"}
BELOW = {"size": 4, "rank": 8, "steps": 50}
EQUAL = {
    "hook": Run(steps=50),
    "hook, rank of gradients below": Run(**BELOW),
    "plain": Run(how="plain"),
    "late": Run(settings=LATE),
    "exact": Run(settings={"svd": "exact"}),
    "exact, rank of gradients below": Run(settings={"svd": "exact"}, **BELOW),
    "tolerance": Run(settings={"rank_policy": "tolerance", "rtol": 0.3}),
    "golore": Run("golore"),
    "golore late": Run("golore", settings={"golore_after": 4, **LATE}),
    "golore switching": Run("golore", settings={"golore_after": 4}),
    "8bit": Run("galore_8bit", settings={"min_quantized": 1}),
    "coded basis": Run(settings={"basis_storage": "int8", "min_quantized": 1}),
    "bucket views": Run(ddp={"gradient_as_bucket_view": True, "bucket_cap_mb": 0.002}),
    "static graph": Run(ddp={"static_graph": True}),
    "accumulated": Run(pieces=4),
    "accumulated late": Run(settings=LATE, pieces=4),
    "fused": Run(how="fused", steps=50),
    "fused, rank of gradients below": Run(how="fused", **BELOW),
    "fused golore": Run("golore", how="fused"),
    "fused, accumulated": Run(how="fused", pieces=4),
    "projected": Run(how="projected"),
    "projected, accumulated": Run(how="projected", pieces=4),
    "fira": Run("fira", steps=2),
    "apollo": Run("apollo", steps=2),
    "frugal": Run("frugal", steps=2),
    "adamw": Run("adamw", steps=2),
}
OTHERS = {
    "again": Run(),
    "clipped": Run(clip=0.1),
    "projected, clipped": Run(how="projected", clip=0.1),
    "bfloat16": Run(dtype=torch.bfloat16),
    "fused bfloat16": Run(how="fused", dtype=torch.bfloat16),
    "poisoned": Run(poison=3),
    "poisoned at a refresh": Run(poison=5, settings={"stagger": False}),
    "poisoned exact": Run(poison=5, settings={"stagger": False, "svd": "exact"}),
    "poisoned late": Run(poison=5, settings={"stagger": False, **LATE}),
    "poisoned fused": Run(how="fused", poison=3),
    "poisoned projected": Run(how="projected", poison=3),
}


def worst(answer: dict[str, Any], expected: dict[str, Any]) -> float:
    pairs = zip(answer["losses"], expected["losses"], strict=True)
    return max(abs(loss - other) / abs(other) for loss, other in pairs)


def runs_and_checks(rank: int, world: int, runs: dict[str, Run]) -> dict[str, Any]:
    return {**train_all(rank, world, runs), **everything(rank, world)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(2, tmp_path_factory.mktemp("two"), runs_and_checks, EQUAL | OTHERS)


pytestmark = pytest.mark.slow  # starts of processes


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(answers: list[dict[str, Any]], name: str) -> None:
    expected = train(EQUAL[name])
    assert worst(answers[0][name], expected) < 1e-5
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]


@pytest.mark.parametrize("name", EQUAL | OTHERS)
def test_all_ranks_hold_the_same_bits(answers: list[dict[str, Any]], name: str) -> None:
    first, second = (answer[name] for answer in answers)
    for what in ("parameters", "state"):
        assert first[what].keys() == second[what].keys()
        assert all(torch.equal(value, second[what][key]) for key, value in first[what].items())
    assert (first["skipped"], first["norms"]) == (second["skipped"], second["norms"])


def test_two_runs_are_the_same_to_the_bit(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["hook"]["losses"][: Run.steps] == answers[0]["again"]["losses"]


def test_the_hook_reduces_what_a_step_needs(answers: list[dict[str, Any]]) -> None:
    plain = answers[0]["plain"]["traffic"]
    assert {sum(step.values()) for step in plain} == {7872}
    dense = 320  # biases and the norm: 24 + 16 + 2·20 numbers
    projected = 4 * 4 * (24 + 24 + 16 + 3 * 20)  # r numbers for each row or column of the long side
    between = [step for step in answers[0]["hook"]["traffic"] if "sketch" not in step]
    assert len(between) >= 2
    assert all(step == {"dense": dense, "projected": projected} for step in between)
    # The least of r/min(m, n) + 5 % over the matrices, whose short sides are 12 to 16.
    assert projected <= (4 / 16 + 0.05) * (7872 - dense)
    for how in ("fused", "projected"):
        between = [step for step in answers[0][how]["traffic"] if "sketch" not in step]
        assert all(step == {"dense": dense, "projected": projected, "flags": 16} for step in between)
        assert len(between) >= 2


def test_bfloat16_is_reduced_in_bfloat16(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["bfloat16"]["traffic"][-1]["dense"] == 160
    for name in ("bfloat16", "fused bfloat16"):
        between = [step for step in answers[0][name]["traffic"] if "sketch" not in step]
        assert {step["projected"] for step in between} == {2 * 4 * (24 + 24 + 16 + 3 * 20)}
        assert worst(answers[0][name], train(OTHERS[name])) < 1e-2


def test_a_refresh_reduces_sketches(answers: list[dict[str, Any]]) -> None:
    first = answers[0]["hook"]["traffic"][0]
    sides = (12 + 24) + (24 + 16) + (16 + 16) + 3 * (16 + 20)
    assert first["dense"] == 320
    assert first["sketch"] == 4 * (4 * sides + 6)  # the six bounds of the entries
    exact = answers[0]["exact"]["traffic"][0]
    assert exact["dense"] == 7872
    assert exact["basis"] == 4 * 4 * sides
    assert sum(answers[0]["golore"]["traffic"][0].values()) == sum(answers[0]["golore"]["traffic"][1].values())


def test_methods_that_need_the_gradient_say_so(answers: list[dict[str, Any]]) -> None:
    for name, why in [("fira", "ScaledResidual"), ("apollo", "GradientScaling"), ("frugal", "SignResidual")]:
        assert [why in message for message in answers[0][name]["warnings"]] == [True]
        assert not answers[1][name]["warnings"]
        assert {sum(step.values()) for step in answers[0][name]["traffic"]} == {7872}
    assert "projects nothing" in answers[0]["adamw"]["warnings"][0]


def test_clipping_knows_the_norm_of_the_average(answers: list[dict[str, Any]]) -> None:
    for name in ("clipped", "projected, clipped"):
        norms, whole = answers[0][name]["norms"], train(replace(OTHERS[name], how="plain"))["norms"]
        assert min(norms) > 0.1  # clipping has something to do
        assert 0.5 * whole[0] < norms[0] < whole[0]  # the norm of R, which is below that of G


@pytest.mark.parametrize("name", [name for name in OTHERS if "poisoned" in name])
def test_a_gradient_that_is_not_a_number_is_skipped_by_all(answers: list[dict[str, Any]], name: str) -> None:
    assert answers[0][name]["skipped"] == answers[1][name]["skipped"] == 8
    assert all(value.isfinite().all() for value in answers[0][name]["parameters"].values())
    assert worst(answers[0][name], train(replace(OTHERS[name]))) > 0
    losses = answers[0][name]["losses"]
    assert losses[-1] < losses[0]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max((value - other[name]).abs().max().item() for name, value in one.items())


def test_layers_that_are_left_out_and_second_backward_passes(answers: list[dict[str, Any]]) -> None:
    found = answers[0]["found"]
    assert largest_difference(found["unused plain"], found["unused hook"]) < 1e-5
    assert largest_difference(found["unused late"], found["unused fused"]) < 1e-5
    assert largest_difference(found["twice plain"], found["twice hook"]) < 1e-5
    assert largest_difference(found["twice fused"], found["twice looked at"]) < 1e-5
    assert largest_difference(found["unused plain"], found["twice plain"]) > 1e-2
    for name, values in found.items():  # int8 weights among them
        assert all(torch.equal(value, answers[1]["found"][name][key]) for key, value in values.items())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("seed", "ValueError: the processes have optimizers that differ in seed"),
        (
            "not fused",
            r"galore takes no gradients in backward: call optimizer.fuse_into_backward\(\) first",
        ),
        ("fused", "RuntimeError: this optimizer takes its gradients in backward"),
        ("wrapped", r"TypeError: exclude_from_ddp\(\) comes before DDP"),
        ("another model", "ValueError: experts, .* parameters that are not in this model"),
        ("not excluded", "there are 2; call subspan.distributed.exclude_from_ddp"),
        ("updating in backward", "there are 2; a method that needs the gradients themselves cannot update"),
        ("scaler hook", "GradScaler cannot unscale"),
        ("scaler fused", "GradScaler cannot unscale"),
        ("raise hook", "FloatingPointError: .*experts: the gradient holds NaN or Inf; nothing was changed"),
        ("raise fused", "FloatingPointError: .*experts: the gradient holds NaN or Inf; nothing was changed"),
        ("twice at a refresh", r"all micro-batches but the last one under no_sync\(\)"),
        ("rank of PowerSGD", "rank=0 is not allowed"),
    ],
)
def test_what_cannot_be_right_is_refused_by_all(answers: list[dict[str, Any]], case: str, expected: str) -> None:
    for answer in answers:
        assert re.search(expected, answer["said"][case])


def test_the_bytes_of_power_sgd(answers: list[dict[str, Any]]) -> None:
    traffic = answers[0]["traffic"]
    assert traffic["plain"] == [{"dense": 7872}] * 4
    # The experts, (3, 16, 20), are a matrix of 3 by 320 for it.
    factors = 4 * 2 * ((12 + 24) + (24 + 16) + (16 + 16) + (3 + 320))
    assert traffic["power_sgd"] == [{"dense": 7872}] * 2 + [{"dense": 320, "projected": factors}] * 2


def test_four_processes(tmp_path: Path) -> None:
    runs = {name: replace(EQUAL[name], steps=6) for name in ("hook", "exact", "projected")}
    found = in_processes(4, tmp_path, train_all, runs)
    for name, run in runs.items():
        assert worst(found[0][name], train(run)) < 1e-5
        for other in found[1:]:
            assert all(torch.equal(value, other[name]["parameters"][key])
                       for key, value in found[0][name]["parameters"].items())  # fmt: skip
