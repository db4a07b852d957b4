"""What the benchmarks share: CPU seconds of a process tree, interleaved rounds, and the line that each ends with."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def tree_cpu_s(command: Sequence[str]) -> tuple[float, float, Any]:
    """Run a command: CPU seconds of it and of all that it started, wall seconds, and the JSON that its last line holds."""
    started, before = time.perf_counter(), os.times()
    # Ray's processes are reaped by their parents, so their CPU time reaches us through the children's counters only if
    # every one of them has been waited for; a subreaper makes this process the parent of those that outlive theirs.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


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


def say(name: str, figures: Mapping[str, Any]) -> None:
    """The line that a benchmark ends with."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        return [short(each) for each in value] if isinstance(value, list | tuple) else value

    print(json.dumps({"name": name, **short(figures)}))
