"""Documents out of files: text, .jsonl, .parquet, a folder, gzip and zstandard of them, or Python's own sources."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from subspan.train.bad_records import TEXT_FIELD, BadRecords, record_text

__all__ = ["BLOCK_CHARACTERS", "digest", "python_sources", "read_documents"]

#: Longer text files are cut into documents of about this many characters, so that one file can be both trained and
#: validated on.
BLOCK_CHARACTERS = 8192

_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def python_sources(root: Path | None = None) -> list[str]:
    """Return the source files of the Python standard library, one document a file, in the order of their paths.

    Tests, installed packages and files that are not UTF-8 are left out.

    Args:
        root: folder of the library (default: that of the running interpreter).

    Raises:
        FileNotFoundError: this interpreter comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    paths = [path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts)]
    documents = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(text)
    if not documents:
        raise FileNotFoundError(f"{root} holds no Python sources to train on; give a text with --data PATH.")
    return documents


def digest(text: str) -> bytes:
    """SHA-256 of a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class _UnreadableError(ValueError):
    """A whole file that cannot be used."""


def read_documents(path: str | Path, bad: BadRecords | None = None, text_field: str = TEXT_FIELD) -> list[str]:
    """Read every document of a file or, recursively and in the order of the paths, of a folder.

    ``.jsonl`` and ``.parquet`` hold one document a row, in the field `text_field`; every other file is UTF-8 text, cut
    at line ends into documents of about `BLOCK_CHARACTERS` characters where it is longer. ``.gz`` and ``.zst`` are
    unpacked in memory. Hidden files are left out, and links to folders are not followed.

    Args:
        path: of the file or folder.
        bad: what becomes of records that cannot be used; a file that cannot be read counts as one. None: an error.
        text_field: of a row.

    Raises:
        FileNotFoundError: no such path, or a folder without files.
        ValueError: a file that is empty, broken or not what its name says, with its name and the line; nothing to train
            on; a file that changes while it is read.
    """
    path = Path(path).expanduser()
    bad = BadRecords() if bad is None else bad
    if path.is_dir():
        files = sorted(
            (f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path))),
            key=lambda f: f.relative_to(path).as_posix(),
        )
        if not files:
            raise FileNotFoundError(f"the folder {path} holds no files to train on.")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(
            f"data {str(path)!r}: no such file or folder. Give a text file, .jsonl, .parquet, a folder of them, "
            "or hf:NAME[:CONFIG][:SPLIT] for a data set of the Hugging Face hub."
        )
    documents: list[str] = []
    for file in files:
        try:
            documents += _read_file(file, bad, text_field)
        except _UnreadableError as error:
            bad.meet(str(error), error)
    if not documents:
        raise ValueError(f"{path} holds no text to train on ({bad}).")
    return documents


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_file(path: Path, bad: BadRecords, text_field: str) -> list[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    raw = _unpack(path, suffixes[-1] if suffixes else "")
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    before = bad.count
    documents: Iterator[str]
    if kind in (".jsonl", ".ndjson"):
        documents = _json_lines(path, raw, bad, text_field)
    elif kind == ".parquet":
        documents = _parquet(path, raw, bad, text_field)
    else:
        documents = _text_blocks(path, raw, bad)
    found = [document for document in documents if document.strip()]
    if not found and bad.count == before:
        raise _UnreadableError(f"{path} is empty: it holds no text to train on.")
    return found


def _unpack(path: Path, kind: str) -> bytes:
    try:
        before, raw, after = path.stat(), path.read_bytes(), path.stat()
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}.") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} changed while it was read; start again when nothing writes to it any more.")
    if kind == ".gz":
        try:
            return gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise _UnreadableError(f"{path} is not a whole gzip file ({error}); copy or download it again.") from error
    if kind == ".zst":
        import zstandard

        frames = []
        rest, whole = raw, True
        try:
            while rest and whole:
                frame = zstandard.ZstdDecompressor().decompressobj()
                frames.append(frame.decompress(rest))
                rest, whole = frame.unused_data, frame.eof
        except zstandard.ZstdError as error:
            message = f"{path} is not a whole zstandard file ({error}); copy or download it again."
            raise _UnreadableError(message) from error
        if not whole:
            raise _UnreadableError(f"{path} is not a whole zstandard file; copy or download it again.")
        return b"".join(frames)
    return raw


def _decode(path: Path, raw: bytes, bad: BadRecords) -> str:
    """The text of a file; a line that is not UTF-8 is a bad record, and an empty line in the text."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    lines = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            fault = (
                f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8; convert the file to UTF-8 "
                "text, or keep it out of the folder."
            )
            bad.meet(fault, error)
            lines.append("")
    return "\n".join(lines)


def _json_lines(path: Path, raw: bytes, bad: BadRecords, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_decode(path, raw, bad).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # Nested too deeply for the parser, or a number with thousands of digits.
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            bad.meet(f"{path}, line {number}: not JSON ({reason}); one object a line is wanted.", error)
            continue
        try:
            text = record_text(row, text_field)
        except ValueError as error:
            bad.meet(f"{path}, line {number}: {error}.", error)
            continue
        yield text


def _parquet(path: Path, raw: bytes, bad: BadRecords, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw), page_checksum_verification=True)
        columns = file.schema_arrow.names
        table = file.read(columns=[text_field]) if text_field in columns else None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{path} is not a whole parquet file ({error}); copy or download it again."
        raise _UnreadableError(message) from error
    if table is None:
        found = f"{', '.join(map(repr, columns))}; text_field names the one with the text"
        raise _UnreadableError(f"{path}: wants a column {text_field!r}, found {found}.")
    for number, value in enumerate(table.column(text_field), start=1):
        try:
            text = record_text({text_field: value.as_py()}, text_field)
        except ValueError as error:  # also a text that is not UTF-8
            bad.meet(f"{path}, row {number}: {error}.", error)
            continue
        yield text


def _text_blocks(path: Path, raw: bytes, bad: BadRecords) -> Iterator[str]:
    for block in _blocks(_decode(path, raw, bad)):
        try:
            yield record_text({TEXT_FIELD: block})
        except ValueError as error:
            bad.meet(f"{path}: {error}; break its lines.", error)


def _blocks(text: str) -> list[str]:
    blocks: list[str] = []
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= BLOCK_CHARACTERS:
            blocks.append("".join(lines))
            lines, length = [], 0
    return [*blocks, "".join(lines)] if lines else blocks
