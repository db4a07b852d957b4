"""Parts on Ray Data: the rows of this process, whichever worker dies."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import frostline
from frostline import parts, predict
from frostline.commit import committed_parts
from frostline.predict import predict_data
from frostline.testing import image_folder, toy_job

ARMS = {
    "freeze": {
        "strategy": "freeze_depth",
        "space": {"freeze.depth": [1], "train.lr": 1e-3, "train.head_lr": 1e-2},
    }
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study on digits."""
    job = toy_job(tmp_path_factory.mktemp("pool") / "digits", ["search.trials=1", "confirm.seeds=1"], arms=ARMS)
    return frostline.search(job, inline=True) / "bundle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 images of ten digits, three of them broken."""
    root = image_folder(tmp_path_factory.mktemp("data") / "photos", [str(digit) for digit in range(10)], per_class=100)
    for name in ("0/000.png", "4/050.png", "9/099.png"):
        (root / name).write_bytes(b"broken")
    return root


@pytest.mark.fault(42)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's own, as it starts
def test_a_pool_gives_the_rows_of_this_process_though_workers_die(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MOST_IN_PART", 64)
    here = predict_data(bundle, str(folder), tmp_path / "here", features=True, console=Console(file=io.StringIO()))
    monkeypatch.setattr(predict, "worth_ray", lambda *_, **__: True)
    out, killed = tmp_path / "pool", []

    def kill() -> None:
        """Two actors, once the pool has begun to deliver."""
        deadline = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            if len(committed_parts(out, "predictions")) < 3 + len(killed):
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.pid not in killed and "".join(process.cmdline()[:1]).startswith("ray::MapWorker"):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        break

    commit = predict.commit_part

    def slowly(*arguments) -> None:
        commit(*arguments)
        time.sleep(0.3)

    monkeypatch.setattr(predict, "commit_part", slowly)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    there = predict_data(bundle, str(folder), out, features=True, console=Console(file=io.StringIO()))
    killer.join(1)
    assert killed
    assert (there.predicted, there.unreadable, there.scores) == (997, 3, here.scores)
    assert pq.read_table(out / "predictions").equals(pq.read_table(tmp_path / "here" / "predictions"))
    assert (out / "unreadable.csv").read_text() == (tmp_path / "here" / "unreadable.csv").read_text()
