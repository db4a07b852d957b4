"""What the benchmarks share: CPU seconds of a process tree, interleaved rounds, and the line that each ends with."""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

LOOK_S = 0.5
COVERAGE = 0.95


def tree_cpu_s(command: Sequence[str]) -> tuple[float, float, str]:
    """Run a command: CPU seconds of it and of all that it started, wall seconds, and the last line that it says.

    The kernel reaps Ray's workers, whose times then reach no parent's counters: so all processes are looked at every
    `LOOK_S` while they live. What one does after the last look at it is lost.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what outlives its parents becomes our child
    others = {pid for pid, (parent, *_) in _processes().items() if parent == os.getpid()}
    started, wall_s = time.perf_counter(), None
    ticks: dict[tuple[int, int], int] = {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        while True:
            seen = _processes()
            there = _below(os.getpid(), seen, others)
            ticks |= {(pid, seen[pid][1]): seen[pid][2] for pid in there}
            for pid in there - {process.pid}:
                if seen[pid][0] == os.getpid():
                    os.waitpid(pid, os.WNOHANG)
            if wall_s is not None and not there:
                break
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
            wall_s = wall_s or time.perf_counter() - started
            time.sleep(LOOK_S / 10)
        out.seek(0), err.seek(0)
        said, complained = out.read(), err.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{said[-2000:]}{complained[-4000:]}")
    return sum(ticks.values()) / os.sysconf("SC_CLK_TCK"), wall_s, said.splitlines()[-1]


def _processes() -> dict[int, tuple[int, int, int]]:
    """Process id -> parent, start, and clock ticks on a CPU, of all processes."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        found[int(stat.parent.name)] = int(fields[1]), int(fields[19]), int(fields[11]) + int(fields[12])
    return found


def _below(root: int, processes: Mapping[int, tuple[int, int, int]], without: Collection[int]) -> set[int]:
    """The descendants of a process, without some of its children."""
    children: dict[int, list[int]] = {}
    for pid, (parent, *_) in processes.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    ahead = [pid for pid in children.get(root, []) if pid not in without]
    while ahead:
        found.add(pid := ahead.pop())
        ahead += children.get(pid, [])
    return found


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side answers (seconds, as a rule), round by round: A B A B …, so that both meet the same machine."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
            print(f"round {number + 1} of {rounds}, {name}: {found[name][-1]:.4g}", file=sys.stderr)
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds' ratios, theirs over ours: how many times faster we are."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": statistics.median(found), "min": min(found), "max": max(found)}


def interval(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """For the median of the rounds' ratios: from the k-th `low`est to the k-th `high`est, the narrowest whose `coverage` is at
    least COVERAGE; the whole range where even that (below 6 rounds) is not."""
    found = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    n = len(found)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= COVERAGE), default=1)
    return {"low": found[k - 1], "high": found[n - k], "coverage": coverage(k)}


def say(name: str, figures: Mapping[str, Any]) -> None:
    """The line that a benchmark ends with."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list | tuple) else value

    print(json.dumps({"name": name, **short(figures)}))
