"""The parts of the restart engine: when, optimizer state, learning rate, rounding."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspan.linalg import seeded_generator
from subspan.nn.lowrank import (
    Every,
    GrowingGap,
    Keep,
    MagnitudePrune,
    Never,
    RandomPrune,
    ReLoRA,
    ResetState,
    RestartedLinear,
    Restarts,
    Rewarm,
)
from subspan.nn.lowrank.state_transform import transform_state
from subspan.nn.lowrank.weights import LowRankWeights
from subspan.optim import AdamW, GaLore, GoLore


def test_when() -> None:
    gaps = GrowingGap()
    after = [done for done in range(5000) if gaps.due(done)]
    assert after[:3] == [100, 201, 302]
    assert [b - a for a, b in pairwise(after)] == [100 + int(1.2**k) for k in range(len(after) - 1)]
    for when in (gaps, Every(7), Every(7, start=3), Every(7, start=-4), Never()):
        due = [done for done in range(600) if when.due(done)]
        assert due == ([] if isinstance(when, Never) else due) and 0 not in due
        for done in range(600):
            before = [at for at in due if at <= done]
            assert when.last(done) == (before[-1] if before else None)
            assert when.count(done) == len(before)
    assert [done for done in range(20) if Every(7, start=-4).due(done)] == [3, 10, 17]


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: Every(0), "0"),
        (lambda: Every(3, start=-3), "-3"),
        (lambda: GrowingGap(first=0), "0"),
        (lambda: GrowingGap(base=0.5), "0.5"),
        (lambda: Rewarm(-1), "-1"),
        (lambda: MagnitudePrune(0.0), "0.0"),
        (lambda: RandomPrune(1.5), "1.5"),
        (lambda: Restarts(nn.Module(), {}, when=Never(), rounding="up"), "'up'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(make: Any, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        make()


def test_rewarm() -> None:
    def schedule(step: int) -> float:
        return 1 - step / 100

    when, rewarm = Every(20), Rewarm(5)
    for step in range(20):  # the first cycle is the schedule's
        assert rewarm.rate(step, schedule, when) == schedule(step)
    for cycle in (20, 40):
        ramp = [rewarm.rate(cycle + i, schedule, when) for i in range(6)]
        assert ramp[0] == 0 and ramp[5] == schedule(cycle + 5)
        assert all(abs(b - a - schedule(cycle + 5) / 5) < 1e-12 for a, b in pairwise(ramp))
        assert rewarm.rate(cycle + 19, schedule, when) == schedule(cycle + 19)
    assert Rewarm(0).rate(20, schedule, when) == schedule(20)


def stepped(kind: str, **settings: Any) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    """An optimizer after 20 steps, and its one large parameter."""
    layer = nn.Linear(80, 64, bias=False)
    makers: dict[str, Any] = {"own": AdamW, "torch": torch.optim.AdamW}
    optimizer = makers[kind](layer.parameters() if kind == "torch" else layer, lr=1e-2, **settings)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(16, 80)).square().mean().backward()
        optimizer.step()
    return optimizer, layer.weight


OPTIMIZERS = [
    ("own", {}),
    ("own", {"moments": "8bit"}),
    ("own", {"moments": "bfloat16"}),
    ("torch", {}),
    ("torch", {"amsgrad": True}),
]


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Decoded copies of all state."""
    if isinstance(optimizer, AdamW):
        found: dict[str, Tensor] = {}
        optimizer.edit_state(parameter, lambda state: found.update({k: v.clone() for k, v in state.items()}))
        return found
    return {key: value.clone() for key, value in optimizer.state[parameter].items()}


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("transform", [MagnitudePrune(0.9), RandomPrune(0.9), ResetState()])
def test_one_choice_for_all_moments(kind: str, settings: Any, transform: Any) -> None:
    optimizer, W = stepped(kind, **settings)
    before = moments_of(optimizer, W)
    pruned = transform_state(optimizer, W, transform, seeded_generator(0, "x", 1))
    after = moments_of(optimizer, W)
    assert float(after["step"]) == 0
    m, v = after["exp_avg"], after["exp_avg_sq"]
    assert not ((v == 0) & (m != 0)).any()
    share = float((v == 0).float().mean())
    expected = 1.0 if isinstance(transform, ResetState) else 0.9
    assert share == pytest.approx(expected, abs=0.02)
    assert pruned.zeroed / pruned.total == pytest.approx(expected, abs=0.02)
    kept = v != 0
    assert not any(after[key][~kept].any() for key in before.keys() - {"step"})  # the largest of AMSGrad too
    if settings.get("moments") is None:  # codes of blocks are scaled anew
        for key in before.keys() - {"step"}:
            assert torch.equal(after[key][kept], before[key][kept])
    if isinstance(transform, MagnitudePrune):
        assert before["exp_avg"].abs()[kept].min() >= before["exp_avg"].abs()[~kept].max()
    # A step with what is left is an ordinary one.
    W0 = W.detach().clone()
    W.grad = torch.randn_like(W) * 1e-3
    optimizer.step()
    assert (W - W0).abs().max() < 2e-2


def test_a_reset_is_a_new_optimizer() -> None:
    for moments in ("float32", "8bit"):
        optimizer, W = stepped("own", moments=moments)
        transform_state(optimizer, W, ResetState(), torch.Generator())
        twin = nn.Linear(80, 64, bias=False)
        twin.weight.data.copy_(W.data)
        fresh = AdamW(twin, lr=1e-2, moments=moments)
        for _ in range(3):
            W.grad = torch.randn_like(W)
            twin.weight.grad = W.grad.clone()
            optimizer.step()
            fresh.step()
        assert torch.equal(W, twin.weight)


def test_draws_come_from_the_generator() -> None:
    after = []
    for _ in range(2):
        torch.manual_seed(0)
        optimizer, W = stepped("own")
        torch.manual_seed(len(after))
        transform_state(optimizer, W, RandomPrune(0.5), seeded_generator(0, "W", 3))
        after.append(moments_of(optimizer, W)["exp_avg"])
    assert torch.equal(*after)


def test_keep_and_small_shares() -> None:
    optimizer, W = stepped("own")
    before = moments_of(optimizer, W)
    assert transform_state(optimizer, W, Keep(), torch.Generator()).zeroed == 0
    assert transform_state(optimizer, W, MagnitudePrune(1e-6), torch.Generator()).zeroed == 0
    after = moments_of(optimizer, W)
    assert all(torch.equal(after[key], before[key]) for key in before)
    fresh = nn.Parameter(torch.zeros(3))
    assert transform_state(torch.optim.AdamW([fresh]), fresh, ResetState(), torch.Generator()) == (0, 0)


def test_a_projected_factor_is_refreshed_when_it_would_have_been() -> None:
    layer = nn.Linear(32, 16, bias=False)
    optimizer = GaLore(layer, rank=4, update_proj_gap=10)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(64, 32)).square().mean().backward()
        optimizer.step()
    state = optimizer.state[layer.weight]
    left = int(state["next_refresh"]) - int(state["step"])
    transform_state(optimizer, layer.weight, MagnitudePrune(0.9), torch.Generator())
    assert int(state["step"]) == 0 and int(state["next_refresh"]) == left
    assert (state["exp_avg_sq"] == 0).float().mean() > 0.85


def test_a_method_that_counts_steps_is_refused() -> None:
    layer = nn.Linear(32, 16, bias=False)
    optimizer = GoLore(layer, rank=4, golore_after=20)
    layer(torch.randn(64, 32)).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="golore changes its subspaces after a number of steps"):
        transform_state(optimizer, layer.weight, ResetState(), torch.Generator())


def test_optimizers_that_are_not_understood() -> None:
    W = nn.Parameter(torch.ones(4, 6))
    optimizer = torch.optim.Adafactor([W])
    W.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"row_var.*Adafactor"):
        transform_state(optimizer, W, ResetState(), torch.Generator())


@pytest.mark.parametrize("start", [0, 3])
def test_what_cannot_be_transformed_is_refused_in_the_first_step_of_a_cycle(start: int) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    weights = ReLoRA(rank=4, restart_every=100, full_rank_steps=start).apply(model)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    for step in range(start + 1):
        optimizer.zero_grad()
        weights.begin_step(step)
        model(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
        if step < start:
            weights.end_step(step, optimizer)
    with pytest.raises(ValueError, match=r"row_var.*Adafactor"):
        weights.end_step(start, optimizer)


def restarting(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, LowRankWeights]:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).to(dtype)
    return model, ReLoRA(rank=4, alpha=4.0, restart_every=10, **settings).apply(model)


def test_factors_that_no_optimizer_has() -> None:
    model, weights = restarting()
    optimizer = torch.optim.AdamW([next(model.parameters())])
    with pytest.raises(ValueError, match=r"0\.lora_A is trained, but it is not in the optimizer"):
        weights.end_step(9, optimizer)


@pytest.mark.parametrize("state", ["reset", "magnitude", "random"])
def test_steps_after_a_restart_are_bounded(state: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    weights = ReLoRA(rank=4, alpha=4.0, restart_every=200, state=state, rewarm=0).apply(model)
    optimizer = AdamW(list(weights.factors().items()), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.99))
    x, y = torch.randn(64, 24), torch.randn(64, 8)
    largest = [0.0, 0.0]
    for step in range(230):
        before = {name: p.detach().clone() for name, p in weights.factors().items()}
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        for name, p in weights.factors().items():
            largest[step >= 200] = max(largest[step >= 200], float((p.detach() - before[name]).abs().max()))
        weights.end_step(step, optimizer)
    # With the clock of the old state fresh entries move by 2.2 learning rates, more than at the start of the run.
    assert largest[1] <= min(1.6e-4, largest[0])


def test_small_products_reach_bfloat16_in_the_mean() -> None:
    layer = RestartedLinear(nn.Linear(64, 64, bias=False), rank=1, scale=1.0).to(torch.bfloat16)
    layer.weight.fill_(1.0)
    deltas = {}
    for rounding in ("nearest", "stochastic"):
        layer.weight.fill_(1.0)
        weights = Restarts(layer, {"": layer}, when=Every(1), rounding=rounding)  # type: ignore[arg-type]
        for step in range(50):
            layer.lora_A.data.fill_(1.0)
            layer.lora_B.data.fill_(2**-11)  # a sixteenth of the gap above 1
            weights.restart(step)
        deltas[rounding] = float(layer.weight.float().mean()) - 1
    assert deltas["nearest"] == 0
    assert deltas["stochastic"] == pytest.approx(50 * 2**-11, rel=0.05)


def test_each_layer_and_each_restart_is_rounded_by_draws_of_its_own() -> None:
    """Else the same entries would take up all that is lost of the others."""
    layers = {name: RestartedLinear(nn.Linear(64, 64, bias=False), rank=1, scale=1.0).bfloat16() for name in "ab"}
    weights = Restarts(nn.ModuleDict(layers), layers, when=Every(1), rounding="stochastic")
    moved = []
    for step in range(2):
        for layer in layers.values():
            layer.weight.fill_(1.0)
            layer.lora_A.data.fill_(1.0)
            layer.lora_B.data.fill_(2**-8)  # half the gap above 1
        weights.restart(step)
        moved += [layer.weight > 1 for layer in layers.values()]
    assert all(0.4 < float((one == other).float().mean()) < 0.6 for one, other in combinations(moved, 2))
