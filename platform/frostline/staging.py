"""Files that a job names and that lie beside its driver (weights, encoders), brought once to each node that lacks them.

A node that has a file under the driver's own path, with the same content, uses it there: storage that all of them see is not
copied. Else it gets it into its cache, one process reading while others wait. Whoever loads asks `place_of`, and no hub.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from frostline.cache import entry, publish
from frostline.files import DataError
from frostline.models import digest

Read = Callable[[str, int], bytes | memoryview]
"""Takes a file and an offset, and answers bytes of it from there on: none at its end."""

_PLACES: dict[str, Path] = {}  # of this process, by the job's name for it


@dataclass(frozen=True)
class Parcel:
    """Files that a job has one name for, as they are beside its driver."""

    name: str
    folder: Path
    files: Mapping[str, str]
    """Name in that folder -> SHA-256."""
    file: str = ""
    """The one that `name` stands for; the folder where it is empty."""


def parcel(name: str, folder: Path, files: Iterable[str], file: str = "") -> Parcel:
    """What `name` stands for on this machine. Raises OSError where a file cannot be read."""
    return Parcel(name, folder, {each: _sha256(folder / each) for each in sorted(files)}, file)


def kept(name: str, file: str, content: bytes) -> Parcel:
    """What `name` stands for where it is in no file yet: one in this machine's cache. Raises DataError."""
    files = {file: hashlib.sha256(content).hexdigest()}
    return Parcel(name, _cached(Path(), files, lambda _, offset: memoryview(content)[offset:]), files, file)


def bring(parcels: Iterable[Parcel], read: Read) -> None:
    """Have all of them on this machine, for this process to load from; `read` reads beside the driver.

    Raises DataError where a file there is not what it was when it was packed, or the cache cannot be used.
    """
    for each in parcels:
        folder = _cached(each.folder, each.files, read) if _lacking(each.folder, each.files) else each.folder
        _PLACES[each.name] = folder / each.file


def place_of(name: str) -> Path | None:
    """The file or folder that a job's name stands for on this machine, if it was brought; else it is where the name says."""
    return _PLACES.get(name)


def _cached(source: Path, files: Mapping[str, str], read: Read) -> Path:
    """The cache's folder with these files; what it lacks, or has with another content, is read from `source`."""
    with entry("weights", digest(dict(files))) as (folder, lock):
        if _lacking(folder, files):
            with lock():
                for name in _lacking(folder, files):
                    publish(folder / name, partial(_copy, str(source / name), files[name], read))
        return folder


def _lacking(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Those that are not there as they should be."""

    def is_there(name: str) -> bool:
        try:
            return _sha256(folder / name) == files[name]
        except OSError:
            return False

    return [name for name in files if not is_there(name)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: str, expected: str, read: Read, file: BinaryIO) -> None:
    found = hashlib.sha256()
    while len(piece := read(source, file.tell())):
        file.write(piece)
        found.update(piece)
    if found.hexdigest() != expected:
        raise DataError(
            f"{source}: what {socket.gethostname()} was sent of it has SHA-256 {found.hexdigest()[:12]}…, and the driver began "
            f"with {expected[:12]}…: it was changed since, or damaged on the way; start again once it is at rest"
        )
