"""ReLoRA and PeriodicLoRA: the function of the model, gradients, a reference loop, dense starts, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.runs import in_processes
from references import relora
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from subspan.nn.lowrank import (
    LowRankWeights,
    PeriodicLinear,
    PeriodicLoRA,
    RandomPrune,
    ReLoRA,
    RestartedLinear,
    weight_recipe,
)
from subspan.optim import AdamW

Maker = Callable[[], LowRankWeights]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 8, bias=False)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(32, 12, generator=generator), torch.randn(32, 8, generator=generator)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(
    weights: LowRankWeights,
    optimizer: torch.optim.Optimizer,
    start: int,
    stop: int,
    model: nn.Module | None = None,
    watch: Callable[[int], None] = lambda step: None,
) -> list[str]:
    """Steps at a peak rate of 1e-2; what was logged."""
    lines = []
    for step in range(start, stop):
        weights.begin_step(step)
        x, y = batch(step)
        for group in optimizer.param_groups:
            group["lr"] = weights.rate(step, lambda step: 1e-2)
        ((model or weights.model)(x.to(next(weights.model.parameters()).dtype)) - y).square().mean().backward()
        watch(step)
        optimizer.step()
        lines += weights.end_step(step, optimizer)
        optimizer.zero_grad()
    return lines


RECIPES = [
    ReLoRA(rank=4, restart_every=6, rewarm=2),
    ReLoRA(rank=4, restart_every=6, rewarm=2, state="random", prune=0.99),
    ReLoRA(rank=4, restart_every=6, rewarm=2, full_rank_steps=5),
    ReLoRA(rank=4, lazy=0.5, rewarm=2),
    PeriodicLoRA(rank=4, restart_every=6, rewarm=2),
    PeriodicLoRA(rank=4, restart_every=6, rewarm=2, momentum=0.5),
]


@pytest.mark.parametrize("recipe", RECIPES[:3] + RECIPES[4:5])
def test_the_function_stays_and_gradients_flow(recipe: Any) -> None:
    model, (x, _) = network(), batch(0)
    before = model(x)
    weights = recipe.apply(model, steps=20)
    assert (model(x) - before).abs().max() <= 1e-6
    optimizer, changed = AdamW(named(model), weight_decay=0.0), []

    def at_end(step: int, optimizer: Any) -> list[str]:
        before, W = model(x), model[0].weight.detach().clone()
        lines = type(weights).end_step(weights, step, optimizer)
        assert (model(x) - before).abs().max() <= 2e-6
        if lines and not torch.equal(model[0].weight, W):
            changed.append(step)
        return lines

    def flows(step: int) -> None:
        for layer in weights.layers.values():
            trained = [p for p in (*layer.factors().values(), layer.weight) if p.requires_grad]
            assert max(float(p.grad.norm()) for p in trained) > 0, step

    weights.end_step = at_end  # type: ignore[method-assign]
    lines = train(weights, optimizer, 0, 20, watch=flows)
    first = getattr(recipe, "full_rank_steps", 0) or 6
    assert len([line for line in lines if line.startswith("restart")]) == len(range(first, 21, 6))
    assert changed == [done - 1 for done in range(6, 21, 6)] or changed == [10, 16]


@pytest.mark.parametrize(("kind", "share"), [(ReLoRA, 1.0), (ReLoRA, 0.9), (PeriodicLoRA, 1.0)])
def test_the_reference_loop(kind: Any, share: float) -> None:
    steps, period, rewarm = 24, 8, 3
    model = network()
    dense = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    pruned = {"prune": share} if kind is ReLoRA else {}
    recipe = kind(rank=4, alpha=8.0, restart_every=period, rewarm=rewarm, **pruned)
    weights = recipe.apply(model, steps=steps)
    assert isinstance(weights.layers["0"], RestartedLinear)

    def draw(index: int, done: int) -> Tensor:
        layer = copy.deepcopy(weights.layers["02"[index]])
        layer.reset_(weights.generator("02"[index], done - 1))
        return layer.factors()["lora_A"].detach()[0]

    rates = [3e-2 * relora.jagged_cosine(step, steps, 4, period, rewarm) for step in range(steps)]

    def schedule(step: int) -> float:
        return relora.jagged_cosine(step, steps, 4, 10**9, 0)

    assert [3e-2 * weights.rate(step, schedule) for step in range(steps)] == pytest.approx(rates)
    expected = relora.train(
        dense, [batch(step) for step in range(steps)], draw, rank=4, alpha=8.0, period=period, rates=rates, share=share
    )
    optimizer = AdamW(named(model), weight_decay=0.0)
    for step in range(steps):
        x, y = batch(step)
        optimizer.param_groups[0]["lr"] = rates[step]
        (model(x) - y).square().mean().backward()
        optimizer.step()
        weights.end_step(step, optimizer)
        optimizer.zero_grad()
    for name, W in zip("02", expected, strict=True):
        assert torch.allclose(weights.layers[name].effective_weight(), W, atol=2e-5)
        assert (W - dense["02".index(name)]).norm() > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [3, 7, 9])  # in a cycle or the dense start, in the ramp, after it
@pytest.mark.parametrize("kind", ["own", "torch"])
def test_resuming_is_exact(recipe: Any, stop: int, kind: str) -> None:
    def build() -> tuple[LowRankWeights, torch.optim.Optimizer]:
        weights = recipe.apply(network(), steps=16, seed=3)
        parameters: Any = named(weights.model)
        if kind == "own":
            return weights, AdamW(parameters, moments="8bit")
        return weights, torch.optim.AdamW([parameter for _, parameter in parameters])

    whole, optimizer = build()
    train(whole, optimizer, 0, stop)
    saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, stop, 16)
    resumed, other = build()
    resumed.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    torch.manual_seed(99)
    train(resumed, other, stop, 16)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for (name, p), (_, q) in zip(whole.factors().items(), resumed.factors().items(), strict=True):
        assert p.requires_grad == q.requires_grad, name


def test_a_dense_start_is_dense_training() -> None:
    model = ReLoRA(rank=4, restart_every=6, full_rank_steps=5, rewarm=2).apply(network())
    optimizer = AdamW(named(model.model), weight_decay=0.01)
    twin = network()
    other = AdamW(twin, weight_decay=0.01)
    lines = train(model, optimizer, 0, 5)
    for step in range(5):
        x, y = batch(step)
        other.param_groups[0]["lr"] = 1e-2
        (twin(x) - y).square().mean().backward()
        other.step()
        other.zero_grad()
    W = model.layers["0"].weight
    assert torch.equal(W, twin[0].weight)
    assert lines == ["restart 1: factors in place of 2 weights, whose optimizer state is freed"]
    assert W not in optimizer.state and W.grad is None and not W.requires_grad
    frozen, lines = W.detach().clone(), train(model, optimizer, 5, 11)
    assert not torch.equal(W, frozen)  # merged into, after the sixth step of the cycle
    assert lines == ["restart 2: 2 layers merged, 89.7 % of the optimizer state pruned"]
    assert [round(model.rate(step, lambda step: 1.0), 2) for step in (4, 5, 6, 7, 10, 11)] == [1, 0, 0.5, 1, 1, 0]


def test_the_switch_forgets_the_gradients_of_what_is_frozen() -> None:
    """An optimizer that is given zeros in place of None would let the frozen weights decay."""
    weights = ReLoRA(rank=4, restart_every=6, full_rank_steps=1).apply(network())
    optimizer = AdamW(named(weights.model))
    weights.begin_step(0)
    x, y = batch(0)
    (weights.model(x) - y).square().mean().backward()
    optimizer.step()
    layers: Any = weights.layers.values()
    assert all(layer.weight.grad is not None for layer in layers)
    weights.end_step(0, optimizer)
    assert all(layer.weight.grad is None for layer in layers)


def test_a_dense_start_leaves_the_factors_out() -> None:
    layer, x = RestartedLinear(nn.Linear(12, 10), rank=3, scale=1.0), torch.randn(4, 12)
    nn.init.constant_(layer.lora_A, float("nan"))
    assert not layer(x).isfinite().any()
    layer.adapt_(False)
    assert layer(x).isfinite().all()


def test_lazy_adapters_come_in_the_last_steps() -> None:
    weights = ReLoRA(rank=4, lazy=0.1).apply(network(), steps=100)
    for step, adapts in ((0, False), (89, False), (90, True), (99, True)):
        weights.begin_step(step)
        assert all(p.requires_grad == adapts for p in weights.factors().values())
        assert all(layer.weight.requires_grad != adapts for layer in weights.layers.values())
    assert [step for step in range(99) if weights.when.due(step)] == [90]


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[5]])
def test_no_restart_follows_the_last_step(recipe: Any) -> None:
    """It would drop optimizer state, and with momentum a part of what the last stage has learnt, for nothing."""
    for steps in (12, None):
        weights = recipe.apply(network(), steps=steps)
        optimizer = AdamW(named(weights.model))
        lines = train(weights, optimizer, 0, 12)
        assert len(lines) == (1 if steps else 2)
        assert bool(weights.layers["0"].factors()["lora_B"].any()) == bool(steps)


@pytest.mark.parametrize("steps", [8, 41, 43, 99, 100])
def test_the_cycles_of_a_run_are_even(steps: int) -> None:
    when = ReLoRA().parts(steps)["when"]
    restarts = [done for done in range(1, steps) if when.due(done)]
    assert len(restarts) == 3 and 0.7 < (steps - restarts[-1]) / when.period <= 1


def test_the_rank_of_the_sum_grows() -> None:
    model = network()
    W = model[0].weight.detach().clone()
    weights = ReLoRA(rank=2, restart_every=5, rewarm=0).apply(model)
    train(weights, AdamW(named(model), weight_decay=0.0), 0, 14)
    change = weights.layers["0"].effective_weight() - W
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 6  # two restarts


def test_each_layer_and_each_cycle_has_factors_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    weights: Any = ReLoRA(rank=4, restart_every=5).apply(model)
    drawn = []
    for step in (4, 9):
        weights.restart(step)
        drawn += [float(layer.lora_A.detach().sum()) for layer in weights.layers.values()]
    assert len(set(drawn)) == 4


def test_the_first_factors() -> None:
    layer = RestartedLinear(nn.Linear(100, 64), rank=64, scale=1.0)
    layer.reset_(torch.Generator().manual_seed(0))
    A = layer.lora_A.detach() * 100**0.5
    assert not layer.lora_B.any() and A.abs().max() <= 1
    assert float(A.mean()) == pytest.approx(0, abs=0.02) and float(A.var()) == pytest.approx(1 / 3, abs=0.01)


def test_dropout_drops_inputs_of_the_factors_alone() -> None:
    layer = RestartedLinear(nn.Linear(12, 10), rank=3, scale=2.0, dropout=0.5)
    layer.reset_(torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 12)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    D = 2.0 * layer.lora_B[0].mT @ layer.lora_A[0]
    assert torch.allclose(found, nn.functional.linear(x, layer.weight, layer.bias) + dropped @ D.mT, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_is_unloaded_in_stages_is_rounded_stochastically_on_wish(momentum: float) -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
        recipe = PeriodicLoRA(rank=1, alpha=1.0, restart_every=5, momentum=momentum, rounding=rounding)  # type: ignore[arg-type]
        weights: Any = recipe.apply(model)
        layer = weights.layers["0"]
        layer.weight.fill_(1.0)
        layer.lora_A.data.fill_(1.0)
        layer.lora_B.data.fill_(2**-11 / (1 - momentum))  # a sixteenth of the gap above 1 is unloaded
        weights.restart(4)
        moved[rounding] = float(layer.weight.float().mean()) - 1
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(2**-11, rel=0.25)


def test_momentum_unloads_everything_in_the_end() -> None:
    """What is in W and what is to come of it is the sum of all s·BA, although M has only r terms."""
    mu, rank = 0.5, 3
    layer = PeriodicLinear(nn.Linear(12, 10, bias=False), rank=rank, scale=2.0, dropout=0.0, momentum=mu)
    W0, total = layer.weight.detach().clone(), torch.zeros(10, 12)
    M = torch.zeros(10, 12)
    for cycle in range(4):
        layer.reset_(torch.Generator().manual_seed(cycle))
        layer.lora_B.data.normal_()
        delta = 2.0 * layer.lora_B[0].mT @ layer.lora_A[0]
        total += delta
        before = layer.weight.detach().clone()
        M = mu * M + (1 - mu) * delta
        layer.merge_()
        if cycle == 0:  # of rank r: exactly the rule
            assert torch.allclose(layer.weight - before, M, atol=1e-5)
        held = layer.momentum_B.mT @ layer.momentum_A
        assert torch.allclose(layer.weight - W0 + mu / (1 - mu) * held, total, atol=1e-4)
    assert float(held.norm()) > 0


def test_planned_bytes_and_nothing_drawn_on_meta() -> None:
    for recipe in RECIPES:
        sizes = []
        for device in ("meta", "cpu"):
            with torch.device(device):
                model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 8))
            weights = recipe.apply(model, steps=16)
            weights.begin_step(0)
            tensors = [*model.parameters(), *model.buffers()]
            sizes.append((sum(t.nbytes for t in tensors), sum(p.nbytes for _, p in named(model))))
        assert sizes[0] == sizes[1]


def test_tied_weights_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head shares its weight.*embed_tokens"):
        ReLoRA(rank=2, restart_every=5).apply(model, target_modules="attention+logit")
    assert ReLoRA(rank=2, restart_every=5).apply(model).layers


def test_conv1d_dropout_bfloat16_and_export() -> None:
    from transformers.pytorch_utils import Conv1D

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(24, 12), nn.Tanh(), Conv1D(8, 24)).to(dtype)
        recipe = ReLoRA(rank=4, restart_every=3, rewarm=0, dropout=0.5, rounding="stochastic")
        weights = recipe.apply(model)
        losses: list[float] = []
        optimizer = AdamW(named(model))
        train(weights, optimizer, 0, 5)
        x = batch(0)[0].to(dtype)
        assert not torch.equal(model(x), model(x))
        model.eval()
        out = model(x)
        weights.merge()
        assert type(model[0]) is Conv1D and model[0].weight.dtype == dtype
        assert torch.allclose(model(x), out, atol=1e-5 if dtype == torch.float32 else 5e-2), losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"restart_every": 0}, "restart_every is 0"),
        ({"full_rank_steps": -1}, "full_rank_steps is -1"),
        ({"lazy": 1.0}, "lazy is 1.0"),
        ({"lazy": 0.1, "full_rank_steps": 5}, "give one of them"),
        ({"state": "all"}, "state='all'"),
        ({"prune": 0.0}, "share is 0.0"),
        ({"rewarm": -1}, "rewarm is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rounding": "up"}, "rounding='up'"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_recipe("relora", **settings)


def test_settings_of_a_run() -> None:
    with pytest.raises(ValueError, match="restart_every depends on the length of the run"):
        ReLoRA().apply(network())
    with pytest.raises(ValueError, match="rewarm is 8, a cycle has 8 steps"):
        ReLoRA(rank=4, restart_every=8, rewarm=8).apply(network())
    with pytest.raises(ValueError, match="full_rank_steps is 8, but the run has 8 steps"):
        ReLoRA(rank=4, full_rank_steps=8).apply(network(), steps=8)
    with pytest.raises(ValueError, match=r"momentum is 1\.0"):
        weight_recipe("periodic_lora", momentum=1.0)
    for momentum in (0.0, 0.5):
        layers: Any = PeriodicLoRA(rank=4, restart_every=8, dropout=0.3, momentum=momentum).apply(network()).layers
        assert [layer.dropout for layer in layers.values()] == [0.3, 0.3]
    parts = ReLoRA().parts(20_000)  # the paper's cycles
    assert (parts["when"].period, parts["rewarm"].steps) == (5000, 100)
    assert [ReLoRA(restart_every=period).parts()["rewarm"].steps for period in (400, 600, 12)] == [10, 12, 6]
    parts = ReLoRA(restart_every=9, state="random", prune=0.8, rounding="stochastic").parts()
    assert (parts["state"], parts["rounding"]) == (RandomPrune(0.8), "stochastic")


def trained(rank: int, world: int) -> dict[str, Any]:
    """Weights, factors and moments of one of the processes of DDP."""
    found: dict[str, Any] = {}
    for recipe in (ReLoRA(rank=4, restart_every=4, rewarm=1, state="random"), PeriodicLoRA(rank=4, restart_every=4)):
        weights = recipe.apply(network(), steps=10)
        model = DistributedDataParallel(weights.model)
        torch.manual_seed(rank)  # nothing may be drawn from here
        optimizer = AdamW(named(weights.model))
        for step in range(10):
            x, y = batch(2 * step + rank)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            weights.end_step(step, optimizer)
            optimizer.zero_grad()
        found |= {f"{recipe.name}.{name}": value for name, value in weights.model.state_dict().items()}
        for name, factor in weights.factors().items():
            found[f"{recipe.name}.{name}.exp_avg"] = optimizer.state[factor]["exp_avg"]
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        ReLoRA(restart_every=4, full_rank_steps=2).apply(network())
    return found


@pytest.mark.slow
def test_all_processes_hold_the_same(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, trained)
    assert len(first) == 20
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
