"""What this machine keeps to save work and ways: folders of files that every process reads.

Each entry is a folder of its own: its lock lets one process build while others wait, and files are renamed into place when
they are complete and on disk, so that no reader ever sees a part of one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from frostline.files import DataError, sync_folder


def cache_root() -> Path:
    """$FROSTLINE_CACHE, or ~/.cache/frostline."""
    return Path(os.environ.get("FROSTLINE_CACHE") or "~/.cache/frostline").expanduser()


@contextmanager
def entry(kind: str, key: str) -> Iterator[tuple[Path, Callable]]:
    """An entry's folder, and what locks it: while one process builds, others wait. Raises DataError where the storage fails."""
    folder = cache_root() / kind / key
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield folder, partial(_locked, folder / "lock")
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be used: {error.strerror or error}; free space there, or let FROSTLINE_CACHE "
            f"name another local folder"
        ) from error


def publish(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there completely or not at all. Under the entry's lock: what a killed process left
    behind is written over."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel, however this process ends
        yield
