"""Each recipe follows its paper-close reference loop: 20 steps across two refreshes, every shape, every side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from references.adamw import AdamWReference
from references.apollo import APOLLOReference
from references.fira import FiraReference
from references.frugal import FRUGALBlocksReference, FRUGALReference, rows_basis
from references.galore import GaLoreReference
from references.golore import GoLoreReference
from references.parts import SGD, exact_basis, projects_left
from references.q_galore import QGaLoreReference
from references.quantised import QuantisedAdam, linear_levels, quantised
from torch import Tensor, nn

from contract.cases import Case, gradient, parameters
from subspan.linalg import gaussian_sketch, random_stiefel, range_finder, seeded_generator
from subspan.optim import SGD as InnerSGD
from subspan.optim import create_optimizer, list_methods

NAME = "blocks.3.weight"
SEED, RANK, GAP, STEPS = 5, 4, 8, 20
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}
SIDES = ["std", "reverse_std", "left", "right"]
NUMBERS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
TOLERANCE = 1e-5


def counted(draw: Callable[[Tensor, int, torch.Generator], Tensor], seed: int = SEED) -> Callable[..., Tensor]:
    """A random finder as the papers need it: its generator comes from (seed, name, number of earlier refreshes)."""
    count = -1

    def find(G: Tensor, rank: int, step: int, old: Tensor | None) -> Tensor:
        nonlocal count
        count += 1
        return draw(G, rank, seeded_generator(seed, NAME, count))

    return find


def sketched(G: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return range_finder(G.float(), rank, generator=generator).basis


def exact(G: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return exact_basis(G, rank)


def haar(G: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return random_stiefel(len(G), rank, generator=generator)


def gaussian(G: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return gaussian_sketch(len(G), rank, generator=generator, scale=rank**-0.5)


def some_rows(G: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    return rows_basis(torch.randperm(len(G), generator=generator)[:rank].sort().values, len(G))


def follow(
    method: str,
    reference: Any,
    shape: tuple[int, int],
    keys: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> None:
    """The optimizer in float32 and the reference in float64 see gradients of their own weights; compare each step."""
    (p,) = parameters({NAME: shape}, dtype=dtype).values()
    W = p.detach().double()
    start = W.clone()
    optimizer = create_optimizer(method, [{"params": [(NAME, p)], **keys}], seed=SEED, **NUMBERS, **settings)
    for step in range(STEPS):
        W = reference.step(W, gradient(NAME, W, step))
        p.grad = gradient(NAME, p, step).to(dtype)
        optimizer.step()
        assert (p.detach().double() - W).abs().max() < TOLERANCE, f"step {step}"
    assert (W - start).abs().max() > 1e3 * TOLERANCE  # the weights have moved, so the comparison says something


def every_side(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.parametrize("proj_type", SIDES)(test)
    return pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)(test)


def group(proj_type: str, **keys: Any) -> dict[str, Any]:
    return {"rank": RANK, "update_proj_gap": GAP, "proj_type": proj_type, **keys}


def test_every_method_has_a_reference() -> None:
    """Those with weights of 8 bits are in test_int8.py; without them they are the recipes that they are made of."""
    known = {"adamw", "galore", "galore_8bit", "q_galore", "golore", "fira", "apollo", "apollo_mini", "frugal"}
    known |= {"q_apollo", "q_apollo_mini"} | {"scale"}  # the last one in test_scale.py
    assert set(list_methods()) == known


@pytest.mark.parametrize("shape", [*SHAPES.values(), (9,)], ids=str)
def test_adamw(shape: tuple[int, int]) -> None:
    follow("adamw", AdamWReference(**NUMBERS), shape, {})


@every_side
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_galore(shape: tuple[int, int], proj_type: str, svd: str) -> None:
    find = exact_basis if svd == "exact" else counted(sketched)
    keys = group(proj_type)
    follow("galore", GaLoreReference(find=find, **keys, **NUMBERS), shape, keys, svd=svd, stagger=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_galore_as_galore_torch_places_eps_and_decay(shape: tuple[int, int]) -> None:
    """A large ε and decay, so that their places matter."""
    keys = group("std", eps=1e-2, scale=1.0)
    published = {"eps_placement": "before", "decay": "after"}
    reference = GaLoreReference(**keys, **NUMBERS, **published)
    follow("galore", reference, shape, keys, svd="exact", stagger=False, **published)


def test_galore_with_gradient_descent_inside() -> None:
    keys = group("std", scale=1.0)
    reference = GaLoreReference(**keys, **NUMBERS, inner=SGD())
    follow("galore", reference, (12, 20), keys, svd="exact", stagger=False, inner=InnerSGD())


def coded(moments: str, basis: str = "float32") -> dict[str, Any]:
    """Settings of a run whose state is quantised however small it is; in float64, where roundings fall alike."""
    return {"moments": moments, "basis_storage": basis, "min_quantized": 1, "dtype": torch.float64}


@every_side
@pytest.mark.parametrize("bits", [8, 4])
def test_galore_with_quantised_moments(shape: tuple[int, int], proj_type: str, bits: int) -> None:
    keys = group(proj_type)
    inner = QuantisedAdam(bits, block=256 if bits == 8 else 128, betas=NUMBERS["betas"])
    reference = GaLoreReference(inner=inner, **keys, **NUMBERS)
    method = "galore_8bit" if bits == 8 else "galore"
    follow(method, reference, shape, keys, svd="exact", stagger=False, **coded(f"{bits}bit"))


@pytest.mark.parametrize("shape", [*SHAPES.values(), (30, 40)], ids=str)
def test_adamw_with_quantised_moments(shape: tuple[int, int]) -> None:
    """The last one has several blocks, and a ragged one."""
    reference = AdamWReference(**NUMBERS)
    reference.adam = QuantisedAdam(8, block=256, betas=NUMBERS["betas"])
    settings = coded("8bit")
    del settings["basis_storage"]
    follow("adamw", reference, shape, {}, **settings)


@every_side
@pytest.mark.parametrize("bits", [8, 4])
def test_fira_with_a_quantised_basis(shape: tuple[int, int], proj_type: str, bits: int) -> None:
    """One basis projects, projects back and is taken away from the gradient: the rounded one."""

    def find(*arguments: Any) -> Tensor:
        return quantised(exact_basis(*arguments), linear_levels(bits), block=256)

    keys = group(proj_type)
    reference = FiraReference(find=find, **keys, **NUMBERS)
    follow("fira", reference, shape, keys, svd="exact", stagger=False, **coded("float32", f"int{bits}"))


@every_side
@pytest.mark.parametrize("cos_threshold", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("official_code", [False, True])
def test_q_galore(shape: tuple[int, int], proj_type: str, cos_threshold: float, official_code: bool) -> None:
    """Refreshed every second step at first; with the lowest threshold the period doubles after two refreshes."""
    lazy: dict[str, Any] = {"cos_threshold": cos_threshold, "gamma_proj": 2.0, "queue_size": 2}
    keys = group(proj_type, **lazy) | {"update_proj_gap": 2}
    settings = {"official_code": official_code, "find": exact_basis}
    inner = QuantisedAdam(8, block=256, betas=NUMBERS["betas"])
    reference = QGaLoreReference(inner=inner, **settings, **keys, **NUMBERS)
    own = {"svd": "exact", "stagger": False, "official_code": official_code}
    follow("q_galore", reference, shape, keys, **own, **coded("8bit", "int4"))
    if cos_threshold == 0.9:
        assert reference.refreshes == list(range(0, STEPS, 2))
    elif cos_threshold == 0.1 and not official_code:
        assert reference.refreshes == [0, 2, 4, 8, 12]


@pytest.mark.parametrize("rank", [12, 16, 99])
@pytest.mark.parametrize("method", ["galore", "golore", "fira"])
def test_full_rank_is_adam_times_scale(method: str, rank: int) -> None:
    keys = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25}
    follow(method, GaLoreReference(**keys, **NUMBERS), (12, 20), keys, stagger=False)


@every_side
@pytest.mark.parametrize("golore_after", [0, 8])
def test_golore(shape: tuple[int, int], proj_type: str, golore_after: int) -> None:
    keys = group(proj_type)
    count = -1

    def generator() -> torch.Generator:
        nonlocal count
        count += 1
        return seeded_generator(SEED, NAME, count)

    reference = GoLoreReference(
        draw=lambda G, rank, step, old: haar(G, rank, generator()),
        find=lambda G, rank, step, old: sketched(G, rank, generator()),
        golore_after=golore_after,
        **keys,
        **NUMBERS,
    )
    follow("golore", reference, shape, {**keys, "golore_after": golore_after}, stagger=False)


@every_side
@pytest.mark.parametrize("official_code", [False, True])
def test_fira(shape: tuple[int, int], proj_type: str, official_code: bool) -> None:
    keys = group(proj_type)
    reference = FiraReference(find=counted(sketched), official_code=official_code, **keys, **NUMBERS)
    follow("fira", reference, shape, keys, official_code=official_code, stagger=False)


@pytest.mark.parametrize("limiter", [1.01, 1.5, float("inf")])
def test_fira_limits_the_growth_of_the_residual(limiter: float) -> None:
    """Gradients of this reference vary enough from step to step for the limiter to act (asserted)."""
    keys = group("std")
    limited, free = (
        FiraReference(find=exact_basis, limiter=gamma, **keys, **NUMBERS) for gamma in (limiter, float("inf"))
    )
    W = V = torch.zeros(12, 20)
    for step in range(5):
        W, V = limited.step(W, gradient(NAME, W, step)), free.step(V, gradient(NAME, V, step))
    assert torch.equal(W, V) == (limiter == float("inf"))
    reference = FiraReference(find=counted(sketched), limiter=limiter, **keys, **NUMBERS)
    follow("fira", reference, (12, 20), {**keys, "limiter": limiter}, stagger=False)


@every_side
@pytest.mark.parametrize("settings", [{}, {"store_basis": False}, {"scale_front": True}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_apollo(shape: tuple[int, int], proj_type: str, settings: dict[str, Any], scale: float) -> None:
    keys = group(proj_type, scale=scale)
    front = {key: value for key, value in settings.items() if key == "scale_front"}
    for method in ("apollo", "q_apollo"):
        reference = APOLLOReference(find=counted(gaussian), **front, **keys, **NUMBERS)
        follow(method, reference, shape, keys, stagger=False, **settings)


@every_side
def test_apollo_mini(shape: tuple[int, int], proj_type: str) -> None:
    keys = {"rank": 1, "update_proj_gap": GAP, "proj_type": proj_type}
    for method in ("apollo_mini", "q_apollo_mini"):
        reference = APOLLOReference(find=counted(gaussian), tensor=True, scale=128.0, **keys, **NUMBERS)
        follow(method, reference, shape, keys, stagger=False)


@every_side
@pytest.mark.parametrize(
    ("subspace", "draw"), [("rows", some_rows), ("stiefel", haar), ("svd", exact), ("randomized_svd", sketched)]
)
@pytest.mark.parametrize("sign_scale", [1.0, 0.3])
def test_frugal(
    shape: tuple[int, int], proj_type: str, subspace: str, draw: Callable[..., Tensor], sign_scale: float
) -> None:
    keys = {"density": 0.25, "update_proj_gap": GAP, "proj_type": proj_type, "sign_scale": sign_scale}
    side = shape[0] if projects_left(shape, proj_type) else shape[1]
    reference = FRUGALReference(side=side, find=counted(draw), **keys, **NUMBERS)
    follow("frugal", reference, shape, keys, subspace=subspace)


@pytest.mark.parametrize("subspace", ["rows", "svd", "stiefel", "blocks"])
def test_frugal_without_density_is_sign_descent(subspace: str) -> None:
    reference = FRUGALReference(side=12, density=0.0, find=exact_basis, **NUMBERS)
    follow("frugal", reference, (12, 20), {"density": 0.0, "update_proj_gap": GAP}, subspace=subspace)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
def test_frugal_blocks(density: float) -> None:
    shapes = {f"layers.{i}.{kind}": (8 + 4 * i, 12) for i in (0, 1, 2, 10) for kind in ("q", "up")}
    named = parameters(shapes)
    keys = {"density": density, "update_proj_gap": 4}
    reference = FRUGALBlocksReference({n: p.shape for n, p in named.items()}, **keys, **NUMBERS)
    shuffled = sorted(named.items(), key=lambda item: item[1].sum().item())  # the names alone give the order
    optimizer = create_optimizer("frugal", [{"params": shuffled, **keys}], **NUMBERS)
    weights = {name: p.detach().double() for name, p in named.items()}
    for step in range(STEPS):
        weights = reference.step(weights, {name: gradient(name, W, step) for name, W in weights.items()})
        for name, p in named.items():
            p.grad = gradient(name, p, step).float()
        optimizer.step()
        for name, p in named.items():
            assert (p.detach().double() - weights[name]).abs().max() < TOLERANCE, (step, name)


@pytest.mark.parametrize("method", list_methods())
def test_dense_parameters_follow_torch_adamw(method: str) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 30).reshape(5, 6)) for _ in range(2))
    optimizer = Case(method, {}).dense({"weight": ours}, eps=1e-8, **NUMBERS)
    baseline = torch.optim.AdamW([theirs], eps=1e-8, **NUMBERS)
    for step in range(STEPS):
        for p, o in ((ours, optimizer), (theirs, baseline)):
            p.grad = gradient("weight", p, step).float()
            o.step()
    assert (ours - theirs).abs().max() < 1e-6


def test_references_share_no_code_with_the_package() -> None:
    sources = list(Path(references.__file__).parent.glob("*.py"))
    assert len(sources) > 6
    for source in sources:
        modules = [line.split()[1] for line in source.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [module for module in modules if module.startswith("subspan")], source
