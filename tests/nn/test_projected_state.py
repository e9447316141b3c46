"""What slots hold of an optimizer's state, and what of it follows: settings, refreshes, loading, and the end."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspan.nn import project_gradients
from subspan.optim import GaLore, QGaLore
from tests.nn.test_projected import GAP, Network, batch, build, difference, train


def layer_of(rank: int = 4, **settings: Any) -> tuple[Any, GaLore]:
    torch.manual_seed(0)
    layer = nn.Linear(16, 24, bias=False)
    optimizer = GaLore([{"params": [("weight", layer.weight)], "rank": rank}], stagger=False, **settings)
    project_gradients(layer, optimizer)
    return layer, optimizer


class Twice(nn.Module):
    """A weight that is used in its layer and outside of it, where its gradient is folded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_warm_start_of_a_checkpoint_reaches_the_slots(share: float) -> None:
    def continued(own: float) -> nn.Module:
        other = Network()
        other.load_state_dict(model.state_dict())
        taken = build(other, warm_start=own, refresh="late")
        taken.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, taken, range(5, 3 * GAP))
        return other

    model = Network()
    optimizer = build(model, warm_start=0.75, refresh="late")
    train(model, optimizer, range(5))
    assert difference(continued(0.75), continued(share)) == 0


@pytest.mark.parametrize(("changed_at", "used"), [(2, 0.25), (3, 0.75)])
def test_a_changed_warm_start_is_the_same_one_in_the_layer_and_outside(changed_at: int, used: float) -> None:
    """It serves from the next step on. Two test matrices in one sketch would give neither basis."""
    bases = []
    for project in (True, False):
        model = Twice()
        optimizer = GaLore(model, rank=4, refresh="late", update_proj_gap=3, stagger=False, warm_start=0.75)
        if project:
            project_gradients(model, optimizer)
        for step in range(4):
            if step == changed_at:
                optimizer.param_groups[0]["warm_start"] = 0.25 if project else used
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            (model(x) - 1).square().mean().backward()
            if project and step == 3:
                assert model.layer.gradient_slots.key is not None
                assert model.layer.gradient_slots.reader.warm.share == used
            optimizer.step()
            optimizer.zero_grad()
        bases.append(optimizer.state[model.layer.weight]["basis"])
    assert (bases[0] - bases[1]).abs().max() < 1e-4


def test_a_sketch_that_overflows_leaves_its_refresh_due() -> None:
    """In float16 GΩ leaves the range where QᵀG does not."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 64, bias=False).half()
    optimizer = GaLore([{"params": [("weight", layer.weight)], "rank": 4}])
    project_gradients(layer, optimizer)
    x = torch.full((4, 1024), 100.0).half() * torch.randn(1024).sign().half()
    row = torch.zeros(4, 64).half()
    row[:, 3] = 30.0
    layer(x).mul(row).sum().backward()
    slots, state = layer.gradient_slots, optimizer.state[layer.weight]
    assert slots.R.value.isfinite().all()
    assert not slots.Y.value.isfinite().all()
    before = state["basis"].clone()
    with pytest.warns(RuntimeWarning, match="weight: the sketch for a new subspace overflows"):
        optimizer.step()
    assert torch.equal(state["basis"], before)
    assert (int(state["step"]), int(state["refreshes"]), optimizer.skipped_steps) == (1, 0, 0)
    layer(x).mul(row / 1000).sum().backward()
    optimizer.step()
    assert int(state["refreshes"]) == 1
    assert state["basis"].isfinite().all()
    assert not torch.equal(state["basis"], before)


def test_a_gradient_of_zero_leaves_the_refresh_due() -> None:
    """As where clipping multiplies all by zero, since one gradient is infinite."""
    layer, optimizer = layer_of()
    x = torch.randn(8, 16)
    layer(x).square().sum().backward()
    before = optimizer.state[layer.weight]["basis"].clone()
    optimizer.clip_grad_norm_(0.0)
    optimizer.step()
    assert torch.equal(optimizer.state[layer.weight]["basis"], before)
    assert layer.gradient_slots.key is not None


def test_loading_forgets_what_was_folded_with_the_old_bases() -> None:
    model = Network()
    optimizer = build(model)
    start = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2))
    x, y = batch(2)
    for take in (lambda: None, optimizer.grad_norm):  # in slots, and taken from them
        (model(x) - y).square().mean().backward()
        take()
        assert optimizer.folded_tensors()
        optimizer.load_state_dict(start)
        assert not optimizer.folded_tensors()
        before = model.tall.weight.detach().clone()
        optimizer.step()
        assert torch.equal(model.tall.weight, before)


def test_projecting_again_changes_nothing() -> None:
    one, other = Network(), Network()
    ours, reference = build(one), build(other)
    for step in range(GAP):
        x, y = batch(step)
        loss = (one(x) - y).square().mean()
        assert len(project_gradients(one, ours)) == 4
        loss.backward()
        assert len(project_gradients(one, ours)) == 4
        ours.step()
        ours.zero_grad()
    train(other, reference, range(GAP))
    assert difference(one, other) == 0


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_an_old_basis_is_not_kept_through_a_step(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    optimizer = GaLore(layers, rank=8, basis_storage=storage, min_quantized=1, stagger=False, moments="8bit")
    project_gradients(layers, optimizer)
    layers(torch.randn(8, 64)).sum().backward()
    held: list[list[Tensor]] = []
    arm = optimizer._arm_slots
    monkeypatch.setattr(
        optimizer,
        "_arm_slots",
        lambda names: held.append([part for layer in layers for part in layer.gradient_slots.held]) or arm(names),
    )
    optimizer.step()
    current = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    assert len(held[0]) >= 3
    assert all(id(tensor) in current for tensor in held[0])


def test_slots_let_go_of_all_when_their_optimizer_is_gone() -> None:
    layer, optimizer = layer_of()
    layer(torch.randn(8, 16)).sum().backward()
    slots = layer.gradient_slots
    gone = [weakref.ref(tensor) for tensor in (*slots.held, slots.R.value, slots.Y.value)]
    del optimizer
    gc.collect()
    assert not slots.active
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_that_follow_clipping_give_the_basis_of_the_whole(dtype: torch.dtype) -> None:
    bases = []
    for project in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(16, 24, bias=False).to(dtype)
        optimizer = GaLore([{"params": [("weight", layer.weight)], "rank": 4}], refresh="late", stagger=False)
        if project:
            project_gradients(layer, optimizer)
        x = torch.randn(2, 32, 16).to(dtype)
        layer(100 * x[0]).square().sum().backward()
        if project:
            layer_norm = optimizer.grad_norm().value
            optimizer.clip_grad_norm_(layer_norm / 1e5)
        else:
            layer.weight.grad.mul_(1e-5)
        layer(x[1]).square().sum().backward()
        optimizer.step()
        bases.append(optimizer.state[layer.weight]["basis"])
    assert (bases[0].mT @ bases[1]).square().sum() > 4 * (0.9999 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("late", ["late", "fused", "projected"])
def test_the_official_periods_of_q_galore_are_not_for_late_refreshes(late: str) -> None:
    model = Network()
    with pytest.raises(ValueError, match="official_code=True compares first directions"):
        optimizer = QGaLore(model, rank=4, official_code=True, refresh="late" if late == "late" else "now")
        if late == "fused":
            optimizer.fuse_into_backward()
        project_gradients(model, optimizer)
    assert type(model.tall) is nn.Linear


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("converted", [False, True])
def test_gradients_in_bfloat16_take_the_planned_bytes(pieces: int, converted: bool) -> None:
    """Slots keep the dtype that the weights had when they were made."""
    model = Network()
    if not converted:
        model = model.to(torch.bfloat16)
    optimizer = build(model)
    model = model.to(torch.bfloat16)
    x, y = (tensor.to(torch.bfloat16) for tensor in batch(0))
    for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (model(part) - target).square().mean().backward()
    assert optimizer.gradient_bytes() == optimizer.planned_gradient_bytes(pieces)
