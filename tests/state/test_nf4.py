"""NF4: its levels, what is held with scales of 32 and of 8 bits, and the tensor of torchao."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from references.loqt import normal_levels
from references.quantised import quantised
from torch import Tensor

from subspan.state import Blockwise, Codec, DoubleBlockwise, StateSpec

NF4 = Blockwise("normal", 4, block=64)
CODECS: dict[str, Codec] = {"nf4": NF4, "double": DoubleBlockwise(NF4)}
SHAPES: list[tuple[int, ...]] = [(0,), (5, 0), (), (1,), (3, 7), (1, 64), (64, 1), (17, 31), (3, 10, 100), (300, 700)]
both = pytest.mark.parametrize("name", CODECS)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(codec: Codec, X: Tensor) -> Tensor:
    return codec.decode(codec.encode(X), tuple(X.shape))


def test_the_levels_are_those_of_the_paper() -> None:
    X = torch.cat([torch.tensor(normal_levels()), torch.zeros(48)])
    assert torch.allclose(through(NF4, X)[:16], X[:16], rtol=0, atol=1e-6)
    codes = NF4.encode(X)[""][:8]
    assert torch.equal(torch.stack([codes & 15, codes >> 4], dim=1).flatten(), torch.arange(16, dtype=torch.uint8))


def test_the_levels_are_quantiles_at_equal_gaps() -> None:
    levels = torch.tensor(normal_levels(), dtype=torch.float64)
    last = torch.special.ndtri(torch.tensor(1 - (1 / 30 + 1 / 32) / 2, dtype=torch.float64))
    shares = torch.special.ndtr(levels * last)
    assert torch.allclose(shares[:8].diff(), shares[:8].diff().mean(), atol=1e-5)
    assert torch.allclose(shares[7:].diff(), shares[7:].diff().mean(), atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (17, 31), (2, 300)], ids=str)
def test_codes_are_the_nearest_levels_of_a_plain_loop(shape: tuple[int, ...]) -> None:
    X = normal(shape)
    assert torch.allclose(through(NF4, X), quantised(X, normal_levels(), 64), rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_held_is_what_is_declared(name: str, shape: tuple[int, ...]) -> None:
    codec = CODECS[name]
    coded, specs = codec.encode(normal(shape)), codec.specs(shape)
    assert coded.keys() == specs.keys()
    for suffix, spec in specs.items():
        assert (tuple(coded[suffix].shape), coded[suffix].dtype) == (spec.shape, spec.dtype)
    decoded = codec.decode(coded, shape)
    assert (tuple(decoded.shape), decoded.dtype) == (shape, torch.float32)
    fresh = {suffix: spec.allocate(torch.device("cpu")) for suffix, spec in specs.items()}
    assert torch.equal(codec.decode(fresh, shape), torch.zeros(shape))
    again = codec.encode(decoded)
    assert all(torch.equal(coded[suffix], again[suffix]) for suffix in coded)


@both
def test_the_error_of_gaussian_numbers(name: str) -> None:
    X = normal((64, 1024))
    error = float((through(CODECS[name], X) - X).norm() / X.norm())
    assert 0.08 < error < 0.1  # 4 linear bits in the same blocks: 0.11
    linear = Blockwise("linear", 4, block=64)
    assert error < 0.9 * float((through(linear, X) - X).norm() / X.norm())


def test_scales_of_8_bits_are_within_half_a_gap() -> None:
    X = normal((300, 700)) * torch.logspace(0, -1, 300)[:, None]
    one, other = (codec.decode(codec.encode(X), X.shape) for codec in CODECS.values())
    largest = X.abs().max()
    assert (one - other).abs().max() <= largest / 255 / 2 * (1 + 1e-5)
    assert (other == 0).eq(one == 0).all()  # no scale became zero


@both
def test_bytes(name: str) -> None:
    nbytes = StateSpec((30, 51), codec=CODECS[name]).nbytes  # 1530 elements: 24 blocks
    assert nbytes == {"nf4": 765 + 4 * 24, "double": 765 + 24 + 4}[name]


@both
def test_zeros_and_what_is_not_finite(name: str) -> None:
    codec, X = CODECS[name], normal((40, 64))
    X[::3] = 0.0
    X[:, 7] = 0.0
    assert (through(codec, X)[X == 0] == 0).all()
    for bad in (math.nan, math.inf, -math.inf):
        X[1, 5] = bad
        decoded = through(codec, X)
        assert not decoded[1, 5].isfinite()
        if name == "nf4":
            assert decoded[2:].isfinite().all()  # other blocks do not know of it


@both
def test_layouts_stacks_and_dtypes_do_not_matter(name: str) -> None:
    codec, X = CODECS[name], normal((5, 30, 70))
    coded, strided = codec.encode(X), codec.encode(X.mT.contiguous().mT)
    singles = [codec.encode(matrix) for matrix in X]
    for suffix, tensor in coded.items():
        assert torch.equal(tensor, strided[suffix])
        assert torch.equal(tensor.flatten(1), torch.stack([single[suffix].flatten() for single in singles]))
        assert torch.equal(tensor, codec.encode(X.double())[suffix])


@both
def test_parts_hold_parts(name: str) -> None:
    codec, X = CODECS[name], normal((1, 40_010))  # its last block is not whole
    coded, whole = codec.encode(X), through(codec, X).flatten()
    for start in range(0, X.numel(), codec.block * 100 if name == "nf4" else codec.block):
        stop = min(X.numel(), start + codec.block)
        part = codec.part(coded, start, stop)
        assert torch.equal(codec.decode(part, (stop - start,)), whole[start:stop])


def test_stochastic_rounding_keeps_the_mean() -> None:
    count = 4000
    X = torch.cat([torch.ones(1), torch.linspace(-0.98, 0.98, 9), torch.zeros(54)]).expand(count, 64)
    coded = NF4.encode(X.unsqueeze(1).contiguous(), torch.Generator().manual_seed(0))
    drawn = NF4.decode(coded, (count, 1, 64))[:, 0, :10]
    spread = drawn.std(dim=0) / math.sqrt(count)
    assert ((drawn.mean(dim=0) - X[0, :10]).abs() <= 5 * spread + 1e-6).all()


def test_scales_of_8_bits_leave_stochastic_codes_as_they_are() -> None:
    X = normal((30, 70))
    one, other = (codec.encode(X, torch.Generator().manual_seed(1))[""] for codec in CODECS.values())
    assert torch.equal(one, other)
    assert not torch.equal(one, NF4.encode(X)[""])


def test_a_block_of_zeros_has_the_code_of_zero() -> None:
    assert NF4.encode(torch.zeros(64))[""].tolist() == [0x77] * 32


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "signed": False}])
def test_there_are_no_other_normal_levels(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"4 bits and signed, not bits="):
        Blockwise("normal", **settings)


def test_torchao_holds_the_same() -> None:
    """But for its levels, of four digits, and its scales, of 8 bits around a mean."""
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    X = normal((256, 512))
    theirs = nf4.NF4Tensor.from_tensor(X, 64, 256)
    packed, codes = theirs.quantized_data.flatten(), NF4.encode(X)[""].flatten()
    same = (packed >> 4).eq(codes & 15) & (packed & 15).eq(codes >> 4)  # the first of two is in the upper half
    assert same.double().mean() > 0.999
    assert (theirs.get_original_weight() - through(NF4, X)).norm() < 0.01 * X.norm()


@pytest.mark.gpu
@both
def test_a_device_gives_the_same_codes(name: str) -> None:
    codec, X = CODECS[name], normal((300, 700))
    on_cpu, on_device = codec.encode(X), codec.encode(X.cuda())
    for suffix in on_cpu:
        assert (on_cpu[suffix] != on_device[suffix].cpu()).double().mean() < 1e-4
