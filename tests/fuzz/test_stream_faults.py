"""Streams that break off, cannot be parsed, hold bad records or have changed: the position stays exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from subspan.train import stream
from subspan.train.data import StreamedDataset, TextData, load_data
from tests.train.micro import sentences


class Broken:
    """A streamed data set whose connection breaks at chosen reads; counts over all passes and openings."""

    def __init__(self, rows: list[Any], breaks: set[int] = frozenset(), error: Exception | None = None) -> None:  # type: ignore[assignment]
        self.rows, self.breaks, self.reads, self.opened = rows, breaks, 0, 0
        self.error = error or ConnectionResetError("reset by peer")

    def open(self) -> Broken.Pass:
        self.opened += 1
        return Broken.Pass(self)

    class Pass:
        def __init__(self, source: Broken) -> None:
            self.source, self.position = source, 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

        def __iter__(self) -> Iterator[Any]:
            while self.position < len(self.source.rows):
                self.source.reads += 1
                if self.source.reads in self.source.breaks:
                    raise self.source.error
                self.position += 1
                yield self.source.rows[self.position - 1]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(stream.time, "sleep", waited.append)
    monkeypatch.setattr(stream, "BLOCK_DOCUMENTS", 50)
    return waited


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextData]:
    def load(source: Broken, **changes: Any) -> TextData:
        import datasets

        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: source.open())
        return load_data("hf:some/texts", **({"seq_len": 16, "vocab_size": 300, "validation": 0.1} | changes))

    return load


def rows(bad: bool = False) -> list[Any]:
    found: list[Any] = [{"text": text} for text in sentences(240)]
    for position in (0, 3, 60, 61, 62, 150, 239) if bad else ():
        found.insert(position, {"body": "no text"} if position % 2 else {"text": None})
    return found


def take(data: TextData, count: int) -> torch.Tensor:
    assert isinstance(data.train, StreamedDataset)
    return torch.stack([item["input_ids"] for item, _ in zip(data.train, range(count), strict=False)])


def test_an_interrupted_stream_is_read_on_where_it_broke(
    opened: Callable[..., TextData], hurry: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    ids = take(opened(Broken(rows())), 200)
    # In the passes for the tokenizer, for the validation set, and in training.
    source = Broken(rows(), breaks={17, 300, 301, 700, 701, 702, 790})
    assert torch.equal(take(opened(source), 200), ids)
    assert hurry == [1, 1, 2, 1, 2, 4, 1]
    assert "hf:some/texts broke off (reset by peer); next try in 4 s." in caplog.text


def test_a_stream_that_stays_away(opened: Callable[..., TextData], hurry: list[float]) -> None:
    data = opened(Broken(rows()))
    source = Broken(rows(), breaks=set(range(600, 10_000)))
    data = opened(source)
    with pytest.raises(ConnectionError, match=r"hf:some/texts broke off 6 times \(reset by peer\).*--resume auto"):
        take(data, 200)
    assert hurry == [1, 2, 4, 8, 16]


def answer(status: int) -> Exception:
    """What an HTTP library raises for a status."""
    response = type("Response", (), {"status_code": status})
    return type("HTTPStatusError", (Exception,), {"__module__": "httpx", "response": response})(status)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError("x"), True),
        (TimeoutError("x"), True),
        (type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client"})("x"), True),
        (answer(503), True),
        (answer(429), True),
        (answer(404), False),
        (ConnectionError("OfflineModeIsEnabled: no"), False),
        (ValueError("broken JSON"), False),
        (PermissionError("x"), False),
    ],
    ids=repr,
)
def test_what_is_tried_again(error: Exception, again: bool) -> None:
    assert stream.is_interruption(error) == again


def test_a_source_that_cannot_be_parsed_says_after_which_record(opened: Callable[..., TextData]) -> None:
    source = Broken(rows(), breaks={31}, error=RuntimeError("parse error"))
    with pytest.raises(ValueError, match="hf:some/texts cannot be read after 30 records: parse error"):
        opened(source, bad_records="skip")


def test_a_bad_record_of_a_stream_is_named(opened: Callable[..., TextData]) -> None:
    broken = rows()
    broken[70] = {"body": "b"}
    with pytest.raises(ValueError, match=r"hf:some/texts, record 71: wants an object .* found the fields 'body'"):
        opened(Broken(broken))
    for row in ("text", None, {"text": "\ud800"}):
        broken[70] = row
        with pytest.raises(ValueError, match="record 71: "):
            opened(Broken(broken))


def test_skipped_records_leave_the_stream_as_it_is_without_them(opened: Callable[..., TextData]) -> None:
    ids = take(opened(Broken(rows())), 150)
    data = opened(Broken(rows(bad=True)), bad_records="skip")
    assert torch.equal(take(data, 150), ids)
    assert data.bad.first is not None and "record 1:" in data.bad.first


@pytest.mark.parametrize("position", [0, 1, 37, 150, 400])
def test_a_stream_with_skipped_records_continues_anywhere(opened: Callable[..., TextData], position: int) -> None:
    data = opened(Broken(rows(bad=True), breaks={500, 650}), bad_records="skip")
    ids = take(data, position + 30)
    count = data.bad.count
    assert isinstance(data.train, StreamedDataset)
    state = json.loads(json.dumps(data.train.state_at(position)))
    again = opened(Broken(rows(bad=True), breaks={499, 520}), bad_records="skip")
    assert isinstance(again.train, StreamedDataset)
    again.train.load_state(state)
    assert torch.equal(take(again, 30), ids[position:])
    assert again.bad.count == count
    assert count > 0 or position + 30 < 60


def test_a_stream_whose_text_has_changed_is_not_continued(opened: Callable[..., TextData]) -> None:
    data = opened(Broken(rows()))
    take(data, 150)
    assert isinstance(data.train, StreamedDataset)
    state = data.train.state_at(120)
    changed = rows()
    changed[state["block"]["record"] + 5] = {"text": "something else"}
    again = opened(Broken(changed))
    assert isinstance(again.train, StreamedDataset)
    again.train.load_state(state)
    with pytest.raises(ValueError, match="hf:some/texts no longer holds the text that stood here"):
        take(again, 1)
