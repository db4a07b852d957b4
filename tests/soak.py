"""A study of short trials for as long as one likes, with faults at random: what grows that should not?

Every 10 to 40 seconds a worker is killed or frozen, or the driver is killed or interrupted and the same search given again. Each
few seconds memory, open files and processes of what runs, and the disk, are noted. At the end every row must be there once, no
process may be left, and what the study's actor and the disk take may not grow faster than its rows explain.

    python tests/soak.py [--minutes 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from frostline import results
from frostline.testing import TOY_BACKBONE

JOB = f"""
name = "soak"
[data]
path = "digits"
image_size = 16
per_class = 10
[backbone]
name = "{TOY_BACKBONE}"
weights = "random"
[train]
epochs = 3
[search]
trials = 1_000_000
sampler = "random"
lanes = 16
[confirm]
seeds = 0
[arms.probe]
strategy = "linear_probe"
[arms.probe.space]
"train.head_lr" = {{ low = 1e-4, high = 1e-1, log = true }}
"head.hidden" = [0, 16, 32]
[arms.freeze]
strategy = "freeze_depth"
[arms.freeze.space]
"freeze.depth" = [1, 2]
"train.lr" = {{ low = 1e-4, high = 1e-2, log = true }}
"""
FAULTS = ("kill a worker", "freeze a worker", "kill the driver", "interrupt the driver")
MIB_A_ROW = 0.02
"""Of the study's actor: what a row may leave in its memory, proposals included."""


def start(folder: Path) -> psutil.Process:
    """The search, in a session of its own, as Ray kills the group of a driver that was killed. It hears an interrupt even where the
    soak runs in the background of a shell, which does not."""
    command = [sys.executable, "-m", "frostline.cli", "search", "job.toml"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    return psutil.Process(process.pid)


def below(driver: psutil.Process) -> list[tuple[psutil.Process, str]]:
    """What runs for a driver, with its command line."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((process, " ".join(process.cmdline())))
    return found


def break_something(driver: psutil.Process, fault: str) -> bool:
    """Whether there was anything to break; ends with the driver gone where that was the fault."""
    if fault.endswith("driver"):
        driver.send_signal(signal.SIGKILL if fault.startswith("kill") else signal.SIGINT)
        driver.wait(120)
        return True
    workers = [process for process, command in below(driver) if "Trainable" in command]  # as Tune calls them
    if not workers:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        worker = random.choice(workers)
        if fault.startswith("kill"):
            worker.kill()
        else:
            worker.suspend()
            time.sleep(5)
            worker.resume()
    return True


def look(driver: psutil.Process, study: Path) -> dict[str, float]:
    """What runs now, and takes."""
    seen = {"processes": 0.0, "open files": 0.0, "actor MiB": 0.0, "driver MiB": driver.memory_info().rss / 2**20}
    for process, command in below(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            seen["processes"] += 1
            seen["open files"] += process.num_fds()
            if "StudyActor" in command:
                seen["actor MiB"] = process.memory_info().rss / 2**20
    files = [path.stat().st_size for path in study.rglob("*") if path.is_file()] if study.exists() else []
    return seen | {"study MiB": sum(files) / 2**20, "study files": len(files)}


def rows_of(study: Path) -> list[str]:
    return results.read_trials(study)["trial_id"].to_pylist() if (study / "trials").exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="frostline-soak-") as root:
        folder = Path(root)
        (folder / "job.toml").write_text(JOB)
        study, done, seen = folder / "results" / "soak", Counter(), list[dict[str, float]]()
        until, driver = time.monotonic() + 60 * arguments.minutes, start(folder)
        kept: set[str] = set()
        while time.monotonic() < until:
            pause = time.monotonic() + random.uniform(10, 40)
            while time.monotonic() < min(pause, until):
                time.sleep(3)
                assert driver.is_running(), (folder / "log").read_text()[-3000:]
                rows = rows_of(study)
                if rows:
                    seen.append({**look(driver, study), "rows": len(rows)})
            now = rows_of(study)
            assert kept <= set(now), "a row that was there is gone"
            assert len(now) == len(set(now)), "a row is there twice"
            kept = set(now)
            fault = random.choice(FAULTS)
            done[fault] += break_something(driver, fault)
            if fault.endswith("driver"):
                driver = start(folder)
            print(f"{(until - time.monotonic()) / 60:6.1f} min left  {len(now):6} rows  {fault}", flush=True)
        children = [process for process, _ in below(driver)]
        break_something(driver, "interrupt the driver")
        _, left = psutil.wait_procs(children, timeout=60)
        rows = rows_of(study)
        assert kept <= set(rows)
        assert len(rows) == len(set(rows))
        assert not left, f"processes are left: {left}"
        print(json.dumps(summary(seen, done, len(rows), arguments.minutes)))


def summary(seen: list[dict[str, float]], done: Counter[str], rows: int, minutes: float) -> dict[str, object]:
    """Medians of the second and the last quarter of all looks, and what a row left in the actor's memory between them."""
    quarter = len(seen) // 4
    early, late = ({key: statistics.median(look[key] for look in part) for key in seen[0]}
                   for part in (seen[quarter : 2 * quarter], seen[-quarter:]))  # fmt: skip
    grown = (late["actor MiB"] - early["actor MiB"]) / max(1, late["rows"] - early["rows"])
    flat = (
        all(late[key] <= 1.25 * early[key] for key in ("processes", "open files", "driver MiB")) and grown < MIB_A_ROW
    )
    return {"name": "soak", "minutes": minutes, "rows": rows, "faults": dict(done), "early": early, "late": late,
            "actor_mib_a_row": grown, "flat": flat}  # fmt: skip


if __name__ == "__main__":
    main()
