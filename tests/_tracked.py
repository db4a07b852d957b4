"""A study with trials of every kind, written without training: for tests of what exports it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from _studies import confirm_row, search_row
from frostline.commit import commit_part, next_part, write_file
from frostline.jobfile import parse_job
from frostline.results import RECORD, table_of

BEGAN = datetime(2026, 1, 2, 3, 4, 5, 600_000, UTC)
ARMS = {
    "freeze": {
        "strategy": "freeze_depth",
        "space": {
            "freeze.depth": "all",
            "head.hidden": [0, 16],
            "head.dropout": {"low": 0.0, "high": 0.5, "step": 0.25},
            "train.batch_size": {"low": 16, "high": 64, "log": True},
            "train.lr": {"low": 1e-5, "high": 1e-2, "log": True},
        },
    },
    "probe": {"strategy": "linear_probe", "space": {"train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True}}},
}
STATUSES = ("complete", "complete", "pruned", "failed")


def begin(folder: Path, *, name: str = "tried", metric: str = "accuracy", arms: dict[str, Any] = ARMS) -> Path:
    """A study's folder before its first trial has ended."""
    job = parse_job(
        {
            "name": name,
            "data": {"path": "digits"},
            "backbone": {"name": "timm/resnet10t"},
            "objective": {"metric": metric},
            "arms": arms,
        }
    )
    facts = {"stages": ["a", "b", "c", "d"]}
    write_file(
        folder / "job.json",
        json.dumps({"job": job.model_dump(mode="json", exclude={"results"}), "facts": facts}).encode(),
    )
    return folder


def values(arm: str, number: int) -> dict[str, Any]:
    """What trial `number` of an arm of ARMS was proposed with."""
    if arm == "probe":
        return {"train.head_lr": 0.01}
    lr = 1e-5 * 2 ** (number % 8)
    return {
        "freeze.depth": number % 5,
        "head.hidden": [0, 16][number % 2],
        "head.dropout": 0.25,
        "train.batch_size": 32,
        "train.lr": lr,
    }


def asks(arm: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of asks."""
    return [
        {
            "seq": number,
            "trial_id": f"{arm}-{number:05d}",
            "arm": arm,
            "number": number,
            "batch": number,
            "params": json.dumps(values(arm, number)),
            "asked_at": BEGAN + timedelta(seconds=number),
        }
        for number in numbers
    ]


def ended(arm: str, number: int, status: str, score: float | None, **more: Any) -> dict[str, Any]:
    """A row of a search trial that took 10 s."""
    began = BEGAN + timedelta(seconds=60 + number)
    row = search_row(arm, number, status, score, **more)
    seeds = json.dumps({"head": number})
    return {**row, "seeds": seeds, "started_at": began, "finished_at": began + timedelta(seconds=10)}


def epochs(row: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Rows of its epochs, the first of which takes as long as all others; the last has the row's score."""
    return [
        {
            "trial_id": row["trial_id"],
            "epoch": epoch,
            "phase": 0,
            "train_loss": 1 / epoch,
            "val_loss": 1.5 / epoch,
            "val_score": row["last_score"] * epoch / count,
            "lr": 1e-3,
            "head_lr": 1e-2,
            "seconds": float(count - 1 if epoch == 1 else 1),
        }
        for epoch in range(1, count + 1)
    ]


def add(study: Path, **tables: Sequence[dict[str, Any]]) -> None:
    """Commit rows: asks, epochs and, with them, trials."""
    rows = {name: table_of(name, tables[name]) for name in ("asks", "epochs", RECORD) if name in tables}
    commit_part(study, rows, next_part(study, RECORD))


def write_tried(folder: Path, **begun: Any) -> Path:
    """Eight trials of `freeze` (four statuses, twice; the best is number 4), two that run, one of `probe` that was lost, and two
    confirmations, of which one failed."""
    study = begin(folder, **begun)
    rows = [
        ended("freeze", number, status, None if status == "failed" else 0.5 + 0.1 * (number == 4))
        for number, status in enumerate((*STATUSES, *STATUSES))
    ]
    trained = [epoch for row in rows if row["status"] != "failed" for epoch in epochs(row, 3)]
    lost = ended("probe", 0, "failed", None, reason="lost") | {"started_at": None}
    add(study, asks=asks("freeze", range(10)) + asks("probe", [0]), epochs=trained, trials=[*rows, lost])
    confirmed = [
        confirm_row(rows[4], index, score, seed=70 + index, n_test=20, n_train=10)
        for index, score in enumerate((0.55, None))
    ]
    add(study, epochs=epochs(confirmed[0], 3), trials=confirmed)
    return study


def finish_running(study: Path) -> None:
    """End trial 8, which is the best; 9 goes on."""
    row = ended("freeze", 8, "complete", 0.9)
    add(study, epochs=epochs(row, 3), trials=[row])
