"""Tokenizers: loaded, or trained on the text and cached."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, __version__, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from subspan.train.corpus import digest

__all__ = ["END_OF_TEXT", "encode", "load_tokenizer", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")


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
            name = str(path) if path.exists() else name_or_path
            # Without a word on code that comes with it, transformers asks on the terminal whether to run it.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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


def train_tokenizer(documents: Iterable[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE, or take it from the cache, keyed by the documents, the size and the library's version."""
    documents = list(documents)
    key = hashlib.sha256(json.dumps({"kind": "byte-bpe", "vocab_size": vocab_size, "tokenizers": __version__}).encode())
    for document in documents:
        key.update(digest(document))
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


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, the end-of-text token at the end."""
    if not documents:
        return []
    end = tokenizer.eos_token_id
    # verbose=False: documents longer than the model's context are cut here, so its warning says nothing.
    encoded = tokenizer(
        documents, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [[*ids, end] for ids in encoded["input_ids"]]
