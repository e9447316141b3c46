"""LoQT: its layer, its rounding and its steps, and what it has in common with projected gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from references.loqt import LoQTReference, normal_levels
from references.quantised import quantised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from nn.loqt_models import (
    FLOAT,
    KINDS,
    batch,
    built,
    every_kind,
    every_shape,
    generator,
    layer_of,
    train,
    trainable,
)
from subspan.linalg import random_stiefel
from subspan.nn.lowrank import LoQT, low_rank_layers, merge_layers
from subspan.nn.lowrank.loqt_layer import NF4
from subspan.optim import AdamW, GaLore
from subspan.optim.late import key_of

# The layer.


@every_shape
@every_kind
def test_gradients_are_those_of_the_effective_weight(shape: tuple[int, int], kind: str) -> None:
    layer, _ = layer_of(shape, **KINDS[kind], alpha=0.7)
    x = torch.randn(2, 5, shape[1], generator=generator(), requires_grad=True)
    dY = torch.randn(2, 5, shape[0], generator=generator(1))
    layer(x).backward(dY)
    got = (x.grad, layer.bias.grad, layer.factor.grad)
    W, b = layer.effective_weight().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    y = nn.functional.linear(x2 := x.detach().clone().requires_grad_(), W, b)
    y.backward(dY)
    assert torch.allclose(layer(x), y, atol=1e-5)
    G = W.grad.mT if layer.input_side else W.grad
    for one, other in zip(got, (x2.grad, b.grad, 0.7 * layer.P.mT @ G), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@every_shape
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_armed_backward_passes_leave_a_sketch_of_their_gradient(shape: tuple[int, int], svd: str) -> None:
    layer, _ = layer_of(shape, svd=svd)
    key = key_of(generator(7))
    layer.arm(key)
    x, dY = torch.randn(6, shape[1], generator=generator()), torch.randn(6, shape[0], generator=generator(1))
    for part, rows in zip(x.chunk(3), dY.chunk(3), strict=True):
        layer(part).backward(rows)
    left, right = (x, dY) if layer.input_side else (dY, x)
    G, Y = left.mT @ right, layer.take_sketch()
    if svd == "randomized":
        G = G @ layer._reader.draw(key, layer._held_basis(), G, G.shape[1])
    assert torch.allclose(Y, G, atol=1e-5)
    layer(x).backward(dY)
    assert not layer.take_sketch().any()  # only while it is armed


@every_kind
def test_nothing_of_the_size_of_the_weight_is_kept_between_passes(kind: str) -> None:
    layer, _ = layer_of((64, 48), **KINDS[kind])
    held = {tensor.data_ptr() for tensor in (*layer.buffers(), *layer.parameters())}
    large: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held and tensor.numel() >= 64 * 48 // 4:
            large.append(tensor)
        return tensor

    x = torch.randn(8, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert not large


def test_checkpointing_gives_the_same() -> None:
    layer, _ = layer_of()
    x = torch.randn(8, 16, generator=generator(), requires_grad=True)
    layer.arm(key_of(generator(3)))
    layer(x).square().sum().backward()
    one = (x.grad.clone(), layer.factor.grad.clone(), layer.take_sketch())
    x.grad = layer.factor.grad = None
    layer.arm(key_of(generator(3)))
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for a, b in zip(one, (x.grad, layer.factor.grad, layer.take_sketch()), strict=True):
        assert torch.equal(a, b)


# Merging and rounding.


@every_shape
@every_kind
def test_a_refresh_changes_the_function_by_the_error_of_rounding_alone(shape: tuple[int, int], kind: str) -> None:
    layer, _ = layer_of(shape, **KINDS[kind])
    before = layer.effective_weight()
    _, error = layer.refresh_(torch.randn(layer._sketch_shape, generator=generator(2)), generator(3))
    change = (layer.effective_weight() - before).norm() / before.norm()
    assert math.isclose(change, error, rel_tol=1e-3, abs_tol=1e-6)
    plain = (NF4.decode(NF4.encode(before), shape) - before).norm() / before.norm()
    assert change < (1e-6 if kind == "float" else 1.01 * plain)


@every_shape
def test_compensation_never_makes_the_error_larger(shape: tuple[int, int]) -> None:
    errors = []
    for count in (0, 1, 2, 5, 10):
        layer, W = layer_of(shape, compensation=count)
        errors.append(layer.hold_(W))
        assert bool(layer.factor.any()) == (count > 0)
        assert math.isclose((layer.effective_weight() - W).norm() / W.norm(), errors[-1], rel_tol=1e-4)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[1] < 0.95 * errors[0]


def test_a_bfloat16_weight_that_takes_up_small_steps_loses_none_in_the_subspace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, dtype=torch.bfloat16))
    LoQT(rank=4, alpha=1.0, **FLOAT).apply(model)
    layer: Any = model[0]
    with torch.no_grad():
        layer.factor.add_(1e-4 * torch.randn(4, 24, generator=generator()))
    before, P = layer.effective_weight(), layer.P
    layer.hold_(before)
    lost = [P.mT @ (W.float() - before).mT for W in (layer.effective_weight(), layer.weight)]
    assert lost[0].norm() < 0.02 * lost[1].norm()


@every_shape
@every_kind
def test_the_factor_has_a_gradient_after_wrapping_and_after_refreshes(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    LoQT(rank=4, **KINDS[kind]).apply(model)
    layer: Any = model[0]
    x = torch.randn(8, shape[1], generator=generator())
    for seed in range(3):
        layer.factor.grad = None
        layer(x).square().sum().backward()
        assert (layer.factor.grad.norm(dim=1) > 0).all()
        layer.refresh_(torch.randn(layer._sketch_shape, generator=generator(seed)), generator())


@pytest.mark.parametrize("kind", ["nf4", "float"])
def test_an_exported_layer_gives_the_same_outputs(kind: str) -> None:
    model, weights, optimizer = built(kind)
    train(model, weights, optimizer, range(8))
    x, _ = batch(99)
    expected = model(x)
    assert len(merge_layers(model)) == 4
    assert not list(low_rank_layers(model))
    assert [type(module) for module in (model.tall, model.conv1d)] == [nn.Linear, Conv1D]
    assert torch.allclose(model(x), expected, atol=1e-5)


# Steps.


@every_shape
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_it_follows_the_paper(shape: tuple[int, int], coded: bool, pieces: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    W = model[0].weight.detach().clone()
    weights = LoQT(rank=3, first_gap=7, svd="exact", **({} if coded else FLOAT)).apply(model)
    layer: Any = model[0]

    def quantise(X: Tensor) -> Tensor:
        return quantised(X.float(), normal_levels(), 64) if coded else X.float()

    start = random_stiefel(min(shape), 3, generator=weights.generator("0", -1))
    settings: dict[str, Any] = {"lr": 1e-2, "scale": 0.5, "compensation": 5, "refreshes": [1, 7, 15]}
    reference = LoQTReference(W, start, quantise=quantise, **settings)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    for step in range(20):
        assert torch.allclose(layer.effective_weight().double(), reference.weight(), atol=1e-5), step
        x = torch.randn(30, shape[1], generator=generator(step))
        y = torch.randn(30, shape[0], generator=generator(100 + step))
        reference.step(2 / y.numel() * (x.double() @ reference.weight().T - y).T @ x.double())
        weights.begin_step(step)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(part) - target).square().mean() / pieces).backward()
        optimizer.step()
        weights.end_step(step, optimizer)
        optimizer.zero_grad()
    if coded:
        assert reference.errors[0] > min(reference.errors) > 0


@every_shape
def test_with_a_whole_frozen_factor_it_is_galore_between_refreshes(shape: tuple[int, int]) -> None:
    """A factor that is trained at scale s moves W as a gradient that is projected and lifted at scale s."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(shape[1], shape[0]))
    other = copy.deepcopy(one)
    LoQT(rank=4, alpha=0.5, **FLOAT).apply(other)
    layer: Any = other[0]
    galore = GaLore(one, rank=4, scale=0.5, update_proj_gap=1000, svd="exact", stagger=False, lr=1e-2)
    adam = AdamW(trainable(other), lr=1e-2, eps=0.5e-8, weight_decay=0.0)  # its gradients are half as large
    start = layer.effective_weight()
    for step in range(20):
        x = torch.randn(30, shape[1], generator=generator(step))
        y = torch.randn(30, shape[0], generator=generator(100 + step))
        (one(x) - y).square().mean().backward()
        galore.step()
        if step == 0:
            layer._hold_basis(galore.state[one[0].weight]["basis"])
        (other(x) - y).square().mean().backward()
        adam.step()
        galore.zero_grad()
        adam.zero_grad()
    assert (one[0].weight - layer.effective_weight()).abs().max() < 1e-5
    assert (one[0].weight - start).abs().max() > 0.05


def test_what_is_held_and_in_which_dtype() -> None:
    """Of 64·128 numbers the codes, scales of 128 blocks, and with 8 bits for a scale that of these scales."""
    for double, nbytes in ((False, 4096 + 4 * 128), (True, 4096 + 128 + 4)):
        model = nn.Sequential(nn.Linear(64, 128))
        LoQT(rank=4, double_quantization=double).apply(model)
        assert sum(held.nbytes for name, held in model[0].named_buffers() if name.startswith("weight")) == nbytes
    half = nn.Sequential(nn.Linear(64, 128)).bfloat16()
    LoQT(rank=4, **FLOAT).apply(half)
    assert {held.dtype for held in half[0].buffers()} == {half[0].factor.dtype} == {torch.bfloat16}


def test_each_layer_and_each_refresh_has_a_sketch_of_its_own() -> None:
    _, weights, _ = built(first_gap=3)
    keys = []
    for step in (0, 2):
        weights.begin_step(step)
        keys += [int(layer._key) for layer in weights.layers.values()]
    assert len(set(keys)) == 8


def test_refreshes_come_after_the_first_step_and_at_growing_gaps() -> None:
    model, weights, optimizer = built(first_gap=3, growth=2.0)
    said = train(model, weights, optimizer, range(30))
    assert [step for step, _ in said] == [0, 2, 6, 11, 18, 29]  # gaps of 3 + 1, 3 + 2, 3 + 4, 3 + 8 behind the first
    assert said[0][1].startswith("refresh: 4 layers have a new subspace, weights rounded by at most")


@every_kind
def test_a_refresh_finds_the_leading_directions_of_the_gradient(kind: str) -> None:
    """Of a gradient of rank 4 all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    weights = LoQT(rank=4, **KINDS[kind]).apply(model)
    layer: Any = model[0]
    optimizer = AdamW(trainable(model), lr=0.0)
    weights.begin_step(0)
    x, dY = torch.randn(4, 32), torch.randn(4, 48)
    layer(x).backward(dY)
    optimizer.step()
    weights.end_step(0, optimizer)
    G = x.mT @ dY
    captured = torch.linalg.pinv(layer.P) @ G
    share = (layer.P @ captured).norm() / G.norm()
    assert share > (0.999 if kind in ("float", "float P") else 0.98)
    leading = torch.linalg.svd(G).U[:, 0]
    if kind == "exact":
        assert (layer.P.mT @ leading).abs()[0] > 0.95


@pytest.mark.parametrize("optimizer", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("moments", ["rotate", "reset", "keep"])
def test_the_moments_of_the_factor_at_a_refresh(optimizer: Any, moments: str) -> None:
    model, weights, adam = built("float", lambda named, lr: optimizer([p for _, p in named], lr=lr), moments=moments)
    train(model, weights, adam, range(4))
    layer = model.tall
    old_P, state = layer.P.clone(), adam.state[layer.factor]
    step = 4
    weights.begin_step(step)
    x, y = batch(step)
    (model(x) - y).square().mean().backward()
    adam.step()
    M, V = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    assert weights.end_step(step, adam)
    expected = {"rotate": layer.P.mT @ old_P @ M, "reset": torch.zeros_like(M), "keep": M}[moments]
    assert torch.allclose(state["exp_avg"], expected, atol=1e-7)
    assert torch.equal(state["exp_avg_sq"], torch.zeros_like(V) if moments == "reset" else V)
    assert int(state["step"]) == (0 if moments == "reset" else 5)
    assert not ((state["exp_avg_sq"] == 0) & (state["exp_avg"] != 0)).any()


def test_no_first_moment_is_turned_to_where_the_second_one_is_zero() -> None:
    """It would be divided by ε."""
    model, weights, adam = built("float")
    train(model, weights, adam, range(4))
    weights.begin_step(4)
    x, y = batch(4)
    (model(x) - y).square().mean().backward()
    adam.step()
    state = adam.state[model.tall.factor]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key][0] = 0.0
    assert weights.end_step(4, adam)
    assert not state["exp_avg"][0].any()
    assert state["exp_avg"][1:].all()


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_a_fresh_factor_does_not_move_by_old_momentum(moments: str) -> None:
    """Old moments that have nothing to do with the new subspace move nothing: a gradient of zero is no step then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    weights = LoQT(rank=4, first_gap=3, moments=moments, **FLOAT).apply(model)
    layer: Any = model[0]
    adam = AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    directions = torch.eye(16)
    for step, inputs in enumerate((directions[:4], directions[:4], directions[8:12])):
        weights.begin_step(step)
        (layer(inputs) * torch.randn(4, 24, generator=generator(step))).sum().backward()
        adam.step()
        adam.zero_grad()
        weights.end_step(step, adam)
    before = layer.effective_weight()
    layer.factor.grad = torch.zeros_like(layer.factor)
    adam.step()
    # What the third gradient left in the old subspace, which does not know its directions, is nothing but rounding.
    assert (layer.effective_weight() - before).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_step_without_a_finite_gradient_keeps_the_subspace(bad: float) -> None:
    model, weights, optimizer = built()
    train(model, weights, optimizer, range(4))
    before = {key: value.clone() for key, value in model.state_dict().items() if "tall" in key}
    weights.begin_step(4)
    x, y = batch(4)
    loss = (model(x) - y).square().mean()
    loss.backward(torch.tensor(bad))
    with pytest.warns(RuntimeWarning) if bad else torch.no_grad():
        optimizer.step() if bad else None
    said = weights.end_step(4, optimizer)
    assert "tall, wide, square, conv1d kept theirs" in said[-1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
