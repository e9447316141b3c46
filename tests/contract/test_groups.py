"""Param groups: the published format pastes unchanged, and a setting that cannot be honoured is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from contract.cases import CASES, LOW_RANK, Case, clone, difference, gradient, identical, parameters, train
from subspan.optim import APOLLO, FRUGAL, Fira, GaLore, create_optimizer, list_methods, method_info

every_case = pytest.mark.parametrize("case", CASES, ids=str)
ranked = pytest.mark.parametrize("case", [case for case in LOW_RANK if case.method != "frugal"], ids=str)


def run(optimizer: Any, params: list[nn.Parameter], steps: int = 6) -> None:
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(str(i), torch.zeros_like(p), step).float()
        optimizer.step()


def test_the_published_galore_format_pastes_unchanged() -> None:
    def tensors() -> list[nn.Parameter]:
        return list(parameters({"0": (16, 24), "1": (24, 16), "2": (5,)}).values())

    galore_params, regular_params = tensors()[:2], tensors()[2:]
    param_groups = [
        {"params": regular_params},
        {"params": galore_params, "rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    optimizer = GaLore(param_groups, lr=0.01)
    run(optimizer, galore_params + regular_params)
    ranks = [group.get("rank") for group in optimizer.param_groups]
    assert ranks == [None, 8]

    *matrices, vector = tensors()
    other = GaLore([{"params": [vector]}, {"params": matrices, "rank": 8}], lr=0.01)
    run(other, [*matrices, vector])
    assert all(torch.equal(a, b) for a, b in zip(galore_params + regular_params, [*matrices, vector], strict=True))


def test_published_defaults() -> None:
    p = nn.Parameter(torch.zeros(4, 6))
    group = GaLore([{"params": [("a", p)], "rank": 2}], lr=0.01).param_groups[0]
    defaults = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-8}
    assert {key: group[key] for key in defaults} == defaults and group["weight_decay"] == 0
    group = Fira([{"params": [("a", p)], "rank": 2}], lr=0.01).param_groups[0]
    assert (group["scale"], group["limiter"], group["update_proj_gap"]) == (0.25, 1.01, 200)
    group = APOLLO([{"params": [("a", p)], "rank": 2}], lr=0.01).param_groups[0]
    assert (group["scale"], group["limiter"], group["eps"], group["update_proj_gap"]) == (1.0, 1.01, 1e-6, 200)
    group = create_optimizer("apollo_mini", [{"params": [("a", p)], "rank": 1}], lr=0.01).param_groups[0]
    assert group["scale"] == 128.0
    group = FRUGAL([{"params": [("a", p)], "density": 0.25}], lr=0.01).param_groups[0]
    assert (group["density"], group["sign_scale"], group["update_proj_gap"]) == (0.25, 1.0, 200)


@ranked
def test_aliases_mean_the_same(case: Case) -> None:
    one, other = parameters(), parameters()
    keys = case.keys
    train(case([{"params": list(one.items()), **keys, "scale": 0.7, "proj_type": "left"}]), one, 6)
    optimizer = case([{"params": list(other.items()), **keys, "alpha": 0.7, "projection_type": "left"}])
    train(optimizer, other, 6)
    assert identical(one, other)
    assert optimizer.param_groups[0]["scale"] == 0.7 and "alpha" not in optimizer.param_groups[0]


def test_an_alias_beside_its_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="alpha"):
        GaLore([{"params": list(parameters().items()), "rank": 4, "scale": 0.7, "alpha": 0.3}], lr=0.01)


@every_case
def test_unknown_keys_raise_with_a_suggestion(case: Case) -> None:
    named = parameters()
    with pytest.raises((ValueError, TypeError), match=r"(?s)weight_decai.*weight_decay"):
        case(case.groups(named, weight_decai=0.1))
    with pytest.raises((ValueError, TypeError), match="momemtum_decay_rate"):
        case(case.groups(named, momemtum_decay_rate=3))
    if case.projects:
        with pytest.raises((ValueError, TypeError), match=r"(?s)update_proj_gp.*update_proj_gap"):
            case(case.groups(named, update_proj_gp=10))


@every_case
def test_unknown_constructor_settings_raise_with_a_suggestion(case: Case) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?s)weight_decai.*weight_decay"):
        case(case.groups(parameters()), weight_decai=0.1)


@every_case
def test_a_refused_group_changes_nothing(case: Case) -> None:
    named, plain = parameters(), parameters()
    optimizer = case(case.groups(named))
    for bad in ({"weight_decai": 1}, {"lr": -1.0}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 3)))], **bad})
    assert len(optimizer.param_groups) == 1
    train(optimizer, named, 3)
    train(case(case.groups(plain)), plain, 3)
    assert identical(named, plain)


@ranked
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", -3),
        ("rank", 2.5),
        ("update_proj_gap", 0),
        ("update_proj_gap", -1),
        ("update_proj_gap", 1.5),
        ("proj_type", "full"),
        ("proj_type", "middle"),
        ("scale", float("nan")),
    ],
)
def test_impossible_numbers_of_a_projected_group(case: Case, key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"(?s){key}.*{value}"):
        case(case.groups(parameters(), **{key: value}))


@every_case
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("eps", -1e-8),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("weight_decay", -0.1),
        ("lr_scale", -1),
    ],
)
def test_impossible_numbers_of_any_group(case: Case, key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=key.rstrip("s")):
        case(case.groups(parameters(), **{key: value}))


@pytest.mark.parametrize(("key", "value"), [("density", -0.1), ("density", 1.5), ("sign_scale", -1.0)])
def test_impossible_numbers_of_frugal(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key}.*{value}"):
        FRUGAL([{"params": list(parameters().items()), "density": 0.25, key: value}], lr=0.01)


def test_frugal_blocks_have_a_density_and_no_rank() -> None:
    with pytest.raises(ValueError, match="density"):
        FRUGAL([{"params": list(parameters().items()), "rank": 4}], lr=0.01)


@pytest.mark.parametrize("subspace", ["rows", "svd", "stiefel"])
def test_frugal_with_a_rank(subspace: str) -> None:
    one, other = parameters({"a": (8, 12)}), parameters({"a": (8, 12)})
    train(FRUGAL([{"params": list(one.items()), "rank": 2}], lr=0.01, subspace=subspace), one, 6)
    train(FRUGAL([{"params": list(other.items()), "density": 0.25}], lr=0.01, subspace=subspace), other, 6)
    assert identical(one, other)


def test_keys_of_another_method_are_errors() -> None:
    named = list(parameters().items())
    with pytest.raises((ValueError, TypeError), match="density"):
        GaLore([{"params": named, "rank": 4, "density": 0.25}], lr=0.01)
    with pytest.raises((ValueError, TypeError), match="golore_after"):
        Fira([{"params": named, "rank": 4, "golore_after": 10}], lr=0.01)
    with pytest.raises((ValueError, TypeError), match="rank"):
        create_optimizer("adamw", [{"params": named, "rank": 4}], lr=0.01)


@ranked
def test_rank_in_the_constructor_without_a_model_is_an_error(case: Case) -> None:
    """Trainer(optimizer_cls_and_kwargs=(GaLore, {"rank": 16})) would project embeddings, head and norms."""
    matrices, vectors = list(parameters().values()), [nn.Parameter(torch.zeros(4))]
    trainer_groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    with pytest.raises((ValueError, TypeError), match=r"(?s)rank.*param_groups"):
        case(trainer_groups, rank=16)
    with pytest.raises((ValueError, TypeError), match="target_modules"):
        case(trainer_groups, target_modules="all-linear")


@every_case
@pytest.mark.parametrize("empty", [[], {}], ids=str)
def test_no_parameters_at_all_is_an_error(case: Case, empty: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        case(empty)


@every_case
def test_named_unnamed_iterator_and_list_are_the_same_optimizer(case: Case) -> None:
    """Without a projection: no random numbers, hence the names do not count."""
    runs = []
    for params in (lambda named: named.items(), lambda named: named.values(), lambda named: list(named.values())):
        named = parameters()
        idle = nn.Parameter(torch.ones(6, 8))
        first = ("idle.weight", idle) if not runs else idle
        optimizer = case([{"params": params(named)}, {"params": [first], **case.keys}])
        train(optimizer, named, 4)
        runs.append(named)
    assert identical(runs[0], runs[1]) and identical(runs[0], runs[2])


def test_unnamed_parameters_still_get_different_subspaces_and_resume() -> None:
    def build() -> tuple[list[nn.Parameter], GaLore]:
        params = [nn.Parameter(torch.zeros(12, 16)) for _ in range(2)]
        return params, GaLore([{"params": params, "rank": 3, "update_proj_gap": 4}], lr=0.01)

    def steps(params: list[nn.Parameter], optimizer: GaLore, count: range) -> None:
        for step in count:
            for p in params:
                p.grad = gradient("same", torch.zeros_like(p), step).float()
            optimizer.step()

    params, optimizer = build()
    steps(params, optimizer, range(3))
    assert not torch.allclose(params[0], params[1], atol=1e-5)
    resumed, again = build()
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.data)
    again.load_state_dict(optimizer.state_dict())
    steps(params, optimizer, range(3, 8))
    steps(resumed, again, range(3, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


@every_case
def test_settings_of_the_constructor_are_defaults_of_the_groups(case: Case) -> None:
    named, plain = parameters(), parameters()
    groups = case.groups(named)
    groups[0]["weight_decay"] = 0.3
    groups.append({"params": [("late", nn.Parameter(torch.zeros(3)))]})
    optimizer = case(groups, weight_decay=0.1, lr=0.02)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    train(optimizer, named, 2)
    train(case(case.groups(plain), lr=0.02, weight_decay=0.3), plain, 2)
    assert identical(named, plain)


@every_case
def test_weight_decay_alone(case: Case) -> None:
    """With a zero gradient a step is W ← (1 − lr·wd)·W, in every kind of group."""
    named, dense = parameters(), parameters({"norm.weight": (24,)})
    start = clone(named | dense)
    optimizer = case(case.groups(named, dense), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for p in (named | dense).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert difference(named | dense, {name: 0.95**3 * p for name, p in start.items()}) < 1e-6


@every_case
def test_the_caller_s_groups_are_not_written_to(case: Case) -> None:
    named = parameters()
    groups = case.groups(named)
    before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    kept = [list(group["params"]) for group in groups]
    case(groups)
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == before
    assert [[id(x) for x in params] for params in kept] == [[id(x) for x in group["params"]] for group in groups]


@pytest.mark.parametrize("method", list_methods())
def test_registry_rows_say_what_a_method_is(method: str) -> None:
    info = method_info(method)
    assert info.name == method
    assert issubclass(info.optimizer, torch.optim.Optimizer)


def test_an_unknown_method_raises_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"(?s)galor.*galore"):
        create_optimizer("galor", list(parameters().items()), lr=0.01)
    with pytest.raises(ValueError, match=r"(?s)galor.*galore"):
        method_info("galor")
