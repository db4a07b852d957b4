"""Trials on several workers, on a real Ray: what one worker trains, and what is lost when processes die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import frostline
from frostline import results
from frostline.api import SearchFailedError
from frostline.jobfile import as_toml
from frostline.spec import Job
from frostline.testing import toy_job, toy_training

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]

PLAIN = "python:plain:network"
"""The toy backbone without dropout, whose noise is each worker's own."""
SLOW_START_S = 120.0


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\n"
        "from frostline.testing import toy_backbone\n"
        "def network():\n"
        "    found = toy_backbone()\n"
        "    for module in found['module'].modules():\n"
        "        if isinstance(module, nn.Dropout):\n"
        "            module.p = 0.0\n"
        "    return found\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # of Ray's workers


def job_of(folder: Path, *overrides: str) -> Job:
    """A training of seconds: all of the network, under plain SGD."""
    return toy_training(
        folder,
        overrides,
        backbone={"name": PLAIN, "weights": "random"},
        train={"batch_size": 32, "optimizer": "sgd", "lr": 0.05, "head_lr": 0.05, "epochs": 3},
        head={"hidden": 16, "dropout": 0.3},
        resources={"cpus": 0.5},
    )


def model_of(study: Path) -> dict[str, Any]:
    return load_file(study / "bundle" / "model.safetensors")


def same_models(one: Path, other: Path, tolerance: float) -> None:
    wanted, found = model_of(one), model_of(other)
    assert wanted.keys() == found.keys()
    assert all((found[name] - wanted[name]).abs().max() <= tolerance for name in wanted)


def only_row(study: Path) -> dict[str, Any]:
    (row,) = results.read_trials(study).to_pylist()
    return row


def epochs_of(study: Path) -> list[int]:
    return sorted(row["epoch"] for row in results.read_epochs(study).to_pylist())


def test_two_workers_train_what_one_trains_and_say_so(tmp_path: Path) -> None:
    alone = frostline.train(job_of(tmp_path / "alone"), inline=True)
    both = frostline.train(job_of(tmp_path / "both", "scaling.workers=2"))
    same_models(alone, both, 1e-5)
    row, wanted = only_row(both), only_row(alone)
    assert row["workers"] == 2
    assert (row["round"], row["status"], row["arm"]) == ("confirm", "complete", "train")
    assert row["test_score"] == pytest.approx(wanted["test_score"], abs=0.01)
    assert (row["n_test"], row["images_backward"]) == (wanted["n_test"], wanted["images_backward"])
    assert epochs_of(both) == [1, 2, 3]
    predictions = results.read_predictions(both)
    assert sorted(predictions["sample_id"].to_pylist()) == sorted(
        results.read_predictions(alone)["sample_id"].to_pylist()
    )
    assert not list((both / "checkpoints").glob("*")) if (both / "checkpoints").exists() else True


@pytest.mark.slow
@pytest.mark.parametrize("options", [["scaling.workers=3"], ["scaling.workers=3", "scaling.mode=fsdp"], ["scaling.workers=2", "scaling.micro_batch=3"]], ids=str)  # fmt: skip
def test_so_do_three_and_those_that_have_a_part_each(tmp_path: Path, options: list[str]) -> None:
    alone = frostline.train(job_of(tmp_path / "alone"), inline=True)
    same_models(alone, frostline.train(job_of(tmp_path / "all", *options)), 1e-5)


@pytest.mark.slow
def test_a_search_may_have_trials_of_two_workers(tmp_path: Path) -> None:
    options = ["search.trials=3", "confirm.seeds=1", "search.sampler=random", "resources.cpus=0.5"]
    sections = {
        "backbone": {"name": PLAIN, "weights": "random"},
        "train": {"epochs": 2, "batch_size": 32, "optimizer": "sgd"},
    }
    alone = frostline.search(toy_job(tmp_path / "one" / "study", options, **sections), inline=True)
    both = frostline.search(toy_job(tmp_path / "two" / "study", [*options, "scaling.workers=2"], **sections))
    wanted, found = (
        {row["trial_id"]: row for row in results.read_trials(study).to_pylist()} for study in (alone, both)
    )
    assert wanted.keys() == found.keys()
    assert all(row["workers"] == 2 for row in found.values())
    for trial_id, row in wanted.items():
        assert found[trial_id]["val_nll"] == pytest.approx(row["val_nll"], abs=1e-4), trial_id


@pytest.mark.slow
def test_a_training_that_goes_wrong_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    job = job_of(tmp_path / "study", "scaling.workers=2", "train.lr=10.0", "train.head_lr=10.0", "train.weight_decay=1.0",
                 "train.warmup=0.0", "train.epochs=8")  # fmt: skip
    with pytest.raises(SearchFailedError, match="1 of 1 trainings failed"):
        frostline.train(job)
    row = only_row(job.folder)
    assert (row["status"], row["error_kind"]) == ("failed", "non_finite")


def test_workers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has 64 workers \(scaling\.workers\), each with 0\.5 CPUs .*there is room for"
    ):
        frostline.train(job_of(tmp_path / "study", "scaling.workers=64"))


def test_several_workers_need_ray(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scaling\.workers = 2"):
        frostline.train(job_of(tmp_path / "study", "scaling.workers=2"), inline=True)


def test_what_ended_the_workers_has_a_kind() -> None:
    """As Ray Train tells it; where it says nothing, as of a connection that breaks, a worker is gone."""
    from ray.exceptions import RayActorError
    from ray.train.v2._internal import exceptions as told
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    from frostline.distributed import _ended

    broken = told.UserExceptionWithTraceback(RuntimeError("x"), "Traceback\nRuntimeError: Connection closed by peer")
    hung = told.WorkerHealthCheckTimeoutError("A worker does not answer.")
    dead = told.WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())
    gone = PreemptionError(SimpleNamespace(preempted_ranks=[1]))  # pyright: ignore[reportArgumentType]
    for error, kind in (
        (WorkerGroupError("", {0: broken}), "worker_lost"),
        (WorkerGroupError("", {0: broken, 1: dead}), "worker_lost"),
        (WorkerGroupError("", {0: broken, 1: hung}), "timeout"),
        (ControllerError(told.WorkerGroupStartupTimeoutError(4)), "no_resources"),
        (gone, "preempted"),
    ):
        found, reason = _ended(error)
        assert found == kind
        assert reason.startswith("a worker ended: ")
    assert _ended(WorkerGroupError("", {0: broken}))[1] == "a worker ended: RuntimeError: Connection closed by peer"


LONG = ("scaling.workers=2", "scaling.checkpoint_s=0", "train.epochs=40", "data.per_class=40")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[], psutil.Process]]:
    """Starts `frostline train` on a job of 40 epochs, as often as it is called."""
    started: list[psutil.Process] = []
    (tmp_path / "job.toml").write_text("\n".join(_toml(job_of(tmp_path / "study", *LONG))))

    def start() -> psutil.Process:
        command = [sys.executable, "-m", "frostline.cli", "train", "job.toml"]
        process = subprocess.Popen(  # in a session of its own: Ray kills the group of a driver that was killed
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        started.append(psutil.Process(process.pid))
        return started[-1]

    yield start
    for process in started:
        if process.is_running():
            process.kill()


def _toml(job: Job) -> list[str]:
    return as_toml(job.model_dump(mode="json", exclude_unset=True))


def checkpoint_of(study: Path) -> Path:
    return study / "checkpoints" / "train-00000-c0.safetensors"


def wait_for(what: Callable[[], Any], process: psutil.Process, within_s: float = SLOW_START_S) -> Any:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if found := what():
            return found
        assert process.is_running(), "the driver has ended"
        assert process.status() != psutil.STATUS_ZOMBIE, "the driver has ended"
        time.sleep(0.2)
    raise AssertionError(f"nothing within {within_s} s")


def train_workers(driver: psutil.Process) -> list[psutil.Process]:
    """Those of Ray Train below a driver, by age."""
    found = []
    for each in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if "RayTrainWorker" in " ".join(each.cmdline()):
                found.append(each)
    return sorted(found, key=psutil.Process.create_time)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("kill", marks=[pytest.mark.slow, pytest.mark.fault(1)]),
        pytest.param("stop", marks=[pytest.mark.long, pytest.mark.fault(2)]),
        pytest.param("driver", marks=[pytest.mark.slow, pytest.mark.fault(13, 21)]),
    ],
)
def test_what_a_lost_process_had_saved_is_not_lost(
    tmp_path: Path, driver: Callable[[], psutil.Process], fault: str
) -> None:
    """A worker that is killed or does not answer, and a driver that is killed: the training goes on from its checkpoint and
    ends with the bits of one that nothing happened to."""
    study = tmp_path / "study"
    process = driver()
    wait_for(lambda: checkpoint_of(study).exists(), process)
    if fault == "driver":
        children = process.children(recursive=True)
        process.kill()
        psutil.wait_procs(children, timeout=60)
        assert checkpoint_of(study).exists()
        process = driver()
    else:
        _, last = train_workers(process)
        last.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    assert process.wait(240) == 0
    assert epochs_of(study) == list(range(1, 41))
    assert only_row(study)["status"] == "complete"
    undisturbed = frostline.train(job_of(tmp_path / "undisturbed", *LONG))
    same_models(undisturbed, study, 0.0)


@pytest.mark.long
@pytest.mark.fault(4)
def test_a_training_that_loses_workers_again_and_again_is_a_failed_row(
    tmp_path: Path, driver: Callable[[], psutil.Process]
) -> None:
    """`scaling.restarts` is 1 here: the second loss is the last."""
    study = tmp_path / "study"
    text = (
        (tmp_path / "job.toml")
        .read_text()
        .replace("[scaling]", "[scaling]\nrestarts = 1")
        .replace("epochs = 40", "epochs = 4000")
    )
    (tmp_path / "job.toml").write_text(text)
    process = driver()
    wait_for(lambda: len(train_workers(process)) == 2 and checkpoint_of(study).exists(), process)
    first = train_workers(process)
    first[-1].kill()
    time.sleep(2)  # what was on its way has been written
    before = checkpoint_of(study).stat().st_mtime_ns

    def go_on() -> bool:
        trains = {*train_workers(process)}
        return len(trains) == 2 and not trains & {*first} and checkpoint_of(study).stat().st_mtime_ns > before

    wait_for(go_on, process)  # a group that dies while it starts is started again by Ray, and does not count
    train_workers(process)[-1].kill()
    assert process.wait(240) == 1
    row = only_row(study)
    assert (row["status"], row["error_kind"]) == ("failed", "worker_lost")
    assert row["reason"].startswith("a worker ended: ")
    assert row["epochs"] > 0, "those that were told"
