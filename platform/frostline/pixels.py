"""Content hashes and the rows of a dataset (decoded pixels, tokenised texts), worked out once per node: files in a cache folder
that every process maps.

Each is an entry of `cache`: the first process that asks builds it while others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from frostline.cache import entry, publish
from frostline.files import DataError
from frostline.models import digest
from frostline.samples import BadSample
from frostline.sources import Reader, Source

Item = TypeVar("Item")
Result = TypeVar("Result")

BYTES = np.dtype(np.uint8)

_CHUNK = 16  # samples that a thread is handed at a time
_SETTLED_NS = 2_000_000_000  # a file changed this recently may change again and keep its stamp


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the raw content of a sample becomes its row."""

    name: str
    """Of what the rows are: "pixels" or "tokens"."""
    key: list[Any]
    """Everything besides the content that could change a row, as JSON values."""
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[bytes], np.ndarray]
    """Raw content to a row of this shape and type, in any thread. Raises BadSample."""


@dataclass(frozen=True, eq=False)
class Rows:
    rows: np.ndarray | None
    """(N, *shape), mapped read-only: the readable ones of the samples asked for, in their order; None where they are not kept."""
    bad: dict[int, str]
    """Position among the samples asked for -> why it has no row."""
    key: str
    """16 hex digits over everything that could change the rows."""


def content_hashes(source: Source) -> tuple[np.ndarray, dict[int, str]]:
    """The SHA-256 of every sample's raw content, (N, 32) uint8, and for those that cannot be read (zeros) why.

    Kept under the source's stamp, so that unchanged files are not read again. Raises DataError when the storage of the
    data or of the cache fails.
    """
    if source.stamp is None:
        return _hash(source)
    with entry("hashes", source.stamp) as (folder, lock):
        path = folder / "sha256.npy"
        shape = (len(source.sample_ids), 32)
        known = _mapped(path, shape)
        if known is not None:
            return known, {}
        with lock():
            known = _mapped(path, shape)
            if known is not None:
                return known, {}
            started_ns = time.time_ns()
            hashes, bad = _hash(source)
            if not bad and source.changed_ns < started_ns - _SETTLED_NS:
                publish(path, lambda file: np.save(file, hashes))
            return hashes, bad


def load_rows(
    source: Source,
    indices: np.ndarray,
    hashes: np.ndarray,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
    *,
    keep: bool = True,
) -> Rows:
    """The rows of the samples `indices` (sorted) of `source`, whose content hashes to `hashes`, (N, 32) for all its samples.

    Made in threads by the first process that asks, `progress(done, total)` being called in the caller's thread. Unless they are to be
    kept, all are made once, to know which cannot be.
    Raises DataError when a sample's content is not what was hashed, or the storage of the data or of the cache fails.
    """
    contents = hashlib.sha256(hashes[indices].tobytes()).hexdigest()
    key = digest([contents, *recipe.key])
    with entry(recipe.name, key) as (folder, lock):
        found = _opened(folder, key, len(indices), recipe, keep)
        if found is None:
            with lock():
                found = _opened(folder, key, len(indices), recipe, keep)
                if found is None:
                    made = _made(source, indices, hashes, recipe, progress)
                    bad = _build(folder, len(indices), recipe, made) if keep else _bad(made)
                    publish(folder / "bad.json", lambda file: file.write(json.dumps(list(bad.items())).encode()))
                    found = _opened(folder, key, len(indices), recipe, keep)
                    assert found is not None, folder
        return found


def _hash(source: Source) -> tuple[np.ndarray, dict[int, str]]:
    hashes = np.zeros((len(source.sample_ids), 32), np.uint8)
    bad = {}
    for i, outcome in enumerate(in_threads(_sha256, source.read(range(len(hashes))))):
        if isinstance(outcome, BadSample):
            bad[i] = str(outcome)
        else:
            hashes[i] = np.frombuffer(outcome, np.uint8)
    return hashes, bad


def _sha256(read: Reader) -> bytes | BadSample:
    try:
        raw = read()
    except BadSample as error:
        return error
    return hashlib.sha256(raw).digest()


def _to_row(item: tuple[Reader, bytes], make: Callable[[bytes], np.ndarray]) -> np.ndarray | BadSample | None:
    """A row, why there is none, or None when the content is no longer what was hashed."""
    read, expected = item
    try:
        raw = read()
        if hashlib.sha256(raw).digest() != expected:
            return None
        return make(raw)
    except BadSample as error:
        return error


def _made(
    source: Source,
    indices: np.ndarray,
    hashes: np.ndarray,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None,
) -> Iterator[np.ndarray | BadSample]:
    """The row of each sample, or why there is none."""
    expected = (hashes[i].tobytes() for i in indices)
    items = zip(source.read(indices.tolist()), expected, strict=True)
    for position, row in enumerate(in_threads(partial(_to_row, make=recipe.make), items)):
        if row is None:
            raise DataError(
                f"{source.name}: {source.sample_ids[indices[position]]} changed while it was being read; "
                f"start again once the data is at rest"
            )
        yield row
        if progress is not None:
            progress(position + 1, len(indices))


def _bad(made: Iterable[np.ndarray | BadSample]) -> dict[int, str]:
    return {position: str(row) for position, row in enumerate(made) if isinstance(row, BadSample)}


def _build(folder: Path, total: int, recipe: Recipe, made: Iterable[np.ndarray | BadSample]) -> dict[int, str]:
    """Keep the rows; answers those that there are none of."""
    bad: dict[int, str] = {}

    def fill(file: BinaryIO) -> None:
        header = partial(np.lib.format.write_array_header_1_0, file)
        described = {"descr": np.lib.format.dtype_to_descr(recipe.dtype), "fortran_order": False}
        header({**described, "shape": (total, *recipe.shape)})
        start = file.tell()
        for position, row in enumerate(made):
            if isinstance(row, BadSample):
                bad[position] = str(row)
            else:
                assert (row.shape, row.dtype) == (recipe.shape, recipe.dtype), (row.shape, row.dtype)
                file.write(row.tobytes())
        if bad:  # NumPy pads headers so that the first dimension can be written anew
            file.seek(0)
            header({**described, "shape": (total - len(bad), *recipe.shape)})
            assert file.tell() == start

    publish(folder / f"{recipe.name}.npy", fill)
    return bad


def _opened(folder: Path, key: str, total: int, recipe: Recipe, keep: bool) -> Rows | None:
    """What was published, or None when that is nothing, or not of the right shape and length."""
    try:
        bad = {int(position): str(reason) for position, reason in json.loads((folder / "bad.json").read_text())}
    except (FileNotFoundError, ValueError, TypeError):
        return None
    rows = _mapped(folder / f"{recipe.name}.npy", (total - len(bad), *recipe.shape), recipe.dtype)
    return None if rows is None and keep else Rows(rows, bad, key)


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype = BYTES) -> np.ndarray | None:
    size = dtype.itemsize * int(np.prod(shape))
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            header = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        if header != (shape, False, dtype) or path.stat().st_size != start + size:
            return None
    except (FileNotFoundError, ValueError):
        return None
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """`map` over threads, in order, that takes from `items` only a little ahead of what was given out."""

    def work_on(chunk: Sequence[Item]) -> list[Result]:
        return [work(item) for item in chunk]

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        chunk: list[Item] = []
        for item in items:
            chunk.append(item)
            if len(chunk) == _CHUNK:
                pending.append(pool.submit(work_on, chunk))
                chunk = []
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        pending.append(pool.submit(work_on, chunk))
        while pending:
            yield from pending.popleft().result()
