"""Records of a data set that cannot be used: an error that says where they are, or skipped and counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LARGEST_RECORD", "TEXT_FIELD", "BadRecords", "record_text"]

#: The field (.jsonl), column (.parquet) or feature (hf:) that holds the text of a document, where none is named.
TEXT_FIELD = "text"
#: Characters of the longest document; a longer one is a file without line breaks or a broken download.
LARGEST_RECORD = 1 << 26

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class BadRecords:
    """What becomes of records that cannot be used.

    Args:
        skip: leave them out and count them; otherwise the first one is an error.
        count: how many were left out; in a stream that is read more than once, those of every pass.
        first: what was wrong with the first of them.

    Example:
        >>> bad = BadRecords(skip=True)
        >>> bad.meet("texts.jsonl, line 7: not JSON")
        >>> print(bad)
        1 bad record skipped: texts.jsonl, line 7: not JSON
    """

    skip: bool = False
    count: int = 0
    first: str | None = None

    def meet(self, fault: str, error: Exception | None = None) -> None:
        """Count a record that cannot be used.

        Args:
            fault: where it is and what is wrong with it.
            error: that showed it.

        Raises:
            ValueError: bad records are an error.
        """
        if not self.skip:
            raise ValueError(f"{fault} (With bad_records skip such records are left out and counted.)") from error
        self.count += 1
        self.first = self.first or fault

    def __str__(self) -> str:
        """How many, and the first of them."""
        if self.count == 0:
            return "no bad records"
        return f"{self.count:,} bad record{'s, the first' if self.count > 1 else ''} skipped: {self.first}"


def record_text(row: object, field: str = TEXT_FIELD) -> str:
    """Return the text of a record.

    Args:
        row: the record.
        field: of the text.

    Raises:
        ValueError: it has none, or one that cannot be used; the message says what was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"wants an object with a string {field!r}, found a {type(row).__name__}")
    text = row.get(field)
    if not isinstance(text, str):
        found = f"a {type(text).__name__}"
        if field not in row:
            found = f"the fields {', '.join(map(repr, row)) or 'none'}; text_field names the one with the text"
        raise ValueError(f"wants an object with a string {field!r}, found {found}")
    if len(text) > LARGEST_RECORD:
        raise ValueError(f"{len(text):,} characters in one document; at most {LARGEST_RECORD:,} are allowed")
    # What a tokenizer cannot take. JSON can name one half of such a pair.
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise ValueError(f"the character {half[0]!a} is half of a surrogate pair")
    return text
