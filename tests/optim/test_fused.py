"""Gradients that are taken in backward: late bases, folding, immediate updates, clipping, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references.late import LateGaLoreReference
from references.quantised import linear_levels, quantised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspan.linalg import gaussian_sketch, random_stiefel, seeded_generator
from subspan.optim import GaLore, create_optimizer, method_info, param_groups

GAP = 4
FOLDING: list[tuple[str, dict[str, Any]]] = [
    ("galore", {}),
    ("galore", {"stagger": False}),
    ("golore", {}),
    ("golore", {"golore_after": 6}),
    ("galore", {"moments": "8bit", "min_quantized": 1}),
    ("golore", {"golore_after": 6, "basis_storage": "bfloat16", "min_quantized": 1}),
    ("q_galore", {"min_quantized": 1, "queue_size": 1, "cos_threshold": 0.0}),
    ("galore", {"warm_start": 0.5, "refresh": "late", "moments": "8bit", "min_quantized": 1}),
]
IMMEDIATE: list[tuple[str, dict[str, Any]]] = [
    ("fira", {}),
    ("apollo", {}),
    ("apollo", {"store_basis": False}),
    ("apollo_mini", {}),
    ("frugal", {}),
    ("frugal", {"subspace": "rows"}),
    ("adamw", {}),
    ("fira", {"moments": "8bit", "basis_storage": "int8", "min_quantized": 1}),
    ("adamw", {"moments": "4bit", "min_quantized": 1}),
    ("scale", {}),
    ("scale", {"momentum": 0.0, "norm": "l2"}),
]


class Network(nn.Module):
    """Linear layers wide, tall and square, a convolution, experts, a layer that is used twice, and dense parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 12, 2)
        self.wide, self.tall, self.square = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 16, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 16, 20) * 0.2)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor, run: Callable[..., Tensor] = lambda f, x: f(x)) -> Tensor:
        x = self.convolution(x.view(-1, 2, 2, 2)).flatten(1)
        x = run(lambda x: self.tall(torch.tanh(self.wide(x))), x)
        x = run(lambda x: self.square(torch.tanh(self.square(x))), x)
        return self.norm(torch.einsum("bi,eij->bj", x, self.experts.to(x.dtype)))


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, generator=generator) * torch.logspace(0, -1, 8)
    return x, torch.randn(size, 20, generator=generator)


def build(method: str, settings: dict[str, Any], model: nn.Module, *, fused: bool, **more: Any) -> Any:
    keys: dict[str, Any] = {"rank": 4, "update_proj_gap": GAP}
    if method == "apollo_mini":
        keys["rank"] = 1
    if method == "frugal":
        keys = {"rank": None, "density": 0.4, "update_proj_gap": GAP}
    if method_info(method).size is None:
        keys = {}
    settings = {**settings, **more}
    groups: Any = param_groups(model, **keys) if keys else [{"params": list(model.named_parameters())}]
    if method == "scale":
        named = dict(model.named_parameters())
        experts = {"params": [("experts", named.pop("experts"))], "outputs": "columns"}
        groups = [{"params": list(named.items()), "outputs": "rows"}, experts]
    optimizer = create_optimizer(method, groups, lr=1e-2, weight_decay=0.1, **settings)
    if fused:
        optimizer.fuse_into_backward()
    return optimizer


def train(
    model: nn.Module,
    optimizer: Any,
    steps: range = range(3 * GAP),
    pieces: int = 1,
    clip: Callable[[], object] | None = None,
    run: Callable[..., Tensor] = lambda f, x: f(x),
) -> None:
    for step in steps:
        x, y = batch(step)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(part, run) - target).square().mean() / pieces).backward()
        if clip is not None:
            clip()
        optimizer.step()
        optimizer.zero_grad()


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


folding = pytest.mark.parametrize(("method", "settings"), FOLDING, ids=str)
immediate = pytest.mark.parametrize(("method", "settings"), IMMEDIATE, ids=str)


def late(method: str, settings: dict[str, Any], model: nn.Module, **more: Any) -> Any:
    return build(method, settings, model, fused=False, refresh="late", **more)


@folding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_equals_a_late_refresh(method: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    one, other = Network().to(dtype), Network().to(dtype)
    for model, optimizer in (
        (one, build(method, settings, one, fused=True)),
        (other, late(method, settings, other)),
    ):
        for step in range(3 * GAP):
            x, y = batch(step)
            (model(x.to(dtype)) - y).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert difference(one, other) == 0
    assert difference(one, Network().to(dtype)) > 1e-2


@folding
def test_micro_batches_equal_one_batch(method: str, settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    train(one, build(method, settings, one, fused=True), pieces=4)
    train(other, build(method, settings, other, fused=True))
    assert difference(one, other) < 2e-4  # Adam makes steps of lr of what rounding leaves of small gradients
    assert difference(one, Network()) > 1e-2


@folding
def test_no_gradient_of_a_projected_matrix_is_kept(method: str, settings: dict[str, Any]) -> None:
    model = Network()
    optimizer = build(method, settings, model, fused=True)
    projected = [p for group in optimizer.param_groups if group["rank"] is not None for p in group["params"]]
    assert len(projected) == 4
    alive: list[int] = []
    for p in projected:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in projected)))
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    assert alive == [0] * len(projected)  # hooks run in the order in which they were set
    assert all(p.grad is None for p in projected)
    assert model.norm.weight.grad is not None
    held = [item.projected.numel() + item.sketch.numel() if item.sketch is not None else item.projected.numel()
            for item in optimizer._folded.values()]  # fmt: skip
    assert sum(held) < sum(p.numel() for p in projected)
    optimizer.step()
    assert not optimizer._folded


@immediate
def test_immediate_updates_equal_ordinary_ones(method: str, settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    ours, ordinary = build(method, settings, one, fused=True), build(method, settings, other, fused=False)
    train(one, ours)
    train(other, ordinary)
    assert difference(one, other) < 1e-6  # equal matrices are stacked in an ordinary step
    assert all(p.grad is None for p in one.parameters())
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert ours.state[p].keys() == ordinary.state[q].keys()


@immediate
def test_an_immediate_update_refuses_accumulation_and_clipping(method: str, settings: dict[str, Any]) -> None:
    model = Network()
    optimizer = build(method, settings, model, fused=True)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"a second backward before step\(\)"):
        (model(x) - y).square().mean().backward()


@pytest.mark.parametrize(("storage", "warm"), [("float32", 0), ("int8", 0), ("int4", 0), ("float32", 3), ("int8", 2)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
def test_a_late_refresh_follows_its_reference(shape: tuple[int, int], storage: str, warm: int) -> None:
    numbers: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    drawn = iter(range(10**6))
    reference = LateGaLoreReference(
        start=lambda G, rank: random_stiefel(len(G), rank, generator=seeded_generator(5, "a", "start")),
        test=lambda G, rank: gaussian_sketch(G.shape[1], rank, generator=seeded_generator(5, "a", next(drawn))),
        warm=warm,
        hold=None if storage == "float32" else lambda Q: quantised(Q, linear_levels(int(storage[3:])), block=256),
        rank=4,
        update_proj_gap=GAP,
        **numbers,
    )
    p = nn.Parameter(torch.zeros(shape))
    W = p.detach().double()
    groups = [{"params": [("a", p)], "rank": 4, "update_proj_gap": GAP, "min_quantized": 1}]
    settings: dict[str, Any] = {"basis_storage": storage, "warm_start": warm / 4, **numbers}
    optimizer = GaLore(groups, refresh="late", stagger=False, seed=5, **settings)
    for step in range(4 * GAP):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
        G = (U * torch.logspace(0, -2, len(S), dtype=torch.float64)) @ Vh
        W = reference.step(W, G)
        p.grad = G.float()
        optimizer.step()
        assert (p.detach().double() - W).abs().max() < 1e-5, f"step {step}"
    assert W.abs().max() > 1e-2


@folding
def test_clipping_is_that_of_torch(method: str, settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    fused, ordinary = build(method, settings, one, fused=True), late(method, settings, other)
    norms: list[tuple[float, bool]] = []
    expected: list[float] = []
    train(one, fused, clip=lambda: norms.append(fused.clip_grad_norm_(0.1)))
    train(other, ordinary, clip=lambda: expected.append(nn.utils.clip_grad_norm_(other.parameters(), 0.1).item()))
    assert [value for value, _ in norms] == pytest.approx(expected, rel=1e-4)
    assert all(exact for _, exact in norms)
    assert min(expected) > 0.2  # clipping has something to do
    assert difference(one, other) < 1e-4


def test_the_norm_of_accumulated_gradients_is_that_of_their_projections() -> None:
    model, whole = Network(), Network()
    fused, ordinary = build("galore", {}, model, fused=True), late("galore", {}, whole)
    x, y = batch(0)
    for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
        ((model(part) - target).square().mean() / 2).backward()
    (whole(x) - y).square().mean().backward()
    norm, true = fused.grad_norm(), ordinary.grad_norm()
    assert not norm.exact
    assert true.exact
    assert 0.1 * true.value < norm.value < true.value
    folded = sum(float(item.projected.double().square().sum()) for item in fused._folded.values())
    dense = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    assert norm.value == pytest.approx((folded + dense) ** 0.5, rel=1e-5)


@immediate
def test_the_norm_is_known_after_immediate_updates(method: str, settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    fused, ordinary = build(method, settings, one, fused=True), build(method, settings, other, fused=False)
    for model in (one, other):
        x, y = batch(0)
        (model(x) - y).square().mean().backward()
    assert fused.grad_norm() == pytest.approx(ordinary.grad_norm(), rel=1e-5)
    assert fused.grad_norm().value > 0


@pytest.mark.parametrize(("method", "settings"), [*FOLDING, *IMMEDIATE], ids=str)
@pytest.mark.parametrize("stop", [1, GAP + 1, 7])
def test_resume_is_bit_exact(method: str, settings: dict[str, Any], stop: int) -> None:
    model = Network()
    optimizer = build(method, settings, model, fused=True)
    train(model, optimizer, range(stop))
    other = Network()
    other.load_state_dict(model.state_dict())
    continued = build(method, settings, other, fused=True)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(stop, 3 * GAP))
    train(other, continued, range(stop, 3 * GAP))
    assert difference(model, other) == 0
    assert optimizer.state_bytes() == optimizer.planned_state_bytes()


@pytest.mark.parametrize(("method", "settings"), [*FOLDING, *IMMEDIATE], ids=str)
@pytest.mark.parametrize("loaded", [False, True])
def test_schedulers_reach_the_updates(method: str, settings: dict[str, Any], loaded: bool) -> None:
    """A state that is loaded, as accelerate's prepare() does, replaces the groups that a scheduler writes to."""
    one, other = Network(), Network()
    for model, fused in ((one, True), (other, False)):
        late = {} if fused or (method, settings) not in FOLDING else {"refresh": "late"}
        optimizer = build(method, settings, model, fused=fused, **late)
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step % 3 == 1 else 1 / (1 + step))
        for step in range(2 * GAP):
            before = model.wide.weight.detach().clone()
            train(model, optimizer, range(step, step + 1))
            assert torch.equal(model.wide.weight, before) == (step % 3 == 1)
            scheduler.step()
    assert difference(one, other) < 1e-6


@folding
@pytest.mark.parametrize("fused", [True, False])
def test_raising_on_a_non_finite_gradient(method: str, settings: dict[str, Any], fused: bool) -> None:
    model = Network()
    optimizer = build(method, settings, model, fused=fused, nonfinite="raise", **({} if fused else {"refresh": "late"}))
    train(model, optimizer, range(GAP))
    state = {p: {key: value.clone() for key, value in s.items()} for p, s in optimizer.state.items()}
    weights = copy.deepcopy(model.state_dict())
    x, y = batch(GAP)
    model.wide.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=r"wide\.weight: the gradient holds NaN or Inf; nothing was changed"):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for p, before in state.items():
        # In backward the layers above have their turn first, and a random subspace is drawn at once.
        keys = before.keys() if not fused or method == "galore" else {"step", "exp_avg_sq"}
        assert all(torch.equal(before[key], optimizer.state[p][key]) for key in keys)


def test_models_and_optimizers_can_be_pickled() -> None:
    model = Network()
    optimizer = build("galore", {}, model, fused=True)
    train(model, optimizer, range(2))
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
    assert pickle.loads(pickle.dumps(optimizer)).ranks() == optimizer.ranks()


def test_zero_grad_does_not_undo_an_immediate_update() -> None:
    model = Network()
    optimizer = build("adamw", {}, model, fused=True)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="a second backward"):
        (model(x) - y).square().mean().backward()


def test_fusing_in_the_middle_of_a_run() -> None:
    one, other = Network(), Network()
    late_one, fused = late("galore", {}, one), late("galore", {}, other)
    train(one, late_one, range(5))
    train(other, fused, range(5))
    fused.fuse_into_backward()
    train(one, late_one, range(5, 12))
    train(other, fused, range(5, 12))
    assert difference(one, other) == 0


@folding
def test_activation_checkpointing_and_autocast(method: str, settings: dict[str, Any]) -> None:
    one, other = Network(), Network()
    train(one, build(method, settings, one, fused=True))
    recompute = lambda f, x: checkpoint(f, x, use_reentrant=False)  # noqa: E731
    train(other, build(method, settings, other, fused=True), run=recompute)
    assert difference(one, other) == 0
    with torch.autocast("cpu", torch.bfloat16):
        train(other, build(method, settings, other, fused=True))
    assert all(p.isfinite().all() for p in other.parameters())


@pytest.mark.parametrize(("method", "settings"), [*FOLDING, *IMMEDIATE], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_around_backward_and_step_changes_no_number(
    method: str, settings: dict[str, Any], fused: bool
) -> None:
    one, other = Network(), Network()
    for model in (one, other):
        optimizer = build(method, settings, model, fused=fused)
        for step in range(GAP):
            generator = torch.Generator().manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=model is other):
                # Products of elements, which autocast leaves alone, so that the gradients are the same.
                sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters()).backward()
                optimizer.step()
            optimizer.zero_grad()
    assert difference(one, other) == 0


def test_a_gradient_scaler_is_refused() -> None:
    model = Network()
    optimizer = build("galore", {}, model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch(0)
    scaler.scale((model(x) - y).square().mean()).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot unscale"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    train(model, optimizer, range(1))  # usable again


@pytest.mark.parametrize("settings", [{"svd": "exact"}, {"rank_policy": "tolerance"}], ids=str)
def test_subspaces_that_need_the_whole_gradient_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a late refresh keeps a sketch"):
        build("galore", settings, Network(), fused=True)
    with pytest.raises(ValueError, match="a late refresh keeps a sketch"):
        late("galore", settings, Network())


def test_more_than_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network()
    optimizer = build("galore", {}, model, fused=True)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for look in (optimizer.step, optimizer.grad_norm, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"there are 2; call subspan.distributed.exclude_from_ddp"):
            look()
    with pytest.raises(RuntimeError, match="there are 2; a method that needs the gradients"):
        build("fira", {}, Network(), fused=True)


@folding
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_skipped_for_that_parameter(method: str, settings: dict[str, Any], bad: float) -> None:
    model = Network()
    optimizer = build(method, settings, model, fused=True)
    train(model, optimizer, range(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {key: value.clone() for key, value in optimizer.state[model.experts].items()}
    x, y = batch(3)
    hook = model.experts.register_hook(lambda g: g.clone().index_fill_(0, torch.tensor([1]), bad))
    for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
        (model(part) - target).square().mean().backward()
        hook.remove()  # the second micro-batch is finite, and does not make up for the first
    with pytest.warns(RuntimeWarning, match="experts"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(model.experts, before["experts"])
    assert all(torch.equal(optimizer.state[model.experts][key], value) for key, value in state.items())
    assert not torch.equal(model.wide.weight, before["wide.weight"])
    train(model, optimizer, range(4, 8))
    assert all(p.isfinite().all() for p in model.parameters())


def test_zero_grad_forgets_what_was_folded() -> None:
    model = Network()
    optimizer = build("galore", {}, model, fused=True)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_follow_a_parameter_that_a_wrapper_replaces() -> None:
    one, other = Network(), Network()
    ours, reference = build("galore", {}, one, fused=True), build("galore", {}, other, fused=True)
    train(one, ours, range(3))
    train(other, reference, range(3))
    swapped = nn.Parameter(one.wide.weight.detach().clone())
    for group in ours.param_groups:
        group["params"] = [swapped if p is one.wide.weight else p for p in group["params"]]
    one.wide.weight = swapped
    ours.init_state()  # a wrapper's prepare() touches the optimizer; so does any step
    train(one, ours, range(3, 9))
    train(other, reference, range(3, 9))
    assert difference(one, other) == 0
    assert swapped.grad is None


def test_hooks_of_a_forgotten_optimizer_take_nothing() -> None:
    model = Network()
    train(model, build("galore", {}, model, fused=True), range(2))
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    assert model.wide.weight.grad is not None


def test_two_optimizers_cannot_take_the_same_gradient() -> None:
    model = Network()
    first = build("galore", {}, model, fused=True)
    with pytest.raises(RuntimeError, match="another optimizer takes this gradient"):
        build("galore", {}, model, fused=True)
    train(model, first, range(1))
    del first
    train(model, build("galore", {}, model, fused=True), range(1))


def test_deepcopy_is_not_fused() -> None:
    model = Network()
    optimizer = build("galore", {}, model, fused=True)
    train(model, optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    assert copied._fusion is None
    assert copied.method.refresh.late
