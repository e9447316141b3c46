"""The result depends on the gradients and the names, and on nothing else: buckets, order, orientation, global RNG."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from contract.cases import (
    CASES,
    DENSE_SHAPES,
    LOW_RANK,
    SHAPES,
    Case,
    difference,
    gradient,
    identical,
    parameters,
    states,
    train,
)

STEPS = 10


def parametrised(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def takes_whole_tensors(case: Case) -> bool:
    """FRUGAL's blocks choose among all tensors of the optimizer, so one optimizer each is another method."""
    return case.method == "frugal" and "subspace" not in case.settings


@parametrised([case for case in CASES if not takes_whole_tensors(case)])
def test_bucketed_equals_single(case: Case) -> None:
    """Many small equal matrices, some of them tall, in one optimizer against one optimizer each."""
    shapes = {f"{i}.{kind}": shape for i in range(6) for kind, shape in (("a", (12, 8)), ("b", (8, 12)), ("c", (9, 9)))}
    together, alone = parameters(shapes), parameters(shapes)
    settings = {"stagger": False} if case.projects and case.method != "frugal" else {}
    optimizer = case(case.groups(together), **settings)
    train(optimizer, together, STEPS)
    for name, p in alone.items():
        train(case(case.groups({name: p}), **settings), {name: p}, STEPS)
    # Ranks near the side hold directions that are hardly more than rounding.
    assert difference(together, alone) < (2e-6 if "rank_policy" in case.settings else 1e-6)
    assert difference(together, parameters(shapes)) > 1e-3


@parametrised(CASES)
def test_order_of_parameters_and_groups_is_irrelevant(case: Case) -> None:
    dense = parameters(DENSE_SHAPES)
    first, second = parameters(), parameters()
    train(case(case.groups(first, dense)), first | dense, STEPS)

    names = list(SHAPES)
    random.Random(1).shuffle(names)
    dense_again = parameters(DENSE_SHAPES)
    groups = [
        {"params": list(reversed(dense_again.items()))},
        *case.groups({name: second[name] for name in names[:2]}),
        *case.groups({name: second[name] for name in names[2:]}),
    ]
    train(case(groups), second | dense_again, STEPS)
    assert difference(first | dense, second | dense_again) < 1e-6


# Blocks of codes follow the rows of a dense matrix, where it has no orientation.
@parametrised([case for case in CASES if case.method != "adamw" or "moments" not in case.settings])
def test_transposing_a_parameter_transposes_its_update(case: Case) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if shape[0] != shape[1]}
    upright, flipped = parameters(shapes), {}
    for name, p in upright.items():
        flipped[name] = nn.Parameter(p.detach().T.clone())
    one, other = case(case.groups(upright)), case(case.groups(flipped, **case.transposed_keys))
    for step in range(STEPS):
        for name, p in upright.items():
            p.grad = gradient(name, torch.zeros_like(p), step).float()
            flipped[name].grad = p.grad.T.clone()
        one.step()
        other.step()
    assert difference(upright, {name: p.T for name, p in flipped.items()}) < 1e-5


@parametrised(CASES)
def test_gradients_in_another_memory_layout(case: Case) -> None:
    """A transposed view as .grad (and as the weight itself) counts like any other tensor."""
    plain, views = parameters(), {}
    for name, p in plain.items():
        views[name] = nn.Parameter(p.detach().T.contiguous().T)
    one, other = case(case.groups(plain)), case(case.groups(views))
    for step in range(STEPS):
        for name, p in plain.items():
            p.grad = gradient(name, torch.zeros_like(p), step).float()
            views[name].grad = p.grad.T.contiguous().T
        one.step()
        other.step()
    assert difference(plain, views) < 1e-5


@parametrised(CASES)
def test_same_seed_same_result_whatever_the_global_generator(case: Case) -> None:
    torch.manual_seed(1)
    first = parameters()
    train(case(case.groups(first), seed=7), first, STEPS)
    torch.manual_seed(2)
    torch.randn(5)
    before = torch.get_rng_state()
    second = parameters()
    train(case(case.groups(second), seed=7), second, STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    assert identical(first, second)


@parametrised(
    [
        case
        for case in LOW_RANK
        if "exact" not in str(case) and case.settings.get("subspace") != "svd" and not takes_whole_tensors(case)
    ]
)
def test_another_seed_or_another_name_draws_another_subspace(case: Case) -> None:
    shapes = {"a": (16, 24)}
    runs = []
    for seed, name in ((0, "a"), (1, "a"), (0, "b")):
        (p,) = parameters(shapes).values()
        optimizer = case(case.groups({name: p}), seed=seed)
        for step in range(3):
            p.grad = gradient("a", p, step).float()
            optimizer.step()
        runs.append(p.detach())
    assert not torch.allclose(runs[0], runs[1], atol=1e-5)
    assert not torch.allclose(runs[0], runs[2], atol=1e-5)


@parametrised(LOW_RANK)
def test_the_subspace_changes_at_the_gap_and_only_then(case: Case) -> None:
    if takes_whole_tensors(case) or not case.settings.get("store_basis", True):
        pytest.skip("stores no basis")
    if case.method == "q_galore":
        pytest.skip("has a longer gap each time")
    named = parameters({"a": (16, 24)})
    settings = {} if case.method == "frugal" else {"stagger": False}
    optimizer = case(case.groups(named, update_proj_gap=3), **settings)
    bases = []
    for step in range(7):
        train(optimizer, named, range(step, step + 1))
        state = states(optimizer)["a"]
        bases.append(state["rows" if "rows" in state else "basis"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


@parametrised(
    [case for case in LOW_RANK if "stagger" not in case.settings and case.method not in {"frugal", "q_galore"}]
)
def test_refreshes_are_spread_over_the_parameters(case: Case) -> None:
    """Every basis exists from the first step on; after that no step pays for more than its share."""
    gap, count = 5, 20
    named = parameters({f"{i}": (8, 12) for i in range(count)})
    optimizer = case(case.groups(named, update_proj_gap=gap))
    due = []
    for step in range(4 * gap):
        before = {name: int(state["refreshes"]) if state else 0 for name, state in states(optimizer).items()}
        train(optimizer, named, range(step, step + 1))
        due.append(sum(int(state["refreshes"]) != before[name] for name, state in states(optimizer).items()))
    assert due[0] == count
    settled = due[2 * gap :]
    assert max(settled) <= count // gap + 1 and min(settled) >= 1
    assert sum(settled) == 2 * count  # and each is still refreshed once a gap
