"""An endless packed stream of a source that does not fit in memory, and patience with one that breaks off."""

from __future__ import annotations

import hashlib
import http.client
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset

from subspan.train.bad_records import TEXT_FIELD, BadRecords, record_text
from subspan.train.corpus import digest

__all__ = ["StreamedDataset", "is_interruption", "patiently", "texts"]

#: A streamed source is tokenised and shuffled in blocks of this many documents.
BLOCK_DOCUMENTS = 512
#: Seconds before each new try at a source that broke off.
WAITS = (1, 2, 4, 8, 16)

_LOG = logging.getLogger(__name__)
_NETWORK = frozenset({"aiohttp", "httpcore", "httpx", "requests", "urllib3"})

T = TypeVar("T")


class StreamedDataset(IterableDataset[dict[str, torch.Tensor]]):
    """An endless packed stream of a source that does not fit in memory; its position can be saved and restored.

    Documents are read in blocks of `BLOCK_DOCUMENTS`; the order inside a block is drawn from (seed, number of the
    block). A position is a number of sequences, so it does not depend on how far a loader has read ahead. A block that
    breaks off is read again from its beginning, and a restored position is refused where the text is another.

    Args:
        open_source: called at every pass over the source, returns an iterable with `state_dict` and `load_state_dict`
            (a streamed data set of ``datasets``).
        is_validation: tells the documents that are held out.
        encode: documents to lists of token ids, end-of-text included.
        seq_len: tokens in a sequence.
        seed: of the order.
        name: of the source, for messages.
        bad: what becomes of records that cannot be used. None: an error.
        text_field: of a record.
    """

    def __init__(
        self,
        open_source: Callable[[], Any],
        is_validation: Callable[[str], bool],
        encode: Callable[[list[str]], list[list[int]]],
        seq_len: int,
        seed: int,
        name: str = "the data set",
        bad: BadRecords | None = None,
        text_field: str = TEXT_FIELD,
    ) -> None:
        self._open = open_source
        self._is_validation = is_validation
        self._encode = encode
        self._seq_len = seq_len
        self._seed = seed
        self._name = name
        self._bad = BadRecords() if bad is None else bad
        self._text_field = text_field
        self._start: dict[str, Any] = {"sequences": 0, "block": 0, "record": 0, "bad": 0, "source": None, "rest": []}
        self._skip = 0
        self._blocks: list[dict[str, Any]] = []

    def state_at(self, sequences: int) -> dict[str, Any]:
        """Return the position after that many sequences as plain data, for `load_state`.

        Raises:
            ValueError: the stream has not come that far, or was not begun before that point.
        """
        reached = [block for block in self._blocks if block["sequences"] <= sequences]
        if not reached:
            raise ValueError(f"the stream holds no position for {sequences} sequences.")
        # Earlier positions are never asked for again.
        self._blocks = self._blocks[self._blocks.index(reached[-1]) :]
        return {"at": sequences, "block": reached[-1]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_at` returned."""
        self._start = {"record": 0, "bad": 0} | state["block"]
        self._skip = state["at"] - self._start["sequences"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._blocks = []
        position = dict(self._start)
        skip = self._skip
        rest: list[int] = list(position["rest"])
        expected = position.pop("digest", None)
        reader = _Reader(self._open, position["source"])
        empty_passes = 0
        while True:
            self._bad.count = position["bad"]
            block, records, ended = patiently(lambda: self._read(reader, position), self._name)  # noqa: B023
            self._blocks.append({**position, "rest": list(rest), "digest": _digest(block)})
            if expected not in (None, _digest(block)):
                raise ValueError(
                    f"{self._name} no longer holds the text that stood here when the run was saved, so the run cannot "
                    "be continued exactly. Bring the data back as it was, or start a new run with another --output."
                )
            expected = None
            empty_passes = 0 if block else empty_passes + 1
            if empty_passes > 1:
                raise ValueError(
                    f"{self._name} holds no document with a non-empty {self._text_field!r} to train on ({self._bad})."
                )
            key = int.from_bytes(digest(f"{self._seed}/{position['block']}")[:8], "big")
            generator = torch.Generator().manual_seed(key % 2**63)
            order = torch.randperm(len(block), generator=generator).tolist()
            for ids in self._encode([block[i] for i in order]):
                rest.extend(ids)
            count = len(rest) // self._seq_len
            for i in range(min(skip, count), count):
                sequence = torch.tensor(rest[i * self._seq_len : (i + 1) * self._seq_len])
                yield {"input_ids": sequence, "labels": sequence}
            skip = max(0, skip - count)
            rest = rest[count * self._seq_len :]
            position["sequences"] += count
            position["block"] += 1
            position["bad"] = self._bad.count
            position["record"] = 0 if ended else position["record"] + records
            # Not before the first block: a source that has only just been given a state does not return it.
            position["source"] = None if ended else reader.state()
            if ended:
                reader = _Reader(self._open, None)

    def _read(self, reader: _Reader, position: dict[str, Any]) -> tuple[list[str], int, bool]:
        """The documents of a block, how many records were read, and whether the pass has ended with it."""
        self._bad.count = position["bad"]
        block: list[str] = []
        records = 0
        try:
            read = texts(reader, self._name, self._bad, position["record"], self._text_field)
            for records, text in enumerate(read, start=1):
                if text.strip() and not self._is_validation(text):
                    block.append(text)
                    if len(block) == BLOCK_DOCUMENTS:
                        return block, records, False
        except Exception:
            reader.reopen(position["source"])
            raise
        return block, records, True


class _Reader:
    """An iterator over an opened source, which can be opened once more at a position."""

    def __init__(self, open_source: Callable[[], Any], state: Any) -> None:
        self._open = open_source
        self.reopen(state)

    def reopen(self, state: Any) -> None:
        """Forget what was opened; the source is opened at `state` when it is read next."""
        self._state, self._source = state, None

    def state(self) -> Any:
        """The position of the source."""
        assert self._source is not None
        return self._source.state_dict()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._source is None:
            source = self._open()
            if self._state is not None:
                source.load_state_dict(self._state)
            self._rows, self._source = iter(source), source
        return next(self._rows)


def texts(rows: Any, name: str, bad: BadRecords, before: int = 0, text_field: str = TEXT_FIELD) -> Iterator[str]:
    """The texts of records; an empty one stands for a record that was skipped.

    Args:
        rows: the records.
        name: of the source.
        bad: what becomes of records that cannot be used.
        before: how many records of the source came before these.
        text_field: of a record.

    Raises:
        ValueError: a record that cannot be used, or a source that cannot be read further; the message says where.
    """
    iterator = iter(rows)
    number = before
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            if is_interruption(error):
                raise
            raise ValueError(f"{name} cannot be read after {number - 1:,} records: {error}") from error
        try:
            text = record_text(row, text_field)
        except ValueError as error:
            bad.meet(f"{name}, record {number:,}: {error}.", error)
            text = ""
        yield text


def is_interruption(error: Exception) -> bool:
    """Whether an error is one of the connection, which may be gone at the next try."""
    if "OfflineModeIsEnabled" in repr(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status < 500 and status != 429:
        return False
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    return any(kind.__module__.split(".")[0] in _NETWORK for kind in type(error).__mro__)


def patiently(action: Callable[[], T], name: str) -> T:
    """Return what an action returns; after an interruption, try again a few times, later and later.

    Args:
        action: begins anew each time it is called.
        name: of the source, for messages.

    Raises:
        ConnectionError: it was interrupted each time; the message says how to go on.

    Example:
        >>> patiently(lambda: 3, "hf:some/texts")
        3
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as error:
            if not is_interruption(error):
                raise
            if wait is None:
                raise ConnectionError(
                    f"{name} broke off {len(WAITS) + 1} times ({error}). Nothing that was saved is lost: when the "
                    "source can be reached again, the same command with --resume auto goes on from the last checkpoint."
                ) from error
            _LOG.warning("%s broke off (%s); next try in %s s.", name, error, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _digest(block: list[str]) -> str:
    return hashlib.sha256(b"".join(map(digest, block))).hexdigest()
