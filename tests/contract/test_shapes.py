"""Stacks of matrices and convolutions are projected as the matrices that they consist of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from contract.cases import LOW_RANK, Case, clone, difference, parameters, random_matrix, train
from subspan.optim import GaLore

EXACT = [
    Case("galore", {"svd": "exact", "stagger": False}),
    Case("fira", {"svd": "exact", "stagger": False}),
    Case("golore", {"svd": "exact", "stagger": False}),
]


def stacked_gradients(count: int, shape: tuple[int, int], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.stack([random_matrix(shape, generator) for _ in range(count)]).float()


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("shape", [(10, 16), (16, 10), (12, 12)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_stacked_experts_equal_a_loop_over_the_experts(case: Case, shape: tuple[int, int], proj_type: str) -> None:
    count = 3
    stack = parameters({"experts": (count, *shape)})
    loop = {f"{i}": nn.Parameter(stack["experts"][i].detach().clone()) for i in range(count)}
    keys = {"proj_type": proj_type, **({"golore_after": 1000} if case.method == "golore" else {})}
    one, other = case(case.groups(stack, **keys)), case(case.groups(loop, **keys))
    for step in range(10):
        G = stacked_gradients(count, shape, step)
        stack["experts"].grad = G
        for i in range(count):
            loop[f"{i}"].grad = G[i].clone()
        one.step()
        other.step()
    together = torch.stack([loop[f"{i}"].detach() for i in range(count)])
    assert difference({"experts": stack["experts"]}, {"experts": together}) < 1e-5


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_stacks_train_with_every_method(case: Case) -> None:
    named = parameters({"experts": (3, 10, 16)})
    before = clone(named)
    train(case(case.groups(named)), named, 10)
    change = named["experts"].detach() - before["experts"]
    assert change.isfinite().all()
    assert (change.flatten(1).norm(dim=1) > 1e-3).all()


def test_experts_draw_different_subspaces() -> None:
    """One generator serves the whole stack, but each expert takes its own numbers."""
    p = nn.Parameter(torch.zeros(2, 10, 16))
    optimizer = GaLore([{"params": [("experts", p)], "rank": 3}], lr=0.01)
    p.grad = stacked_gradients(1, (10, 16), 0).expand(2, -1, -1).clone()
    optimizer.step()
    assert not torch.allclose(p[0], p[1], atol=1e-5)


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (40, 2, 3, 3), (9, 1, 3, 3)], ids=str)
def test_a_convolution_equals_its_flattened_matrix(case: Case, shape: tuple[int, ...]) -> None:
    conv = parameters({"a": shape})
    flat = {"a": nn.Parameter(conv["a"].detach().flatten(1).clone())}
    one, other = case(case.groups(conv)), case(case.groups(flat))
    for step in range(10):
        G = random_matrix(flat["a"].shape, torch.Generator().manual_seed(step)).float()
        conv["a"].grad = G.reshape(shape).clone()
        flat["a"].grad = G
        one.step()
        other.step()
    assert difference({"a": conv["a"].flatten(1)}, flat) < 1e-6
    assert difference(conv, parameters({"a": shape})) > 1e-3


@pytest.mark.parametrize("case", LOW_RANK, ids=str)
def test_channels_last_convolutions(case: Case) -> None:
    plain = parameters({"a": (8, 6, 3, 3), "b": (8, 6, 3, 3)})
    last = {name: nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for name, p in plain.items()}
    assert not last["a"].is_contiguous()
    train(case(case.groups(plain)), plain, 6)
    train(case(case.groups(last)), last, 6)
    assert difference(plain, last) < 1e-6
