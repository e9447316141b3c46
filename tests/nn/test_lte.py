from __future__ import annotations

import copy
import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from references.lte import LTEReference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspan.linalg import seeded_generator
from subspan.nn.lowrank import LTE, low_rank_layers, weight_recipe
from subspan.nn.lowrank.replicas import Replicas, mean
from subspan.optim import AdamW, create_optimizer

from .test_heads import Tied, gpt2, llama, stir, tokens


class Net(nn.Module):
    """Two layers that get heads, and parameters that do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Linear(10, 12), nn.LayerNorm(12)
        self.second, self.out = nn.Linear(12, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(self.norm(self.first(x)))))


TARGETS = ["first", "second"]


def data(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 10, generator=torch.Generator().manual_seed(50 + step))


def loss(model: Any, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


def optimizer_of(weights: Any, lr: float = 0.01) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in weights.model.named_parameters() if p.requires_grad]
    return AdamW([{"params": named}], lr=lr)


def train(weights: Any, optimizer: torch.optim.Optimizer, steps: range, batch=data, max_norm: float = 0.0) -> None:
    for step in steps:
        weights.begin_step(step)
        loss(weights.model, batch(step)).backward()
        weights.before_step(step)
        if max_norm:
            weights.clip_grad_norm_(max_norm)
        optimizer.step()
        weights.end_step(step, optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("reset", [False, True])
def test_it_follows_a_plain_loop(reset: bool) -> None:
    model = Net()
    reference_model = copy.deepcopy(model)
    recipe = LTE(heads=4, rank=3, alpha=6, merge_every=3, reset=reset)
    weights = recipe.apply(model, target_modules=TARGETS, seed=5)
    layers = dict(low_rank_layers(model))
    drawn: dict[tuple[str, int], Tensor] = {}

    def fresh(name: str, step: int, head: int) -> Tensor:
        if (name, step) not in drawn:
            like = copy.deepcopy(layers[name])
            like.reset_(seeded_generator(5, "weights", name, step))
            drawn[name, step] = like.lora_A.detach()
        return drawn[name, step][head]

    factors = {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in layers.items()}
    reference = LTEReference(
        reference_model, factors, scale=2.0, merge_every=3, lr=0.01, fresh=fresh if reset else None
    )
    optimizer = optimizer_of(weights)
    for step in range(8):
        train(weights, optimizer, range(step, step + 1))
        reference.step(step, list(data(step).chunk(4)), loss)
        for name, layer in layers.items():
            assert torch.allclose(layer.W, reference.W[name], atol=2e-6), (step, name)
            for n in range(4):
                assert torch.allclose(layer.lora_A[n], reference.A[n][name], atol=2e-5), (step, name, n)
                assert torch.allclose(layer.lora_B[n], reference.B[n][name], atol=2e-5), (step, name, n)
        for n in range(4):
            for name in ("norm", "out"):
                mine = model.get_submodule(name).copies[str(n)].state_dict()
                for key, value in reference.workers[n].get_submodule(name).state_dict().items():
                    assert torch.allclose(mine[key], value, atol=1e-5), (step, name, n)
            assert torch.allclose(model.first.bias[n], reference.workers[n].first.bias, atol=1e-5)


def test_one_head_merged_every_step_is_lora() -> None:
    lte, lora = Net(), Net()
    first = LTE(heads=1, rank=3, alpha=6, merge_every=1).apply(lte, target_modules=TARGETS)
    second = weight_recipe("mhlora", heads=1, rank=3, alpha=6).apply(lora, target_modules=TARGETS)
    optimizers = optimizer_of(first), optimizer_of(second)
    for step in range(10):
        train(first, optimizers[0], range(step, step + 1))
        loss(lora, data(step)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for name in TARGETS:
            mine, theirs = lte.get_submodule(name).effective_weight(), lora.get_submodule(name).effective_weight()
            assert torch.allclose(mine, theirs, atol=2e-6)
    assert torch.allclose(lte.eval()(data(0)), lora.eval()(data(0)), atol=1e-5)


def test_heads_with_the_same_data_merged_every_step_are_multi_head_lora() -> None:
    lte, lora = Net(), Net()
    first = LTE(heads=4, rank=3, alpha=6, merge_every=1, others="shared").apply(lte, target_modules=TARGETS)
    second = weight_recipe("mhlora", heads=4, rank=3, alpha=6).apply(lora, target_modules=TARGETS)
    optimizers = optimizer_of(first), optimizer_of(second)

    def same(step: int) -> Tensor:
        return data(step, 2).repeat(4, 1)

    for step in range(10):
        train(first, optimizers[0], range(step, step + 1), same)
        loss(lora, same(step)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for name in TARGETS:
            mine, theirs = lte.get_submodule(name).effective_weight(), lora.get_submodule(name).effective_weight()
            assert torch.allclose(mine, theirs, atol=5e-6), step


@pytest.mark.parametrize("others", ["replicated", "shared"])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_after_a_merge_every_head_has_the_same_weight(make, reset: bool, others: str) -> None:
    model = make()
    recipe = weight_recipe("lte", heads=4, rank=3, alpha=9, merge_every=2, reset=reset, others=others)
    x = tokens()
    before = model(x).logits
    weights = recipe.apply(model, target_modules="attention+mlp+logit")
    assert torch.allclose(model(x).logits, before, atol=1e-6)
    optimizer = optimizer_of(weights, 0.005)
    for step in range(4):
        model(input_ids=x, labels=x).loss.backward()
        learns = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        for name in weights.layers:  # after wrapping, and after a merge
            assert {f"{name}.lora_A", f"{name}.lora_B"} & learns, name
        optimizer.step()
        if step % 2:
            mean = model.eval()(x).logits
            model.train()
            assert weights.end_step(step, optimizer) == [f"merge {(step + 1) // 2}: 4 heads averaged"]
            after = model(x).logits  # each sequence by its own head
            assert torch.allclose(after, mean, atol=5e-6)
            for layer in weights.layers.values():
                D = layer.lora_B.mT @ layer.lora_A
                if layer.merged_A is not None:
                    D = D - layer.merged_B.mT @ layer.merged_A
                assert float(D.abs().max()) < 1e-6
        else:
            assert weights.end_step(step, optimizer) == []
        optimizer.zero_grad()
    assert (after - before).abs().max() > 1e-2
    weights.merge()
    assert not [m for m in model.modules() if isinstance(m, Replicas)]
    assert torch.allclose(model(x).logits, after, atol=1e-5) and model(x[:3]).logits.shape[0] == 3
    if make is gpt2:
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_moments_begin_anew_in_place_after_a_reset() -> None:
    weights = LTE(heads=4, rank=3, alpha=6, merge_every=3, reset=True).apply(Net(), target_modules=TARGETS)
    optimizer = optimizer_of(weights)
    train(weights, optimizer, range(2))
    held = optimizer.state_bytes()
    train(weights, optimizer, range(2, 3))
    assert optimizer.state_bytes() == held == optimizer.planned_state_bytes()
    for factor in weights.factors().values():
        state = optimizer.state[factor]
        assert all(not value.any() for value in state.values() if isinstance(value, Tensor))


class Tables(nn.Module):
    """Positions without a place for the sequences, a module called by name, and one with several results."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.act = nn.Parameter(torch.linspace(0.5, 1.5, 12)), nn.Tanh()

        def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
            return self.gain * self.act(x), self.gain * shift

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.places = nn.Embedding(20, 12), nn.Embedding(9, 12)
        self.layer, self.pair = nn.Linear(12, 12), Tables.Pair()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        left, right = self.pair(x.flatten(0, 1), shift=x.flatten(0, 1))
        return (left - right).view(x.shape)


def test_copies_of_modules_that_are_called_in_other_ways() -> None:
    ids = torch.arange(24).remainder(20).view(8, 3)
    whole = Tables()
    expected = whole(ids)
    weights = LTE(heads=4, rank=2, alpha=2, merge_every=1).apply(Tables())
    assert torch.allclose(weights.model(ids), expected, atol=1e-6)
    expected.square().mean().backward()
    weights.model(ids).square().mean().backward()
    for name in ("places.weight", "pair.gain"):
        module, _, child = name.partition(".")
        copies = weights.model.get_submodule(module).copies.values()
        parts = [getattr(copy, child).grad for copy in copies]
        assert not torch.equal(parts[0], parts[1])
        assert torch.allclose(sum(parts), whole.get_parameter(name).grad, atol=1e-6), name
    with pytest.raises(RuntimeError, match="given 8 numbers, of 8 sequences or of as many positions"):
        weights.model(torch.zeros(8, 8, dtype=torch.int64))


def test_running_means_of_copies_are_averaged() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    weights = LTE(heads=4, rank=2, merge_every=1).apply(model, target_modules=["0"])
    model(data(0, 16))
    copies = list(model[1].copies.values())
    mean = sum(copy.running_mean for copy in copies) / 4
    assert not torch.allclose(copies[0].running_mean, mean)
    weights.end_step(0, optimizer_of(weights))
    assert all(torch.allclose(copy.running_mean, mean) for copy in copies)


def test_what_is_exported_between_merges_is_the_mean_of_the_heads() -> None:
    weights = LTE(heads=4, rank=3, alpha=6, merge_every=100).apply(Net(), target_modules=TARGETS)
    train(weights, optimizer_of(weights, 0.1), range(5))
    x = data(9, 3)
    expected = weights.model.eval()(x)
    weights.merge()
    assert torch.allclose(weights.model(x), expected, atol=1e-5)


def test_a_tied_embedding_looks_up_the_rows_of_each_head() -> None:
    model, ids = Tied(), tokens()
    plain = copy.deepcopy(model)
    recipe = LTE(heads=2, rank=2, alpha=4, others="shared")
    layer: Any = recipe.apply(model, target_modules="logit").layers["head"]
    stir(model)
    found = model(ids)
    for head, part in enumerate(ids.chunk(2)):
        news = layer.lora_B[head].T @ layer.lora_A[head] - layer.merged_B[head].T @ layer.merged_A[head]
        W = (layer.weight + 2.0 * news).detach()
        tied = {f"{name}.weight": W for name in ("source", "target", "head")}
        expected = torch.func.functional_call(plain, tied, (part,), tie_weights=False)
        assert torch.allclose(found.chunk(2)[head], expected, atol=1e-5)


def test_copies_stay_tied_where_the_modules_were() -> None:
    model = gpt2()
    weights = LTE(heads=2, rank=2, alpha=2, merge_every=1).apply(model, target_modules="attention")
    heads, embeddings = model.lm_head.copies, model.transformer.wte.copies
    assert all(heads[n].weight is embeddings[n].weight for n in ("0", "1"))
    assert heads["0"].weight is not heads["1"].weight
    weights.merge()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_means_of_bfloat16_are_summed_in_float32() -> None:
    values = (256.0, 1.0, 1.0, 1.0, 1.0)  # bfloat16 does not have 257
    assert mean([torch.full((3,), value, dtype=torch.bfloat16) for value in values], 5).tolist() == [52.0] * 3


@pytest.mark.parametrize("reset", [False, True])
def test_a_run_that_is_stopped_between_merges_continues_bit_by_bit(reset: bool) -> None:
    def fresh() -> tuple[Any, Any]:
        weights = LTE(heads=4, rank=3, alpha=6, merge_every=3, reset=reset).apply(Net(), target_modules=TARGETS)
        return weights, optimizer_of(weights)

    whole, optimizer = fresh()
    train(whole, optimizer, range(10))
    first, stopped = fresh()
    train(first, stopped, range(5))
    second, resumed = fresh()
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    train(second, resumed, range(5, 10))
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_each_head_is_clipped_by_its_own_norm() -> None:
    weights = LTE(heads=4, rank=3, alpha=6).apply(Net(), target_modules=TARGETS)
    x = data(0)
    x[2:4] *= 100  # of the second head
    loss(weights.model, x).backward()
    before = {n: p.grad.clone() for n, p in weights.model.named_parameters() if p.grad is not None}
    norm = weights.clip_grad_norm_(1e6)
    assert all(torch.equal(p.grad, before[n]) for n, p in weights.model.named_parameters() if n in before)
    weights.clip_grad_norm_(5.0)
    own = []
    for head in range(4):
        parts = [p.grad[head] for n, p in weights.model.named_parameters() if "lora_" in n or n == "first.bias"]
        parts += [p.grad for n, p in weights.model.named_parameters() if f"copies.{head}." in n]
        own.append(4 * float(torch.cat([part.flatten() for part in parts]).norm()))
    assert own[1] == pytest.approx(5.0, rel=1e-4) and all(value < 5 for i, value in enumerate(own) if i != 1)
    assert float(norm) > 50
    assert torch.equal(weights.model.get_submodule("norm").copies["0"].weight.grad, before["norm.copies.0.weight"])


def test_what_heads_share_is_clipped_by_its_own_norm() -> None:
    weights = LTE(heads=4, rank=3, alpha=6, others="shared").apply(Net(), target_modules=TARGETS)
    loss(weights.model, 100 * data(0)).backward()
    heads, shared = [], []
    for name, parameter in weights.model.named_parameters():
        if parameter.grad is not None:
            (heads if "lora_" in name else shared).append(parameter.grad)
    own = torch.stack([4 * torch.cat([part[head].flatten() for part in heads]).norm() for head in range(4)])
    whole = torch.cat([gradient.flatten() for gradient in shared]).norm()
    assert own.min() > 1 and whole > 1
    assert torch.allclose(weights.clip_grad_norm_(1.0), own.square().mean().sqrt())
    for head in range(4):
        assert float(4 * torch.cat([part[head].flatten() for part in heads]).norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(torch.cat([gradient.flatten() for gradient in shared]).norm()) == pytest.approx(1.0, rel=1e-4)


def test_amp_gives_the_gradients_of_float32() -> None:
    grads = []
    for enabled in (False, True):
        model, x = llama(), tokens()
        weights = LTE(heads=4, rank=3, alpha=3).apply(model)
        for layer in weights.layers.values():
            nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0), std=0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = model(input_ids=x, labels=x).loss
        value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in weights.factors().values()]))
    assert grads[1].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[0].norm()


def test_bfloat16_weights_follow_float32_ones() -> None:
    """Merges whose mean is below half a unit of bfloat16 are not lost."""
    W0 = Net().first.weight.detach().clone()
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = Net().bfloat16()
        weights = LTE(heads=2, rank=3, alpha=3, merge_every=1, rounding=rounding).apply(model, target_modules=["first"])
        layer = weights.layers["first"]
        with torch.no_grad():
            layer.lora_A.fill_(1.0)
            layer.merged_A.fill_(1.0)
        for step in range(300):  # each merge adds 3·2⁻¹⁵ to every weight
            with torch.no_grad():
                layer.merged_B.copy_(layer.lora_B)
                layer.lora_B.copy_(layer.merged_B).add_(2.0**-15)
                layer.merged_B.zero_()
                layer.lora_B.fill_(2.0**-15)
            weights.merge_heads(step, optimizer_of(weights))
        moved[rounding] = float((layer.W.float() - W0).mean())
    assert moved["stochastic"] == pytest.approx(300 * 3 * 2.0**-15, rel=0.15)
    assert abs(moved["nearest"]) < 0.5 * moved["stochastic"]


def test_each_layer_and_each_merge_is_rounded_by_draws_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
    weights = LTE(heads=1, rank=1, alpha=1, merge_every=1, reset=True).apply(model)
    moved = []
    for step in range(2):
        for layer in weights.layers.values():
            layer.weight.fill_(1.0)
            layer.lora_A.data.fill_(1.0)
            layer.lora_B.data.fill_(2**-8)  # half the gap above 1
        weights.merge_heads(step, optimizer_of(weights))
        moved += [layer.weight > 1 for layer in weights.layers.values()]
    assert all(0.4 < float((one == other).float().mean()) < 0.6 for one, other in itertools.combinations(moved, 2))


def test_bad_use_is_named() -> None:
    for setting, value in (("merge_every", 0), ("others", "both"), ("rounding", "up")):
        with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
            weight_recipe("lte", **{setting: value})
    weights = LTE(heads=4, rank=2).apply(Net(), target_modules=TARGETS)
    with pytest.raises(ValueError, match="4 parallel heads cannot divide a batch of 6 sequences"):
        weights.model(data(0, 6))
    weights.model.eval()(data(0, 6))

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:5])

    routed = LTE(heads=4, rank=2).apply(Routed())
    with pytest.raises(RuntimeError, match="given 5 rows of a batch of 8 sequences"):
        routed.model(data(0))
    tied = LTE(heads=2, rank=2).apply(Tied(), target_modules="logit")
    embedding: Any = tied.model.get_submodule("source")
    tied.model(tokens())
    with pytest.raises(RuntimeError, match="given 4 rows of a batch of 8 sequences"):
        embedding(tokens()[:4])

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(10, 10), nn.Parameter(torch.ones(10))

    with pytest.raises(ValueError, match="holds parameters of its own beside other modules"):
        LTE(heads=2, rank=2).apply(Bare())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_again_after_a_batch_of_another_size(reentrant: bool) -> None:
    def gradients(**again: Any) -> dict[str, Tensor]:
        model = Net()
        plain = model.forward
        if again:
            model.forward = lambda x: checkpoint(plain, x, **again)  # type: ignore[method-assign]
        weights = LTE(heads=2, rank=3, alpha=6).apply(model, target_modules=TARGETS)
        sum(loss(model, data(step, size).requires_grad_()) for step, size in enumerate((8, 4))).backward()
        assert weights.batch.sequences == 4
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(), gradients(use_reentrant=reentrant)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def result(weights: Any, optimizer: torch.optim.Optimizer, max_norm: float) -> dict[str, Tensor]:
    train(weights, optimizer, range(7), own_share, max_norm)
    state = {k: v.clone() for k, v in weights.model.state_dict().items()}
    state["clip"] = weights.clip_grad_norm_(max_norm).reshape(1) if not max_norm else torch.zeros(1)
    return state


def own_share(step: int) -> Tensor:
    x = data(step)
    if dist.is_initialized():
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    return x


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    answers = {}
    for name, recipe, max_norm in RUNS:
        weights = recipe.apply(Net(), target_modules=TARGETS)
        answers[name] = result(weights, optimizer_of(weights), max_norm)
    for method in PROJECTED:
        answers[method] = projected(method)
    try:
        LTE(heads=3, rank=2).apply(Net(), target_modules=TARGETS)
    except ValueError as error:
        assert "2 processes cannot share 3 heads" in str(error) or world != 2
    torch.save(answers, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


RUNS = [
    (f"{reset} {others} {max_norm}", LTE(heads=4, rank=3, alpha=6, merge_every=3, reset=reset, others=others), max_norm)
    for reset, others, max_norm in ((False, "replicated", 0.5), (True, "replicated", 0.0), (False, "shared", 0.0))
]


def started() -> list[tuple[str, Any, float]]:
    return [(name, recipe.apply(Net(), target_modules=TARGETS), norm) for name, recipe, norm in RUNS]


#: Methods whose subspaces are found from a sketch, drawn and kept, and drawn again in each step.
PROJECTED: dict[str, dict[str, Any]] = {"galore": {}, "golore": {"golore_after": 0}, "apollo": {}}


def projected(method: str) -> dict[str, Tensor]:
    """The model after some steps in which the gradients of the factors were projected."""
    weights = RUNS[0][1].apply(Net(), target_modules=TARGETS)
    factors = {id(factor) for factor in weights.factors().values()}
    named = list(weights.model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if id(p) in factors], "rank": 2, "update_proj_gap": 2},
        {"params": [(name, p) for name, p in named if id(p) not in factors]},
    ]
    return result(weights, create_optimizer(method, groups, lr=0.01, **PROJECTED[method]), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_one_process_with_all_heads_is_several_with_some(world: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world, port, str(tmp_path)), nprocs=world)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    expected = {name: result(w, optimizer_of(w), norm) for name, w, norm in started()}
    for name, whole in (expected | {method: projected(method) for method in PROJECTED}).items():
        for key, value in whole.items():
            held = [part[name][key] for part in parts if key in part[name]]
            if "lora_" in key or "merged_" in key or (key == "first.bias" and "shared" not in name):
                held = [torch.cat(held)]
            assert held, key
            for other in held:
                assert torch.allclose(value, other, atol=3e-6), (name, key)
            if key.endswith(".weight") and key.split(".")[0] in TARGETS:
                assert all(torch.equal(held[0], other) for other in held), key
