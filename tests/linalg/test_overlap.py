"""The three-queue schedule. On a CPU it is the plain order; the rest needs a CUDA device and skips itself."""

from __future__ import annotations

import pytest
import torch

from linalg.spectra import exponential, slow, with_spectrum
from subspan.linalg import FixedPrecision, adaptive_range_finder, seeded_generator
from subspan.linalg.overlap import SketchQueue

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def problem(A: torch.Tensor, generator: torch.Generator | None) -> FixedPrecision:
    return FixedPrecision(A, rtol=0.1, atol=None, max_rank=None, block_size=8, generator=generator)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("following", [None, 6, 4])
@pytest.mark.parametrize("multiply", [True, False])
def test_what_is_taken_is_that_of_the_plain_order(device: str, following: int | None, multiply: bool) -> None:
    # 4 is a wrong announcement: the width that is asked for next is 6.
    A = with_spectrum(slow(40), 40, 60).to(device)
    generator = seeded_generator(0)
    plain = problem(A, seeded_generator(0))
    with SketchQueue(problem(A, generator), multiply=multiply) as queue:
        for width in (6, 6, 6):
            expected = plain.sketch(width) if multiply else plain.test_matrix(width)
            assert torch.equal(queue.take(width, following), expected)
    # and the generator stands where the plain order leaves it
    assert torch.equal(generator.get_state(), plain.generator.get_state())


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_torchs_own_generator_is_put_back_too(device: str) -> None:
    A = with_spectrum(slow(40), 40, 60).to(device)
    torch.manual_seed(1)
    with SketchQueue(problem(A, None)) as queue:
        first = queue.take(6, 6)
    following = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(first, problem(A, None).sketch(6))
    assert torch.equal(following, torch.randn(3))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("method", ["householder", "householder_left"])
def test_finders_leave_the_generator_where_the_plain_order_does(device: str, method: str) -> None:
    A = with_spectrum(slow(40), 40, 60).to(device)
    states = []
    for matrix in (A, A.cpu()):
        generator = seeded_generator(0)
        found = adaptive_range_finder(matrix, rtol=0.5, method=method, block_size=8, generator=generator)
        states.append(generator.get_state())
    assert torch.equal(*states)
    plain = seeded_generator(0)
    # The left-looking form has drawn one block more: it estimates the error with it.
    torch.randn(60, found.rank + 8 * (method == "householder_left"), dtype=torch.float64, generator=plain)
    following = (torch.randn(3, generator=g) for g in (generator, plain))
    assert torch.equal(*following)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["householder_left", "sketch", "householder", "gram_schmidt"])
def test_finders_on_a_cuda_device(method: str) -> None:
    A = with_spectrum(exponential(64), 64, 96).float()
    on_cpu, on_gpu = (
        adaptive_range_finder(B, rtol=0.05, method=method, block_size=8, generator=seeded_generator(0))
        for B in (A, A.cuda())
    )
    assert on_gpu.rank == on_cpu.rank
    assert on_gpu.basis().is_cuda
    # the bases are equal up to rounding, since the numbers are drawn on the CPU
    Q = on_gpu.basis().cpu().double()
    assert (A - Q @ (Q.mT @ A.double())).norm() <= 0.06 * A.norm()
