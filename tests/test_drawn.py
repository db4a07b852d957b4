"""What a report draws of a study's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from _studies import search_row, write_study
from frostline import drawn
from frostline.commit import commit_part
from frostline.results import table_of
from frostline.spec import Arm

ARM = Arm.model_validate(
    {"strategy": "freeze_depth", "space": {"freeze.depth": "all", "train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
)


def trial(number: int, score: float | None, status: str = "complete", **more: Any) -> dict[str, Any]:
    row = search_row("freeze", number, status, score) | {"lr": 1e-3, "head_lr": 1e-2, "values": {}}
    return row | dict.fromkeys(set(drawn.COLUMNS.values()) - row.keys()) | more


def test_thinning_keeps_the_best_and_the_order() -> None:
    trials = [trial(number, number / 1000) for number in range(1000)]
    kept = drawn.thinned(trials, 100, "max")
    assert len(kept) == 100
    assert kept[-50:] == trials[-50:]
    assert [each["number"] for each in kept] == sorted(each["number"] for each in kept)
    assert kept[0] == trials[0]
    assert drawn.thinned(trials, 100, "min")[:50] == trials[:50]
    assert drawn.thinned(trials, 1000, "max") == trials


def test_what_was_left_out_is_told() -> None:
    assert drawn.told(5, 5, "trials") == ""
    assert drawn.told(1500, 10_000, "trials").startswith("Drawn are 1,500 of 10,000 trials: the best")
    assert drawn.told(30, 99, "classes", "the worst") == "Drawn are 30 of 99 classes: the worst. "


def test_complete_trials_come_before_pruned_ones_and_failures_last() -> None:
    trials = [trial(0, None, "failed"), trial(1, 0.9, "pruned"), trial(2, 0.5), trial(3, 0.6)]
    assert [each["number"] for each in drawn.best_first(trials, "max")] == [3, 2, 1, 0]
    assert [each["number"] for each in drawn.best_first(trials, "min")] == [2, 3, 1, 0]


def test_two_scores_at_a_depth_have_no_interval_and_three_have() -> None:
    trials = [
        trial(n, score, freeze_depth=depth)
        for n, (depth, score) in enumerate([(1, 0.5), (1, 0.7), (2, 0.5), (2, 0.6), (2, 0.7)])
    ]
    two, three = drawn.depths([*trials, trial(9, 0.1, "pruned")], "max")
    assert (two["n"], two["low"], two["best"]) == (2, None, 0.7)
    assert three["low"] == pytest.approx(0.6 - 4.302653 * 0.1 / 3**0.5)


def test_a_rate_that_moves_nothing_has_no_cells() -> None:
    trials = [
        trial(n, 0.5 + n / 100, freeze_depth=n % 2 * 4, lr=10.0 ** -(n + 1), head_lr=10.0 ** -(n + 1)) for n in range(4)
    ]
    assert {cell["depth"] for cell in drawn.rate_cells(trials, "lr", "max")} == {0}
    cells = drawn.rate_cells(trials, "head_lr", "max")
    assert sum(cell["n"] for cell in cells) == 4
    assert all(cell["low"] < cell["high"] for cell in cells)
    assert drawn.rate_cells(trials[:1], "lr", "max") == []


def test_the_front_is_what_nothing_beats() -> None:
    trials = [
        trial(0, 0.5, alone_s=1.0),
        trial(1, 0.4, alone_s=2.0),
        trial(2, 0.9, alone_s=3.0),
        trial(3, None, "failed"),
    ]
    assert [each["number"] for each in drawn.front(trials, "alone_s", "max")] == [0, 2]
    assert [each["number"] for each in drawn.front(trials, "alone_s", "min")] == [0, 1]


def test_an_axis_for_each_key_that_varies() -> None:
    trials = [trial(0, 0.5, freeze_depth=1, lr=1e-4), trial(1, 0.7, "pruned", freeze_depth=3, lr=1e-2)]
    depth, lr, score = drawn.axes({"freeze": ARM}, trials)
    assert [axis.key for axis in (depth, lr, score)] == ["freeze.depth", "train.lr", "score"]
    assert lr.place(1e-3) == pytest.approx(0.5)
    assert depth.place(2) == pytest.approx(0.5)
    assert (score.low, score.high) == (0.5, 0.7)
    arm, *_ = drawn.axes({"freeze": ARM, "other": ARM}, trials)
    assert arm.choices == ("freeze", "other")
    assert arm.place("other") == 1.0
    assert arm.place("nobody") is None
    assert drawn.axes({"freeze": ARM}, [trial(0, None, "failed")]) == []


def test_long_training_is_thinned_to_the_last_epoch(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": []}, trials=1)
    epochs = [{"trial_id": "freeze-00000", "epoch": epoch, "phase": 0, "val_score": 0.5} for epoch in range(1, 502)]
    epochs += [{"trial_id": "freeze-00001", "epoch": 1, "phase": 0, "val_score": float("nan")}]
    rows = [search_row("freeze", 1, "failed", None)]
    commit_part(study_folder, {"epochs": table_of("epochs", epochs), "trials": table_of("trials", rows)}, 1)
    found = drawn.curves(study_folder, ["freeze-00000", "freeze-00001"])
    assert found[0]["epoch"] == 1
    assert found[-1]["epoch"] == 501
    assert len(found) <= drawn.EPOCHS + 1
    assert drawn.curves(study_folder, ["freeze-00001"]) == []
