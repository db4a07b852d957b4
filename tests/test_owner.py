"""The study as workers see it: what they are given, when they wait, what becomes of work whose worker dies. Without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from frostline import results
from frostline.estimate import facts_of
from frostline.extract import extract, survey
from frostline.features import Feed
from frostline.owner import STARTS, TRIES, PreparationError, StudyActor
from frostline.prepare import prepare
from frostline.probes import probe
from frostline.testing import toy_job
from frostline.work import Load, Probe, Shard, Survey
from frostline.world import World

SPLITS: pa.Table = results.SCHEMAS["splits"].empty_table()


@pytest.fixture
def owner(tmp_path: Path) -> StudyActor:
    """Of a study whose cuts are stored."""
    ready = prepare(toy_job(tmp_path / "study", ["features.cache=all", "search.pruner.kind=none", "confirm.seeds=0"]))
    owner = StudyActor()
    owner.open(ready.job, facts_of(ready), SPLITS, {}, 2)
    return owner


def do(owner: StudyActor, work: Any) -> None:
    """Preparation, as a worker does it."""
    world = World.here(work.resources)
    if isinstance(work, Survey):
        owner.supplied(survey(work, world, owner.hold))
    elif isinstance(work, Shard):
        owner.extracted(extract(work, Feed(), world))
    else:
        owner.probed(probe(work, Feed(), world))


def test_trials_come_after_what_they_wait_for_and_the_others_wait(owner: StudyActor) -> None:
    work = owner.take("one")
    assert isinstance(work, Survey)
    meanwhile = owner.take("two")
    assert isinstance(meanwhile, Load)
    assert meanwhile.survey is work
    assert owner.take("two") == "wait"
    do(owner, work)
    while isinstance(work := owner.take("one"), Shard):
        if (beside := owner.take("two")) != "wait":
            assert isinstance(beside, Shard), "shards are for as many workers as there are"
            do(owner, beside)
        do(owner, work)
    first, second = "one", "two"
    if work == "wait":  # the other one's last shard is not known to be done before it asks again
        first, second, work = "two", "one", owner.take("two")
    assert isinstance(work, Probe)
    assert owner.take(second) == "wait"
    do(owner, work)
    assert isinstance(owner.take(first), list)
    assert isinstance(owner.take(second), list), "packs run beside each other"
    owner.close()


def test_the_study_is_asked_again_only_when_something_has_ended(
    owner: StudyActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers wait at the end of a search, and each asks twenty times a second."""
    while not isinstance(owner.take("one"), list):
        do(owner, owner.doing["one"])
    while isinstance(owner.take(f"w{len(owner.doing)}"), list):
        pass
    asked: list[int] = []
    assert owner.study
    monkeypatch.setattr(owner.study, "ask", lambda share: asked.append(share) or [])
    assert [owner.take("idle") for _ in range(20)] == ["wait"] * 20
    assert asked == []
    owner.finish({})
    assert [owner.take("idle") for _ in range(20)] == ["wait"] * 20
    assert asked == [2]
    owner.close()


def test_preparation_whose_worker_dies_is_given_again_and_then_ends_the_search(owner: StudyActor) -> None:
    for _ in range(TRIES):
        assert isinstance(owner.take("one"), Survey)
        assert owner.standing() == (False, None)
        owner.lose("one", "gone")
    done, problem = owner.standing()
    assert done
    assert isinstance(problem, PreparationError)
    assert str(problem) == f"extracting activations failed {TRIES} times: gone"
    assert owner.take("two") == "end"
    owner.close()


def test_workers_that_never_begin_end_the_search(owner: StudyActor) -> None:
    for number in range(STARTS - 1):
        owner.lose(f"w{number}", "no")
    assert owner.take("one") != "end", "one that begins sets the count back"
    for number in range(STARTS):
        assert not owner.standing()[0]
        owner.lose(f"w{number}", "no")
    assert str(owner.standing()[1]) == f"{STARTS} workers in a row ended before they began to work: no"
    owner.close()


def test_the_trials_of_a_dead_worker_run_again(owner: StudyActor) -> None:
    while not isinstance(work := owner.take("one"), list):
        do(owner, work)
    lost = {spec.trial_id for spec in work}
    owner.lose("one", "gone")
    again: set[str] = set()
    while isinstance(pack := owner.take(f"w{len(again)}"), list) and not lost <= again:
        again |= {spec.trial_id for spec in pack}
    assert lost <= again
    owner.close()


def test_what_is_wrong_with_preparation_ends_the_search(owner: StudyActor) -> None:
    owner.fail(ValueError("no room"))
    owner.fail(ValueError("later"))
    assert (owner.take("one"), str(owner.standing()[1])) == ("end", "no room")
    owner.close()
    assert StudyActor().close() is None
