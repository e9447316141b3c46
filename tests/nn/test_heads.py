from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import subspan.optim.tiling as tiling
from subspan.nn.lowrank import low_rank_layers, merge_layers, select_layers, weight_recipe
from subspan.nn.lowrank.layer import add_product_
from subspan.state import Int8Weight


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=48, n_positions=32, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokens(sequences: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(48, (sequences, 6), generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module) -> None:
    """Give every factor numbers of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("target", ["attention", "mlp", "logit", "attention+mlp+logit", "all-linear"])
def test_the_function_is_kept_and_all_factors_learn(make, target: str) -> None:
    model, x = make(), tokens()
    before = model(x).logits
    weights = weight_recipe("mhlora", heads=3, rank=2, alpha=4).apply(model, target_modules=target)
    assert torch.allclose(model(x).logits, before, atol=1e-6)
    stir(model)
    model(input_ids=x, labels=x).loss.backward()
    for name, parameter in weights.factors().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    after = model(x).logits
    assert (after - before).abs().max() > 1e-3
    tied = model.get_input_embeddings()
    names = weights.merge()
    assert sorted(names) == sorted(select_layers(make(), target))
    assert not list(low_rank_layers(model)) and type(model.get_input_embeddings()) is nn.Embedding
    assert torch.allclose(model(x).logits, after, atol=1e-5)
    if make is gpt2:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (tied is not model.get_input_embeddings()) == ("logit" in target)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_are_those_of_the_formula(make) -> None:
    heads, rank, s = 3, 2, 2.0
    model, x = make(), tokens()
    dense = copy.deepcopy(model)
    weight_recipe("mhlora", heads=heads, rank=rank, alpha=s * rank).apply(model, target_modules="attention+mlp+logit")
    stir(model)
    own = {name: layer for name, layer in low_rank_layers(model)}
    A = {k: layer.lora_A.detach().clone().requires_grad_() for k, layer in own.items()}
    B = {k: layer.lora_B.detach().clone().requires_grad_() for k, layer in own.items()}
    replaced = {}
    for k, layer in own.items():
        D = sum(B[k][n].T @ A[k][n] for n in range(heads)) * s / heads
        W = dense.get_submodule(k).weight.detach()
        replaced[f"{k}.weight"] = W + (D.T if layer.transposed else D)
    if make is gpt2:  # the embedding is tied to the head
        replaced["transformer.wte.weight"] = replaced["lm_head.weight"]
    loss = torch.func.functional_call(dense, replaced, (), {"input_ids": x, "labels": x}, tie_weights=False).loss
    loss.backward()
    model(input_ids=x, labels=x).loss.backward()
    for k, layer in own.items():
        assert torch.allclose(layer.lora_A.grad, A[k].grad, atol=1e-6), k
        assert torch.allclose(layer.lora_B.grad, B[k].grad, atol=1e-6), k


class Tied(nn.Module):
    """Two embeddings and a head with one matrix."""

    def __init__(self, kind: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(48, 16), kind(48, 16)
        self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 48, bias=False)
        self.source.weight = self.target.weight = self.head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.source(ids) - self.target(ids.flip(1)))))


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 4.0 * super().forward(input)


@pytest.mark.parametrize("name", ["mhlora", "lte"])
def test_all_that_is_tied_to_a_layer_stays_so(name: str) -> None:
    model, x = Tied(), tokens()
    weights = weight_recipe(name, heads=2, rank=2, alpha=4).apply(model, target_modules="logit")
    stir(model)
    before = model.eval()(x)
    D = (weights.layers["head"].effective_weight() - model.head.weight).abs().max()
    weights.merge()
    assert D > 1e-2 and torch.allclose(model(x), before, atol=1e-5)
    assert model.source.weight is model.target.weight is model.head.weight


def test_ties_that_would_be_lost_are_refused() -> None:
    for name in ("mhlora", "lte"):
        with pytest.raises(ValueError, match=r"head.weight is tied to target.weight, which cannot be given up"):
            weight_recipe(name, heads=2, rank=2).apply(Tied(ScaledEmbedding), target_modules="logit")
        with pytest.raises(ValueError, match=r"head.weight is tied to target.weight, which cannot be given up"):
            limited: Any = functools.partial(nn.Embedding, max_norm=1.0)
            weight_recipe(name, heads=2, rank=2).apply(Tied(limited), target_modules="logit")
        model = Tied()
        model.again = nn.Linear(16, 16)
        model.again.weight = model.middle.weight
        with pytest.raises(ValueError, match=r"middle.weight is tied to again.weight"):
            weight_recipe(name, heads=2, rank=2).apply(model, target_modules=["middle"])


def test_a_tied_row_that_is_padding_gets_no_gradient_by_being_looked_up() -> None:
    model: Any = Tied(functools.partial(nn.Embedding, padding_idx=3))  # type: ignore[arg-type]
    weight_recipe("mhlora", heads=2, rank=2).apply(model, target_modules="logit")
    weight = model.head.weight.requires_grad_(True)
    model.target(torch.arange(6)).sum().backward()
    assert [bool(row.any()) for row in weight.grad[:6]] == [True, True, True, False, True, True]


def test_factors_of_float16_weights_are_held_in_float32() -> None:
    for dtype, held in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        weights = weight_recipe("mhlora", heads=2, rank=2).apply(nn.Sequential(nn.Linear(8, 8)).to(dtype))
        assert {factor.dtype for factor in weights.factors().values()} == {held}


def test_the_draws_depend_on_seed_and_name_alone() -> None:
    one, other, third = llama(), llama(), llama()
    weight_recipe("mhlora", heads=2, rank=4).apply(one, seed=3)
    weight_recipe("mhlora", heads=2, rank=4).apply(other, target_modules="mlp", seed=3)
    weight_recipe("mhlora", heads=2, rank=4).apply(third, target_modules="mlp", seed=4)
    name = "model.layers.1.mlp.up_proj"
    A = one.get_submodule(name).lora_A
    assert torch.equal(A, other.get_submodule(name).lora_A)
    assert not torch.equal(A, third.get_submodule(name).lora_A)
    # A of each head has orthogonal rows of length √(in/r).
    gram = A @ A.mT
    assert torch.allclose(gram, 16 / 4 * torch.eye(4).expand_as(gram), atol=1e-5)
    assert (A[0] @ A[1].mT).abs().max() > 1e-2


def test_a_rank_at_and_above_the_width() -> None:
    model, x = llama(), tokens()
    before = model(x).logits
    with pytest.raises(ValueError, match=r"rank is 20, but model.layers.0.self_attn.q_proj is a matrix \(16, 16\)"):
        weight_recipe("mhlora", heads=1, rank=20).apply(model, target_modules="attention")
    weights = weight_recipe("mhlora", heads=1, rank=16).apply(model, target_modules="attention")
    assert torch.allclose(model(x).logits, before, atol=1e-6)
    assert all(p.isfinite().all() for p in weights.factors().values())


def test_amp_and_bfloat16() -> None:
    x = tokens()
    model = llama()
    weight_recipe("mhlora", heads=2, rank=4, alpha=4).apply(model)
    stir(model)
    exact = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=x, labels=x)
    assert (loss.logits.float() - exact).norm() < 0.05 * exact.norm()
    loss.loss.backward()
    half = llama().bfloat16()
    weights = weight_recipe("mhlora", heads=2, rank=4, alpha=4).apply(half)
    assert {p.dtype for p in weights.factors().values()} == {torch.bfloat16}
    half(input_ids=x, labels=x).loss.backward()
    weights.merge()
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_single_row_and_float64() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    for name in ("mhlora", "lte"):
        low = copy.deepcopy(model)
        weight_recipe(name, heads=3, rank=2).apply(low)
        assert torch.allclose(low(x), before, atol=1e-12)
        assert torch.allclose(low.eval()(x[1]), before[1], atol=1e-12)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="heads is 0"):
        weight_recipe("mhlora", heads=0)
    with pytest.raises(ValueError, match="alpha is -1"):
        weight_recipe("mhlora", alpha=-1)
    with pytest.raises(ValueError, match="alpha is inf; it must be greater than 0, and finite"):
        weight_recipe("mhlora", alpha=float("inf"))
    with pytest.raises(ValueError, match="unknown recipe of weights 'mhlor'; did you mean 'mhlora'"):
        weight_recipe("mhlor")
    with pytest.raises(ValueError, match="unknown setting of mhlora 'head'; did you mean 'heads'"):
        weight_recipe("mhlora", head=2)
    with pytest.raises(ValueError, match="'nothing' selects no matrix"):
        weight_recipe("mhlora").apply(llama(), target_modules=["nothing"])
    with pytest.raises(ValueError, match="no linear layer that is recognised as attention"):
        select_layers(nn.Sequential(nn.Linear(4, 4)), "attention")
    with pytest.raises(ValueError, match="'mpl' is none of attention, mlp, logit"):
        select_layers(nn.Sequential(nn.Linear(4, 4)), "attention+mpl")
    with pytest.raises(TypeError, match="LayerNorm is no linear layer"):
        from subspan.nn.lowrank import HeadsLinear

        HeadsLinear(nn.LayerNorm(4), heads=1, rank=1, scale=1.0)


def test_exclude_and_lists() -> None:
    model = llama()
    chosen = select_layers(model, "attention+mlp", exclude=["layers.0"])
    assert len(chosen) == 7 and all("layers.1" in name for name in chosen)
    assert set(select_layers(model, ["q_proj"])) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert "lm_head" not in select_layers(model)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "transposed"])
def test_a_product_is_added_with_one_rounding(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 36, generator=generator)
    L, R = torch.randn(40, 3, generator=generator), torch.randn(3, 36, generator=generator)
    expected = W + 0.5 * L @ R
    if kind == "int8":
        held = Int8Weight.of(W)
        expected = held.dense() + 0.5 * L @ R
        add_product_(held, L, R, alpha=0.5)
        assert (held.dense() - expected).abs().max() <= 0.5001 * held.steps.float().max()
        return
    held = W.T.contiguous().T if kind == "transposed" else W.to(getattr(torch, kind)).clone()
    start = held.float().clone()
    add_product_(held, L, R, alpha=0.5)
    if kind == "bfloat16":
        assert torch.equal(held, (start + 0.5 * L @ R).bfloat16())
    else:
        assert torch.allclose(held, expected, atol=1e-6)


def test_many_small_products_in_bfloat16_add_up_in_the_mean() -> None:
    W, exact = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64)
    nearest = W.clone()
    L, R = torch.full((64, 1), 2.0**-6), torch.full((1, 64), 2.0**-6)  # 2^-12 a time: 1/16 of what bfloat16 keeps
    for step in range(200):
        add_product_(W, L, R, key=torch.tensor(step))
        add_product_(nearest, L, R)
        exact += L @ R
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert abs(float(W.float().mean() - exact.mean())) < 0.02 * float(exact.mean() - 1)
    assert torch.equal(add_key(7), add_key(7)) and not torch.equal(add_key(7), add_key(8))


def add_key(key: int) -> torch.Tensor:
    W = torch.ones(64, 64, dtype=torch.bfloat16)
    add_product_(W, torch.full((64, 1), 2.0**-5), torch.full((1, 64), 2.0**-5), key=torch.tensor(key))
    return W


def test_rounding_does_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = add_key(7)
    monkeypatch.setattr(tiling, "_CPU_TILE", 64 * 20)
    assert torch.equal(add_key(7), whole)


def test_merged_layers_keep_class_and_bias() -> None:
    model = gpt2()
    weight_recipe("mhlora", heads=1, rank=2).apply(model)
    merge_layers(model)
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer).__name__ == "Conv1D" and layer.weight.shape == (16, 48) and layer.bias.shape == (48,)
