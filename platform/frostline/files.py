"""Where data lies: a local path or any URI that pyarrow reads, behind one set of functions."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from frostline.images import BadImage

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
_PLAIN_OPTIONS = ("endpoint_override", "scheme", "region")  # of a URI's query: no secrets


class DataError(ValueError):
    """The data cannot be used as it is. The message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Place:
    """A file or folder on some file system."""

    fs: FileSystem
    path: str
    """As `fs` wants it, without a trailing slash."""
    name: str
    """For messages and keys: never holds credentials."""
    secrets: tuple[str, ...] = ()
    """Parts of the URI that no message may repeat."""

    def __truediv__(self, relative: str) -> Place:
        return replace(self, path=f"{self.path}/{relative}", name=f"{self.name}/{relative}")

    @property
    def parent(self) -> Place:
        """The folder that a file lies in."""
        return replace(self, path=self.path.rpartition("/")[0], name=self.name.rpartition("/")[0])


@dataclass(frozen=True)
class Tree:
    """What lies at a place, hidden files and folders left out; names are relative to it, with forward slashes."""

    files: dict[str, FileInfo]
    """Sorted by name. A place that is a file has itself as the only entry."""
    folders: tuple[str, ...]
    is_file: bool


def locate(path: str) -> Place:
    """The place that a local path or a URI names; nothing is read yet.

    Raises DataError when the URI cannot be understood.
    """
    if "://" not in path:
        absolute = Path(path).expanduser().absolute()
        return Place(LocalFileSystem(), absolute.as_posix(), str(absolute))
    name, secrets = _without_secrets(path)
    scheme = path.split("://", 1)[0].lower()
    if scheme not in SCHEMES:
        raise DataError(f"{name}: no file system is known for {scheme}://; there are {', '.join(SCHEMES)}")
    place = Place(LocalFileSystem(), "", name.rstrip("/"), secrets)
    with reaching(place):
        fs, inner = FileSystem.from_uri(path)
    return replace(place, fs=fs, path=inner.rstrip("/"))


def scan(place: Place) -> Tree:
    """List all that lies at a place, however deep.

    Raises DataError when it cannot be reached, and, naming its nearest neighbour, when it is not there.
    """
    with reaching(place):
        root = place.fs.get_file_info(place.path)
        if root.type == FileType.NotFound:
            raise DataError(f"{place.name} does not exist{_nearest_neighbour(place)}")
        if root.type == FileType.File:
            return Tree({PurePosixPath(place.path).name: root}, (), is_file=True)
        found = place.fs.get_file_info(FileSelector(place.path, recursive=True))
    start = len(place.path) + 1
    shown = {info.path[start:]: info for info in found if not _is_hidden(info.path[start:])}
    files = {name: shown[name] for name in sorted(shown) if shown[name].type == FileType.File}
    folders = tuple(name for name in sorted(shown) if shown[name].type == FileType.Directory)
    return Tree(files, folders, is_file=False)


def read_bytes(place: Place) -> bytes:
    """All bytes of a file.

    Raises BadImage when this one file is missing or may not be read, DataError when its storage fails.
    """
    with reaching(place):
        try:
            with place.fs.open_input_stream(place.path, compression=None) as stream:
                return stream.read()
        except FileNotFoundError:
            raise BadImage("missing: no such file") from None
        except (PermissionError, IsADirectoryError) as error:
            raise BadImage(f"unreadable: {error.strerror or type(error).__name__}") from None


@contextmanager
def reaching(place: Place) -> Iterator[None]:
    """Around whatever touches a place: failures of its storage and of Arrow become DataErrors without secrets."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        for secret in place.secrets:
            text = text.replace(secret, "***")
        raise DataError(f"cannot read {place.name}: {text}") from None  # the cause's own text may hold the secrets


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the word nearest to `word`, or nothing when none is near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _without_secrets(uri: str) -> tuple[str, tuple[str, ...]]:
    """A URI without credentials and options, and the texts that were credentials, longest first."""
    scheme, rest = uri.split("://", 1)
    rest, _, query = rest.partition("?")
    login, at, after = rest.rpartition("@")
    options = (option.partition("=") for option in query.split("&"))
    secrets = {value for key, _, value in options if key not in _PLAIN_OPTIONS}
    if at and (":" in login or "/" not in login):  # an @ further on may belong to a file's name
        rest = after
        user, _, password = login.partition(":")
        secrets |= {login, user, password}
    secrets |= {unquote(secret) for secret in secrets}  # messages may hold either
    return f"{scheme}://{rest}", tuple(sorted(secrets - {""}, key=lambda secret: (-len(secret), secret)))


def _nearest_neighbour(place: Place) -> str:
    beside = place.fs.get_file_info(FileSelector(place.parent.path, allow_not_found=True))
    return nearest(PurePosixPath(place.path).name, [info.base_name for info in beside])


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def sync_folder(folder: Path) -> None:
    """Have on disk which names a local folder holds. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
