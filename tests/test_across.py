"""Arms over several tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats

from _studies import write_study
from frostline.across import Across, across
from frostline.arms import ArmResult, read_study


def tasks(folder: Path, *scores: dict[str, list[float | None]], metric: str = "accuracy") -> list[list[ArmResult]]:
    return [
        read_study(write_study(folder / f"t{n}", each, trials=2, metric=metric)).arms for n, each in enumerate(scores)
    ]


def ranked(folder: Path, *scores: dict[str, list[float | None]], metric: str = "accuracy", mode="max") -> Across:
    found = across(tasks(folder, *scores, metric=metric), mode)
    assert found is not None
    return found


TWO = (
    {"full": [0.9, 0.8, 0.85], "freeze": [0.8, 0.8, 0.8], "probe": [0.5, 0.5, 0.6]},
    {"full": [0.6, 0.6, 0.7], "freeze": [0.7, 0.7, 0.7], "probe": [0.5, 0.4, 0.3]},
)


def test_ranks_and_interquartile_means(tmp_path: Path) -> None:
    found = ranked(tmp_path, *TWO)
    assert (found.tasks, found.seeds) == (2, 3)
    assert [(row["label"], row["mean_rank"]) for row in found.arms] == [("freeze", 1.5), ("full", 1.5), ("probe", 3.0)]
    full = found.arms[1]
    assert full["iqm"] == pytest.approx(scipy.stats.trim_mean([0.9, 0.8, 0.85, 0.6, 0.6, 0.7], 0.25))
    assert full["iqm_low"] < full["iqm"] < full["iqm_high"]
    assert found.friedman is not None
    assert found.friedman["chi_square"] == pytest.approx(3.0)
    assert [pair["p"] for pair in found.pairs] == [1.0, 0.5, 0.5]
    assert "No arm is distinguishable from another by ranks over tasks: 7 tasks at least" in found.verdict


def test_enough_tasks_tell_arms_apart(tmp_path: Path) -> None:
    many = [{"full": [0.9 - n / 100] * 2, "probe": [0.8 - n / 50] * 2} for n in range(6)]
    found = ranked(tmp_path, *many)
    assert found.friedman is None, "of two arms"
    assert found.pairs == [{"a": "full", "b": "probe", "p": 2**-5, "p_holm": 2**-5}]
    assert found.verdict == "Over 6 tasks full has the best mean rank, 1.00. Ranks tell full from probe."


def test_of_a_loss_the_least_ranks_best(tmp_path: Path) -> None:
    losses = ({"full": [0.2, 0.3], "probe": [0.6, 0.7]}, {"full": [0.1, 0.1], "probe": [0.2, 0.3]})
    found = ranked(tmp_path, *losses, metric="nll", mode="min")
    assert [row["label"] for row in found.arms] == ["full", "probe"]


def test_a_failed_seed_counts_as_the_worst_of_its_task(tmp_path: Path) -> None:
    failed = ({**TWO[0], "full": [0.9, None, None]}, TWO[1])
    found = ranked(tmp_path, *failed)
    full = next(row for row in found.arms if row["label"] == "full")
    assert full["iqm"] == pytest.approx(scipy.stats.trim_mean([0.9, 0.5, 0.5, 0.6, 0.6, 0.7], 0.25))
    assert full["mean_rank"] == 2.0


def test_nothing_is_said_over_tasks_without_two_arms_in_all(tmp_path: Path) -> None:
    assert across(tasks(tmp_path / "a", TWO[0]), "max") is None
    assert across(tasks(tmp_path / "b", {"full": [0.9]}, {"probe": [0.9]}), "max") is None
    assert across(tasks(tmp_path / "c", TWO[0], {"full": [0.9], "freeze": [], "probe": []}), "max") is None
    assert across(tasks(tmp_path / "d", TWO[0], {"full": [None], "freeze": [None]}), "max") is None
