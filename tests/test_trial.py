"""The spine: rows, failures, peak memory, determinism. That fast paths equal the plain one is in test_equality.py."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.data import load_data, subset
from frostline.features import Feed
from frostline.outcome import EpochRecord, Outcome
from frostline.pack import run_pack
from frostline.prepare import prepare
from frostline.results import SCHEMAS, table_of
from frostline.spec import Job
from frostline.testing import toy_job
from frostline.trial import Report, run_trial, trial_steps
from frostline.trialspec import TrialSpec, configure, confirm_seeds, search_seeds, trial_of
from frostline.world import World


def spec_of(job: Job, values: dict[str, Any], round_: str = "search", number: int = 0) -> TrialSpec:
    job = prepare(job).job
    seed, seeds = search_seeds(job, "freeze", number) if round_ == "search" else confirm_seeds(job, number)
    config = configure(job, job.arms["freeze"], values)
    return trial_of(
        job, config, seeds, trial_id=f"freeze-{number:05d}", arm="freeze", number=number, round=round_, seed=seed
    )


def run(spec: TrialSpec, report: Report = lambda _: True) -> Outcome:
    """The trial alone, as a pack of one."""
    outcomes: dict[str, Outcome] = {}
    hear = lambda records: {trial_id: report(record) for trial_id, record in records.items()}  # noqa: E731
    run_pack([spec], feed=Feed(), world=World.here(spec.resources), report=hear, finish=outcomes.update)
    return outcomes[spec.trial_id]


VALUES = {"head.hidden": 0, "train.lr": 1e-3, "train.head_lr": 1e-2}
TIMES = ("seconds", "spent_s", "_at", "peak_mib")


def steady(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMES) and not key.endswith(TIMES)}


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_a_row_is_complete_typed_and_repeats_exactly(tmp_path: Path, depth: int) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": depth})
    first, second = run(spec), run(spec)
    assert steady(first.row) == steady(second.row)
    row = table_of("trials", [first.row]).to_pylist()[0]
    assert row["status"] == "complete"
    assert row["val_score"] == row["last_score"]
    assert row["audit"] == "passed"
    assert row["freeze_depth"] == depth
    assert row["inputs"] == "images"
    assert row["n_train"] == 100
    assert row["epochs"] == row["epochs_asked"] == 3
    assert row["test_score"] is None
    assert 0 < row["peak_mib"] < 8192
    assert row["trainable_params"] <= row["total_params"]
    assert json.loads(row["applied_lrs"])["head"] == 1e-2
    assert TrialSpec.model_validate_json(row["spec"]) == spec
    missing = {name for name in SCHEMAS["trials"].names if row[name] is None}
    assert missing == {
        "error_kind",
        "reason",
        "error",
        "finalist_of",
        "ask_seq",
        "tell_seq",
        "pack",
        "lanes",
        "alone_s",
        "n_test",
        "stored_bytes",
    } | {name for name in SCHEMAS["trials"].names if name.startswith("test_")}


def test_a_confirmation_is_scored_on_test_once_with_predictions_and_a_bundle(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 1}, "confirm")
    outcome = run(spec)
    test = load_data(spec.data, spec.seeds.split).indices("test")
    hits = [prediction["label"] == prediction["predicted"] for prediction in outcome.predictions]
    assert len(hits) == len(test) == outcome.row["n_test"]
    assert outcome.row["test_accuracy"] == np.mean(hits) == outcome.row["test_score"]
    assert sum(outcome.predictions[0]["probabilities"]) == pytest.approx(1)
    assert set(outcome.bundle) == {"model.safetensors", "bundle.json", "README.md"}


def test_a_stopped_trial_is_pruned_and_has_no_score(tmp_path: Path) -> None:
    row = run(spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 1}), lambda record: record.epoch < 2).row
    assert (row["status"], row["epochs"], row["val_score"]) == ("pruned", 2, None)
    assert row["last_score"] is not None
    assert row["reason"] == "stopped after epoch 2 of 3"


def test_a_stop_after_the_last_epoch_is_no_stop(tmp_path: Path) -> None:
    row = run(spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3}), lambda record: record.epoch < 3).row
    assert row["status"] == "complete"


@pytest.mark.fault(34)
def test_a_diverging_trial_fails_as_non_finite(tmp_path: Path) -> None:
    job = toy_job(tmp_path, ["train.optimizer=sgd", "train.weight_decay=1.0", "train.schedule=constant"])
    row = run(spec_of(job, {"freeze.depth": 0, "train.lr": 10.0, "train.head_lr": 10.0})).row
    assert (row["status"], row["error_kind"], row["val_score"]) == ("failed", "non_finite", None)
    assert "try a lower learning rate" in row["reason"]
    table_of("trials", [row])


def test_a_failure_keeps_its_kind_and_the_end_of_its_traceback(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3})
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"per_class": 10_000})})
    row = run(spec).row
    assert (row["status"], row["error_kind"]) == ("failed", "data")
    assert "per_class = 10000" in row["reason"]
    assert row["error"].splitlines()[-1].startswith("frostline.files.DataError")
    assert row["epochs"] == 0
    table_of("trials", [row])


def test_every_training_option_runs(tmp_path: Path) -> None:
    options = ["train.clip_norm=1.0", "train.ema=0.9", "train.label_smoothing=0.1", "train.schedule=constant"]
    job = toy_job(tmp_path, [*options, "train.precision=bf16", "freeze.layer_decay=0.7", "objective.metric=nll"])
    outcome = run(spec_of(job, {**VALUES, "freeze.depth": 1, "freeze.norm": "batch"}, "confirm"))
    assert outcome.row["status"] == "complete", outcome.row["error"]
    assert outcome.row["precision"] == "bf16"
    assert outcome.row["val_score"] == outcome.row["val_nll"]


def test_the_average_of_the_weights_is_what_is_scored_and_kept(tmp_path: Path) -> None:
    """With a decay near one the averaged network has hardly moved from its start; without it, it has learned."""
    values = {**VALUES, "freeze.depth": 3}
    job = toy_job(tmp_path, ["train.epochs=10", "head.init=zero"])
    plain = run(spec_of(job, values, "confirm")).row
    slow = run(spec_of(toy_job(tmp_path, ["train.epochs=10", "head.init=zero", "train.ema=0.9999"]), values, "confirm"))
    assert slow.row["val_nll"] > plain["val_nll"]
    assert slow.row["test_nll"] > plain["test_nll"]


HEAD = 'arms.freeze.space."head.hidden"=0'


def test_a_probe_head_starts_where_the_closed_form_ends(tmp_path: Path) -> None:
    job = toy_job(tmp_path, ["train.epochs=1", "train.schedule=constant", "train.warmup=0.0", "head.init=probe", HEAD])
    tiny = {"freeze.depth": 3, "train.lr": 1e-9, "train.head_lr": 1e-9}
    probe = run(spec_of(job, tiny)).row
    random = run(spec_of(toy_job(tmp_path, ["train.epochs=1", HEAD]), tiny)).row
    assert probe["val_score"] > random["val_score"] + 0.2


def test_the_train_subset_of_a_confirmation_is_its_own_and_val_stays(tmp_path: Path) -> None:
    job = toy_job(tmp_path)
    search, confirm = (spec_of(job, {**VALUES, "freeze.depth": 3}, kind) for kind in ("search", "confirm"))
    dataset = load_data(search.data, search.seeds.split)
    assert load_data(confirm.data, confirm.seeds.split) is dataset
    drawn = [subset(dataset, 10, spec.seeds.subset) for spec in (search, confirm)]
    assert set(drawn[0]) != set(drawn[1])


def drive(steps: Generator[EpochRecord | None, bool | None, Outcome]) -> tuple[list[EpochRecord | None], Outcome]:
    """Send a trial on to its end; what it yielded and what it left."""
    yielded: list[EpochRecord | None] = []
    while True:
        try:
            yielded.append(steps.send(True if yielded and yielded[-1] else None))
        except StopIteration as end:
            return yielded, end.value


def test_a_trial_goes_step_by_step(tmp_path: Path) -> None:
    """Once when it is set up, then after each of an epoch's four steps: 100 images, 32 at a time."""
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 1})
    row: dict[str, Any] = {}
    steps = trial_steps(spec, feed=Feed(), world=World.here(spec.resources), row=row)
    assert next(steps) is None
    assert row["n_train"] == 100, "what is known by then is in the row"
    assert "status" not in row
    yielded, outcome = drive(steps)
    assert [record and record.epoch for record in yielded] == [
        *(None, None, None, 1, None, None, None, 2, None, None, None, 3)
    ]
    assert outcome.row is row
    assert steady(row) == steady(run(spec).row)


def test_a_trial_pays_by_the_clock_that_it_is_given(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3})
    ticks = (float(tick) for tick in range(10_000))
    _, outcome = drive(trial_steps(spec, feed=Feed(), world=World.here(spec.resources), row={}, clock=ticks.__next__))
    row = outcome.row
    assert row["spent_s"] == int(row["spent_s"]) > 10, "ticks"
    assert row["seconds"] < row["spent_s"]
    assert row["seconds_eval"] == 3, "a tick for each epoch"


def test_images_are_varied_as_the_job_says_and_exactly_so_again(tmp_path: Path) -> None:
    values = {**VALUES, "freeze.depth": 2}
    found = {}
    for views in ("0", "1", "2", "live"):
        spec = spec_of(toy_job(tmp_path, [f"augment.views={views}"]), values)
        rows = [run(spec).row for _ in range(2)]
        assert steady(rows[0]) == steady(rows[1])
        assert rows[0]["views"] == views
        assert rows[0]["images_forward"] == 3 * (rows[0]["n_train"] + rows[0]["n_val"])
        found[views] = rows[0]["val_nll"]
    assert len(set(found.values())) == 4


def test_errors_of_the_spine_itself_are_raised(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3})
    with pytest.raises(ZeroDivisionError):
        run(spec, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=lambda _: 1 / 0)
