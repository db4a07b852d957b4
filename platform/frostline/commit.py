"""Making files durable: a study's lease, the numbered parts of its tables, single files and published folders.

Every file is written under a temporary name, fsynced and put in place by a link or a rename. A commit is one part of
several tables. All of them are written under temporary names; then the last one, the record, which lists the others, is
linked to its final name: that is the commit. Only then do the others get theirs. So a plain `TABLE/*.parquet` never shows
a row that is not committed, two writers of one part cannot mix, and a reader that comes in between, or after a crash,
follows the record to the temporary names until `clean` has put them in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from frostline.sealed import PART, DamagedFile, damaged, metadata_of, rows_of, sealed, unsealed

_COMMIT, _TABLES = b"frostline_commit", b"frostline_tables"
# Not `.tmp-….parquet`: DuckDB's globs match hidden files.
_TEMP = re.compile(r"\.tmp-(?P<name>.+)-(?P<token>[0-9a-f]{12})")
_ASIDE = re.compile(r"\.old-(?P<name>.+)-frostline")


class StudyBusy(RuntimeError):  # noqa: N818 (it names a state, and reads better so)
    """Another process holds the study; the text says who, since when, and what to do."""


class CommitConflict(RuntimeError):  # noqa: N818 (it names a state, and reads better so)
    """Somebody else has committed this part; nothing of ours is visible."""


class UnusableRoot(ValueError):  # noqa: N818 (it names a state, and reads better so)
    """A place that cannot hold a study."""


class Lease:
    """The exclusive hold of a study folder: a `flock` on its lease.json, which says who holds it.

    The kernel frees it when the holder dies, however it dies, and never before: a paused holder is still the holder, so
    there is no time-out, and no fence is needed. (Where a network file system drops the lock of a host that it lost,
    the exclusive link of a part is the fence.) The file stays; deleting it does not free the study, it splits it.

    The hold belongs to the process that took it. Programs that it starts (subprocesses, Ray's daemons and so all Ray
    workers) get nothing: the descriptor closes on exec. A forked child shares the lock at first, so it closes its copy
    at once: it neither keeps the study busy after its parent's death nor frees it, and its `held` is False.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd
        _held.add(self)

    @classmethod
    def take(cls, folder: str | Path, who: Mapping[str, Any], wait_s: float = 0.0) -> Lease:
        """Hold `folder`, which is made where it is missing; `who` (JSON values) is added to pid, host, started, command.

        Raises StudyBusy when another holds it after `wait_s` seconds, UnusableRoot for a URI or a file system without
        locks or hard links, OSError where the folder cannot be written.
        """
        folder = local_folder(folder)
        _make_folder(folder)
        path = folder / "lease.json"
        deadline = time.monotonic() + wait_s
        while (fd := _lock(path)) is None:
            if time.monotonic() >= deadline:
                raise StudyBusy(_busy(path))
            time.sleep(0.05)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            os.ftruncate(fd, 0)
            started, command = datetime.now(UTC).isoformat(timespec="seconds"), shlex.join(sys.argv)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "command": command, **who}
            os.pwrite(fd, re.sub(r"//[^/@\s]+@", "//***@", json.dumps(holder, indent=2)).encode(), 0)
            undo.pop_all()
        return cls(path, fd)

    @property
    def held(self) -> bool:
        return self._fd is not None

    def release(self) -> None:
        """Free the study; does nothing when it is not held (any more, or in this process)."""
        if self._fd is not None:
            try:
                os.ftruncate(self._fd, 0)
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # for copies of the descriptor too, should a library have forked
            finally:
                self._drop()

    def _drop(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
        _held.discard(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: set[Lease] = set()


def _drop_in_child() -> None:
    for lease in tuple(_held):
        lease._drop()


os.register_at_fork(after_in_child=_drop_in_child)


def local_folder(folder: str | Path) -> Path:
    """`folder` as a path. Raises UnusableRoot for a URI."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise UnusableRoot(
            f"{folder}: a study cannot live at a URI, since its commits need locks and exclusive links; "
            "give a folder on a local or shared POSIX file system (data may be at a URI)"
        )
    return Path(folder)


def commit_part(study: Path, tables: Mapping[str, pa.Table], part: int) -> None:
    """Make the tables of one commit visible, durably, together or not at all; the last in the mapping is the record.

    A table T goes to `study/T/part-000017.parquet`; T may be left out of any commit, the record may not.
    Raises CommitConflict when the part exists, and OSError: nothing is committed then, unless the failure came after
    the commit itself, so whoever means to try again first looks for `part` in `committed_parts`.
    """
    *others, record = tables
    token = _token()
    finals = {name: study / name / f"part-{part:06d}.parquet" for name in tables}
    try:
        for name, table in tables.items():
            listed = {_TABLES: json.dumps(others).encode()} if name == record else {}
            metadata = {**(table.schema.metadata or {}), _COMMIT: token.encode(), **listed}
            _make_folder(finals[name].parent)
            _write(_temp(finals[name], token), sealed(table.replace_schema_metadata(metadata)))
            _sync_folder(finals[name].parent)
        _link(_temp(finals[record], token), finals[record])
    except OSError as error:
        for final in finals.values():
            _discard(_temp(final, token))
        if isinstance(error, FileExistsError):
            raise CommitConflict(
                f"{finals[record]} exists: another process has committed part {part} of this study. "
                "Stop this run and start the same search again: it goes on from what is committed"
            ) from None
        raise
    _sync_folder(finals[record].parent)
    for name in others:
        _temp(finals[name], token).replace(finals[name])
    _temp(finals[record], token).unlink()


def committed_parts(study: Path, record: str) -> list[int]:
    """Numbers of the committed parts, ascending; none where the study has no record yet."""
    folder = study / record
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(PART.fullmatch, names) if match)


def next_part(study: Path, record: str) -> int:
    """The number after the last committed part's; 0 for the first."""
    return max(committed_parts(study, record), default=-1) + 1


def read_table(study: Path, table: str, record: str, schema: pa.Schema, parts: Sequence[int] | None = None) -> pa.Table:
    """All committed rows of a table, or those of `parts`, in the order of the parts; every byte is verified.

    May run while another process commits. Raises DamagedFile, UnknownSchema, OSError.
    """
    parts = committed_parts(study, record) if parts is None else parts
    found = [_read_part(study, table, record, schema, part) for part in parts]
    return pa.concat_tables([schema.empty_table(), *(rows for rows in found if rows is not None)])


def _read_part(study: Path, table: str, record: str, schema: pa.Schema, part: int) -> pa.Table | None:
    head, final = study / record / f"part-{part:06d}.parquet", study / table / f"part-{part:06d}.parquet"
    if table == record:
        return load_table(head, schema)
    commit, listed = commit_of(head)
    if table not in listed:
        return None
    temp = _temp(final, commit)
    file = unsealed(final, _bytes(temp) or _bytes(final))
    if metadata_of(file).get(_COMMIT) != commit.encode():
        raise damaged(final, f"belongs to another commit than {head}")
    return rows_of(final, file, schema)


def commit_of(head: Path) -> tuple[str, list[str]]:
    """The token of the commit of a record's part, and the tables that belong to it beside the record. Raises DamagedFile."""
    metadata = metadata_of(unsealed(head, _bytes(head)))
    if _TABLES not in metadata:
        raise damaged(head, "is not the record of a commit")
    return metadata[_COMMIT].decode(), json.loads(metadata[_TABLES])


def write_table(path: Path, table: pa.Table) -> None:
    """Put one table at `path`, durably, replacing what is there. Raises OSError: the old file is still there then."""
    write_file(path, sealed(table))


def load_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The table that `write_table` or a commit put at `path`. Raises DamagedFile, UnknownSchema, OSError."""
    return rows_of(path, unsealed(path, _bytes(path)), schema)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, durably, replacing what is there. Raises OSError: the old file is still there then."""
    _make_folder(path.parent)
    temp = _temp(path, _token())
    try:
        _write(temp, data)
        temp.replace(path)
    except OSError:
        _discard(temp)
        raise
    _sync_folder(path.parent)


def publish_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of files, and their manifest.json (sizes in bytes, SHA-256), at `path`, replacing one published before.

    The folder is complete and durable before it gets its name. Replacing takes two renames, old aside and new in;
    for the moment between them `published` finds the old one, and after a crash there the next publication or
    `clean` puts it back. Raises FileExistsError where `path` was not published, OSError: the old folder is there then.
    """
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) for name in files), f"bad file names: {list(files)}"
    assert "manifest.json" not in files
    _settle(path)
    if path.exists() and not (path / "manifest.json").is_file():
        raise FileExistsError(f"{path} is in the way: Frostline did not publish it (no manifest.json). Move it away")
    _make_folder(path.parent)
    sums = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    temp = _temp(path, _token())
    try:
        temp.mkdir()
        for name, data in files.items():
            _write(temp / name, data)
        _write(temp / "manifest.json", json.dumps({"files": sums}, indent=2, sort_keys=True).encode())
        _sync_folder(temp)
        if path.exists():
            path.rename(_aside(path))
        temp.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            _settle(path)
        shutil.rmtree(temp, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    _settle(path)


def published(path: Path) -> Path:
    """Where the folder published at `path` is right now: there, or aside while it is being replaced."""
    return path if path.exists() or not _aside(path).exists() else _aside(path)


def verify_folder(path: Path) -> list[str]:
    """What is wrong with a published folder, one line a problem: missing, changed or added files, a bad manifest."""
    path = published(path)
    try:
        sums = json.loads((path / "manifest.json").read_bytes())["files"]
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in sums.items()}
        present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{path / 'manifest.json'}: cannot be read ({error!r})"]
    problems = [f"{path / name}: not in the manifest" for name in sorted(present - wanted.keys())]
    for name, (size, digest) in wanted.items():
        try:
            data = (path / name).read_bytes()
        except (OSError, ValueError) as error:
            problems.append(f"{path / name}: cannot be read ({error})")
            continue
        if len(data) != size:
            problems.append(f"{path / name}: {len(data)} bytes, not {size}")
        elif hashlib.sha256(data).hexdigest() != digest:
            problems.append(f"{path / name}: its SHA-256 is not the manifest's")
    return problems


def leftovers(study: Path) -> list[Path]:
    """Names that killed processes may have left in the study and its direct subfolders: only such as this module makes."""
    folders = (study, *sorted(entry for entry in study.iterdir() if entry.is_dir() and entry.name[0] != "."))
    found = [entry for folder in folders for entry in sorted(folder.iterdir()) if not entry.is_symlink()]
    return [entry for entry in found if _ASIDE.fullmatch(entry.name) or _TEMP.fullmatch(entry.name)]


def clean(study: Path) -> None:
    """Clear up after killed processes: finish what they had committed, remove what they had not. Call it under the lease."""
    for entry in leftovers(study):
        if match := _ASIDE.fullmatch(entry.name):
            _settle(entry.with_name(match["name"]))
        elif entry.is_dir():
            shutil.rmtree(entry)
        elif match := _TEMP.fullmatch(entry.name):
            _finish(entry, entry.with_name(match["name"]), match["token"])


def _finish(temp: Path, final: Path, token: str) -> None:
    """Put a temporary file in place if a record names it, remove it if none does, leave it if that cannot be told."""
    part = final.parent.parent.glob(f"*/{final.name}") if PART.fullmatch(final.name) else ()
    try:
        found = [metadata_of(unsealed(path, _bytes(path))) for path in part]
    except DamagedFile:  # it may be the record
        return
    if any(m.get(_COMMIT) == token.encode() and final.parent.name in json.loads(m.get(_TABLES, b"[]")) for m in found):
        temp.replace(final)
    else:
        temp.unlink()


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on `path`, or None while another holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        probe = _temp(path, _token())
        os.link(path, probe)  # refuse a file system without links now, not when the first trials have been trained
        probe.unlink()
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            raise UnusableRoot(
                f"{path.parent}: its file system lacks the locks or hard links that commits need ({error.strerror}); "
                "set `results` in the job to a folder on another one"
            ) from error
        raise
    return fd


def _busy(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        who = f"pid {holder['pid']} on {holder['host']} has held it since {holder['started']} ({holder['command']})"
        stop = f"stop it (kill {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just taking or releasing it
        who, stop = "another process holds it", "stop it"
    return (
        f"{path.parent} is in use: {who}. Wait for it, {stop}, or give this run another name. "
        f"The hold ends when that process ends; deleting {path.name} does not end it"
    )


def _token() -> str:
    return uuid.uuid4().hex[:12]


def _temp(final: Path, token: str) -> Path:
    return final.with_name(f".tmp-{final.name}-{token}")


def _aside(path: Path) -> Path:
    return path.with_name(f".old-{path.name}-frostline")


def _settle(path: Path) -> None:
    """End an interrupted replacement of a published folder: the old one goes if the new one is there, else comes back."""
    aside = _aside(path)
    if path.exists():
        if aside.exists():
            shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(path)
        _sync_folder(path.parent)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    """A new file, fsynced; its name is durable once its folder is synced too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)  # the kernel's names none
        raise
    finally:
        os.close(fd)


def _link(temp: Path, final: Path) -> None:
    try:
        os.link(temp, final)
    except OSError:  # over NFS a link that was made can be answered with an error
        if not (final.exists() and final.samefile(temp)):
            raise


def _discard(temp: Path) -> None:
    with contextlib.suppress(OSError):
        temp.unlink()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        _sync_folder(folder.parent)
