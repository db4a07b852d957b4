"""10,000 damaged inputs over all readers (tests/_malformed.py): no traceback, no hang, and nothing written, started or reached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import frostline
from _malformed import LIMIT_S, READERS, make
from _studies import interrupted
from frostline import results
from frostline.testing import toy_job, toy_training

COUNTS = {
    "job files": 1200,
    "overrides": 700,
    "images": 1700,
    "tables of images": 700,
    "tables of texts": 1400,
    "IDX files": 500,
    "weights": 800,
    "tokenizers": 400,
    "bundles": 700,
    "studies": 500,
    "tables of studies": 500,
    "checkpoints": 400,
    "features": 500,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound inputs of every kind."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    options = ["search.trials=3", "confirm.seeds=1", "features.cache=all", f"features.path={folder / 'features'}"]
    job = toy_job(folder / "study", options)
    frostline.search(job, inline=True)
    record = results.read_job(folder / "study")
    (folder / "begun.json").write_text(
        json.dumps({"job": {**record["job"], "results": "unused"}, "facts": record["facts"]})
    )
    shutil.move(checkpoint_of(folder / "interrupted"), folder / "checkpoints")
    shutil.rmtree(folder / "interrupted")
    return folder


def checkpoint_of(folder: Path) -> Path:
    """The folder of a checkpoint, of a training that was interrupted."""
    with interrupted():
        frostline.train(toy_training(folder, ["scaling.checkpoint_s=0"]), inline=True)
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What all readers together came to."""
    return {"inputs": 0, "refused": 0, "slowest_s": 0.0}


@pytest.mark.long
@pytest.mark.fault(51)
@pytest.mark.parametrize("reader", READERS)
def test_no_input_gives_a_traceback_hangs_or_writes_elsewhere(
    made: Path, tmp_path: Path, counted: dict[str, Any], reader: str, record_property: Any
) -> None:
    folders = {"HOME": "home", "TMPDIR": "tmp"}
    for name in ("home", "tmp", "here"):
        (tmp_path / name).mkdir()
    env = {key: value for key, value in os.environ.items() if key != "FROSTLINE_CACHE"}
    env |= {key: str(tmp_path / name) for key, name in folders.items()} | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).parent / "_malformed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(made), str(tmp_path), reader, str(COUNTS[reader])],
        cwd=tmp_path / "here", env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{tmp_path / 'last'}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["slowest_s"] < LIMIT_S
    assert found["refused"] > found["inputs"] / 4, "most damage is seen"
    counted["inputs"] += found["inputs"]
    counted["refused"] += found["refused"]
    counted["slowest_s"] = max(counted["slowest_s"], found["slowest_s"])
    print(reader, {key: value for key, value in found.items() if key != "wrong"})
    if counted["inputs"] == sum(COUNTS.values()):
        told = "{inputs:,} inputs, {refused:,} refused, the slowest in {slowest_s:.1f} s".format(**counted)
        record_property("figure", told)


def test_there_are_ten_thousand_and_some_for_each_reader() -> None:
    assert COUNTS.keys() == READERS.keys()
    assert sum(COUNTS.values()) == 10_000
