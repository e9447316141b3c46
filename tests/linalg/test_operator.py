from __future__ import annotations

import pytest
import torch

from subspan.linalg import DenseOperator, as_operator, range_finder, seeded_generator
from subspan.linalg import operator as operator_module


@pytest.fixture(params=[False, True], ids=["row-major", "transposed view"])
def bf16(request: pytest.FixtureRequest) -> torch.Tensor:
    A = torch.randn(2, 300, 170).bfloat16()
    return A.mT.contiguous().mT if request.param else A


def test_products(bf16: torch.Tensor) -> None:
    operator = DenseOperator(bf16)
    X, Y = torch.randn(2, 170, 5), torch.randn(2, 300, 5)
    torch.testing.assert_close(operator.matmul(X), bf16.float() @ X, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(operator.rmatmul(Y), bf16.float().mT @ Y, rtol=1e-5, atol=1e-4)
    assert operator.matmul(X).dtype == torch.float32
    assert operator.matmul(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(operator.matmul(X.bfloat16()), bf16 @ X.bfloat16())
    assert DenseOperator(bf16.float()).matmul(X.bfloat16()).dtype == torch.float32


def test_a_matrix_is_never_cast_as_a_whole(bf16: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "_TILE_ELEMENTS", 2 * 64 * 170)
    largest = _largest_cast(lambda: DenseOperator(bf16).rmatmul(torch.randn(2, 300, 5)))
    assert 0 < largest < bf16.numel() / 2
    assert 0 < _largest_cast(lambda: DenseOperator(bf16).matmul(torch.randn(2, 170, 5))) < bf16.numel() / 2
    torch.testing.assert_close(
        DenseOperator(bf16).rmatmul(torch.ones(2, 300, 1)), bf16.float().sum(1).unsqueeze(-1), rtol=1e-5, atol=1e-4
    )
    # and neither by the range finder, with power iterations and the rotation
    finder = _largest_cast(lambda: range_finder(bf16, 4, generator=seeded_generator(0), n_iter=1))
    assert 0 < finder < bf16.numel() / 2


def _largest_cast(call) -> int:
    """Largest number of elements of a bfloat16 tensor that is cast to float32 during the call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16:
                largest = max(largest, args[0].numel())
            return out

    with Record():
        call()
    return largest


def test_amax() -> None:
    A = torch.randn(3, 4, 5)
    assert torch.equal(DenseOperator(A).amax(), A.abs().amax(dim=(-2, -1)))
    A[1, 2, 3] = -torch.inf
    A[2, 0, 0] = torch.nan
    assert DenseOperator(A).amax()[1] == torch.inf
    assert DenseOperator(A).amax()[2].isnan()


def test_dense_operator_is_a_view() -> None:
    A = torch.randn(3, 4, requires_grad=True)
    operator = as_operator(A)
    assert operator.to_dense().data_ptr() == A.data_ptr()
    assert not operator.to_dense().requires_grad
    assert as_operator(operator) is operator
    assert (operator.shape, operator.dtype, operator.device) == (A.shape, A.dtype, A.device)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        as_operator(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        as_operator([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        as_operator(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3, 0\)"):
        as_operator(torch.ones(3, 0))
