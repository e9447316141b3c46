"""Gradients that break naive code: rank above the side, rank-deficient, zero, NaN, Inf, huge, tiny."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from contract.cases import (
    CASES,
    DENSE_SHAPES,
    LOW_RANK,
    Case,
    clone,
    difference,
    gradient,
    identical,
    parameters,
    set_gradients,
    train,
)
from subspan.optim import create_optimizer

# A rounded basis is not orthogonal to what it is meant to leave out.
ORTHONORMAL = [
    case
    for case in LOW_RANK
    if case.method in {"galore", "galore_8bit", "golore", "fira"} and "basis_storage" not in case.settings
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("case", [case for case in LOW_RANK if case.method != "frugal"], ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_rank_above_the_side_equals_rank_at_the_side(case: Case, shape: tuple[int, int], proj_type: str) -> None:
    side = {"std": min(shape), "reverse_std": max(shape), "left": shape[0], "right": shape[1]}[proj_type]
    runs = []
    for rank in (side, side + 1, 1000):
        named = parameters({"a": shape})
        optimizer = case(case.groups(named, rank=rank, proj_type=proj_type))
        train(optimizer, named, 6)
        runs.append(named)
    assert identical(runs[0], runs[1]) and identical(runs[0], runs[2])
    assert difference(runs[0], parameters({"a": shape})) > 1e-4


def rank_deficient(seed: int, shape: tuple[int, int], dtype: torch.dtype, rank: int = 4) -> tuple[Tensor, Tensor]:
    """dYᵀX of `rank` tokens, as one product and as a sum over two shards of the tokens (another rounding)."""
    generator = torch.Generator().manual_seed(seed)
    dY = torch.randn(rank, shape[0], generator=generator).to(dtype)
    X = torch.randn(rank, shape[1], generator=generator).to(dtype)
    half = rank // 2
    return dY.T @ X, dY[:half].T @ X[:half] + dY[half:].T @ X[half:]


def first_updates(case: Case, gradients: list[Tensor], rank: int, steps: int = 1) -> list[Tensor]:
    updates = []
    for G in gradients:
        p = nn.Parameter(torch.zeros(G.shape, dtype=torch.float32))
        optimizer = case(case.groups({"a": p}, rank=rank, update_proj_gap=200), lr=1.0)
        for _ in range(steps):
            p.grad = G.float()
            optimizer.step()
        updates.append(p.detach().double())
    return updates


@pytest.mark.parametrize("case", [case for case in ORTHONORMAL if case.method != "golore"], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64), (256, 512)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rank_deficient_gradient_makes_no_noise(case: Case, shape: tuple[int, int], seed: int) -> None:
    """Four tokens at rank 16: twelve rows of R are rounding, and Adam would make full steps of them."""
    G, sharded = rank_deficient(seed, shape, torch.float32)
    update, sharded_update = first_updates(case, [G, sharded], rank=16)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    left, right = U[:, :4], Vh[:4]
    inside = left @ (left.T @ update) if shape[0] < shape[1] else (update @ right.T) @ right
    energy = lambda A: A.norm().item() ** 2  # noqa: E731
    assert energy(update) > 0
    assert energy(update - inside) < 1e-3 * energy(update)
    assert (update - sharded_update).norm() < 1e-4 * update.norm()


@pytest.mark.parametrize("case", [case for case in ORTHONORMAL if case.method != "golore"], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 15])
def test_rank_deficient_gradients_over_several_steps(case: Case, tokens: int) -> None:
    G, sharded = rank_deficient(7, (64, 96), torch.float32, rank=tokens)
    update, sharded_update = first_updates(case, [G, sharded], rank=16, steps=4)
    assert (update - sharded_update).norm() < 1e-3 * update.norm()


@pytest.mark.parametrize("case", [case for case in ORTHONORMAL if case.method != "golore"], ids=str)
def test_rank_deficient_bf16_gradient_makes_no_noise(case: Case) -> None:
    """The rounding of a bf16 product is itself of full rank, at eps(bf16)/√m of the norm a row."""
    generator = torch.Generator().manual_seed(0)
    dY, X = torch.randn(4, 256, generator=generator), torch.randn(4, 512, generator=generator)
    p = nn.Parameter(torch.zeros(256, 512, dtype=torch.bfloat16))
    optimizer = case(case.groups({"a": p}, rank=16), lr=1.0)
    p.grad = (dY.T @ X).to(torch.bfloat16)
    optimizer.step()
    left = torch.linalg.qr(dY.T.double()).Q
    update = p.detach().double()
    outside = update - left @ (left.T @ update)
    assert outside.norm() ** 2 < 0.05 * update.norm() ** 2


@every_case
def test_zero_gradients_move_nothing_and_training_goes_on(case: Case) -> None:
    named = parameters()
    optimizer = case(case.groups(named), lr=1e-2)
    for _ in range(6):
        for p in named.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert identical(named, parameters())
    train(optimizer, named, 12)
    for name, p in parameters().items():
        assert named[name].isfinite().all()
        assert (named[name] - p).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    "case", [case for case in LOW_RANK if "apollo" in case.method or case.method == "fira"], ids=str
)
def test_a_zero_gradient_does_not_lock_the_limiter(case: Case) -> None:
    """‖S_t‖ ≤ γ‖S_{t−1}‖ with ‖S_{t−1}‖ = 0 would hold S at zero for good."""
    late, direct = parameters(), parameters()
    paused, optimizer = case(case.groups(late)), case(case.groups(direct))
    for p in late.values():
        p.grad = torch.zeros_like(p)
    paused.step()
    before, other = clone(late), clone(direct)
    train(paused, late, 3)
    train(optimizer, direct, 3)
    for name in late:
        assert (late[name] - before[name]).norm() > 0.1 * (direct[name] - other[name]).norm()


@every_case
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_gradients_stay_finite(case: Case, size: float) -> None:
    named = parameters()
    optimizer = case(case.groups(named))
    for step in range(6):
        set_gradients(named, step)
        for p in named.values():
            assert p.grad is not None
            p.grad *= size
        optimizer.step()
    assert all(p.isfinite().all() for p in named.values())


@every_case
@pytest.mark.parametrize("size", [1e-2, 1e4])
def test_adam_forgets_the_size_of_the_gradient(case: Case, size: float) -> None:
    """Up to the 1e-8 that Fira and APOLLO add to the norm of R."""
    if case.settings.get("moments") == "bfloat16":
        size = 2.0 ** round(math.log2(size))  # else the rounding differs
    plain, scaled = parameters(), parameters()
    one, other = case(case.groups(plain, eps=1e-16)), case(case.groups(scaled, eps=1e-16))
    for step in range(6):
        for name, p in plain.items():
            p.grad = gradient(name, torch.zeros_like(p), step).float()
            scaled[name].grad = size * p.grad
        one.step()
        other.step()
    assert difference(plain, scaled) < 2e-5


@every_case
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("when", [0, 2, 4])
@pytest.mark.parametrize("victim", ["layers.0.up.weight", "norm.weight"])
def test_non_finite_gradient_is_skipped_for_that_parameter(case: Case, bad: float, when: int, victim: str) -> None:
    """Others are updated; its weight, moments and basis are kept; counted, and one warning per parameter."""
    named, calm = parameters() | parameters(DENSE_SHAPES), parameters() | parameters(DENSE_SHAPES)
    optimizer, reference = (
        case(
            case.groups({n: p for n, p in x.items() if p.ndim == 2}, {n: p for n, p in x.items() if p.ndim == 1}),
            weight_decay=0.1,
        )
        for x in (named, calm)
    )
    train(optimizer, named, when)
    train(reference, calm, when)
    weight = named[victim].detach().clone()
    state = {key: tensor.clone() for key, tensor in optimizer.state[named[victim]].items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            set_gradients(named, when)
            gradient_of_victim = named[victim].grad
            assert gradient_of_victim is not None
            gradient_of_victim.view(-1)[40 % gradient_of_victim.numel()] = bad
            optimizer.step()
    assert len([w for w in caught if victim in str(w.message)]) == 1
    assert not [w for w in caught if victim not in str(w.message)]
    assert optimizer.skipped_steps == 2
    assert torch.equal(named[victim], weight)
    after = optimizer.state[named[victim]]
    for key in ("exp_avg", "exp_avg_sq", "basis", "step"):
        if when > 0 and key in state and key in after:
            assert torch.equal(state[key], after[key]), key
    for _ in range(2):
        set_gradients(calm, when)
        calm[victim].grad = None
        reference.step()
    assert identical(named, calm)
    train(optimizer, named, range(when + 1, when + 7))
    assert all(p.isfinite().all() for p in named.values())
    assert not torch.equal(named[victim], weight)


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (300, 400), (400, 300)], ids=str)
def test_a_non_finite_entry_where_the_basis_is_zero_is_seen(case: Case, bad: float, shape: tuple[int, int]) -> None:
    """The first gradients know nothing of most rows and columns, so no direction of the basis does either."""
    named = parameters({"a": shape, "b": shape})
    optimizer = case(case.groups(named, update_proj_gap=200) if case.projects else case.groups(named))
    for step in range(3):
        for name, p in named.items():
            p.grad = torch.zeros(shape)
            p.grad[:8, :8] = gradient(name, torch.zeros(8, 8), step).float()
        optimizer.step()
    for row, column in ((shape[0] - 1, 0), (0, shape[1] - 1), (shape[0] - 1, shape[1] - 1)):
        before = clone(named)
        for name, p in named.items():
            p.grad = gradient(name, torch.zeros_like(p), 9).float()
        victim = named["a"].grad
        assert victim is not None
        victim[row, column] = bad
        skipped = optimizer.skipped_steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert optimizer.skipped_steps == skipped + 1
        assert torch.equal(named["a"], before["a"])
        assert named["b"].isfinite().all() and not torch.equal(named["b"], before["b"])


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_finite_gradients_near_the_largest_number_leave_no_nan(case: Case, dtype: torch.dtype) -> None:
    """Sums over their entries are infinite, the entries are not: fp16 must not skip, the range of fp32 may force it."""
    named = parameters({"a": (16, 24)}, dtype=dtype)
    optimizer = case(case.groups(named), rounding="nearest")
    start = named["a"].detach().clone()
    for step in range(6):
        named["a"].grad = torch.full_like(named["a"], 0.9 * torch.finfo(dtype).max)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert named["a"].isfinite().all(), step
    if dtype == torch.float16:
        assert optimizer.skipped_steps == 0
        assert not torch.equal(named["a"], start)
    train(optimizer, named, 6)  # and nothing non-finite is left in the state
    assert named["a"].isfinite().all()


@every_case
def test_a_sparse_gradient_is_an_error_that_names_the_parameter(case: Case) -> None:
    table = nn.Parameter(torch.ones(5, 4))
    optimizer = case.dense({"embedding.weight": table})
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 4), (5, 4), check_invariants=True)
    with pytest.raises((ValueError, RuntimeError), match=r"embedding\.weight"):
        optimizer.step()


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 3, 4])
def test_non_finite_gradient_raises_before_anything_changes(case: Case, bad: float, when: int) -> None:
    named = parameters()
    dense = parameters({"norm.weight": (24,)})
    optimizer = case(case.groups(named, dense), nonfinite="raise")
    train(optimizer, named | dense, when)
    weights = clone(named | dense)
    twin = case(case.groups(clone(named), clone(dense)), nonfinite="raise")
    twin.load_state_dict(optimizer.state_dict())
    for victim in ("layers.1.up.weight", "norm.weight"):
        set_gradients(named | dense, when)
        gradient_of_victim = (named | dense)[victim].grad
        assert gradient_of_victim is not None
        gradient_of_victim.view(-1)[-1] = bad
        with pytest.raises(FloatingPointError, match=victim.replace(".", r"\.")):
            optimizer.step()
        assert identical(named | dense, weights)
    copies = {
        name: p for group in twin.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    train(optimizer, named | dense, range(when, when + 6))
    train(twin, copies, range(when, when + 6))
    assert identical(named | dense, copies)


def test_an_unknown_policy_for_non_finite_gradients_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nonfinite.*ignore"):
        CASES[0](CASES[0].groups(parameters()), nonfinite="ignore")


@every_case
@pytest.mark.parametrize("size", [1e17, 1e30])
def test_huge_gradients_move_the_weights_or_count_as_skipped(case: Case, size: float) -> None:
    """Squares of 1e30 have no place in float32: what cannot be stepped is counted, and nothing vanishes silently."""
    named = parameters()
    optimizer = case(case.groups(named))
    start = clone(named)
    for name, p in named.items():
        p.grad = size * gradient(name, torch.zeros_like(p), 0).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert all(p.isfinite().all() for p in named.values())
    still = sum(torch.equal(p, start[name]) for name, p in named.items())
    if size == 1e17:
        assert optimizer.skipped_steps == 0 and still == 0
    elif case.projects:
        assert still <= optimizer.skipped_steps


def test_rotated_moments_are_not_divided_by_nothing() -> None:
    """Where gradients have fewer directions than the rank, GoLore's rotation meets second moments that are zero."""
    p = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = create_optimizer(
        "golore", [{"params": [p], "rank": 8}], lr=1.0, scale=1.0, update_proj_gap=2, golore_after=100
    )
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        p.grad = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
        before = p.detach().clone()
        optimizer.step()
        assert float((p - before).abs().max()) < 100  # 1e8 were they divided
