"""Every benchmark runs, in small, and ends with its line of JSON; what counts says in it is exact in small too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
SMALL = {
    "extraction": ("--images", "128", "--rounds", "1", "--data", "digits"),
    "proposals": ("--trials", "16", "--rounds", "2", "--lanes", "4"),
    "store": ("--rounds", "1"),
}
"""How to run in small what has no --quick."""
EQUAL = {
    "depth_search",
    "extraction",
    "head_search",
    "live_augmentation",
    "predict",
    "reliability",
    "serving",
    "store",
    "time_to_score",
}
"""Those whose sides must end with the same numbers."""


def run(name: str, folder: Path) -> dict[str, Any]:
    """The line of JSON that a benchmark ends with."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL.get(name, ("--quick",))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def exact(line: dict[str, Any]) -> None:
    """The counts that do not depend on how fast anything is."""
    counts = line["counts"]
    match line["name"]:
        case "prefix_passes":
            assert (line["ratio"], counts["passes"], counts["by_trials"]) == (1.0, 1797, 0)
            assert (counts["trials"], counts["confirmations"], counts["cuts"]) == (60, 9, [1, 2, 3])
            assert 20 <= counts["committed_when_killed"] < 69
            assert (line["second"]["passes"], line["second"]["cuts"]) == (0, [1, 2, 3])
        case "depth_search":
            assert counts == {"trials": 18, "extracted": 200, "images": 200}
        case "predict":
            assert counts == {"images": 640, "parts": 1, "batch": 64}
        case "live_augmentation":
            assert counts == {"trials": 8, "passes_together": 299, "passes_one_by_one": 8 * 2 * (60 + 179)}
        case "serving":
            assert counts == {"requests": 200, "connections": 32}
        case "reliability":
            assert counts["trials"] == 64
            assert counts["fsyncs"] > counts["commits"] > 0
        case "overhead":
            assert (counts["trials"], counts["theirs_trials"]) == (300, 30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_ends_with_its_line(name: str, tmp_path: Path) -> None:
    line = run(name, tmp_path)
    assert line["name"] == name
    assert line["min"] <= line["ratio"] <= line["max"]
    assert line["rounds"] >= 1
    assert line["counts"]
    assert line.get("equal_scores") is (True if name in EQUAL else None)
    exact(line)


def test_the_table_of_benchmarks_has_them_all() -> None:
    lines = (FOLDER / "README.md").read_text().splitlines()
    listed = [line.split("[")[1].split("]")[0] for line in lines if line.startswith("| [")]
    assert sorted(listed) == [f"{name}.py" for name in SCRIPTS]
