"""Stacks of matrices and convolutions are projected as the matrices that they consist of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.apollo import APOLLOReference
from references.frugal import FRUGALReference, rows_basis
from references.golore import GoLoreReference
from torch import Tensor, nn

from contract.cases import LOW_RANK, Case, clone, difference, parameters, random_matrix, train
from subspan.optim import GaLore, create_optimizer

EXACT = [
    Case("galore", {"svd": "exact", "stagger": False}),
    Case("fira", {"svd": "exact", "stagger": False}),
    Case("golore", {"svd": "exact", "stagger": False}),
    Case("q_galore", {"svd": "exact", "stagger": False, "moments": "4bit"}),
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


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)], ids=str)
@pytest.mark.parametrize("method", ["golore", "apollo", "apollo_mini", "frugal rows", "frugal stiefel"])
def test_every_expert_follows_the_reference_in_its_own_subspace(method: str, shape: tuple[int, int]) -> None:
    """The random subspaces are read from the state: norms, scales and limiters belong to one expert, not the stack."""
    count, side = 3, 10
    recipe, _, subspace = method.partition(" ")
    keys: dict[str, Any] = {"rank": 1 if recipe == "apollo_mini" else 4, "update_proj_gap": 4}
    if recipe == "frugal":
        keys = {"density": 0.4, "update_proj_gap": 4}
    settings: dict[str, Any] = {"subspace": subspace} if subspace else {"stagger": False}
    (p,) = parameters({"experts": (count, *shape)}).values()
    optimizer = create_optimizer(recipe, [{"params": [("experts", p)], **keys}], lr=1e-2, **settings)

    def basis_of(expert: int) -> Tensor:
        state = optimizer.state[p]
        return rows_basis(state["rows"][expert], side) if "rows" in state else state["basis"][expert]

    def reference(expert: int) -> Any:
        def find(*_: Any) -> Tensor:
            return basis_of(expert)

        if recipe == "golore":
            return GoLoreReference(draw=find, lr=1e-2, **keys)
        if recipe == "frugal":
            return FRUGALReference(side=side, find=find, lr=1e-2, **keys)
        scale = {"tensor": True, "scale": 128.0} if recipe == "apollo_mini" else {}
        return APOLLOReference(find=find, lr=1e-2, **scale, **keys)

    references = [reference(expert) for expert in range(count)]
    W = list(p.detach().double())
    for step in range(10):
        p.grad = stacked_gradients(count, shape, step) * torch.tensor([1.0, 30.0, 0.1])[:, None, None]
        optimizer.step()
        W = [loop.step(w, G) for loop, w, G in zip(references, W, p.grad, strict=True)]
        assert (p.detach().double() - torch.stack(W)).abs().max() < 1e-5, step


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
