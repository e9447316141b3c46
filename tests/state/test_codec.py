"""Laws of the codecs: what is kept and how well, zeros, infinities, layouts, sizes; and how it passes through files."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from references.quantised import dynamic_levels, linear_levels, quantised
from torch import Tensor

from subspan.state import BFloat16, Blockwise, Codec, StateSpec, basis_codec, moment_codec, stored

SIGNED: dict[str, Codec] = {
    "bfloat16": BFloat16(),
    "8bit": Blockwise("dynamic", 8),
    "4bit": Blockwise("dynamic", 4, block=128),
    "int8": Blockwise("linear", 8),
    "int4": Blockwise("linear", 4),
}
UNSIGNED: dict[str, Codec] = {
    "8bit second": Blockwise("dynamic", 8, signed=False),
    "4bit second": Blockwise("dynamic", 4, signed=False, block=128),
}
CODECS = SIGNED | UNSIGNED
EMPTY: list[tuple[int, ...]] = [(0,), (0, 5), (5, 0), (0, 4, 4)]
SHAPES = [*EMPTY, (), (1,), (3, 7), (1, 256), (256, 1), (17, 31), (2, 300), (3, 10, 100), (300, 700)]
every_codec = pytest.mark.parametrize("name", CODECS)


def sample(shape: tuple[int, ...], name: str, seed: int = 0) -> Tensor:
    """Numbers over many powers of ten, which moments are."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(shape, generator=generator) * 10 ** (2 * torch.randn(shape, generator=generator))
    return X.square() if name in UNSIGNED else X


def through(codec: Codec, X: Tensor) -> Tensor:
    return codec.decode(codec.encode(X), tuple(X.shape))


def levels(codec: Blockwise) -> list[float]:
    return linear_levels(codec.bits) if codec.levels == "linear" else dynamic_levels(codec.bits, codec.signed)


@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_held_is_what_is_declared(name: str, shape: tuple[int, ...]) -> None:
    codec = CODECS[name]
    coded, specs = codec.encode(sample(shape, name)), codec.specs(shape)
    assert coded.keys() == specs.keys()
    for suffix, spec in specs.items():
        assert (tuple(coded[suffix].shape), coded[suffix].dtype) == (spec.shape, spec.dtype)
        assert coded[suffix].is_contiguous()
    decoded = codec.decode(coded, shape)
    assert (tuple(decoded.shape), decoded.dtype) == (shape, torch.float32)
    assert decoded.is_contiguous()
    fresh = {suffix: spec.allocate(torch.device("cpu")) for suffix, spec in specs.items()}
    assert torch.equal(codec.decode(fresh, shape), torch.zeros(shape))  # what is allocated holds zeros


@every_codec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_and_encoding_again_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    codec, X = CODECS[name], sample(shape, name)
    coded = codec.encode(X)
    again = codec.encode(codec.decode(coded, shape))
    assert all(torch.equal(coded[suffix], again[suffix]) for suffix in coded)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (17, 31), (2, 300)], ids=str)
def test_codes_are_the_nearest_levels_of_a_plain_loop(name: str, shape: tuple[int, ...]) -> None:
    codec = CODECS[name]
    assert isinstance(codec, Blockwise)
    X = sample(shape, name)
    expected = quantised(X, levels(codec), codec.block, positive=not codec.signed)
    assert torch.equal(through(codec, X), expected)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "bfloat16"])
def test_the_error_is_at_most_half_a_gap(name: str) -> None:
    codec, X = CODECS[name], sample((64, 512), name)
    assert isinstance(codec, Blockwise)
    scale = X.abs().reshape(-1, codec.block).amax(dim=1, keepdim=True)
    table = torch.tensor(levels(codec), dtype=torch.float64)
    gap = table.diff().max() / 2 * scale
    error = (through(codec, X) - X).abs().reshape(-1, codec.block)
    assert (error <= gap * (1 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("name", "bound"),
    [("8bit", 0.015), ("4bit", 0.2), ("int8", 0.01), ("int4", 0.15), ("8bit second", 0.015), ("4bit second", 0.15)],
)
def test_the_relative_error_of_gaussian_numbers(name: str, bound: float) -> None:
    X = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    X = X.square() if name in UNSIGNED else X
    error = float((through(CODECS[name], X) - X).norm() / X.norm())
    assert bound / 3 < error < bound


def test_bfloat16_is_rounded_to_nearest() -> None:
    X = sample((64, 512), "bfloat16")
    assert torch.equal(through(BFloat16(), X), X.bfloat16().float())


@every_codec
def test_zeros_stay_zero(name: str) -> None:
    codec, X = CODECS[name], sample((40, 100), name)
    X[::3] = 0.0
    X[:, 7] = 0.0
    decoded = through(codec, X)
    assert (decoded[X == 0] == 0).all()
    assert torch.equal(through(codec, torch.zeros(3, 400)), torch.zeros(3, 400))
    if name in SIGNED:
        assert torch.equal(through(codec, -X), -decoded)
        assert (torch.sign(decoded) * torch.sign(X) >= 0).all()


@pytest.mark.parametrize("name", UNSIGNED)
@pytest.mark.parametrize("small", [1e-3, 1e-8, 1e-20, 1e-30])
def test_a_positive_second_moment_never_becomes_zero(name: str, small: float) -> None:
    X = torch.full((4, 256), small)
    X[:, 0] = 1.0
    assert (through(CODECS[name], X) > 0).all()


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(name: str, bad: float) -> None:
    X = sample((8, 512), name)
    X[3, 5] = bad if name in SIGNED else abs(bad)
    decoded = through(CODECS[name], X)
    assert not decoded[3, 5].isfinite()
    assert decoded[4:].isfinite().all()  # other blocks do not know of it


@every_codec
@pytest.mark.parametrize("shape", [(30, 70), (4, 30, 70)], ids=str)
def test_the_memory_layout_does_not_matter(name: str, shape: tuple[int, ...]) -> None:
    codec, X = CODECS[name], sample(shape, name)
    strided = X.mT.contiguous().mT
    one, other = codec.encode(X), codec.encode(strided)
    assert not strided.is_contiguous() and all(torch.equal(one[suffix], other[suffix]) for suffix in one)


@every_codec
@pytest.mark.parametrize("shape", [(1, 1), (9, 31), (40, 60), (100, 900)], ids=str)
def test_a_stack_is_coded_matrix_by_matrix(name: str, shape: tuple[int, int]) -> None:
    codec = CODECS[name]
    X = sample((5, *shape), name)
    stack = codec.encode(X)
    singles = [codec.encode(matrix) for matrix in X]
    for suffix, tensor in stack.items():
        assert torch.equal(tensor, torch.stack([single[suffix] for single in singles]))
    assert torch.equal(codec.decode(stack, tuple(X.shape)), torch.stack([through(codec, matrix) for matrix in X]))


@every_codec
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 5001])
def test_parts_hold_parts(name: str, size: int) -> None:
    codec, X = CODECS[name], sample((1, size), name)
    coded, whole = codec.encode(X), through(codec, X).flatten()
    step = 2 * max(codec.block, 2)
    for start in range(0, size, step):
        stop = min(size, start + step)
        part = codec.part(coded, start, stop)
        assert torch.equal(codec.decode(part, (stop - start,)), whole[start:stop])
        for suffix, tensor in codec.encode(X.flatten()[start:stop]).items():
            assert torch.equal(tensor, part[suffix])
            part[suffix].fill_(0)  # parts are views
    assert not codec.decode(coded, (1, size)).any()


@every_codec
def test_float64_and_bfloat16_are_coded_too(name: str) -> None:
    codec, X = CODECS[name], sample((20, 30), name)
    one, other = codec.encode(X), codec.encode(X.double())
    assert all(torch.equal(one[suffix], other[suffix]) for suffix in one)
    assert torch.equal(through(codec, X.bfloat16()), through(codec, X.bfloat16().float()))


@pytest.mark.parametrize("name", SIGNED)
def test_stochastic_rounding_keeps_the_mean(name: str) -> None:
    codec, count = SIGNED[name], 4000
    X = torch.cat([torch.ones(1), torch.linspace(-0.98, 0.98, 9)]).expand(count, 10)
    X = torch.cat([X, torch.zeros(count, codec.block * 10 - 10)], dim=1) if codec.block > 10 else X
    coded = codec.encode(X.unsqueeze(1), torch.Generator().manual_seed(0))
    drawn = codec.decode(coded, (count, 1, X.shape[1]))[:, 0, :10]
    spread = drawn.std(dim=0) / math.sqrt(count)
    assert ((drawn.mean(dim=0) - X[0, :10]).abs() <= 5 * spread + 1e-6).all()
    nearest = through(codec, X[0, None, :])[0, :10]
    assert (drawn.mean(dim=0) - X[0, :10]).abs().sum() < (nearest - X[0, :10]).abs().sum() / 3
    again = codec.encode(X.unsqueeze(1), torch.Generator().manual_seed(0))
    assert all(torch.equal(coded[suffix], again[suffix]) for suffix in coded)


@pytest.mark.parametrize("name", UNSIGNED)
def test_stochastic_rounding_never_makes_a_second_moment_zero(name: str) -> None:
    X = torch.full((4, 256), 1e-9)
    X[:, 0] = 1.0
    codec = UNSIGNED[name]
    assert (codec.decode(codec.encode(X, torch.Generator().manual_seed(0)), (4, 256)) > 0).all()


def test_bytes() -> None:
    shape = (30, 51)  # 1530 elements: 6 blocks of 256, 12 of 128
    sizes = {name: StateSpec(shape, codec=codec).nbytes for name, codec in CODECS.items()}
    assert sizes == {
        "bfloat16": 2 * 1530,
        "8bit": 1530 + 4 * 6,
        "4bit": 765 + 4 * 12,
        "int8": 1530 + 4 * 6,
        "int4": 765 + 4 * 6,
        "8bit second": 1530 + 4 * 6,
        "4bit second": 765 + 4 * 12,
    }
    assert StateSpec((3, 5, 7), codec=CODECS["int4"]).nbytes == 3 * (18 + 4)


@every_codec
def test_codes_pass_through_a_file(name: str) -> None:
    coded = CODECS[name].encode(sample((20, 30), name))
    file = io.BytesIO()
    torch.save(coded, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(coded[suffix], loaded[suffix]) for suffix in coded)


def test_declarations_expand_to_what_is_held() -> None:
    specs = {"basis": StateSpec((8, 2)), "exp_avg": StateSpec((2, 9), moment=1, codec=CODECS["4bit"])}
    held = stored(specs)
    assert {name: (spec.shape, spec.dtype) for name, spec in held.items()} == {
        "basis": ((8, 2), torch.float32),
        "exp_avg": ((9,), torch.uint8),
        "exp_avg_scale": ((1,), torch.float32),
    }


@pytest.mark.parametrize(("choose", "good"), [(moment_codec, "'8bit'"), (basis_codec, "'int4'")])
def test_an_unknown_codec_is_an_error_that_lists_them(choose: Any, good: str) -> None:
    with pytest.raises(ValueError, match=f"'7bit'.*{good}"):
        choose("7bit", 1) if choose is moment_codec else choose("7bit")


@pytest.mark.gpu
@every_codec
def test_a_device_gives_the_same_codes(name: str) -> None:
    codec, X = CODECS[name], sample((300, 700), name)
    on_cpu, on_device = codec.encode(X), codec.encode(X.cuda())
    for suffix in on_cpu:
        assert (on_cpu[suffix] != on_device[suffix].cpu()).double().mean() < 1e-4
