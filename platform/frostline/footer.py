"""What a Parquet file's footer says of nulls. pyarrow 26 ends the process where it is asked for the metadata of a damaged column: no
error of that becomes an exception."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa

from frostline.files import DataError, Place, reaching

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)


def null_counts(place: Place, column: str) -> list[int | None]:
    """How many values of a column, named by its dotted path, are null in each row group; None where nothing says so.

    Raises DataError where the footer is damaged."""
    with reaching(place), place.fs.open_input_file(place.path) as file:
        footer = _footer(file)
    try:
        # the numbers are those of parquet.thrift: row groups; their columns, each with metadata; its path, and statistics with the nulls
        groups = [[each[3] for each in group[1]] for group in _struct(io.BytesIO(footer))[4]]
        found = [{b".".join(each[3]).decode(): each.get(12, {}).get(3) for each in columns} for columns in groups]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read {place.name}: its footer is damaged ({error!r})") from None
    return [nulls.get(column) for nulls in found]


def _footer(file: pa.NativeFile) -> bytes:
    size = file.size()
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(8)[:4], "little")
    file.seek(max(0, size - 8 - length))
    return file.read(min(length, size))


def _struct(stream: io.BytesIO) -> dict[int, Any]:
    """Fields by number, in Thrift's compact protocol."""
    found, number = {}, 0
    while header := stream.read(1)[0]:
        step, kind = header >> 4, header & 15
        number = number + step if step else _integer(stream)
        found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else _value(stream, kind)
    return found


def _value(stream: io.BytesIO, kind: int) -> Any:
    if kind in (_TRUE, _FALSE, _BYTE):  # a truth in a list is a byte, too
        return stream.read(1)[0]
    if kind in _INTEGERS:
        return _integer(stream)
    if kind == _DOUBLE:
        return stream.read(8)
    if kind == _BINARY:
        return stream.read(_varint(stream))
    if kind in (_LIST, _SET):
        header = stream.read(1)[0]
        size = header >> 4 if header >> 4 < 15 else _varint(stream)
        return [_value(stream, header & 15) for _ in range(size)]
    if kind == _STRUCT:
        return _struct(stream)
    raise ValueError(f"type {kind}, which no footer has")


def _integer(stream: io.BytesIO) -> int:
    raw = _varint(stream)
    return (raw >> 1) ^ -(raw & 1)


def _varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
