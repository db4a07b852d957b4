"""What arms may spend: equal shares of trials, steps and device seconds, dear phases and failures charged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.budget import Budget
from frostline.spec import Search


def row(arm: str, **columns: Any) -> dict[str, Any]:
    return {"arm": arm, "epochs": 3, "n_train": 100, "batch_size": 32, "alone_s": 6.0, "seconds": 1.0, **columns}


def test_without_limits_an_arm_has_its_share_of_the_trials() -> None:
    budget = Budget(Search(trials=8), {"a": 4, "b": 4})
    assert [budget.left("a", asked) for asked in range(5)] == [4, 3, 2, 1, 0]
    budget.charge(row("a"))
    assert budget.left("a", 1) == 3


def test_an_arm_ends_where_its_share_of_the_seconds_is_spent() -> None:
    """10 seconds an arm: a trial takes 6 by itself, whatever it took here, so that a second one is the last."""
    budget = Budget(Search(trials=200, device_s=20.0), {"a": 100, "b": 100})
    budget.charge(row("a"))
    assert budget.left("a", 1) == 1
    assert budget.left("a", 2) == 0, "the second is running, and takes the rest"
    budget.charge(row("a", epochs=1, alone_s=2.0))
    assert budget.left("a", 2) == 1, "it was stopped early, and 2 seconds are left"
    budget.charge(row("a"))
    assert budget.left("a", 3) == 0
    assert (budget.left("b", 0), budget.left("b", 1)) == (1, 0), "one, until it is known what one costs"


def test_failures_and_unknown_costs_are_charged() -> None:
    budget = Budget(Search(trials=20, device_s=4.0), {"a": 20})
    budget.charge(row("a", epochs=0, n_train=None, alone_s=None, seconds=4.5))
    assert budget.left("a", 1) == 0


def test_steps_are_epochs_times_mini_batches() -> None:
    budget = Budget(Search(trials=20, steps=24), {"a": 10, "b": 10})
    budget.charge(row("a"))  # 3 epochs of 4 mini-batches, the last of 4 images
    assert (budget.left("a", 1), budget.spent["steps"]["a"]) == (0, 12)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=60), st.floats(1, 200))
def test_an_arm_alone_spends_its_limit_and_at_most_a_trial_more(costs: list[float], limit: float) -> None:
    """One after the other, as many as there are."""
    budget, asked = Budget(Search(trials=60, device_s=limit), {"a": 60}), 0
    for cost in costs:
        if not budget.left("a", asked):
            break
        asked += 1
        budget.charge(row("a", alone_s=cost))
    spent = sum(costs[:asked])
    assert spent - costs[asked - 1] < limit
    assert spent >= limit or asked == len(costs)


@pytest.mark.parametrize("limit", [{"steps": 0}, {"device_s": 0.0}])
def test_a_limit_is_above_zero(limit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        Search(**limit)
