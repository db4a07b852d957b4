"""The faults that Frostline is held against, and the page that says which of them it withstands.

A test that holds a row of the matrix is marked `@pytest.mark.fault(NUMBER, …)`; what it counted it tells with
`record_property("figure", …)`. `make test-faults` runs them all and writes docs/reliability.md.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version


@dataclass(frozen=True)
class Row:
    """A fault, and what must hold in spite of it."""

    fault: str
    holds: str


MATRIX: dict[int, Row] = {
    1: Row("a training worker is killed (SIGKILL)", "the weights are those of an undisturbed training, to the bit"),
    2: Row("a training worker stops answering (SIGSTOP)", "the others go on without it within a minute, not ten"),
    3: Row("a worker dies, or freezes, before a collective", "the others get an error within the time-out"),
    4: Row("a trial takes its process with it every time", "tried twice, then a failed row; the search goes on"),
    5: Row("a node is killed", "the search completes, each row once"),
    6: Row("the only node with room is killed", "the search says so in time, and goes on later"),
    7: Row("a training loses workers for good", "it goes on with fewer, no epoch lost"),
    8: Row("a node freezes and comes back", "each trial has one row, whoever reports late"),
    9: Row("a node is cut off the network and comes back", "each trial has one row, whoever reports late"),
    10: Row("the network is slow", "the rows of a fast one"),
    11: Row("of each of Ray's services in turn, one call in ten fails, but those to actors", "the rows of a sound one"),
    12: Row("the driver is killed at any step", "each row once, none lost"),
    13: Row("the driver is killed again and again", "rows never fewer, each once in the end"),
    14: Row("SIGINT, SIGTERM, SIGINT twice", "committed, exit code 130 or 143, goes on later"),
    15: Row("the head dies", "the driver ends with an error; the study goes on on another cluster"),
    16: Row("the head dies and is back, its state being in Redis", "a search whose driver is on a node goes on"),
    17: Row("the supervisor of a submitted job dies", "the job has failed; submitted again it goes on, each row once"),
    18: Row("a job is stopped and submitted again", "it goes on, each row once"),
    19: Row("a submitted job cannot be placed", "its reason within a minute, and its exit status"),
    20: Row("files of Ray Tune are damaged", "nothing: a study is restored from its rows, and keeps no file of Tune's"),
    21: Row("files of Ray Train are damaged", "nothing: a training is restored from its own checkpoint"),
    22: Row("the newest checkpoint is cut short", "it is seen, said, and the trial begins again"),
    23: Row("a bit of the newest checkpoint flips", "it is seen, said, and the trial begins again"),
    24: Row("a bit of a committed file flips", "never read: the file is named, with the remedy"),
    25: Row(
        "the record of a commit is torn or missing", "its rows are not there; only our temporary names are removed"
    ),
    26: Row("a crash at any system call of a commit", "the old state or the new, never both"),
    27: Row("EIO or ENOSPC at any system call of a commit", "the old state or the new; the error is told"),
    28: Row("the disk is full when a checkpoint is written", "a warning; training goes on, the one before stays"),
    29: Row("the disk is full when rows are committed", "an error that says so; goes on when there is room"),
    30: Row("Ray's temporary folder is full", "`frostline doctor` says so before Ray refuses"),
    31: Row("storage is missing or read-only on a node", "`frostline doctor --storage` names node and path"),
    32: Row("two drivers on one study", "one holds it, the other is told who"),
    33: Row("the holder of a study is paused and wakes", "it is still the holder; nobody else was let in"),
    34: Row("a loss is NaN", "a failed row with its epoch; never the best"),
    35: Row("an objective cannot be computed", "refused before anything trains"),
    36: Row("every trial fails", "exit code 1, and why"),
    37: Row("a trial runs out of memory", "`oom`; the others go on"),
    38: Row("images that are damaged, or none", "each named with its reason, and counted"),
    39: Row("an image bomb", "refused from its header, before decoding"),
    40: Row("empty classes, duplicates across splits", "each named; excluded only when the job says so"),
    41: Row("the data changes between two runs of a study", "refused, with what differs"),
    42: Row("workers of a prediction are killed", "every row once"),
    43: Row("the driver of a prediction is killed twice", "every row once"),
    44: Row("a serving replica is killed under load", "no wrong answer, back within 30 s"),
    45: Row("a training is interrupted after any epoch", "it goes on to the same bits"),
    46: Row("a study is run twice", "the same rows"),
    47: Row("a search is replayed from what was recorded", "the same proposals and stops"),
    48: Row("a study of another version", "read as it was then, goes on; of another schema refused, naming both"),
    49: Row("the clock jumps", "durations are of a clock that does not"),
    50: Row("a cluster ends, or a driver is killed", "no process, namespace, mount or temporary file is left"),
    51: Row("10,000 malformed inputs, over all readers", "no traceback, no hang, nothing written or started elsewhere"),
}


@dataclass
class Found:
    """What the tests of a row came to."""

    held: list[str] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Why."""
    figures: list[str] = field(default_factory=list)


def page(found: Mapping[int, Found], before: str = "") -> str:
    """docs/reliability.md, after a run; of rows that it did not try it says what it said `before`."""
    lines = [
        "# What Frostline withstands",
        "",
        "Written by `make test-faults`, which may be run in pieces. Each row is a fault and what must hold in spite of it; the tests that",
        f"hold it to that do it to real processes, nodes, disks and files. Python {platform.python_version()}, Ray {version('ray')}, PyTorch "
        f"{version('torch').split('+')[0]}.",
        "",
        "| | fault | what holds | result |",
        "|---|---|---|---|",
    ]
    known = {
        int(number): result for number, result in re.findall(r"^\| (\d+) \| .* \| (.*?) \|$", before, re.MULTILINE)
    }
    for number, row in MATRIX.items():
        result = _result(row, found.get(number, Found())) or known.get(number) or "not run: no test of it ran"
        lines.append(f"| {number} | {row.fault} | {row.holds} | {result} |")
    return "\n".join(lines) + "\n"


def _result(row: Row, found: Found) -> str | None:
    """What a run found; None where it tried nothing."""
    if found.red:
        return f"**does not hold**: {_names(found.red)}; {date.today():%Y-%m-%d}"
    if found.held:
        figures = "".join(f"; {figure}" for figure in dict.fromkeys(found.figures))
        return f"holds: {_names(found.held)}{figures}; {date.today():%Y-%m-%d}"
    return f"not run: {'; '.join(dict.fromkeys(found.skipped))}" if found.skipped else None


def _names(tests: Iterable[str]) -> str:
    modules: dict[str, int] = {}
    for test in tests:
        module = test.partition("::")[0]
        modules[module] = modules.get(module, 0) + 1
    return ", ".join(f"{count} in {module}" for module, count in modules.items())
