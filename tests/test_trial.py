"""The spine: rows, the equality of cached and live training (P4), failures, peak memory, determinism."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frostline import trial as trial_module
from frostline.data import load_data, subset
from frostline.features import FeatureStore, image_fetch
from frostline.prepare import prepare
from frostline.results import SCHEMAS, table_of
from frostline.rows import failure
from frostline.spec import Job, TrialSpec, configure, confirm_seeds, search_seeds
from frostline.testing import toy_job
from frostline.trial import Outcome, attempt, run_trial
from frostline.world import World


def spec_of(job: Job, values: dict[str, Any], round_: str = "search", number: int = 0) -> TrialSpec:
    job = prepare(job).job
    seed, seeds = search_seeds(job, "freeze", number) if round_ == "search" else confirm_seeds(job, number)
    config = configure(job, job.arms["freeze"], values)
    return TrialSpec(
        trial_id=f"freeze-{number:05d}",
        arm="freeze",
        number=number,
        round=round_,
        seed=seed,
        seeds=seeds,
        data=job.data,
        backbone=job.backbone,
        config=config,
        objective=job.objective,
        resources=job.resources,
    )


def run(spec: TrialSpec, report=lambda _: True, store: FeatureStore | None = None) -> Outcome:
    return attempt(spec, store=store or FeatureStore(), world=World.here(spec.resources), report=report)


VALUES = {"head.hidden": 0, "train.lr": 1e-3, "train.head_lr": 1e-2}
TIMES = ("seconds", "device_s", "_at", "peak_mib")


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
    assert row["inputs"] == ("features" if depth == 3 else "images")
    assert row["n_train"] == 100
    assert row["epochs"] == row["epochs_asked"] == 3
    assert row["test_score"] is None
    assert 0 < row["peak_mib"] < 8192
    assert row["trainable_params"] <= row["total_params"]
    assert json.loads(row["applied_lrs"])["head"] == 1e-2
    assert TrialSpec.model_validate_json(row["spec"]) == spec
    missing = {name for name in SCHEMAS["trials"].names if row[name] is None}
    assert missing == {"error_kind", "reason", "error", "finalist_of", "ask_seq", "tell_seq", "sampler", "n_test"} | {
        name for name in SCHEMAS["trials"].names if name.startswith("test_")
    }


def test_a_confirmation_is_scored_on_test_once_with_predictions_and_a_bundle(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 1}, "confirm")
    outcome = run(spec)
    test = load_data(spec.data, spec.seeds.split).indices("test")
    hits = [prediction["label"] == prediction["predicted"] for prediction in outcome.predictions]
    assert len(hits) == len(test) == outcome.row["n_test"]
    assert outcome.row["test_accuracy"] == np.mean(hits) == outcome.row["test_score"]
    assert sum(outcome.predictions[0]["probabilities"]) == pytest.approx(1)
    assert set(outcome.bundle) == {"model.safetensors", "bundle.json", "README.md"}


def losses(spec: TrialSpec, store: FeatureStore) -> list[tuple[float, float]]:
    records: list[tuple[float, float]] = []
    outcome = run(spec, lambda record: records.append((record.train_loss, record.val["nll"])) or True, store)
    assert outcome.row["status"] == "complete", outcome.row["error"]
    return records


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_on_cached_features_is_training_on_images(
    tmp_path: Path, hidden: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4: to 1e-4 in the loss over 3 epochs in float32 (the sums differ in order, and AdamW amplifies the last bit)."""
    values = {**VALUES, "freeze.depth": 3, "head.hidden": hidden, "head.dropout": dropout}
    spec = spec_of(toy_job(tmp_path), values)
    cached = losses(spec, FeatureStore())

    calls: list[int] = []

    prepared = prepare(toy_job(tmp_path))

    def live_rows(_table: torch.Tensor, _samples: np.ndarray) -> Callable[[np.ndarray], torch.Tensor]:
        images = image_fetch(prepared.backbone, prepared.dataset, torch.device("cpu"))

        def fetch(wanted: np.ndarray) -> torch.Tensor:
            calls.append(len(wanted))
            with torch.no_grad():
                return prepared.backbone.module(images(wanted))

        return fetch

    monkeypatch.setattr(trial_module, "feature_fetch", live_rows)
    live = losses(spec, FeatureStore())
    assert sum(calls) > 3 * 100
    np.testing.assert_allclose(cached, live, rtol=1e-4)


def test_a_pass_over_the_frozen_backbone_is_made_once_for_all_trials(tmp_path: Path) -> None:
    job, store = toy_job(tmp_path), FeatureStore()
    rows = [run(spec_of(job, {**VALUES, "freeze.depth": 3}, number=number), store=store).row for number in range(3)]
    n_val = rows[0]["n_val"]
    assert [row["images_forward"] for row in rows] == [100 + n_val, 0, 0]
    assert store.images_forwarded == 100 + n_val


def test_a_small_store_forgets_what_was_used_least_recently(tmp_path: Path) -> None:
    store = FeatureStore(budget_bytes=1)
    job = toy_job(tmp_path)
    run(spec_of(job, {**VALUES, "freeze.depth": 3}), store=store)
    once = store.images_forwarded
    run(spec_of(job, {**VALUES, "freeze.depth": 3}), store=store)
    assert store.images_forwarded > once


def test_a_stopped_trial_is_pruned_and_has_no_score(tmp_path: Path) -> None:
    row = run(spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 1}), lambda record: record.epoch < 2).row
    assert (row["status"], row["epochs"], row["val_score"]) == ("pruned", 2, None)
    assert row["last_score"] is not None
    assert row["reason"] == "stopped after epoch 2 of 3"


def test_a_stop_after_the_last_epoch_is_no_stop(tmp_path: Path) -> None:
    row = run(spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3}), lambda record: record.epoch < 3).row
    assert row["status"] == "complete"


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


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (ValueError("no"), "user_error"),
        (KeyError("no"), "internal"),
    ],
)
def test_failures_have_kinds(error: Exception, kind: str) -> None:
    assert failure(error)["error_kind"] == kind


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


def test_errors_of_the_spine_itself_are_raised(tmp_path: Path) -> None:
    spec = spec_of(toy_job(tmp_path), {**VALUES, "freeze.depth": 3})
    with pytest.raises(ZeroDivisionError):
        run(spec, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_trial(spec, store=FeatureStore(), world=World.here(spec.resources), report=lambda _: 1 / 0)
