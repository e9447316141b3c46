from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subspan.nn.lowrank import product, weight_recipe
from subspan.nn.lowrank.product import directions, heads_product


def inputs(heads: int, rows: int, rank: int, bias: str | None, held: bool, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    sizes = {"shared": (12,), "own": (heads, 12)}
    given: dict[str, Any] = {"x": drawn(heads * 2, rows, 10), "W": drawn(12, 10)}
    given |= {"A": drawn(heads, rank, 10), "B": drawn(heads, rank, 12)}
    given["bias"] = None if bias is None else drawn(*sizes[bias])
    given["held"] = (drawn(heads, rank, 10).detach(), drawn(heads, rank, 12).detach()) if held else None
    return given


def plain(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Any, scale: float, held: Any) -> Tensor:
    """The definition, head by head."""
    parts = []
    for n, rows in enumerate(x.chunk(A.shape[0])):
        D = B[n].mT @ A[n] - (held[1][n].mT @ held[0][n] if held else 0)
        own = 0 if bias is None else bias if bias.ndim == 1 else bias[n]
        parts.append(rows @ (W + scale * D).mT + own)
    return torch.cat(parts)


def gradients(function: Any, given: dict[str, Any]) -> list[Tensor]:
    y = function(**given, scale=0.7)
    wanted = [given[name] for name in ("x", "W", "A", "B", "bias") if given[name] is not None]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), wanted)]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("bias", [None, "shared", "own"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("way", ["direct", "formed", "formed, factors from the gradient of the matrix"])
def test_every_way_gives_the_product(way: str, heads: int, bias: str | None, held: bool, monkeypatch: Any) -> None:
    formed: list[Tensor] = []
    form = product._formed

    def counted(*args: Any) -> Tensor:
        formed.append(args[0])
        return form(*args)

    monkeypatch.setattr(product, "_formed", counted)
    rows, rank = {"direct": (1, 2), "formed": (100, 2)}.get(way, (100, 5))
    given = inputs(heads, rows, rank, bias, held, torch.float64)
    monkeypatch.setattr(product, "_passing", lambda device: 1000 if way == "direct" else 0)
    expected, found = gradients(plain, given), gradients(heads_product, given)
    assert len(formed) == (0 if way == "direct" else 2 * heads)  # once in each pass
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parts_get_no_gradient() -> None:
    for rows in (1, 300):
        given = inputs(2, rows, 4, "own", False, torch.float64)
        for frozen in ("x", "W", "bias"):
            given[frozen].requires_grad_(False)
        heads_product(**given, scale=1.0).sum().backward()
        assert given["A"].grad is not None and given["B"].grad is not None
        assert all(given[frozen].grad is None for frozen in ("x", "W", "bias"))


def test_nothing_of_the_size_of_the_matrix_is_kept() -> None:
    """Under autocast as well, where a copy of the frozen matrix would be."""
    given = inputs(2, 400, 3, None, False, torch.float32)
    given["W"].requires_grad_(False)
    kept: list[Tensor] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with keeping, torch.autocast("cpu", torch.bfloat16):
        y = heads_product(**given, scale=1.0)
    assert y.dtype == torch.bfloat16
    mine = {given[name].data_ptr() for name in ("x", "W", "A", "B")}
    assert {tuple(x.shape) for x in kept if x.data_ptr() not in mine} == {tuple(given["x"].shape)}  # x in bfloat16


def test_bfloat16_weights_do_not_swallow_small_factors() -> None:
    """W + sBA rounded to bfloat16 would be W, whose rows add up to nothing here."""
    x = torch.ones(4096, 64, dtype=torch.bfloat16)
    W = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(64, 32)
    A, B = (torch.full((1, 1, 64), 2.0**-5, dtype=torch.bfloat16) for _ in range(2))
    y = heads_product(x, W, A, B, None, 1.0, None)
    assert torch.all(y == 0.0625)


@pytest.mark.parametrize("passing", [0, 8])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_way_that_takes_the_fewest_operations(heads: int, held: bool, passing: int, monkeypatch: Any) -> None:
    """Counted here from the products of each way; a matrix that is formed costs its passing too, in both passes."""
    monkeypatch.setattr(product, "_passing", lambda device: passing)
    in_place = {torch.ops.aten.baddbmm_: lambda into, X, Y, **_: 2 * X[0] * X[1] * X[2] * Y[2]}  # torch leaves it out
    m, n, taken = 12, 10, set()
    for rank in (1, 3, 6):
        for rows in range(1, 70, 6):
            given = inputs(heads, rows, rank, None, held, torch.float64)
            given["W"].requires_grad_(False)
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
                heads_product(**given, scale=0.7).sum().backward()
            count, k = 2 * heads * rows, 2 * rank if held else rank
            factors = 4 * count * rank * (m + n)  # their gradients, two products each
            direct = 4 * count * k * (m + n) + factors // 2  # one of the two was in the other pass
            formed = 4 * heads * k * m * n
            matrix = 2 * count * m * n + 4 * heads * rank * m * n
            ways = {"direct": direct, "formed": formed + factors, "matrix": formed + matrix}
            way = "direct"
            if ways["formed"] + 2 * heads * m * n * passing < direct:
                way = "matrix" if matrix < factors else "formed"
            assert counter.get_total_flops() == 4 * count * m * n + ways[way], (rank, rows, way)
            taken.add(way)
    assert taken == {"direct", "formed", "matrix"}


@pytest.mark.parametrize("rows", [1, 200])
def test_held_factors_under_autocast(rows: int) -> None:
    given = inputs(2, rows, 3, "own", True, torch.float32)
    expected = gradients(plain, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(heads_product, given)
    assert found[0].dtype == torch.bfloat16
    for exact, rounded in zip(expected, found, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("rank", [2, 16, 48, 64])
def test_no_rank_takes_many_more_operations_than_dense_training(rank: int) -> None:
    x = torch.randn(4096, 64, requires_grad=True)
    counts = []
    for recipe in (None, "mhlora"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        if recipe is not None:
            weight_recipe(recipe, heads=1, rank=rank).apply(model)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    dense, ours = counts
    assert dense == 3 * 2 * 4096 * 64 * 64
    assert ours < (2 / 3 + 3 * rank / 64 if rank < 16 else 1.1) * dense


def test_differences_are_taken_before_they_are_rounded() -> None:
    g = torch.Generator().manual_seed(0)
    held = torch.randn(2, 4, 32, generator=g), torch.randn(2, 4, 48, generator=g)
    A, B = (X + 1e-4 * torch.randn(X.shape, generator=g) for X in held)
    exact = B.double().mT @ A.double() - held[1].double().mT @ held[0].double()
    As, Bs = directions(A, B, held, torch.bfloat16)
    assert (Bs.double().mT @ As.double() - exact).norm() < 0.01 * exact.norm()
    As, Bs = directions(*held, held, torch.bfloat16)
    assert torch.count_nonzero(Bs.mT @ As) == 0


@pytest.mark.parametrize("recipe", ["mhlora", "relora"])
@pytest.mark.parametrize("rows", [2, 400])
def test_layers_under_autocast_are_near_those_without(recipe: str, rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32))
    weight_recipe(recipe, rank=6, alpha=6.0).apply(model, steps=100)
    with torch.no_grad():
        model[0].lora_B.normal_()
    x = torch.randn(rows, 24)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        model.zero_grad()
        y.float().square().mean().backward()
        results.append([y.float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for exact, rounded in zip(*results, strict=True):
        assert exact.dtype == rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32))
    expected = model(torch.ones(shape))
    weight_recipe("mhlora", rank=6, heads=2).apply(model)
    y = model(torch.ones(shape))
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert model[0].lora_B.grad.shape == model[0].lora_B.shape


def test_layers_can_be_compiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
    weight_recipe("mhlora", rank=4, heads=2).apply(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (2, 900):
        results = []
        for module in (model, compiled):
            model.zero_grad()
            y = module(torch.ones(rows, 24))
            y.square().mean().backward()
            results.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [2, 900])
def test_another_dtype_is_refused_as_by_a_dense_layer(rows: int) -> None:
    model = nn.Sequential(nn.Linear(24, 32))
    weight_recipe("mhlora", rank=4).apply(model)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.ones(rows, 24, dtype=torch.bfloat16))
