"""A table as the bytes of a Parquet file that says when it is not what was written."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

VERSION = b"frostline_schema"
"""Key of a table's schema version in its Parquet metadata."""
PART = re.compile(r"part-(\d{6,})\.parquet")
"""The name of a part of a table, and its number."""

_SEAL_BYTES = hashlib.sha256().digest_size


class DamagedFile(RuntimeError):  # noqa: N818 (it names a state, and reads better so)
    """A committed file is not what was written; the text names it and the remedy."""


class UnknownSchema(ValueError):  # noqa: N818 (it names a state, and reads better so)
    """A table of a schema version that this Frostline does not read."""


def sealed(table: pa.Table) -> bytes:
    """A Parquet file with the SHA-256 of its bytes before the footer, where no reader looks: page checksums leave the
    footer open, and one flipped bit of a row count there drops rows silently."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=True, write_page_checksum=True)
    raw = sink.getvalue().to_pybytes()
    cut = _footer_start(raw)
    return raw[:cut] + hashlib.sha256(raw).digest() + raw[cut:]


def unsealed(path: Path, data: bytes | None) -> pq.ParquetFile:
    """The Parquet file of `data`, which lay at `path`, once its seal is verified. Raises DamagedFile."""
    if data is None:
        raise damaged(path, "is missing")
    cut = _footer_start(data)
    seal = cut - _SEAL_BYTES
    if seal < 0 or hashlib.sha256(data[:seal] + data[cut:]).digest() != data[seal:cut]:
        raise damaged(path, "is not what was written")
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def rows_of(path: Path, file: pq.ParquetFile, schema: pa.Schema) -> pa.Table:
    """All rows of a file that is of this schema. Raises UnknownSchema where it is of another, and DamagedFile."""
    found = metadata_of(file).get(VERSION, b"none").decode()
    wanted = (schema.metadata or {}).get(VERSION, b"none").decode()
    if found != wanted:
        raise UnknownSchema(
            f"{path}: written with schema {found}, and this Frostline reads schema {wanted}; use the one that wrote it"
        )
    there = file.schema_arrow
    if not there.equals(pa.schema(field for field in schema if field.name in there.names)):
        raise UnknownSchema(f"{path}: its columns are not those of schema {wanted}:\n{there.remove_metadata()}")
    try:
        rows = file.read()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    columns = [rows[each.name] if each.name in there.names else pa.nulls(len(rows), each.type) for each in schema]
    return pa.table(columns, schema=schema)  # those that came after the file are null


def metadata_of(file: pq.ParquetFile) -> dict[bytes, bytes]:
    """What was written beside the columns."""
    return file.schema_arrow.metadata or {}


def damaged(path: Path, what: str) -> DamagedFile:
    """What is to be said of a file, and what of a part can be done about it."""
    remedy = f", or move every {path.name} of the study away: the same search then runs those trials again"
    return DamagedFile(f"{path} {what}. Put it back from a copy{remedy if PART.fullmatch(path.name) else ''}")


def _unreadable(path: Path, error: Exception) -> DamagedFile:
    """Of a file with a seal that holds, which no commit of ours has written so."""
    return damaged(path, f"is no Parquet file that can be read ({' '.join(str(error).split())[:200]})")


def _footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")
