"""Proposals: what each sampler asks, alone and in batches, that a rebuilt arm goes on alike, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers._tpe.sampler import _split_trials

from frostline.propose import (
    FITS,
    Proposer,
    SpaceError,
    _entry,
    batch,
    distributions,
    precisions,
    rank,
    shuffled,
    strong_defaults,
)
from frostline.testing import toy_job

STAGES = 4
NARROW = {"freeze.depth": [0.0, 0.5, 1.0], "head.hidden": {"low": 0, "high": 32, "step": 16}}  # 9 points


def proposer(*overrides: str, budget: int = 40, space: dict[str, Any] | None = None) -> Proposer:
    arms = {"arms": {"freeze": {"strategy": "freeze_depth", "space": space}}} if space is not None else {}
    job = toy_job(Path("unused"), [f"search.trials={budget}", *overrides], **arms)
    return Proposer(job, "freeze", STAGES, budget)


def worth(values: dict[str, Any], number: int) -> float:
    """A score that falls with the distance from depth 2, no two alike."""
    return -abs(values["freeze.depth"] - 2) - number * 1e-3


def drive(arm: Proposer, last: int, *, most: int = 1) -> list[dict[str, Any]]:
    """Ask, report and tell in batches up to a number; what happened, as rows would have it."""
    history = []
    while arm.asked < last:
        first, asked = arm.asked, arm.ask(min(most, last - arm.asked))
        scores = {number: worth(values, number) for number, values in enumerate(asked, first)}
        stops = arm.report({number: (1, score) for number, score in scores.items()})
        for (number, score), values in zip(scores.items(), asked, strict=True):
            status = "failed" if number % 11 == 5 else "pruned" if stops[number] else "complete"
            arm.tell(number, status, score if status == "complete" else None)
            history.append({"values": values, "status": status, "score": score})
    return history


def rebuild(arm: Proposer, history: list[dict[str, Any]]) -> None:
    """Restore from what went through JSON, as it does in a table."""
    for trial in json.loads(json.dumps(history)):
        score = trial["score"] if trial["status"] == "complete" else None
        arm.restore(trial["values"], status=trial["status"], score=score, epochs={1: trial["score"]})


@pytest.mark.parametrize("pruner", ["halving", "median"])
@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_rebuilt_arm_goes_on_as_if_nothing_had_happened(sampler: str, most: int, pruner: str) -> None:
    options = [f"search.sampler={sampler}", f"search.pruner.kind={pruner}", "search.history=20"]
    undisturbed = drive(proposer(*options, budget=80), 80, most=most)
    again = proposer(*options, budget=80)
    rebuild(again, undisturbed[:40])
    assert drive(again, 80, most=most) == undisturbed[40:]
    assert {trial["status"] for trial in undisturbed} == {"complete", "pruned", "failed"}


def test_the_number_of_lanes_is_part_of_what_is_replayed_and_the_seed_is_too() -> None:
    first = drive(proposer(), 40, most=8)
    assert drive(proposer(), 40, most=8) == first
    fewer = drive(proposer(), 40, most=4)
    assert [trial["values"] for trial in fewer[:4]] == [trial["values"] for trial in first[:4]]  # at random so far
    assert fewer[4:] != first[4:]
    assert drive(proposer("seed=1"), 40, most=8)[2:] != first[2:]


def test_a_batch_is_one_history_whatever_its_trials_report_later() -> None:
    arm = proposer("search.startup_trials=3", budget=40)
    drive(arm, 8)
    together = arm.ask(4)
    again = proposer("search.startup_trials=3", budget=40)
    drive(again, 8)
    assert again.ask(4) == together
    assert len({tuple(values.values()) for values in together}) == 4


def test_tpe_learns_where_random_does_not() -> None:
    options = ["search.pruner.kind=none", "search.startup_trials=10"]
    hits = [
        sum(trial["values"]["freeze.depth"] == 2 for trial in drive(proposer(*options, *more), 40, most=most)[10:])
        for more, most in (([], 1), ([], 3), (["search.sampler=random"], 1))
    ]
    assert hits[0] > 1.5 * hits[2]
    assert hits[1] > 1.5 * hits[2]


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_a_point_depends_on_its_number_alone(sampler: str) -> None:
    one_by_one = [trial["values"] for trial in drive(proposer(f"search.sampler={sampler}"), 21)]
    arm = proposer(f"search.sampler={sampler}")
    assert arm.ask(5) + arm.ask(16) == one_by_one
    assert [arm.values(number) for number in range(21)] == one_by_one


def test_qmc_is_evener_than_random() -> None:
    def gaps(sampler: str) -> float:
        arm = proposer(f"search.sampler={sampler}", "search.defaults=false", budget=128)
        rates = sorted(math.log10(values["train.lr"]) for values in arm.ask(128))
        return float(np.max(np.diff([-4.0, *rates, -2.0])))

    assert gaps("qmc") <= 2 * 2 / 128 < gaps("random")


def test_an_arm_that_was_interrupted_keeps_what_it_had_asked() -> None:
    arm = proposer()
    asked = arm.ask(5)
    again = proposer()
    for values in asked:
        again.restore(values)
    assert [again.values(number) for number in range(5)] == asked
    assert again.ask() == arm.ask()
    again.tell(3, "complete", 0.5)
    assert (again.ended, sorted(again.running)) == (1, [0, 1, 2, 4, 5])


@pytest.mark.parametrize("most", [1, 4])
def test_a_grid_asks_each_point_once(most: int) -> None:
    arm = proposer("search.sampler=grid", budget=9, space=NARROW)
    asked = [trial["values"] for trial in drive(arm, 9, most=most)]
    points = {(values["freeze.depth"], values["head.hidden"]) for values in asked}
    assert points == {(depth, hidden) for depth in (0.0, 0.5, 1.0) for hidden in (0, 16, 32)}
    assert asked != sorted(asked, key=lambda values: tuple(values.values()))
    with pytest.raises(SpaceError, match="only 9 points; lower search.trials to 9"):
        proposer("search.sampler=grid", budget=10, space=NARROW)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_no_configuration_comes_twice_and_a_finite_space_ends(sampler: str, most: int) -> None:
    arm = proposer(f"search.sampler={sampler}", "search.startup_trials=2", budget=9, space=NARROW)
    assert arm.points == 9
    asked = [trial["values"] for trial in drive(arm, 9, most=most)]
    assert len({tuple(values.values()) for values in asked}) == 9
    with pytest.raises(AssertionError, match="9 configurations, 9 asked for"):
        arm.ask()


def test_configurations_survive_as_they_are_stored() -> None:
    space = {
        "freeze.depth": [0, 2, 1],
        "head.hidden": {"low": 0, "high": 32, "step": 16},
        "head.dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
        "train.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "train.epochs": {"low": 1, "high": 9, "log": True},
    }
    options = ["search.startup_trials=20", "search.pruner.kind=none"]
    first = drive(proposer(*options, budget=200, space=space), 200, most=64)
    arm = proposer(*options, budget=200, space=space)
    rebuild(arm, first)
    assert [arm.values(number) for number in range(200)] == [trial["values"] for trial in first]
    assert {trial["values"]["head.dropout"] for trial in first} == {0.0, 0.1, 0.2, 0.3}
    assert {trial["values"]["train.epochs"] for trial in first} == set(range(1, 10))
    assert {tuple(map(type, trial["values"].values())) for trial in first} == {(int, float, int, int, float)}


@pytest.mark.parametrize("value", [1, 1.0, True])
def test_equal_choices_of_different_types_are_different_choices(value: Any) -> None:
    dist = optuna.distributions.CategoricalDistribution([1, 1.0, True])
    assert type(dist.to_external_repr(_entry(dist, value))) is type(value)


def test_the_points_of_a_space_are_counted() -> None:
    assert proposer().points is None
    fixed = proposer(space={"freeze.depth": 2})
    assert fixed.points == 1
    assert fixed.ask() == [{}]
    one = proposer(space={"freeze.depth": [1.0]})  # both strong defaults are this
    assert (one.points, one.ask()) == (1, [{"freeze.depth": 1.0}])


def test_strong_defaults_come_first() -> None:
    first, second = proposer().ask(2)
    assert first["freeze.depth"] == STAGES  # the linear probe
    assert second == {"freeze.depth": 0, "head.hidden": 0, "train.lr": 3e-4, "train.head_lr": 3e-3}
    assert proposer("search.defaults=false").defaults == []


def test_defaults_outside_a_range_are_its_nearest_end() -> None:
    job = toy_job(Path("unused"), ['arms.freeze.space."train.lr".low=0.001', 'arms.freeze.space."train.lr".high=0.01'])
    arm = job.arms["freeze"]
    assert strong_defaults(job, distributions(arm, STAGES))[0]["train.lr"] == 0.001


@pytest.mark.parametrize(
    ("space", "added"),
    [
        ({"freeze.depth": "all"}, [{"freeze.depth": 2}]),
        ({"freeze.depth": [0.0, 0.75, 1.0]}, [{"freeze.depth": 0.75}]),
        (
            {"freeze.depth": "all", "head.depth": "all"},
            [{"freeze.depth": 4, "head.depth": 2}, {"freeze.depth": 0, "head.depth": 2}],
        ),
        ({"freeze.depth": 1, "head.depth": [1, 4]}, [{"head.depth": 1}]),
        (
            {"freeze.depth": 1, "head.depth": "all", "head.init": ["random", "probe"]},
            [{"head.depth": 2, "head.init": "probe"}],
        ),
        ({"freeze.depth": 1, "head.init": ["random", "probe"]}, [{"head.init": "probe"}]),
        ({"freeze.depth": [2, 4]}, []),
        ({"freeze.depth": [1, 2, 4]}, [{"freeze.depth": 2}]),
        ({"freeze.depth": 1, "train.lr": [3e-4]}, []),
    ],
)
def test_an_arm_begins_where_features_serve_best(space: dict[str, Any], added: list[dict[str, Any]]) -> None:
    arm = proposer(space=space)
    first = len(arm.defaults)
    arm.begin_at(2)
    assert len(arm.defaults) == first + len(added)
    entries = [dict(zip(arm.space, point, strict=True)) for point in arm.defaults[first:]]
    found = [{path: arm.space[path].to_external_repr(entry) for path, entry in each.items()} for each in entries]
    assert found == [{**each, **({"train.lr": 3e-4} if "train.lr" in each else {})} for each in added]
    assert proposer("search.defaults=false", space=space).defaults == []


def test_a_head_stands_after_a_stage() -> None:
    job = toy_job(Path("unused"), ['arms.freeze.space."head.depth"="all"'])
    found = distributions(job.arms["freeze"], STAGES)["head.depth"]
    assert isinstance(found, optuna.distributions.IntDistribution)
    assert (found.low, found.high) == (1, STAGES)
    first, *_ = strong_defaults(job, distributions(job.arms["freeze"], STAGES))
    assert (first["freeze.depth"], first["head.depth"]) == (STAGES, STAGES)
    for wrong, message in (([0, 1], "a head stands after at least one stage"), ([5], "this backbone has 4 stages")):
        arm = toy_job(Path("unused"), [f'arms.freeze.space."head.depth"={wrong}']).arms["freeze"]
        with pytest.raises(SpaceError, match=message):
            distributions(arm, STAGES)


def test_defaults_are_the_choices_that_equal_them() -> None:
    arm = proposer(space={"freeze.depth": "all", "head.dropout": [0, 0.5]})
    assert [type(values["head.dropout"]) for values in arm.ask(2)] == [int, int]


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
        assert arm.report({number: (1, -number)}) == {number: False}
        stopped.append(arm.report({number: (2, -number)})[number])
    assert stopped == [False] + [True] * 8  # each is worse than the first


def test_a_failed_trial_is_not_modelled() -> None:
    arm = proposer()
    arm.ask(2)
    arm.report({0: (1, 0.5)})
    arm.tell(0, "failed", None)
    arm.tell(1, "pruned", None)
    assert (arm.asked, arm.ended, arm.running) == (2, 1, {})
    assert [trial.number for *_, trial in arm.best] == [1]


@given(st.data())
def test_ranks_are_optunas(data: st.DataObject) -> None:
    """The arm keeps its best trials; which of these Optuna takes for good ones does not depend on what was forgotten."""
    score = st.one_of(st.sampled_from([0.0, 0.5]), st.floats(-1, 1))
    maximize = data.draw(st.booleans())
    options = ["search.startup_trials=90", *([] if maximize else ["objective.metric=nll"])]
    arm = proposer(*options, budget=100)
    ended = []
    count = data.draw(st.integers(12, 40))
    arm.ask(count)
    for number in range(count):
        epochs = data.draw(st.integers(0, 3))
        for epoch in range(1, epochs + 1):
            heard = math.nan if epoch == 3 and data.draw(st.booleans()) else data.draw(score)
            arm.report({number: (epoch, heard)})
        status = data.draw(st.sampled_from(["complete", "pruned", "failed", "running"]))
        if status != "running":
            arm.tell(number, status, data.draw(score) if status == "complete" else None)
        if status in ("complete", "pruned"):
            ended.append(number)
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    trials = [trial for *_, trial in arm.best]
    assert sorted(trial.number for trial in trials) == ended
    for count in range(len(trials) + 1):
        good, _ = _split_trials(study, sorted(trials, key=lambda trial: trial.number), count)
        assert sorted(trial.number for trial in trials[:count]) == [trial.number for trial in good]


@given(
    st.lists(st.tuples(st.sampled_from(["complete", "failed"]), st.integers(0, 9)), max_size=60), st.integers(20, 40)
)
def test_the_best_quarter_and_the_latest_of_the_others_are_remembered(trials: list[tuple[str, int]], cap: int) -> None:
    arm = proposer("search.sampler=random", f"search.history={cap}", "objective.metric=nll", budget=60)
    arm.ask(60)
    for number, (status, score) in enumerate(trials):
        arm.tell(number, status, score if status == "complete" else None)
    ended = [number for number, (status, _) in enumerate(trials) if status == "complete"]
    best = sorted(ended, key=lambda number: (trials[number][1], number))[: cap // 4]
    others = [number for number in ended if number not in best]
    assert [trial.number for *_, trial in arm.best] == best
    assert [trial.number for trial in arm.latest] == others[max(0, len(others) - cap + cap // 4) :]


def test_ranks() -> None:
    ordered = [
        rank(0.9, None, maximize=True),
        rank(0.1, (9, 1.0), maximize=True),
        rank(None, (3, 0.2), maximize=True),
        rank(None, (3, math.nan), maximize=True),
        rank(None, (1, 0.9), maximize=True),
        rank(None, None, maximize=True),
    ]
    assert ordered == sorted(ordered)
    assert rank(0.1, None, maximize=False) < rank(0.9, None, maximize=False)


@given(st.integers(1, 3000), st.integers(0, 1 << 30))
def test_a_seeded_order_holds_every_number_once(size: int, seed: int) -> None:
    assert sorted(shuffled(index, size, seed) for index in range(size)) == list(range(size))


def test_a_seeded_order_is_mixed_in_spaces_of_any_size() -> None:
    assert shuffled(0, 1, 5) == 0
    large = [shuffled(index, 10**30, 7) for index in range(200)]
    assert len({place % 10 for place in large}) == 10
    assert len({place * 10 // 10**30 for place in large}) == 10


@pytest.mark.parametrize(
    ("sampler", "asked", "share", "lanes", "k"),
    [
        ("qmc", 0, 24, 64, 24),
        ("grid", 0, 1000, 64, 64),
        ("random", 990, 1000, 64, 10),
        ("tpe", 0, 24, 64, 10),
        ("tpe", 0, 24, 4, 4),
        ("tpe", 8, 24, 4, 2),
        ("tpe", 10, 24, 64, 1),
        ("tpe", 10, 256, 64, 8),
        ("tpe", 10, 10_000, 64, 64),
        ("tpe", 10, 10_000, 1, 1),
        ("tpe", 9_990, 10_000, 64, 10),
        ("tpe", 0, 5, 64, 5),
        ("tpe", 24, 24, 64, 0),
    ],
)
def test_how_many_are_proposed_at_once(sampler: Any, asked: int, share: int, lanes: int, k: int) -> None:
    assert batch(sampler, asked, share, lanes, startup=10) == k


@given(st.sampled_from(["tpe", "random"]), st.integers(1, 3000), st.integers(1, 128), st.integers(1, 40))
def test_batches_end_with_the_share_and_leave_the_model_its_fits(
    sampler: Any, share: int, lanes: int, startup: int
) -> None:
    asked, fits = 0, 0
    while asked < share:
        k = batch(sampler, asked, share, lanes, startup)
        assert 1 <= k <= lanes
        fits += sampler == "tpe" and asked >= startup
        asked += k
    assert asked == share
    if sampler == "tpe":
        assert fits >= min(FITS, share) * (share - startup) // share


def test_a_long_study_costs_no_more_per_trial_than_a_short_one() -> None:
    """Ask, report and tell; 1.4 ms a trial on a shared core."""
    arm, times = proposer("search.trials=10000", budget=10_000), []
    drive(arm, 448, most=64)
    for last in (768, 1088, 1408):
        started = time.process_time()
        drive(arm, last, most=64)
        times.append(time.process_time() - started)
    assert times[2] < 2 * times[0]
    assert sum(times) / 960 < 5e-3


def test_a_trial_leaves_little_in_memory() -> None:
    arm = proposer("search.sampler=random", budget=4000)
    drive(arm, 1000, most=64)
    tracemalloc.start()
    drive(arm, 3000, most=64)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / 2000 < 500  # bytes


def test_batches_find_what_single_proposals_find() -> None:
    """A small one of benchmarks/proposals.py: its Branin, 96 trials in threes."""
    benchmark = load_benchmark()
    logs = benchmark.compare("branin", trials=96, rounds=4, lanes=64)["logs"]["batches"]
    assert np.mean(logs) > -0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["branin", "hartmann6", "ackley5", "ackley_mixed", "rosenbrock_mixed", "recorded"])
def test_regret_is_no_worse_than_one_by_one(name: str) -> None:
    """By more than twice its standard error, over 20 paired seeds."""
    logs = load_benchmark().compare(name, trials=256, rounds=20, lanes=64)["logs"]["batches"]
    assert np.mean(logs) + 2 * np.std(logs, ddof=1) / math.sqrt(len(logs)) > 0


def load_benchmark() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "proposals.py"
    spec = importlib.util.spec_from_file_location("benchmark_proposals", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_precisions_are_those_that_arms_may_draw() -> None:
    job = toy_job(Path("study"), ["train.precision=bf16"])
    assert precisions(job) == ["bf16"]
    assert precisions(job.model_copy(update={"arms": {}})) == ["bf16"]
    arms = {
        "a": {"strategy": "full", "space": {"train.precision": ["fp32", "auto"], "train.lr": [0.1, 0.2]}},
        "b": {"strategy": "full", "space": {"train.precision": "fp32", "train.lr": [0.1, 0.2]}},
    }
    assert precisions(toy_job(Path("study"), ["train.precision=bf16"], arms=arms)) == ["auto", "fp32"]
