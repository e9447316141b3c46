from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from subspan.train import data
from subspan.train import stream as stream_module
from subspan.train.data import PackedDataset, StreamedDataset, TextData, load_data, load_tokenizer
from tests.train.micro import sentences


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return path


def documents(packed: PackedDataset, loaded: TextData) -> list[str]:
    """What the sequences say, document by document; the first and the last may be cut."""
    return str(loaded.tokenizer.decode(packed.sequences.flatten())).split(data.END_OF_TEXT)


def load(path: Path, **changes: object) -> TextData:
    return load_data(path, **({"seq_len": 16, "vocab_size": 300} | changes))  # type: ignore[arg-type]


def test_sequences_are_the_documents_end_to_end(tmp_path: Path) -> None:
    rows = sentences(300)
    loaded = load(write_rows(tmp_path / "t.jsonl", rows))
    train = documents(loaded.train, loaded)
    held_out = documents(loaded.validation, loaded)
    # In the order of the file, each ended by the end-of-text token; the incomplete last sequence is left out.
    assert train[:-1] == [row for row in rows if row in train[:-1]]
    assert held_out[:-1] == [row for row in rows if row in held_out[:-1]]
    assert len(train[:-1]) + len(held_out[:-1]) >= len(rows) - 4
    item = loaded.train[3]
    assert item["input_ids"].shape == (16,)
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])


def test_validation_holds_no_document_of_training(tmp_path: Path) -> None:
    rows = sentences(200)
    # Copies of a document must not be torn apart.
    loaded = load(write_rows(tmp_path / "t.jsonl", rows + rows[:100]), validation=0.2)
    train, held_out = set(documents(loaded.train, loaded)[:-1]), set(documents(loaded.validation, loaded)[:-1])
    assert train & set(rows)
    assert held_out & set(rows)
    assert not train & held_out
    share = loaded.validation.sequences.numel() / (
        loaded.train.sequences.numel() + loaded.validation.sequences.numel()  # type: ignore[union-attr]
    )
    assert 0.19 < share < 0.25


def test_the_split_depends_on_the_documents_alone(tmp_path: Path) -> None:
    rows = sentences(200)
    first = load(write_rows(tmp_path / "a.jsonl", rows))
    second = load(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    assert set(documents(first.validation, first)[:-1]) <= set(rows)
    assert set(documents(first.validation, first)[:-1]) >= set(documents(second.validation, second)[1:-1])


def test_the_python_library_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sentences(200)
    monkeypatch.setattr(data, "python_sources", lambda: rows)
    loaded = load_data(seq_len=16, vocab_size=300)
    assert set(documents(loaded.train, loaded)[:-1]) <= set(rows)


def test_the_tokenizer_is_cached_by_content_and_size(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "t.jsonl", sentences(200))
    files = lambda: sorted((tmp_path / "cache" / "tokenizers").iterdir())  # noqa: E731
    first = load(path)
    assert len(files()) == 1
    # A cached tokenizer is used as it is: a change in it shows.
    content = json.loads(files()[0].read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    files()[0].write_text(json.dumps(content))
    assert load(path).tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert load(path).tokenizer.backend_tokenizer.to_str() != first.tokenizer.backend_tokenizer.to_str()
    load(path, vocab_size=290)
    load(write_rows(tmp_path / "u.jsonl", sentences(200, seed=1)))
    assert len(files()) == 3
    assert len(load(path, vocab_size=290).tokenizer) == 290


def test_the_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBSPAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(write_rows(tmp_path / "t.jsonl", sentences(100)))
    assert len(list((tmp_path / "subspan" / "tokenizers").glob("*.json"))) == 1


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    loaded = load(write_rows(tmp_path / "t.jsonl", sentences(100)))
    text = "tabs\t, naïve 漢字 🙂\n\n  def f(x):\r\n"
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer.decode(ids) == text


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", sentences(100))
    trained = load(path, vocab_size=280).tokenizer
    trained.save_pretrained(tmp_path / "tokenizer")
    for source in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.json"):
        loaded = load(path, tokenizer=str(source))
        assert len(loaded.tokenizer) == 280
        assert loaded.tokenizer.eos_token == data.END_OF_TEXT


def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="/no/where"):
        load_tokenizer("/no/where")
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be loaded"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names no end-of-text token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.0}, "validation is 0.0"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"vocab_size": 256}, "vocab_size is 256"),
        ({"seq_len": 4000}, r"gives \d training and \d validation sequences of 4000 tokens"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write_rows(tmp_path / "t.jsonl", sentences(100))
    with pytest.raises(ValueError, match=message):
        load(path, **changes)


def test_one_document_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one short document here, nothing else at all")
    with pytest.raises(ValueError, match="gives 0 training"):
        load(tmp_path / "one.txt")


# -- streamed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set folder of three files, 240 documents, read in blocks of 50."""
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 50)
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = sentences(240)
    for part in range(3):
        write_rows(folder / f"part-{part}.jsonl", rows[80 * part : 80 * (part + 1)])
    return f"hf:{folder}"


def stream(dataset: str, **changes: object) -> tuple[TextData, StreamedDataset]:
    loaded = load_data(dataset, **({"seq_len": 16, "vocab_size": 300, "validation": 0.1} | changes))  # type: ignore
    assert isinstance(loaded.train, StreamedDataset)
    return loaded, loaded.train


def take(source: StreamedDataset, count: int) -> torch.Tensor:
    return torch.stack([item["input_ids"] for item, _ in zip(source, range(count), strict=False)])


def test_a_stream_holds_everything_but_the_validation_documents(dataset: str) -> None:
    loaded, source = stream(dataset)
    held_out = set(documents(loaded.validation, loaded)[:-1])
    ids = take(source, 200)
    seen = set(str(loaded.tokenizer.decode(ids.flatten())).split(data.END_OF_TEXT)[1:-1])
    rows = set(sentences(240))
    assert held_out and held_out < rows
    assert not seen & held_out
    # More than one pass: every other document has come.
    assert len(seen & rows) > 190
    assert torch.equal(next(iter(source))["labels"], ids[0])


def test_a_stream_has_its_order_from_the_seed(dataset: str) -> None:
    _, first = stream(dataset, seed=1)
    _, second = stream(dataset, seed=1)
    _, third = stream(dataset, seed=2)
    ids = take(first, 40)
    assert torch.equal(ids, take(second, 40))
    assert not torch.equal(ids, take(third, 40))


@pytest.mark.parametrize("position", [0, 1, 37, 150, 400])
def test_a_stream_continues_anywhere_however_far_it_was_read(dataset: str, position: int) -> None:
    _, source = stream(dataset)
    ids = take(source, 450)
    state = json.loads(json.dumps(source.state_at(position)))
    _, again = stream(dataset)
    again.load_state(state)
    assert torch.equal(take(again, 450 - position), ids[position:])
    # And once more from there.
    later = again.state_at(min(position + 20, 450))
    _, third = stream(dataset)
    third.load_state(later)
    assert torch.equal(take(third, 10), torch.cat([ids, take(again, 470)])[position + 20 : position + 30])


def test_a_stream_forgets_positions_that_have_passed(dataset: str) -> None:
    _, source = stream(dataset)
    take(source, 300)
    source.state_at(300)
    with pytest.raises(ValueError, match="no position for 3 sequences"):
        source.state_at(3)


def test_a_loader_that_reads_ahead_does_not_move_the_position(dataset: str) -> None:
    _, source = stream(dataset)
    ids = take(source, 60)
    loader = iter(DataLoader(source, batch_size=4))
    for _ in range(10):
        next(loader)
    state = source.state_at(12)
    _, again = stream(dataset)
    again.load_state(state)
    assert torch.equal(take(again, 10), ids[12:22])


def test_name_config_and_split_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> object:
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_dict({"text": sentences(400)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec in ("hf:allenai/c4:en", "hf:owner/name", "hf:owner/name::extra"):
        load_data(spec, seq_len=16, vocab_size=300)
    assert set(asked) == {
        ("allenai/c4", "en", "train", True),
        ("owner/name", None, "train", True),
        ("owner/name", None, "extra", True),
    }


def test_a_stream_whose_text_is_in_another_field(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    articles = {"article": sentences(400), "highlights": ["short"] * 400, "id": ["0"] * 400}

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> object:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict(articles).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = "hf:abisee/cnn_dailymail:3.0.0:train"
    loaded, source = stream(name, text_field="article")
    assert set(asked) == {("abisee/cnn_dailymail", "3.0.0", "train")}
    seen = set(str(loaded.tokenizer.decode(take(source, 100).flatten())).split(data.END_OF_TEXT)[1:-1])
    assert seen and seen <= set(sentences(400))
    fields = "found the fields 'article', 'highlights', 'id'; text_field names the one with the text"
    with pytest.raises(ValueError, match=f"{name}, record 1: wants an object with a string 'text', {fields}"):
        stream(name)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_whose_text_is_in_another_field(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path, rows = tmp_path / f"articles.{kind}", sentences(200)
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": 3, "article": row}) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [3] * 200, "article": rows}), path)
    loaded = load(path, text_field="article")
    assert set(documents(loaded.train, loaded)[:-1]) <= set(rows)
    with pytest.raises(ValueError, match=r"wants .* 'headline', found .*'id', 'article'; text_field names the one"):
        load(path, text_field="headline")


def test_a_stream_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for spec in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match=r"wants hf:NAME\[:CONFIG\]\[:SPLIT\]"):
            load_data(spec)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        load_data(f"hf:{tmp_path / 'nowhere'}")
    rows = datasets.Dataset.from_dict({"body": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows.to_iterable_dataset())
    with pytest.raises(
        ValueError, match="hf:some/rows, record 1: wants an object with a string 'text', found the fields 'body'"
    ):
        load_data("hf:some/rows")
