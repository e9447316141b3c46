"""Layers with one input that share a basis: they train as one wide layer, and xQ is kept once."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from references.late import LateGaLoreReference
from references.quantised import linear_levels, quantised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspan.linalg import gaussian_sketch, random_stiefel, seeded_generator
from subspan.memory import MemoryTrace
from subspan.nn import project_gradients
from subspan.optim import GaLore, GoLore, QGaLore, late, param_groups, refreshing

GAP = 4
OUT = {"q_proj": 24, "k_proj": 16, "v_proj": 12}


class Attention(nn.Module):
    """Three layers with one input, and one that has another; ``narrow`` has its output side projected."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, width, bias=False) for width in OUT.values())
        self.o_proj = nn.Linear(52, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x, (12,))
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.cat([torch.tanh(q), torch.sigmoid(k), v], dim=-1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
        return x


def build(model: nn.Module, cls: Any = GaLore, share: bool = True, **settings: Any) -> Any:
    groups = param_groups(model, rank=4, update_proj_gap=GAP)
    optimizer = cls(groups, lr=1e-2, weight_decay=0.1, min_quantized=1, **settings)
    project_gradients(model, optimizer, share_inputs=share)
    return optimizer


def train(model: nn.Module, optimizer: Any, steps: range = range(3 * GAP), pieces: int = 1, **how: Any) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, 12, generator=generator), torch.randn(8, 3, 12, generator=generator)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(part, **how) - target).square().mean() / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(("storage", "warm"), [("float32", 0), ("int8", 0), ("float32", 3), ("int8", 2)])
def test_they_train_as_one_wide_layer(storage: str, warm: int) -> None:
    """The reference is the loop of one matrix, given the stacked gradients and the stacked test matrices."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(12, width, bias=False) for name, width in OUT.items()})
    numbers: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    group = {"params": list(layers.named_parameters()), "rank": 4, "update_proj_gap": GAP, "min_quantized": 1}
    settings: dict[str, Any] = {"basis_storage": storage, "warm_start": warm / 4, **numbers}
    optimizer = GaLore([group], refresh="late", stagger=False, seed=5, **settings)
    project_gradients(layers, optimizer, share_inputs=True)
    assert set(optimizer._sharing) == {f"{name}.weight" for name in OUT}
    drawn = iter(range(10**6))

    def test(G: Tensor, rank: int) -> Tensor:
        count = next(drawn)
        keys = [(5, f"{name}.weight", count) for name in OUT]
        parts = zip(OUT.values(), keys, strict=True)
        return torch.cat([gaussian_sketch(n, rank, generator=seeded_generator(*key)) for n, key in parts])

    reference = LateGaLoreReference(
        start=lambda G, rank: random_stiefel(12, rank, generator=seeded_generator(5, "q_proj.weight", "start")),
        test=test,
        hold=None if storage == "float32" else lambda Q: quantised(Q, linear_levels(8), block=256),
        warm=warm,
        rank=4,
        update_proj_gap=GAP,
        **numbers,
    )
    W = torch.cat([layers[name].weight for name in OUT]).detach().double()
    start = W.clone()
    # Of unlike size, so that their parts of a direction are of unlike length.
    scales = torch.cat([torch.full((n,), scale) for n, scale in zip(OUT.values(), (1.0, 0.1, 0.5), strict=True)])
    for step in range(4 * GAP):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(40, 12, generator=generator) * torch.logspace(0, -2, 12)
        C = torch.randn(40, sum(OUT.values()), generator=generator) * scales
        W = reference.step(W, C.double().mT @ x.double())
        outputs = torch.cat([layers[name](x) for name in OUT], dim=-1)
        (outputs * C).sum().backward()
        optimizer.step()
        found = torch.cat([layers[name].weight for name in OUT]).detach().double()
        assert (found - W).abs().max() < 1e-5, f"step {step}"
    assert (W - start).abs().max() > 1e-2


SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (GaLore, {}),
    (GaLore, {"warm_start": 0.5, "refresh": "late", "basis_storage": "int4"}),
    (QGaLore, {"queue_size": 1, "cos_threshold": 0.0}),
    (GoLore, {"golore_after": 6}),
    (GoLore, {}),
]
settings = pytest.mark.parametrize(("cls", "own"), SETTINGS, ids=str)


@settings
def test_bases_stay_the_same_and_a_resumed_run_too(cls: Any, own: dict[str, Any]) -> None:
    model = Model()
    optimizer = build(model, cls, **own)
    assert optimizer._sharing.keys() == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in OUT}
    train(model, optimizer, range(6))
    other = Model()
    other.load_state_dict(model.state_dict())
    continued = build(other, cls, **own)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6, 4 * GAP):
        train(model, optimizer, range(step, step + 1))
        for layer in model.layers:
            states = [optimizer.state[getattr(layer, name).weight] for name in OUT]
            for key in ("basis", "step", "refreshes", "next_refresh"):
                assert all(torch.equal(states[0][key], state[key]) for state in states), (step, key)
    train(other, continued, range(6, 4 * GAP))
    assert difference(model, other) == 0
    assert optimizer.state_bytes() == optimizer.planned_state_bytes()


@settings
def test_micro_batches_recomputation_and_compilation_change_no_more_than_rounding(
    cls: Any, own: dict[str, Any]
) -> None:
    plain = Model()
    train(plain, build(plain, cls, stagger=False, **own))
    for how in ({"pieces": 4}, {"recompute": True}):
        model = Model()
        train(model, build(model, cls, stagger=False, **own), **how)  # type: ignore[arg-type]
        assert difference(plain, model) < (2e-4 if "pieces" in how else 1e-12)
    if cls is GaLore:
        model = Model()
        optimizer = build(model, cls, stagger=False, **own)
        train(torch.compile(model, backend="aot_eager"), optimizer)  # type: ignore[arg-type]
        assert difference(plain, model) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projected_input_is_kept_once(dtype: torch.dtype) -> None:
    def kept(share: bool) -> int:
        layer = Attention().to(dtype)
        optimizer = build(layer, share=share, stagger=False)
        inputs = torch.randn(512, 12).to(dtype)
        layer(inputs).sum().backward()
        optimizer.step()
        storages: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape == (512, 4):
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(inputs)
        return len(storages)

    assert kept(share=False) == 3
    assert kept(share=True) == 1


def test_a_product_is_known_for_one_input_and_one_basis_only() -> None:
    layer = Attention()
    optimizer = build(layer, stagger=False)
    x = torch.randn(8, 12)
    slots = layer.q_proj.gradient_slots
    for step in range(3):  # the input is changed in place, the basis by a step, the tensor stays the same
        (layer.q_proj(x).sum() + layer.k_proj(x).sum() + layer.v_proj(x).sum()).backward()
        expected = (x @ slots.basis).mT @ torch.ones(8, 24)
        assert (slots.R.value - expected).abs().max() < 1e-4, step
        optimizer.zero_grad()
        x.mul_(2.0)
        other = 3 * x
        (layer.q_proj(x).sum() + layer.k_proj(other).sum() + layer.v_proj(x).sum()).backward()
        expected = (other @ slots.basis).mT @ torch.ones(8, 16)
        assert (layer.k_proj.gradient_slots.R.value - expected).abs().max() < 1e-3, step
        optimizer.step()


def test_a_product_does_not_outlive_its_pass() -> None:
    """Neither with batches that stay in memory, nor until backward where it is computed again, nor with the input."""
    layer = Attention()
    optimizer = build(layer, stagger=False)
    train(layer, optimizer, range(1))
    inputs = [torch.randn(512, 12) for _ in range(3)]
    with MemoryTrace() as trace:
        layer.q_proj(inputs[0])
        layer.k_proj(inputs[0])
        assert trace.allocated >= 4 * 512 * 4
        optimizer.zero_grad()
        weights = trace.allocated  # the storages of weights, which a trace counts once it has seen them
        assert weights < 4 * 512 * 4
        for x in inputs:
            for name in OUT:
                getattr(layer, name)(x)
            assert not vars(x)
        gc.collect()
        weights += layer.v_proj.weight.untyped_storage().nbytes()
        assert trace.allocated == weights
        x = torch.zeros(512, 12)
        layer.q_proj(x)
        del x
        gc.collect()
        assert trace.allocated == weights
        y = checkpoint(layer, inputs[0], use_reentrant=False)
        gc.collect()
        assert trace.allocated < weights + y.untyped_storage().nbytes() + 4096


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_basis_is_found_once_for_all(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"orthonormalize": 0, "turned": 0}

    def counted(module: Any, name: str) -> None:
        found = getattr(module, name)

        def count(*args: Any) -> Any:
            counts[name] += 1
            return found(*args)

        monkeypatch.setattr(module, name, count)

    layer = Attention()
    optimizer = build(layer, stagger=False, basis_storage=storage)
    counted(late, "orthonormalize")
    counted(late if storage == "int8" else refreshing, "turned")
    train(layer, optimizer, range(2))
    assert counts == {"orthonormalize": 2, "turned": 2}  # of q, k and v together, and of o


def test_layers_of_different_groups_do_not_share() -> None:
    layer = Attention()
    others = [f"{name}.weight" for name in (*OUT, "o_proj") if name != "q_proj"]
    named = dict(layer.named_parameters())
    groups = [
        {"params": [("q_proj.weight", named["q_proj.weight"])], "rank": 4, "lr": 1e-3},
        {"params": [(name, named[name]) for name in others], "rank": 4},
        {"params": [("o_proj.bias", named["o_proj.bias"])]},
    ]
    optimizer = GaLore(groups)
    assert len(project_gradients(layer, optimizer, share_inputs=True)) == 4
    assert set(optimizer._sharing) == {"k_proj.weight", "v_proj.weight"}
    train(layer, optimizer, range(2))


def test_sharing_again_changes_nothing() -> None:
    one, other = Model(), Model()
    ours, reference = build(one), build(other)
    for step, again in enumerate((True, False, True, False)):
        train(one, ours, range(step, step + 1))
        project_gradients(one, ours, share_inputs=again)
        assert all(layer.q_proj.gradient_slots.shared is not None for layer in one.layers)
    train(other, reference, range(4))
    assert difference(one, other) == 0
    model = Model()
    optimizer = build(model, share=False)
    project_gradients(model, optimizer, share_inputs=True)
    train(model, optimizer, range(4))
    assert difference(model, other) == 0


@pytest.mark.parametrize("proj_type", ["left", "reverse_std"])
def test_nothing_to_share_is_refused(proj_type: str) -> None:
    layer = Attention()
    optimizer = GaLore(param_groups(layer, rank=4, proj_type=proj_type))
    with pytest.raises(ValueError, match="share_inputs=True, but Attention has no layers beside each other"):
        project_gradients(layer, optimizer, share_inputs=True)


def test_what_cannot_be_shared_is_refused() -> None:
    model = Model()
    optimizer = build(model, share=False)
    names = [f"layers.0.{name}.weight" for name in OUT]
    for bad in (names[:1], [*names, "layers.0.o_proj.bias"]):
        with pytest.raises(ValueError, match="a basis is shared by two parameters or more"):
            optimizer.share_basis(bad)
    with pytest.raises(ValueError, match="on one side and of one length"):
        optimizer.share_basis([names[0], "layers.0.o_proj.weight"])
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="different bases or clocks"):
        optimizer.share_basis(names)
    shared = build(copy.deepcopy(model))
    before = copy.deepcopy(shared.state_dict()["state"])
    with pytest.raises(ValueError, match="load what a run wrote that shared"):
        shared.load_state_dict(optimizer.state_dict())
    after = shared.state_dict()["state"]
    assert all(torch.equal(after[i][key], value) for i, state in before.items() for key, value in state.items())


def test_a_nan_skips_all_that_share_and_a_missing_gradient_is_refused() -> None:
    layer = Attention()
    optimizer = build(layer)
    train(layer, optimizer, range(2))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, 12)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    (q.sum() + k.sum() * float("nan") + v.sum()).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    said = [str(warning.message) for warning in caught if "the gradient holds NaN" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("k_proj.weight: the gradient holds NaN")
    assert "and q_proj.weight and v_proj.weight" in said[0]
    assert optimizer.skipped_steps == 3  # weights that were left alone
    assert all(torch.equal(getattr(layer, name).weight, before[f"{name}.weight"]) for name in OUT)
    (layer.q_proj(x).sum() + layer.v_proj(x).sum()).backward()
    with pytest.raises(RuntimeError, match="can only be stepped together"):
        optimizer.step()
    optimizer.zero_grad()
    train(layer, optimizer, range(2, 6))
