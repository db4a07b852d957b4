"""The feature store: activations under a key of all that could change them, kept for every trial of every study.

    ROOT/<key>/        an entry: its shards, as `shards` describes them; a file never changes once it has its name
    ROOT/<key>/used    its time says when the entry was last used, a lock on it that somebody uses it

ROOT is a local folder, or any URI that pyarrow writes. What lies at a URI is copied, once, to each node that reads it:
into a mirror, which is a local store itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem

from frostline.cache import cache_root
from frostline.files import Place, locate
from frostline.models import digest
from frostline.shards import (
    FORMAT,
    MANIFEST,
    ROWS,
    TEMP,
    FeatureError,
    Rows,
    Shard,
    decoded,
    fetched,
    locked,
    mapped,
    read,
    samples_of,
    sha256_of,
    shard_name,
    shard_of,
    upload,
    using,
    write,
)

_KEY = re.compile(r"[0-9a-f]{16,64}")
_USED, _FETCH = "used", "fetch"  # files that are locked
_TOUCHED_S = 60.0  # the times of use are no finer than this
_URI_HOLD_S = 86_400.0
_CONNECTIONS = 8  # to an object store at a time
_KEPT = 16  # entries that a process keeps mapped

_opened: dict[str, tuple[dict[str, tuple[int, int]], Rows]] = {}
_located = lru_cache(locate)


@dataclass(frozen=True)
class Entry:
    """What is stored under one key."""

    key: str
    about: Mapping[str, Any] | None
    """What the key stands for; None where no shard looks intact."""
    samples: int
    """How many have a row."""
    bytes: int
    shards: int
    """Those that look intact."""
    used_s: float
    """When it was last used, Unix time."""


def key_of(about: Mapping[str, Any]) -> str:
    """The key of the entry for `about`: JSON values that say everything that could change the activations."""
    return digest([FORMAT, about])


@final
@dataclass(frozen=True)
class Store:
    """A store at `root`, a folder or a URI. Cheap to make and to pickle; nothing is touched before it is used.

    All methods raise FeatureError where the storage fails. A shard looks intact when its manifest is, and its rows are
    there and of the right size; only `verify` and `repair`, and what fetches from a URI, read the rows.
    """

    root: str | Path = field(repr=False)  # a URI may hold credentials
    mirror: Path | None = None
    """Where this node keeps its copy of what lies at a URI; in its cache when not given."""

    def __post_init__(self) -> None:
        root = str(self.root)
        object.__setattr__(self, "root", root if "://" in root else str(Path(root).expanduser().absolute()))

    def missing(self, key: str, samples: np.ndarray) -> np.ndarray:
        """Those of `samples` that no intact-looking shard has."""
        shards, _ = self._shards(key, self._files(key))
        return samples[~np.isin(samples, samples_of(shards.values()))]

    def put(self, key: str, about: Mapping[str, Any], samples: np.ndarray, rows: np.ndarray) -> bool:
        """Publish one shard: `rows` (n, *shape), float32 or float16, of `samples` (n,), ascending. It is there completely
        or not at all. False when one that looks intact was there already, or came first.

        Raises FeatureError also when rows are not finite.
        """
        assert key == key_of(about), (key, about)
        shard, raw = shard_of(about, samples, rows)
        with self._shared(key):
            return self._publish(key, shard, [raw])

    def open(self, key: str) -> Rows:
        """Map what is stored under `key`, in one process once for as long as it stays the same.

        What lies at a URI is fetched and checked first, by one process of the node while others wait. Where shards
        overlap, the first by name serves a sample. Raises FeatureError also when nothing is stored.
        """
        place, files = self._entry(key), self._files(key)
        if not any(map(MANIFEST.fullmatch, files)):
            raise FeatureError(f"{place.name} holds no activations: extract them first")
        if _USED not in files or time.time() - files[_USED].mtime_ns / 1e9 > _TOUCHED_S:
            self._touch(key)
        if self._copy is not None:
            with self._copy._shared(key):
                self._fetch(key, files, self._copy)
                return self._copy.open(key)
        stamps = {name: (info.size, info.mtime_ns) for name, info in files.items() if shard_name(name)}
        known, rows = _opened.pop(place.path, (None, None))
        if rows is None or known != stamps:
            shards, _ = self._shards(key, files)
            if not shards:
                raise FeatureError(f"{place.name} holds no intact activations: extract them again")
            with using(place):
                try:
                    rows = mapped(Path(place.path), [shards[name] for name in sorted(shards)])
                except FileNotFoundError:  # removed since it was listed
                    return self.open(key)
        while len(_opened) >= _KEPT:
            _opened.pop(next(iter(_opened)), None)
        _opened[place.path] = stamps, rows
        return rows

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep entries, there already or not, from `evict` and `clean` in any process until the block or this process ends,
        however it ends. Object stores have no locks: there an entry is kept for a day after it was last held, opened or
        written to."""
        with contextlib.ExitStack() as held:
            for key in keys:
                held.enter_context((self._copy or self)._shared(key))
                self._touch(key)
            yield

    def verify(self, key: str) -> list[str]:
        """What is damaged, one line a shard, in the mirror too; every byte is read."""
        return [*self._damaged(key).values(), *(self._copy.verify(key) if self._copy else ())]

    def repair(self, key: str) -> list[str]:
        """Remove the shards that `verify` finds damaged, so that their samples are `missing` again; returns its lines."""
        damaged = self._damaged(key)
        self._remove(key, [name for name in self._files(key) if shard_name(name) in damaged])
        return [*damaged.values(), *(self._copy.repair(key) if self._copy else ())]

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        root = _located(str(self.root))
        with using(root):
            found = root.fs.get_file_info(FileSelector(root.path, allow_not_found=True))
        keys = [info.base_name for info in found if info.type == FileType.Directory and _KEY.fullmatch(info.base_name)]
        return sorted(filter(None, map(self._described, keys)), key=lambda entry: entry.used_s)

    def evict(self, budget_bytes: int, keep: Collection[str] = ()) -> list[Entry]:
        """Remove the least recently used entries, none of `keep` and none that is held, until the rest is within the budget
        or nothing more can go; in the mirror too. Returns what was removed at the root."""
        if self._copy is not None:
            self._copy.evict(budget_bytes, keep)
        entries, removed = self.entries(), []
        excess = sum(entry.bytes for entry in entries) - budget_bytes
        for entry in entries:
            if excess > 0 and entry.key not in keep:
                with self._alone(entry.key) as alone:
                    if alone:
                        self._remove(entry.key, self._files(entry.key))
                        removed.append(entry)
                        excess -= entry.bytes
        return removed

    def clean(self, unused_days: float = 0.0) -> list[Entry]:
        """Remove the entries not used for this long, and what dead writers left in the others, but nothing that is held;
        in the mirror too. Returns the entries that were removed at the root."""
        if self._copy is not None:
            self._copy.clean(unused_days)
        removed = []
        for entry in self.entries():
            with self._alone(entry.key) as alone:
                files = self._files(entry.key)
                if alone and time.time() - entry.used_s >= unused_days * 86_400:
                    self._remove(entry.key, files)
                    removed.append(entry)
                elif alone:
                    serving = {shard.file for shard in self._shards(entry.key, files)[0].values()}
                    written = {name for name in files if TEMP.fullmatch(name) or ROWS.fullmatch(name)}
                    self._remove(entry.key, written - serving)
        return removed

    @property
    def _copy(self) -> Store | None:
        """The mirror; None where the root is local."""
        root = _located(str(self.root))
        if isinstance(root.fs, LocalFileSystem):
            return None
        return Store(self.mirror or cache_root() / "features" / digest(root.name))

    def _entry(self, key: str) -> Place:
        if not _KEY.fullmatch(key):
            raise FeatureError(f"{key!r} is no key of stored activations: those are 16 to 64 hex digits")
        return _located(str(self.root)) / key

    def _files(self, key: str) -> dict[str, FileInfo]:
        """The files of an entry that are ours, by name."""
        place = self._entry(key)
        with using(place):
            if self._copy is None and Path(place.path).is_symlink():
                return {}  # what it leads to is not ours
            found = place.fs.get_file_info(FileSelector(place.path, allow_not_found=True))
        return {info.base_name: info for info in found if info.type == FileType.File and _is_ours(info.base_name)}

    def _shards(self, key: str, files: Mapping[str, FileInfo]) -> tuple[dict[str, Shard], dict[str, str]]:
        """By name, the shards that look intact, and what is wrong with the others."""
        place = self._entry(key)
        names = [name for name in files if MANIFEST.fullmatch(name)]
        with ThreadPoolExecutor(_CONNECTIONS) if self._copy else contextlib.nullcontext() as pool:
            manifests = list((pool.map if pool else map)(lambda name: read(place / name), names))
        shards, problems = {}, {}
        for name, manifest in zip(names, manifests, strict=True):
            if manifest is None:  # removed since it was listed
                continue
            shard = decoded(manifest)
            if shard is None or shard.manifest != name or key_of(shard.about) != key:
                problems[name[:16]] = f"{place.name}/{name}: is not what was written"
            elif shard.file not in files:
                problems[shard.name] = f"{place.name}/{shard.file}: is missing"
            elif files[shard.file].size != shard.size:
                problems[shard.name] = f"{place.name}/{shard.file}: {files[shard.file].size} bytes, not {shard.size}"
            else:
                shards[shard.name] = shard
        return shards, problems

    def _damaged(self, key: str) -> dict[str, str]:
        place = self._entry(key)
        shards, problems = self._shards(key, self._files(key))
        for name, shard in shards.items():
            if sha256_of(place / shard.file) not in (shard.rows_sha256, None):  # None: removed since it was listed
                problems[name] = f"{place.name}/{shard.file}: its SHA-256 is not the manifest's"
        return problems

    def _described(self, key: str) -> Entry | None:
        files = self._files(key)
        if not files:
            return None
        shards, _ = self._shards(key, files)
        about = next((shard.about for shard in shards.values()), None)
        used_s = max(files.get(_USED, info).mtime_ns for info in files.values()) / 1e9
        size = sum(info.size for info in files.values())
        return Entry(key, about, len(samples_of(shards.values())), size, len(shards), used_s)

    def _publish(self, key: str, shard: Shard, rows: Iterable[bytes | memoryview]) -> bool:
        """Write the rows, then the manifest, unless the shard is there and looks intact. The entry is shared meanwhile."""
        place = self._entry(key)
        there = {name: info for name, info in self._files(key).items() if shard_name(name) == shard.name}
        intact, damaged = self._shards(key, there)
        if intact:
            return False
        if damaged:
            self._remove(key, there)
        with using(place):
            if self._copy is not None:  # a put is atomic, and a manifest that replaces another's brings its own rows
                upload(place / shard.file, rows)
                upload(place / shard.manifest, [shard.encoded()])
                return True
            folder = Path(place.path)
            write(folder / shard.file, rows, os.replace)
            try:
                write(folder / shard.manifest, [shard.encoded()], os.link)
            except FileExistsError:
                first = decoded(read(place / shard.manifest) or b"")
                if first is not None and first.file != shard.file:
                    (folder / shard.file).unlink(missing_ok=True)
                return False
        return True

    def _fetch(self, key: str, files: Mapping[str, FileInfo], mirror: Store) -> None:
        """Copy to the mirror what it lacks of the shards at the URI, checking every byte. It is shared meanwhile."""
        place, copy = self._entry(key), mirror._entry(key)
        whole = {shard_name(name) for name in files if MANIFEST.fullmatch(name)}
        here = mirror._files(key)
        if all(name in here and here[name].size == files[name].size for name in files if shard_name(name) in whole):
            return

        def fetch(shard: Shard) -> None:
            mirror._publish(key, shard, fetched(place / shard.file, shard.rows_sha256))

        with using(copy), locked(Path(copy.path, _FETCH), fcntl.LOCK_EX):
            shards, _ = self._shards(key, files)
            if not shards:
                raise FeatureError(f"{place.name} holds no intact activations: extract them again")
            have, _ = mirror._shards(key, mirror._files(key))
            new = [shard for name, shard in shards.items() if name not in have or have[name].file != shard.file]
            mirror._remove(key, [name for shard in new for name in here if shard_name(name) == shard.name])
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                list(pool.map(fetch, new))

    def _remove(self, key: str, names: Collection[str]) -> None:
        """Remove files of an entry, manifests first and the lock last, and its folder when that is all there was."""
        place = self._entry(key)
        with using(place):
            if self._copy is not None:
                inside = place.fs.get_file_info(FileSelector(place.path, allow_not_found=True))
                if inside and {info.base_name for info in inside} == set(names):
                    place.fs.delete_dir(place.path)
                    return
            for name in sorted(names, key=lambda name: (name == _USED, not MANIFEST.fullmatch(name))):
                with contextlib.suppress(FileNotFoundError):
                    place.fs.delete_file(f"{place.path}/{name}")
            if self._copy is None:
                with contextlib.suppress(OSError):
                    Path(place.path).rmdir()

    def _touch(self, key: str) -> None:
        used = self._entry(key) / _USED
        with contextlib.suppress(OSError):  # who may only read a store may read it all the same
            if self._copy is not None:
                upload(used, [])
                return
            with locked(Path(used.path), fcntl.LOCK_SH | fcntl.LOCK_NB) as fd:
                if fd is not None:
                    os.utime(fd)

    @contextmanager
    def _shared(self, key: str) -> Iterator[None]:
        """Around what writes to an entry or needs it to stay. At a URI the times of its files stand for that."""
        place = self._entry(key)
        with contextlib.ExitStack() as held:
            if self._copy is None:
                if Path(place.path).is_symlink():
                    raise FeatureError(f"{place.name} is a symbolic link, which Frostline does not make: move it away")
                with using(place):
                    fd = held.enter_context(locked(Path(place.path, _USED), fcntl.LOCK_SH))
                    assert fd is not None
                    os.utime(fd)
            yield

    @contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Whether nobody else uses an entry, nor begins to in the block."""
        place = self._entry(key)
        with contextlib.ExitStack() as held:
            if self._copy is None:
                with using(place):
                    fd = held.enter_context(locked(Path(place.path, _USED), fcntl.LOCK_EX | fcntl.LOCK_NB))
                yield fd is not None
            else:
                newest_ns = max((info.mtime_ns for info in self._files(key).values()), default=0)
                yield time.time() - newest_ns / 1e9 > _URI_HOLD_S


def _is_ours(name: str) -> bool:
    return name in (_USED, _FETCH) or bool(shard_name(name) or TEMP.fullmatch(name))
