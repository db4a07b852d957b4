"""Proposals: what each sampler asks, that a rebuilt arm goes on alike, and what spaces are refused."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from frostline.propose import Proposal, Proposer, SpaceError, build_pruner, distributions, strong_defaults
from frostline.spec import Pruner
from frostline.testing import toy_job

STAGES = 4


def proposer(*overrides: str, budget: int = 40) -> Proposer:
    job = toy_job(Path("unused"), [f"search.trials={budget}", *overrides])
    return Proposer(job, "freeze", STAGES, budget)


def worth(values: dict, number: int) -> float:
    """A score that falls with the distance from depth 2, no two alike."""
    return -abs(values["freeze.depth"] - 2) - number * 1e-3


def drive(arm: Proposer, first: int, last: int) -> list[dict]:
    """Ask, report and tell trials one after the other; what happened, as rows would have it."""
    history = []
    for number in range(first, last):
        proposal = arm.ask()
        score = worth(proposal.values, number)
        status = "pruned" if arm.report(number, 1, score) else "complete"
        attrs = arm.tell(number, status, score if status == "complete" else None)
        history.append({"proposal": proposal, "status": status, "score": score, "attrs": attrs})
    return history


def rebuild(arm: Proposer, history: list[dict]) -> None:
    """Restore from what went through JSON, as it does in a table."""
    for trial in history:
        proposal = Proposal(**json.loads(json.dumps(trial["proposal"].__dict__)))
        score = trial["score"] if trial["status"] == "complete" else None
        attrs = json.loads(json.dumps(trial["attrs"]))
        arm.restore(proposal, status=trial["status"], score=score, epochs={1: trial["score"]}, attrs=attrs)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_rebuilt_arm_goes_on_as_if_nothing_had_happened(sampler: str) -> None:
    undisturbed = drive(proposer(f"search.sampler={sampler}"), 0, 40)
    again = proposer(f"search.sampler={sampler}")
    rebuild(again, undisturbed[:20])
    assert drive(again, 20, 40) == undisturbed[20:]
    assert {trial["status"] for trial in undisturbed} == {"complete", "pruned"}


def test_tpe_learns_where_random_does_not() -> None:
    tpe = drive(proposer("search.pruner.kind=none", "search.startup_trials=10"), 0, 40)
    random = drive(proposer("search.pruner.kind=none", "search.sampler=random"), 0, 40)
    hits = [sum(trial["proposal"].values["freeze.depth"] == 2 for trial in trials[10:]) for trials in (tpe, random)]
    assert hits[0] > hits[1]


def test_qmc_does_not_depend_on_how_many_trials_run_at_once() -> None:
    one_by_one = [trial["proposal"].values for trial in drive(proposer("search.sampler=qmc"), 0, 16)]
    arm = proposer("search.sampler=qmc")
    at_once = [arm.ask().values for _ in range(16)]
    assert at_once == one_by_one


def test_an_arm_that_was_interrupted_keeps_what_it_had_asked() -> None:
    arm = proposer()
    asked = [arm.ask() for _ in range(5)]
    again = proposer()
    for proposal in asked:
        again.restore(proposal)
    assert [again.values(number) for number in range(5)] == [proposal.values for proposal in asked]
    assert again.ask().values == arm.ask().values
    assert again.tell(3, "complete", 0.5) == arm.tell(3, "complete", 0.5)


def test_a_grid_asks_each_point_once() -> None:
    space = {"freeze.depth": [0.0, 0.5, 1.0], "head.hidden": {"low": 0, "high": 32, "step": 16}}
    arms = {"freeze": {"strategy": "freeze_depth", "sampler": "grid", "space": space}}
    job = toy_job(Path("unused"), ["search.trials=9"], arms=arms)
    arm = Proposer(job, "freeze", STAGES, 9)
    asked = {
        (trial["proposal"].values["freeze.depth"], trial["proposal"].values["head.hidden"])
        for trial in drive(arm, 0, 9)
    }
    assert asked == {(depth, hidden) for depth in (0.0, 0.5, 1.0) for hidden in (0, 16, 32)}
    with pytest.raises(SpaceError, match="only 9 points; lower search.trials to 9"):
        Proposer(job, "freeze", STAGES, 10)


def test_strong_defaults_come_first() -> None:
    arm = proposer()
    first, second = arm.ask().values, arm.ask().values
    assert first["freeze.depth"] == STAGES  # the linear probe
    assert second == {"freeze.depth": 0, "head.hidden": 0, "train.lr": 3e-4, "train.head_lr": 3e-3}
    assert proposer("search.defaults=false").defaults == []


def test_defaults_outside_a_range_are_its_nearest_end() -> None:
    job = toy_job(Path("unused"), ['arms.freeze.space."train.lr".low=0.001', 'arms.freeze.space."train.lr".high=0.01'])
    arm = job.arms["freeze"]
    assert strong_defaults(job, arm, distributions(arm, STAGES), STAGES)[0]["train.lr"] == 0.001


def test_depths_that_freeze_the_same_stages_are_one_choice() -> None:
    job = toy_job(Path("unused"), ['arms.freeze.space."freeze.depth"=[0.0, 0.05, 2, 0.5, 1.0]'])
    found = distributions(job.arms["freeze"], STAGES)["freeze.depth"]
    assert isinstance(found, optuna.distributions.CategoricalDistribution)
    assert found.choices == (0.0, 2, 1.0)


def test_more_stages_than_the_backbone_has_are_refused() -> None:
    job = toy_job(Path("unused"), ['arms.freeze.space."freeze.depth"=[1, 9]'])
    with pytest.raises(SpaceError, match="holds 9: freeze.depth = 9: this backbone has 4 stages"):
        distributions(job.arms["freeze"], STAGES)


def test_halving_stops_nothing_before_its_grace_and_two_of_three_after_it() -> None:
    arm = proposer("search.pruner.grace_epochs=2", "search.pruner.factor=3", budget=9)
    stopped = []
    for number in range(9):
        arm.ask()
        assert not arm.report(number, 1, -number)
        stopped.append(arm.report(number, 2, -number))
    assert stopped == [False] + [True] * 8  # each is worse than the first


def test_a_failed_trial_counts_and_has_no_value() -> None:
    arm = proposer()
    arm.ask()
    arm.tell(0, "failed", None)
    assert arm.study.trials[0].state == optuna.trial.TrialState.FAIL
    assert arm.asked == 1


@pytest.mark.parametrize("kind", ["halving", "median", "none"])
def test_every_pruner_is_built(kind: str) -> None:
    assert isinstance(build_pruner(Pruner(kind=kind)), optuna.pruners.BasePruner)
