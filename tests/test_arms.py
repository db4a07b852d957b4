"""What a study says of each of its arms."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from _studies import STAGES, confirm_row, search_row, write_study
from frostline.arms import read_answers, read_study, tuning_curve, worst_of
from frostline.commit import commit_part
from frostline.results import RECORD, NotAStudyError, read_trials, table_of


def found(arm: str, study: Path) -> Any:
    return next(each for each in read_study(study).arms if each.arm == arm)


def test_an_arm_by_hand(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"freeze": [0.9, 0.8, None, 0.85], "probe": []})
    arm = found("freeze", study)
    assert (arm.label, arm.strategy, arm.backbone, arm.study) == (
        "freeze",
        "freeze_depth",
        "timm/resnet10t",
        str(study),
    )
    assert arm.search.counts == {"complete": 6, "pruned": 3, "failed": 3}
    assert arm.search.alone_s == 18.0
    best = arm.finalist
    assert (best.trial_id, best.val_score, best.freeze_depth, best.stages) == ("freeze-00000", 0.97, 2, STAGES)
    assert set(best.config) == {"freeze.depth", "train.lr", "train.head_lr"}
    assert (best.test.n, best.failed) == (3, 1)
    assert best.test.mean == best.accuracy.mean == pytest.approx(0.85)
    assert best.nll.mean == pytest.approx(0.15)
    half = 4.302653 * 0.05 / 3**0.5
    assert (best.test.low, best.test.high) == pytest.approx((0.85 - half, 0.85 + half), abs=1e-6)
    wider = (1 / 3 + 0.25 / 0.75) ** 0.5 * 3**0.5
    assert best.test_other_pools.high == pytest.approx(0.85 + half * wider, abs=1e-6), "50 a class of 200"
    assert (best.alone_s, best.spent_s, best.peak_mib) == (2.0, 1.0, pytest.approx(100 + 4 / 3))
    assert (best.trainable_params, best.stored_bytes) == (5000, 20_100)
    assert best.confirmations[2]["reason"] == "RuntimeError: out of memory"
    assert best.confirmations[2]["test_score"] is best.confirmations[2]["calibration_error"] is None
    error = (0.9 * 0.1 + 0.1 * 0.6) / 1  # 0.9 sure where right, 0.6 sure where wrong
    assert best.confirmations[0]["calibration_error"] == pytest.approx(error)
    probe = found("probe", study)
    assert probe.confirmations == []
    assert probe.finalist.test.n == 0


def test_a_study_as_a_comparison_reads_it(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "s", {"freeze": [0.9, 0.8], "full": [0.8, 0.7]}))
    assert (study.name, study.data, study.metric, study.mode) == ("s", "digits", "accuracy", "max")
    assert (study.pool, study.overlap, study.seeds) == (400, 0.25, 2)
    assert study.task == ("digits", "s0", 50)
    whole = read_study(write_study(tmp_path / "w", {"full": [0.8, 0.7]}, per_class=None))
    assert (whole.pool, whole.overlap) == (400, 1.0)
    assert whole.arms[0].finalist is not None
    assert whole.arms[0].finalist.test_other_pools.low is None


def test_pruned_and_failed_trials_are_in_the_curve(tmp_path: Path) -> None:
    """Pruned ones at their last epoch's score, failed ones at the worst of the study; none of them vanishes."""
    study = write_study(tmp_path / "s", {"freeze": [0.9], "probe": [0.9]})
    rows = [row for row in _trials(study) if row["round"] == "search"]
    worst = min(row["last_score"] for row in rows if row["last_score"] is not None)
    own = [worst if row["status"] == "failed" else row["last_score"] for row in rows if row["arm"] == "probe"]
    curve = found("probe", study).search.curve
    assert [point["trials"] for point in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[0]["score"] == pytest.approx(fmean(own))
    assert curve[1]["score"] == pytest.approx(fmean(map(max, itertools.combinations(own, 2))))
    assert [point["alone_s"] for point in curve] == pytest.approx([2.0 * n for n in range(1, 7)])


def test_a_tuning_curve_of_a_loss_falls() -> None:
    losses = [3.0, 1.0, 2.0, 5.0]
    curve = tuning_curve(losses, "min", None)
    assert curve == [
        {"trials": 1, "score": pytest.approx(2.75)},
        {"trials": 2, "score": pytest.approx(fmean(map(min, itertools.combinations(losses, 2))))},
    ]
    assert tuning_curve([0.5], "max", 1.0) == []
    many = [point["trials"] for point in tuning_curve(list(np.arange(5000.0)), "max", 1.0)]
    assert len(many) < 60
    assert many[-1] == 2500
    assert {2**power for power in range(12)} <= set(many)
    assert worst_of([1.0, None, 3.0], "min") == 3.0
    assert worst_of([None], "max") is None


def test_a_longer_search_may_replace_a_finalist(tmp_path: Path) -> None:
    """The confirmations of the one that was best before are left out."""
    study = write_study(tmp_path / "s", {"freeze": [0.9, 0.9]})
    better = search_row("freeze", 12, "complete", 0.99)
    new = [confirm_row(better, n, 0.95, seed=n, n_test=200, n_train=100) for n in range(12)]
    tried = {"freeze.depth": 1, "train.lr": 1e-3, "train.head_lr": 1e-2}
    ask = {
        "seq": 12,
        "trial_id": "freeze-00012",
        "arm": "freeze",
        "number": 12,
        "batch": 12,
        "params": json.dumps(tried),
    }
    commit_part(study, {"asks": table_of("asks", [ask]), RECORD: table_of(RECORD, [better, *new[::-1]])}, 1)
    best = found("freeze", study).finalist
    assert best.trial_id == "freeze-00012"
    assert best.config == tried
    assert [each["trial_id"][-3:] for each in best.confirmations[-3:]] == ["-c9", "c10", "c11"]
    assert best.test.mean == pytest.approx(0.95)
    assert best.calibration_error.n == 0, "no predictions of these"


def test_answers_are_in_the_order_of_the_samples(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"freeze": [0.9, 0.25]}, n_test=20)
    answers = read_answers(study, ["freeze-00000-c0", "freeze-00000-c1", "nobody"])
    assert set(answers) == {"freeze-00000-c0", "freeze-00000-c1"}
    assert answers["freeze-00000-c1"].correct.tolist() == [True] * 5 + [False] * 15
    assert answers["freeze-00000-c1"].confidence == pytest.approx([0.9] * 5 + [0.6] * 15)
    assert len({each.samples for each in answers.values()}) == 1
    assert read_answers(study, []) == {}


def test_an_arm_without_a_complete_trial_has_no_finalist(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"freeze": [0.9], "full": []}, statuses=["failed"])
    rows = _trials(study)
    only = [row | {"status": "failed", "val_score": None, "last_score": None} for row in rows if row["arm"] == "full"]
    other = write_study(tmp_path / "t", {"full": []}, trials=0)
    commit_part(other, {RECORD: table_of(RECORD, only)}, 0)
    arm = found("full", other)
    assert arm.finalist is None
    assert arm.search.curve == []
    assert arm.search.importance is None
    assert arm.search.counts["failed"] == 12


def test_a_study_without_trials(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path / "s", {"freeze": [], "full": []}, trials=0))
    assert [arm.finalist for arm in study.arms] == [None, None]
    assert study.answers == {}


@pytest.mark.parametrize(
    "broken", [{"job": {}, "facts": {}}, {"job": {"arms": {"a": {"strategy": "melt"}}}, "facts": {}}]
)
def test_a_job_of_another_version_is_named(tmp_path: Path, broken: dict[str, Any]) -> None:
    study = write_study(tmp_path / "s", {"freeze": [0.9]})
    (study / "job.json").write_text(json.dumps(broken))
    with pytest.raises(NotAStudyError, match=r"s/job\.json was not written by a search of this version"):
        read_study(study)


def _trials(study: Path) -> list[dict[str, Any]]:
    return read_trials(study).to_pylist()
