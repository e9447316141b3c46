"""Restarts of adapters from peft: every kind that can be merged, and a reason for every kind that cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspan.nn.lowrank import PeftRestarts, PeriodicLoRA, ReLoRA, restart_peft

peft = pytest.importorskip("peft")

LAYERS = ["up", "down"]
#: Kinds that restart: class of the configuration and its settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "pissa_niter": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa_niter_4"}),
    "olora": ("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "orthogonal": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "gaussian": ("LoraConfig", {"r": 4, "init_lora_weights": "gaussian"}),
    "mica": ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}),
    "dropout_and_ranks": ("LoraConfig", {"r": 4, "lora_dropout": 0.2, "rank_pattern": {"down": 2}, "lora_bias": True}),
    "adalora": ("AdaLoraConfig", {"total_step": 100}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "pvera": ("PveraConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down"]}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "init_weights": True}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20}),
    "hira": ("HiraConfig", {"r": 4}),
    "c3a": ("C3AConfig", {"block_size": 4, "init_weights": True}),
    "miss": ("MissConfig", {"r": 4}),
    "shira": ("ShiraConfig", {"r": 4}),
    "road": ("RoadConfig", {"group_size": 8}),
    "layer_norms": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "delora": ("DeloraConfig", {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "osf": ("OSFConfig", {}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "glora": ("GloraConfig", {"r": 4}),
    "deft": ("DeftConfig", {"r": 4}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "supertuning": ("SupertuningConfig", {}),
    "beft": ("BeftConfig", {}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "random B": ("LoraConfig", {"r": 4, "init_lora_weights": False}, "changes the model before it has learnt"),
    "eva": ("LoraConfig", {"r": 4, "init_lora_weights": "eva"}, "needs data"),
    "odd reflections": ("HRAConfig", {"r": 3}, "changes the model before it has learnt"),
    "random spectrum": ("FourierFTConfig", {"n_frequency": 20}, "begin it at zero"),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 4, "topk": 2}, "is shared with another"),
    "unilora": ("UniLoraConfig", {"r": 4}, "is shared with another layer"),
    "lily": ("LilyConfig", {"r": 4}, "cannot be merged"),
    "frod": ("FrodConfig", {}, "changes the model before it has learnt"),
    "adamss": ("AdamssConfig", {"r": 4}, "cannot be restarted"),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.norm(self.up(x))))
        return y


def adapted(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    try:
        return peft.get_peft_model(Network().to(dtype), getattr(peft, kind)(**{"target_modules": LAYERS, **settings}))
    except ValueError as error:
        if "Unknown initialization" not in str(error):
            raise
        pytest.skip(f"this peft: {error}")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(weights: PeftRestarts, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[str]:
    lines = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, 8, 16, generator=generator)
        x = x.to(next(weights.model.parameters()).dtype)
        optimizer.zero_grad()
        (weights.model(x) - y).square().mean().backward()
        optimizer.step()
        lines += weights.end_step(step, optimizer)
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_the_base_moves_and_gradients_flow(kind: str) -> None:
    model = adapted(*KINDS[kind])
    weights = restart_peft(model, ReLoRA(restart_every=4, rewarm=0))
    optimizer, x = optimizer_of(model), torch.randn(8, 16)
    train(weights, optimizer, 0, 3)
    before, trained = copy.deepcopy(model).eval(), list(weights.factors().values())
    bases = {name: copy.deepcopy(layer.layer.get_base_layer().state_dict()) for name, layer in weights.layers.items()}
    weights.restart(3)
    model.eval()
    assert (model(x) - before(x)).abs().max() <= 1e-5
    model.train()
    assert all(p is q for p, q in zip(trained, weights.factors().values(), strict=True))  # the optimizer has them
    assert all(layer._merged is None for layer in weights.layers.values())  # nor is a second weight kept
    for name, layer in weights.layers.items():
        after = layer.layer.get_base_layer().state_dict()
        assert any(not torch.equal(value, bases[name][key]) for key, value in after.items())
    model(x).square().mean().backward()
    for layer in weights.layers.values():
        assert max(float(p.grad.norm()) for p in layer.factors().values() if p.grad is not None) > 0
    # Export: an ordinary network.
    train(weights, optimizer, 3, 6)
    model.eval()
    out = model(x)
    weights.merge()
    assert [type(module) for module in model.base_model.model.children()] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert (model.base_model.model(x) - out).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_cannot(kind: str) -> None:
    if kind == "adamss":
        pytest.importorskip("sklearn")  # which peft needs for it
    config, settings, message = REFUSED[kind]
    model = adapted(config, settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        restart_peft(model, ReLoRA(restart_every=4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_and_settings_that_cannot() -> None:
    recipe = ReLoRA(restart_every=4)
    with pytest.raises(ValueError, match="Network has no adapter layers"):
        restart_peft(Network(), recipe)
    model = adapted(*KINDS["lora"])
    for other in (ReLoRA(restart_every=4, full_rank_steps=3), ReLoRA(lazy=0.1), PeriodicLoRA(momentum=0.5)):
        with pytest.raises(ValueError, match="is a setting of layers that"):
            restart_peft(model, other, steps=20)
    model.merge_adapter()
    with pytest.raises(ValueError, match="up is merged"):
        restart_peft(model, recipe)
    model.unmerge_adapter()
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="restart one of them"):
        restart_peft(model, recipe)


def test_tied_weights_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head: .*is shared with another layer"):
        restart_peft(model, ReLoRA(restart_every=4))


def test_other_layers_and_adapters() -> None:
    """Convolutions and embeddings restart too; an adapter that is not active stays as it is."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 8), nn.Unflatten(1, (4, 2)), nn.Conv1d(4, 6, 1), nn.Flatten())
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    model = peft.get_peft_model(base, config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["2"]))
    idle = model.base_model.model[2].lora_A["other"].weight
    weights, x, there = restart_peft(model, ReLoRA(restart_every=4)), torch.arange(10), idle.detach().clone()
    assert len(weights.factors()) == 4
    for factor in weights.factors().values():
        factor.data.normal_(std=0.1)
    before, conv = model(x), model.base_model.model[2].get_base_layer().weight.detach().clone()
    weights.restart(3)
    assert (model(x) - before).abs().max() <= 1e-5 and torch.equal(idle, there)
    assert not torch.equal(model.base_model.model[2].get_base_layer().weight, conv)


def test_draws_follow_from_the_seed_alone() -> None:
    found = []
    for noise in (1, 2):
        model = adapted(*KINDS["lora"])
        weights = restart_peft(model, ReLoRA(restart_every=4), seed=7)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        weights.restart(3)
        assert torch.equal(torch.get_rng_state(), before)  # nor do other draws notice
        found.append(model.base_model.model.up.lora_A["default"].weight.detach())
    assert torch.equal(*found)
    weights.restart(7)
    assert not torch.equal(model.base_model.model.up.lora_A["default"].weight, found[0])


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_resuming_is_exact(kind: str) -> None:
    def build() -> tuple[PeftRestarts, torch.optim.Optimizer]:
        model = adapted(*KINDS[kind])
        return restart_peft(model, PeriodicLoRA(restart_every=4)), optimizer_of(model)

    whole, optimizer = build()
    train(whole, optimizer, 0, 6)
    saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict()))
    lines = train(whole, optimizer, 6, 11)
    assert lines == ["restart 2: 2 layers merged, 100.0 % of the optimizer state pruned"]
    resumed, other = build()
    resumed.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, 6, 11)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bfloat16_weights_are_rounded_once(rounding: Any) -> None:
    model = adapted("LoraConfig", {"r": 4}, torch.bfloat16)
    weights = restart_peft(model, ReLoRA(restart_every=4, rounding=rounding))
    layer = model.base_model.model.up
    start, delta = layer.weight.detach().float().clone(), 1e-4  # less than half a gap for most weights
    for cycle in range(40):
        layer.lora_A["default"].weight.data.fill_(1.0)
        layer.lora_B["default"].weight.data.fill_(delta / 8)  # alpha/r = 2, r = 4
        weights.restart(cycle)
    assert layer.weight.dtype == torch.bfloat16
    share = float((layer.weight.float() - start).mean() / (40 * delta))
    assert share == pytest.approx(1, abs=0.1) if rounding == "stochastic" else share < 0.5


def test_new_factors_are_rounded_to_nearest() -> None:
    drawn = []
    for rounding in ("nearest", "stochastic"):
        model = adapted(*KINDS["lora"]).to(torch.bfloat16)
        restart_peft(model, ReLoRA(restart_every=4, rounding=rounding)).restart(3)  # type: ignore[arg-type]
        drawn.append(model.base_model.model.up.lora_A["default"].weight)
    assert drawn[0].dtype == torch.bfloat16 and torch.equal(*drawn)
