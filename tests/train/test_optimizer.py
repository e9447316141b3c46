from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from subspan.optim import GaLore, list_methods, method_info
from subspan.train.config import PretrainConfig
from subspan.train.optimizer import build_optimizer, check_optimizer, projected_names, resolve


def llama(**changes: Any) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=300, **changes))


def resolved(**changes: Any) -> PretrainConfig:
    return resolve(PretrainConfig(**changes), hidden_size=32)


def test_what_follows_from_the_method_and_the_model() -> None:
    assert (resolved().rank, resolved().lr) == (8, 0.01)
    assert resolved(steps=500).optimizer == {"update_proj_gap": 50}
    assert resolved(steps=100_000).optimizer == {"update_proj_gap": 200}
    assert resolved(optimizer={"update_proj_gap": 7, "scale": 1.0}).optimizer == {"update_proj_gap": 7, "scale": 1.0}
    assert resolved(method="apollo_mini").rank == 1
    assert resolved(method="frugal").rank is None
    assert (resolved(method="adamw").rank, resolved(method="adamw").optimizer) == (None, {})
    assert resolved(lr=0.5, rank=3).lr == 0.5
    assert resolved(rank=3).rank == 3


@pytest.mark.parametrize("method", list_methods())
def test_every_method_trains_with_its_defaults(method: str) -> None:
    model = llama()
    optimizer = build_optimizer(model, resolved(method=method, seed=5))
    assert type(optimizer) is method_info(method).optimizer
    assert optimizer.seed == 5
    assert len(projected_names(optimizer)) == (0 if method_info(method).size is None else 14)
    ids = torch.randint(0, 300, (2, 16))
    before = [p.detach().clone() for p in model.parameters()]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_settings_reach_the_groups() -> None:
    config = resolved(
        rank=4,
        lr=0.02,
        lr_scale=0.5,
        other_lr_scale=0.1,
        weight_decay=0.3,
        optimizer={"scale": 2.0, "betas": [0.5, 0.6]},
    )
    targets, others, vectors = groups = build_optimizer(llama(), config).param_groups
    assert (targets["rank"], targets["scale"], targets["lr"], targets["weight_decay"]) == (4, 2.0, 0.01, 0.3)
    assert (others["rank"], others["lr"], others["weight_decay"]) == (None, 0.002, 0.3)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.002, 0.0)
    assert all(list(group["betas"]) == [0.5, 0.6] for group in groups)


def test_targets_and_exclusions() -> None:
    optimizer = build_optimizer(llama(), resolved(target_modules=["q_proj", "v_proj"], exclude=["layers.0"]))
    assert projected_names(optimizer) == [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv"]


def test_convolutions_of_gpt2_are_projected() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300))
    names = projected_names(build_optimizer(model, resolved()))
    assert len(names) == 8
    assert all(re.search(r"c_(attn|proj|fc)\.weight", name) for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "galor"}, "'galor'.*'galore'"),
        ({"method": "adamw", "rank": 8}, "rank is 8, but the method 'adamw' projects nothing"),
        ({"method": "scale", "rank": 8}, "rank is 8, but the method 'scale' projects nothing"),
        ({"method": "scale", "optimizer": {"scal": 1.0}}, "'scal'"),
        ({"optimizer": {"scal": 1.0}}, "'scal'.*'scale'"),
        ({"optimizer": {"lr": 1.0}}, "lr is a setting of the run; give --lr"),
        ({"target_modules": ["nothing_proj"]}, "'nothing_proj'"),
        ({"method": "adamw", "optimizer": {"svd": "exact"}}, "svd"),
    ],
)
def test_settings_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(llama(), resolved(**changes))


def test_another_optimizer_than_asked_for_is_noticed() -> None:
    model = llama()
    config = resolved()
    check_optimizer(build_optimizer(model, config), config, model)
    with pytest.raises(RuntimeError, match="uses AdamW although GaLore was asked for"):
        check_optimizer(torch.optim.AdamW(model.parameters()), config, model)
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    with pytest.raises(RuntimeError, match="16 tensors are projected instead of 14"):
        check_optimizer(GaLore([{"params": matrices, "rank": 8}]), config, model)


@pytest.mark.parametrize("method", ["galore", "galore_8bit", "q_galore", "apollo", "apollo_mini"])
def test_short_runs_refresh_in_time(method: str) -> None:
    """Also where a recipe hands its settings on to another."""
    assert resolve(PretrainConfig(method=method, steps=100), 64).optimizer["update_proj_gap"] == 10
