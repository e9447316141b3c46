from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from subspan.train.corpus import BLOCK_CHARACTERS, python_sources, read_documents


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_python_sources_are_in_order_without_tests(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "pkg/z.py", "test/t.py", "pkg/tests/u.py", "site-packages/v.py", "x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").write_text("\n")
    assert python_sources(tmp_path) == ["# a.py", "# b.py", "# pkg/z.py"]


def test_python_sources_of_this_interpreter() -> None:
    import dataclasses
    import inspect

    sources = python_sources()
    assert inspect.getsource(dataclasses) in sources
    assert sum(map(len, sources)) > 3e6


def test_an_interpreter_without_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data PATH"):
        python_sources(tmp_path)


ROWS = ["first text", "second\nliné"]


def write_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"text": row, "other": 1}) for row in ROWS) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.jsonl", write_jsonl), ("rows.parquet", lambda path: parquet(path, {"n": [1, 2], "text": ROWS}))],
)
@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", None),
        (".gz", gzip.compress),
        (".zst", lambda raw: zstandard.ZstdCompressor().compress(raw)),
    ],
)
def test_rows(
    tmp_path: Path, name: str, write: Callable[[Path], Path], suffix: str, pack: Callable[[bytes], bytes] | None
) -> None:
    plain = write(tmp_path / name)
    path = plain.with_name(name + suffix)
    if pack is not None:
        path.write_bytes(pack(plain.read_bytes()))
    assert read_documents(path) == ROWS


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"line {i} " + "x" * 90 + "\n" for i in range(400)]
    (tmp_path / "long.md").write_text("".join(lines))
    documents = read_documents(tmp_path / "long.md")
    assert len(documents) == 5
    assert all(BLOCK_CHARACTERS <= len(document) < BLOCK_CHARACTERS + 200 for document in documents[:-1])
    assert "".join(documents) == "".join(lines)


def test_two_frames_of_zstandard(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "t.txt.zst").write_bytes(pack(b"one ") + pack(b"two"))
    assert read_documents(tmp_path / "t.txt.zst") == ["one two"]


def test_a_folder_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("c.txt", "a/b.txt", "B.txt", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a.jsonl").write_text('{"text": "row"}')
    assert read_documents(tmp_path) == ["B.txt", "row", "a/b.txt", "c.txt"]


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.txt': no such file or folder"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="holds no files"):
        read_documents(tmp_path)


TEXT = b"a sentence, said again. " * 50
BROKEN = {
    "empty.txt": (b" \n", "is empty"),
    "bad.txt": (b"fine\nfine\n\xff", r"bad.txt, line 3: byte 0xff is not UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": ', r"bad.jsonl, line 3: not JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}', r"field.jsonl, line 2: .*string 'text', found the fields 'body'"),
    "number.jsonl": (b'{"text": 3}', r"number.jsonl, line 1"),
    "list.jsonl": (b"[1]", r"list.jsonl, line 1: .*found a list"),
    "cut.txt.gz": (gzip.compress(TEXT)[:-9], r"cut.txt.gz is not a whole gzip file"),
    "no.txt.gz": (b"plain text", r"no.txt.gz is not a whole gzip file"),
    "cut.txt.zst": (zstandard.ZstdCompressor().compress(TEXT)[:-5], r"cut.txt.zst is not a whole zstandard file"),
    "no.txt.zst": (b"plain text", r"no.txt.zst is not a whole zstandard file"),
    "no.parquet": (b"plain text", r"no.parquet is not a whole parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_a_large_zstandard_file_that_was_cut(tmp_path: Path) -> None:
    import random

    raw = random.Random(0).randbytes(400_000).hex().encode()
    packed = zstandard.ZstdCompressor().compress(raw)
    (tmp_path / "cut.txt.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"cut.txt.zst is not a whole"):
        read_documents(tmp_path / "cut.txt.zst")


def test_parquet_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p.parquet: wants a column 'text', found 'body'"):
        read_documents(parquet(tmp_path / "p.parquet", {"body": ["a"]}))
    with pytest.raises(ValueError, match=r"p.parquet, row 1: wants an object with a string 'text', found a int"):
        read_documents(parquet(tmp_path / "p.parquet", {"text": [1]}))
