"""Offline runs, as `wandb sync` reads them. Needs the extra wandb: `make test-slow` installs it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from _tracked import BEGAN, finish_running, write_tried
from frostline.extras import extra
from frostline.results import read_trials
from frostline.runs import ExportError
from frostline.track import track

pytestmark = pytest.mark.slow

BLOCK = 32_768


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format of parts with crc, length and kind."""
    data, at, said = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        said += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = extra("wandb", "wandb.proto.wandb_internal_pb2").Record()
            record.ParseFromString(said)
            said = b""
            yield record


def read(export: Path, trial_id: str) -> dict[str, list[Any]]:
    """Kind -> records of the one run of a trial."""
    (path,) = (export / "tried" / trial_id).glob("offline-run-*/run-*.wandb")
    found: dict[str, list[Any]] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def rows(export: Path, trial_id: str) -> list[dict[str, Any]]:
    """The history."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in read(export, trial_id).get("history", [])
    ]


def test_a_trial_is_an_offline_run_of_the_studys_group(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "wandb")
    assert {path.name for path in (done.path / "tried").iterdir()} == set(
        read_trials(study_folder)["trial_id"].to_pylist()
    )
    best = read(done.path, "freeze-00004")
    (run,) = best["run"]
    assert (run.project, run.run_group, run.job_type, run.display_name) == (
        "frostline",
        "tried",
        "freeze",
        "freeze-00004",
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train.batch_size"] == 32
    assert config["facts"]["status"] == "complete"
    assert [end.exit_code for end in best["exit"]] == [0]
    assert [end.exit_code for end in read(done.path, "freeze-00003")["exit"]] == [1]
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for each in best["summary"]
        for item in each.update
    }
    assert summary["final/val_score"] == 0.6


def test_the_history_has_a_row_an_epoch(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "wandb")
    found = rows(done.path, "freeze-00004")
    assert [row["_step"] for row in found] == [row["epoch"] for row in found] == [1, 2, 3]
    assert [row["val_score"] for row in found] == pytest.approx([0.2, 0.4, 0.6])
    assert [row["_timestamp"] - BEGAN.timestamp() for row in found] == pytest.approx([69, 71.5, 74])
    assert rows(done.path, "freeze-00003") == []


def test_runs_are_offline_whatever_the_environment_says(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "online", "WANDB_PROJECT": "theirs", "WANDB_DIR": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    done = track(write_tried(study_folder), "wandb")
    assert len(list(done.path.glob("tried/*/offline-run-*/run-*.wandb"))) == 11
    assert read(done.path, "freeze-00004")["run"][0].project == "frostline"


def test_again_writes_nothing_and_later_what_has_ended_since(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "wandb")
    first = {path: path.read_bytes() for path in done.path.rglob("*.wandb")}
    assert len(first) == 11
    assert track(study_folder, "wandb").wrote == "0 trials more, 11 in all"
    finish_running(study_folder)
    assert track(study_folder, "wandb").wrote == "1 trials more, 12 in all"
    later = {path: path.read_bytes() for path in done.path.rglob("*.wandb")}
    assert len(later) == 12
    assert first.items() <= later.items()
    assert not list(done.path.rglob(".partial-*"))


def test_an_export_of_another_study_of_that_name_is_refused(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "wandb")
    (there,) = (done.path / "tried" / "freeze-00004").iterdir()
    there.rename(there.with_name("offline-run-20260101_000000-" + "0" * 16))
    with pytest.raises(ExportError, match="freeze-00004 of another study"):
        track(study_folder, "wandb")
