"""What a study has found of each of its arms: its search, its finalist, and what the finalist did on fresh seeds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from frostline import results
from frostline.edges import at_the_edge
from frostline.finalists import best_probe, choose_finalists, remember
from frostline.models import digest
from frostline.spec import Arm, BackboneSpec, Confirm, Data, Mode, Objective, Search
from frostline.stats import Interval, calibration_error, expected_best, mean_interval

POINTS = 40
"""Of a tuning curve, beside powers of two."""

_COLUMNS = (
    *("trial_id", "arm", "number", "round", "status", "reason", "strategy", "seed", "finalist_of", "seconds"),
    *("val_score", "last_score", "test_score", "test_accuracy", "test_nll", "n_train", "n_test"),
    *("alone_s", "spent_s", "peak_mib", "trainable_params", "stored_bytes", "freeze_depth", "stages"),
)
_MEASURED = (
    *("test_score", "test_accuracy", "test_nll", "alone_s", "spent_s", "peak_mib", "stored_bytes"),
    *("n_train", "n_test"),
)
FROM_NOTHING = "scratch"
"""The strategy of an arm that starts from random weights."""
_COSTS = ("alone_s", "spent_s", "peak_mib", "stored_bytes")  # of a confirmation


@dataclass(frozen=True)
class SearchResult:
    """An arm's search, as JSON values."""

    counts: dict[str, int]
    """Status -> trials."""
    alone_s: float
    """What the trials would have taken one by one, with nothing stored or shared."""
    curve: list[dict[str, float]]
    """Score against budget: the expected best validation score of `trials` trials, and what those take in `alone_s`."""
    importance: dict[str, float] | None
    """Searched key -> its share, see frostline.importance; None for the reason in `no_importance`."""
    no_importance: str | None


@dataclass(frozen=True)
class Finalist:
    """An arm's best configuration by validation, and its confirmations, as JSON values. None: not known, or not measured."""

    trial_id: str
    config: dict[str, Any]
    """Searched key -> value."""
    val_score: float | None
    """In the search: the best of many looks better than it is."""
    freeze_depth: int | None
    stages: int | None
    edges: list[dict[str, Any]]
    """Values at the edge of their range: key, value, low, high, end (`low` or `high`)."""
    confirmations: list[dict[str, Any]]
    """By seed: trial_id, seed, test_score, test_accuracy, test_nll, calibration_error, alone_s, spent_s, peak_mib,
    stored_bytes, n_train, n_test; val_scores by epoch, in studies with an arm from nothing; of one that failed, the reason and
    no test scores."""
    failed: int
    """Of the confirmations."""
    test: Interval
    """Mean test score over the seeds that completed; the interval claims this train pool and this test set."""
    test_other_pools: Interval
    """The same for other train pools of the kind: see stats.mean_interval."""
    accuracy: Interval
    nll: Interval
    calibration_error: Interval
    """See stats.calibration_error."""
    alone_s: float | None
    """Mean over the seeds that completed, as the next two."""
    spent_s: float | None
    peak_mib: float | None
    """On a CPU that of the process, which may have run other trials before."""
    trainable_params: int | None
    stored_bytes: float | None
    """What a trained model takes on disk beside its backbone; mean over the seeds that completed."""


@dataclass(frozen=True)
class ArmResult:
    """An arm in a comparison."""

    label: str
    study: str
    """The study's folder."""
    arm: str
    strategy: str
    backbone: str
    search: SearchResult
    finalist: Finalist | None
    """None where no trial completed."""
    closed_form: Mapping[str, Any] | None
    """The row of the best head in closed form of its study, by val, which has an arm from nothing; else None."""

    @property
    def confirmations(self) -> list[dict[str, Any]]:
        """The finalist's."""
        return self.finalist.confirmations if self.finalist else []

    @property
    def scores(self) -> dict[int, float | None]:
        """Seed -> test score, None where the confirmation failed."""
        return {each["seed"]: each["test_score"] for each in self.confirmations}


@dataclass(frozen=True)
class Answers:
    """What a confirmation said of the test samples, in the order of their ids."""

    samples: str
    """Equal where the samples are."""
    correct: np.ndarray
    """(n,) bool."""
    confidence: np.ndarray
    """(n,) probability of the predicted class."""


@dataclass(frozen=True)
class StudyResult:
    """A study as a comparison reads it."""

    path: str
    name: str
    data: str
    metric: str
    mode: Mode
    task: tuple[str, str, int | None]
    """Hashes of data and split, and samples a class to train on: where they are equal, confirmations can be paired."""
    pool: int | None
    """Samples from which a confirmation draws those that it trains on."""
    overlap: float
    """Share of these that two confirmations have in common, on average; 1 where all train on the whole pool."""
    seeds: int
    """Confirmations of a finalist that the job asks for."""
    hardware: str
    arms: list[ArmResult]
    answers: dict[str, Answers]
    """Trial id -> what it said."""


def read_study(path: str | Path) -> StudyResult:
    """A study's arms, from Parquet alone. Raises what the readers in `results` raise, and NotAStudyError for a job that this
    version cannot read."""
    record = results.read_job(path)
    try:
        job, facts = record["job"], record["facts"]
        arms = {name: Arm.model_validate(raw) for name, raw in job["arms"].items()}
        data, backbone = Data.model_validate(job["data"]), BackboneSpec.model_validate(job["backbone"]).name
        objective, per_class = Objective.model_validate(job["objective"]), data.per_class
        mode, stages = objective.mode or "max", len(facts["stages"])
        task = (str(facts["data_hash"]), str(facts["split_hash"]), per_class)
        about = {"name": str(job["name"]), "data": data.path, "metric": objective.metric}
        seeds, hardware = Confirm.model_validate(job["confirm"]).seeds, str(facts["hardware"])
        searches = Search.model_validate(job["search"]).trials > 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise results.foreign(Path(path) / "job.json", error, "compare") from None
    rows = _rows(results.read_trials(path).select(_COLUMNS))
    asked = results.read_asks(path).select(["trial_id", "params"]).to_pydict()
    values = dict(zip(asked["trial_id"], map(json.loads, asked["params"]), strict=True))
    search = [row | {"values": values.get(row["trial_id"], {})} for row in rows if row["round"] == "search"]
    chosen = {best.trial_id for best in choose_finalists([remember(row) for row in search], "arms", mode)}
    fixed: dict[str, dict[str, Any]] = {}  # what stands for the one configuration of each arm, if nothing is searched
    if not searches:
        asked_for = [row for row in rows if row["round"] == "confirm"]
        fixed = {
            row["arm"]: row | {"trial_id": row["finalist_of"], "values": {}, "val_score": None} for row in asked_for
        }
        chosen = {row["trial_id"] for row in fixed.values()}
    confirmed = [row for row in rows if row["finalist_of"] in chosen]
    answers = read_answers(path, [row["trial_id"] for row in confirmed])
    pool, overlap = _overlap(path, per_class) if confirmed else (None, 1.0)
    worst = worst_of((row["last_score"] for row in rows), mode)
    curves, closed_form = {}, None
    if any(arm.strategy == FROM_NOTHING for arm in arms.values()):
        curves = _val_scores(path, [row["trial_id"] for row in confirmed])
        closed_form = best_probe(results.read_probes(path).to_pylist(), mode)
    found = []
    for name, arm in arms.items():
        own = [row for row in search if row["arm"] == name]
        best = next((row for row in own if row["trial_id"] in chosen), fixed.get(name))
        seeded = [
            _confirmation(row, answers, curves) for row in confirmed if best and row["finalist_of"] == best["trial_id"]
        ]
        finalist = _finalist(best, seeded, at_the_edge(arm, best["values"], stages), overlap) if best else None
        result = _search_result(arm, stages, own, worst, mode)
        found.append(ArmResult(name, str(path), name, arm.strategy, backbone, result, finalist, closed_form))
    return StudyResult(
        str(path),
        **about,
        mode=mode,
        task=task,
        pool=pool,
        overlap=overlap,
        seeds=seeds,
        hardware=hardware,
        arms=found,
        answers=answers,
    )


def read_answers(path: str | Path, trial_ids: Sequence[str]) -> dict[str, Answers]:
    """Trial id -> what it said of the test samples, of those of these trials that have predictions."""
    found = {}
    for table in results.prediction_parts(path):
        trials = np.asarray(table["trial_id"])
        for trial_id in set(trial_ids).intersection(trials):
            rows = table.filter(pa.array(trials == trial_id)).sort_by("sample_id").combine_chunks()
            if rows["label"].null_count:
                continue  # of no classification: nothing is right or wrong
            likely = np.asarray(rows["probabilities"].combine_chunks().flatten()).reshape(len(rows), -1)
            correct = np.asarray(rows["label"]) == np.asarray(rows["predicted"])
            found[trial_id] = Answers(digest(rows["sample_id"].to_pylist()), correct, likely.max(axis=1))
    return found


def worst_of(scores: Iterable[float | None], mode: Mode) -> float | None:
    """The worst of these scores, which is what a failure counts as; None where there is none."""
    known = [score for score in scores if score is not None]
    return (min(known) if mode == "max" else max(known)) if known else None


def tuning_curve(scores: Sequence[float], mode: Mode, alone_s: float | None) -> list[dict[str, float]]:
    """The expected best score of 1 to B / 2 of B trials with these scores, at powers of two and some between; `alone_s` is a
    trial's mean cost."""
    most = len(scores) // 2
    if not most:
        return []
    budgets = np.unique(
        [*(2**power for power in range(most.bit_length())), *np.geomspace(1, most, POINTS).round().astype(int)]
    )
    sign = 1 if mode == "max" else -1
    best = sign * expected_best(sign * np.asarray(scores), budgets)
    return [
        {"trials": n, "score": score} | ({} if alone_s is None else {"alone_s": n * alone_s})
        for n, score in zip(budgets.tolist(), best.tolist(), strict=True)
    ]


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows in which what is not finite is None."""
    bad = {name for name in table.column_names if pa.types.is_floating(table.schema.field(name).type)}
    return [
        {
            key: None if key in bad and value is not None and not math.isfinite(value) else value
            for key, value in row.items()
        }
        for row in table.to_pylist()
    ]


def _overlap(path: str | Path, per_class: int | None) -> tuple[int, float]:
    """Size of the train pool, and the share that two train subsets have in common, averaged over classes."""
    splits = results.read_splits(path).select(["split", "label"]).to_pydict()
    pool = Counter(label for split, label in zip(splits["split"], splits["label"], strict=True) if split == "train")
    return pool.total(), 1.0 if per_class is None else fmean(per_class / count for count in pool.values())


def _val_scores(path: str | Path, trial_ids: Sequence[str]) -> dict[str, list[float]]:
    """Trial id -> its val score after each epoch, of these trials."""
    table = results.read_epochs(path).select(["trial_id", "epoch", "val_score"])
    rows = table.filter(pa.array(np.isin(np.asarray(table["trial_id"]), trial_ids))).sort_by("epoch")
    found: dict[str, list[float]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["trial_id"], []).append(row["val_score"])
    return found


def _confirmation(
    row: Mapping[str, Any], answers: Mapping[str, Answers], curves: Mapping[str, list[float]]
) -> dict[str, Any]:
    said = answers.get(row["trial_id"])
    complete = row["status"] == "complete" and row["test_score"] is not None
    return {
        "trial_id": row["trial_id"],
        "seed": row["seed"],
        **{key: row[key] if complete else None for key in _MEASURED},
        "calibration_error": calibration_error(said.confidence, said.correct) if said and complete else None,
        "val_scores": curves.get(row["trial_id"], []),
        "reason": None if complete else row["reason"] or row["status"],
    }


def _finalist(
    best: Mapping[str, Any], confirmations: list[dict[str, Any]], edges: list[dict[str, Any]], overlap: float
) -> Finalist:
    confirmations = sorted(confirmations, key=lambda each: (len(each["trial_id"]), each["trial_id"]))  # -c2 before -c10
    known = {
        key: [each[key] for each in confirmations if each[key] is not None] for key in (*_MEASURED, "calibration_error")
    }
    costs = {key: fmean(known[key]) if known[key] else None for key in _COSTS}
    return Finalist(
        trial_id=best["trial_id"],
        config=best["values"],
        val_score=best["val_score"],
        freeze_depth=best["freeze_depth"],
        stages=best["stages"],
        edges=edges,
        confirmations=confirmations,
        failed=sum(each["test_score"] is None for each in confirmations),
        test=mean_interval(known["test_score"]),
        test_other_pools=mean_interval(known["test_score"], overlap),
        accuracy=mean_interval(known["test_accuracy"]),
        nll=mean_interval(known["test_nll"]),
        calibration_error=mean_interval(known["calibration_error"]),
        **costs,
        trainable_params=best["trainable_params"],
    )


def _search_result(
    arm: Arm, stages: int, trials: Sequence[Mapping[str, Any]], worst: float | None, mode: Mode
) -> SearchResult:
    """Pruned trials enter at their last epoch's score, failed ones at the worst that any trial of the study had."""
    from frostline.importance import importance  # Optuna takes a second to import

    costs = [row["alone_s"] for row in trials if row["alone_s"] is not None]
    scores = [row["last_score"] if row["status"] != "failed" else None for row in trials]
    scored = [worst if score is None else score for score in scores] if worst is not None else []
    sign = 1 if mode == "max" else -1
    shares = importance(arm, stages, [row["values"] for row in trials], [sign * score for score in scored])
    return SearchResult(
        counts={status: sum(row["status"] == status for row in trials) for status in results.STATUSES},
        alone_s=math.fsum(costs),
        curve=tuning_curve(scored, mode, fmean(costs) if costs else None),
        importance=shares if isinstance(shares, dict) else None,
        no_importance=shares if isinstance(shares, str) else None,
    )
