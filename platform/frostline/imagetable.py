"""Images and labels in a Parquet file: `struct<bytes, path>` as Hugging Face writes it, binary, or paths of image files."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from frostline.files import DataError, Place, nearest, reaching, read_bytes
from frostline.footer import null_counts
from frostline.images import BadImage
from frostline.labels import label_text
from frostline.spec import Data

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_BATCH = 32  # rows of images in memory at once


@dataclass(frozen=True)
class ImageTable:
    """All of a Parquet file but its images; the lists run over its rows, None where a row has null."""

    labels: list[str | None]
    groups: list[str | None] | None
    """None where the job names no group column."""
    splits: list[str | None] | None
    """None where there is no column `split`."""
    paths: list[str] | None
    """The image files that rows name, relative to the table's folder; None where only reading every image would tell."""


def open_table(place: Place, spec: Data, *, labelled: bool = True) -> ImageTable:
    """All but the images; where it need not be `labelled`, labels and splits are None if there are no such columns, or no such names.

    Raises DataError when the file is damaged, or lacks a column or has it in a type that cannot be used."""
    with _parquet(place) as file:
        schema = file.schema_arrow
        for key in ("image_column", "label_column", "group_column") if labelled else ("image_column",):
            column = getattr(spec, key)
            if column is not None and column not in schema.names:
                raise DataError(
                    f"data.{key} = {column!r}: {place.name} has no such column{nearest(column, schema.names)} "
                    f"(columns there: {', '.join(schema.names)})"
                )
        splits = _texts(file, "split", place) if "split" in schema.names else None
        return ImageTable(
            labels=_labels(file, spec, place)
            if labelled or spec.label_column in schema.names
            else [None] * file.metadata.num_rows,
            groups=_texts(file, spec.group_column, place) if spec.group_column and labelled else None,
            splits=[split_name(value, place, strict=labelled) for value in splits] if splits else None,
            paths=_paths(file, spec.image_column, place),
        )


def read_cells(place: Place, column: str, rows: Sequence[int]) -> Iterator[Callable[[], bytes]]:
    """For each of `rows` (rising) of a file, what gives its image's raw content or raises BadImage."""
    with _parquet(place) as file:
        first, given = 0, 0  # of a row group, and of the rows that are still to be given
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            until = bisect_left(rows, end, given)
            if given < until:
                yield from _group_cells(file, group, column, [row - first for row in rows[given:until]], place.parent)
            first, given = end, until


def _group_cells(
    file: pq.ParquetFile, group: int, column: str, rows: Sequence[int], folder: Place
) -> Iterator[Callable[[], bytes]]:
    wanted = iter(rows)
    row, start = next(wanted, None), 0
    for batch in file.iter_batches(batch_size=_BATCH, row_groups=[group], columns=[column]):
        values = checked(batch.column(0))
        while row is not None and row < start + len(values):
            yield _reader(values[row - start].as_py(), folder)
            row = next(wanted, None)
        start += len(values)
        if row is None:
            return


def _reader(value: Any, folder: Place) -> Callable[[], bytes]:
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value.get("path")
    if value is None:
        return partial(_refuse, "no image: null in this row")
    if isinstance(value, bytes):
        return lambda: value
    if not _is_below(value):
        return partial(_refuse, f"path: {value!r} is not relative to, and below, the folder of its Parquet file")
    return partial(read_bytes, folder / value)


def _refuse(reason: str) -> bytes:
    raise BadImage(reason)


def _is_below(path: str) -> bool:
    return "://" not in path and not path.startswith("/") and ".." not in PurePosixPath(path).parts


def checked(values: pa.Array | pa.ChunkedArray) -> Any:
    """The same values, strings of which are UTF-8. Raises pa.ArrowInvalid: Python would say so without the file."""
    values.validate(full=True)
    return values


def _texts(file: pq.ParquetFile, column: str, place: Place) -> list[str | None]:
    values = checked(file.read(columns=[column]).column(0))
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_integer(kind) or is_text(kind)):
        raise DataError(f"{place.name}: column {column!r} holds {kind}; integers or strings are needed")
    return [None if value is None else str(value) for value in values.to_pylist()]


def _labels(file: pq.ParquetFile, spec: Data, place: Place) -> list[str | None]:
    values = checked(file.read(columns=[spec.label_column]).column(0))
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return [label_of(value, spec, place) for value in values.to_pylist()]


def label_of(value: Any, spec: Data, place: Place) -> str | None:
    """A cell of a table's label column as text, None where it is null. Raises DataError."""
    try:
        return label_text(value, spec)
    except ValueError as error:
        raise DataError(f"{place.name}: column {spec.label_column!r} {error}") from None


def split_name(value: str | None, place: Place, *, strict: bool = True) -> str | None:
    """One of the three splits. Raises DataError for a word that names none, if `strict`."""
    if strict and value is not None and value.lower() not in SPLIT_NAMES:
        raise DataError(
            f"{place.name}: column 'split' holds {value!r}; allowed are {', '.join(SPLIT_NAMES)} "
            f"(rename the column if it means something else)"
        )
    return None if value is None else SPLIT_NAMES.get(value.lower())


def _paths(file: pq.ParquetFile, column: str, place: Place) -> list[str] | None:
    """Checks the column's type, too."""
    kind = _image_kind(file.schema_arrow.field(column).type)
    if kind is None:
        raise DataError(
            f"{place.name}: column {column!r} holds {file.schema_arrow.field(column).type}; images are "
            f"struct<bytes: binary, path: string>, binary, or strings (paths relative to the file's folder)"
        )
    if kind == "path":
        paths = checked(file.read(columns=[column]).column(0)).to_pylist()
        return [path for path in paths if path and _is_below(path)]
    return [] if kind == "bytes" or _has_all_bytes(place, f"{column}.bytes") else None


def _image_kind(kind: pa.DataType) -> Literal["bytes", "path", "struct"] | None:
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        path = fields.get("path", pa.null())  # also the type of a column of nothing but nulls
        sound = _is_binary(fields.get("bytes")) and (is_text(path) or pa.types.is_null(path))
        return "struct" if sound else None
    return "bytes" if _is_binary(kind) else "path" if is_text(kind) else None


def _is_binary(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _has_all_bytes(place: Place, leaf: str) -> bool:
    """Whether the file's statistics say that no row lacks embedded bytes."""
    return all(count == 0 for count in null_counts(place, leaf))


@contextmanager
def _parquet(place: Place) -> Iterator[pq.ParquetFile]:
    with (
        reaching(place),
        pq.ParquetFile(place.path, filesystem=place.fs, page_checksum_verification=True) as file,
    ):
        yield file
