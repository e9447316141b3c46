"""Text to packed token sequences, with a held-out part that no training sequence touches."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, __version__, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from subspan.train.corpus import TEXT_FIELD, python_sources, read_documents

__all__ = ["PackedDataset", "StreamedDataset", "TextData", "load_data", "load_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")
#: A streamed source is tokenised and shuffled in blocks of this many documents.
BLOCK_DOCUMENTS = 512
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


class StreamedDataset(IterableDataset[dict[str, torch.Tensor]]):
    """An endless packed stream of a source that does not fit in memory; its position can be saved and restored.

    Documents are read in blocks of `BLOCK_DOCUMENTS`; the order inside a block is drawn from (seed, number of the
    block). A position is a number of sequences, so it does not depend on how far a loader has read ahead.

    Args:
        open_source: called at every pass over the source, returns an iterable with `state_dict` and `load_state_dict`
            (a streamed data set of ``datasets``).
        is_validation: tells the documents that are held out.
        encode: documents to lists of token ids, end-of-text included.
        seq_len: tokens in a sequence.
        seed: of the order.
    """

    def __init__(
        self,
        open_source: Callable[[], Any],
        is_validation: Callable[[str], bool],
        encode: Callable[[list[str]], list[list[int]]],
        seq_len: int,
        seed: int,
    ) -> None:
        self._open = open_source
        self._is_validation = is_validation
        self._encode = encode
        self._seq_len = seq_len
        self._seed = seed
        self._start: dict[str, Any] = {"sequences": 0, "block": 0, "source": None, "rest": []}
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
        self._start = state["block"]
        self._skip = state["at"] - self._start["sequences"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._blocks = []
        position = dict(self._start)
        skip = self._skip
        source = self._open()
        if position["source"] is not None:
            source.load_state_dict(position["source"])
        rest: list[int] = list(position["rest"])
        documents = iter(source)
        empty_passes = 0
        while True:
            self._blocks.append({**position, "rest": list(rest)})
            block, ended = self._read(documents)
            empty_passes = 0 if block else empty_passes + 1
            if empty_passes > 1:
                raise ValueError(f"the data set holds no document with a non-empty {TEXT_FIELD!r} to train on.")
            generator = torch.Generator().manual_seed(_number(f"{self._seed}/{position['block']}") % 2**63)
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
            if ended:
                source = self._open()
                documents = iter(source)
            # Not before the first block: a source that has only just been given a state does not return it.
            position["source"] = None if ended else source.state_dict()

    def _read(self, documents: Iterator[dict[str, Any]]) -> tuple[list[str], bool]:
        block: list[str] = []
        for row in documents:
            text = _text(row)
            if text.strip() and not self._is_validation(text):
                block.append(text)
                if len(block) == BLOCK_DOCUMENTS:
                    return block, False
        return block, True


@dataclass(frozen=True)
class TextData:
    """Training and validation sequences and the tokenizer that made them.

    Attributes:
        train: packed sequences ``{"input_ids", "labels"}``; a `StreamedDataset` where the source is streamed.
        validation: packed sequences of documents that no training sequence touches.
        tokenizer: with an end-of-text token.
    """

    train: PackedDataset | StreamedDataset
    validation: PackedDataset
    tokenizer: PreTrainedTokenizerBase


def load_data(
    source: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    seq_len: int = 128,
    validation: float = 0.05,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
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

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: unreadable data, or too little of it for one training and `MIN_SEQUENCES` validation sequences.

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
    cache = _cache_dir(cache_dir)
    name = "the Python standard library" if source is None else str(source)
    if name.startswith("hf:"):
        return _load_stream(name, tokenizer, vocab_size, seq_len, validation, seed, cache)

    documents = python_sources() if source is None else read_documents(Path(source))
    train_documents, held_out = _split(documents, validation)
    text_tokenizer = load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(train_documents, vocab_size, cache)
    train = PackedDataset(_pack(text_tokenizer, train_documents), seq_len)
    held = PackedDataset(_pack(text_tokenizer, held_out), seq_len)
    _check_enough(name, len(train), len(held), seq_len)
    return TextData(train, held, text_tokenizer)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, a ``tokenizer.json`` or the hub; it must have an end-of-text token.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: it cannot be loaded, or has no end-of-text token.
    """
    path = Path(name_or_path).expanduser()
    tokenizer: PreTrainedTokenizerBase
    if path.is_file():
        try:
            raw = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        end = next((token for token in _END_OF_TEXT_NAMES if raw.token_to_id(token) is not None), None)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end)
    elif path.exists() or (name_or_path.count("/") <= 1 and not name_or_path.startswith((".", "~", "/"))):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {name_or_path!r} cannot be loaded: {error}") from error
    else:
        raise FileNotFoundError(f"tokenizer {name_or_path!r}: no such file or folder.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name_or_path!r} names no end-of-text token, which separates documents; add an "
            f"'eos_token' to its tokenizer_config.json, or call the token one of {', '.join(_END_OF_TEXT_NAMES)}."
        )
    return tokenizer


def _cache_dir(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("SUBSPAN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspan"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _number(text: str) -> int:
    return int.from_bytes(_digest(text)[:8], "big")


def _split(documents: list[str], validation: float) -> tuple[list[str], list[str]]:
    """Hold out the documents with the smallest hashes, all copies of one together."""
    hashes = [_digest(document) for document in documents]
    size: dict[bytes, int] = {}
    for digest, document in zip(hashes, documents, strict=True):
        size[digest] = size.get(digest, 0) + len(document)
    wanted = validation * sum(size.values())
    held_out: set[bytes] = set()
    for digest in sorted(size):
        if wanted <= 0:
            break
        held_out.add(digest)
        wanted -= size[digest]
    train = [document for digest, document in zip(hashes, documents, strict=True) if digest not in held_out]
    return train, [document for digest, document in zip(hashes, documents, strict=True) if digest in held_out]


def _check_enough(name: str, train: int, validation: int, seq_len: int) -> None:
    if train < 1 or validation < MIN_SEQUENCES:
        raise ValueError(
            f"{name} gives {train} training and {validation} validation sequences of {seq_len} tokens; at least 1 and "
            f"{MIN_SEQUENCES} are needed. Give more text, a shorter seq_len, or hold out another share of it."
        )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[list[int]]:
    if not documents:
        return []
    end = tokenizer.eos_token_id
    # verbose=False: documents longer than the model's context are cut here, so its warning says nothing.
    encoded = tokenizer(
        documents, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [[*ids, end] for ids in encoded["input_ids"]]


def _pack(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    pieces = [torch.empty(0, dtype=torch.int32)]
    # In blocks, because lists of Python integers take ten times the memory of the text.
    for start in range(0, len(documents), BLOCK_DOCUMENTS):
        for ids in _encode(tokenizer, documents[start : start + BLOCK_DOCUMENTS]):
            pieces.append(torch.tensor(ids, dtype=torch.int32))
    return torch.cat(pieces)


def _train_tokenizer(documents: Iterable[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE, or take it from the cache, keyed by the documents, the size and the library's version."""
    documents = list(documents)
    key = hashlib.sha256(json.dumps({"kind": "byte-bpe", "vocab_size": vocab_size, "tokenizers": __version__}).encode())
    for document in documents:
        key.update(_digest(document))
    path = cache / "tokenizers" / f"{key.hexdigest()[:32]}.json"
    if not path.is_file():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(documents, trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(bpe.to_str())
        os.replace(file.name, path)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)), eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _text(row: dict[str, Any]) -> str:
    text = row.get(TEXT_FIELD)
    if not isinstance(text, str):
        raise ValueError(f"the data set has no text field {TEXT_FIELD!r}; its fields are {', '.join(map(repr, row))}.")
    return text


def _load_stream(
    name: str, tokenizer: str | None, vocab_size: int, seq_len: int, validation: float, seed: int, cache: Path
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
            raise ValueError(f"data {name!r} cannot be opened: {error}") from error

    def is_validation(text: str) -> bool:
        return _number(text) < validation * 2**64

    def documents(held_out: bool) -> Iterator[str]:
        for row in open_source():
            text = _text(row)
            if text.strip() and is_validation(text) == held_out:
                yield text

    if tokenizer is None:
        head = [text for text, _ in zip(documents(False), range(STREAM_TOKENIZER_DOCUMENTS), strict=False)]
        text_tokenizer = _train_tokenizer(head, vocab_size, cache)
    else:
        text_tokenizer = load_tokenizer(tokenizer)
    tokens: list[int] = []
    for text in documents(True):
        tokens += _encode(text_tokenizer, [text])[0]
        if len(tokens) >= STREAM_VALIDATION_SEQUENCES * seq_len:
            break
    held = PackedDataset(torch.tensor(tokens, dtype=torch.int32), seq_len)
    _check_enough(name, 1, len(held), seq_len)
    train = StreamedDataset(open_source, is_validation, lambda docs: _encode(text_tokenizer, docs), seq_len, seed)
    return TextData(train, held, text_tokenizer)
