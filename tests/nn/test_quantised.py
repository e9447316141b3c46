"""Linear layers with weights of 8 bits: they compute and train as with the float matrices, and are saved as those."""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from subspan.memory import plan
from subspan.nn import project_gradients, quantize_weights
from subspan.optim import QAPOLLO, SCALE, GaLore, QAPOLLOMini, QGaLore, create_optimizer
from subspan.state import Int8Weight, random_bits


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    return LlamaForCausalLM(config).to(dtype)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(seed))


def dense_copy(model: nn.Module) -> nn.Module:
    """The same model with float matrices."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        W = getattr(module, "weight", None)
        if isinstance(W, Int8Weight):
            module.weight = nn.Parameter(W.detach().dense())
    return twin


def test_which_weights() -> None:
    model = llama()
    names = quantize_weights(model)
    assert len(names) == 14 and all(".layers." in name for name in names)
    kinds = {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}
    assert kinds == set(names)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no linear layer to hold in int8"):
        quantize_weights(model)
    some = llama()
    assert quantize_weights(some, ["q_proj", "gate"], exclude=["layers.1"]) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    with pytest.raises(ValueError, match="selects no matrix"):
        quantize_weights(llama(), ["qproj"])


def test_small_and_indivisible_matrices_stay_in_float() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 62), nn.Linear(62, 97), nn.Linear(97, 67), nn.Linear(67, 64))
    assert quantize_weights(model) == ["0.weight", "2.weight", "3.weight", "4.weight"]
    assert model[3].weight.steps.shape == (67, 1)
    assert quantize_weights(nn.Linear(62, 97), min_quantized=1) == ["weight"]
    with pytest.raises(ValueError, match="group_size=40"):
        quantize_weights(nn.Linear(97, 67), group_size=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointing"])
def test_outputs_and_gradients_are_those_of_the_float_matrices(dtype: torch.dtype, how: str) -> None:
    model = llama(dtype)
    quantize_weights(model)
    twin = dense_copy(model)
    found = []
    for one in (model, twin):
        if how == "checkpointing":
            one.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = one(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in one.named_parameters()}))
    (loss, gradients), (expected, others) = found
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], others[name]) for name in others)
    assert {g.dtype for g in gradients.values()} == {dtype}


def test_conv1d() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32, tie_word_embeddings=True)
    model = GPT2LMHeadModel(config).eval()
    assert len(quantize_weights(model)) == 4
    twin = dense_copy(model)
    for one in (model, twin):
        one(input_ids=tokens(), labels=tokens()).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_no_float_matrix_is_kept_for_backward() -> None:
    layer = nn.Linear(128, 64)
    quantize_weights(layer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(torch.randn(2, 5, 128, requires_grad=True))
    assert any(isinstance(tensor, Int8Weight) for tensor in kept)
    assert all(tensor.shape != (128, 64) for tensor in kept if not isinstance(tensor, Int8Weight))


def test_compiled() -> None:
    layer = nn.Linear(128, 64)
    quantize_weights(layer)
    x = torch.randn(3, 128)
    compiled = torch.compile(layer, backend="aot_eager")
    optimizer = QAPOLLO(layer, rank=4, lr=1e-2)
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_as_an_ordinary_model_and_loaded_to_the_code(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    names = quantize_weights(model)
    optimizer = QGaLore(model, rank=4, lr=1e-1)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert {name for name in loaded if name.endswith("_steps")} == {f"{name}_steps" for name in names}
    ordinary = llama(dtype)
    ordinary.load_state_dict({name: value for name, value in loaded.items() if not name.endswith("_steps")})
    assert torch.equal(ordinary(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    other = llama(dtype)
    quantize_weights(other)
    other.load_state_dict(loaded)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if isinstance(p, Int8Weight) and isinstance(q, Int8Weight):
            assert torch.equal(p.codes, q.codes) and torch.equal(p.steps, q.steps), name
        else:
            assert torch.equal(p, q)
    without = {name: value for name, value in loaded.items() if not name.endswith("_steps")}
    other.load_state_dict(without)  # rounded to nearest, from numbers that bfloat16 has rounded
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if isinstance(p, Int8Weight) and isinstance(q, Int8Weight):
            assert (p.dense() - q.dense()).abs().max() <= 1.1 * p.steps.max()


def test_states_that_do_not_fit() -> None:
    model, other = llama(), llama()
    quantize_weights(model, group_size=64)
    quantize_weights(other, group_size=32)
    with pytest.raises(RuntimeError, match="quantise it with the group_size"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        llama().load_state_dict(model.state_dict())
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_an_optimizer_keeps_the_weights_that_it_holds() -> None:
    model = llama()
    optimizer = QAPOLLOMini(model, lr=0.1)
    quantize_weights(model)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(layer.weight.codes, before.codes)


def test_rounding_to_nearest_is_warned_of() -> None:
    model = llama()
    quantize_weights(model)
    with pytest.warns(RuntimeWarning, match="rounding='stochastic'"):
        GaLore(model, rank=4).init_state()


def test_called_too_late() -> None:
    model = llama()
    GaLore(model, rank=4).fuse_into_backward()
    with pytest.raises(RuntimeError, match="before fuse_into_backward"):
        quantize_weights(model)


@pytest.mark.parametrize("method", ["q_galore", "q_apollo", "q_apollo_mini", "frugal", "fira", "adamw", "scale"])
@pytest.mark.parametrize("gradient", ["full", "fused", "projected"])
def test_training(method: str, gradient: str) -> None:
    model = llama(torch.bfloat16)
    quantize_weights(model)
    settings: dict[str, Any] = {"density": 0.25} if method == "frugal" else {"rank": 4}
    if method in ("adamw", "scale"):
        settings = {}
    rate = 3e-3 if method in ("adamw", "frugal", "fira", "scale") else 3e-2
    optimizer = create_optimizer(method, model, lr=rate, rounding="stochastic", **settings)
    if gradient == "fused":
        optimizer.fuse_into_backward()
    elif gradient == "projected":
        if not optimizer.folds:
            pytest.skip("needs the gradient itself")
        project_gradients(model, optimizer)
    planned = plan(model, optimizer)
    losses = []
    for step in range(30):
        loss = model(input_ids=tokens(step % 2), labels=tokens(step % 2)).loss
        loss.backward()
        if step == 0:
            assert planned.gradients == optimizer.gradient_bytes()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    held = sum(p.codes.nbytes + p.steps.nbytes if isinstance(p, Int8Weight) else p.nbytes for p in model.parameters())
    assert planned.weights == held + sum(buffer.nbytes for buffer in model.buffers())
    assert planned.state == optimizer.state_bytes()


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_scale_with_outputs_in_columns(moments: str) -> None:
    """Groups of codes run along outputs there, so that the matrix is rounded as one: the float step, then rounded."""
    dense = nn.Parameter(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))
    coded = nn.Parameter(Int8Weight.of(dense.detach(), 32))
    plain = nn.Parameter(coded.detach().dense())
    for p in (coded, plain):
        p.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
        group = {"params": [("w", p)], "outputs": "columns", "moments": moments, "min_quantized": 1}
        SCALE([group], lr=0.3, momentum=0.9).step()
    apart = (coded.detach().dense() - plain.detach()).abs().unflatten(1, (2, 32)).amax(dim=-1)
    assert (apart <= 0.51 * coded.steps.float()).all()
    assert (plain - dense).abs().max() > 0.1


def test_full_and_fused_are_equal_to_the_bit() -> None:
    codes = []
    for fused in (False, True):
        model = llama(torch.bfloat16)
        quantize_weights(model)
        optimizer = QAPOLLO(model, rank=4, lr=1e-2)
        if fused:
            optimizer.fuse_into_backward()
        for step in range(3):
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        codes.append(model.model.layers[1].mlp.down_proj.weight.codes)
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    ("operation", "what"),
    [
        (lambda W: W.add_(1), "change"),
        (lambda W: W.view(-1), "view"),
        (lambda W: W[0], "view"),
        (lambda W: W.mul_(2), "change"),
        (lambda W: nn.init.normal_(W), "change"),
        (lambda W: operator.isub(W, 1), "change"),
        (lambda W: operator.imul(W, torch.ones(32)), "change"),
        (lambda W: operator.setitem(W, 0, 1.0), "view"),
    ],
)
def test_what_would_be_lost_is_refused(operation: Any, what: str) -> None:
    W = Int8Weight.of(torch.randn(16, 32))
    with pytest.raises(RuntimeError, match=what):
        operation(W)


def test_torch_optimizers_are_refused() -> None:
    layer = nn.Linear(128, 64, bias=False)
    quantize_weights(layer)
    layer(torch.randn(2, 128)).sum().backward()
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match=r"subspan\.optim"):
            torch.optim.AdamW(layer.parameters(), foreach=foreach).step()


def test_moved_without_a_change_while_hooks_are_there() -> None:
    """accelerate moves a model to where it is; torch would put another tensor into the parameter, without hooks."""
    model = llama()
    quantize_weights(model)
    optimizer = QAPOLLOMini(model, lr=1e-2)
    optimizer.fuse_into_backward()
    W = model.model.layers[0].mlp.up_proj.weight
    order = [name for name, _ in model.named_parameters()]
    model.to("cpu").float()
    assert model.model.layers[0].mlp.up_proj.weight is W
    assert [name for name, _ in model.named_parameters()] == order
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    before = W.dense()
    model._apply(lambda tensor: tensor * 2)
    torch.testing.assert_close(W.dense(), 2 * before, atol=float(W.steps.max()), rtol=0)
    with pytest.raises(RuntimeError, match="before fuse_into_backward"):
        model.to(torch.bfloat16)


def test_every_quotient_survives_bfloat16() -> None:
    """All codes times many steps, rounded to bfloat16 and back."""
    codes = torch.arange(-127, 128, dtype=torch.int8)[:240].repeat(256, 1)
    steps = (1 + torch.arange(256) / 128).mul(1e-3).bfloat16()[:, None]
    W = Int8Weight(codes, steps, torch.bfloat16)
    assert torch.equal(W.restored(W.dense(), steps).codes, codes)


def test_a_graph_from_before_a_step_is_refused() -> None:
    """As of float weights: its gradients would be those of other weights."""
    for convert in (False, True):
        layer = nn.Sequential(nn.Linear(128, 64))
        quantize_weights(layer)
        optimizer = GaLore(layer, rank=4, lr=0.1, rounding="stochastic")
        if convert:
            project_gradients(layer, optimizer)
        x = torch.randn(3, 128, requires_grad=True)
        first, second = layer(x).sum(), layer(x).square().sum()
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()


def test_conversions_are_copies() -> None:
    W = Int8Weight.of(torch.randn(16, 32), 16)
    for copied in (W.float().to(torch.bfloat16), W.bfloat16(), W.double(), W.to(torch.float32, copy=True), W.clone()):
        before = copied.dense()
        W.round_rows_(0, torch.randn(16, 32))
        assert torch.equal(copied.dense(), before)
    assert torch.equal(W.int(), W.dense().int())
    assert W.to(torch.float32) is W


def test_assigned_data() -> None:
    layer = nn.Linear(128, 64, bias=False)
    quantize_weights(layer)
    layer.weight.data = torch.ones(64, 128)
    torch.testing.assert_close(layer.weight.dense(), torch.ones(64, 128), atol=5e-3, rtol=0)
    layer.weight.data.copy_(torch.zeros(64, 128))
    assert not layer.weight.codes.any()


def test_adapters_on_frozen_weights_of_8_bits() -> None:
    """They run on a stack that is not contiguous; merging would round to nearest behind one's back, and is refused."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    quantize_weights(model)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()  # type: ignore[arg-type]
    x = torch.randn(5, 7, 128).transpose(0, 1)
    torch.testing.assert_close(adapted(x), adapted(x.contiguous()))
    with pytest.raises(RuntimeError, match="would change a weight that is held in int8"):
        adapted.merge_and_unload()


def test_shared_memory() -> None:
    layer = nn.Linear(128, 64)
    quantize_weights(layer)
    layer.share_memory()
    assert layer.weight.is_shared() and layer.weight.codes.is_shared()


def test_the_mean_of_the_smallest_steps() -> None:
    """Below the resolution of the random numbers there is no drift to one side."""
    start = torch.full((64, 256), 20.0)
    start[:, 0] = 127.0
    update = torch.full((64, 256), 1e-4)
    update[:, 0] = 0.0  # so that the steps of the groups stay
    moved = []
    for sign in (1, -1):
        W = Int8Weight(start.to(torch.int8), torch.ones(64, 1, dtype=torch.bfloat16), torch.float32)
        for seed in range(100):
            bits = random_bits(torch.tensor(seed), torch.arange(start.numel()).view(start.shape))
            W.round_rows_(0, W.rows(0, 64, torch.float32) + sign * update, bits)
        moved.append(float((W.dense() - start)[:, 1:].mean()))
    assert abs(moved[0] - 1e-2) < 4e-3 and abs(moved[1] + 1e-2) < 4e-3
    assert abs(moved[0] + moved[1]) < 4e-3


def test_refused_beforehand() -> None:
    with pytest.raises(ValueError, match="group_size=0"):
        quantize_weights(llama(), group_size=0)
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(RuntimeError, match="has hooks"):
        quantize_weights(model)
    model = llama()
    project_gradients(model, GaLore(model, rank=4))
    with pytest.raises(RuntimeError, match="before project_gradients"):
        quantize_weights(model)


def test_steps_of_another_weight() -> None:
    model = llama()
    quantize_weights(model)
    state = model.state_dict()
    state["model.layers.0.mlp.up_proj.weight"] *= 3
    with pytest.raises(RuntimeError, match="not those of this weight"):
        model.load_state_dict(state)


def test_float16_matrices_are_restored() -> None:
    W = Int8Weight.of(1e-4 * torch.randn(16, 64).half())
    assert torch.equal(W.restored(W.dense(), W.steps).codes, W.codes)


def test_from_the_meta_device() -> None:
    """As models are made that are too large to be initialised first: held in int8 already, then loaded."""
    saved = llama()
    quantize_weights(saved)
    with torch.device("meta"):
        model = llama()
    quantize_weights(model)
    model.to_empty(device="cpu")
    assert sum(isinstance(p, Int8Weight) for p in model.parameters()) == 14
    model.load_state_dict(saved.state_dict())
    one, other = (m.model.layers[1].mlp.up_proj.weight for m in (model, saved))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.steps, other.steps)
