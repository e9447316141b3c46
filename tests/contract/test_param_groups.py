"""`param_groups(model)` projects the hidden matrices of real architectures and says what it does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from contract.cases import LOW_RANK, Case, set_gradients
from subspan.optim import GaLore, create_optimizer, list_methods, method_info, param_groups

transformers = pytest.importorskip("transformers")


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    )


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return transformers.MixtralForCausalLM(config)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Conv2d(8, 12, 3)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)


def split(groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Names of projected and of dense parameters."""
    projected, dense = set(), set()
    for group in groups:
        names = {name for name, _ in group["params"]}
        projected |= names if group.get("rank") is not None else set()
        dense |= names if group.get("rank") is None else set()
    return projected, dense


def every_parameter_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    listed = [id(p) for group in groups for _, p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


def test_llama() -> None:
    model = llama()
    groups = param_groups(model, rank=4)
    every_parameter_once(model, groups)
    projected, dense = split(groups)
    hidden = re.compile(r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
    assert projected == {name for name, _ in model.named_parameters() if hidden.fullmatch(name)}
    assert len(projected) == 14
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < dense


def test_tied_weights_are_listed_once_and_dense() -> None:
    model = llama(tied=True)
    groups = param_groups(model, rank=4)
    every_parameter_once(model, groups)
    projected, dense = split(groups)
    assert "model.embed_tokens.weight" in dense and len(projected) == 14


def test_gpt2_conv1d() -> None:
    model = gpt2()
    groups = param_groups(model, rank=4)
    every_parameter_once(model, groups)
    projected, dense = split(groups)
    hidden = re.compile(r"transformer\.h\.\d\.(attn|mlp)\.c_\w+\.weight")
    assert projected == {name for name, _ in model.named_parameters() if hidden.fullmatch(name)}
    assert len(projected) == 8
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias"} < dense


def test_mixtral_experts_are_projected_as_stacks() -> None:
    model = mixtral()
    groups = param_groups(model, rank=4)
    every_parameter_once(model, groups)
    projected, _dense = split(groups)
    stacks = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert len(stacks) == 4 and stacks < projected
    assert len(projected) == len(stacks) + 8
    assert not [name for name in projected if re.search(r"embed|lm_head|norm", name)]
    optimizer = GaLore(groups, lr=0.01)
    set_gradients(dict(model.named_parameters()), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    for name in stacks:  # every expert gets an update of low rank of its own
        change = dict(model.named_parameters())[name].detach() - before[name]
        ranks = torch.linalg.matrix_rank(change.double(), rtol=1e-4)
        assert ranks.tolist() == [4, 4, 4]


def test_targets_by_name_and_by_expression() -> None:
    model = llama()
    projected, dense = split(param_groups(model, rank=4, target_modules=["q_proj", "down_proj"]))
    assert len(projected) == 4 and all(re.search("q_proj|down_proj", name) for name in projected)
    assert "model.layers.0.mlp.up_proj.weight" in dense
    expression, _ = split(param_groups(model, rank=4, target_modules=r"model\.layers\.1\..*_proj"))
    assert len(expression) == 7 and all(".1." in name for name in expression)


def test_excluded_modules_are_dense() -> None:
    projected, dense = split(param_groups(llama(), rank=4, exclude=["o_proj"]))
    assert len(projected) == 12
    assert "model.layers.1.self_attn.o_proj.weight" in dense


@pytest.mark.parametrize("targets", [["q_proj", "qq_proj"], r"nothing\..*", ["qq_proj"]], ids=str)
def test_a_pattern_that_matches_nothing_is_an_error(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"qq_proj|nothing"):
        param_groups(llama(), rank=4, target_modules=targets)
    with pytest.raises(ValueError, match="qq_proj"):
        param_groups(llama(), rank=4, exclude=["qq_proj"])


def test_nothing_to_project_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"[Nn]o"):
        param_groups(nn.Sequential(nn.LayerNorm(4), nn.Embedding(5, 4)), rank=4)


def test_a_target_without_a_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match="norm"):
        param_groups(llama(), rank=4, target_modules=["q_proj", "norm"])


def test_frozen_parameters_are_left_out() -> None:
    model = llama()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    groups = param_groups(model, rank=4)
    every_parameter_once(model, groups)
    assert len(split(groups)[0]) == 7


def test_convolutions_by_pattern() -> None:
    model = Convolutional()
    groups = param_groups(model, rank=4, target_modules=["block", "mix"])
    projected, _dense = split(groups)
    assert projected == {"block.weight", "mix.weight"}
    optimizer = GaLore(groups, lr=0.01)
    before = model.block.weight.detach().clone()
    set_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    change = (model.block.weight.detach() - before).flatten(1)
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 4


def test_a_one_dimensional_convolution_is_no_stack_of_experts() -> None:
    """Its weight (out, in, width) has three dimensions: flattened as other kernels are, or refused."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Conv1d(12, 16, 3))
    projected, _ = split(param_groups(model, rank=4))
    assert projected == {"0.weight"}
    try:
        groups = param_groups(model, rank=4, target_modules=["1"])
    except ValueError as error:
        assert "1.weight" in str(error)
        return
    before = model[1].weight.detach().clone()
    optimizer = GaLore(groups, lr=0.01)
    set_gradients(dict(model.named_parameters()), 0)
    optimizer.step()
    change = (model[1].weight.detach() - before).flatten(1)
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 4


def test_scales_and_decay_of_the_groups() -> None:
    model = llama()
    groups = param_groups(model, rank=4, lr_scale=0.5, other_lr_scale=2.0, update_proj_gap=50, scale=1.0)
    optimizer = GaLore(groups, lr=0.01)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.005 if group.get("rank") else 0.02)
        if group.get("rank"):
            assert (group["rank"], group["update_proj_gap"], group["scale"]) == (4, 50, 1.0)


def test_weight_decay_spares_vectors() -> None:
    """Norms and biases are not decayed; matrices are."""
    model = gpt2()
    optimizer = GaLore(param_groups(model, rank=4, weight_decay=0.1), lr=0.01)
    decayed = set()
    for group in optimizer.param_groups:
        decayed |= set(group["param_names"]) if group["weight_decay"] else set()
        assert group["weight_decay"] in (0.0, 0.1)
    assert decayed == {name for name, p in model.named_parameters() if p.ndim >= 2}


def test_a_misspelt_setting_raises_at_the_latest_in_the_optimizer() -> None:
    with pytest.raises((ValueError, TypeError), match="update_proj_gp"):
        GaLore(param_groups(llama(), rank=4, update_proj_gp=5), lr=0.01)


@pytest.mark.parametrize("method", list_methods())
def test_the_model_itself_is_accepted(method: str) -> None:
    sizes: dict[str | None, dict[str, Any]] = {"density": {"density": 0.25}, "rank": {"rank": 1}, None: {}}
    settings = sizes[method_info(method).size]
    torch.manual_seed(0)
    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer(method, model, lr=1e-2, **settings)
    held = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(held) == sorted(start)
    ids = torch.arange(48).reshape(3, 16) % 64
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_the_table_shows_what_is_projected(case: Case) -> None:
    model = llama()
    projected, dense = split(param_groups(model, rank=4))
    matrices = {name: p for name, p in model.named_parameters() if name in projected}
    rest = {name: p for name, p in model.named_parameters() if name in dense}
    table = case(case.groups(matrices, rest)).table()
    assert isinstance(table, str)
    for name in ("q_proj", "down_proj", "embed_tokens", "lm_head"):
        assert name in table
    for name, p in model.named_parameters():
        if name in projected:
            assert re.search(rf"{p.shape[0]}\s*[×x,]\s*{p.shape[1]}", table), name


class _WithHead(nn.Module):
    def __init__(self, vocabulary: int, width: int, outputs: int, *, first: bool = False) -> None:
        super().__init__()
        if first:
            self.head = nn.Linear(width, outputs)
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if not first:
            self.head = nn.Linear(width, outputs)
        self.value = nn.Linear(width, 1)


@pytest.mark.parametrize(
    ("vocabulary", "width", "outputs", "first"),
    [(100, 32, 100, True), (100, 32, 104, False), (256, 256, 256, False), (10, 32, 10, False)],
    ids=["registered first", "padded", "as wide as the model", "smaller than the model"],
)
def test_the_head_of_a_plain_model_stays_dense(vocabulary: int, width: int, outputs: int, first: bool) -> None:
    groups = param_groups(_WithHead(vocabulary, width, outputs, first=first), rank=4)
    targets = {name for name, _ in groups[0]["params"]}
    assert targets == {"attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"}


def test_classifiers_of_hugging_face_models_stay_dense() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    targets = {name for name, _ in param_groups(LlamaForSequenceClassification(config), rank=4)[0]["params"]}
    assert len(targets) == 7
    assert "score.weight" not in targets
