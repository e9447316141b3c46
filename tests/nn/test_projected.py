"""Gradients that are never formed: the same training as with folded ones, in less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from subspan.nn import ProjectedConv1D, ProjectedLinear, project_gradients
from subspan.optim import SGD, Fira, GaLore, GoLore, QGaLore, param_groups

GAP = 4
SHAPES = {"wide": (16, 24), "tall": (24, 16), "square": (16, 16)}
SIDES = ["std", "reverse_std", "left", "right"]
Run = Callable[..., Tensor]


class Network(nn.Module):
    """Layers of all shapes, one used twice, one with three-dimensional input, and Hugging Face's transposed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall, self.wide = nn.Linear(12, 24), nn.Linear(24, 16, bias=False)
        self.square, self.conv1d = nn.Linear(16, 16), Conv1D(20, 16)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor, run: Run = lambda f, x: f(x)) -> Tensor:
        x = run(lambda x: self.wide(torch.tanh(self.tall(x))), x)
        x = run(lambda x: self.square(torch.tanh(self.square(x))), x)
        return self.norm(self.conv1d(x))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 12, generator=generator), torch.randn(size, 3, 20, generator=generator)


def build(model: nn.Module, cls: Any = GaLore, *, projected: bool = True, **settings: Any) -> Any:
    groups = param_groups(model, rank=4, update_proj_gap=GAP, proj_type=settings.pop("proj_type", "std"))
    optimizer = cls(groups, lr=1e-2, weight_decay=0.1, **settings)
    if projected:
        assert len(project_gradients(model, optimizer)) == 4
    else:
        optimizer.fuse_into_backward()
    return optimizer


def train(
    model: nn.Module,
    optimizer: Any,
    steps: range = range(3 * GAP),
    pieces: int = 1,
    run: Run = lambda f, x: f(x),
    clip: float | None = None,
) -> None:
    for step in steps:
        x, y = batch(step)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(part, run) - target).square().mean() / pieces).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_slots_hold_the_projection_and_the_sketch_of_the_gradient(
    shape: tuple[int, int], kind: str, proj_type: str
) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(*shape) if kind == "linear" else Conv1D(shape[1], shape[0])
    plain = copy.deepcopy(layer)
    optimizer = GaLore([{"params": [("weight", layer.weight)], "rank": 4, "proj_type": proj_type}], stagger=False)
    assert project_gradients(layer, optimizer) == ["weight"]
    x = torch.randn(5, 3, shape[0], requires_grad=True)
    z = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    plain(z).square().sum().backward()
    assert layer.weight.grad is None
    assert (x.grad - z.grad).abs().max() < 1e-5
    assert (layer.bias.grad - plain.bias.grad).abs().max() < 1e-4
    slots = layer.gradient_slots
    G = plain.weight.grad.mT if slots.right else plain.weight.grad
    Q, Omega = slots.basis, slots.test_matrix
    assert slots.test_matrix is not Omega  # drawn, not held
    assert torch.equal(slots.test_matrix, Omega)
    assert (slots.R.value - Q.mT @ G).abs().max() < 1e-4
    assert (slots.Y.value - G @ Omega).abs().max() < 1e-4
    optimizer.step()
    assert slots.test_matrix is None
    layer(x).square().sum().backward()
    assert slots.Y.value is None


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (GaLore, {}),
        (GaLore, {"stagger": False}),
        (GoLore, {"golore_after": 6}),
        (GaLore, {"basis_storage": "int8", "min_quantized": 1}),
        (GaLore, {"warm_start": 0.75, "refresh": "late"}),
        (QGaLore, {"min_quantized": 1, "queue_size": 1, "cos_threshold": 0.0}),
    ],
    ids=str,
)
def test_training_equals_that_with_folded_gradients(cls: Any, settings: dict[str, Any], proj_type: str) -> None:
    one, other = Network(), Network()
    ours = build(one, cls, proj_type=proj_type, **settings)
    folded = build(other, cls, proj_type=proj_type, projected=False, **settings)
    train(one, ours)
    train(other, folded)
    assert difference(one, other) < 1e-4
    assert difference(one, Network()) > 1e-2
    assert ours.planned_state_bytes() == folded.planned_state_bytes() == ours.state_bytes()


def test_parameters_names_and_outputs_stay() -> None:
    model, plain = Network(), Network()
    optimizer = build(model)
    assert optimizer.projected_parameters().keys() < dict(model.named_parameters()).keys()
    assert isinstance(model.tall, ProjectedLinear)
    assert isinstance(model.conv1d, ProjectedConv1D)
    assert model.state_dict().keys() == plain.state_dict().keys()
    x, _ = batch(0)
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_micro_batches_equal_one_batch() -> None:
    one, other = Network(), Network()
    train(one, build(one), pieces=4)
    train(other, build(other))
    assert difference(one, other) < 2e-4


def test_activation_checkpointing_changes_no_number() -> None:
    one, other = Network(), Network()
    train(one, build(one))
    train(other, build(other), run=lambda f, x: checkpoint(f, x, use_reentrant=False))
    assert difference(one, other) == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"basis_storage": "int4", "min_quantized": 1, "warm_start": 0.5, "refresh": "late", "moments": "8bit"}],
    ids=str,
)
def test_compiled_layers_train_alike(settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    ours, eager = build(one, stagger=False, **settings), build(other, stagger=False, **settings)
    train(torch.compile(one, backend="aot_eager"), ours)
    train(other, eager)
    assert difference(one, other) < 1e-5


def test_autocast() -> None:
    one, other = Network(), Network()
    ours, folded = build(one), build(other, projected=False)
    with torch.autocast("cpu", torch.bfloat16):
        train(one, ours, range(1))
        train(other, folded, range(1))
    # Only rounding to bfloat16 tells them apart: Adam's first step has the size of lr whatever the gradient.
    assert difference(one, Network()) > 1e-3
    R, S = (o.state[m.tall.weight]["exp_avg"] for o, m in ((ours, one), (folded, other)))
    assert (R - S).norm() < 0.02 * S.norm()


def test_a_gradient_that_arrives_in_another_way_is_folded_too() -> None:
    """A weight that is used outside of its layer: the sum of both parts is projected."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight)

    one, other = Twice(), Twice()
    ours, folded = (GaLore(model, rank=4, lr=1e-2, update_proj_gap=GAP) for model in (one, other))
    project_gradients(one, ours)
    folded.fuse_into_backward()
    for step in range(2 * GAP):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((one, ours), (other, folded)):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    assert difference(one, other) < 1e-4


@pytest.mark.parametrize("inner", [SGD(), None], ids=["sgd", "adam"])
def test_a_lora_layer_with_a_frozen_factor_is_a_projected_gradient(inner: Any) -> None:
    """W₀ + A·Qᵀ with A trained from zero moves as W does with its gradient projected to Q: the same trajectory."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 24, bias=False)
    start = layer.weight.detach().clone()
    groups = [{"params": [("weight", layer.weight)], "rank": 4}]
    optimizer = GoLore(groups, lr=1e-2, scale=1.0, inner=inner, stagger=False)
    project_gradients(layer, optimizer)
    Q = layer.gradient_slots.basis.clone()
    A = nn.Parameter(torch.zeros(24, 4))
    peer: Any = torch.optim.SGD([A], lr=1e-2) if inner else torch.optim.Adam([A], lr=1e-2)
    for step in range(20):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        target = torch.sin(x @ torch.ones(16, 24))
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        (nn.functional.linear(x, start + A @ Q.mT) - target).square().mean().backward()
        peer.step()
        peer.zero_grad()
        assert (layer.weight - start - A @ Q.mT).abs().max() < 1e-5, step
    assert A.abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings", [{}, {"basis_storage": "int4", "min_quantized": 1}, {"warm_start": 0.5, "refresh": "late"}], ids=str
)
@pytest.mark.parametrize("stop", [1, GAP, 7])
def test_resume_is_bit_exact(stop: int, settings: dict[str, Any]) -> None:
    model = Network()
    optimizer = build(model, **settings)
    train(model, optimizer, range(stop))
    other = Network()
    other.load_state_dict(model.state_dict())
    continued = build(other, **settings)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(stop, 3 * GAP))
    train(other, continued, range(stop, 3 * GAP))
    assert difference(model, other) == 0


def test_a_state_from_before_the_first_step_is_armed_again() -> None:
    one, other = Network(), Network()
    ours, reference = build(one), build(other)
    ours.load_state_dict(ours.state_dict())  # as accelerate's prepare() does
    train(one, ours)
    train(other, reference)
    assert difference(one, other) == 0


def test_clipping_uses_the_norm_of_the_projections() -> None:
    model = Network()
    optimizer = build(model)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    norm = optimizer.grad_norm()
    assert not norm.exact
    assert optimizer.clip_grad_norm_(norm.value / 3).value == pytest.approx(norm.value)
    assert optimizer.grad_norm().value == pytest.approx(norm.value / 3, rel=1e-4)


def test_a_nan_skips_its_layer() -> None:
    model = Network()
    optimizer = build(model)
    train(model, optimizer, range(2))
    before = model.tall.weight.detach().clone()
    x, y = batch(2)
    x[0, 0, 0] = float("nan")
    torch.nan_to_num(model(x) - y).square().mean().backward()
    with pytest.warns(RuntimeWarning, match=r"tall\.weight"):
        optimizer.step()
    assert torch.equal(model.tall.weight, before)
    assert optimizer.skipped_steps >= 1


def test_methods_that_need_the_gradient_are_refused() -> None:
    model = Network()
    with pytest.raises(ValueError, match="fira needs the gradients themselves"):
        project_gradients(model, Fira(model, rank=4))
    assert type(model.tall) is nn.Linear


def test_a_model_without_such_layers_is_refused() -> None:
    other = Network()
    optimizer = GaLore(Network(), rank=4)
    embedding = nn.Embedding(8, 8)
    with pytest.raises(ValueError, match=r"Embedding has no nn\.Linear or Conv1D"):
        project_gradients(embedding, optimizer)
    full = GaLore(other, rank=99)
    with pytest.raises(ValueError, match="projects below full rank"):
        project_gradients(other, full)


def test_the_model_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="the optimizer holds another parameter of this name"):
        project_gradients(Network(), GaLore(Network(), rank=4))


def test_a_layer_whose_optimizer_is_gone_is_an_ordinary_one() -> None:
    model = Network()
    build(model)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    assert model.tall.weight.grad is not None
    model.zero_grad()
    train(model, build(model), range(2))  # and can be given to another one
    assert difference(model, Network()) > 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_an_ordinary_model(copied: Callable[[nn.Module], Any]) -> None:
    model = Network()
    optimizer = build(model)
    train(model, optimizer, range(2))
    other = copied(model)
    assert difference(model, other) == 0
    x, y = batch(0)
    (other(x) - y).square().mean().backward()
    assert other.tall.weight.grad is not None
    assert optimizer.grad_norm().value == 0


def test_a_frozen_layer_stays() -> None:
    model = Network()
    optimizer = build(model)
    train(model, optimizer, range(2))
    model.square.weight.requires_grad_(False)
    before = model.square.weight.detach().clone()
    train(model, optimizer, range(2, 5))
    assert torch.equal(model.square.weight, before)


def test_a_second_derivative_is_refused() -> None:
    model = Network()
    optimizer = build(model)
    x, _ = batch(0)
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    assert optimizer.folds


def test_a_layer_with_a_forward_of_its_own_is_folded() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Own(16, 16))
    optimizer = GaLore(model, rank=4)
    assert project_gradients(model, optimizer) == ["0.weight"]
    model(torch.randn(4, 16)).sum().backward()
    assert model[1].weight.grad is None
    assert set(optimizer._folded) == {"1.weight"}
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("projected", [True, False])
def test_training_on_a_device_follows_that_on_the_cpu(projected: bool) -> None:
    one, other = Network(), Network().cuda()
    train(one, build(one, projected=projected))
    ours = build(other, projected=projected)
    for step in range(3 * GAP):
        x, y = (tensor.cuda() for tensor in batch(step))
        (other(x) - y).square().mean().backward()
        ours.step()
        ours.zero_grad()
    assert difference(one, other.cpu()) < 1e-3
