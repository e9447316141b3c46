"""Weights that are held in int8: every recipe's loop with rounded weights, and what has to hold of the rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references.adamw import AdamWReference
from references.apollo import APOLLOReference
from references.galore import GaLoreReference
from references.int8 import Int8Reference
from references.parts import exact_basis
from references.q_galore import QGaLoreReference
from references.quantised import QuantisedAdam
from torch import Tensor, nn

from contract.cases import CASES, Case, gradient, parameters
from contract.test_reference import GAP, NAME, NUMBERS, RANK, SEED, STEPS, counted, gaussian
from subspan.optim import create_optimizer
from subspan.optim.matrix import projects_right
from subspan.state import Int8Weight, random_bits

pytestmark = pytest.mark.filterwarnings("ignore:weights that are held in int8")
GROUP = 20
SHAPES = [(24, 40), (40, 20), (20, 20)]


def int8(W: Tensor, group: int = GROUP) -> nn.Parameter:
    return nn.Parameter(Int8Weight.of(W.detach(), group))


def weight(p: Tensor) -> Int8Weight:
    assert isinstance(p, Int8Weight)
    return p


def loops(method: str, proj_type: str, numbers: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A reference, the keys of its group, and structural settings."""
    keys: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "proj_type": proj_type}
    own: dict[str, Any] = {"stagger": False}
    if method == "adamw":
        return AdamWReference(**numbers), {}, {}
    if method == "galore":
        return GaLoreReference(**keys, **numbers), keys, own | {"svd": "exact"}
    if method == "q_galore":
        lazy = {"cos_threshold": 0.9, "gamma_proj": 2.0, "queue_size": 2}
        inner = QuantisedAdam(8, block=256, betas=numbers["betas"])
        reference: Any = QGaLoreReference(inner=inner, find=exact_basis, **keys, **lazy, **numbers)
        return reference, keys | lazy, own | {"svd": "exact", "min_quantized": 1}
    mini: dict[str, Any] = {"tensor": True, "scale": 128.0} if method == "q_apollo_mini" else {}
    keys |= {"rank": 1} if mini else {}
    return APOLLOReference(find=counted(gaussian), **mini, **keys, **numbers), keys, own


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["adamw", "galore", "q_galore", "q_apollo", "q_apollo_mini"])
def test_reference(method: str, shape: tuple[int, int], proj_type: str, rounding: str) -> None:
    """Codes are those of the loop; a number that float32 puts on the other side of a bound may be one step off."""
    numbers = NUMBERS | ({"lr": 0.1} if rounding == "nearest" else {})  # smaller steps are lost
    inner, keys, settings = loops(method, proj_type, numbers)
    (dense,) = parameters({NAME: shape}).values()
    p = int8(dense)
    optimizer = create_optimizer(
        method, [{"params": [(NAME, p)], **keys}], seed=SEED, rounding=rounding, **numbers, **settings
    )
    right = bool(keys) and projects_right(*shape, proj_type)

    def uniform(step: int) -> Tensor:
        """Numbers of elements follow the oriented matrix."""
        key = optimizer._rounding_key(NAME, optimizer.param_groups[0], step)
        numbers = torch.arange(dense.numel()).view(shape[::-1] if right else shape)
        return (random_bits(key, numbers.T if right else numbers) + 0.5) * 2.0**-16

    reference = Int8Reference(inner, GROUP, None if rounding == "nearest" else uniform)
    W = reference.start(dense.detach())
    assert torch.equal(weight(p).dense().double(), W)
    start = W.clone()
    for step in range(STEPS):
        W = reference.step(W, gradient(NAME, W, step))
        p.grad = gradient(NAME, weight(p).dense(), step).float()
        optimizer.step()
        apart = (weight(p).dense().double() - W).abs()
        allowed = 2.1 * weight(p).steps.double().max()
        assert apart.max() < allowed
        assert (apart > 1e-5).double().mean() < 0.02, f"step {step}"
    assert (W - start).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_leaves_all_codes(case: Case) -> None:
    """With a learning rate of 0 nothing is rounded anew, and gradients as small as nothing change next to nothing."""
    named = {name: int8(p, 24) for name, p in parameters().items()}
    before = {name: weight(p).codes.clone() for name, p in named.items()}
    optimizer = case(case.groups(named), lr=0.0, rounding="stochastic")
    for step in range(3):
        for name, p in named.items():
            p.grad = gradient(name, weight(p).dense(), step).float()
        optimizer.step()
    assert all(torch.equal(weight(p).codes, before[name]) for name, p in named.items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_in_the_mean(case: Case) -> None:
    """Over many seeds of the rounding, the mean step is that of float weights; rounded to nearest it is lost."""
    (dense,) = parameters({NAME: (16, 32)}).values()
    start = weight(int8(dense, 32)).detach()
    origin, size = start.dense(), float(start.steps.float().min())
    G = gradient(NAME, dense, 0).float()

    def stepped(p: nn.Parameter, lr: float, seed: int | None) -> nn.Parameter:
        optimizer = case(case.groups({NAME: p}), lr=lr)  # one subspace for all: only the rounding depends on the seed
        key = None if seed is None else torch.tensor(seed)
        optimizer._rounding_key = lambda *arguments: key  # type: ignore[method-assign]
        p.grad = G.clone()
        optimizer.step()
        return p

    probe = (stepped(nn.Parameter(origin.clone()), 1e-3, None).detach() - origin).abs().max()
    lr = 1e-3 * 0.3 * size / float(probe)
    wanted = stepped(nn.Parameter(origin.clone()), lr, None).detach() - origin
    moves = [weight(stepped(nn.Parameter(start.clone()), lr, seed)).dense() - origin for seed in range(32)]
    mean = torch.stack(moves).mean(dim=0)
    # A move is one code with the probability f, else none: the variance of a mean over 32 is at most f/32.
    noise = size * (wanted.abs().sum() / size / 32).sqrt()
    assert (mean - wanted).sum().abs() < 5 * noise
    assert ((mean * wanted.sign()).sum() - wanted.abs().sum()).abs() < 5 * noise < wanted.abs().sum()
    nearest = weight(stepped(nn.Parameter(start.clone()), lr, None))
    same = (nearest.steps == start.steps).squeeze(1)
    assert same.any() and torch.equal(nearest.dense()[same], origin[same])


def test_parameters_do_not_depend_on_what_is_stepped_beside_them() -> None:
    def trained(names: list[str]) -> dict[str, Tensor]:
        named = {name: int8(p, 24) for name, p in parameters().items() if name in names}
        optimizer = create_optimizer("q_apollo", [{"params": list(named.items()), "rank": 4}], lr=1e-2, stagger=False)
        for step in range(3):
            for name, p in named.items():
                p.grad = gradient(name, weight(p).dense(), step).float()
            optimizer.step()
        return {name: weight(p).codes for name, p in named.items()}

    alone, together = trained(["layers.0.q.weight"]), trained(list(parameters()))
    assert torch.equal(alone["layers.0.q.weight"], together["layers.0.q.weight"])


def test_moments_of_8_bits_beside_weights_of_8_bits() -> None:
    """Pieces of whole rows and whole blocks: the float weights' step, then rounded."""
    dense = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    p = int8(dense, 250)
    q = nn.Parameter(weight(p).dense())
    for one in (p, q):
        one.grad = gradient("w", dense, 0).float()
        create_optimizer("adamw", [{"params": [("w", one)]}], lr=0.1, moments="8bit").step()
    apart = (weight(p).dense() - q).abs().unflatten(1, (4, 250)).amax(dim=-1)
    assert (apart <= 0.51 * weight(p).steps.float()).all()
    assert not torch.equal(weight(p).dense(), weight(int8(dense, 250)).dense())
