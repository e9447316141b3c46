"""LoQT in a run: resumed, planned, simulated, in half precision, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from nn.loqt_models import (
    KINDS,
    Network,
    batch,
    built,
    every_kind,
    train,
    trainable,
)
from subspan.memory import plan
from subspan.memory.simulate import simulated
from subspan.nn.lowrank import LoQT, low_rank_layers, weight_recipe
from subspan.optim import AdamW


@pytest.mark.parametrize(
    ("kind", "cut", "settings"), [("nf4", 3, {}), ("nf4", 5, {}), ("float", 8, {}), ("double", 5, {"moments": "reset"})]
)
def test_a_run_that_is_resumed_in_a_cycle_continues_bit_by_bit(kind: str, cut: int, settings: Any) -> None:
    def begin() -> tuple[Network, Any, Any]:
        return built(kind, lambda named, lr: AdamW(named, lr=lr, moments="8bit", min_quantized=1), **settings)

    whole = begin()
    train(*whole, range(13), pieces=2)
    first = begin()
    train(*first, range(cut), pieces=2)
    file = io.BytesIO()
    torch.save({"model": first[0].state_dict(), "optimizer": first[2].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = begin()
    second[0].load_state_dict(saved["model"])
    second[2].load_state_dict(saved["optimizer"])
    train(*second, range(cut, 13), pieces=2)
    for (name, one), other in zip(whole[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_no_refresh_follows_the_last_step() -> None:
    """It would round the weights once more, and nothing would learn to make up for it."""
    model = Network()
    weights = LoQT(rank=4, first_gap=5).apply(model, steps=11)  # gaps end after 5 and 11 steps
    said = train(model, weights, AdamW(trainable(model), lr=1e-2), range(11))
    assert [step for step, _ in said] == [0, 4]


def test_a_sketch_is_left_in_the_steps_that_end_with_a_refresh_alone() -> None:
    """A run that is continued begins step 0 before it knows where it is."""
    model, weights, _ = built()
    for step, due in ((0, True), (3, False), (4, True), (7, False)):
        weights.begin_step(step)
        model(batch(step)[0]).sum().backward()
        assert (model.tall._sum.value is not None) == due, step


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_bytes_are_allocated_bytes(kind: str, dtype: torch.dtype) -> None:
    recipe = LoQT(rank=8, **KINDS[kind])
    with torch.device("meta"):
        planned = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 128)).to(dtype)
    recipe.apply(planned)
    assert all(tensor.is_meta for tensor in (*planned.parameters(), *planned.buffers()))
    real = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 128)).to(dtype)
    recipe.apply(real)
    allocated = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    for model in (planned, real):
        assert plan(model, AdamW(trainable(model))).weights == allocated
    if kind == "nf4" and dtype == torch.float32:
        codes, factors, bases = (96 + 128) * 64 * 4.5 / 8, 4 * 8 * (96 + 128), 64 * 8 * 4.5 / 8
        assert allocated == codes + factors + 2 * bases + 4 * (64 + 128)


def test_a_step_and_a_refresh_without_numbers() -> None:
    with simulated():
        model, weights, optimizer = built("nf4")
        weights.begin_step(0)
        model(torch.randn(8, 3, 12)).square().mean().backward()
        optimizer.step()
        assert weights.end_step(0, optimizer)


@pytest.mark.parametrize("kind", ["nf4", "float"])
def test_autocast_and_bfloat16_models_train(kind: str) -> None:
    exact = built(kind)
    train(*exact, range(7))
    cast = built(kind)
    with torch.autocast("cpu", torch.bfloat16):
        train(*cast, range(7))
    half = Network().bfloat16()
    weights = LoQT(rank=4, first_gap=5, **KINDS[kind]).apply(half)
    assert half.tall.factor.dtype == torch.bfloat16
    optimizer = AdamW(trainable(half), lr=1e-2)
    for step in range(7):
        weights.begin_step(step)
        x, y = (tensor.bfloat16() for tensor in batch(step))
        (half(x) - y).square().mean().backward()
        optimizer.step()
        weights.end_step(step, optimizer)
        optimizer.zero_grad()
    x, y = batch(99)
    losses = [
        (exact[0](x) - y).square().mean(),
        (cast[0](x) - y).square().mean(),
        (half(x.bfloat16()) - y).square().mean(),
    ]
    assert all(abs(loss - losses[0]) < 0.05 * losses[0] for loss in losses), losses


def test_a_copy_trains_by_itself() -> None:
    model, weights, optimizer = built()
    train(model, weights, optimizer, range(3))
    copied = copy.deepcopy(model)
    before = {key: value.clone() for key, value in copied.state_dict().items()}
    train(model, weights, optimizer, range(3, 6))
    assert all(torch.equal(value, copied.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"alpha is 0\.0; it must be greater than 0"),
        ({"first_gap": 0}, "first_gap is 0; it must be at least 1"),
        ({"growth": 0.5}, r"growth is 0\.5; it must be at least 1"),
        ({"compensation": -1}, "compensation is -1; it must be at least 0"),
        ({"weight_bits": 8}, "weight_bits is 8; choose 4 or None"),
        ({"svd": "full"}, "svd is 'full'; choose 'randomized' or 'exact'"),
        ({"moments": "drop"}, "moments is 'drop'; choose 'rotate' or 'reset' or 'keep'"),
        ({"double_quantization": True, "weight_bits": None}, "needs weights that are quantised"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_recipe("loqt", **settings)


@every_kind
def test_what_is_frozen_is_no_parameter(kind: str) -> None:
    """So an optimizer that is given the parameters of the model cannot train it."""
    model, _, _ = built(kind)
    names = {name for name, _ in model.named_parameters() if name.startswith(("tall.", "wide."))}
    assert names == {"tall.bias", "tall.lora_B", "wide.lora_A"}
    buffers = {name.partition(".")[2] for name, _ in model.named_buffers()}
    assert ("weight" in buffers) == (kind == "float")


def test_models_that_do_not_fit_stay_as_they_are() -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"rank is 13, but tall is a matrix \(24, 12\); lower the rank, or exclude it"):
        LoQT(rank=13).apply(model)
    model.head = nn.Linear(12, 24)
    model.head.weight = model.tall.weight
    with pytest.raises(ValueError, match=r"tall shares its weight with head\.weight"):
        LoQT(rank=4).apply(model)
    assert not list(low_rank_layers(model))


def test_optimizers_that_cannot_be_transformed_are_refused() -> None:
    model, weights, _ = built()
    weights.begin_step(0)
    model(batch(0)[0]).sum().backward()
    with pytest.raises(ValueError, match=r"tall\.lora_B is trained, but it is not in the optimizer"):
        weights.end_step(0, AdamW(list(model.norm.parameters())))
    model, weights, sgd = built(optimizer=lambda named, lr: torch.optim.SGD([p for _, p in named], lr=lr, momentum=0.9))
    weights.begin_step(0)
    model(batch(0)[0]).sum().backward()
    sgd.step()
    with pytest.raises(ValueError, match="consists of momentum_buffer; use AdamW"):
        weights.end_step(0, sgd)
