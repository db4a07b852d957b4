"""Early stopping: each rule decides as Optuna's pruner does, and trials that report together compete."""

from __future__ import annotations

import math
import time
import warnings

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.halving import Halving, Median, Never, build_rule
from frostline.spec import Pruner

SCORES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), st.floats(-2, 2))
EVENTS = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 3), SCORES, st.sampled_from(["", "", "", "complete", "failed"])),
    max_size=80,
)
"""A trial reports some epochs after its last one; then it goes on or ends."""

STATES = {
    "complete": optuna.trial.TrialState.COMPLETE,
    "pruned": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
}


def both(rule: Halving | Median, pruner: optuna.pruners.BasePruner, events: list, *, maximize: bool) -> None:
    """Drive both with one history, and compare each decision."""
    study = optuna.create_study(direction="maximize" if maximize else "minimize", pruner=pruner)
    trials: dict[int, optuna.Trial] = {}
    last: dict[int, int] = {}
    ended: set[int] = set()
    compared = 0
    for number, further, score, end in events:
        if number in ended:
            continue
        trial = trials[number] if number in trials else trials.setdefault(number, study.ask())
        last[number] = last.get(number, 0) + further
        trial.report(score, last[number])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, for a median of NaN alone
            expected = trial.should_prune()
        assert rule.report({number: (last[number], score)}) == {number: expected}
        compared += 1
        if end or (expected and compared % 3):  # some go on although they should stop, as in their last epoch
            status = end or "pruned"
            study.tell(trial, 0.0 if status == "complete" else None, state=STATES[status])
            rule.end(number, status)
            ended.add(number)


@pytest.mark.parametrize("maximize", [True, False])
@given(events=EVENTS, grace=st.integers(1, 3), factor=st.integers(2, 4))
def test_halving_decides_as_optuna(maximize: bool, events: list, grace: int, factor: int) -> None:
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=factor)
    both(Halving(grace, factor, maximize=maximize), pruner, events, maximize=maximize)


@pytest.mark.parametrize("maximize", [True, False])
@given(
    before=st.lists(st.lists(SCORES, min_size=1, max_size=4), max_size=9), events=EVENTS, grace=st.integers(1, 3)
)  # with enough complete trials for a median
def test_the_median_decides_as_optuna(maximize: bool, before: list, events: list, grace: int) -> None:
    complete = [
        (100 + number, 1, score, "complete" if index == len(scores) - 1 else "")
        for number, scores in enumerate(before)
        for index, score in enumerate(scores)
    ]
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=grace)
    both(Median(grace, maximize=maximize), pruner, [*complete, *events], maximize=maximize)


def test_trials_that_report_together_are_compared_with_each_other() -> None:
    scores = {number: (1, score) for number, score in enumerate([0.1, 0.2, 0.9, 0.3, 0.8, 0.4, 0.7, 0.5, 0.6])}
    together = Halving(1, 3, maximize=True).report(scores)
    assert [number for number, stops in together.items() if not stops] == [2, 4, 6]
    rule = Halving(1, 3, maximize=True)
    one_by_one = {number: rule.report({number: score})[number] for number, score in scores.items()}
    assert [number for number, stops in one_by_one.items() if not stops] == [0, 1, 2]


def test_the_order_within_a_report_does_not_matter() -> None:
    scores = {0: (3, 0.5), 1: (1, 0.6), 2: (3, 0.4), 3: (9, 0.7), 4: (3, math.nan)}
    found = []
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        rule = Halving(1, 3, maximize=True)
        found.append(dict(sorted(rule.report({number: scores[number] for number in order}).items())))
    assert found[0] == found[1] == {0: True, 1: True, 2: True, 3: False, 4: True}


def test_nothing_is_stopped_before_its_grace() -> None:
    rule = Halving(2, 3, maximize=True)
    assert rule.report({0: (1, math.nan), 1: (1, -9.0)}) == {0: False, 1: False}
    assert rule.report({}) == {}


def test_a_report_costs_the_same_in_a_long_study() -> None:
    """50,000 trials in seconds; an ended trial leaves nothing but its scores."""
    rule, started = Halving(1, 3, maximize=True), time.process_time()
    for number in range(50_000):
        rule.report({number: (1, (number * 7919) % 50_021)})
        rule.end(number, "pruned")
    assert time.process_time() - started < 10
    assert not rule.reached
    assert [len(rung) for rung in rule.rungs] == [50_000]


def test_every_pruner_has_its_rule() -> None:
    halving = build_rule(Pruner(grace_epochs=2, factor=4), maximize=False)
    assert isinstance(halving, Halving)
    assert (halving.grace, halving.factor, halving.maximize) == (2, 4, False)
    assert isinstance(build_rule(Pruner(kind="median"), maximize=True), Median)
    never = build_rule(Pruner(kind="none"), maximize=True)
    assert isinstance(never, Never)
    assert never.report({3: (9, math.nan)}) == {3: False}
