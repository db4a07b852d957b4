"""Checking a study's folder: each file against what was written, and the rows against each other; and mending what can be had again.

`examine` changes nothing. `repair` deletes only temporary names and checkpoints of our own; damaged parts go, with all parts of their
number, into the folder `damaged`, which nobody reads, and the same search runs their trials again.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from frostline.commit import (
    DamagedFile,
    Lease,
    clean,
    commit_of,
    committed_parts,
    leftovers,
    load_table,
    local_folder,
    published,
    read_table,
    verify_folder,
)
from frostline.results import RECORD, SCHEMAS, TABLES, NotAStudyError, read_job

Repair = Literal["clean", "aside", "drop", "report", "search", "none"]
"""What mends a problem: `repair`, by clearing up, moving the part aside, deleting the file or writing the report; the same search,
once it is started again; or a person."""

ASIDE = "damaged"
_CHECKPOINT = re.compile(r"(?P<trial>.+-\d{5,}(-c\d+)?)\.safetensors")
_COLUMNS = {
    "asks": ["seq", "trial_id"],
    "epochs": ["trial_id", "epoch"],
    "predictions": ["trial_id", "sample_id"],
    RECORD: ["trial_id", "round", "status", "epochs", "n_test", "ask_seq", "data_hash", "split_hash"],
}
"""By which rows have to fit each other."""

_CHECKS: tuple[tuple[str, str, str | None, str], ...] = (
    (
        RECORD,
        "trials that have a row already",
        None,
        "select trial_id, max(part) as part from trials group by all having count(*) > 1",
    ),
    (
        RECORD,
        "trials on other data, or another split of it, than job.json says",
        None,
        "select trial_id, part from trials where data_hash <> $data_hash or split_hash <> $split_hash",
    ),
    (
        RECORD,
        "trials whose asks are not there",
        "The same search writes them again",
        "select trial_id, part from trials anti join asks using (trial_id) where round = 'search'",
    ),
    (
        "asks",
        "trials that were asked for more than once, or in the place of another's ask",
        None,
        "select trial_id, max(part) as part from asks group by trial_id having count(*) > 1 union all "
        "select max(trial_id), max(part) from asks group by seq having count(distinct trial_id) > 1",
    ),
    (
        "epochs",
        "trials that have epochs and no row",
        None,
        "select distinct trial_id, part from epochs anti join trials using (trial_id)",
    ),
    (
        "epochs",
        "trials whose epochs are not numbered from 1 on, or are not as many as they trained",
        None,
        "select trial_id, max(part) as part from epochs join (select distinct trial_id, status, epochs as trained from trials) "
        "using (trial_id) group by trial_id, status, trained having min(epoch) <> 1 or max(epoch) <> count(*) "
        "or count(distinct epoch) <> count(*) or (status <> 'failed' and count(*) <> trained) union all "
        "select trial_id, part from trials anti join epochs using (trial_id) where status <> 'failed' and trials.epochs > 0",
    ),
    (
        "predictions",
        "trials that have predictions and are no complete confirmations",
        None,
        "select distinct trial_id, part from predictions anti join "
        "(from trials where round = 'confirm' and status = 'complete') using (trial_id)",
    ),
    (
        "predictions",
        "confirmations without one prediction for each test sample",
        None,
        "select trial_id, part from trials left join "
        "(select trial_id, count(*) as said, count(distinct sample_id) as samples from predictions group by all) using (trial_id) "
        "where round = 'confirm' and status = 'complete' and (said is distinct from n_test or samples <> said)",
    ),
)
"""Table, what is wrong with trials, the remedy where it is a search, and the query that finds these trials and their parts."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a study."""

    file: str
    """Its path in the study's folder."""
    what: str
    remedy: str
    repair: Repair
    part: int | None = None
    """Whose files go together."""


@dataclass
class Found:
    """What was looked at, and what is wrong with it."""

    in_use: bool
    """A search holds the study: its temporary names, its checkpoints and its report are its own affair."""
    files: int = 0
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, what: str, remedy: str, repair: Repair, part: int | None = None) -> None:
        self.problems.append(Problem(file, what, remedy, repair, part))

    def sound(self, *, repaired: bool) -> bool:
        """Whether nothing is wrong; once it was `repaired`, nothing but what the same search mends."""
        return all(repaired and each.repair == "search" for each in self.problems)


def examine(study: str | Path, *, holding: bool = False) -> Found:
    """Read every byte of a study. It may be running, or be held by the caller (`holding`).

    Raises NotAStudyError, UnknownSchema for a study of another version, OSError.
    """
    folder = _study(study)
    found = Found(in_use=not holding and _in_use(folder))
    facts = _job(folder, found)
    tables = _tables(folder, found)
    _fit(tables, facts, found)
    _splits(folder, found)
    trials = {row["trial_id"]: row for row in tables[RECORD].to_pylist()}
    _bundle(folder, trials, found)
    if not found.in_use:
        _checkpoints(folder, trials, found)
        _report(folder, trials, found)
        for path in leftovers(folder):
            what, remedy = "was left by a process that was killed", "The same search, or --repair, clears it up"
            found.add(_name(folder, path), what, remedy, "clean")
    return found


def repair(study: str | Path) -> tuple[list[str], Found]:
    """Mend what can be mended, holding the study; answers what was done, a line each, and what is found after it.

    Raises StudyBusy where a search or another repair holds it, and what `examine` raises.
    """
    folder = _study(study)
    with Lease.take(folder, {"repairs": folder.name}):
        left = leftovers(folder)
        clean(folder)
        done = [f"{_name(folder, path)}: cleared up" for path in left if not path.exists()]
        problems = examine(folder, holding=True).problems
        aside = folder / ASIDE / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        strays = [folder / each.file for each in problems if each.repair == "aside" and each.part is None]
        parts = sorted({each.part for each in problems if each.repair == "aside" and each.part is not None})
        for old in dict.fromkeys((*strays, *chain.from_iterable(_of_part(folder, part) for part in parts))):
            new = aside / old.parent.name / old.name.lstrip(".")
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
            done.append(f"{_name(folder, old)}: moved to {_name(folder, new)}")
        for each in problems:
            if each.repair == "drop":
                (folder / each.file).unlink()
                done.append(f"{each.file}: deleted")
        if aside.exists() or any(each.repair == "report" for each in problems):
            done += _write_report(folder)
        return done, examine(folder, holding=True)


def lines(found: Found) -> Iterator[str]:
    """What was found, for people: a line a problem, and a last one."""
    for each in found.problems:
        yield f"{each.file}: {each.what}. {each.remedy}"
    running = "; a search is running, and what it is just writing was left out" if found.in_use else ""
    count = len(found.problems)
    yield f"{count} problem{'s' * (count != 1)} in {found.files:,} files, {found.rows:,} rows{running}"


def _study(study: str | Path) -> Path:
    """Its folder, which has a job.json or, where that is gone, rows. Raises NotAStudyError."""
    folder = local_folder(study)
    if not (folder / "job.json").exists() and not committed_parts(folder, RECORD):
        read_job(folder)
    return folder


def _in_use(folder: Path) -> bool:
    try:
        fd = os.open(folder / "lease.json", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _job(folder: Path, found: Found) -> Mapping[str, Any]:
    """The facts in job.json; none where it cannot be read."""
    found.files += 1
    remedy = "Put it back from a copy, or move it away: a search with the very same job writes it again"
    try:
        return read_job(folder)["facts"]
    except DamagedFile as error:
        found.add("job.json", _told(error)[1], remedy, "none")
    except NotAStudyError as error:
        there = (folder / "job.json").exists()
        found.add("job.json", str(error).removeprefix(f"{folder}/job.json ") if there else "is missing", remedy, "none")
    return {}


def _tables(folder: Path, found: Found) -> dict[str, pa.Table]:
    """The columns of `_COLUMNS`, and `part`, of all parts that are as they were written. Their files, damage and rows are told."""
    kept = {name: [_light(name, SCHEMAS[name].empty_table(), 0)] for name in _COLUMNS}
    there = {name: committed_parts(folder, name) for name in TABLES}  # the record, of which all others follow, last
    for part in sorted(set().union(*there.values())):
        own, stray = _part(folder, part, [name for name in TABLES if part in there[name]], found)
        for name in stray:
            what = "belongs to no commit, and is read by nobody who reads the study as Frostline does"
            found.add(_file(name, part), what, "Move it away, or let --repair do so", "aside")
        for name, table in own.items():
            found.rows += len(table)
            if name in kept:
                kept[name].append(_light(name, table, part))
    return {name: pa.concat_tables(tables) for name, tables in kept.items()}


def _light(name: str, table: pa.Table, part: int) -> pa.Table:
    return table.select(_COLUMNS[name]).append_column("part", pa.array([part] * len(table), pa.int32()))


def _part(folder: Path, part: int, there: list[str], found: Found) -> tuple[dict[str, pa.Table], list[str]]:
    """The tables of a part; none where one of them is damaged, as they go together. And the files that are not of its commit."""
    if RECORD not in there:
        return {}, there
    found.files += len(there)
    own: dict[str, pa.Table] = {}
    try:
        _, others = commit_of(folder / _file(RECORD, part))
    except DamagedFile as error:
        found.add(*_told(error, folder), "aside", part)
        return {}, []
    for name in (RECORD, *others):
        try:
            own[name] = read_table(folder, name, RECORD, SCHEMAS[name], [part])
        except DamagedFile as error:
            found.add(*_told(error, folder), "aside", part)
    whole = len(own) == 1 + len(others)
    return own if whole else {}, [name for name in there if name not in (RECORD, *others)]


def _fit(tables: Mapping[str, pa.Table], facts: Mapping[str, Any], found: Found) -> None:
    """Hold the rows against each other, and against what the study was begun with."""
    own = {name: str(facts.get(name)) for name in ("data_hash", "split_hash")}
    with duckdb.connect(":memory:") as connection:
        for name, table in tables.items():
            connection.register(name, table)
        for name, what, remedy, query in _CHECKS:
            if "$" in query and not facts:
                continue
            parts: dict[int, list[str]] = {}
            for trial_id, part in connection.execute(query, own if "$" in query else None).fetchall():
                parts.setdefault(part, []).append(trial_id)
            for part, trials in sorted(parts.items()):
                away = f"Keep a copy, and move every part-{part:06d}.parquet of the study away: the same search then runs its trials again"
                said = f"holds {what}: {len(trials)}, for example {min(trials)}"
                found.add(_file(name, part), said, remedy or away, "search" if remedy else "none", part)


def _splits(folder: Path, found: Found) -> None:
    found.files += 1
    try:
        found.rows += len(load_table(folder / "splits.parquet", SCHEMAS["splits"]))
    except DamagedFile as error:
        found.add("splits.parquet", _told(error)[1], "The same search writes it again", "search")


def _bundle(folder: Path, trials: Mapping[str, Mapping[str, Any]], found: Found) -> None:
    confirmed = [name for name, row in trials.items() if row["round"] == "confirm" and row["status"] == "complete"]
    bundle = published(folder / "bundle")
    remedy = f"Put it back from a copy, or train it again: frostline train {folder} --best"
    if not (bundle.exists() or confirmed):
        return
    found.files += sum(1 for path in bundle.glob("*") if path.is_file())
    if not bundle.exists():
        found.add("bundle", f"is missing, and {len(confirmed)} confirmations have completed", remedy, "none")
        return
    for line in verify_folder(bundle):
        file, _, what = line.removeprefix(f"{folder}/").partition(": ")
        found.add(file, what, remedy, "none")


def _checkpoints(folder: Path, trials: Mapping[str, Any], found: Found) -> None:
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        if not (match := _CHECKPOINT.fullmatch(path.name)):
            continue
        from frostline.checkpoint import CheckpointError, opened  # PyTorch takes seconds to import

        found.files += 1
        if match["trial"] in trials:
            what = "is of a trial that has ended"
            found.add(_name(folder, path), what, "Delete it, or let --repair do so", "drop")
            continue
        try:
            opened(path.read_bytes())
        except CheckpointError as error:
            remedy = "Delete it, or let --repair do so: the trial then begins again"
            found.add(_name(folder, path), f"cannot be used: {error}", remedy, "drop")


def _report(folder: Path, trials: Mapping[str, Any], found: Found) -> None:
    path, remedy = folder / "report.html", f"frostline report {folder}, or --repair, writes it"
    if path.exists():
        found.files += 1
        if not path.read_bytes().rstrip().endswith(b"</html>"):
            found.add(path.name, "is not whole", remedy, "report")
    elif trials:
        found.add(path.name, "is missing", remedy, "report")


def _of_part(folder: Path, part: int) -> Iterator[Path]:
    """All files of a part, temporary ones too; the record first, without which the part is committed no more."""
    for name in reversed(TABLES):
        path = folder / _file(name, part)
        yield from (each for each in (path, *sorted(path.parent.glob(f".tmp-{path.name}-*"))) if each.exists())


def _write_report(folder: Path) -> Iterator[str]:
    from frostline.report import write_report  # the plotting library takes a moment to import

    try:
        write_report(folder)
    except (ValueError, RuntimeError):
        return  # what stands in the way is told
    yield "report.html: written"


def _told(error: DamagedFile, folder: Path | None = None) -> tuple[str, str, str]:
    """The file, what is wrong and the remedy, of what was said of a damaged file."""
    match = re.fullmatch(r"(.+?\.(?:parquet|json)) (.+?)\. (.+)", str(error), re.DOTALL)
    assert match, error
    return match[1].removeprefix(f"{folder}/"), match[2], match[3]


def _file(table: str, part: int) -> str:
    return f"{table}/part-{part:06d}.parquet"


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder))
