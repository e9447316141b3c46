"""Factored layers against dense autograd, through balancing, saving and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.factored import FactoredReference, spectral
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.nn.lowrank import Factored, FactoredLinear, weight_recipe
from subspan.optim import AdamW, GaLore, param_groups
from tests.nn.lowrank_cases import SHAPES, Largest, gradients_flow, linear, network, resumes, traced, train

KINDS = ["Linear", "Conv1D"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factored(kind: str = "Linear", shape: str = "wide", rank: int = 8, **settings: Any) -> FactoredLinear:
    layer = FactoredLinear(linear(kind, *SHAPES[shape], **settings), rank=rank)
    layer.reset_(seeded())
    return layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"rebalance_gap": 0}, "torch"),
        ({"rebalance_gap": 4, "product_decay": 0.1}, "torch"),
        ({"rebalance_gap": 4}, "subspan"),
        ({"rebalance_gap": 4, "moments": "reset"}, "subspan"),
        ({"rebalance_gap": 6, "momentum_reset_gap": 4}, "torch"),
    ],
)
def test_follows_the_reference(shape: str, settings: dict[str, Any], optimizer: str) -> None:
    model = nn.Sequential(linear("Linear", *SHAPES[shape], bias=False))
    W = model[0].weight.detach().clone()
    weights = Factored(rank=8, **settings).apply(model)
    recipe = weights.recipe
    reference = FactoredReference(
        *spectral(W, 8), lr=1e-2, decay=recipe.product_decay, gap=recipe.rebalance_gap, moments=recipe.moments,
        reset_gap=recipe.momentum_reset_gap,
    )  # fmt: skip
    kind = torch.optim.AdamW if optimizer == "torch" else AdamW
    stepper = kind(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    target = torch.randn(W.shape, generator=seeded(3), dtype=torch.float64)
    expected = reference.B @ reference.A
    for step in range(12):
        x = torch.randn(64, W.shape[1], generator=seeded(step), dtype=torch.float64)
        G = (expected - target) @ x.T @ x / 64
        (model(x) - x @ target.T).square().sum().div(2 * 64).backward()
        weights.before_step(step)
        stepper.step()
        weights.end_step(step, stepper)
        stepper.zero_grad()
        expected = reference.step(G)
        found = model[0].factor_B @ model[0].factor_A
        assert torch.allclose(found, expected, atol=1e-9), step
    assert (expected - target).norm() < (W - target).norm()


@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_outputs_and_gradients_are_those_of_the_product(kind: str, bias: bool) -> None:
    layer = factored(kind, bias=bias)
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    A, B = layer.factor_A.detach(), layer.factor_B.detach()
    W = (B @ A).requires_grad_()
    y = nn.functional.linear(x, W, layer.bias)
    dY = torch.randn_like(y)
    dX, G = torch.autograd.grad(y, (x, W), dY)
    found = layer(x)
    gX, gA, gB = torch.autograd.grad(found, (x, layer.factor_A, layer.factor_B), dY)
    for mine, theirs in ((found, y), (gX, dX), (gA, B.T @ G), (gB, G @ A.T), (layer.effective_weight(), W)):
        assert torch.allclose(mine, theirs)
    dense = layer.dense()
    assert type(dense) is layer.dense_class
    assert torch.allclose(dense(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_start_is_the_best_product_and_keeps_the_function_of_a_weight_of_that_rank(kind: str) -> None:
    dense: Any = linear(kind, 48, 64, dtype=torch.float32)
    W = dense.weight.mT if kind == "Conv1D" else dense.weight
    layer = FactoredLinear(dense, rank=8)
    layer.spectral_(dense, seeded())
    sigma = torch.linalg.svdvals(W.detach())
    assert (W - layer.effective_weight()).norm().item() == pytest.approx(sigma[8:].norm().item(), rel=1e-5)
    B, A = layer.factor_B, layer.factor_A
    assert torch.allclose(B.T @ B, torch.diag(sigma[:8]), atol=1e-5)
    assert torch.allclose(A @ A.T, torch.diag(sigma[:8]), atol=1e-5)
    with torch.no_grad():
        W.copy_(torch.randn(48, 8) @ torch.randn(8, 64))
    x = torch.randn(5, 64)
    before = dense(x)
    model = nn.Sequential(dense)
    Factored(rank=8).apply(model)
    assert (model(x) - before).norm() < 1e-6 * before.norm()


def test_large_weights_take_a_randomised_svd() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(520, 560, bias=False)
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(dense.weight, full_matrices=False)
        dense.weight.copy_(U * torch.arange(1, 521) ** -1.0 @ Vh)
    layer, again = FactoredLinear(dense, rank=16), FactoredLinear(dense, rank=16)
    layer.spectral_(dense, seeded())
    again.spectral_(dense, seeded())
    assert torch.equal(layer.factor_A, again.factor_A)
    best = (torch.arange(17, 521) ** -1.0).norm()
    assert (dense.weight - layer.effective_weight()).norm() < 1.001 * best


@pytest.mark.parametrize("rank_of_weight", [0, 3, 32])
def test_a_gradient_reaches_every_layer_after_the_start_and_every_balancing(rank_of_weight: int) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(32, rank_of_weight) @ torch.randn(rank_of_weight, 64))
    weights = Factored(rank=8, rebalance_gap=2).apply(model)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    for step in range(6):
        # Nothing can reach layer 0 through a matrix of zeros.
        assert gradients_flow(model, weights, "2" if rank_of_weight == step == 0 else "")
        train(model, weights, optimizer, range(step, step + 1))
    # All directions are used, those that were zero too.
    assert torch.linalg.svdvals(model[2].effective_weight().double())[7] > 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_balancing_keeps_the_product(shape: str) -> None:
    layer = factored(shape=shape, dtype=torch.float32)
    with torch.no_grad():
        layer.factor_A.mul_(100)  # out of balance
    before = layer.factor_B.double() @ layer.factor_A.double()
    changed = layer.rebalance_()
    assert changed is not None
    A, B = layer.factor_A.double(), layer.factor_B.double()
    assert (B @ A - before).norm() < 1e-6 * before.norm()
    S = torch.linalg.svdvals(before)[:8]
    assert torch.allclose(B.T @ B, S.diag(), atol=1e-5 * S[0].item())
    assert torch.allclose(A @ A.T, S.diag(), atol=1e-5 * S[0].item())
    M, inverse = changed
    assert torch.allclose(M @ inverse, torch.eye(8, dtype=M.dtype), atol=1e-9)


def test_balancing_a_product_of_lower_rank_leaves_no_direction_without_factors() -> None:
    layer = factored(dtype=torch.float32)
    with torch.no_grad():
        layer.factor_B[:, 5:] = 0
    before = layer.effective_weight()
    assert layer.rebalance_() is not None
    assert torch.allclose(layer.effective_weight(), before, atol=1e-6)
    assert (layer.factor_A.norm(dim=1) > 1e-4).all()
    with torch.no_grad():
        layer.factor_B.zero_()
    A = layer.factor_A.clone()
    assert layer.rebalance_() is None
    assert torch.equal(layer.factor_A, A)


def test_balancing_what_has_diverged_is_an_error_that_names_the_layer() -> None:
    model = network()
    weights = Factored(rank=8, rebalance_gap=1).apply(model)
    model[2].factor_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2: a factor has a NaN"):
        weights.end_step(0, AdamW(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decay_of_the_product_is_its_gradient(dtype: torch.dtype) -> None:
    layer = factored(dtype=dtype)
    A, B = (factor.detach().double().requires_grad_() for factor in (layer.factor_A, layer.factor_B))
    gA, gB = torch.autograd.grad(0.3 / 2 * (B @ A).square().sum(), (A, B))
    for factor in layer.factors().values():
        factor.grad = torch.ones_like(factor)
    assert layer.decay_product_(0.3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    for factor, decay in ((layer.factor_A, gA), (layer.factor_B, gB)):
        assert factor.grad is not None
        assert factor.grad.dtype == dtype
        assert torch.allclose(factor.grad.double(), 1 + decay, rtol=tolerance, atol=tolerance)


def test_decay_without_gradients_is_an_error() -> None:
    model = network()
    weights = Factored(rank=8, product_decay=0.1).apply(model)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    optimizer.fuse_into_backward()
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(RuntimeError, match=r"product_decay=0.1 .* fused"):
        weights.before_step(0)


def test_no_matrix_is_ever_formed() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    weights = Factored(rank=4, rebalance_gap=1, product_decay=0.1).apply(model)
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    with Largest() as largest:
        for step in range(2):
            model(torch.randn(2, 3, 64)).square().mean().backward()
            weights.before_step(step)
            optimizer.step()
            weights.end_step(step, optimizer)
            optimizer.zero_grad()
    assert 0 < largest.elements <= 2 * 3 * 96  # an activation; a matrix has 6,144


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_bytes_are_allocated_bytes(dtype: torch.dtype, gap: int) -> None:
    recipe = Factored(ratio=0.3, rebalance_gap=gap, product_decay=1e-3)
    real, planned = (traced(recipe, dtype, simulate=simulate) for simulate in (False, True))
    assert planned.most == real.most
    assert planned.phases == real.phases
    rank = 24
    factors = 2 * rank * (128 + 256) + 128 + 256 + 2 * 128
    assert real.most["weights"] == real.most["gradients"] == factors * dtype.itemsize
    assert real.most["state:exp_avg"] == factors * 4


@pytest.mark.parametrize(
    ("settings", "moments"),
    [({"moments": "rotate"}, "float32"), ({"moments": "reset"}, "float32"), ({"momentum_reset_gap": 2}, "8bit")],
)
def test_resumes_in_the_middle_of_a_period(settings: dict[str, Any], moments: str) -> None:
    recipe = Factored(rank=8, rebalance_gap=3, product_decay=1e-3, **settings)
    storage = {} if moments == "float32" else {"moments": moments, "min_quantized": 1}
    assert resumes(recipe, lambda model: AdamW(model.named_parameters(), lr=1e-2, **storage), 4, 8)
    assert resumes(recipe, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), 4, 8)


def test_moments_of_eight_bits_are_carried() -> None:
    found: dict[str, dict[str, Any]] = {}
    for storage in ("float32", "8bit"):
        model = network()
        weights = Factored(rank=8, rebalance_gap=3).apply(model)
        optimizer = AdamW(model.named_parameters(), lr=1e-3, moments=storage, min_quantized=1)
        train(model, weights, optimizer, range(3))
        moments = found[storage] = {}
        optimizer.edit_state(model[0].factor_A, lambda state, moments=moments: moments.update(state))
        moments.pop("step")
    for key, exact in found["float32"].items():
        assert (found["8bit"][key] - exact).norm() < 0.05 * exact.norm(), key


def test_balancing_does_not_slow_training_down() -> None:
    losses = {}
    for gap in (0, 2):
        model = network()
        weights = Factored(rank=8, rebalance_gap=gap).apply(model)
        losses[gap] = train(model, weights, AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.0), range(40))
    # A second moment that were kept above M² itself would make 1.12 of this 1.00.
    assert sum(losses[2][-10:]) < 1.01 * sum(losses[0][-10:]) < 0.9 * 10 * losses[0][0]


def test_moments_of_projected_gradients_are_refused() -> None:
    model = network()
    weights = Factored(rank=8, rebalance_gap=1).apply(model)
    optimizer = GaLore(param_groups(model, rank=2, target_modules=".*factor.*"))
    with pytest.raises(ValueError, match=r"0\.factor_B: GaLore keeps .* train factors with AdamW"):
        train(model, weights, optimizer, range(1))
    model = network()
    weights = Factored(rank=8, rebalance_gap=1, moments="reset").apply(model)
    optimizer = GaLore(param_groups(model, rank=2, target_modules=".*factor.*"))
    train(model, weights, optimizer, range(3))
    assert not optimizer.state[model[0].factor_A]["exp_avg"].any()


def test_half_precision() -> None:
    model = network()
    Factored(rank=8).apply(model)
    x = torch.randn(4, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model[2](model[1](model[0](x)))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert model[0].factor_A.grad.dtype == torch.float32
    half = network().bfloat16()
    weights = Factored(rank=8, rebalance_gap=2, product_decay=1e-3).apply(half)
    assert {factor.dtype for factor in weights.factors().values()} == {torch.bfloat16}
    assert (half(x.bfloat16()).float() - expected).norm() < 0.02 * expected.norm()
    optimizer = AdamW(half.named_parameters(), lr=1e-3)
    for step in range(2):
        half(x.bfloat16()).square().mean().backward()
        weights.before_step(step)
        optimizer.step()
        weights.end_step(step, optimizer)
    assert all(parameter.isfinite().all() for parameter in half.parameters())


def test_what_is_drawn_follows_from_the_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        Factored(rank=8, init="kaiming").apply(model, seed=seed)
        assert not torch.equal(model[0].factor_A, model[1].factor_A)
        assert 0.8 < model[0].factor_A.abs().max() * 32**0.5 <= 1
        assert 0.8 < model[0].factor_B.abs().max() * 8**0.5 <= 1
        return model[0].factor_A.detach()

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def llama(tied: bool = False) -> nn.Module:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied))


def test_a_low_rank_ffn_is_exported_as_a_dense_model() -> None:
    model = llama().eval()
    dense_keys = list(model.state_dict())
    weights = weight_recipe("factored", ratio=0.7).apply(model, target_modules="mlp")
    assert [name.rpartition(".")[2] for name in weights.layers] == ["gate_proj", "up_proj", "down_proj"]
    assert {layer.rank for layer in weights.layers.values()} == {16}  # 0.7·32·88/120 = 16.4
    ids = torch.arange(10)[None]
    before = model(ids).logits
    assert len(weights.merge()) == 3
    assert list(model.state_dict()) == dense_keys
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight.*exclude"):
        Factored(rank=4).apply(llama(tied=True), target_modules="logit")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"init": "random"}, "init is 'random'.*spectral, kaiming"),
        ({"moments": "keep"}, "moments is 'keep'.*rotate, reset"),
        ({"product_decay": -1.0}, "product_decay is -1.0"),
        ({"rebalance_gap": -5}, "rebalance_gap is -5"),
        ({"momentum_reset_gap": -5}, "momentum_reset_gap is -5"),
    ],
)
def test_bad_settings_name_the_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Factored(**settings)


def test_factors_that_are_not_smaller_are_refused() -> None:
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"rank=32 does not make 0 smaller.* 4,608 .* in place of 4,608.* is 31"):
        Factored(rank=32).apply(model)
    with pytest.raises(ValueError, match=r"rank=1 does not make 1 smaller.*no rank does: name it in exclude"):
        Factored(ratio=0.5).apply(model)
    assert type(model[0]) is type(model[1]) is nn.Linear  # nothing was changed
    Factored(rank=31).apply(model, exclude="1")
    with pytest.raises(ValueError, match="rank=49 is not possible for a 96×48 matrix: give 1 to 48"):
        FactoredLinear(nn.Linear(48, 96), rank=49)
