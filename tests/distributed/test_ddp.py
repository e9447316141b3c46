"""Training by several processes equals training by one on the joint batch, with fewer bytes on the wire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.runs import Run, in_processes, train, train_all

LATE = {"refresh": "late"}
EQUAL = {
    "hook": Run(steps=50),
    "hook, rank of gradients below": Run(steps=50, size=4, rank=8),
    "plain": Run(how="plain", steps=50),
    "late": Run(settings=LATE, steps=50),
    "exact": Run(settings={"svd": "exact"}, steps=50),
    "exact, rank of gradients below": Run(settings={"svd": "exact"}, size=4, rank=8),
    "tolerance": Run(settings={"rank_policy": "tolerance", "rtol": 0.3}),
    "golore": Run("golore", steps=50),
    "golore late": Run("golore", settings={"golore_after": 6, **LATE}),
    "golore switching": Run("golore", settings={"golore_after": 6}),
    "8bit": Run("galore_8bit", settings={"min_quantized": 1}, steps=50),
    "coded basis": Run(settings={"basis_storage": "int8", "min_quantized": 1}),
    "bucket views": Run(ddp={"gradient_as_bucket_view": True, "bucket_cap_mb": 0.002}),
    "static graph": Run(ddp={"static_graph": True}),
    "accumulated": Run(pieces=4),
    "accumulated late": Run(settings=LATE, pieces=4),
    "clipped": Run(settings=LATE, clip=0.1),
    "fused": Run(how="fused", steps=50),
    "fused, rank of gradients below": Run(how="fused", steps=50, size=4, rank=8),
    "fused golore": Run("golore", how="fused"),
    "fused, accumulated": Run(how="fused", pieces=4),
    "projected": Run(how="projected", steps=50),
    "projected, accumulated": Run(how="projected", pieces=4),
    "projected, clipped": Run(how="projected", clip=0.1),
    "fira": Run("fira"),
    "apollo": Run("apollo"),
    "frugal": Run("frugal"),
    "adamw": Run("adamw"),
}
OTHERS = {
    "again": EQUAL["hook"],
    "hook, clipped": Run(clip=0.1),
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


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(2, tmp_path_factory.mktemp("two"), train_all, EQUAL | OTHERS)


pytestmark = pytest.mark.slow  # starts of processes


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_as_one(answers: list[dict[str, Any]], name: str) -> None:
    expected = train(EQUAL[name])
    assert worst(answers[0][name], expected) < 1e-5
    assert expected["losses"][-1] < 0.8 * expected["losses"][0]


@pytest.mark.parametrize("name", EQUAL | OTHERS)
def test_all_ranks_hold_the_same_bits(answers: list[dict[str, Any]], name: str) -> None:
    first, second = (answer[name] for answer in answers)
    for what in ("parameters", "state"):
        assert first[what].keys() == second[what].keys()
        assert all(torch.equal(value, second[what][key]) for key, value in first[what].items())
    assert (first["skipped"], first["norms"]) == (second["skipped"], second["norms"])


def test_two_runs_are_the_same_to_the_bit(answers: list[dict[str, Any]]) -> None:
    first, second = answers[0]["hook"], answers[0]["again"]
    assert first["losses"] == second["losses"]
    assert all(torch.equal(value, second["parameters"][name]) for name, value in first["parameters"].items())


def test_the_hook_reduces_what_a_step_needs(answers: list[dict[str, Any]]) -> None:
    plain = answers[0]["plain"]["traffic"]
    assert {sum(step.values()) for step in plain} == {7872}
    dense = 320  # biases and the norm: 24 + 16 + 2·20 numbers
    projected = 4 * 4 * (24 + 24 + 16 + 3 * 20)  # r numbers for each row or column of the long side
    between = [step for step in answers[0]["hook"]["traffic"] if "sketch" not in step]
    assert len(between) > 20
    assert all(step == {"dense": dense, "projected": projected} for step in between)
    # The least of r/min(m, n) + 5 % over the matrices, whose short sides are 12 to 16.
    assert projected <= (4 / 16 + 0.05) * (7872 - dense)
    for how in ("fused", "projected"):
        between = [step for step in answers[0][how]["traffic"] if "sketch" not in step]
        assert all(step == {"dense": dense, "projected": projected, "flags": 16} for step in between)
        assert len(between) > 20


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
        assert min(answers[0][name]["norms"]) > 0.1  # clipping has something to do
    # Between refreshes the norm is that of R, which is below that of G.
    norms, whole = answers[0]["hook, clipped"]["norms"], train(OTHERS["hook, clipped"])["norms"]
    assert norms[0] < whole[0] and norms[0] > 0.5 * whole[0]


@pytest.mark.parametrize("name", [name for name in OTHERS if "poisoned" in name])
def test_a_gradient_that_is_not_a_number_is_skipped_by_all(answers: list[dict[str, Any]], name: str) -> None:
    assert answers[0][name]["skipped"] == answers[1][name]["skipped"] == 9
    assert all(value.isfinite().all() for value in answers[0][name]["parameters"].values())
    assert worst(answers[0][name], train(replace(OTHERS[name]))) > 0
    losses = answers[0][name]["losses"]
    assert losses[-1] < losses[0]


def test_four_processes(tmp_path: Path) -> None:
    runs = {name: replace(EQUAL[name], steps=12) for name in ("hook", "exact", "projected", "late")}
    found = in_processes(4, tmp_path, train_all, runs)
    for name, run in runs.items():
        assert worst(found[0][name], train(run)) < 1e-5
        for other in found[1:]:
            assert all(torch.equal(value, other[name]["parameters"][key])
                       for key, value in found[0][name]["parameters"].items())  # fmt: skip
