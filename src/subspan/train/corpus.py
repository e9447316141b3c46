"""Documents out of files: text, .jsonl, .parquet, a folder, gzip and zstandard of them, or Python's own sources."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BLOCK_CHARACTERS", "TEXT_FIELD", "python_sources", "read_documents"]

#: The field (.jsonl) or column (.parquet) that holds the text of a document.
TEXT_FIELD = "text"
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


def read_documents(path: str | Path) -> list[str]:
    """Read every document of a file or, recursively and in the order of the paths, of a folder.

    ``.jsonl`` and ``.parquet`` hold one document a row in `TEXT_FIELD`; every other file is UTF-8 text, cut at line
    ends into documents of about `BLOCK_CHARACTERS` characters where it is longer. ``.gz`` and ``.zst`` are unpacked.
    Hidden files are left out.

    Raises:
        FileNotFoundError: no such path, or a folder without files.
        ValueError: a file that is empty, broken or not what its name says; the message names it, with the line.
    """
    path = Path(path).expanduser()
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
    return [document for file in files for document in _read_file(file)]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read_file(path: Path) -> list[str]:
    raw = _unpack(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        documents = list(_json_lines(path, raw))
    elif kind == ".parquet":
        documents = _parquet(path, raw)
    else:
        documents = _blocks(_decode(path, raw))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} is empty: it holds no text to train on.")
    return documents


def _unpack(path: Path) -> bytes:
    suffix = path.suffix.lower()
    raw = path.read_bytes()
    if suffix == ".gz":
        try:
            return gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); copy or download it again.") from error
    if suffix == ".zst":
        import zstandard

        frames = []
        rest, whole = raw, True
        try:
            while rest and whole:
                frame = zstandard.ZstdDecompressor().decompressobj()
                frames.append(frame.decompress(rest))
                rest, whole = frame.unused_data, frame.eof
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is not a whole zstandard file ({error}); copy or download it again.") from error
        if not whole:
            raise ValueError(f"{path} is not a whole zstandard file; copy or download it again.")
        return b"".join(frames)
    return raw


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; convert the file to UTF-8 text, "
            "or keep it out of the folder."
        ) from error


def _json_lines(path: Path, raw: bytes) -> Iterator[str]:
    for number, line in enumerate(_decode(path, raw).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); one object a line is wanted.") from error
        if not isinstance(row, dict) or not isinstance(row.get(TEXT_FIELD), str):
            found = f"the fields {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{path}, line {number}: wants an object with a string {TEXT_FIELD!r}, found {found}.")
        yield row[TEXT_FIELD]


def _parquet(path: Path, raw: bytes) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}); copy or download it again.") from error
    columns = file.schema_arrow.names
    if TEXT_FIELD not in columns:
        raise ValueError(f"{path}: wants a column {TEXT_FIELD!r}, found {', '.join(map(repr, columns))}.")
    rows = file.read(columns=[TEXT_FIELD]).column(TEXT_FIELD).to_pylist()
    for number, row in enumerate(rows, start=1):
        if row is not None and not isinstance(row, str):
            raise ValueError(f"{path}, row {number}: the column {TEXT_FIELD!r} holds a {type(row).__name__}, no text.")
    return [row for row in rows if row is not None]


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
