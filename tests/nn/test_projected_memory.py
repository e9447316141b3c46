"""What is held of gradients that are never formed, from forward to backward and from backward to step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subspan.nn import project_gradients
from subspan.optim import GaLore
from tests.nn.test_projected import Network, batch, build


def test_less_is_kept_for_backward() -> None:
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(512, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum().backward()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    before = kept(model)
    optimizer = GaLore(model, rank=4, update_proj_gap=100, stagger=False)
    project_gradients(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    assert before >= 3 * 512 * 64 * 4
    assert kept(model) < before / 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoded_basis_is_not_kept_for_backward(side: str) -> None:
    layer = nn.Linear(64, 64, bias=False)
    group = {"params": [("weight", layer.weight)], "rank": 4, "proj_type": side, "min_quantized": 1}
    optimizer = GaLore([group], basis_storage="int8")
    project_gradients(layer, optimizer)
    kept: list[tuple[torch.dtype, tuple[int, ...]]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda X: kept.append((X.dtype, tuple(X.shape))) or X, lambda X: X):
        layer(torch.randn(32, 64)).sum().backward()
    assert (torch.uint8, (64, 4)) in kept
    assert (torch.float32, (64, 4)) not in kept  # nor is the test matrix


def test_products_in_bfloat16_are_held_as_they_are_and_added_in_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 24, bias=False).bfloat16()
    optimizer = GaLore([{"params": [("weight", layer.weight)], "rank": 4}])
    project_gradients(layer, optimizer)
    slots, singles = layer.gradient_slots, []
    inputs = torch.randn(3, 8, 16).bfloat16()
    for x in inputs:
        layer(x).square().sum().backward()
        left = slots.take()
        assert left is not None
        assert left.projected.dtype == left.sketch.dtype == torch.bfloat16
        singles.append((left.projected.float(), left.sketch.float()))
    for x in inputs:
        layer(x).square().sum().backward()
    assert torch.equal(slots.R.value, singles[0][0] + singles[1][0] + singles[2][0])
    assert torch.equal(slots.Y.value, singles[0][1] + singles[1][1] + singles[2][1])
    optimizer.zero_grad()
    layer(inputs[0]).square().sum().backward()
    before = optimizer.clip_grad_norm_(1.0).value
    clipped = optimizer._folded["weight"]
    assert torch.equal(clipped.gradient(), singles[0][0] * torch.tensor(1.0 / (before + 1e-6)))
    assert optimizer.grad_norm().value == pytest.approx(1.0, rel=1e-4)
    layer(inputs[1]).square().sum().backward()
    optimizer._take_slots()
    assert (clipped.gradient() - singles[0][0] / before - singles[1][0]).abs().max() < 1e-4 * before
    optimizer.step()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_take_the_planned_bytes(dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    optimizer = build(model)
    x, y = (tensor.to(dtype) for tensor in batch(0))
    (model(x) - y).square().mean().backward()
    assert optimizer.gradient_bytes() == optimizer.planned_gradient_bytes()
    optimizer.zero_grad()
    assert optimizer.gradient_bytes() == 0
