from __future__ import annotations

import pytest
import torch

from subspan.linalg import (
    gaussian_sketch,
    hadamard_sketch,
    sampling_sketch,
    seeded_generator,
    sparse_sign_sketch,
)


def test_seeded_generator_is_the_same_on_every_machine() -> None:
    # Literal numbers: a change here breaks the resumption of every run that was started before it.
    generator = seeded_generator(0, "model.layers.0.mlp.up_proj.weight", 3)
    assert generator.initial_seed() == 9499893733557653670
    assert torch.randint(0, 2**31, (3,), generator=generator).tolist() == [1652569395, 1733868522, 842834414]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "2"), ("1", 2)),
        (("ab", "c"), ("a", "bc")),
        ((1, 23), (12, 3)),
        (("a",), ("a", "")),
        ((1,), (-1,)),
        ((), ("",)),
    ],
)
def test_keys_that_look_alike_give_different_streams(one: tuple, other: tuple) -> None:
    assert seeded_generator(*one).initial_seed() != seeded_generator(*other).initial_seed()
    assert not torch.equal(
        torch.randn(8, generator=seeded_generator(*one)), torch.randn(8, generator=seeded_generator(*other))
    )


@pytest.mark.parametrize("part", [1.5, None, True, b"a"])
def test_seeded_generator_refuses_other_types(part: object) -> None:
    with pytest.raises(TypeError, match="integers and strings"):
        seeded_generator(0, part)  # type: ignore[arg-type]


def test_sketch_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    gaussian_sketch(7, 3, generator=seeded_generator(0))
    assert torch.equal(torch.randn(4), expected)


def test_batch_holds_what_single_calls_draw() -> None:
    batch = gaussian_sketch(7, 3, generator=seeded_generator(1), batch_shape=(2, 2))
    generator = seeded_generator(1)
    singles = [gaussian_sketch(7, 3, generator=generator) for _ in range(4)]
    assert torch.equal(batch.reshape(4, 7, 3), torch.stack(singles))


def test_sketch_is_standard_normal_times_scale() -> None:
    omega = gaussian_sketch(500, 400, generator=seeded_generator(2), scale=3.0)
    assert abs(omega.mean().item()) < 0.03
    assert abs(omega.std().item() - 3) < 0.03
    assert abs((omega / 3).pow(4).mean().item() - 3) < 0.06


def test_scale_broadcasts_over_a_batch_and_precedes_the_cast() -> None:
    scale = torch.tensor([1.0, 2.0**-3]).reshape(2, 1, 1)
    omega = gaussian_sketch(5, 2, generator=seeded_generator(3), batch_shape=(2,), scale=scale, dtype=torch.bfloat16)
    full = gaussian_sketch(5, 2, generator=seeded_generator(3), batch_shape=(2,))
    assert omega.dtype == torch.bfloat16
    assert torch.equal(omega, (full * scale).bfloat16())
    assert gaussian_sketch(5, 2, generator=seeded_generator(3), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("nnz", [1, 3, 8])
def test_sparse_sign(nnz: int) -> None:
    Omega = sparse_sign_sketch(50, 6, generator=seeded_generator(0), nnz=nnz, batch_shape=(3,))
    kept = min(nnz, 6)
    assert ((Omega != 0).sum(-1) == kept).all()
    assert torch.allclose(Omega[Omega != 0].abs(), torch.tensor((6 / kept) ** 0.5))
    assert abs(Omega.sign().sum() / (150 * kept)) < 5 / (150 * kept) ** 0.5
    assert (Omega != 0).any(dim=1).all()
    assert not torch.equal(Omega[0], Omega[1])
    generator = seeded_generator(0)
    assert torch.equal(Omega[0], sparse_sign_sketch(50, 6, generator=generator, nnz=nnz))
    assert torch.equal(Omega[1], sparse_sign_sketch(50, 6, generator=generator, nnz=nnz))
    with pytest.raises(ValueError, match="nnz=0"):
        sparse_sign_sketch(5, 2, generator=generator, nnz=0)


def test_hadamard_is_columns_of_signed_hadamard_matrix() -> None:
    from scipy.linalg import hadamard

    Omega = hadamard_sketch(16, 5, generator=seeded_generator(0), batch_shape=(2,))
    H = torch.from_numpy(hadamard(16)).float()
    for matrix in Omega:
        assert torch.equal(matrix.mT @ matrix, 16 * torch.eye(5))
        # HᵀD·Ω has one entry ±16 in each column for the right signs D, which are those of the rows up to H's own.
        signs = [matrix[:, j] * H[:, k] for j in range(1) for k in range(16)]
        assert any(all(any(torch.equal(matrix[:, j], s * H[:, k]) for k in range(16)) for j in range(5)) for s in signs)
    assert not torch.equal(Omega[0], Omega[1])
    short = hadamard_sketch(5, 8, generator=seeded_generator(0))
    assert torch.equal(short.abs(), torch.ones(5, 8))
    assert torch.equal(short @ short.mT, 8 * torch.eye(5))
    with pytest.raises(ValueError, match=r"l=9 .* 8 columns"):
        hadamard_sketch(5, 9, generator=seeded_generator(0))


def test_sampling_follows_the_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0]).expand(4000, 4)
    drawn = sampling_sketch(weights, 1, generator=seeded_generator(0)).flatten()
    share = torch.bincount(drawn, minlength=4) / 4000
    assert share[0] == 0
    assert (share - weights[0] / 8).abs().max() < 0.04
    every = sampling_sketch(weights[:10], 4, generator=seeded_generator(0))
    assert torch.equal(every.sort(dim=-1).values, torch.arange(4).expand(10, 4))
    assert (every[:, -1] == 0).all()  # what weighs nothing comes last
    with pytest.raises(ValueError, match=r"l=5 .* from 4"):
        sampling_sketch(weights, 5, generator=seeded_generator(0))
