from __future__ import annotations

import pytest
import torch

from subspan.linalg import gaussian_sketch, seeded_generator


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
