"""MLflow's database, as MLflow reads it. Needs the extra mlflow: `make test-slow` installs it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from _tracked import BEGAN, begin, finish_running, values, write_tried
from frostline import to_mlflow
from frostline.extras import extra
from frostline.runs import ExportError
from frostline.track import track

pytestmark = pytest.mark.slow


def client(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return extra("mlflow", "mlflow.tracking").MlflowClient(tracking_uri=f"sqlite:///{path}")


def runs(path: Path, name: str = "tried") -> dict[str, Any]:
    """Run's name -> run."""
    there = client(path)
    found = there.search_runs([there.get_experiment_by_name(name).experiment_id], max_results=1000)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(path: Path, run: Any, metric: str) -> list[tuple[int, int, float]]:
    """Milliseconds, step and value of each."""
    return [
        (each.timestamp, each.step, each.value) for each in client(path).get_metric_history(run.info.run_id, metric)
    ]


def test_a_study_is_an_experiment_an_arm_a_run_and_a_trial_one_under_it(study_folder: Path) -> None:
    path = track(write_tried(study_folder), "mlflow").path
    found = runs(path)
    assert len(found) == 2 + 11
    best, pruned, failed = (found[f"freeze-{n:05d}"] for n in (4, 2, 3))
    arm = found["freeze"]
    assert {run.data.tags.get("mlflow.parentRunId") for run in (best, pruned, failed)} == {arm.info.run_id}
    assert [run.info.status for run in (best, pruned, failed)] == ["FINISHED", "KILLED", "FAILED"]
    assert arm.info.status == "RUNNING"
    assert found["probe"].info.status == "FINISHED"
    assert best.data.params == {key: str(value) for key, value in (values("freeze", 4) | {"freeze.depth": 2}).items()}
    began = round((BEGAN.timestamp() + 64) * 1000)
    assert (best.info.start_time, best.info.end_time) == (began, began + 10_000)
    assert history(path, best, "val_score") == [
        pytest.approx(each) for each in ((began + 5000, 1, 0.2), (began + 7500, 2, 0.4), (began + 10_000, 3, 0.6))
    ]
    assert best.data.metrics["final/val_score"] == 0.6
    assert "final/val_score" not in pruned.data.metrics
    assert failed.data.tags["reason"] == "loss is nan"
    assert found["freeze-00004-c0"].data.metrics["final/test_score"] == 0.55


def test_again_adds_nothing_and_later_what_has_ended_since(study_folder: Path) -> None:
    path = track(write_tried(study_folder), "mlflow").path
    first = {name: run.to_dictionary() for name, run in runs(path).items()}
    assert track(study_folder, "mlflow").wrote == "0 trials more, 11 in all"
    assert {name: run.to_dictionary() for name, run in runs(path).items()} == first
    finish_running(study_folder)
    assert track(study_folder, "mlflow").wrote == "1 trials more, 12 in all"
    assert runs(path).keys() - first.keys() == {"freeze-00008"}


def test_an_export_that_was_interrupted_is_completed_without_a_row_twice(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tried(study_folder)
    statuses = to_mlflow.STATUSES
    monkeypatch.setattr(
        to_mlflow, "STATUSES", {"complete": "FINISHED"}
    )  # the first pruned trial ends it, all but its status
    with pytest.raises(KeyError):
        track(study_folder, "mlflow")
    path = study_folder / "tracked" / "mlflow.db"
    assert runs(path)["freeze-00002"].info.status == "RUNNING"
    monkeypatch.setattr(to_mlflow, "STATUSES", statuses)
    track(study_folder, "mlflow")
    found = runs(path)
    assert len(found) == 2 + 11
    assert found["freeze-00002"].info.status == "KILLED"
    assert len(history(path, found["freeze-00002"], "val_score")) == 3


def test_a_database_may_hold_others_experiments_but_must_be_one(study_folder: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared.db"
    track(write_tried(tmp_path / "other", name="other"), "mlflow", shared)
    before = runs(shared, "other").keys()
    track(write_tried(study_folder), "mlflow", shared)
    assert runs(shared, "other").keys() == before
    (tmp_path / "thesis.tex").write_text("\\documentclass{article}")
    with pytest.raises(ExportError, match="is no database of SQLite"):
        track(study_folder, "mlflow", tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "\\documentclass{article}"
    with pytest.raises(ExportError, match="is a folder"):
        track(study_folder, "mlflow", tmp_path)


def test_an_experiment_that_was_deleted_is_not_written_to(study_folder: Path) -> None:
    path = track(begin(study_folder), "mlflow").path
    there = client(path)
    there.delete_experiment(there.get_experiment_by_name("tried").experiment_id)
    with pytest.raises(ExportError, match="mlflow experiments restore"):
        track(study_folder, "mlflow")
