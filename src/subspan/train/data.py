"""Text to packed token sequences, with a held-out part that no training sequence touches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from subspan.train.bad_records import TEXT_FIELD, BadRecords
from subspan.train.corpus import digest, python_sources, read_documents
from subspan.train.stream import StreamedDataset, is_interruption, patiently, texts
from subspan.train.tokenizer import END_OF_TEXT, encode, load_tokenizer, train_tokenizer

__all__ = ["END_OF_TEXT", "PackedDataset", "StreamedDataset", "TextData", "load_data", "load_tokenizer"]

#: Documents of a text that are tokenised at once.
PACKED_DOCUMENTS = 512
#: The validation set of a streamed source, and the text its tokenizer is trained on, come from its beginning.
STREAM_VALIDATION_SEQUENCES = 256
STREAM_TOKENIZER_DOCUMENTS = 20_000
#: Fewer sequences than this make no validation loss.
MIN_SEQUENCES = 2


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Documents laid end to end, each closed by the end-of-text token, and cut into sequences of `seq_len` tokens.

    Args:
        tokens: 1-D tensor of token ids.
        seq_len: tokens in a sequence; the incomplete last one is dropped.

    Example:
        >>> PackedDataset(torch.arange(7), seq_len=3)[1]["input_ids"]
        tensor([3, 4, 5])
    """

    def __init__(self, tokens: torch.Tensor, seq_len: int) -> None:
        count = tokens.numel() // seq_len
        self.sequences = tokens[: count * seq_len].view(count, seq_len)

    def __len__(self) -> int:
        return self.sequences.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The model shifts the labels itself.
        ids = self.sequences[index].long()
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class TextData:
    """Training and validation sequences and the tokenizer that made them.

    Attributes:
        train: packed sequences ``{"input_ids", "labels"}``; a `StreamedDataset` where the source is streamed.
        validation: packed sequences of documents that no training sequence touches.
        tokenizer: with an end-of-text token.
        bad: the records that were left out.
    """

    train: PackedDataset | StreamedDataset
    validation: PackedDataset
    tokenizer: PreTrainedTokenizerBase
    bad: BadRecords = field(default_factory=BadRecords)


def load_data(
    source: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    seq_len: int = 128,
    validation: float = 0.05,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    bad_records: Literal["error", "skip"] = "error",
    text_field: str = TEXT_FIELD,
) -> TextData:
    """Load a text source as packed token sequences for training and validation.

    Every document belongs either to training or to validation, decided by a SHA-256 of its text alone, so equal
    documents are never on both sides. In memory, the documents with the smallest hashes are held out until they make
    up the share `validation` of the characters; in a stream, those whose hash is below that share of the range.

    Args:
        source: None for the Python standard library of the running interpreter; a path (see `read_documents`); or
            ``hf:NAME[:CONFIG][:SPLIT]``, a data set of the Hugging Face hub or a local data set folder, streamed.
        tokenizer: a folder, a ``tokenizer.json`` or a name on the hub. None trains a byte-level BPE on the training
            documents and caches it.
        vocab_size: of the tokenizer that is trained.
        seq_len: tokens in a sequence.
        validation: share of the text that is held out, between 0 and 1.
        seed: order of a streamed source (the order of the others is the sampler's business).
        cache_dir: where trained tokenizers are kept (default: ``$SUBSPAN_CACHE``, else ``$XDG_CACHE_HOME/subspan``,
            else ``~/.cache/subspan``).
        bad_records: what becomes of records that cannot be used (no text, broken JSON, not UTF-8) and of files that
            cannot be read: ``error``, or ``skip``: they are left out and counted.
        text_field: of a .jsonl object, a .parquet file or a data set of the hub, that holds the text of a document.

    Raises:
        FileNotFoundError: no such file or folder.
        ConnectionError: a streamed source cannot be reached, after several tries.
        ValueError: unreadable data, with the place, or too little of it for one training and `MIN_SEQUENCES` validation
            sequences.

    Example:
        >>> data = load_data(seq_len=64, vocab_size=512)  # doctest: +SKIP
        >>> data.train[0]["input_ids"].shape  # doctest: +SKIP
        torch.Size([64])
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; it is a share of the text, between 0 and 1, such as 0.05.")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a sequence needs at least 2 tokens.")
    if tokenizer is None and vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least 257 tokens.")
    if bad_records not in ("error", "skip"):
        raise ValueError(f"bad_records is {bad_records!r}; it must be error or skip.")
    bad = BadRecords(skip=bad_records == "skip")
    cache = _cache_dir(cache_dir)
    name = "the Python standard library" if source is None else str(source)
    if name.startswith("hf:"):
        return _load_stream(name, tokenizer, vocab_size, seq_len, validation, seed, cache, bad, text_field)

    documents = python_sources() if source is None else read_documents(Path(source), bad, text_field)
    train_documents, held_out = _split(documents, validation)
    text_tokenizer = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(train_documents, vocab_size, cache)
    train = PackedDataset(_pack(text_tokenizer, train_documents), seq_len)
    held = PackedDataset(_pack(text_tokenizer, held_out), seq_len)
    _check_enough(name, len(train), len(held), seq_len)
    return TextData(train, held, text_tokenizer, bad)


def _cache_dir(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("SUBSPAN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspan"


def _split(documents: list[str], validation: float) -> tuple[list[str], list[str]]:
    """Hold out the documents with the smallest hashes, all copies of one together."""
    hashes = [digest(document) for document in documents]
    size: dict[bytes, int] = {}
    for key, document in zip(hashes, documents, strict=True):
        size[key] = size.get(key, 0) + len(document)
    wanted = validation * sum(size.values())
    held_out: set[bytes] = set()
    for key in sorted(size):
        if wanted <= 0:
            break
        held_out.add(key)
        wanted -= size[key]
    train = [document for key, document in zip(hashes, documents, strict=True) if key not in held_out]
    return train, [document for key, document in zip(hashes, documents, strict=True) if key in held_out]


def _check_enough(name: str, train: int, validation: int, seq_len: int) -> None:
    if train < 1 or validation < MIN_SEQUENCES:
        raise ValueError(
            f"{name} gives {train} training and {validation} validation sequences of {seq_len} tokens; at least 1 and "
            f"{MIN_SEQUENCES} are needed. Give more text, a shorter seq_len, or hold out another share of it."
        )


def _pack(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    pieces = [torch.empty(0, dtype=torch.int32)]
    # In blocks, because lists of Python integers take ten times the memory of the text.
    for start in range(0, len(documents), PACKED_DOCUMENTS):
        for ids in encode(tokenizer, documents[start : start + PACKED_DOCUMENTS]):
            pieces.append(torch.tensor(ids, dtype=torch.int32))
    return torch.cat(pieces)


def _load_stream(
    name: str,
    tokenizer: str | None,
    vocab_size: int,
    seq_len: int,
    validation: float,
    seed: int,
    cache: Path,
    bad: BadRecords,
    text_field: str,
) -> TextData:
    parts = name.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"data {name!r}: wants hf:NAME[:CONFIG][:SPLIT], such as hf:allenai/c4:en.")
    config = parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 else "train"

    def open_source() -> Any:
        import datasets

        try:
            return datasets.load_dataset(parts[0], config, split=split, streaming=True)
        except (OSError, ValueError) as error:
            if is_interruption(error):
                raise
            raise ValueError(f"data {name!r} cannot be opened: {error}") from error

    def is_validation(text: str) -> bool:
        return int.from_bytes(digest(text)[:8], "big") < validation * 2**64

    def documents(held_out: bool) -> Iterator[str]:
        # Counted when they are trained on.
        for text in texts(open_source(), name, BadRecords(bad.skip), text_field=text_field):
            if text.strip() and is_validation(text) == held_out:
                yield text

    def held_out_tokens() -> list[int]:
        tokens: list[int] = []
        for text in documents(held_out=True):
            tokens += encode(text_tokenizer, [text])[0]
            if len(tokens) >= STREAM_VALIDATION_SEQUENCES * seq_len:
                break
        return tokens

    if tokenizer is None:
        head = patiently(lambda: list(itertools.islice(documents(held_out=False), STREAM_TOKENIZER_DOCUMENTS)), name)
        text_tokenizer = train_tokenizer(head, vocab_size, cache)
    else:
        text_tokenizer = load_tokenizer(tokenizer)
    held = PackedDataset(torch.tensor(patiently(held_out_tokens, name), dtype=torch.int32), seq_len)
    _check_enough(name, 1, len(held), seq_len)
    train = StreamedDataset(
        open_source, is_validation, lambda docs: encode(text_tokenizer, docs), seq_len, seed, name, bad, text_field
    )
    return TextData(train, held, text_tokenizer, bad)
