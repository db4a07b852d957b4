"""What trackers are told of a study."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from _tracked import BEGAN, begin, finish_running, values, write_tried
from frostline.results import NotAStudyError, read_trials
from frostline.runs import RUNNING, ExportError, Run, Tracked, lacking, read_tracked


def by_id(study: Tracked) -> dict[str, Run]:
    return {run.trial_id: run for run in study.runs}


def test_every_trial_is_one_run(study_folder: Path) -> None:
    study = read_tracked(write_tried(study_folder))
    runs = by_id(study)
    assert (study.name, study.metric, study.mode, study.stages) == ("tried", "accuracy", "max", 4)
    assert len(runs) == len(study.runs) == 8 + 2 + 1 + 2
    assert [run.trial_id for run in study.runs][4:7] == ["freeze-00004", "freeze-00004-c0", "freeze-00004-c1"]
    assert [runs[f"freeze-{n:05d}"].status for n in range(10)] == [
        *["complete", "complete", "pruned", "failed"] * 2,
        *[RUNNING] * 2,
    ]
    assert len(study.ended) == len(read_trials(study_folder))
    assert len({run.key for run in study.ended}) == len(study.ended)


def test_a_run_has_its_configuration_its_epochs_and_what_came_of_it(study_folder: Path) -> None:
    runs = by_id(read_tracked(write_tried(study_folder)))
    best, pruned, failed = (runs[f"freeze-{n:05d}"] for n in (4, 2, 3))
    assert best.params == values("freeze", 4)
    assert best.config == values("freeze", 4) | {"freeze.depth": 2}  # the column's: stages, as it was run
    assert best.finals["val_score"] == best.epochs[-1].metrics["val_score"] == 0.6
    assert "val_accuracy" not in best.epochs[0].metrics
    assert best.facts["seed"] == "1004"
    assert "val_score" not in pruned.finals
    assert pruned.finals["last_score"] == 0.5
    assert failed.epochs == []
    assert failed.facts["reason"] == "loss is nan"
    assert runs["freeze-00004-c0"].params == best.params
    assert runs["freeze-00004-c0"].finals["test_score"] == 0.55
    assert "test_score" not in runs["freeze-00004-c1"].finals


def test_epochs_end_in_order_and_the_last_with_the_run(study_folder: Path) -> None:
    run = by_id(read_tracked(write_tried(study_folder)))["freeze-00004"]
    began = run.started.timestamp()
    assert [round(epoch.at_s - began, 6) for epoch in run.epochs] == [5.0, 7.5, 10.0]  # shares of 2, 1 and 1
    assert run.finished == run.started + timedelta(seconds=10)


def test_a_trial_without_a_beginning_began_when_it_was_asked_for(study_folder: Path) -> None:
    runs = by_id(read_tracked(write_tried(study_folder)))
    assert runs["probe-00000"].started == BEGAN
    assert runs["freeze-00008"].started == BEGAN + timedelta(seconds=8)
    assert runs["freeze-00008"].finished is None


def test_a_study_before_its_first_trial_has_no_runs(study_folder: Path) -> None:
    assert read_tracked(begin(study_folder)).runs == []


def test_what_an_export_lacks_are_the_trials_that_ended_since(study_folder: Path) -> None:
    study = read_tracked(write_tried(study_folder))
    there = {run.trial_id: run.key for run in study.ended}
    assert lacking(study, there, "here") == []
    finish_running(study_folder)
    assert [run.trial_id for run in lacking(read_tracked(study_folder), there, "here")] == ["freeze-00008"]


def test_an_export_of_another_study_of_that_name_is_refused(study_folder: Path) -> None:
    study = read_tracked(write_tried(study_folder))
    with pytest.raises(ExportError, match=r"here holds freeze-00000 of another study called 'tried'.*--out PATH"):
        lacking(study, {"freeze-00000": "0" * 16}, "here")


def test_a_job_of_another_version_is_refused(study_folder: Path) -> None:
    (study_folder / "sub").mkdir(parents=True)
    (study_folder / "job.json").write_text('{"job": {"name": "x"}, "facts": {"stages": []}}')
    with pytest.raises(NotAStudyError, match="not written by a search of this version"):
        read_tracked(study_folder)
