"""Tables of texts: CSV, JSON Lines and Parquet give the same samples; what is wrong with them is told row by row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frostline.data import Dataset, load_data
from frostline.files import DataError
from frostline.sources import PACKAGES, Source, open_source
from frostline.spec import Data
from frostline.testing import text_encoder, text_rows

HARD = [
    {"text": 'a "quoted", text\nof two lines', "label": "1", "who": "x"},
    {"text": "NA", "label": "02", "who": "y"},
    {"text": "  leading, and a tab\t", "label": "null", "who": "y"},
    {"text": "naïve, 漢字 🦉", "label": "1", "who": "z"},
]


def csv_of(rows: list[dict[str, Any]], sign: str = ",") -> str:
    def cell(value: Any) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    return "\n".join([sign.join(rows[0]), *(sign.join(map(cell, row.values())) for row in rows)]) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = csv_of(rows, {"csv": ",", "tsv": "\t"}[kind]) if kind != "jsonl" else "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def opened(path: Path, **keys: Any) -> Source:
    return open_source(Data.model_validate({"path": str(path), "tokenizer": "any", "max_tokens": 8} | keys))


def raws(source: Source) -> list[str]:
    return [read().decode() for read in source.read(range(len(source.names)))]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
def test_all_formats_give_the_same_samples(tmp_path: Path, name: str) -> None:
    source = opened(write(tmp_path / name, HARD), group_column="who")
    assert raws(source) == [row["text"] for row in HARD]
    assert source.names == ["1", "02", "null", "1"]
    assert source.groups == ["x", "y", "y", "z"]
    assert source.sample_ids == [f"{name}:{row}" for row in range(4)]
    assert (source.splits, source.problems) == (None, ())
    assert source.stamp is not None


def test_a_pair_is_two_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "b": "x, y"}, {"text": "c", "label": 0, "b": None}]
    source = opened(write(tmp_path / "t.jsonl", rows), pair_column="b")
    first, second = source.read([0, 1])
    assert json.loads(first()) == ["a", "x, y"]
    with pytest.raises(ValueError, match="no text: null in this row"):
        second()


def test_splits_by_column_or_by_file_name(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 2, "split": ["train", "validation", "test"][i % 3]} for i in range(6)]
    assert opened(write(tmp_path / "t.csv", rows)).splits == ["train", "val", "test"] * 2
    bare = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    (tmp_path / "named").mkdir()
    for name in ("train.csv", "test.jsonl"):
        write(tmp_path / "named" / name, bare)
    assert opened(tmp_path / "named").splits == ["test"] * 6 + ["train"] * 6
    with pytest.raises(DataError, match="column 'split' holds 'maybe'; allowed are"):
        opened(write(tmp_path / "odd.csv", [{**rows[0], "split": "maybe"}]))


def test_rows_that_lack_something_and_lines_that_are_no_row_are_listed(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\nfine,a\nno label,\ntoo,many,fields\n\nlast,b\n")
    source = opened(tmp_path / "t.csv")
    assert source.problems == (
        ("t.csv, line 4", "not a row: 3 fields, and the header names 2"),
        ("t.csv:1", "no label: null in this row"),
    )
    assert source.sample_ids == ["t.csv:0", "t.csv:2"]
    (tmp_path / "t.jsonl").write_text('{"text": "fine", "label": 1}\n{oops\n[1]\n\n{"text": "last", "label": 2}\n')
    found = opened(tmp_path / "t.jsonl").problems
    assert [what for what, _ in found] == ["t.jsonl, line 2", "t.jsonl, line 3"]
    assert found[0][1].startswith("not JSON: ")
    assert found[1][1] == "not a row: list and no object"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_column_that_is_not_there_is_told_with_its_nearest(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"body": "a", "label": 1}])
    with pytest.raises(DataError, match=r"data.text_column = 'bodies': .* has no such column; did you mean 'body'"):
        opened(path, text_column="bodies")


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'label' holds 0.5; integers or strings are needed"):
        opened(write(tmp_path / "t.jsonl", [{"text": "a", "label": 0.5}]))
    with pytest.raises(DataError, match="column 'text' holds int64; texts are strings"):
        opened(write(tmp_path / "t.parquet", [{"text": 1, "label": 1}]))
    (tmp_path / "t.csv").write_text('text,label\n"a" b,1\n')
    with pytest.raises(DataError, match=r"cannot read .*: line 2: .*"):
        opened(tmp_path / "t.csv")


def test_what_holds_images_is_refused(tmp_path: Path) -> None:
    for path in ("digits", "fashion-mnist"):
        with pytest.raises(
            DataError, match="holds images, and the backbone takes texts: name CSV, JSON Lines or Parquet"
        ):
            open_source(Data(path=path, tokenizer="any"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no table of texts .*, but 'cat/a.png'"):
        opened(tmp_path)


# --- from a table to a dataset


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "it")


def dataset(path: Path, encoder: str, **keys: Any) -> Dataset:
    return load_data(Data.model_validate({"path": str(path), "tokenizer": encoder, "max_tokens": 12} | keys), 0)


def test_texts_become_tokens_that_are_mapped_and_split(tmp_path: Path, encoder: str) -> None:
    found = dataset(write(tmp_path / "t.jsonl", text_rows()), encoder)
    assert (found.inputs.shape, found.inputs.dtype, found.size) == ((60, 12, 2), np.int32, 12)
    assert isinstance(found.inputs, np.memmap)
    assert found.classes == ("garden", "harbour", "kitchen")
    assert {name: len(found.indices(name)) for name in ("train", "val", "test")} == {"train": 42, "val": 9, "test": 9}
    longer = dataset(tmp_path / "t.jsonl", encoder, max_tokens=16)
    assert (longer.data_hash, longer.split_hash) == (found.data_hash, found.split_hash)
    assert longer.inputs_hash != found.inputs_hash
    assert (longer.inputs[:, :6, 0] == found.inputs[:, :6, 0]).mean() > 0.9


def test_bad_texts_are_listed_or_left_out_and_duplicates_never_stand_in_two_splits(
    tmp_path: Path, encoder: str
) -> None:
    rows = text_rows()
    given = [{**row, "split": ["train", "train", "val", "test"][i % 4]} for i, row in enumerate(rows)]
    given += [{"text": " ", "label": "garden", "split": "train"}, {**given[3], "split": "train"}]
    path = write(tmp_path / "t.jsonl", [*given, {"text": None, "label": "garden", "split": "train"}])
    with pytest.raises(
        DataError,
        match=r"(?s)3 problem\(s\).*no text: null.*duplicate: same content as t.jsonl:3 in test.*empty: no text",
    ):
        dataset(path, encoder)
    found = dataset(path, encoder, on_bad="exclude")
    assert dict(found.excluded) == {
        "t.jsonl:60": "empty: no text",
        "t.jsonl:61": "duplicate: same content as t.jsonl:3 in test",
        "t.jsonl:62": "no text: null in this row",
    }
    twice = write(tmp_path / "twice.csv", [*rows, *rows])
    split = dataset(twice, encoder).split
    assert (split[:60] == split[60:]).all()


def test_groups_stay_together(tmp_path: Path, encoder: str) -> None:
    rows = [{**row, "author": str(i // 2)} for i, row in enumerate(text_rows())]
    found = dataset(write(tmp_path / "t.parquet", rows), encoder, group_column="author")
    assert (found.split[::2] == found.split[1::2]).all()


def test_fortunes_are_a_class_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "fortunes", (str(tmp_path / "cookies"), "fortunes fortunes-min"))
    with pytest.raises(DataError, match=r"does not exist; `apt-get install fortunes fortunes-min` puts it there"):
        opened(Path("fortunes"))
    (tmp_path / "cookies").mkdir()
    for name, count in (("art", 500), ("few", 499), ("wit", 501)):
        texts = [f"{name} {number}\n\t-- nobody\n" for number in range(count)]
        (tmp_path / "cookies" / name).write_text("%\n".join(texts) + "%\n")
        (tmp_path / "cookies" / f"{name}.dat").write_bytes(b"")
    source = opened(Path("fortunes"))
    assert [source.names.count(name) for name in ("art", "few", "wit")] == [500, 0, 501]
    assert raws(source)[0] == "art 0\n\t-- nobody"
    with pytest.raises(DataError, match="cookies holds texts; the backbone takes images: for texts name an encoder"):
        open_source(Data(path="fortunes"))
