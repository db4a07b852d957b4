"""Faults of the matrix (`_faults.MATRIX`) that are no one module's, and that each row of it is held to by a test."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

import frostline
from _faults import MATRIX
from _workers import CONTEXT
from frostline import results
from frostline.cli import main
from frostline.collectives import total
from frostline.data import DataError
from frostline.jobfile import as_toml
from frostline.prepare import prepare
from frostline.spec import Job
from frostline.study import Study
from frostline.testing import toy_job, toy_training
from frostline.world import World

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"


def marked() -> Iterator[int]:
    """The rows that tests say they hold."""
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                yield from (ast.literal_eval(argument) for argument in node.args)


def test_every_fault_has_a_test() -> None:
    assert {*marked()} == MATRIX.keys()


def test_the_page_has_every_row_and_none_that_does_not_hold() -> None:
    text = PAGE.read_text()
    shown = {int(number): (fault, holds, result) for number, fault, holds, result in re.findall(
        r"^\| (\d+) \| (.*?) \| (.*?) \| (.*) \|$", text, re.MULTILINE)}  # fmt: skip
    assert {number: row[:2] for number, row in shown.items()} == {n: (r.fault, r.holds) for n, r in MATRIX.items()}
    assert [number for number, (_, _, result) in shown.items() if not result.startswith(("holds", "not run"))] == []


def _meet(mine: Connection, meeting: str, rank: int, signal_number: int) -> None:
    dist.init_process_group("gloo", meeting, timedelta(seconds=5), rank=rank, world_size=2)
    world = World(torch.device("cpu"), "here", rank, 2)
    mine.send(float(total(world, torch.ones(()))))
    if rank == 1:
        os.kill(os.getpid(), signal_number)
    began = time.monotonic()
    try:
        total(world, torch.ones(()))
    except RuntimeError:
        mine.send(time.monotonic() - began)


@pytest.mark.fault(3)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_who_waits_for_a_worker_that_is_gone_is_told_so_in_time(tmp_path: Path, fault: int) -> None:
    processes, pipes = [], []
    for rank in range(2):
        mine, other = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_meet, args=(other, f"file://{tmp_path}/meeting", rank, fault))
        process.start()
        other.close()
        processes.append(process)
        pipes.append(mine)
    try:
        assert [pipe.recv() for pipe in pipes] == [2.0, 2.0], "both were there"
        assert pipes[0].poll(60)
        assert pipes[0].recv() < 15  # a time-out of 5 s
    finally:
        for process in processes:
            process.kill()
            process.join()


def interrupted(job: Job, patch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a training that was interrupted in its third epoch."""
    report = Study.report

    def stop(study: Study, records: dict[str, Any]) -> dict[str, bool]:
        if any(record.epoch == 3 for record in records.values()):
            raise KeyboardInterrupt
        return report(study, records)

    with patch.context() as once:
        once.setattr(Study, "report", stop)
        with pytest.raises(KeyboardInterrupt):
            frostline.train(job, inline=True)
    (checkpoint,) = (job.folder / "checkpoints").iterdir()
    return checkpoint


@pytest.mark.fault(21, 22, 23)
@pytest.mark.parametrize("damage", ["cut short", "a bit"])
def test_a_damaged_checkpoint_costs_epochs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    options = ("train.epochs=4", "scaling.checkpoint_s=0")
    job = toy_training(tmp_path / "study", options)
    checkpoint = interrupted(job, monkeypatch)
    raw = bytearray(checkpoint.read_bytes())
    raw[len(raw) // 2] ^= 4
    checkpoint.write_bytes(raw if damage == "a bit" else raw[: len(raw) // 2])
    with pytest.warns(RuntimeWarning, match=r"train-00000-c0 begins again: .*damaged"):
        frostline.train(job, inline=True)
    assert sorted(results.read_epochs(job.folder)["epoch"].to_pylist()) == [1, 2, 3, 4]
    undisturbed = frostline.train(toy_training(tmp_path / "undisturbed", options), inline=True)
    models = [load_file(study / "bundle" / "model.safetensors") for study in (job.folder, undisturbed)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system of its own needs the right to mount one: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Take all room that is left on its disk."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def on_disk(tmp_path: Path, disk: Path) -> tuple[list[str], Path]:
    """The command of a training of 4 epochs into the disk, and its study."""
    job = toy_training(disk / "study", ["train.epochs=4", "scaling.checkpoint_s=0"])
    (tmp_path / "job.toml").write_text("\n".join(as_toml(job.model_dump(mode="json", exclude_unset=True))))
    return ["train", str(tmp_path / "job.toml"), "--inline"], job.folder


def trained_once(study: Path) -> None:
    (row,) = results.read_trials(study).to_pylist()
    assert (row["status"], row["epochs"]) == ("complete", 4)
    assert sorted(results.read_epochs(study)["epoch"].to_pylist()) == [1, 2, 3, 4]


@pytest.mark.fault(28)
def test_a_checkpoint_that_finds_no_room_is_told_and_training_goes_on(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full for the second of three."""
    keep, ballast, before = Study.keep, disk / "ballast", []

    def kept(study: Study, trial_id: str, checkpoint: bytes) -> None:
        if len(before) == 1:
            fill(ballast)
        keep(study, trial_id, checkpoint)
        before.append(study.kept(trial_id))
        ballast.unlink(missing_ok=True)

    monkeypatch.setattr(Study, "keep", kept)
    command, study = on_disk(tmp_path, disk)
    assert main(command) == 0
    said = "".join(capsys.readouterr())
    assert "warning: the checkpoint of train-00000-c0 was not written" in said
    assert "No space left on device" in said
    assert before[0] == before[1] != before[2]
    trained_once(study)


@pytest.mark.fault(29)
def test_rows_that_find_no_room_are_told_and_come_when_there_is(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = Study.finish

    def finished(study: Study, outcomes: Any) -> None:
        fill(disk / "ballast")
        finish(study, outcomes)

    command, study = on_disk(tmp_path, disk)
    with monkeypatch.context() as once:
        once.setattr(Study, "finish", finished)
        assert main(command) == 1
    said = "".join(capsys.readouterr())
    assert f"No space left on device: '{study}" in said
    assert "make room, and give the same command again" in said
    assert "Traceback" not in said
    assert len(results.read_trials(study)) == 0
    (disk / "ballast").unlink()
    assert main(command) == 0
    trained_once(study)


@pytest.mark.fault(35)
def test_an_objective_that_cannot_be_computed_is_refused_before_anything_trains(tmp_path: Path) -> None:
    for split, classes in {"train": "ab", "val": "a", "test": "ab"}.items():
        for name in classes:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (16, 16), (number, len(split), ord(name))).save(folder / f"{number}.png")
    data = {"path": str(tmp_path / "images"), "image_size": 16}
    job = toy_job(tmp_path / "study", ["objective.metric=auroc"], data=data)
    with pytest.raises(DataError, match=r"objective.metric = 'auroc' .* in val there is only 'a'"):
        prepare(job)
    assert prepare(toy_job(tmp_path / "study", data=data))


HUNGRY = """
import resource, sys
from pathlib import Path
import torch
import frostline
from frostline.testing import toy_backbone, toy_job

def network():
    found = toy_backbone()
    found["module"].stem.register_forward_pre_hook(want)
    return found

def want(module, inputs):
    if module.training and Path(sys.argv[1], "lease.json").exists():  # not while costs are measured
        torch.zeros(1 << 31)  # 8 GiB

if __name__ == "__main__":
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), size + (4 << 30)))
    space = {"freeze.depth": [0, 2], "train.lr": 1e-3, "train.head_lr": 1e-2}
    job = toy_job(
        Path(sys.argv[1]),
        ["search.trials=2", "confirm.seeds=0", "search.sampler=grid", "features.cache=none"],
        backbone={"name": "python:hungry:network", "weights": "random"},
        arms={"freeze": {"strategy": "freeze_depth", "space": space}},
    )
    frostline.search(job, inline=True)
"""


@pytest.mark.fault(37)
def test_a_trial_that_memory_does_not_hold_fails_as_that_and_the_others_go_on(tmp_path: Path) -> None:
    """The process may have 4 GiB more than it begins with; the network wants 8 where its first stage trains."""
    (tmp_path / "hungry.py").write_text(HUNGRY)
    done = subprocess.run(
        [sys.executable, "hungry.py", str(tmp_path / "study")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["freeze_depth"]: row for row in results.read_trials(tmp_path / "study").to_pylist()}
    assert {depth: (row["status"], row["error_kind"]) for depth, row in rows.items()} == {
        0: ("failed", "oom"),
        2: ("complete", None),
    }


OF_OTHERS = {"cluster_commands.py", "machine.py", "nodes.py", "store.py"}
"""Modules that compare the clock with other machines' clocks, or with the times of files."""


@pytest.mark.fault(49)
def test_durations_are_taken_from_clocks_that_do_not_jump() -> None:
    found = {
        path.name
        for path in (ROOT / "platform" / "frostline").glob("*.py")
        if re.search(r"\btime\.time\(", path.read_text())
    }
    assert found == OF_OTHERS
