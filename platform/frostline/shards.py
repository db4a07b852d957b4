"""The files of the feature store: a shard is the rows of some samples, to be mapped, and a manifest that vouches for them.

    <name>-<sha256>.rows    (n, *shape) float16 or float32, little endian, C order
    <name>.json             written last; <name> stands for the sample numbers

Rows are named after their content, so that of two writers of one shard, which need not have computed the same bits,
neither can put its manifest over the other's rows.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import numpy as np

from frostline.files import DataError, Place, reaching, sync_folder

FORMAT = 1
"""Of manifests and rows; part of every key."""
MANIFEST = re.compile(r"([0-9a-f]{16})\.json")
ROWS = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.rows")

TEMP = re.compile(rf"\.tmp-({MANIFEST.pattern}|{ROWS.pattern})-[0-9a-f]{{12}}")

_REMEDIES = {
    "<f2": 'float16 ends at 65504; set features.dtype = "float32"',
    "<f8": "the backbone's weights or the images are at fault, and nothing was stored",
    "<f4": "the backbone's weights or the images are at fault, and nothing was stored",
}
_PIECE_BYTES = 1 << 23
_MAP_FIXED = 0x10
_map = ctypes.CDLL(None, use_errno=True).mmap
_map.restype = ctypes.c_void_p
_map.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


class FeatureError(ValueError):
    """Activations cannot be stored or read. The message says which, where, and what to do."""


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """The activations of one entry, mapped read-only."""

    samples: np.ndarray
    """(n,) int64, ascending: the samples that have a row."""
    shape: tuple[int, ...]
    """Of one row."""
    dtype: np.dtype
    _table: np.ndarray
    """(slots, *shape): all shards in one stretch of addresses, with gaps between them."""
    _slots: np.ndarray
    """Sample - samples[0] + 1 -> its slot in the table, or -1. Both ends are -1, and stand for all that lies beyond."""

    @property
    def nbytes(self) -> int:
        return len(self.samples) * math.prod(self.shape) * self.dtype.itemsize

    def gather(self, samples: np.ndarray) -> np.ndarray:
        """The rows of `samples`, in their order: a fresh (len(samples), *shape) array in the stored dtype.

        Raises FeatureError, naming the first sample that has no row.
        """
        slots = self._slots.take(samples - (self.samples[0] - 1), mode="clip")
        if len(slots) and slots.min() < 0:
            lacking = samples[slots < 0]
            raise FeatureError(
                f"sample {lacking[0]}, and {len(lacking) - 1} other(s) of the {len(slots)} asked for, have no stored "
                f"activations: extract what `missing` lists, then open the entry again"
            )
        return self._table.take(slots, axis=0, mode="clip")


@final
@dataclass(frozen=True, eq=False)
class Shard:
    """What a manifest says."""

    about: Mapping[str, Any]
    """All that could change the activations."""
    dtype: str
    """`<f2` or `<f4`."""
    shape: tuple[int, ...]
    """Of one row."""
    samples: np.ndarray
    """(n,) int64, ascending."""
    rows_sha256: str

    @property
    def name(self) -> str:
        return hashlib.sha256(self.samples.astype("<i8").tobytes()).hexdigest()[:16]

    @property
    def manifest(self) -> str:
        return f"{self.name}.json"

    @property
    def file(self) -> str:
        return f"{self.name}-{self.rows_sha256[:16]}.rows"

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return len(self.samples) * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def encoded(self) -> bytes:
        """The manifest: JSON that holds the SHA-256 of its own other content."""
        samples = base64.b64encode(self.samples.astype("<i8").tobytes()).decode()
        content = {"format": FORMAT, **vars(self), "samples": samples}
        sealed = content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
        return json.dumps(sealed, sort_keys=True).encode()


def shard_of(about: Mapping[str, Any], samples: np.ndarray, rows: np.ndarray) -> tuple[Shard, memoryview]:
    """The shard of `rows` (n, *shape), float32 or float16, of `samples` (n,), ascending; and the bytes of its rows.

    Raises FeatureError when they are not finite.
    """
    assert len(samples) == len(rows) > 0, (samples.shape, rows.shape)
    assert (np.diff(samples, prepend=-1) > 0).all(), "sample numbers ascend from 0"
    rows = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    assert rows.dtype.str in _REMEDIES, rows.dtype
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise FeatureError(
            f"activations of sample {samples[~finite][0]}, and of {np.sum(~finite) - 1} other(s) of {len(rows)}, are not "
            f"finite in {rows.dtype.name}: {_REMEDIES[rows.dtype.str]}"
        )
    raw = rows.reshape(-1).view(np.uint8).data
    plain = json.loads(json.dumps(about))  # as it will be read
    return Shard(plain, rows.dtype.str, rows.shape[1:], samples, hashlib.sha256(raw).hexdigest()), raw


def decoded(manifest: bytes) -> Shard | None:
    """The shard that a manifest describes; None when it is not, to the last bit, what was written."""
    try:
        content = json.loads(manifest)
        samples = np.frombuffer(base64.b64decode(content["samples"]), "<i8")
        shard = Shard(content["about"], content["dtype"], tuple(content["shape"]), samples, content["rows_sha256"])
        return shard if shard.encoded() == manifest and _can_be(shard) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _can_be(shard: Shard) -> bool:
    """Whether `shard_of` could have made it: whoever writes a manifest can seal it, too."""
    rises = len(shard.samples) > 0 and (np.diff(shard.samples, prepend=-1) > 0).all()
    return bool(rises) and shard.dtype in _REMEDIES and all(type(size) is int and size > 0 for size in shard.shape)


def shard_name(file: str) -> str | None:
    """The name of the shard that a file belongs to."""
    match = MANIFEST.fullmatch(file) or ROWS.fullmatch(file)
    return match and match[1]


def samples_of(shards: Iterable[Shard]) -> np.ndarray:
    """(n,) int64, ascending: the samples that have a row in any of them."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(shard.samples for shard in shards)]))


def mapped(folder: Path, shards: Sequence[Shard]) -> Rows:
    """Map intact shards of one shape and dtype; the first that has a sample serves it. Raises OSError.

    They become one table, each mapped where both a page and a row of it begin, so that a gather costs what it costs from
    one file, however many there are.
    """
    dtype, shape = np.dtype(shards[0].dtype), shards[0].shape
    row_bytes = dtype.itemsize * math.prod(shape)
    step = math.lcm(row_bytes, mmap.ALLOCATIONGRANULARITY)
    *starts, end = accumulate((-(-shard.size // step) * step for shard in shards), initial=0)
    region = mmap.mmap(-1, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
    table = np.frombuffer(region, dtype).reshape(-1, *shape)  # keeps the region, and with it what is mapped over it
    samples = samples_of(shards)
    try:
        slots = np.full(samples[-1] - samples[0] + 3, -1, np.intp)
    except (MemoryError, ValueError):
        raise FeatureError(
            f"{folder}: memory does not hold a table up to sample {samples[-1]}; is it damaged?"
        ) from None
    for shard, start in reversed(list(zip(shards, starts, strict=True))):
        assert (shard.dtype, shard.shape) == (shards[0].dtype, shape), f"{folder} holds several kinds of rows"
        address = table.ctypes.data + start
        with (folder / shard.file).open("rb") as file:
            if _map(address, shard.size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file.fileno(), 0) != address:
                raise OSError(ctypes.get_errno(), f"{shard.file} cannot be mapped")
        slots[shard.samples - (samples[0] - 1)] = start // row_bytes + np.arange(len(shard.samples))
    return Rows(samples, shape, dtype, table, slots)


def read(place: Place) -> bytes | None:
    """All of a file; None when it is not there."""
    with (
        using(place),
        contextlib.suppress(FileNotFoundError),
        place.fs.open_input_stream(place.path, compression=None) as stream,
    ):
        return stream.read()


def sha256_of(place: Place) -> str | None:
    """The SHA-256 of a file, in hex; None when it is not there."""
    total = hashlib.sha256()
    with using(place), contextlib.suppress(FileNotFoundError):
        for piece in _pieces(place):
            total.update(piece)
        return total.hexdigest()


def fetched(place: Place, sha256: str) -> Iterator[bytes]:
    """All of a file, piece by piece. Raises FeatureError after the last when it is not what was written."""
    total = hashlib.sha256()
    with using(place):
        for piece in _pieces(place):
            total.update(piece)
            yield piece
    if total.hexdigest() != sha256:
        raise FeatureError(
            f"{place.name} is damaged: its SHA-256 is not the manifest's. Start the search again: it first repairs what it "
            "reads (`frostline features verify` lists all damage)"
        )


def upload(place: Place, content: Iterable[bytes | memoryview]) -> None:
    """Write an object; it is there when all of it is. Raises OSError."""
    with place.fs.open_output_stream(place.path, compression=None) as stream:
        for piece in content:
            stream.write(piece)


def write(path: Path, content: Iterable[bytes | memoryview], put: Callable[[Path, Path], object]) -> None:
    """Write a local file that is complete and on disk before `put`, os.replace or os.link, gives it its name. Raises
    OSError."""
    temp = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with temp.open("xb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        put(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def locked(path: Path, how: int) -> Iterator[int | None]:
    """Hold a lock file, made with its folder where it is missing, and give its descriptor: None where another holds it and
    `how` does not wait. The kernel frees it when this process dies, however it dies."""
    with contextlib.ExitStack() as held:
        while True:
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir()
            with contextlib.suppress(FileNotFoundError):  # the folder was removed by one who held it alone
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
                held.callback(os.close, fd)
                try:
                    fcntl.flock(fd, how)
                except BlockingIOError:
                    fd = None
                    break
                if os.path.samestat(os.fstat(fd), path.stat()):
                    break
            held.close()
        yield fd


@contextmanager
def using(place: Place) -> Iterator[None]:
    """Around whatever touches the storage: its failures become FeatureErrors without credentials."""
    try:
        with reaching(place):
            yield
    except DataError as error:
        raise FeatureError(
            f"the feature store {place.name} cannot be used: {str(error).removeprefix(f'cannot read {place.name}: ')}; "
            f"free space there, or name another place (features.path, or FROSTLINE_CACHE for copies of what is at a URI)"
        ) from None


def _pieces(place: Place) -> Iterator[bytes]:
    with place.fs.open_input_stream(place.path, compression=None) as stream:
        while piece := stream.read(_PIECE_BYTES):
            yield piece
