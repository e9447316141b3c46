"""bfloat16 weights: nearest rounding loses small steps, stochastic rounding keeps them in the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subspan.optim import GaLore, create_optimizer

RECIPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adamw", {}, {}),
    ("adamw", {}, {"moments": "8bit", "min_quantized": 1}),
    ("galore", {"rank": 8}, {"scale": 1.0}),
    ("fira", {"rank": 8}, {"scale": 1.0}),
    ("apollo", {"rank": 8}, {}),
    ("frugal", {"density": 0.25}, {"subspace": "rows"}),
    ("scale", {"outputs": "rows"}, {}),
    ("scale", {"outputs": "columns", "momentum": 0.0}, {}),
]


def trained(method: str, keys: dict[str, Any], settings: dict[str, Any], **more: Any) -> torch.Tensor:
    """Weights of 1 under steps of about 1e-4, a fortieth of the gap to the next number below."""
    parameter = nn.Parameter(torch.ones(32, 48, dtype=torch.bfloat16))
    groups = [{"params": [("a", parameter)], **keys}]
    optimizer = create_optimizer(method, groups, lr=1e-4, **settings, **more)
    generator = torch.Generator().manual_seed(0)
    sign = torch.outer(torch.ones(32), torch.randn(48, generator=generator)).bfloat16()
    for _ in range(40):
        parameter.grad = sign
        optimizer.step()
    return parameter.detach().float()


@pytest.mark.parametrize(("method", "keys", "settings"), RECIPES, ids=str)
def test_nearest_rounding_loses_small_steps(method: str, keys: dict[str, Any], settings: dict[str, Any]) -> None:
    assert torch.equal(trained(method, keys, settings), torch.ones(32, 48))


@pytest.mark.parametrize(("method", "keys", "settings"), RECIPES, ids=str)
def test_stochastic_rounding_keeps_them(method: str, keys: dict[str, Any], settings: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(32, 48))
    optimizer = create_optimizer(method, [{"params": [("a", parameter)], **keys}], lr=1e-4, **settings)
    sign = torch.outer(torch.ones(32), torch.randn(48, generator=torch.Generator().manual_seed(0)))
    for _ in range(40):
        parameter.grad = sign.bfloat16().float()
        optimizer.step()
    exact = parameter.detach() - 1
    drawn = trained(method, keys, settings, rounding="stochastic") - 1
    # 1536 weights, each wrong by up to a unit in the last place, 2⁻⁷
    assert float((drawn * exact.sign()).mean()) == pytest.approx(float(exact.abs().mean()), rel=0.25)
    assert exact.abs().mean() > 1e-4


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("kind", ["galore", "fira"])
def test_rounding_does_not_depend_on_buckets(kind: str, shape: tuple[int, int]) -> None:
    """Each parameter alone draws what it draws in a stack of six."""

    def run(names: list[str]) -> dict[str, torch.Tensor]:
        params = {name: nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for name in names}
        groups = [{"params": list(params.items()), "rank": 4}]
        optimizer = create_optimizer(kind, groups, lr=1e-3, rounding="stochastic", stagger=False)
        for step in range(4):
            for name, p in params.items():
                generator = torch.Generator().manual_seed(10 * step + int(name))
                p.grad = torch.randn(shape, generator=generator).bfloat16()
            optimizer.step()
        return {name: p.detach() for name, p in params.items()}

    together = run([str(i) for i in range(6)])
    different = sum(int((together[str(i)] != run([str(i)])[str(i)]).sum()) for i in range(6))
    assert different <= 6 * 12 * 20 // 200  # a sum in another order may round across a random number
    assert not torch.equal(together["0"], together["1"])


def test_rounding_is_seeded_and_resumes() -> None:
    def build(seed: int) -> tuple[nn.Parameter, GaLore]:
        parameter = nn.Parameter(torch.ones(24, 32, dtype=torch.bfloat16))
        return parameter, GaLore([{"params": [("a", parameter)], "rank": 4}], lr=1e-3, rounding="stochastic", seed=seed)

    def train(parameter: nn.Parameter, optimizer: GaLore, steps: range) -> None:
        for step in steps:
            parameter.grad = torch.randn(24, 32, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()

    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name], optimizer = build(seed)
        train(runs[name], optimizer, range(6))
    assert torch.equal(runs["a"], runs["b"]) and not torch.equal(runs["a"], runs["c"])
    straight, optimizer = build(0)
    train(straight, optimizer, range(3))
    resumed, again = build(0)
    resumed.data.copy_(straight.data)
    again.load_state_dict(optimizer.state_dict())
    train(straight, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert torch.equal(straight, resumed) and torch.equal(straight, runs["a"])


@pytest.mark.parametrize("shape", [(3, 12, 20), (8, 6, 3, 3), (700, 600)], ids=str)
def test_stacks_kernels_and_tiles_draw_apart(shape: tuple[int, ...]) -> None:
    for keys in ({}, {"rank": 4}):
        parameter = nn.Parameter(torch.full(shape, 1.0 + 2**-7, dtype=torch.bfloat16))
        method = "galore" if keys else "adamw"
        groups = [{"params": [("a", parameter)], **keys}]
        optimizer = create_optimizer(method, groups, lr=0.5, weight_decay=2.0**-8, rounding="stochastic")
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # decay alone: every weight lies a quarter of the way below the one it had
        moved = (parameter != 1.0 + 2**-7).double()
        assert moved.mean() == pytest.approx(0.252, abs=4 * (0.19 / moved.numel()) ** 0.5)
        flat = moved.flatten(1)
        assert len({tuple(row.tolist()) for row in flat}) > 0.9 * len(flat)  # no two rows, no two experts alike


@pytest.mark.parametrize(("settings", "message"), [({"rounding": "up"}, "rounding='up'"), ({}, "float16")], ids=str)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match=message):
        GaLore([{"params": [parameter], "rank": 2}], **{"rounding": "stochastic", **settings})
