"""The study, inline and without Ray: budgets, rounds, rows, resume, replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline import results
from frostline.commit import StudyBusy
from frostline.propose import Proposer
from frostline.rows import describe, summarise
from frostline.spec import Job, TrialSpec
from frostline.study import Finished, Study, StudyMismatchError, best_of, choose_finalists, differences
from frostline.testing import toy_job
from frostline.train import EpochRecord
from frostline.trial import Outcome
from frostline.world import World

FACTS = {"stages": ["stem", "block1", "block2"], "data_hash": "d", "split_hash": "s", "weights_hash": "w"}
SPLITS = results.SCHEMAS["splits"].empty_table()


def open_study(job: Job, facts: dict[str, Any] = FACTS) -> Study:
    return Study(job, facts, SPLITS, who={})


def record(spec: TrialSpec, epoch: int) -> EpochRecord:
    """A scripted epoch: the best depth is 2, a higher learning rate is better, and later epochs are better."""
    config = spec.config
    score = 1 - abs(config.freeze.depth - 2) / 10 + config.train.lr + epoch / 100 - (spec.seed % 97) / 1e4
    scores = {"accuracy": score, "balanced_accuracy": score, "macro_f1": score, "nll": 1 - score}
    return EpochRecord(epoch, 0.0, scores, score, 0.0, 0.0, 0, 0.0, 0.0)


def outcome(spec: TrialSpec, records: Sequence[EpochRecord], status: str) -> Outcome:
    row = {**describe(spec, World.here(spec.resources)), **summarise(spec, records, status)}
    if spec.round == "confirm":
        row |= {"test_score": records[-1].val_score}
    return Outcome(row | {"seconds": 0.01, "device_s": 0.01}, bundle={"x": b"x"} if spec.round == "confirm" else {})


def run_one(study: Study, spec: TrialSpec) -> None:
    records = []
    for epoch in range(1, spec.config.train.epochs + 1):
        records.append(record(spec, epoch))
        if not study.report(spec.trial_id, records[-1]) and epoch < spec.config.train.epochs:
            study.finish(spec.trial_id, outcome(spec, records, "pruned"))
            return
    study.finish(spec.trial_id, outcome(spec, records, "complete"))


def run_all(study: Study, at_once: int = 1) -> None:
    """Run the study with several trials in flight, which end in the order they began."""
    flying: list[TrialSpec] = []
    while True:
        while len(flying) < at_once and (spec := study.ask()):
            flying.append(spec)
        if not flying:
            return
        run_one(study, flying.pop(0))


def trials(job: Job) -> list[dict[str, Any]]:
    return results.read_trials(job.folder).to_pylist()


def test_a_study_runs_its_budget_and_its_confirmations(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=12"])
    study = open_study(job)
    run_all(study, at_once=2)
    assert study.done
    snapshot = study.snapshot()
    study.close()
    rows = trials(job)
    assert len(rows) == 12 + 2 == len({row["trial_id"] for row in rows})
    assert snapshot.done == 12
    assert snapshot.confirmed == snapshot.confirmed_complete == snapshot.to_confirm == 2
    search = [row for row in rows if row["round"] == "search"]
    confirm = [row for row in rows if row["round"] == "confirm"]
    best = max((row for row in search if row["val_score"] is not None), key=lambda row: row["val_score"])
    assert {row["finalist_of"] for row in confirm} == {best["trial_id"]}
    assert not {row["seed"] for row in search} & {row["seed"] for row in confirm}
    assert {row["config_id"] for row in confirm} == {best["config_id"]}
    assert all(row["test_score"] is None for row in search)
    assert {row["status"] for row in search} == {"complete", "pruned"}
    assert all((row["val_score"] is None) == (row["status"] != "complete") for row in rows)
    epochs = results.read_epochs(job.folder).to_pylist()
    assert len(epochs) == sum(row["epochs"] for row in rows)
    assert {epoch["decision"] for epoch in epochs} == {"continue", "stop"}
    assert (job.folder / "bundle" / "manifest.json").exists()
    assert sorted(ask["seq"] for ask in results.read_asks(job.folder).to_pylist()) == sorted(
        row["ask_seq"] for row in search
    )


def test_arms_share_the_budget_equally_and_are_asked_in_turn(study_folder: Path) -> None:
    arms = {name: {"strategy": strategy, "space": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
            for name, strategy in (("probe", "linear_probe"), ("full", "full"))}  # fmt: skip
    job = toy_job(study_folder, ["search.trials=6", "confirm.finalists=arms", "search.pruner.kind=none"], arms=arms)
    study = open_study(job)
    asked = [study.ask() for _ in range(6)]
    assert [spec.arm for spec in asked if spec] == ["probe", "full"] * 3
    assert study.ask() is None
    for spec in asked:
        study.finish(
            spec.trial_id, outcome(spec, [EpochRecord(1, 0, {"nll": 0.0}, spec.seed, 0, 0, 0, 0, 0)], "complete")
        )
    confirmations = [study.ask() for _ in range(4)]
    assert study.ask() is None
    assert {spec.arm for spec in confirmations} == {"probe", "full"}
    paired = {arm: [spec.seed for spec in confirmations if spec.arm == arm] for arm in ("probe", "full")}
    assert paired["probe"] == paired["full"]
    study.close()


def events(job: Job) -> list[tuple[int, str, dict[str, Any]]]:
    """What the tables recorded, in its order."""
    rows = {row["trial_id"]: row for row in trials(job) if row["round"] == "search"}
    asks = [(ask["seq"], "ask", ask) for ask in results.read_asks(job.folder).to_pylist()]
    reports = [(e["seq"], "report", e) for e in results.read_epochs(job.folder).to_pylist() if e["trial_id"] in rows]
    return sorted([*asks, *reports, *((row["tell_seq"], "tell", row) for row in rows.values())], key=lambda e: e[0])


def replay(job: Job) -> int:
    """Put the recorded questions to new samplers and pruners, in order; the number of answers that were compared."""
    arms = {name: Proposer(job, name, len(FACTS["stages"]), job.search.trials) for name in job.arms}
    number_of = {ask["trial_id"]: (ask["arm"], ask["number"]) for _, kind, ask in events(job) if kind == "ask"}
    compared = 0
    for _, kind, event in events(job):
        arm, number = number_of[event["trial_id"]]
        if kind == "ask":
            assert arms[arm].ask().values == json.loads(event["params"])
        elif kind == "report":
            assert arms[arm].report(number, event["epoch"], event["val_score"]) == (event["decision"] == "stop")
        else:
            assert arms[arm].tell(number, event["status"], event["val_score"]) == json.loads(event["sampler"])
        compared += 1
    return compared


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_recorded_order_replays_to_the_same_proposals(study_folder: Path, at_once: int) -> None:
    job = toy_job(study_folder, ["search.trials=30", "search.sampler=tpe", "search.startup_trials=5"])
    study = open_study(job)
    run_all(study, at_once)
    study.close()
    assert replay(job) > 30 * 3


def interrupt(study: Study) -> None:
    """A kill -9, as far as the folder can tell: nothing more is written, and the kernel frees the lease."""
    study.lease.release()


def test_a_study_that_is_killed_anywhere_ends_with_every_row_once(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=9"])
    seen: set[str] = set()
    for kill_after in range(12):
        study = open_study(job)
        assert {row["trial_id"] for row in trials(job)} >= seen
        for _ in range(kill_after % 4):
            if spec := study.ask():
                run_one(study, spec)
                study.commit()
        lost = study.ask()
        if lost:
            study.report(lost.trial_id, record(lost, 1))
        seen = {row["trial_id"] for row in trials(job)}
        interrupt(study)
    study = open_study(job)
    run_all(study)
    assert study.done
    study.close()
    rows = [row["trial_id"] for row in trials(job)]
    assert len(rows) == len(set(rows)) == 9 + 2
    asks = [ask["trial_id"] for ask in results.read_asks(job.folder).to_pylist()]
    assert len(asks) == len(set(asks)) == 9


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 9), max_size=5), at_once=st.integers(1, 3))
def test_kills_between_commits_change_no_row_of_a_sampler_that_does_not_look(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], at_once: int
) -> None:
    """With qmc and no pruning an interrupted study ends with the configurations of an undisturbed one."""
    options = ["search.trials=8", "search.sampler=qmc", "search.pruner.kind=none"]
    found = []
    for interruptions in ([], kills):
        job = toy_job(tmp_path_factory.mktemp("study") / "s", options)
        for finished in interruptions:
            study = open_study(job)
            flying: list[TrialSpec] = []
            for _ in range(finished):
                while len(flying) < at_once and (spec := study.ask()):
                    flying.append(spec)
                if flying:
                    run_one(study, flying.pop(0))
                    study.commit()
            interrupt(study)
        study = open_study(job)
        run_all(study)
        study.close()
        found.append({(row["trial_id"], row["config_id"], row["seed"], row["val_score"]) for row in trials(job)})
    assert found[0] == found[1]


def test_what_was_asked_before_a_kill_is_run_with_the_same_configuration(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=8"])
    study = open_study(job)
    first, second, third = (study.ask() for _ in range(3))
    run_one(study, second)
    study.commit()
    interrupt(study)
    again = open_study(job)
    assert [again.ask(), again.ask()] == [first, third]
    again.close()


def test_more_trials_extend_a_study(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=4"])
    study = open_study(job)
    run_all(study)
    study.close()
    more = toy_job(study_folder, ["search.trials=7"])
    study = open_study(more)
    assert not study.done
    run_all(study)
    study.close()
    rows = trials(more)
    assert len([row for row in rows if row["round"] == "search"]) == 7
    assert results.read_job(study_folder)["job"]["search"]["trials"] == 7
    with pytest.raises(StudyMismatchError, match=r"search\.trials: was 7, now 4"):
        open_study(job)


def test_another_job_is_told_what_differs(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    run_one(study, study.ask())
    study.close()
    with pytest.raises(StudyMismatchError) as refused:
        open_study(toy_job(study_folder, ["train.epochs=4", "search.trials=12"]))
    assert "train.epochs: was 3, now 4" in str(refused.value)
    assert "search.trials" not in str(refused.value).split("Give")[0]
    with pytest.raises(StudyMismatchError, match="data_hash: was 'd', now 'other'"):
        open_study(toy_job(study_folder), {**FACTS, "data_hash": "other"})
    open_study(toy_job(study_folder)).close()


def test_a_second_driver_is_told_who_holds_the_study(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_study\n"
        "from frostline.testing import toy_job\n"
        "test_study.open_study(toy_job(Path(sys.argv[1])))"
    )
    tests = str(Path(__file__).parent)
    second = subprocess.run(
        [sys.executable, "-c", script, str(study_folder), tests], capture_output=True, text=True, check=False
    )
    assert second.returncode != 0
    assert "StudyBusy" in second.stderr
    assert f"{os.getpid()}" in second.stderr
    with pytest.raises(StudyBusy):
        open_study(toy_job(study_folder))
    study.close()
    open_study(toy_job(study_folder)).close()


def test_a_study_without_a_complete_trial_confirms_nothing(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder, ["search.trials=2"]))
    for _ in range(2):
        spec = study.ask()
        study.finish(spec.trial_id, outcome(spec, [], "failed"))
    assert study.ask() is None
    assert study.done
    assert study.snapshot().best is None
    study.close()


def test_a_trial_whose_worker_dies_before_its_first_epoch_is_run_again_once(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=3", "search.pruner.kind=none"])
    study = open_study(job)
    first, second, third = (study.ask() for _ in range(3))
    study.report(second.trial_id, record(second, 1))
    for spec in (first, second):
        study.lose(spec.trial_id, "gone")
    assert study.ask() == first
    study.lose(first.trial_id, "gone again")
    run_one(study, third)
    study.lose(third.trial_id, "after its end: too late to matter")
    run_all(study)
    study.close()
    rows = {row["trial_id"]: row for row in trials(job)}
    assert len(rows) == 3 + 2
    for spec in (first, second):
        assert (rows[spec.trial_id]["status"], rows[spec.trial_id]["error_kind"]) == ("failed", "worker_lost")
    assert rows[second.trial_id]["epochs"] == 1
    assert rows[third.trial_id]["status"] == "complete"


def test_rows_of_a_commit_that_failed_are_sent_again(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline import study as module

    real, broken = module.commit_part, ["before", "after"]

    def commit_part(*arguments: Any) -> None:
        """Fails once before it writes and once after it has committed."""
        how = broken.pop() if broken else None
        if how == "before":
            raise OSError(28, "No space left on device")
        real(*arguments)
        if how == "after":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "commit_part", commit_part)
    job = toy_job(study_folder, ["search.trials=4", "confirm.seeds=0", "search.pruner.kind=none"])
    study = open_study(job)
    for _ in range(2):
        run_one(study, study.ask())
        with pytest.raises(OSError, match="No space|Input/output"):
            study.commit()
    run_all(study)
    study.close()
    assert sorted(row["number"] for row in trials(job)) == [0, 1, 2, 3]


def test_a_job_that_was_refused_leaves_no_mark(study_folder: Path) -> None:
    arms = {"freeze": {"strategy": "freeze_depth", "sampler": "grid", "space": {"freeze.depth": [0, 1]}}}
    with pytest.raises(ValueError, match="lower search.trials to 2"):
        open_study(toy_job(study_folder, ["search.trials=6"], arms=arms))
    open_study(toy_job(study_folder, ["search.trials=2"], arms=arms)).close()


def test_a_finalist_that_a_longer_search_replaces_leaves_its_confirmations_behind(study_folder: Path) -> None:
    options = ["search.sampler=random", "search.pruner.kind=none", "search.defaults=false"]
    finalists = []
    for count in (2, 12):
        study = open_study(toy_job(study_folder, [f"search.trials={count}", *options]))
        run_all(study)
        snapshot = study.snapshot()
        assert (snapshot.confirmed, snapshot.confirmed_complete, snapshot.to_confirm) == (2, 2, 2)
        finalists.append(snapshot.best)
        study.close()
    assert finalists[0] != finalists[1]
    assert len(trials(toy_job(study_folder))) == 12 + 2 + 2


def test_rows_are_committed_after_two_seconds_or_256_rows(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("frostline.study.time.monotonic", lambda: now[0])
    job = toy_job(
        study_folder, ["search.trials=600", "search.sampler=random", "search.pruner.kind=none", "train.epochs=1"]
    )
    study = open_study(job)

    def finish(count: int) -> None:
        for _ in range(count):
            run_one(study, study.ask())

    finish(255)
    assert not trials(job)
    finish(1)
    assert len(trials(job)) == 256
    finish(1)
    now[0] = 1.9
    study.snapshot()
    assert len(trials(job)) == 256
    now[0] = 2.0
    study.snapshot()
    assert len(trials(job)) == 257
    study.close()


def finished(name: str, number: int, score: float | None, arm: str = "a") -> Finished:
    return Finished(name, arm, number, "search", "complete" if score is not None else "pruned", score, 1.0)


def test_finalists_are_the_best_and_ties_go_to_the_lower_number() -> None:
    found = [finished("x", 3, 0.9), finished("y", 1, 0.9), finished("z", 0, None), finished("w", 2, 0.5, "b")]
    assert [trial.trial_id for trial in choose_finalists(found, "best", "max")] == ["y"]
    assert [trial.trial_id for trial in choose_finalists(found, "arms", "max")] == ["y", "w"]
    assert [trial.trial_id for trial in choose_finalists(found, "best", "min")] == ["w"]
    assert best_of([finished("z", 0, None)], "max") is None


def test_differences_are_named_by_dotted_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == {
        "a.c": (2, 5),
        "d": (3, None),
        "e": (None, 4),
    }


def test_two_studies_of_one_job_are_equal_whatever_runs_at_once(tmp_path: Path) -> None:
    """qmc and no pruning: the set of rows does not depend on the order in which trials end."""
    found = []
    for at_once in (1, 4):
        job = toy_job(tmp_path / str(at_once), ["search.trials=8", "search.sampler=qmc", "search.pruner.kind=none"])
        study = open_study(job)
        run_all(study, at_once)
        study.close()
        found.append({(row["trial_id"], row["config_id"], row["seed"], row["val_score"]) for row in trials(job)})
    assert found[0] == found[1]


def test_the_tables_open_where_people_open_tables(study_folder: Path) -> None:
    import duckdb
    import pandas as pd

    job = toy_job(study_folder)
    study = open_study(job)
    run_all(study)
    study.close()
    count = duckdb.sql(f"select count(*) from '{study_folder}/trials/*.parquet'").fetchall()
    assert count == [(8,)]
    assert len(pd.read_parquet(study_folder / "trials")) == 8
    assert isinstance(results.query(study_folder, "select arm, count(*) n from trials group by all"), pa.Table)
