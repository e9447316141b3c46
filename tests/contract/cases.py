"""Small set-ups shared by the contract tests: one entry per method and structural setting, parameters, gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim import create_optimizer, list_methods, method_info

# Keys that make a group of this method more than a dense one; methods that are not listed take a rank.
GROUP_KEYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "apollo_mini": {"rank": 1, "update_proj_gap": 4},
    "q_apollo_mini": {"rank": 1, "update_proj_gap": 4},
    "frugal": {"density": 0.4, "update_proj_gap": 4},
    "galore_8bit": {"rank": 4, "update_proj_gap": 4, "min_quantized": 1},
    # Its period doubles at every refresh.
    "q_galore": {"rank": 4, "update_proj_gap": 4, "min_quantized": 1, "queue_size": 1, "cos_threshold": 0.0},
    "scale": {"outputs": "rows"},
}
DEFAULT_GROUP_KEYS: dict[str, Any] = {"rank": 4, "update_proj_gap": 4}
# A cap above the multiple of 8 to which ranks are rounded.
TOLERANCE_GROUP_KEYS: dict[str, Any] = {"rank": 20, "update_proj_gap": 4}

# Structural settings beyond a method's defaults. Matrices are small here, so the least size for codecs is 1.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"moments": "8bit", "min_quantized": 1}],
    "galore": [
        {"svd": "exact", "stagger": False},
        {"eps_placement": "before", "decay": "after"},
        {"rank_policy": "tolerance", "rtol": 0.2},
    ],
    "golore": [{"stagger": False}, {"moments": "bfloat16", "basis_storage": "bfloat16", "min_quantized": 1}],
    "fira": [{"official_code": True}, {"moments": "4bit", "basis_storage": "int8", "min_quantized": 1}],
    "apollo": [{"store_basis": False}, {"scale_front": True}],
    "frugal": [{"subspace": "rows"}, {"subspace": "svd"}, {"subspace": "stiefel"}],
    "scale": [{"momentum": 0.0}, {"norm": "l2"}, {"moments": "8bit", "min_quantized": 1}],
}


class Case:
    """A method with structural settings; `case(groups, lr=…)` builds its optimizer."""

    def __init__(self, method: str, settings: dict[str, Any]) -> None:
        self.method, self.settings = method, settings
        self.keys = GROUP_KEYS.get(method, DEFAULT_GROUP_KEYS)
        if settings.get("rank_policy") == "tolerance":
            self.keys = TOLERANCE_GROUP_KEYS

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def projects(self) -> bool:
        return method_info(self.method).size is not None

    @property
    def transposed_keys(self) -> dict[str, Any]:
        """Keys with which a group of transposed matrices is worked on alike."""
        return {"outputs": "columns"} if self.method == "scale" else {}

    @property
    def finds_by_sketch(self) -> bool:
        """Whether its bases come from a product in the gradient's dtype unless ``svd="exact"`` is set."""
        return self.method in {"galore", "galore_8bit", "q_galore", "fira"}

    def __call__(self, params: Any, **settings: Any) -> Any:
        return create_optimizer(self.method, params, **{"lr": 1e-2, **self.settings, **settings})

    def groups(self, named: dict[str, Tensor], dense: dict[str, Tensor] | None = None, **keys: Any) -> list[dict]:
        groups: list[dict[str, Any]] = [{"params": list(named.items()), **self.keys, **keys}]
        if dense:
            groups.append({"params": list(dense.items())})
        return groups

    def dense(self, named: dict[str, Tensor], **settings: Any) -> Any:
        """An optimizer that holds `named` without a projection, beside one projected matrix that gets no gradient."""
        return self(self.groups({"idle.weight": nn.Parameter(torch.ones(6, 8))}, named), **settings)


CASES = [Case(name, settings) for name in list_methods() for settings in [{}, *SETTINGS.get(name, [])]]
LOW_RANK = [case for case in CASES if case.projects]

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.q.weight": (24, 24),
    "layers.0.up.weight": (40, 24),
    "layers.0.down.weight": (24, 40),
    "layers.1.q.weight": (24, 24),
    "layers.1.up.weight": (40, 24),
    "layers.10.down.weight": (24, 40),
}
DENSE_SHAPES: dict[str, tuple[int, ...]] = {"norm.weight": (24,), "head.bias": (7,)}


def parameters(
    shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def clone(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}


def random_matrix(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A gradient with distinct singular values, so that an exact basis is well conditioned; other ranks: Gaussian."""
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if len(shape) != 2:
        return noise
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    return U * torch.logspace(0, -2, len(S), dtype=torch.float64) @ Vh


@functools.cache
def _noise(name: str, shape: torch.Size, step: int, seed: int) -> Tensor:
    return random_matrix(shape, torch.Generator().manual_seed(sum(name.encode()) * 1009 + step * 131 + seed))


def gradient(name: str, W: Tensor, step: int, seed: int = 0) -> Tensor:
    """Gradient number `step` of the parameter `name`, float64: random, plus a little of W so that errors in W count."""
    return _noise(name, W.shape, step, seed) + 1e-3 * W.detach().double()


def set_gradients(named: dict[str, nn.Parameter], step: int, seed: int = 0) -> None:
    for name, p in named.items():
        p.grad = gradient(name, p, step, seed).to(p.dtype)


def train(
    optimizer: Any,
    named: dict[str, nn.Parameter],
    steps: int | range,
    seed: int = 0,
    before_step: Callable[[int], None] | None = None,
) -> dict[str, nn.Parameter]:
    """Run `steps` steps on the gradients above; returns the parameters."""
    for step in range(steps) if isinstance(steps, int) else steps:
        set_gradients(named, step, seed)
        if before_step is not None:
            before_step(step)
        optimizer.step()
        optimizer.zero_grad()
    return named


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest absolute difference over equally named tensors."""
    assert a.keys() == b.keys()
    return max((a[name].detach().double() - b[name].detach().double()).abs().max().item() for name in a)


def identical(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """State by parameter name."""
    found = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"{i}" for i in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            found[name] = dict(optimizer.state.get(p, {}))
    return found
