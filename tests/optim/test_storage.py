"""Which tensors are quantised, what is refused, and what quantisation does to training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subspan.optim import SGD, AdamW, GaLore, GaLore8bit, create_optimizer, param_groups
from subspan.optim.method import Geometry


class Model(nn.Module):
    """An embedding, a large and a small linear layer, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(200, 64)
        self.large, self.small = nn.Linear(64, 256), nn.Linear(256, 12)
        self.back, self.norm = nn.Linear(12, 64), nn.LayerNorm(64)
        self.head = nn.Linear(64, 200, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.small(torch.tanh(self.large(self.embedding(tokens)))))
        return self.head(self.norm(self.back(hidden)))


def dtypes(optimizer: Any, model: nn.Module, key: str = "exp_avg") -> dict[str, torch.dtype]:
    return {
        name: optimizer.declared_state(p)[key].dtype
        for name, p in model.named_parameters()
        if key in optimizer.declared_state(p)
    }


def of(found: dict[str, torch.dtype], dtype: torch.dtype) -> set[str]:
    return {name for name, other in found.items() if other == dtype}


def test_only_large_projected_moments_are_quantised() -> None:
    model = Model()
    optimizer = GaLore8bit(model, rank=16)
    # r·n is 16·256 for the large layer, and less for the others
    assert of(dtypes(optimizer, model), torch.uint8) == {"large.weight"}
    assert of(dtypes(optimizer, model, "basis"), torch.uint8) == set()
    lower = GaLore8bit(model, rank=16, min_quantized=1000, basis_storage="int8")
    assert of(dtypes(lower, model), torch.uint8) == {"large.weight", "small.weight"}
    assert of(dtypes(lower, model, "basis"), torch.uint8) == {"large.weight"}


def test_embeddings_and_heads_are_quantised_where_it_is_said() -> None:
    model = Model()
    optimizer = GaLore8bit(model, rank=16, other_moments="8bit")
    quantised = of(dtypes(optimizer, model), torch.uint8)
    assert quantised == {"large.weight", "embedding.weight", "head.weight"}
    by_hand = [{"params": [model.large.weight], "rank": 16}, {"params": [model.head.weight], "moments": "4bit"}]
    optimizer = GaLore(by_hand)
    assert optimizer.declared_state(model.head.weight)["exp_avg"].shape == (200 * 64 // 2,)
    assert optimizer.declared_state(model.large.weight)["exp_avg"].dtype == torch.float32


def test_adamw_quantises_all_matrices_but_embeddings_and_heads() -> None:
    model = Model()
    assert of(dtypes(AdamW(model, moments="8bit"), model), torch.uint8) == {"large.weight"}
    groups = param_groups(model, rank=None)
    assert of(dtypes(AdamW(groups, moments="8bit"), model), torch.uint8) == {"large.weight"}
    everything = of(dtypes(AdamW(model, moments="8bit", other_moments="bfloat16"), model), torch.bfloat16)
    assert everything == {"embedding.weight", "head.weight"}
    plain = AdamW(model.parameters(), moments="8bit", min_quantized=1)
    assert "norm.weight" not in of(dtypes(plain, model), torch.uint8)  # vectors never are


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("galore", {"moments": "7bit"}, "moments='7bit'.*'8bit'"),
        ("galore", {"basis_storage": "int7"}, "basis_storage='int7'.*'int4'"),
        ("galore", {"min_quantized": 0}, "min_quantized=0"),
        ("galore", {"moments": "8bit", "inner": SGD()}, "keeps no moments.*leave moments out"),
        ("galore", {"warm_start": 0.5}, "late refreshes.*refresh='late'"),
        ("galore", {"warm_start": 0.8, "refresh": "late"}, "warm_start=0.8.*at least a quarter"),
        ("galore", {"warm_start": 0.5, "refresh": "late", "inner": SGD()}, "keeps no first moment"),
        ("q_galore", {"refresh": "never"}, "refresh='never'.*'late'"),
        ("apollo", {"basis_storage": "int4", "store_basis": False}, "stores no basis.*leave basis_storage out"),
        ("frugal", {"basis_storage": "int4", "subspace": "rows"}, "stores no basis"),
    ],
)
def test_what_cannot_be_is_refused(method: str, settings: dict[str, Any], message: str) -> None:
    size = {"density": 0.25} if method == "frugal" else {"rank": 4}
    groups = [{"params": [("a", nn.Parameter(torch.ones(16, 24)))], **size}]
    with pytest.raises(ValueError, match=message):
        create_optimizer(method, groups, **settings)


def test_adamw_has_no_basis() -> None:
    with pytest.raises(TypeError, match="basis_storage"):
        create_optimizer("adamw", nn.Linear(8, 8), basis_storage="int8")


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "int4"])
def test_what_projects_is_what_is_held(storage: str) -> None:
    """R of folded gradients is that of the rounded basis, a random start and the basis of a sketch alike."""
    layer = nn.Linear(16, 24, bias=False)
    group = {"params": [("weight", layer.weight)], "rank": 4, "min_quantized": 1, "update_proj_gap": 3}
    optimizer = GaLore([group], basis_storage=storage)
    optimizer.fuse_into_backward()
    for step in range(6):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        G = 2 * (layer(x).mT @ x).detach() / 192
        layer(x).square().mean().backward()
        spec = optimizer.method.subspace_specs(Geometry((), 16, 24, 4), optimizer.param_groups[0])["basis"]
        assert spec.codec is not None
        Q = spec.decode("basis", optimizer.state[layer.weight])
        assert (Q.mT @ Q - torch.eye(4)).norm() < 0.5
        R = optimizer._folded["weight"].projected
        assert (R - Q.mT @ G.mT).norm() < 1e-5 * R.norm()
        optimizer.step()
        assert int(optimizer.state[layer.weight]["turned"]) == 1
        optimizer.zero_grad()


def test_another_storage_is_another_state() -> None:
    parameter = nn.Parameter(torch.ones(64, 96))
    group = {"params": [("a", parameter)], "rank": 64}
    saved = GaLore8bit([{**group, "rank": 48}])
    parameter.grad = torch.randn(64, 96)
    saved.step()
    with pytest.raises(ValueError, match="galore_8bit"):
        GaLore([{**group, "rank": 48}]).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"moments='8bit'.*'4bit'"):
        GaLore8bit([{**group, "rank": 48}], moments="4bit").load_state_dict(saved.state_dict())


@pytest.mark.parametrize("settings", [{"moments": "8bit"}, {"moments": "4bit"}, {"basis_storage": "int8"}], ids=str)
def test_training_goes_on_as_without(settings: dict[str, str]) -> None:
    """Descent on a noisy quadratic: what is left of the distance agrees with float32 within a fifth."""
    left = {}
    for name, own in (("float32", {}), ("coded", settings)):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(64, 96, generator=generator)
        parameter = nn.Parameter(torch.zeros(64, 96))
        group = {"params": [("a", parameter)], "rank": 32, "update_proj_gap": 10, "min_quantized": 1}
        optimizer = GaLore([group], lr=0.05, scale=1.0, **own)  # type: ignore[arg-type]
        for _ in range(100):
            parameter.grad = (parameter - target).detach() + 0.1 * torch.randn(64, 96, generator=generator)
            optimizer.step()
        left[name] = float((parameter.detach() - target).norm() / target.norm())
    assert left["float32"] < 0.5
    assert left["coded"] == pytest.approx(left["float32"], rel=0.2)


def test_a_second_moment_that_is_small_in_its_block_does_not_explode() -> None:
    """In 4 bits most of a block is far below its largest number; with a level 0 Adam would divide by ε."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    optimizer = AdamW([parameter], lr=1.0, moments="4bit", min_quantized=1)
    size = torch.logspace(0, -5, 128).expand(64, 128)
    for step in range(20):
        before = parameter.detach().clone()
        parameter.grad = size if step % 5 == 0 else torch.zeros_like(size)
        optimizer.step()
        assert (parameter - before).abs().max() < 5
