"""The journal, as Optuna and optuna-dashboard read it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from _tracked import BEGAN, add, asks, begin, ended, epochs, finish_running, values, write_tried
from frostline.results import NotAStudyError, query, read_trials
from frostline.runs import ExportError
from frostline.track import track


def storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def load(path: Path, name: str = "tried/freeze") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=storage(path))


def get(path: Path, address: str) -> Any:
    """What optuna-dashboard answers."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ["PATH_INFO"] = address
    said: list[str] = []
    body = optuna_dashboard.wsgi(storage(path))(environ, lambda status, _headers, *_: said.append(status))
    assert said[0].startswith("200"), said
    return json.loads(b"".join(body))


def test_optuna_finds_the_trials_of_each_arm(study_folder: Path) -> None:
    done = track(write_tried(study_folder), "optuna")
    study = load(done.path)
    counted = query(
        study_folder,
        "select max(val_score) as best, count(*) as n from trials where arm = 'freeze' and round = 'search'",
    )
    assert study.best_value == counted["best"][0].as_py() == 0.6
    assert study.best_trial.number == 4
    assert len(study.trials) == counted["n"][0].as_py() + 2
    complete, pruned, failed, running = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING
    assert [trial.state for trial in study.trials] == [*[complete, complete, pruned, failed] * 2, running, running]
    assert [trial.value for trial in study.trials if trial.state != complete] == [None] * 6
    assert study.direction.name == "MAXIMIZE"
    assert study.metric_names == ["accuracy"]
    assert [trial.state for trial in load(done.path, "tried/probe").trials] == [failed]
    assert done.path == study_folder / "tracked" / "optuna.journal"


def test_a_trial_has_all_that_its_rows_say(study_folder: Path) -> None:
    trial = load(track(write_tried(study_folder), "optuna").path).trials[4]
    assert trial.params == values("freeze", 4)
    assert trial.distributions == {
        "freeze.depth": IntDistribution(0, 4),
        "head.hidden": CategoricalDistribution((0, 16)),
        "head.dropout": FloatDistribution(0.0, 0.5, step=0.25),
        "train.batch_size": IntDistribution(16, 64, log=True),
        "train.lr": FloatDistribution(1e-5, 1e-2, log=True),
    }
    assert trial.intermediate_values == pytest.approx({1: 0.2, 2: 0.4, 3: 0.6})
    assert trial.datetime_start
    assert trial.datetime_start.astimezone().timestamp() == BEGAN.timestamp() + 64
    assert trial.duration
    assert trial.duration.total_seconds() == 10
    attributes = trial.user_attrs
    assert attributes["trial_id"] == "freeze-00004"
    assert attributes["seeds"] == {"head": 4}
    assert (attributes["spent_s"], attributes["alone_s"]) == (1.0, 2.0)
    assert attributes["test_scores"] == [0.55, None]
    assert attributes["test_seeds"] == [70, 71]
    assert attributes["test_score_mean"] == 0.55


def test_a_score_to_be_minimised_is(study_folder: Path) -> None:
    study = load(track(write_tried(study_folder, metric="nll"), "optuna").path)
    assert study.direction.name == "MINIMIZE"
    assert study.best_value == 0.5


def test_the_dashboard_opens_it(study_folder: Path) -> None:
    path = track(write_tried(study_folder), "optuna").path
    studies = get(path, "/api/studies")["study_summaries"]
    assert [each["study_name"] for each in studies] == ["tried/freeze", "tried/probe"]
    shown = get(path, f"/api/studies/{studies[0]['study_id']}")
    states = [trial["state"] for trial in shown["trials"]]
    assert sorted(states) == sorted([*["Complete"] * 4, *["Pruned"] * 2, *["Fail"] * 2, *["Running"] * 2])


def test_again_is_the_same_file_and_later_has_what_has_ended_since(study_folder: Path) -> None:
    path = track(write_tried(study_folder), "optuna").path
    first = path.read_bytes()
    track(study_folder, "optuna")
    assert path.read_bytes() == first
    finish_running(study_folder)
    track(study_folder, "optuna")
    study = load(path)
    assert len(study.trials) == 10
    assert study.best_trial.number == 8
    assert study.trials[9].state == TrialState.RUNNING


def test_what_others_have_written_is_left_alone(study_folder: Path, tmp_path: Path) -> None:
    path = track(write_tried(study_folder), "optuna").path
    load(path).set_user_attr("note", "mine")
    with pytest.raises(ExportError, match="entries that others have added"):
        track(study_folder, "optuna")
    assert load(path).user_attrs["note"] == "mine"
    other = tmp_path / "thesis.tex"
    other.write_text("\\documentclass")
    with pytest.raises(ExportError, match="something else than this study's export"):
        track(study_folder, "optuna", other)
    assert other.read_text() == "\\documentclass"
    track(begin(tmp_path / "another", name="another"), "optuna", tmp_path / "journal")
    with pytest.raises(ExportError, match="something else"):
        track(study_folder, "optuna", tmp_path / "journal")
    with pytest.raises(ExportError, match=r"is a folder; give the name of a file"):
        track(study_folder, "optuna", tmp_path)


def test_scores_that_are_not_finite_are_kept(study_folder: Path) -> None:
    study = begin(study_folder)
    row = ended("freeze", 0, "failed", None)
    trained = [epochs(row | {"last_score": 0.5}, 2)[0] | {"val_score": float("nan")}]
    add(study, asks=asks("freeze", [0]), epochs=trained, trials=[row])
    path = track(study, "optuna").path
    assert str(load(path).trials[0].intermediate_values) == "{1: nan}"
    assert get(path, "/api/studies/0")["trials"][0]["intermediate_values"][0]["step"] == 1


def test_a_trial_that_was_never_asked_for_is_refused(study_folder: Path) -> None:
    study = begin(study_folder)
    add(study, asks=asks("freeze", [0]), trials=[ended("freeze", n, "complete", 0.5) for n in (0, 1)])
    with pytest.raises(NotAStudyError, match="asks lacks what freeze-00001 was proposed with"):
        track(study, "optuna")


@pytest.mark.slow
def test_ten_thousand_trials_are_written_within_a_minute(study_folder: Path) -> None:
    study = begin(study_folder)
    for first in range(0, 10_000, 500):
        numbers = range(first, first + 500)
        rows = [ended("freeze", number, "complete", 0.5 + number * 1e-5) for number in numbers]
        add(study, asks=asks("freeze", numbers), epochs=[each for row in rows for each in epochs(row, 50)], trials=rows)
    began = time.process_time()
    path = track(study, "optuna").path
    took = time.process_time() - began
    found = load(path)
    assert len(found.trials) == len(read_trials(study)) == 10_000
    assert found.best_value == pytest.approx(0.59999)
    assert took < 60, took
