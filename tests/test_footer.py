"""Nulls in a Parquet file's row groups, as pyarrow says of a sound file; of a damaged one an error, and not the end of the process."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frostline.files import DataError, locate
from frostline.footer import null_counts


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """20 groups of rows: more than a list's short header counts; some values are null, and one column has no statistics."""
    rows = [
        {"image": {"bytes": None if n % 7 == 0 else b"x", "path": "ü"}, "label": str(n), "n": n / 3} for n in range(60)
    ]
    path = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, write_statistics=["image.bytes", "n"])
    return path


def test_they_are_those_that_pyarrow_says(table: Path) -> None:
    place, metadata = locate(str(table)), pq.read_metadata(table)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    assert len(groups) == 20
    for number, column in enumerate(metadata.row_group(0).column(each).path_in_schema for each in range(4)):
        said = [group.column(number).statistics for group in groups]
        assert null_counts(place, column) == [each and each.null_count for each in said]
    assert {*null_counts(place, "image.bytes")} == {0, 1}
    assert {*null_counts(place, "label")} == {None}


def test_a_damaged_footer_is_refused_or_read(table: Path) -> None:
    whole, said = table.read_bytes(), []
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for number in range(300):
        rng, hurt = random.Random(number), bytearray(whole)
        hurt[rng.randrange(start, len(whole))] ^= 1 << rng.randrange(8)
        table.write_bytes(hurt if number % 3 else hurt[: rng.randrange(len(hurt))])
        try:
            null_counts(locate(str(table)), "image.bytes")
        except DataError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all("table.parquet" in line for line in said)
