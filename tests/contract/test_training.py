"""The optimizers behave as torch.optim optimizers do in training loops: accumulation, schedulers, closures, groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from contract.cases import (
    CASES,
    LOW_RANK,
    Case,
    clone,
    difference,
    gradient,
    identical,
    parameters,
    set_gradients,
    states,
    train,
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)

SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.05, total_steps=12),
}


@every_case
def test_a_step_moves_the_weights_against_the_gradient(case: Case) -> None:
    """Descent on ½‖W − W*‖² brings every matrix and vector nearer to its target."""
    named, targets = parameters(), parameters(seed=1)
    optimizer = case(case.groups(named))
    distance = difference(named, targets)
    first = sum((p - targets[name]).norm().item() ** 2 for name, p in named.items())
    for _ in range(60):
        for name, p in named.items():
            p.grad = (p - targets[name]).detach()
        optimizer.step()
    last = sum((p - targets[name]).norm().item() ** 2 for name, p in named.items())
    assert distance > 0 and last < 0.999 * first


@every_case
def test_gradient_accumulation_equals_a_large_batch(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(4, 32, 16, generator=generator), torch.randn(4, 32, 12, generator=generator)
    models = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12)).double()
        named = dict(model.named_parameters())
        matrices = {name: p for name, p in named.items() if p.ndim == 2}
        optimizer = case(case.groups(matrices, {name: p for name, p in named.items() if p.ndim == 1}))
        for step in range(8):
            x, y = inputs.double() + 0.1 * step, labels.double()
            if accumulate:
                for micro_x, micro_y in zip(x, y, strict=True):
                    (nn.functional.mse_loss(model(micro_x), micro_y) / len(x)).backward()
            else:
                nn.functional.mse_loss(model(x.flatten(0, 1)), y.flatten(0, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(named)
    assert difference(*models) < 1e-6


def scheduled(case: Case, scheduler: str, lr: float | Tensor) -> tuple[dict[str, nn.Parameter], list[float]]:
    named, dense = parameters(), parameters({"norm.weight": (24,)})
    optimizer = case(case.groups(named, dense), lr=lr)
    schedule, rates = SCHEDULERS[scheduler](optimizer), []
    for step in range(10):
        train(optimizer, named | dense, range(step, step + 1))
        rates.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    return named | dense, rates


@every_case
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_with_float_and_tensor_learning_rate(case: Case, scheduler: str) -> None:
    weights, rates = scheduled(case, scheduler, 0.02)
    assert len(set(rates)) > 5
    rate = torch.tensor(0.02)
    tensor_weights, tensor_rates = scheduled(case, scheduler, rate)
    assert tensor_rates == pytest.approx(rates, rel=1e-5)
    assert difference(weights, tensor_weights) < 1e-6

    if scheduler == "one_cycle":
        return  # moves the betas too
    named, dense = parameters(), parameters({"norm.weight": (24,)})
    optimizer = case(case.groups(named, dense))

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rates[step]

    train(optimizer, named | dense, 10, before_step=set_rate)
    assert difference(weights, named | dense) < 1e-6


@every_case
def test_learning_rate_zero_moves_nothing(case: Case) -> None:
    named = parameters()
    train(case(case.groups(named), lr=0.0), named, 6)
    assert identical(named, parameters())


@every_case
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_scale_multiplies_and_schedulers_act_on_the_product(case: Case, tensor_lr: bool) -> None:
    def run(rate: float, **keys: Any) -> tuple[dict[str, nn.Parameter], Any]:
        named, rest = parameters(), parameters({"norm.weight": (24,)})
        groups = case.groups(named, rest)
        groups[0].update(keys)
        optimizer = case(groups, lr=torch.tensor(rate) if tensor_lr else rate)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            train(optimizer, named | rest, range(step, step + 1))
            schedule.step()
        return named, optimizer

    scaled, optimizer = run(0.01, lr_scale=3.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.03 / 7, 0.01 / 7])
    plain, _ = run(0.03)
    assert difference(scaled, plain) < 1e-6
    _own, optimizer = run(0.01, lr_scale=3.0, lr=torch.tensor(0.02) if tensor_lr else 0.02)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.06 / 7)


@every_case
def test_lr_scale_is_applied_once(case: Case) -> None:
    """Loading a state, copying or adding a group does not multiply again."""
    named = parameters()
    optimizer = case(case.groups(named, lr_scale=3.0), lr=0.01)
    other = case(case.groups(clone(named), lr_scale=3.0), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3)))], "lr_scale": 0.5})
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.03, 0.005])


@every_case
def test_parameter_without_gradient_stays(case: Case) -> None:
    named, reference = parameters(), parameters()
    optimizer, whole = case(case.groups(named), weight_decay=0.1), case(case.groups(reference), weight_decay=0.1)
    idle = "layers.1.up.weight"
    start = named[idle].detach().clone()
    for step in range(6):
        set_gradients(named, step)
        named[idle].grad = None
        optimizer.step()
        set_gradients(reference, step)
        whole.step()
    assert torch.equal(named[idle], start)
    others = [name for name in named if name != idle]
    assert difference({n: named[n] for n in others}, {n: reference[n] for n in others}) < 1e-6
    set_gradients(named, 6)
    optimizer.step()  # and it may join later
    assert not torch.equal(named[idle], start)


@every_case
def test_a_parameter_that_joins_late_has_a_clock_of_its_own(case: Case) -> None:
    """Its bias correction counts its own steps, though it is worked on together with older ones of its shape."""
    shapes = {f"{i}": (8, 12) for i in range(4)}
    named, lonely = parameters(shapes), parameters(shapes)
    together, apart = case(case.groups(named)), case(case.groups(lonely))
    for step in range(9):
        for optimizer, tensors, starts in ((together, named, (0, 0, 0, 3)), (apart, lonely, (99, 99, 99, 3))):
            set_gradients(tensors, step)
            for p, start in zip(tensors.values(), starts, strict=True):
                if step < start:
                    p.grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert difference({"3": named["3"]}, {"3": lonely["3"]}) < 1e-6
    assert difference({"3": named["3"]}, {"3": parameters(shapes)["3"]}) > 1e-3


@every_case
def test_frozen_parameter_stays(case: Case) -> None:
    named = parameters()
    named["layers.0.q.weight"].requires_grad_(False)
    start = named["layers.0.q.weight"].detach().clone()
    optimizer = case(case.groups(named), weight_decay=0.1)
    for _ in range(6):
        sum((p**2).sum() for p in named.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(named["layers.0.q.weight"], start)
    assert not torch.equal(named["layers.1.q.weight"], parameters()["layers.1.q.weight"])


@every_case
def test_step_without_any_gradient_does_nothing(case: Case) -> None:
    named = parameters()
    optimizer = case(case.groups(named))
    optimizer.step()
    assert identical(named, parameters())


@every_case
@pytest.mark.parametrize("shape", [(), (5,), (1,)], ids=str)
def test_vectors_and_scalars_without_a_rank(case: Case, shape: tuple[int, ...]) -> None:
    named = parameters({"bias": shape})
    train(case.dense(named), named, 3)
    assert difference(named, parameters({"bias": shape})) > 1e-3


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_vectors_in_a_projected_group_are_an_error(case: Case, shape: tuple[int, ...]) -> None:
    """A group that asks for a projection of something that has none says so instead of ignoring it."""
    if str(case) == "frugal":
        pytest.skip("whole tensors of any shape take turns")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        case(case.groups(parameters({"norm.weight": shape})))


@every_case
def test_empty_group(case: Case) -> None:
    named, plain = parameters(), parameters()
    groups: list[dict[str, Any]] = [{"params": list(named.values()), **case.keys}]
    optimizer = case([*groups, {"params": []}, {"params": [], **case.keys}])
    train(optimizer, named, 3)
    train(case([{"params": list(plain.values()), **case.keys}]), plain, 3)
    assert identical(named, plain)
    assert isinstance(optimizer.table(), str)


@every_case
def test_one_row_and_one_column(case: Case) -> None:
    shapes = {"row": (1, 9), "column": (9, 1), "one": (1, 1)}
    named = parameters(shapes)
    train(case(case.groups(named)), named, 6)
    assert all(p.isfinite().all() for p in named.values())
    assert all((named[name] != p).any() for name, p in parameters(shapes).items())


@every_case
def test_closure(case: Case) -> None:
    named, plain = parameters(), parameters()
    optimizer, other = case(case.groups(named)), case(case.groups(plain))
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p * gradient(name, torch.zeros_like(p), step).float()).sum() for name, p in named.items())
            assert isinstance(loss, Tensor)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert isinstance(loss, Tensor) and math.isfinite(loss.item())
        for name, p in plain.items():
            p.grad = gradient(name, torch.zeros_like(p), step).float()
        assert other.step() is None
    assert identical(named, plain)


@every_case
def test_add_param_group_during_training(case: Case) -> None:
    early, late = parameters({"a": (16, 24)}), parameters({"b": (24, 16)}, seed=3)
    dense = parameters({"bias": (4,)})
    optimizer = case(case.groups(early))
    train(optimizer, early, 5)
    for group in case.groups(late, dense):
        optimizer.add_param_group(group)
    train(optimizer, early | late | dense, range(5, 12))
    assert difference(late, parameters({"b": (24, 16)}, seed=3)) > 1e-3
    assert difference(dense, parameters({"bias": (4,)})) > 1e-3
    if str(case) != "frugal":  # the newcomer's own steps count from its own start, and the old ones do not notice it
        by_itself = parameters({"a": (16, 24)})
        train(case(case.groups(by_itself)), by_itself, 12)
        assert difference(early, by_itself) < 1e-6
        assert float(states(optimizer)["b"]["step"]) == 7 or case.method == "frugal"


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_frugal_blocks_take_newcomers_into_their_turns(density: float) -> None:
    """A group that comes in the middle of a period changes who is next, and never who holds moments now."""
    shapes = {f"layers.{i}.weight": (8, 12) for i in range(4)}
    named = parameters(shapes)
    case = Case("frugal", {})
    optimizer = case(case.groups(named, density=density))
    train(optimizer, named, 2)
    named |= parameters({f"layers.{i}.weight": (8, 12) for i in range(4, 9)})
    late = {name: p for name, p in named.items() if name not in shapes}
    optimizer.add_param_group(case.groups(late, density=density)[0])
    turns = dict.fromkeys(named, 0)
    gap = optimizer.param_groups[0]["update_proj_gap"]
    for step in range(2, 2 + 18 * gap):
        train(optimizer, named, range(step, step + 1))
        for name, state in states(optimizer).items():
            turns[name] += "exp_avg" in state
        for name, p in named.items():
            assert set(optimizer.declared_state(p)) == set(optimizer.state[p]), (step, name)
        assert optimizer.planned_state_bytes() == optimizer.state_bytes()
    # Newcomers count periods of their own, so the density holds for every tensor over time, not in every step.
    share = math.ceil(density * len(named)) / len(named)
    for name, count in turns.items():
        assert abs(count / (18 * gap) - share) < 0.2, (name, count)


@every_case
def test_two_parameters_of_one_name_are_an_error(case: Case) -> None:
    matrix = nn.Parameter(torch.ones(16, 24))
    optimizer = case(case.groups({"a": nn.Parameter(torch.ones(16, 24))}))
    with pytest.raises(ValueError, match="a"):
        optimizer.add_param_group(case.groups({"a": matrix})[0])


@every_case
def test_set_to_none_and_zeroed_gradients_are_not_kept(case: Case) -> None:
    """The optimizer neither changes nor holds the gradient it was given."""
    named = parameters()
    optimizer = case(case.groups(named))
    for step in range(5):
        set_gradients(named, step)
        before = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        optimizer.step()
        assert identical(before, {name: p.grad for name, p in named.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_are_rounded_once(case: Case, dtype: torch.dtype) -> None:
    """From equal weights and gradients, W is the fp32 result rounded to nearest: not decay and update one by one."""
    if case.finds_by_sketch:  # a sketch is a product in the gradient's dtype; the exact basis is not
        case = Case(case.method, {**case.settings, "svd": "exact"})
    low = parameters(dtype=dtype)
    high = {name: nn.Parameter(p.detach().float()) for name, p in low.items()}
    start = clone(high)
    one, other = (case(case.groups(ps), weight_decay=0.1, rounding="nearest") for ps in (low, high))
    for name, p in low.items():
        p.grad = gradient(name, p, 0).to(dtype)
        high[name].grad = p.grad.float()
    one.step()
    other.step()
    assert difference(high, start) > 1e-3
    for name, p in low.items():
        ulp = torch.finfo(dtype).eps * high[name].abs().clamp_min(2**-14)
        half = (p.float() - high[name]).abs() / ulp
        assert half.max() < 0.6, name  # 0.5, and the rounding of the projection in the gradient's dtype
