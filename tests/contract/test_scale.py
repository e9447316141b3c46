"""SCALE: its reference, tiles, the roles of a model's parameters, and what does not tell its outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.quantised import dynamic_levels, quantised
from references.scale import SCALEReference
from torch import nn

from contract.cases import gradient, identical, parameters, set_gradients, train
from subspan.optim import SCALE, AdamW, GaLore, param_groups, tiling
from subspan.optim.inner import Normalised

NUMBERS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
SHAPES = [(12, 20), (20, 12), (9,), (3, 10, 14), (8, 6, 3, 3)]
SIDES = ["rows", "columns"]


def follow(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, hold: Any = None, **keys: Any) -> None:
    (p,) = parameters({"w": shape}, dtype=dtype).values()
    W = start = p.detach().double().clone()
    own = {key: value for key, value in keys.items() if key not in ("moments", "min_quantized")}
    reference = SCALEReference(**NUMBERS, **own, **({} if hold is None else {"hold": hold}))
    norm = {"norm": keys.pop("norm")} if "norm" in keys else {}
    optimizer = SCALE([{"params": [("w", p)], **keys}], **NUMBERS, **norm)
    for step in range(12):
        W = reference.step(W, gradient("w", W, step))
        p.grad = gradient("w", p, step).to(dtype)
        optimizer.step()
        assert (p.detach().double() - W).abs().max() < 1e-5, f"step {step}"
    assert (W - start).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_scale(shape: tuple[int, ...], outputs: str, momentum: float, norm: str) -> None:
    if len(shape) == 4 and outputs == "columns":
        pytest.skip("a kernel has its outputs first")
    follow(shape, outputs=outputs, momentum=momentum, norm=norm)


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_eps_is_a_floor(norm: str) -> None:
    """Below the size of some outputs and above that of others."""
    follow((12, 20), outputs="rows", eps=0.15, norm=norm)


@pytest.mark.parametrize("shape", [(30, 40), (3, 10, 14)], ids=str)
@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("bits", [8, 4])
def test_scale_with_a_quantised_momentum(shape: tuple[int, ...], outputs: str, bits: int) -> None:
    """Blocks follow each other along the outputs, anew for each expert; the step is that of the momentum before it."""

    def hold(M: torch.Tensor) -> torch.Tensor:
        return quantised(M, dynamic_levels(bits, signed=True), 256 if bits == 8 else 128)

    follow(shape, torch.float64, hold, outputs=outputs, moments=f"{bits}bit", min_quantized=1)


@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"moments": "4bit", "min_quantized": 1}], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(90, 70), (3, 40, 30), (24, 3, 5, 5)], ids=str)
def test_tiles_change_nothing(
    shape: tuple[int, ...], outputs: str, settings: dict[str, Any], rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for budget in (1 << 20, 700):
        monkeypatch.setattr(tiling, "_CPU_TILE", budget)
        named = parameters({"w": shape}, dtype=torch.bfloat16)
        groups = [{"params": list(named.items()), "outputs": outputs}]
        train(SCALE(groups, lr=1e-2, rounding=rounding, **settings), named, 4)
        results.append(named)
    assert identical(*results)


@pytest.mark.parametrize("outputs", SIDES)
def test_weights_and_gradients_in_any_memory_layout(outputs: str) -> None:
    for shape in ((20, 12), (3, 10, 14), (8, 6, 3, 3)):
        plain = parameters({"w": shape})
        turned = {"w": nn.Parameter(plain["w"].detach().transpose(-1, -2).contiguous().transpose(-1, -2))}
        last = {"w": nn.Parameter(plain["w"].detach().clone())}
        if len(shape) == 4:
            last = {"w": nn.Parameter(plain["w"].detach().to(memory_format=torch.channels_last))}
        for named in (plain, turned, last):
            optimizer = SCALE([{"params": list(named.items()), "outputs": outputs}], lr=1e-2)
            for step in range(3):
                set_gradients(named, step)
                assert named["w"].grad is not None
                named["w"].grad = named["w"].grad.transpose(-1, -2).contiguous().transpose(-1, -2)
                optimizer.step()
        assert (plain["w"] - turned["w"]).abs().max() < 1e-6
        assert (plain["w"] - last["w"]).abs().max() < 1e-6


@pytest.mark.parametrize("outputs", SIDES)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_outputs_without_a_gradient_stay(outputs: str, eps: float, momentum: float) -> None:
    """Words that are not in the batch, units that are off; other outputs make whole steps, huge or tiny gradients."""
    p = nn.Parameter(torch.ones(6, 6))
    optimizer = SCALE([{"params": [("w", p)], "outputs": outputs}], lr=0.1, eps=eps, momentum=momentum)
    by_output = torch.diag(torch.tensor([0.0, 1.0, 1e-3, 1e30, 1.0, 1.0])) @ torch.ones(6, 6)
    for _ in range(3):
        p.grad = by_output if outputs == "rows" else by_output.T.contiguous()
        optimizer.step()
    moved = (1 - p.detach()) if outputs == "rows" else (1 - p.detach()).T
    assert torch.equal(moved[0], torch.zeros(6))
    assert torch.allclose(moved[1:], torch.full((5, 6), 0.3), rtol=1e-5)


class Model(nn.Module):
    """All kinds of parameters."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(40, 12), nn.Parameter(torch.zeros(1, 7, 12))
        self.kernel, self.attention = nn.Conv2d(3, 12, 2), nn.MultiheadAttention(12, 2, add_bias_kv=True)
        self.norm, self.router = nn.LayerNorm([7, 12]), nn.Parameter(torch.randn(4, 12))
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 40, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def roles(optimizer: SCALE) -> dict[str, tuple[str | None, bool]]:
    """Where the outputs are, and whether there is a momentum."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            keys = set(optimizer.declared_state(p))
            assert keys == {"step"} if group["momentum"] == 0 else {"step", "exp_avg"} <= keys
            found[name] = (group["outputs"], "exp_avg_sq" not in keys and "exp_avg" in keys)
    return found


def test_roles_in_a_plain_model() -> None:
    found = roles(SCALE(Model()))
    columns, rows, head, adam = ("columns", False), ("rows", False), ("rows", True), (None, False)
    assert found.pop("embedding.weight") == columns
    assert found.pop("head.weight") == head
    normalised = {"kernel.weight", "attention.in_proj_weight", "attention.out_proj.weight", "router"}
    normalised |= {"up.weight", "down.weight"}
    assert {name for name, role in found.items() if role == rows} == normalised
    assert {found[name] for name in found.keys() - normalised} == {adam}
    assert {"positions", "norm.weight", "attention.bias_k", "up.bias"} <= found.keys()


def test_a_tied_embedding_is_the_head() -> None:
    found = roles(SCALE(Model(tied=True)))
    assert found["embedding.weight"] == ("rows", True)
    assert [name for name, (_, momentum) in found.items() if momentum] == ["embedding.weight"]


def test_roles_in_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    found = roles(SCALE(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))))
    assert found.pop("transformer.wte.weight") == ("rows", True)
    assert found.pop("transformer.wpe.weight") == ("columns", False)
    convolutions = {name: role for name, role in found.items() if ".c_" in name and name.endswith("weight")}
    assert len(convolutions) == 4 and set(convolutions.values()) == {("columns", False)}
    assert {role for name, role in found.items() if name not in convolutions} == {(None, False)}


def test_hugging_face_s_experts_say_where_their_outputs_are() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    found = roles(SCALE(MixtralForCausalLM(MixtralConfig(**sizes))))
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == ("rows", False)
    found = roles(SCALE(GptOssForCausalLM(GptOssConfig(**sizes, head_dim=16))))
    assert found["model.layers.0.mlp.experts.down_proj"] == ("columns", False)
    assert found["model.layers.0.mlp.experts.down_proj_bias"] == (None, False)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), nn.Parameter(torch.ones(3, 8, 12))


@pytest.mark.parametrize("side", SIDES)
def test_other_experts_have_to_be_told(side: Any) -> None:
    with pytest.raises(ValueError, match=r"experts: a stack.*\(3, 8, 12\).*experts='rows'"):
        SCALE(Experts())
    assert roles(SCALE(Experts(), experts=side))["experts"] == (side, False)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3)], ids=["1-D", "transposed"])
def test_convolutions_that_are_no_matrices_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=r"1\.weight: the weight of a (1-D|transposed) convolution.*Adam"):
        SCALE(model)
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "outputs": "rows", "momentum": 0}, {"params": named[1:]}]
    assert set(SCALE(groups).declared_state(named[2][1])) == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_that_do_not_say_where_outputs_are_would_be_adam() -> None:
    model = Model()
    for params in (param_groups(model, rank=None), list(model.named_parameters()), model.parameters()):
        with pytest.raises(ValueError, match=r"says where its outputs are.*pass the model itself"):
            SCALE(params)


def test_a_group_without_outputs_is_adamw() -> None:
    one, other = parameters(), parameters()
    idle = {"params": [("idle", nn.Parameter(torch.ones(2, 2)))], "outputs": "rows"}
    train(SCALE([{"params": list(one.items())}, idle]), one, 5)
    train(AdamW(list(other.items())), other, 5)
    assert identical(one, other)


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        ({"outputs": "left"}, {}, "outputs='left'.*'rows' or 'columns'"),
        ({"momentum": 1.0}, {}, r"momentum=1\.0.*\[0, 1\)"),
        ({}, {"norm": "max"}, "norm='max'.*'rms' or 'l2'"),
        ({}, {"experts": "left"}, "experts='left'"),
        ({}, {"moments": "8bit", "momentum": 0.0}, "keeps no moments.*leave moments out"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCALE([{"params": [("w", nn.Parameter(torch.ones(4, 4)))], "outputs": "rows", **keys}], **settings)


def test_targets_decide_on_the_learning_rate_alone() -> None:
    optimizer = SCALE(Model(), target_modules=["up", "down"], exclude=["down"], lr=1e-2, lr_scale=0.5)
    assert roles(optimizer) == roles(SCALE(Model()))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, rate in rates.items() if rate == 5e-3} == {"up.weight"}


def test_projections_do_not_keep_outputs() -> None:
    with pytest.raises(ValueError, match="whole outputs"):
        GaLore([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2}], inner=Normalised())


def test_experts_need_a_model() -> None:
    with pytest.raises(TypeError, match="experts only together with a model"):
        SCALE([{"params": [nn.Parameter(torch.ones(4, 4))], "outputs": "rows"}], experts="rows")


def test_outputs_on_the_other_side_are_another_state() -> None:
    """That of a square matrix would fit."""
    p = nn.Parameter(torch.ones(4, 4))
    state = SCALE([{"params": [("w", p)], "outputs": "rows"}]).state_dict()
    with pytest.raises(ValueError, match="outputs='rows', this optimizer 'columns'"):
        SCALE([{"params": [("w", p)], "outputs": "columns"}]).load_state_dict(state)


def test_moments_of_a_model_are_the_head_s() -> None:
    model = Model()
    optimizer = SCALE(model, moments="8bit", other_moments="bfloat16", min_quantized=1)
    assert optimizer.declared_state(model.head.weight)["exp_avg"].dtype == torch.bfloat16
    optimizer = SCALE(model, moments="8bit", min_quantized=1)
    assert optimizer.declared_state(model.head.weight)["exp_avg"].dtype == torch.uint8
    assert optimizer.declared_state(model.norm.weight)["exp_avg"].dtype == torch.float32
    set_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    assert optimizer.planned_state_bytes() == optimizer.state_bytes()
