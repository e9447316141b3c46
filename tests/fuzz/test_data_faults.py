"""Data that is broken, interrupted or hostile: an error that says where, or skipped and counted; never silence."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from subspan.train import bad_records
from subspan.train.bad_records import BadRecords
from subspan.train.corpus import read_documents
from subspan.train.data import load_data
from tests.train.micro import metrics, run, sentences, settings

GOOD = [json.dumps({"text": text}) for text in sentences(30)]
BAD = {
    "not JSON": '{"text": "cut',
    "no object": "[1]",
    "no field": '{"body": "b"}',
    "null": '{"text": null}',
    "a number": '{"text": 7}',
    "half a character": '{"text": "\\ud800"}',
    "nested": '{"text": ' + "[" * 100_000,
    "long number": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "huge": json.dumps({"text": "x" * 300}),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_records, "LARGEST_RECORD", 200)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "textes-é漢.jsonl"
    path.write_text("\n".join([*GOOD[:10], "", BAD[fault], *GOOD[10:], BAD[fault]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"textes-é漢.jsonl, line 12: ") as caught:
        read_documents(path)
    assert "bad_records skip" in str(caught.value) and len(str(caught.value)) < 400
    bad = BadRecords(skip=True)
    assert read_documents(path, bad) == sentences(30)
    assert bad.count == 2
    assert "line 12" in str(bad)


def test_empty_records_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(['{"text": ""}', *GOOD, '{"text": " \\n"}', "", "  "]))
    assert read_documents(tmp_path / "t.jsonl") == sentences(30)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(GOOD), encoding="utf-8-sig")
    assert read_documents(tmp_path / "t.jsonl") == sentences(30)


def test_lines_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\n\xff\xfe\ntwo \xe2\x82\nthree\n")
    with pytest.raises(ValueError, match=r"t.txt, line 2: byte 0xff is not UTF-8"):
        read_documents(path)
    bad = BadRecords(skip=True)
    assert read_documents(path, bad) == ["one\n\n\nthree\n"]
    assert bad.count == 2


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    raw = pyarrow.array([b"one", None, b"\xff", b"two"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    with pytest.raises(ValueError, match=r"t.parquet, row 2: wants an object .* found a NoneType"):
        read_documents(path)
    bad = BadRecords(skip=True)
    assert read_documents(path, bad) == ["one", "two"]
    assert bad.count == 2


def test_files_that_cannot_be_read_are_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(GOOD).encode())[:-20])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.txt").write_text("\n")
    (tmp_path / "e.txt").symlink_to(tmp_path / "e.txt")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / os.fsdecode(b"name-\xff.txt")).write_text("fine")
    with pytest.raises(ValueError, match=r"b.jsonl.gz is not a whole gzip file"):
        read_documents(tmp_path)
    bad = BadRecords(skip=True)
    assert read_documents(tmp_path, bad) == [*sentences(30), "fine"]
    assert bad.count == 3


def test_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"body": 1}\n{"body": 2}')
    with pytest.raises(ValueError, match=r"holds no text to train on \(2 bad records, the first skipped: .*line 1"):
        read_documents(tmp_path / "t.jsonl", BadRecords(skip=True))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("text")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"t.txt cannot be read: Permission denied"):
        read_documents(tmp_path / "t.txt")


@pytest.mark.parametrize("skip", [True, False])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    path = tmp_path / "t.txt"
    path.write_text("text")

    def slow(path: Path) -> bytes:
        path.write_text("another text")
        return b"text"

    monkeypatch.setattr(Path, "read_bytes", slow)
    with pytest.raises(ValueError, match=r"t.txt changed while it was read"):
        read_documents(path, BadRecords(skip))


def test_names_inside_of_data_are_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzip file names what it holds, and a record may have any keys: neither is ever written to."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    name = "../../evil.jsonl"
    with gzip.GzipFile(name, "wb", fileobj=(inside / "t.jsonl.gz").open("wb")) as file:
        rows = [json.dumps({"text": text, "file": "/tmp/../evil", "path": "../../evil"}) for text in sentences(200)]
        file.write("\n".join(rows).encode())
    load_data(inside, seq_len=16, vocab_size=300, cache_dir=tmp_path / "cache")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("cache/tokenizers/")} == {"a/b/t.jsonl.gz"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_random_damage_is_seen_or_harmless(tmp_path: Path, kind: str) -> None:
    """Never anything but our own error; where a checksum protects the bytes, never another text either."""
    plain = "\n".join(GOOD).encode()
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"text": sentences(30)})
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    else:
        pack: Callable[[bytes], bytes] = {
            "gz": gzip.compress,
            "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        }.get(kind.split(".")[-1], bytes)
        path.write_bytes(pack(plain))
    whole, raw = read_documents(path), path.read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(raw)
        if choose.random() < 0.3:
            del damaged[choose.randrange(len(damaged)) :]
        else:
            for _ in range(choose.randint(1, 4)):
                damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_documents(path)
        except ValueError as error:
            assert f"t.{kind}" in str(error)
            refused += 1
        else:
            # A flipped bit of the metadata may leave the texts alone.
            assert found == whole or kind in ("jsonl", "txt")
        read_or_refused(path)
    assert refused > (0 if kind == "txt" else 10)


def read_or_refused(path: Path) -> None:
    try:
        read_documents(path, BadRecords(skip=True))
    except ValueError as error:
        assert "holds no text to train on" in str(error)


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_prints_and_records_what_it_left_out(tmp_path: Path, cache: Path) -> None:
    values = settings(tmp_path, steps=2)
    with Path(values["data"]).open("a") as file:
        file.write('\n{"body": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"text.jsonl, line 901: "):
        run(tmp_path, steps=2)
    assert not (tmp_path / "run").exists()
    summary = run(tmp_path, steps=2, bad_records="skip")
    assert summary.bad_records == 2
    assert all(line["bad_records"] == 2 for line in metrics(tmp_path / "run"))


def test_the_setting_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad_records is 'ignore'; it must be error or skip"):
        load_data(tmp_path, bad_records="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bad_records is 'ignore'; it must be error or skip"):
        run(tmp_path, bad_records="ignore")
