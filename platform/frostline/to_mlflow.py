"""A study in MLflow's database, a file of SQLite: an experiment a study, a run an arm, and under it a run a trial."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from frostline.extras import extra
from frostline.runs import FINAL, RUNNING, ExportError, Run, Tracked, lacking

STATUSES = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
MOST = 1000
"""Metrics that MLflow takes at once."""
_TRIAL, _KEY, _ARM = "frostline.trial_id", "frostline.key", "frostline.arm_run"


def export(study: Tracked, path: Path) -> str:
    """Add to the database at `path`, which may hold other experiments too, the trials that have ended and that it lacks; what
    was written. A trial whose export was interrupted is completed.

    Raises MissingExtraError, ExportError, as `runs.lacking` and where `path` or the experiment cannot be used, and OSError.
    """
    client = _client(path)
    experiment = _experiment(client, study.name, path)
    runs = _all_runs(client, experiment)
    arms = {run.data.tags[_ARM]: run.info.run_id for run in runs if _ARM in run.data.tags}
    trials = {run.data.tags[_TRIAL]: run for run in runs if _TRIAL in run.data.tags}
    keys = {trial_id: run.data.tags[_KEY] for trial_id, run in trials.items()}
    new = lacking(study, keys, path)
    begun = [run for run in study.ended if run.trial_id in trials and trials[run.trial_id].info.status == "RUNNING"]
    for arm in study.arms:
        if any(run.arm == arm for run in study.runs):
            arms[arm] = _write_arm(client, experiment, study, arm, arms.get(arm))
    for run in [*begun, *new]:
        there = trials.get(run.trial_id)
        run_id = there.info.run_id if there else _create(client, experiment, run, arms[run.arm])
        _write_trial(client, run_id, run)
    return f"{len(new) + len(begun):,} trials more, {len(study.ended):,} in all"


def _client(path: Path) -> Any:
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file: --out {path / 'mlflow.db'}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\x00"):
                raise ExportError(
                    f"{path} is no database of SQLite, and was left as it is; give another file: --out PATH"
                )
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when it is imported
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what MLflow uses of SQLAlchemy
        tracking = extra("mlflow", "mlflow.tracking")
        path.parent.mkdir(parents=True, exist_ok=True)
        return tracking.MlflowClient(tracking_uri=f"sqlite:///{path.absolute()}")


def _experiment(client: Any, name: str, path: Path) -> str:
    """The id of the study's experiment, made where it is not there."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return client.create_experiment(name, artifact_location=(path.absolute().parent / "artifacts").as_uri())
    if found.lifecycle_stage != "active":
        raise ExportError(
            f"{path}: the experiment {name!r} was deleted in MLflow. Restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}), or give another file: --out PATH"
        )
    return found.experiment_id


def _all_runs(client: Any, experiment: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        found += page
        if not (token := page.token):
            return found


def _write_arm(client: Any, experiment: str, study: Tracked, arm: str, run_id: str | None) -> str:
    """The run of an arm, made where it is not there; it runs while one of its trials does."""
    runs = [run for run in study.runs if run.arm == arm]
    if run_id is None:
        tags = {_ARM: arm, "strategy": study.arms[arm].strategy, "metric": study.metric, "mode": study.mode}
        start = _ms(min(run.started for run in runs).timestamp())
        run_id = client.create_run(experiment, start_time=start, tags=tags, run_name=arm).info.run_id
    ends = [_ms(run.finished.timestamp()) for run in runs if run.finished]
    if any(run.status == RUNNING for run in runs) or not ends:
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, "FINISHED", end_time=max(ends))
    assert run_id
    return run_id


def _create(client: Any, experiment: str, run: Run, arm_run: str) -> str:
    tags = {_TRIAL: run.trial_id, _KEY: run.key, "mlflow.parentRunId": arm_run, **run.facts}
    start = _ms(run.started.timestamp())
    return client.create_run(experiment, start_time=start, tags=tags, run_name=run.trial_id).info.run_id


def _write_trial(client: Any, run_id: str, run: Run) -> None:
    """Parameters, metrics and at last the status of a trial; what is there already stays as it is."""
    assert run.finished
    entities, end = extra("mlflow", "mlflow.entities"), _ms(run.finished.timestamp())
    metrics = [
        entities.Metric(name, float(value), _ms(epoch.at_s), epoch.epoch)
        for epoch in run.epochs
        for name, value in epoch.metrics.items()
    ]
    metrics += [
        entities.Metric(f"{FINAL}{name}", float(value), end, len(run.epochs)) for name, value in run.finals.items()
    ]
    client.log_batch(run_id, params=[entities.Param(key, str(value)) for key, value in run.config.items()])
    for first in range(0, len(metrics), MOST):
        client.log_batch(run_id, metrics=metrics[first : first + MOST])
    client.set_terminated(run_id, STATUSES[run.status], end_time=end)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
