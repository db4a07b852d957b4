"""Rank correlations between heads in closed form and trained ones."""

from __future__ import annotations

from typing import Any

import pytest

from frostline.agreement import agreements, told


def probes(scores: dict[int, float | None]) -> list[dict[str, Any]]:
    """The best of two methods at each cut has the score."""
    worse = [{"cut": cut, "val_score": None if score is None else score - 0.1} for cut, score in scores.items()]
    return [*worse, *({"cut": cut, "val_score": score} for cut, score in scores.items())]


def trial(freeze: int | None, score: float | None, head: int | None = 5, **more: Any) -> dict[str, Any]:
    return {"round": "search", "freeze_depth": freeze, "head_depth": head, "stages": 5, "val_score": score, **more}


PROBES = probes({1: 0.5, 2: 0.6, 3: 0.8, 4: 0.7, 5: None})


def test_the_best_of_each_depth_counts() -> None:
    trials = [trial(1, 0.9), trial(1, 0.2), trial(2, 0.91), trial(3, 0.95), trial(3, 0.1), trial(4, 0.93)]
    trials += [trial(0, 0.99), trial(5, 0.99), trial(2, None), trial(None, None), trial(2, float("nan"))]
    trials.append(trial(4, 0.99, round="confirm"))
    (found,) = agreements(PROBES, trials, "max")
    assert (found.by, found.cuts, found.trials, found.fewest) == ("freeze_depth", 4, 6, 1)
    assert found.tau == pytest.approx(1)
    assert found.depth_tau == pytest.approx(2 / 3)
    text = told(found)
    assert "best trial of each freeze depth: Kendall's tau 1.00, that of the depth alone 0.67" in text
    assert "(4 depths, 6 complete trials, at one depth 1; so few depths may agree by chance)" in text


def test_heads_within_the_network_are_compared_where_they_stand() -> None:
    trials = [trial(1, 0.9, head=1), trial(2, 0.8, head=2), trial(3, 0.6, head=3), trial(3, 0.7, head=3)]
    others = [trial(0, 0.1, head=1), trial(2, 0.99, head=3), trial(3, 0.99)]  # in which stages train
    (found,) = agreements(PROBES, [*trials, *others], "max")
    assert (found.by, found.cuts, found.trials, found.fewest) == ("head_depth", 3, 4, 1)
    assert found.tau == pytest.approx(-1)
    assert "against the best trained head at each depth: Kendall's tau -1.00" in told(found)
    (found,) = agreements(PROBES, [trial(cut, cut / 10, head=None) for cut in (1, 2, 3)], "max")
    assert (found.by, found.tau) == ("freeze_depth", pytest.approx(1))


def test_a_lower_score_is_better_where_the_objective_says_so() -> None:
    trials = [trial(1, 0.9), trial(2, 0.8), trial(2, 1.8), trial(3, 0.7)]
    (found,) = agreements(probes({1: 3.0, 2: 2.0, 3: 1.0}), trials, "min")
    assert found.tau == pytest.approx(1)


@pytest.mark.parametrize("trials", [[], [trial(1, 0.5), trial(2, 0.6)], [trial(1, 0.5), trial(2, 0.5), trial(3, 0.5)]])
def test_too_few_cuts_or_equal_scores_say_nothing(trials: list[dict[str, Any]]) -> None:
    assert agreements(PROBES, trials, "max") == []
    assert agreements([], [trial(cut, cut / 10) for cut in (1, 2, 3)], "max") == []
