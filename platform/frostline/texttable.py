"""Texts and labels in a table: CSV, JSON Lines or Parquet, with a text a row, or two."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from frostline.files import DataError, Place, nearest, reaching
from frostline.imagetable import checked, is_text, label_of, split_name
from frostline.samples import utf8
from frostline.spec import Data

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*SEPARATORS, *LINES, ".parquet", ".pq")
"""Of tables; those of text may be compressed, and then have .gz at their end."""

_LONGEST = 1 << 26  # characters of one field of a CSV file


@dataclass
class TextTable:
    """All of a file; the lists run over its rows, None where a row has null."""

    texts: list[tuple[bytes, ...] | None]
    """In UTF-8, as far as the file is: one, or the two of a pair."""
    labels: list[str | None]
    groups: list[str | None] | None
    """None where the job names no group column."""
    splits: list[str | None] | None
    """None where there is no column `split`."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line, `kind: detail`) for what is no row."""


def is_table(name: str) -> bool:
    """Whether a file of this name is a table of texts."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def open_texts(place: Place, spec: Data, *, labelled: bool = True) -> TextTable:
    """Unless `labelled`, labels need not be there. Raises DataError when the file is damaged, or lacks a column or has it in a type that cannot be used."""
    columns = columns_of(spec)
    if not labelled:
        columns = {key: column for key, column in columns.items() if key in ("text_column", "pair_column")}
    kind = place.name.lower().removesuffix(".gz")
    problems: list[tuple[int, str]] = []
    if kind.endswith(LINES):
        table = _columns([*_of_lines(place, problems)], place, columns)
    elif kind.endswith(tuple(SEPARATORS)):
        separator = next(sign for suffix, sign in SEPARATORS.items() if kind.endswith(suffix))
        table = _of_separated(place, separator, columns, problems)
    else:
        table = _of_parquet(place, columns, (spec.label_column, "split"))
    texts = [table[column] for key, column in columns.items() if key in ("text_column", "pair_column")]
    splits, labels = table.get("split"), table.get(spec.label_column)
    if labels is not None and spec.task == "multilabel" and kind.endswith(tuple(SEPARATORS)):
        labels = [value or "" for value in labels]  # an empty field of CSV is no label, and not an unknown one
    return TextTable(
        texts=[None if None in row else tuple(_utf8(each) for each in row) for row in zip(*texts, strict=True)],
        labels=[None] * len(texts[0]) if labels is None else [label_of(value, spec, place) for value in labels],
        groups=None
        if spec.group_column is None or not labelled
        else [_name(v, spec.group_column, place) for v in table[spec.group_column]],
        splits=None
        if splits is None
        else [split_name(_name(value, "split", place), place, strict=labelled) for value in splits],
        problems=problems,
    )


def columns_of(spec: Data) -> dict[str, str]:
    """Key of the job -> the column that it names."""
    keys = ("text_column", "pair_column", "label_column", "group_column")
    return {key: column for key in keys if (column := getattr(spec, key)) is not None}


def _of_parquet(place: Place, columns: Mapping[str, str], also: Sequence[str]) -> dict[str, list[Any]]:
    """These columns, and those of `also` that are there."""
    with reaching(place), pq.ParquetFile(place.path, filesystem=place.fs, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        _check(columns, schema.names, place)
        wanted = [*columns.values(), *(name for name in also if name in schema.names)]
        found = {}
        for column in dict.fromkeys(wanted):
            values = file.read(columns=[column]).column(0)
            if column in (columns.get("text_column"), columns.get("pair_column")):
                if not (
                    is_text(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)
                ):
                    raise DataError(f"{place.name}: column {column!r} holds {values.type}; texts are strings")
                values = values.cast(pa.large_binary())  # whose bytes nobody has to believe
            elif pa.types.is_dictionary(values.type):
                values = values.cast(values.type.value_type)
            found[column] = checked(values).to_pylist()
    return found


def _of_separated(
    place: Place, separator: str, columns: Mapping[str, str], problems: list[tuple[int, str]]
) -> dict[str, list[Any]]:
    """Of CSV as RFC 4180 has it; an empty field is null."""
    csv.field_size_limit(_LONGEST)
    found: dict[str, list[Any]] = {}
    reader = csv.reader(io.StringIO(_read(place), newline=""), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        _check(columns, names, place)
        found = {name: [] for name in names}
        for row in reader:
            if len(row) != len(names):
                if row:  # a line with nothing on it is none
                    problems.append(
                        (reader.line_num, f"not a row: {len(row)} fields, and the header names {len(names)}")
                    )
                continue
            for name, value in zip(names, row, strict=True):
                found[name].append(value or None)
    except csv.Error as error:
        raise DataError(f"cannot read {place.name}: line {reader.line_num}: {error}") from None
    return found


def _of_lines(place: Place, problems: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read(place).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append((number, f"not JSON: {error}"))
            continue
        if isinstance(row, dict):
            yield row
        else:
            problems.append((number, f"not a row: {type(row).__name__} and no object"))


def _columns(rows: Sequence[Mapping[str, Any]], place: Place, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    names = [*dict.fromkeys(name for row in rows for name in row)]
    _check(columns, names, place)
    wanted = {*columns.values(), *({"split"} & {*names})}
    return {name: [row.get(name) for row in rows] for name in wanted}


def _check(columns: Mapping[str, str], names: Sequence[str], place: Place) -> None:
    for key, column in columns.items():
        if column not in names:
            raise DataError(
                f"data.{key} = {column!r}: {place.name} has no such column{nearest(column, names)} "
                f"(columns there: {', '.join(names)})"
            )


def _read(place: Place) -> str:
    """Content of a file of text. What is not UTF-8 becomes surrogates, which no sound text holds."""
    with reaching(place), place.fs.open_input_stream(place.path, compression="detect") as stream:
        return stream.read().decode("utf-8-sig", "surrogateescape")


def _utf8(value: Any) -> bytes:
    """The bytes that a text was read from; where a value is no text, those of its JSON."""
    if isinstance(value, bytes):
        return value
    return utf8(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _name(value: Any, column: str, place: Place) -> str | None:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise DataError(
        f"{place.name}: column {column!r} holds {json.dumps(value, default=str)}; integers or strings are needed"
    )
