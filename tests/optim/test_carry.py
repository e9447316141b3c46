"""States that are taken over by another rank, another method, or from a dense optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from subspan.optim import APOLLO, AdamW, Fira, GaLore, LowRankOptimizer, create_optimizer, list_methods, method_info
from subspan.optim.carry import carried
from tests.checkpoint.models import model, train


def take_over(optimizer: LowRankOptimizer, source: LowRankOptimizer) -> None:
    named = {name: (p, group) for name, p, group in source._everything()}
    saved = {name: (source.state[p], group) for name, (p, group) in named.items() if p in source.state}
    optimizer.load_state_dict(carried(optimizer, saved, source.state_dict()["subspan"]))


def trained(kind: Any, steps: int = 6, **settings: Any) -> tuple[nn.Sequential, LowRankOptimizer]:
    network = model()
    optimizer = kind(network, lr=1e-3, **settings)
    train(network, optimizer, steps)
    return network, optimizer


def test_a_dense_state_is_projected() -> None:
    network, dense = trained(AdamW)
    optimizer = GaLore(network, rank=4, update_proj_gap=50)
    take_over(optimizer, dense)
    W = network[0].weight  # 32 x 64: its rows are the projected side
    M, V = dense.state[W]["exp_avg"], dense.state[W]["exp_avg_sq"]
    state = optimizer.state[W]
    Q = state["basis"]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4))
    torch.testing.assert_close(state["exp_avg"], Q.mT @ M)
    least = (1 - 0.999**6) / (1 - 0.9**6) ** 2
    torch.testing.assert_close(state["exp_avg_sq"], torch.maximum((Q * Q).mT @ V, least * (Q.mT @ M) ** 2))
    # The subspace is that of the first moment.
    energy = torch.linalg.svdvals(M).square()
    assert (Q.mT @ M).square().sum() > 0.8 * energy[:4].sum()
    assert state["step"] == 6 and state["refreshes"] == 1 and 6 < state["next_refresh"] <= 56
    bias = network[0].bias
    assert all(torch.equal(value, dense.state[bias][key]) for key, value in optimizer.state[bias].items())


def test_the_first_steps_after_a_dense_state_are_no_larger_than_its_own() -> None:
    """Where all entries point one way, (Q∘Q)ᵀV alone would be too small by the number of rows."""
    network = nn.Linear(64, 32, bias=False)
    dense = AdamW(network, lr=1e-3)
    for _ in range(20):
        network.weight.grad = torch.ones(32, 64)
        dense.step()
    optimizer = GaLore(network, rank=2, lr=1e-3, scale=1.0, update_proj_gap=100)
    take_over(optimizer, dense)
    before = network.weight.detach().clone()
    network.weight.grad = torch.ones(32, 64)
    optimizer.step()
    step = (network.weight - before).norm()
    # Adam's direction has entries of one: of r rows here, of all rows there.
    assert step <= 1.05 * 1e-3 * (2 * 64) ** 0.5


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_a_constant_gradient_goes_on_with_full_steps(steps: int) -> None:
    """Moments of few steps are small, the second one above all: it may not be lifted above what they tell."""
    network = nn.Linear(64, 32, bias=False)
    dense = AdamW(network, lr=1e-3)
    for _ in range(steps):
        network.weight.grad = torch.ones(32, 64)
        dense.step()
    optimizer = GaLore(network, rank=1, lr=1e-3, scale=1.0, update_proj_gap=2000)
    take_over(optimizer, dense)
    before = network.weight.detach().clone()
    network.weight.grad = torch.ones(32, 64)
    optimizer.step()
    step = float((network.weight.detach() - before).norm())
    assert step == pytest.approx(1e-3 * 64**0.5, rel=0.02)


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_another_rank(rank: int) -> None:
    network, old = trained(GaLore, rank=4, update_proj_gap=50)
    optimizer = GaLore(network, rank=rank, update_proj_gap=50, lr=1e-3)
    take_over(optimizer, old)
    W = network[0].weight
    before, state = old.state[W], optimizer.state[W]
    kept = min(4, rank)
    Q = state["basis"]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(rank), atol=1e-5, rtol=0)
    assert torch.equal(Q[:, :kept], before["basis"][:, :kept])
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key][:kept], before[key][:kept])
    assert not state["exp_avg"][kept:].any()
    if rank > 4:
        weakest = before["exp_avg_sq"][3].mean()
        torch.testing.assert_close(state["exp_avg_sq"][4:], weakest.expand(rank - 4, 64))
    for key in ("step", "refreshes", "next_refresh"):
        assert torch.equal(state[key], before[key])
    losses = train(network, optimizer, 5, seed=2)
    assert losses[-1] < 1.2 * losses[0]


def test_another_method_of_the_same_subspace() -> None:
    network, old = trained(GaLore, rank=4)
    optimizer = Fira(network, rank=4)
    take_over(optimizer, old)
    W = network[0].weight
    for key in ("basis", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[W][key], old.state[W][key])


def test_states_that_are_coded_are_decoded() -> None:
    network, old = trained(AdamW, moments="8bit", min_quantized=256)
    optimizer = GaLore(network, rank=4, moments="8bit", min_quantized=64)
    take_over(optimizer, old)
    W = network[0].weight
    assert optimizer.state[W]["exp_avg"].dtype == torch.uint8
    specs = optimizer._specs("0.weight", W, optimizer.param_groups[0], optimizer.state[W])
    dense = old._specs("0.weight", W, old.param_groups[0], old.state[W])
    Q = optimizer.state[W]["basis"]
    M = dense["exp_avg"].decode("exp_avg", old.state[W])
    found = specs["exp_avg"].decode("exp_avg", optimizer.state[W])
    assert (found - Q.mT @ M).abs().max() < 0.02 * M.abs().max() * 6


def test_what_cannot_be_taken_over_starts_anew() -> None:
    network, old = trained(APOLLO, rank=4, store_basis=False)
    other = APOLLO(network, rank=4, store_basis=False, seed=5)
    with pytest.warns(RuntimeWarning, match=r"0\.weight, 2\.weight cannot be taken over and start anew"):
        take_over(other, old)
    assert not other.state[network[0].weight] and other.state[network[0].bias]["step"] == 6
    same = APOLLO(network, rank=4, store_basis=False)
    take_over(same, old)
    assert torch.equal(same.state[network[0].weight]["exp_avg"], old.state[network[0].weight]["exp_avg"])
    with pytest.warns(RuntimeWarning, match="start anew"):
        take_over(GaLore(network, rank=4), old)
    with pytest.warns(RuntimeWarning, match="start anew"):
        take_over(GaLore(network, rank=4, proj_type="reverse_std"), trained(GaLore, rank=4)[1])
    with pytest.raises(ValueError, match="which this optimizer does not train"):
        take_over(GaLore(nn.Linear(64, 32, bias=False), rank=4), old)


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("source", ["adamw", "galore", "q_galore", "frugal"])
def test_every_method_goes_on_from_every_kind(source: str, name: str) -> None:
    def build(method: str, network: nn.Module, rank: int) -> LowRankOptimizer:
        size = {"rank": rank} if method_info(method).size == "rank" else {}
        return create_optimizer(method, network, lr=1e-3, **size)

    network = model()
    old = build(source, network, 4)
    train(network, old, 4)
    for rank in (3, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = build(name, network, rank)
            take_over(optimizer, old)
        losses = train(network, optimizer, 4, seed=2)
        assert losses[-1] < 1.5 * losses[0]
