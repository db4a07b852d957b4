"""A study as trackers see it: its trials as plain runs, each with its configuration, its epochs and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from frostline import results
from frostline.models import digest
from frostline.spec import Arm, Mode

RUNNING = "running"
"""The status of a trial that was proposed and has no row: it runs, waits, or was lost with its search."""
FINAL = "final/"
"""Before the names of numbers that a trial has one of, to keep them apart from those of its epochs."""

_EPOCH = (
    *("train_loss", "val_loss", "val_score", "val_accuracy", "val_balanced_accuracy", "val_macro_f1"),
    *("val_micro_f1", "val_exact_match", "val_rmse", "val_mae", "val_r2"),
    *("lr", "head_lr", "seconds", "images"),
)
_FINAL = (
    *(
        "val_score",
        "last_score",
        "best_epoch_score",
        "best_epoch",
        "val_nll",
        "test_score",
        "test_nll",
        "test_accuracy",
    ),
    *("test_auroc", "test_top5_accuracy", "test_ece", "test_brier", "test_micro_f1", "test_exact_match"),
    *("test_average_precision", "test_rmse", "test_mae", "test_r2", "test_spearman"),
    *("test_balanced_accuracy", "test_macro_f1", "epochs", "seconds", "spent_s", "alone_s", "peak_mib"),
    *("trainable_params", "total_params"),
)
_FACTS = (
    *("trial_id", "arm", "round", "status", "error_kind", "reason", "strategy", "config_id", "finalist_of", "seed"),
    *("seeds", "inputs", "pack", "device", "precision", "hardware", "node", "data_hash", "split_hash", "weights_hash"),
)
_DEPTHS = {"freeze.depth": "freeze_depth", "head.depth": "head_depth"}


class ExportError(ValueError):
    """An export that cannot be written where it is asked for; the text says why, and what to do."""


@dataclass(frozen=True)
class Epoch:
    """An epoch of a run."""

    epoch: int
    """From 1."""
    at_s: float
    """When it ended, in seconds since 1970: worked out from the run's beginning and end and the epochs' shares of it."""
    metrics: dict[str, float]
    """Column of the table `epochs` -> its value, where it has one; NaN and infinities are kept."""


@dataclass(frozen=True)
class Run:
    """A trial."""

    trial_id: str
    key: str
    """16 hex digits that are equal for the same trial of the same study only; of one that runs, empty."""
    arm: str
    number: int
    round: str
    status: str
    """One of `results.STATUSES`, or RUNNING."""
    params: dict[str, Any]
    """Searched key of the job -> value."""
    config: dict[str, Any]
    """Key of the job -> value, of all of the trial's configuration; depths as numbers of stages where they are known."""
    facts: dict[str, str]
    """Column of the table `trials` -> its value as text, where it has one."""
    finals: dict[str, float]
    """Column of the table `trials` -> its value, where it has one. The score of one that was pruned is `last_score`."""
    epochs: list[Epoch]
    started: datetime
    """Of one that runs or was lost with its process: when it was asked for. UTC."""
    finished: datetime | None
    """UTC. None while it runs."""


@dataclass(frozen=True)
class Tracked:
    """A study, as of one moment."""

    name: str
    metric: str
    mode: Mode
    stages: int
    arms: dict[str, Arm]
    runs: list[Run]
    """By arm in the job's order, then number; a search trial before its confirmations."""

    @property
    def ended(self) -> list[Run]:
        """Those that have a row, and never change any more."""
        return [run for run in self.runs if run.status != RUNNING]


def read_tracked(study: str | Path) -> Tracked:
    """A study as of now; it may be running. Raises what the readers in `results` raise, and NotAStudyError for a job that this
    version cannot read."""
    record = results.read_job(study)
    trials = results.read_trials(study).to_pylist()  # first: what is committed meanwhile counts as running
    return tracked(record, trials, results.read_epochs(study).to_pylist(), results.read_asks(study).to_pylist())


def tracked(
    record: Mapping[str, Any],
    trials: Iterable[Mapping[str, Any]],
    epochs: Iterable[Mapping[str, Any]],
    asks: Iterable[Mapping[str, Any]],
) -> Tracked:
    """The study of a job.json and the rows of its tables. Raises NotAStudyError."""
    try:
        job, stages = record["job"], len(record["facts"]["stages"])
        arms = {name: Arm.model_validate(raw) for name, raw in job["arms"].items()}
        name, metric, mode = job["name"], job["objective"]["metric"], job["objective"]["mode"]
    except (KeyError, TypeError, ValueError) as error:
        raise results.foreign("job.json", error, "track the study") from None
    asked = {ask["trial_id"]: ask for ask in asks}
    trained: dict[str, list[Mapping[str, Any]]] = {}
    for epoch in epochs:
        trained.setdefault(epoch["trial_id"], []).append(epoch)
    runs = []
    for row in trials:
        ask = asked.get(row["finalist_of"] or row["trial_id"])
        runs.append(_ended(name, row, trained.get(row["trial_id"], []), ask))
    known = {run.trial_id for run in runs}
    runs += [_running(ask) for ask in asked.values() if ask["trial_id"] not in known]
    order = {arm: place for place, arm in enumerate(arms)}
    runs.sort(key=lambda run: (order[run.arm], run.number, run.round != "search", run.trial_id))
    return Tracked(name, metric, mode, stages, arms, runs)


def lacking(study: Tracked, there: Mapping[str, str], place: str | Path) -> list[Run]:
    """The runs that have ended and that an export lacks; `there` is what it holds under the study's name, trial id -> key.

    Raises ExportError where it holds a trial of another study of that name.
    """
    for run in study.ended:
        if there.get(run.trial_id, run.key) != run.key:
            raise ExportError(
                f"{place} holds {run.trial_id} of another study called {study.name!r}. Nothing was written; give another "
                "place (--out PATH), or delete that export and try again"
            )
    return [run for run in study.ended if run.trial_id not in there]


def _ended(
    study: str, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], ask: Mapping[str, Any] | None
) -> Run:
    params = json.loads(ask["params"]) if ask else {}
    spec = json.loads(row["spec"]) if row["spec"] else {}
    given = {f"{part}.{key}": value for part, keys in spec.get("config", {}).items() for key, value in keys.items()}
    depths = {key: row[column] for key, column in _DEPTHS.items() if row[column] is not None}
    asked_at = ask["asked_at"] if ask and row["round"] == "search" else None
    finished: datetime = row["finished_at"]
    started: datetime = row["started_at"] or asked_at or finished  # a trial that was lost has no beginning
    return Run(
        trial_id=row["trial_id"],
        key=digest([study, row["trial_id"], finished.isoformat()]),
        arm=row["arm"],
        number=row["number"],
        round=row["round"],
        status=row["status"],
        params=params,
        config={key: value for key, value in (given | params | depths).items() if value is not None},
        facts={column: str(row[column]) for column in _FACTS if row[column] is not None},
        finals={column: row[column] for column in _FINAL if row[column] is not None},
        epochs=_timed(sorted(epochs, key=lambda epoch: epoch["epoch"]), started, finished),
        started=started,
        finished=finished,
    )


def _running(ask: Mapping[str, Any]) -> Run:
    params = json.loads(ask["params"])
    facts = {"trial_id": ask["trial_id"], "arm": ask["arm"], "round": "search", "status": RUNNING}
    return Run(
        trial_id=ask["trial_id"],
        key="",
        arm=ask["arm"],
        number=ask["number"],
        round="search",
        status=RUNNING,
        params=params,
        config=params,
        facts=facts,
        finals={},
        epochs=[],
        started=ask["asked_at"],
        finished=None,
    )


def _timed(epochs: Sequence[Mapping[str, Any]], started: datetime, finished: datetime) -> list[Epoch]:
    """The epochs, ending at `finished`, each as long as its share of their seconds."""
    shares = [epoch["seconds"] or 0.0 for epoch in epochs]
    wall_s, total_s, passed_s = (finished - started).total_seconds(), sum(shares), 0.0
    found = []
    for number, (epoch, share) in enumerate(zip(epochs, shares, strict=True), 1):
        passed_s += share
        part = passed_s / total_s if total_s else number / len(epochs)
        metrics = {name: epoch[name] for name in _EPOCH if epoch[name] is not None}
        found.append(Epoch(epoch["epoch"], started.timestamp() + wall_s * part, metrics))
    return found
