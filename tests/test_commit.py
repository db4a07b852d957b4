import contextlib
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from frostline import commit
from frostline.commit import (
    CommitConflict,
    DamagedFile,
    Lease,
    StudyBusy,
    UnusableRoot,
    clean,
    commit_part,
    committed_parts,
    load_table,
    next_part,
    publish_folder,
    published,
    read_table,
    verify_folder,
    write_file,
    write_table,
)
from frostline.sealed import VERSION, UnknownSchema

SCHEMA = pa.schema({"id": pa.int64(), "text": pa.string(), "values": pa.list_(pa.float32())}, {VERSION: b"1"})
RECORD = "trials"
TABLES = ("asks", "epochs", RECORD)
STEPS = ("open", "write", "fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir", "pwrite", "ftruncate")

State = dict[str, list[int]]


class Crash(BaseException):
    """Death of the process: nothing that is done after it has an effect."""


def rows(*ids: int) -> pa.Table:
    return pa.Table.from_pylist([{"id": i, "text": f"row {i} " * 3, "values": [i / 7] * 3} for i in ids], SCHEMA)


def tables(first: int) -> dict[str, pa.Table]:
    """One commit: 3 asks, 2 epochs, 1 trial, with ids from `first`."""
    return {
        "asks": rows(first, first + 1, first + 2),
        "epochs": rows(first, first + 1),
        RECORD: rows(first),
    }


def state(study: Path) -> State:
    return {name: read_table(study, name, RECORD, SCHEMA)["id"].to_pylist() for name in TABLES}


def globbed(study: Path) -> State:
    """What any other reader sees: the files that a plain TABLE/*.parquet matches, hidden ones included."""
    found = {name: sorted((study / name).glob("*.parquet")) for name in TABLES}
    return {
        name: [i for path in paths for i in pq.ParquetFile(path).read(["id"])["id"].to_pylist()]
        for name, paths in found.items()
    }


def temporary(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


@contextlib.contextmanager
def fault(at: int, error: Callable[[], BaseException], *, lasting: bool, late: bool = False) -> Iterator[list[str]]:
    """Raise `error()` at step number `at` (and at each later one if `lasting`), after the step has been done if `late`."""
    done: list[str] = []

    def wrap(name: str, call: Callable) -> Callable:
        def step(*args, **kwargs):
            done.append(name)
            hit = len(done) == at or (lasting and len(done) > at)
            if hit and not late:
                raise error()
            result = call(*args, **kwargs)
            if hit:
                if name == "open":
                    os.close(result)
                raise error()
            return result

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield done


CRASH = {"error": Crash, "lasting": True}
FAULTS = {
    "crash": CRASH,
    "crash, step done": {**CRASH, "late": True},
    "EIO once": {"error": lambda: OSError(errno.EIO, "Input/output error"), "lasting": False},
    "EIO once, step done": {"error": lambda: OSError(errno.EIO, "Input/output error"), "lasting": False, "late": True},
    "disk full": {"error": lambda: OSError(errno.ENOSPC, "No space left on device"), "lasting": True},
}


def sweep(action: Callable[[Path], object], kind: dict, folder: Path) -> Iterator[tuple[Path, BaseException]]:
    """Run `action` on copies of `folder`, with the fault at step 1, 2, … until a run meets none."""
    for at in itertools.count(1):
        copy = folder.with_name(f"{folder.name}-{at}")
        shutil.copytree(folder, copy)
        with fault(at, **kind) as done:
            try:
                action(copy)
                failed = None
            except (Crash, OSError) as error:
                failed = error
        if len(done) < at:
            assert failed is None
            assert at > 4, "the sweep met no steps"
            return
        # an error may be survived only where the step had been done all the same, or in tidying up
        if failed is not None:
            yield copy, failed
        shutil.rmtree(copy)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync does cannot be seen without a power cut, when it is called is tested below; the processes that the tests start do it."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with one committed part, ids from 100."""
    commit_part(tmp_path / "study", tables(100), 0)
    return tmp_path / "study"


OLD = {"asks": [100, 101, 102], "epochs": [100, 101], RECORD: [100]}
NEW = {"asks": [100, 101, 102, 200, 201, 202], "epochs": [100, 101, 200, 201], RECORD: [100, 200]}


def test_a_commit_comes_back_and_leaves_nothing_else(study: Path) -> None:
    assert read_table(study, "asks", RECORD, SCHEMA).equals(rows(100, 101, 102), check_metadata=True)
    commit_part(study, tables(200), next_part(study, RECORD))
    assert state(study) == globbed(study) == NEW
    assert committed_parts(study, RECORD) == [0, 1]
    assert read_table(study, "epochs", RECORD, SCHEMA, parts=[1])["id"].to_pylist() == [200, 201]
    assert sorted(str(path.relative_to(study)) for path in study.rglob("*.*")) == [
        f"{name}/part-{part:06d}.parquet" for name in TABLES for part in (0, 1)
    ]


def test_an_empty_study_and_a_table_left_out(tmp_path: Path) -> None:
    assert committed_parts(tmp_path, RECORD) == []
    assert next_part(tmp_path, RECORD) == 0
    assert read_table(tmp_path, "asks", RECORD, SCHEMA).equals(SCHEMA.empty_table())
    commit_part(tmp_path, {RECORD: rows(1)}, 0)
    assert state(tmp_path) == {"asks": [], "epochs": [], RECORD: [1]}


def test_pages_carry_checksums_for_other_readers(study: Path) -> None:
    good = (study / RECORD / "part-000000.parquet").read_bytes()
    caught = 0
    for position in range(4, 200):
        bad = bytearray(good)
        bad[position] ^= 1
        try:
            pq.ParquetFile(pa.BufferReader(bytes(bad)), page_checksum_verification=True).read()
        except (OSError, pa.ArrowInvalid) as error:
            caught += "CRC checksum" in str(error)
    assert caught > 50


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("first", [True, False], ids=["first part", "later part"])
def test_a_commit_that_fails_at_any_step_is_old_or_new(first: bool, kind: str, study: Path, tmp_path: Path) -> None:
    """Matrix rows 26, 27, 29."""
    if first:
        study = tmp_path / "new"
        study.mkdir()
    old, new = (
        ({name: [] for name in TABLES}, {n: t["id"].to_pylist() for n, t in tables(200).items()})
        if first
        else (OLD, NEW)
    )
    outcomes = []
    for copy, failed in sweep(lambda copy: commit_part(copy, tables(200), 0 if first else 1), FAULTS[kind], study):
        seen = state(copy)
        assert seen in (old, new)
        assert all(set(globbed(copy)[name]) <= set(seen[name]) for name in TABLES)
        if kind == "EIO once" and seen == old:
            assert not temporary(copy), "an error was reported, so the writer lives and tidies up"
        clean(copy)
        assert state(copy) == globbed(copy) == seen
        assert not temporary(copy)
        outcomes.append(seen == new)
        if seen == old:
            commit_part(copy, tables(200), next_part(copy, RECORD))
            assert state(copy) == globbed(copy) == new
        if isinstance(failed, OSError):
            assert failed.errno in (errno.EIO, errno.ENOSPC)
    assert outcomes == sorted(outcomes) or "EIO" in kind, "once committed, later failures must not undo it"
    assert set(outcomes) == {False, True}


def test_nothing_is_visible_before_all_of_it_is_durable(study: Path) -> None:
    """A power cut keeps only what was synced: files and folders before the link, the link before the renames."""
    events: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "link", "replace")}

    def opened(path, *args, **kwargs):
        fd = real["open"](path, *args, **kwargs)
        paths[fd] = str(Path(path).relative_to(study))
        events.append(("open", paths[fd]))
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", lambda fd: (real["fsync"](fd), events.append(("fsync", paths[fd]))))
        patch.setattr(os, "link", lambda a, b: (real["link"](a, b), events.append(("link", str(b.relative_to(study))))))
        patch.setattr(
            os, "replace", lambda a, b: (real["replace"](a, b), events.append(("replace", str(b.relative_to(study)))))
        )
        commit_part(study, tables(200), 1)
    link = events.index(("link", "trials/part-000001.parquet"))
    temps = [path for event, path in events if event == "open" and "/.tmp-" in path]
    assert len(temps) == 3
    for temp in temps:
        created = events.index(("open", temp))
        synced = events.index(("fsync", temp))
        assert created < synced < link
        assert ("fsync", str(Path(temp).parent)) in events[synced:link]
    after = events[link + 1 :]
    assert after.index(("fsync", RECORD)) < after.index(("replace", "asks/part-000001.parquet"))


@pytest.mark.fault(27)
def test_a_real_limit_on_file_size_leaves_the_old_state(study: Path) -> None:
    noise = random.Random(0)
    big = pa.Table.from_pylist([{"id": i, "text": noise.randbytes(40).hex(), "values": []} for i in range(500)], SCHEMA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            commit_part(study, {"asks": rows(1), RECORD: big}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state(study) == globbed(study) == OLD
    assert not temporary(study)


@pytest.mark.fault(24)
def test_a_flipped_bit_is_never_read(study: Path) -> None:
    """Matrix row 24, and more: one bit of each byte, footers included."""
    noise = random.Random(24)
    for table in ("epochs", RECORD):
        path = study / table / "part-000000.parquet"
        good = path.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << noise.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(DamagedFile, match=rf"{table}/part-000000\.parquet .* Put it back from a copy, or move"):
                read_table(study, table, RECORD, SCHEMA)
        path.write_bytes(good)
    assert state(study) == OLD


@pytest.mark.fault(24, 25)
def test_a_truncated_or_missing_file_is_named(study: Path) -> None:
    path = study / "epochs" / "part-000000.parquet"
    good = path.read_bytes()
    for length in {0, 1, 7, 8, 12, 40, *range(0, len(good), 97), len(good) - 1}:
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFile, match=r"epochs/part-000000\.parquet"):
            read_table(study, "epochs", RECORD, SCHEMA)
    path.unlink()
    with pytest.raises(DamagedFile, match=r"epochs/part-000000\.parquet is missing"):
        read_table(study, "epochs", RECORD, SCHEMA)


def test_a_good_file_in_the_wrong_place_is_refused(study: Path, tmp_path: Path) -> None:
    commit_part(tmp_path / "other", tables(300), 0)
    shutil.copy(tmp_path / "other/epochs/part-000000.parquet", study / "epochs")
    with pytest.raises(DamagedFile, match="belongs to another commit"):
        read_table(study, "epochs", RECORD, SCHEMA)
    shutil.copy(study / "asks/part-000000.parquet", study / RECORD)
    with pytest.raises(DamagedFile, match="not the record of a commit"):
        read_table(study, "epochs", RECORD, SCHEMA)


def test_the_remedy_for_damage_works(study: Path) -> None:
    """Part 0 moved away is not committed any more, its number is not used again, the rest can be read."""
    commit_part(study, tables(200), 1)
    for name in TABLES:
        (study / name / "part-000000.parquet").unlink()
    assert state(study) == {"asks": [200, 201, 202], "epochs": [200, 201], RECORD: [200]}
    assert next_part(study, RECORD) == 2


@pytest.mark.fault(25)
def test_what_has_no_record_is_ignored(study: Path) -> None:
    """Matrix row 25; a table that the next commit of that number leaves out stays ignored."""
    (study / "epochs/part-000001.parquet").write_bytes(b"torn")
    assert state(study) == OLD
    clean(study)
    assert (study / "epochs/part-000001.parquet").exists()
    commit_part(study, {RECORD: rows(200)}, 1)
    assert state(study) == {**OLD, RECORD: [100, 200]}


@pytest.mark.fault(25)
def test_clean_removes_only_names_that_we_make(study: Path) -> None:
    token = "0123456789ab"
    ours = [
        f".tmp-job.json-{token}",
        f"asks/.tmp-part-000007.parquet-{token}",
        f"trials/.tmp-part-000000.parquet-{token}",
    ]
    others = [
        ".tmp-job.json",
        f".tmp-{token}",
        "asks/.tmp-notes",
        "asks/notes.tmp",
        f"tmp-job.json-{token}",
        ".old-best",
    ]
    for name in (*ours, *others):
        (study / name).write_bytes(b"x")
    (study / f".tmp-link-{token}").symlink_to(study / "asks")
    clean(study)
    assert [name for name in ours if (study / name).exists()] == []
    assert [name for name in others if not (study / name).exists()] == []
    assert state(study) == OLD


@pytest.mark.fault(25)
def test_clean_leaves_what_a_damaged_record_may_name(study: Path) -> None:
    """A crash right after the commit, then a flipped bit in the record: with the record back, so is everything."""
    for copy, _ in sweep(lambda copy: commit_part(copy, tables(200), 1), CRASH, study):
        record = copy / RECORD / "part-000001.parquet"
        if record.exists():
            good = record.read_bytes()
            record.write_bytes(good[:-1] + b"\0")
            clean(copy)
            record.write_bytes(good)
            assert state(copy) == NEW


def test_clean_does_not_put_a_lost_attempt_in_place(study: Path) -> None:
    """A writer dies before its commit, another commits the part; what the dead one left is not taken for the other's."""
    for copy, _ in sweep(lambda copy: commit_part(copy, tables(300), 1), CRASH, study):
        if committed_parts(copy, RECORD) == [0]:
            commit_part(copy, tables(200), 1)
            clean(copy)
            assert state(copy) == globbed(copy) == NEW
            assert not temporary(copy)


@pytest.mark.fault(48)
def test_versions_and_columns_are_checked(tmp_path: Path) -> None:
    newer = rows(1).replace_schema_metadata({VERSION: b"2"})
    write_table(tmp_path / "t.parquet", newer)
    with pytest.raises(UnknownSchema, match=r"t\.parquet: written with schema 2, and this Frostline reads schema 1"):
        load_table(tmp_path / "t.parquet", SCHEMA)
    write_table(tmp_path / "t.parquet", rows(1).append_column("more", pa.array([1])))
    with pytest.raises(UnknownSchema, match="its columns are not those of schema 1"):
        load_table(tmp_path / "t.parquet", SCHEMA)
    write_table(tmp_path / "t.parquet", rows(1).drop_columns(["text"]))
    found = load_table(tmp_path / "t.parquet", SCHEMA)
    assert found.schema.equals(SCHEMA, check_metadata=True)
    assert found["text"].to_pylist() == [None], "a column that came later is null in rows from before"
    assert found["id"].to_pylist() == rows(1)["id"].to_pylist()
    pq.write_table(rows(1), tmp_path / "t.parquet")
    with pytest.raises(DamagedFile, match=r"t\.parquet is not what was written\. Put it back from a copy$"):
        load_table(tmp_path / "t.parquet", SCHEMA)


RACER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from frostline.commit import CommitConflict, commit_part
from frostline.sealed import VERSION
study, me = Path(sys.argv[1]), int(sys.argv[2])
schema = pa.schema({"id": pa.int64(), "text": pa.string(), "values": pa.list_(pa.float32())}, {VERSION: b"1"})
one = pa.Table.from_pylist([{"id": me}], schema)
(study / f"ready-{me}").touch()
while len(list(study.glob("ready-*"))) < 2:
    time.sleep(0.001)
for part in range(40):
    try:
        commit_part(study, {"asks": one, "epochs": one, "trials": one}, part)
        print(part)
    except CommitConflict as error:
        assert f"part {part} " in str(error), error
"""


def python(script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault(32)
def test_of_two_processes_exactly_one_commits_a_part(tmp_path: Path) -> None:
    racers = [python(RACER, tmp_path, me) for me in (1, 2)]
    won = [[int(line) for line in racer.communicate(timeout=60)[0].split()] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1]) == list(range(40))
    for me, parts in zip((1, 2), won, strict=True):
        for part in parts:
            seen = {name: read_table(tmp_path, name, RECORD, SCHEMA, [part])["id"].to_pylist() for name in TABLES}
            assert seen == {name: [me] for name in TABLES}, "a part is one process's, in every table"
    assert not temporary(tmp_path)


HOLDER = """
import os, sys, time
from frostline.commit import Lease
lease = Lease.take(sys.argv[1], {"job": "digits"})
if "fork" in sys.argv and os.fork() == 0:
    assert not lease.held
    lease.release()
os.write(1, b"%d\\n" % os.getpid())
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.fault(32, 33)
def test_a_second_process_is_told_who_holds_the_study(tmp_path: Path) -> None:
    """Matrix row 32; row 33: a paused holder is still the holder."""
    holder = python(HOLDER, tmp_path, 60)
    try:
        assert holder.stdout
        holder.stdout.readline()
        written = json.loads((tmp_path / "lease.json").read_text())
        assert written["pid"] == holder.pid
        assert written["job"] == "digits"
        for pause in (False, True):
            if pause:
                holder.send_signal(signal.SIGSTOP)
            with pytest.raises(StudyBusy) as busy:
                Lease.take(tmp_path, {}, wait_s=0.2)
            for part in (
                f"pid {holder.pid} on {written['host']}",
                written["started"],
                f"kill {holder.pid}",
                "Wait for it",
            ):
                assert part in str(busy.value)
    finally:
        holder.kill()
        holder.communicate()
    with Lease.take(tmp_path, {}) as lease:
        assert lease.held
    assert not lease.held


def test_a_forked_child_neither_keeps_nor_frees_the_study(tmp_path: Path) -> None:
    parent = python(HOLDER, tmp_path, 60, "fork")
    assert parent.stdout
    pids = {parent.pid}
    try:
        while len(pids) < 2:
            pids.add(int(parent.stdout.readline()))
        child = (pids - {parent.pid}).pop()
        with pytest.raises(StudyBusy, match=f"pid {parent.pid} "):
            Lease.take(tmp_path, {})
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        Lease.take(tmp_path, {}).release()
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.communicate()


def test_a_started_program_does_not_inherit_the_lease(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, {})
    sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lease.release()
        lease.release()
        Lease.take(tmp_path, {}).release()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_waiting_for_the_study(tmp_path: Path) -> None:
    holder = python(HOLDER, tmp_path, 0.5)
    assert holder.stdout
    holder.stdout.readline()
    started = time.monotonic()
    Lease.take(tmp_path, {}, wait_s=30).release()
    assert time.monotonic() - started < 25
    holder.communicate()


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with Lease.take(tmp_path / "a/b", {}), pytest.raises(StudyBusy, match=f"pid {os.getpid()} "):
        Lease.take(tmp_path / "a/b", {})
    assert (tmp_path / "a/b/lease.json").read_bytes() == b""
    assert not temporary(tmp_path)


def test_no_password_gets_into_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["frostline", "tune", "data.path=s3://key:hunter2@bucket/x"])
    with Lease.take(tmp_path, {"data": "s3://key:hunter2@bucket/y"}):
        assert "hunter2" not in (tmp_path / "lease.json").read_text()


@pytest.mark.parametrize("uri", ["s3://bucket/study", "gs://b", Path("s3://bucket/study"), "file:///tmp/x"])
def test_a_uri_is_not_a_study_root(uri: str | Path) -> None:
    with pytest.raises(UnusableRoot, match=r"a study cannot live at a URI.* give a folder"):
        Lease.take(uri, {})


def test_a_file_system_without_links_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UnusableRoot, match="lacks the locks or hard links"):
        Lease.take(tmp_path, {})
    monkeypatch.undo()
    Lease.take(tmp_path, {}).release()


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_replaced_is_old_or_new(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    write_file(folder / "job.json", b"old")
    outcomes = []
    for copy, _ in sweep(lambda copy: write_file(copy / "job.json", b"new"), FAULTS[kind], folder):
        outcomes.append((copy / "job.json").read_bytes())
        clean(copy)
        assert not temporary(copy)
    assert set(outcomes) == {b"old", b"new"}


BEST = {"model.safetensors": b"old weights" * 9, "bundle.json": b"{}", "README.md": b"# old"}
BETTER = {"model.safetensors": b"new weights" * 9, "bundle.json": b'{"a": 1}', "LICENSE": b"free"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_folder_that_is_replaced_is_old_or_new(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    publish_folder(folder / "best", BEST)
    outcomes = []
    for copy, _ in sweep(lambda copy: publish_folder(copy / "best", BETTER), FAULTS[kind], folder):
        seen = contents(published(copy / "best"))
        assert seen in (BEST, BETTER)
        assert verify_folder(copy / "best") == []
        if kind == "EIO once":
            assert (copy / "best").exists(), "who reports an error puts the old one back"
        outcomes.append(seen == BETTER)
        again = shutil.copytree(copy, copy.with_name("again"))
        clean(copy)
        assert contents(copy / "best") == seen
        assert not temporary(copy)
        publish_folder(again / "best", BETTER)
        assert contents(again / "best") == BETTER
        shutil.rmtree(again)
    assert set(outcomes) == {False, True}


def test_verify_folder_names_each_problem(tmp_path: Path) -> None:
    path = tmp_path / "best"
    publish_folder(path, BEST)
    assert verify_folder(path) == []
    assert json.loads((path / "manifest.json").read_text())["files"]["README.md"]["size"] == 5
    (path / "README.md").write_bytes(b"# new")
    (path / "bundle.json").write_bytes(b"{} ")
    (path / "model.safetensors").unlink()
    (path / "extra").write_bytes(b"")
    problems = [line.removeprefix(f"{path}/") for line in verify_folder(path)]
    assert problems[0] == "extra: not in the manifest"
    assert problems[1:3] == ["README.md: its SHA-256 is not the manifest's", "bundle.json: 3 bytes, not 2"]
    assert problems[3].startswith("model.safetensors: cannot be read")
    for bad in (b"", b"[]", b'{"files": {"a": 3}}', b'{"files": {"a": {"size": 1}}}', b"\xff"):
        (path / "manifest.json").write_bytes(bad)
        assert re.match(".*manifest.json: cannot be read", verify_folder(path)[0])
    assert "cannot be read" in verify_folder(tmp_path / "none")[0]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"best is in the way.*Move it away"):
        publish_folder(tmp_path / "best", BEST)
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "thesis.tex"]


class StudyMachine(RuleBasedStateMachine):
    """Write, crash, fail, restart, corrupt, repair and read, against a list of the committed parts."""

    damage = Bundle("damage")

    @initialize()
    def start(self) -> None:
        self.study = Path(tempfile.mkdtemp(prefix="frostline-machine-"))
        self.parts: dict[int, State] = {}
        self.serial = itertools.count()
        self.damaged: dict[Path, bytes] = {}
        self.crashed = False

    def teardown(self) -> None:
        if hasattr(self, "study"):
            shutil.rmtree(self.study)

    def draw(self, sizes: tuple[int, int, int]) -> dict[str, pa.Table]:
        """Tables of these sizes, fresh ids; empty ones are left out, but for the record."""
        drawn = {name: rows(*itertools.islice(self.serial, n)) for name, n in zip(TABLES, sizes, strict=True)}
        return {name: table for name, table in drawn.items() if table.num_rows or name == RECORD}

    sizes = st.tuples(*[st.integers(0, 2)] * 3)

    @precondition(lambda self: not self.crashed)
    @rule(sizes=sizes)
    def commits(self, sizes: tuple[int, int, int]) -> None:
        drawn, part = self.draw(sizes), next_part(self.study, RECORD)
        commit_part(self.study, drawn, part)
        self.parts[part] = {name: table["id"].to_pylist() for name, table in drawn.items()}

    @precondition(lambda self: not self.crashed)
    @rule(sizes=sizes, at=st.integers(1, 35), kind=st.sampled_from(sorted(FAULTS)))
    def fails(self, sizes: tuple[int, int, int], at: int, kind: str) -> None:
        drawn, part = self.draw(sizes), next_part(self.study, RECORD)
        with fault(at, **FAULTS[kind]):
            try:
                commit_part(self.study, drawn, part)
            except Crash:
                self.crashed = True
            except OSError:
                pass
        if part in committed_parts(self.study, RECORD):
            self.parts[part] = {name: table["id"].to_pylist() for name, table in drawn.items()}

    @rule()
    def restarts(self) -> None:
        clean(self.study)
        self.crashed = False
        if not self.damaged:
            assert not temporary(self.study)
            assert globbed(self.study) == self.model()

    @precondition(lambda self: self.parts)
    @rule(sizes=sizes, data=st.data())
    def conflicts(self, sizes: tuple[int, int, int], data: st.DataObject) -> None:
        part = data.draw(st.sampled_from(sorted(self.parts)))
        with pytest.raises(CommitConflict):
            commit_part(self.study, self.draw(sizes), part)

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), target=damage)
    def corrupts(self, data: st.DataObject) -> Path:
        path = data.draw(st.sampled_from(sorted(self.study.rglob("part-*.parquet"))))
        good = path.read_bytes()
        self.damaged.setdefault(path, good)
        bad = bytearray(good)
        bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bad)
        return path

    @rule(path=consumes(damage))
    def repairs(self, path: Path) -> None:
        if path in self.damaged:
            path.write_bytes(self.damaged.pop(path))

    def model(self) -> State:
        return {name: [i for _, part in sorted(self.parts.items()) for i in part.get(name, [])] for name in TABLES}

    @invariant()
    def reads_the_committed_rows_or_names_the_damage(self) -> None:
        if not hasattr(self, "study"):
            return
        assert committed_parts(self.study, RECORD) == sorted(self.parts)
        try:
            seen = state(self.study)
        except DamagedFile as damage:
            text = str(damage)
        else:
            assert seen == self.model()
            return
        assert any(str(path) in text for path in self.damaged)


TestStudyMachine = StudyMachine.TestCase
TestStudyMachine.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_the_module_stays_light() -> None:
    code = "import sys, frostline.commit; print([m for m in ('torch', 'ray', 'optuna', 'duckdb') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert commit.__doc__
