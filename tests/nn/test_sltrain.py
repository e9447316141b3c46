"""Layers of a product and a sparse matrix against dense autograd, and what they hold while they work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from references.sltrain import SLTrainReference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import subspan.optim.tiling as tiling
from subspan.memory import MemoryTrace
from subspan.nn.lowrank import SLTrain, SLTrainLinear, merge_layers, weight_recipe
from subspan.optim import AdamW
from tests.nn.lowrank_cases import (
    SHAPES,
    gradients_flow,
    linear,
    network,
    output_and_gradients,
    resumes,
    traced,
    train,
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(kind: str = "Linear", shape: str = "wide", *, bias: bool = True, **settings: Any) -> SLTrainLinear:
    layer = SLTrainLinear(linear(kind, *SHAPES[shape], bias=bias, **settings), rank=4, scale=0.5, delta=0.1)
    layer.reset_(seeded())
    layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=seeded()).to(layer.lora_B.dtype)
    return layer


class Dense(nn.Module):
    """The same layer by autograd through a whole matrix; parameters in the same order."""

    def __init__(self, layer: SLTrainLinear) -> None:
        super().__init__()
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.lora_A, self.lora_B, self.values = (
            nn.Parameter(factor.detach().clone()) for factor in layer.factors().values()
        )
        self.indices, self.scale = layer.indices.long(), layer.scale

    def forward(self, x: Tensor) -> Tensor:
        W = self.scale * self.lora_B @ self.lora_A
        W = W.flatten().index_put((self.indices,), self.values, accumulate=True).view(W.shape)
        return nn.functional.linear(x, W, self.bias)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(tiling, "_CPU_TILE", 120)  # three to five rows, and a remainder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ["torch", "subspan"])
def test_follows_the_reference(shape: str, optimizer: str) -> None:
    model = nn.Sequential(linear("Linear", *SHAPES[shape], bias=False))
    weights = SLTrain(rank=8, alpha=4.0, delta=0.1).apply(model)
    layer: Any = model[0]
    S = layer.effective_weight()  # B is 0
    assert torch.count_nonzero(S) == len(layer.values) == int(0.1 * S.numel())
    reference = SLTrainReference(layer.lora_B.detach(), layer.lora_A.detach(), S, alpha=4.0, lr=1e-2)
    kind = torch.optim.AdamW if optimizer == "torch" else AdamW
    stepper = kind(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    target = torch.randn(S.shape, generator=seeded(3), dtype=torch.float64)
    expected = S
    for step in range(12):
        x = torch.randn(64, S.shape[1], generator=seeded(step), dtype=torch.float64)
        G = (expected - target) @ x.T @ x / 64
        (model(x) - x @ target.T).square().sum().div(2 * 64).backward()
        weights.before_step(step)
        stepper.step()
        weights.end_step(step, stepper)
        stepper.zero_grad()
        expected = reference.step(G)
        assert torch.allclose(layer.effective_weight(), expected, atol=1e-9), step
    assert torch.linalg.matrix_rank(expected - reference.S) == 8


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 30])  # fewer, and more, than out·in/(out + in)
def test_gradients_are_those_of_the_whole_matrix(shape: str, bias: bool, tokens: int) -> None:
    layer = sparse(shape=shape, bias=bias)
    x = torch.randn(tokens, 3, layer.in_features, dtype=torch.float64)
    dY = torch.randn(tokens, 3, layer.out_features, dtype=torch.float64)
    for mine, theirs in zip(output_and_gradients(layer, x, dY), output_and_gradients(Dense(layer), x, dY), strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.usefixtures("tiles")
def test_inputs_of_all_kinds() -> None:
    layer = sparse("Conv1D")
    dense = Dense(layer)
    x = torch.randn(layer.in_features, 6, dtype=torch.float64).T  # its columns are contiguous
    dY = torch.randn(layer.out_features, 6, dtype=torch.float64).T
    expected = output_and_gradients(dense, x, dY)
    for mine, theirs in zip(output_and_gradients(layer, x, dY), expected, strict=True):
        assert torch.allclose(mine, theirs)
    frozen = torch.autograd.grad(layer(x), list(layer.parameters()), dY)  # the input asks for no gradient
    for mine, theirs in zip(frozen, expected[2:], strict=True):
        assert torch.allclose(mine, theirs)
    x = x.detach().requires_grad_()
    again = checkpoint(layer, x, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(again, [x, *layer.parameters()], dY), expected[1:], strict=True):
        assert torch.allclose(mine, theirs)
    exported = layer.dense()
    assert type(exported) is layer.dense_class
    assert torch.allclose(exported(x), expected[0])
    layer.values.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.values.grad is None
    assert layer.lora_A.grad is not None


@pytest.mark.usefixtures("tiles")
def test_half_precision() -> None:
    layer = sparse(dtype=torch.float32)
    x, dY = torch.randn(64, layer.in_features), torch.randn(64, layer.out_features)
    expected = output_and_gradients(layer, x, dY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, list(layer.parameters()), dY.bfloat16())
    assert {gradient.dtype for gradient in found} == {torch.float32}
    half = copy.deepcopy(layer).bfloat16()
    halves = output_and_gradients(half, x.bfloat16(), dY.bfloat16())
    assert {tensor.dtype for tensor in halves} == {torch.bfloat16}
    assert half.indices.dtype == torch.int32
    for mine, theirs in [*zip(found, expected[2:], strict=True), *zip(halves, expected, strict=True)]:
        assert (mine.float() - theirs).norm() < 0.02 * theirs.norm()
    assert half.effective_weight().dtype == torch.float32
    assert half.dense().weight.dtype == torch.bfloat16


def test_tiles_of_bfloat16_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_CPU_TILE", 8)  # 512 tiles of one row
    layer = SLTrainLinear(nn.Linear(8, 512, bias=False).bfloat16(), rank=2, scale=1.0, delta=0.1)
    nn.init.ones_(layer.lora_B)
    layer(torch.ones(64, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.lora_A.grad is not None and (layer.lora_A.grad == 512 * 64).all()


def test_places_are_uniformly_random() -> None:
    layer = SLTrainLinear(nn.Linear(4, 5), rank=1, scale=1.0, delta=0.35)
    counts = torch.zeros(20)
    for seed in range(2000):
        layer.reset_(seeded(seed))
        places = layer.indices
        assert len(places) == 7
        assert (places[1:] > places[:-1]).all()
        counts[places.long()] += 1
    # 700 ± 21 each
    assert (counts - 700).abs().max() < 4 * 21
    assert int(counts.sum()) == 14_000
    full = SLTrainLinear(nn.Linear(40, 50), rank=1, scale=1.0, delta=0.999)
    full.reset_(seeded())
    assert len(full.indices.unique()) == 1998


def test_the_start() -> None:
    model = network()
    weights = SLTrain(rank=4).apply(model, seed=3)
    layer: Any = model[0]
    assert layer.scale == 8.0
    assert not layer.lora_B.any()
    for drawn in (layer.lora_A, layer.values):
        assert 0.9 < drawn.abs().max() * 32**0.5 <= 1
        assert abs(drawn.mean()) < 0.05
    assert layer.indices.dtype == torch.int32
    assert gradients_flow(model, weights)
    again, other = network(seed=4), network()
    SLTrain(rank=4).apply(again, seed=3)
    SLTrain(rank=4).apply(other, seed=4)
    assert torch.equal(again[0].indices, layer.indices)
    assert torch.equal(again[0].values, layer.values)
    assert not torch.equal(other[0].indices, layer.indices)
    assert not torch.equal(model[2].indices, layer.indices)
    assert train(model, weights, AdamW(model.named_parameters(), lr=1e-2), range(30))[-1] < 1.5


def test_large_matrices_have_indices_of_64_bits() -> None:
    def dtype(out: int) -> torch.dtype:
        with torch.device("meta"):
            layer = SLTrainLinear(nn.Linear(1 << 16, out), rank=4, scale=1.0, delta=1e-4)
        layer.reset_(seeded())
        return layer.indices.dtype

    assert dtype((1 << 15) - 1) == torch.int32
    assert dtype(1 << 15) == torch.int64


def test_one_matrix_or_one_tile_of_its_gradient_is_there_at_a_time() -> None:
    """Beside what is trained there is at most W, and after forward only what it was given."""
    m, n, tokens = 1024, 768, 4
    layer = SLTrainLinear(nn.Linear(n, m, bias=False), rank=4, scale=1.0, delta=0.03)
    layer.reset_(seeded())
    x = torch.randn(tokens, n, requires_grad=True)
    layer(x).sum().backward()  # tiles are known from now on
    layer.zero_grad()
    thin = 4 * (8 * (m + n) * tokens + 2 * len(layer.values))
    for needs in (True, False):
        trace = MemoryTrace()
        with trace:
            trace.label([*layer.parameters(), layer.indices, x], "weights")
            trace.phase = "forward"
            before = trace.allocated
            y = layer(x.requires_grad_(needs))
            assert trace.allocated - before <= thin
            trace.phase = "backward"
            y.sum().backward()
        phases = trace.timeline().phases
        assert 4 * m * n <= phases["forward"] - before <= 4 * m * n + thin
        tile = 4 * (1 << 18)
        assert tile < 4 * m * n / 2
        matrix = 4 * m * n if needs else tile  # the gradient of x needs W again
        assert matrix * 0.99 <= phases["backward"] - before <= matrix + thin
        layer.zero_grad()
        x.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 640])  # one tile, and several
def test_planned_bytes_are_allocated_bytes(dtype: torch.dtype, width: int) -> None:
    recipe = SLTrain(rank=8)
    real, planned = (traced(recipe, dtype, simulate=simulate, width=width) for simulate in (False, True))
    assert planned.most["weights"] == real.most["weights"]
    factors, entries = 2 * 8 * 3 * width, 2 * int(0.03 * 2 * width**2)
    trained = factors + entries + 3 * width + 2 * width
    assert real.most["weights"] == trained * dtype.itemsize + 4 * entries
    assert planned.most["gradients"] == real.most["gradients"] == trained * dtype.itemsize
    for key in ("state:exp_avg", "state:exp_avg_sq"):
        assert planned.most[key] == real.most[key] == trained * 4
    if width == 128:
        assert planned.phases == real.phases
    else:  # the places in a tile are its share of all of them, but for chance
        for phase, peak in real.phases.items():
            assert planned.phases[phase] == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["torch", "subspan"])
def test_resumes(optimizer: str) -> None:
    kind = torch.optim.AdamW if optimizer == "torch" else AdamW
    assert resumes(SLTrain(rank=4), lambda model: kind(model.named_parameters(), lr=1e-2), 3, 6)


@pytest.mark.usefixtures("tiles")
def test_places_that_are_loaded_are_used() -> None:
    layer, other = sparse(), sparse()
    other.reset_(seeded(5))
    x, dY = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 24, dtype=torch.float64)
    output_and_gradients(layer, x, dY)
    layer.load_state_dict(other.state_dict())
    for mine, theirs in zip(output_and_gradients(layer, x, dY), output_and_gradients(other, x, dY), strict=True):
        assert torch.equal(mine, theirs)


def test_merging_keeps_the_function() -> None:
    model = network()
    weights = weight_recipe("sltrain", rank=4, delta=0.05).apply(model)
    train(model, weights, AdamW(model.named_parameters(), lr=1e-2), range(5))
    x = torch.randn(4, 32)
    before = model(x)
    assert merge_layers(model) == ["0", "2"]
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_bad_settings_name_the_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SLTrain(**settings)


def test_layers_that_would_not_be_smaller_or_not_sparse_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"rank=16 with delta=0.03 does not make 0 \(32×32\) smaller.* is 15"):
        SLTrain(rank=16).apply(model)
    with pytest.raises(ValueError, match=r"delta=0.0001 leaves no entry of 0 \(32×32\); name it in exclude"):
        SLTrain(rank=1, delta=1e-4).apply(model)
    with pytest.raises(ValueError, match=r"delta=0.0001 of the 1024 entries .* give 0.00098 or more"):
        SLTrainLinear(model[0], rank=1, scale=1.0, delta=1e-4)
    assert type(model[0]) is nn.Linear
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0.weight is tied to 1.weight"):
        SLTrain(rank=4).apply(model)
