"""The loss in chunks: value and gradients of the plain one, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subspan.nn import cross_entropy, linear_cross_entropy


def both(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, chunk: int = 7
) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of hidden and weight, plain in float64 and ours in chunks of ``chunk`` rows."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk * 11)
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(rows, 5), torch.randn(11, 5), torch.randint(11, (rows,))
    labels[:: max(2, rows // 3)] = -100
    results = []
    for kind, function in ((torch.float64, nn.functional.cross_entropy), (dtype, None)):
        x, w = hidden.to(dtype).to(kind).requires_grad_(), weight.to(dtype).to(kind).requires_grad_()
        loss = linear_cross_entropy(x, w, labels) if function is None else function(x @ w.mT, labels)
        (3 * loss).backward()
        assert x.grad is not None
        assert w.grad is not None
        results.append([loss.detach(), x.grad, w.grad])
    return results[0], results[1]


@pytest.mark.parametrize("rows", [2, 7, 20, 21])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str
)
def test_value_and_gradients(rows: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for expected, ours in zip(*both(rows, dtype, monkeypatch), strict=True):
        assert (ours.double() - expected).norm() <= tolerance * expected.norm()
        assert ours.dtype == (torch.promote_types(dtype, torch.float32) if ours.ndim == 0 else dtype)


def test_no_more_logits_than_a_chunk_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK", 1 << 14)
    sizes: list[int] = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        cross_entropy.nn.functional, "cross_entropy", lambda x, *a, **k: (sizes.append(x.numel()), real(x, *a, **k))[1]
    )
    x, w = torch.randn(1000, 8, requires_grad=True), torch.randn(128, 8, requires_grad=True)
    linear_cross_entropy(x, w, torch.randint(128, (1000,))).backward()
    assert len(sizes) == 8
    assert max(sizes) <= 1 << 14


def test_a_count_replaces_that_of_the_labels() -> None:
    x, w, y = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randint(6, (2, 3))
    plain = nn.functional.cross_entropy((x @ w.mT).flatten(0, 1), y.flatten(), reduction="sum") / 10
    assert linear_cross_entropy(x, w, y, count=10).item() == pytest.approx(plain.item())


def test_labels_that_do_not_count_at_all() -> None:
    x, w = torch.randn(3, 4), torch.randn(6, 4)
    assert linear_cross_entropy(x, w, torch.full((3,), -100)).isnan()


def test_autocast_multiplies_in_half_precision() -> None:
    x, w, y = torch.randn(50, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True), torch.randint(32, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, y)
        plain = nn.functional.cross_entropy(nn.functional.linear(x, w).float(), y)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_second_backward_is_refused() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    loss = linear_cross_entropy(x, w, torch.zeros(3, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in the first backward"):
        loss.backward()


def test_one_row_and_an_ignored_label_beyond_the_vocabulary() -> None:
    hidden, weight = torch.randn(4), torch.randn(6, 4, requires_grad=True)
    plain = nn.functional.cross_entropy(weight @ hidden, torch.tensor(2))
    assert linear_cross_entropy(hidden, weight, torch.tensor(2)).item() == pytest.approx(plain.item())
    rows, labels = torch.randn(3, 4), torch.tensor([1, 99, 2])
    expected = nn.functional.cross_entropy(rows @ weight.mT, labels, ignore_index=99)
    linear_cross_entropy(rows, weight, labels, ignore_index=99).backward()
    assert linear_cross_entropy(rows, weight, labels, ignore_index=99).item() == pytest.approx(expected.item())


def test_without_a_graph_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "softmax", None)
    weight = nn.Parameter(torch.randn(6, 4))
    with torch.no_grad():
        linear_cross_entropy(torch.randn(3, 4), weight, torch.tensor([1, 2, 3]))


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"hidden \(3, 4\), weight \(6, 5\)"):
        linear_cross_entropy(torch.ones(3, 4), torch.ones(6, 5), torch.zeros(3, dtype=torch.int64))
