"""State: declared, planned and allocated are the same; it survives saving, loading, copying and re-binding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.cases import (
    CASES,
    DENSE_SHAPES,
    LOW_RANK,
    SHAPES,
    Case,
    clone,
    identical,
    parameters,
    set_gradients,
    states,
    train,
)
from subspan.optim import GaLore, create_optimizer

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def everything(dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    return parameters(SHAPES, dtype=dtype), parameters(DENSE_SHAPES, dtype=dtype)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(one: Any, other: Any) -> bool:
    a, b = states(one), states(other)
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys()
        and all(torch.equal(a[n][k], b[n][k]) and a[n][k].dtype == b[n][k].dtype for k in a[n])
        for n in a
    )


def check_declaration(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            declared, state = optimizer.declared_state(p), optimizer.state[p]
            assert set(declared) == set(state)
            for key, spec in declared.items():
                tensor = state[key]
                assert type(tensor) is Tensor
                assert (tuple(spec.shape), spec.dtype) == (tuple(tensor.shape), tensor.dtype), key
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, f"{key} is a view"
                assert not tensor.requires_grad


@every_case
@every_dtype
def test_state_equals_its_declaration(case: Case, dtype: torch.dtype) -> None:
    low_rank, dense = everything(dtype)
    optimizer = case(case.groups(low_rank, dense))
    optimizer.init_state()
    check_declaration(optimizer)
    for steps in (range(0, 1), range(1, 6)):
        train(optimizer, low_rank | dense, steps)
        check_declaration(optimizer)
    other = case(case.groups(*everything(dtype)))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    check_declaration(other)


@every_case
def test_initialising_the_state_early_changes_nothing(case: Case) -> None:
    eager, lazy = everything(), everything()
    optimizer = case(case.groups(*eager))
    optimizer.init_state()
    keys = {name: set(state) for name, state in states(optimizer).items()}
    optimizer.init_state()  # a second call finds nothing to do
    train(optimizer, eager[0] | eager[1], 6)
    other = case(case.groups(*lazy))
    train(other, lazy[0] | lazy[1], 6)
    assert identical(eager[0] | eager[1], lazy[0] | lazy[1])
    assert same_state(optimizer, other)
    if case.method != "frugal":  # FRUGAL's blocks hold moments for the active tensors only
        assert keys == {name: set(state) for name, state in states(optimizer).items()}


@every_case
def test_initialising_the_state_late_keeps_what_is_there(case: Case) -> None:
    one, other = everything(), everything()
    a, b = case(case.groups(*one)), case(case.groups(*other))
    train(a, one[0] | one[1], 3)
    train(b, other[0] | other[1], 3)
    a.init_state()
    train(a, one[0] | one[1], range(3, 6))
    train(b, other[0] | other[1], range(3, 6))
    assert identical(one[0] | one[1], other[0] | other[1])


@every_case
@every_dtype
def test_planned_bytes_are_allocated_bytes(case: Case, dtype: torch.dtype) -> None:
    low_rank, dense = everything(dtype)
    optimizer = case(case.groups(low_rank, dense))
    planned = optimizer.planned_state_bytes()
    optimizer.init_state()
    assert optimizer.state_bytes() == planned
    train(optimizer, low_rank | dense, 6)
    assert optimizer.state_bytes() == optimizer.planned_state_bytes()
    held: dict[str, int] = {}
    for state in states(optimizer).values():
        for key, tensor in state.items():
            held[key] = held.get(key, 0) + tensor.untyped_storage().nbytes()
    assert {key: count for key, count in optimizer.state_bytes().items() if count} == held
    assert sum(held.values()) > 0


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resume_is_bit_exact(case: Case, dtype: torch.dtype, stop: int) -> None:
    """Through a file, into a new optimizer on new tensors, in the middle of a period and at a refresh."""
    straight = everything(dtype)
    optimizer = case(case.groups(*straight))
    train(optimizer, straight[0] | straight[1], stop)
    resumed = clone(straight[0]), clone(straight[1])
    again = case(case.groups(*resumed))
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert same_state(optimizer, again)
    train(optimizer, straight[0] | straight[1], range(stop, 12))
    train(again, resumed[0] | resumed[1], range(stop, 12))
    assert identical(straight[0] | straight[1], resumed[0] | resumed[1])
    assert same_state(optimizer, again)


@every_case
def test_resume_restores_the_settings_of_the_groups(case: Case) -> None:
    named = parameters()
    optimizer = case(case.groups(named, update_proj_gap=3) if case.projects else case.groups(named), lr=0.5)
    train(optimizer, named, 2)
    other = case(case.groups(clone(named)), lr=0.1)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.5
    if case.projects:
        assert other.param_groups[0]["update_proj_gap"] == 3


@every_case
def test_resume_goes_on_with_the_seed_of_the_checkpoint(case: Case) -> None:
    """Another seed in the constructor would draw other subspaces from the next refresh on."""
    straight = parameters()
    optimizer = case(case.groups(straight), seed=3)
    train(optimizer, straight, 3)
    resumed = clone(straight)
    again = case(case.groups(resumed), seed=9)
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, straight, range(3, 10))
    train(again, resumed, range(3, 10))
    assert identical(straight, resumed)


@every_case
def test_dtypes_survive_loading_into_bf16_parameters(case: Case) -> None:
    """torch casts loaded state to the parameter's dtype: fp32 moments would lose digits, 70001 would become 70144."""
    low_rank, dense = everything(torch.bfloat16)
    optimizer = case(case.groups(low_rank, dense))
    train(optimizer, low_rank | dense, 3)
    for state in states(optimizer).values():
        if "refreshes" in state:
            state["refreshes"].fill_(70001)
    loaded = saved_and_loaded(optimizer.state_dict())
    other = case(case.groups(*everything(torch.bfloat16)))
    other.load_state_dict(loaded)
    assert same_state(optimizer, other)
    found = states(other).values()
    assert all(state["step"].device.type == "cpu" and state["step"].dtype == torch.float32 for state in found if state)
    assert any("exp_avg" in state for state in found)
    dtypes = {state["exp_avg"].dtype for state in found if "exp_avg" in state}
    coded = {"8bit": torch.uint8, "4bit": torch.uint8, "bfloat16": torch.bfloat16}
    assert dtypes <= {torch.float32, coded.get(other.param_groups[0]["moments"])}


def test_loaded_state_does_not_share_memory_with_the_dictionary() -> None:
    named = parameters()
    optimizer = GaLore([{"params": list(named.items()), "rank": 4}], lr=1e-2)
    train(optimizer, named, 2)
    other = GaLore([{"params": list(clone(named).items()), "rank": 4}], lr=1e-2)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"].fill_(0.25)  # as learning-rate schedulers do
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    before = copy.deepcopy(states(optimizer))
    for state in states(other).values():
        for tensor in state.values():
            tensor.zero_()
    after = states(optimizer)
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])


@every_case
def test_deepcopy_goes_on_by_itself(case: Case) -> None:
    low_rank, dense = everything()
    optimizer = case(case.groups(low_rank, dense))
    train(optimizer, low_rank | dense, 3)
    held = {"optimizer": optimizer, "params": (low_rank, dense)}
    twin = copy.deepcopy(held)  # together, so that the copy's parameters are the copied ones
    named, twins = low_rank | dense, twin["params"][0] | twin["params"][1]
    train(optimizer, named, range(3, 8))
    assert not identical(named, twins)
    train(twin["optimizer"], twins, range(3, 8))
    assert identical(named, twins)


@pytest.mark.parametrize("case", [case for case in LOW_RANK if str(case) != "frugal"], ids=str)
def test_loading_another_rank_is_an_error_that_changes_nothing(case: Case) -> None:
    named = {"layers.0.q.weight": parameters()["layers.0.q.weight"]}
    optimizer = case(case.groups(named))
    train(optimizer, named, 3)
    twin, copied = clone(named), clone(named)
    key = "density" if case.method == "frugal" else "rank"
    keys = {key: 2 * case.keys[key]}
    other, untouched = case(case.groups(copied, **keys)), case(case.groups(twin, **keys))
    with pytest.raises(ValueError, match=r"layers\.0\.q\.weight|rank|density"):
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(other, copied, 3)
    train(untouched, twin, 3)
    assert identical(copied, twin)


@every_case
def test_loading_other_parameters_is_an_error(case: Case) -> None:
    named = parameters()
    optimizer = case(case.groups(named))
    train(optimizer, named, 1)
    saved = optimizer.state_dict()

    fewer = case(case.groups(dict(list(clone(named).items())[:-1])))
    with pytest.raises(ValueError, match="parameter"):
        fewer.load_state_dict(saved)

    renamed = case(case.groups({name.replace("10", "11"): p for name, p in clone(named).items()}))
    with pytest.raises(ValueError, match=r"layers\.1[01]\.down\.weight"):
        renamed.load_state_dict(saved)


@every_case
def test_loading_the_state_of_another_method_is_an_error(case: Case) -> None:
    """GaLore's and GoLore's states have the same keys, shapes and dtypes."""
    named = parameters()
    optimizer = case(case.groups(named))
    train(optimizer, named, 1)
    saved = saved_and_loaded(optimizer.state_dict())
    other = Case("golore", {}) if case.method == "galore" else Case("galore", {})
    optimizer = other(other.groups(clone(named)))
    with pytest.raises(ValueError, match=case.method):
        optimizer.load_state_dict(saved)
    assert not any(states(optimizer).values())


@every_case
@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "extra", "object", "group"])
def test_loading_a_damaged_state_is_an_error_that_changes_nothing(case: Case, damage: str) -> None:
    named = parameters()
    optimizer = case(case.groups(named))
    train(optimizer, named, 3)
    saved = saved_and_loaded(optimizer.state_dict())
    entries = saved["state"].values()
    state = next((entry for entry in entries if "exp_avg" in entry), next(iter(entries)))
    key = next(key for key in ("exp_avg_sq", "exp_avg", "step") if key in state)
    if damage == "missing" and len(state) == 1:
        pytest.skip("what is left is that of a parameter without a step")
    if damage == "shape":
        state[key] = torch.zeros(3, 3)
    elif damage == "dtype":
        state[key] = state[key].to(torch.float16)
    elif damage == "missing":
        del state[key]
    elif damage == "extra":
        state["surplus"] = torch.zeros(2)
    elif damage == "object":
        state[key] = "no tensor"
    else:
        saved["param_groups"] = saved["param_groups"] * 2
    resumed = clone(named)
    again = case(case.groups(resumed))
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError)):
        again.load_state_dict(saved)
    assert same_state(optimizer, again)
    train(optimizer, named, range(3, 8))
    train(again, resumed, range(3, 8))
    assert identical(named, resumed)


@every_case
def test_loading_reads_parameters_by_name(case: Case) -> None:
    straight = parameters()
    optimizer = case(case.groups(straight))
    train(optimizer, straight, 3)
    resumed = clone(straight)
    again = case(case.groups(dict(reversed(resumed.items()))))
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, straight, range(3, 8))
    train(again, resumed, range(3, 8))
    assert identical(straight, resumed)


@every_case
def test_state_follows_a_parameter_that_a_wrapper_replaces(case: Case) -> None:
    """accelerate's FSDP2 path swaps the tensors in the groups and leaves the keys of `state` alone."""
    kept, swapped = parameters(), parameters()
    one, other = case(case.groups(kept)), case(case.groups(swapped))
    train(one, kept, 3)
    train(other, swapped, 3)
    swapped = clone(swapped)
    for group in other.param_groups:
        group["params"] = [swapped[name] for name in group["param_names"]]
    train(one, kept, range(3, 8))
    train(other, swapped, range(3, 8))
    assert identical(kept, swapped)
    assert same_state(one, other)
    assert set(other.state) <= set(swapped.values())  # nothing is left behind under the old tensors


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accelerate_prepare_keeps_an_initialised_state(case: Case, dtype: torch.dtype) -> None:
    accelerate = pytest.importorskip("accelerate")

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)).to(dtype)
        named = dict(model.named_parameters())
        matrices = {name: p for name, p in named.items() if p.ndim == 2}
        vectors = {name: p for name, p in named.items() if p.ndim < 2}
        optimizer = case(case.groups(matrices, vectors))
        optimizer.init_state()
        return model, optimizer

    (bare, bare_optimizer), (model, optimizer) = build(), build()
    before = copy.deepcopy(states(optimizer))
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, optimizer)
    after = states(optimizer)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys()
        for key, tensor in before[name].items():
            assert tensor.dtype == after[name][key].dtype and torch.equal(tensor, after[name][key]), key
    for step in range(6):
        set_gradients(dict(bare.named_parameters()), step)
        set_gradients(dict(model.named_parameters()), step)
        bare_optimizer.step()
        wrapped.step()
    assert identical(dict(bare.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("method", "saved", "loaded", "part"),
    [
        ("galore", {"svd": "exact"}, {}, "subspace"),
        ("galore", {"stagger": False}, {}, "refresh"),
        ("galore", {"decay": "after"}, {}, "decay"),
        ("galore", {"eps_placement": "before"}, {}, "inner"),
        ("apollo", {"scale_type": "tensor"}, {}, "lift"),
    ],
)
def test_a_state_of_other_parts_is_refused(
    method: str, saved: dict[str, object], loaded: dict[str, object], part: str
) -> None:
    named = {"a": torch.nn.Parameter(torch.ones(16, 24))}
    groups = [{"params": list(named.items()), "rank": 4}]
    state = create_optimizer(method, groups, **saved).state_dict()
    with pytest.raises(ValueError, match=part):
        create_optimizer(method, groups, **loaded).load_state_dict(state)


def test_skipped_steps_are_saved() -> None:
    parameter = torch.nn.Parameter(torch.ones(16, 24))
    groups = [{"params": [("a", parameter)], "rank": 4}]
    optimizer = create_optimizer("galore", groups)
    parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.warns(RuntimeWarning, match="a: "):
        optimizer.step()
    again = create_optimizer("galore", groups)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == optimizer.skipped_steps == 1


def test_groups_that_are_used_again_are_not_scaled_again() -> None:
    parameter = torch.nn.Parameter(torch.ones(16, 24))
    first = create_optimizer("galore", [{"params": [("a", parameter)], "rank": 4, "lr_scale": 0.5}], lr=0.01)
    group = {**first.param_groups[0], "params": [("a", parameter)]}
    group.pop("param_names")
    assert create_optimizer("galore", [group]).param_groups[0]["lr"] == first.param_groups[0]["lr"] == 0.005


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("galore", {"stagger": "no"}, "stagger"),
        ("galore", {"inner": "sgd"}, "inner"),
        ("galore", {"betas": 0.9}, "betas"),
        ("galore", {"weight_decay": None}, "weight_decay"),
        ("golore", {"golore_after": 1.5}, "golore_after"),
        ("apollo", {"scale_front": 1}, "scale_front"),
        ("fira", {"official_code": "yes"}, "official_code"),
    ],
)
def test_values_of_the_wrong_type_are_refused(method: str, settings: dict[str, object], message: str) -> None:
    groups = [{"params": [("a", torch.nn.Parameter(torch.ones(16, 24)))], "rank": 4}]
    with pytest.raises(ValueError, match=message):
        create_optimizer(method, groups, **settings)
