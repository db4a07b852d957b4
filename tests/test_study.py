"""The study, without Ray and without training: budgets, packs, rounds, rows, resume, replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline import results
from frostline.claim import StudyMismatchError, differences
from frostline.commit import StudyBusy
from frostline.costs import StageTimes, alone_seconds
from frostline.depths import depth_of
from frostline.finalists import Finished, best_of, choose_finalists
from frostline.models import digest
from frostline.outcome import EpochRecord, Outcome, summarise
from frostline.propose import Proposer
from frostline.rows import describe
from frostline.spec import Job
from frostline.store import Store, key_of
from frostline.study import Study
from frostline.testing import toy_job
from frostline.trialspec import TrialSpec, configure
from frostline.work import Shard, Supply
from frostline.world import World

STAGES = ["stem", "block1", "block2"]
FACTS = {"stages": STAGES, "data_hash": "d", "split_hash": "s", "weights_hash": "w"}
LANES = {**FACTS, "cached_cuts": [3]}  # trials of which only the head trains are lanes of packs
SPLITS = results.SCHEMAS["splits"].empty_table()
TIMES = StageTimes(
    device="cpu",
    hardware="none",
    threads=1,
    batch=32,
    prefix_s={0: 0.0, 1: 0.01, 2: 0.02, 3: 0.04},
    step_s={0: 0.12, 1: 0.08, 2: 0.05, 3: 0.001},
    view_s=0.0,
    read_bytes_per_s=1e9,
    start_s=0.5,
)
either_way = pytest.mark.parametrize("facts", [FACTS, LANES], ids=["alone", "lanes"])


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync does cannot be seen without a power cut."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def open_study(job: Job, facts: Mapping[str, Any] = FACTS) -> Study:
    return Study(job, facts, SPLITS, who={})


def record(spec: TrialSpec, epoch: int) -> EpochRecord:
    """A scripted epoch: the best depth is 2, a higher learning rate is better, and later epochs are better."""
    config = spec.config
    depth = depth_of(config.freeze, len(STAGES))
    score = 1 - abs(depth - 2) / 10 + config.train.lr + epoch / 100 - (spec.seed % 97) / 1e4
    scores = {"accuracy": score, "balanced_accuracy": score, "macro_f1": score, "nll": 1 - score}
    return EpochRecord(epoch, 0.0, scores, score, 0.0, 0.0, 0, 0.0, 0.0)


def outcome(spec: TrialSpec, records: Sequence[EpochRecord], status: str) -> Outcome:
    row = {**describe(spec, World.here(spec.resources)), **summarise(spec, records, status)}
    row |= {"freeze_depth": depth_of(spec.config.freeze, len(STAGES)), "head_depth": 3, "n_train": 100, "n_val": 20}
    if spec.round == "confirm":
        row |= {"test_score": records[-1].val_score, "n_test": 30}
    return Outcome(row | {"seconds": 0.01, "spent_s": 0.01}, bundle={"x": b"x"} if spec.round == "confirm" else {})


def steps(study: Study, pack: Sequence[TrialSpec]) -> Iterator[None]:
    """A pack as an executor runs it: a step is an epoch of all its lanes, of which some end."""
    records: dict[str, list[EpochRecord]] = {spec.trial_id: [] for spec in pack}
    lanes, epoch = list(pack), 0
    while lanes:
        epoch += 1
        go_on = study.report({spec.trial_id: record(spec, epoch) for spec in lanes})
        ended = {}
        for spec in lanes:
            records[spec.trial_id].append(record(spec, epoch))
            if epoch == spec.config.train.epochs:
                ended[spec.trial_id] = outcome(spec, records[spec.trial_id], "complete")
            elif not go_on[spec.trial_id]:
                ended[spec.trial_id] = outcome(spec, records[spec.trial_id], "pruned")
        study.finish(ended)
        lanes = [spec for spec in lanes if spec.trial_id not in ended]
        yield


def run_pack(study: Study, pack: Sequence[TrialSpec]) -> None:
    for _ in steps(study, pack):
        pass


def run_all(study: Study, at_once: int = 1) -> None:
    """Run the study with several packs in flight, which take turns, an epoch each."""
    flying: list[Iterator[None]] = []
    while True:
        while len(flying) < at_once and (pack := study.ask(at_once)):
            flying.append(steps(study, pack))
        if not flying:
            return
        flying = [run for run in flying if next(run, "over") is None]


def one(pack: Sequence[TrialSpec]) -> TrialSpec:
    """The trial of a pack that must have one."""
    (spec,) = pack
    return spec


def trials(job: Job) -> list[dict[str, Any]]:
    return results.read_trials(job.folder).to_pylist()


@either_way
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_study_runs_its_budget_and_its_confirmations(
    study_folder: Path, facts: Mapping[str, Any], at_once: int
) -> None:
    job = toy_job(study_folder, ["search.trials=12", "search.sampler=random"])
    study = open_study(job, facts)
    run_all(study, at_once)
    assert study.done
    snapshot = study.snapshot()
    study.close()
    rows = trials(job)
    assert len(rows) == 12 + 2 == len({row["trial_id"] for row in rows})
    assert snapshot.done == 12
    assert snapshot.confirmed == snapshot.confirmed_complete == snapshot.to_confirm == 2
    search = [row for row in rows if row["round"] == "search"]
    confirm = [row for row in rows if row["round"] == "confirm"]
    best = max((row for row in search if row["val_score"] is not None), key=lambda row: row["val_score"])
    assert {row["finalist_of"] for row in confirm} == {best["trial_id"]}
    assert not {row["seed"] for row in search} & {row["seed"] for row in confirm}
    assert {row["config_id"] for row in confirm} == {best["config_id"]}
    assert all(row["test_score"] is None for row in search)
    assert {row["status"] for row in search} == {"complete", "pruned"}
    assert all((row["val_score"] is None) == (row["status"] != "complete") for row in rows)
    epochs = results.read_epochs(job.folder).to_pylist()
    assert len(epochs) == sum(row["epochs"] for row in rows)
    assert {epoch["decision"] for epoch in epochs} == {"continue", "stop"}
    assert (job.folder / "bundle" / "manifest.json").exists()
    assert sorted(ask["seq"] for ask in results.read_asks(job.folder).to_pylist()) == sorted(
        row["ask_seq"] for row in search
    )
    seqs = [
        *(row["ask_seq"] for row in search),
        *(epoch["seq"] for epoch in epochs),
        *(row["tell_seq"] for row in rows),
    ]
    assert sorted(seqs) == list(range(len(seqs)))
    packs: dict[str, list[str]] = {}
    for row in rows:
        packs.setdefault(row["pack"], []).append(row["trial_id"])
    assert all(first in lanes for first, lanes in packs.items())
    assert all(row["lanes"] == len(packs[row["pack"]]) for row in rows)
    assert (max(map(len, packs.values())) > 1) == (facts is LANES)


def arms_of(**strategies: str) -> dict[str, Any]:
    rates = {"low": 1e-4, "high": 1e-2, "log": True}
    return {name: {"strategy": strategy, "space": {"train.lr": rates}} for name, strategy in strategies.items()}


@either_way
@pytest.mark.parametrize(("sampler", "apart"), [("tpe", 4), ("random", 20)])
def test_arms_share_the_budget_equally_and_propose_in_turn(
    study_folder: Path, facts: Mapping[str, Any], sampler: str, apart: int
) -> None:
    """A batch apart at most: of what starts a TPE, or of all that does not look at results."""
    options = ["search.trials=60", "search.startup_trials=4", f"search.sampler={sampler}", "confirm.finalists=arms"]
    job = toy_job(study_folder, options, arms=arms_of(probe="linear_probe", full="full", deep="linear_probe"))
    study = open_study(job, facts)
    run_all(study, at_once=2)
    study.close()
    asked = dict.fromkeys(job.arms, 0)
    for ask in sorted(results.read_asks(job.folder).to_pylist(), key=lambda ask: ask["seq"]):
        assert ask["number"] == asked[ask["arm"]]
        asked[ask["arm"]] += 1
        assert max(asked.values()) - min(asked.values()) <= apart
    assert asked == dict.fromkeys(job.arms, 20)
    rows = trials(job)
    assert {arm: sum(row["arm"] == arm for row in rows) for arm in job.arms} == dict.fromkeys(job.arms, 20 + 2)


def test_a_pack_has_lanes_of_one_arm_at_a_time_so_that_no_arm_runs_ahead(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=8"], arms=arms_of(one="linear_probe", two="linear_probe"))
    study = open_study(job, LANES)
    assert [{spec.arm for spec in study.ask()} for _ in range(2)] == [{"one"}, {"two"}]
    study.close()


def test_what_trains_least_goes_first(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=20", "search.sampler=random", "confirm.seeds=0"])
    study = open_study(job)
    depths = [one(study.ask()).config.freeze.depth for _ in range(20)]
    assert depths[:2] == [3, 0], "the strong defaults, then the others"
    assert depths[2:] == sorted(depths[2:], reverse=True)
    assert set(depths) == {0, 1, 2, 3}
    assert study.ask() == []
    study.close()


@pytest.mark.parametrize(("share", "sizes"), [(1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (4, [2, 2, 1, 1])])
def test_a_pack_leaves_work_for_the_others(study_folder: Path, share: int, sizes: list[int]) -> None:
    """As many packs as can run at once take what waits between them."""
    options = ["search.trials=6", "search.sampler=random"]
    study = open_study(toy_job(study_folder, options, arms=arms_of(probe="linear_probe")), LANES)
    assert [len(pack) for pack in iter(lambda: study.ask(share), [])] == sizes
    study.close()


def test_confirmations_of_one_seed_train_together_and_of_two_never(study_folder: Path) -> None:
    options = ["search.trials=9", "confirm.finalists=arms", "confirm.seeds=3", "search.pruner.kind=none"]
    arms = arms_of(one="linear_probe", two="linear_probe", whole="full")
    study = open_study(toy_job(study_folder, options, arms=arms), LANES)
    while study.snapshot().done < 9:
        run_pack(study, study.ask())
    packs = list(iter(study.ask, []))
    assert sorted(sorted(spec.arm for spec in pack) for pack in packs) == [["one", "two"]] * 3 + [["whole"]] * 3
    assert all(len({(spec.seed, spec.seeds) for spec in pack}) == 1 for pack in packs)
    paired = {arm: {spec.seed for pack in packs for spec in pack if spec.arm == arm} for arm in arms}
    assert paired["one"] == paired["two"] == paired["whole"]
    assert len(paired["one"]) == 3
    study.close()


def test_a_finite_space_ends_its_arm_early(study_folder: Path) -> None:
    endless = arms_of(full="full")["full"]
    finite = {"strategy": "freeze_depth", "space": {"freeze.depth": [1, 2, 3], "head.hidden": [0, 16]}}
    job = toy_job(study_folder, ["search.trials=20"], arms={"endless": endless, "finite": finite})
    study = open_study(job, LANES)
    assert study.total == 10 + 6
    run_all(study, at_once=2)
    assert study.done
    assert (study.snapshot().done, study.snapshot().total) == (16, 16)
    study.close()
    rows = [row for row in trials(job) if row["round"] == "search"]
    assert len({row["config_id"] for row in rows}) == len(rows) == 16
    again = open_study(job, LANES)
    assert again.done
    again.close()


def test_the_store_is_surveyed_once_for_the_search_and_once_for_the_confirmations(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=4", "confirm.seeds=3"])
    facts = {**FACTS, "cached_cuts": [3, 1]}
    for _ in range(2):  # a study that is opened again does not know what has become of the store
        study = open_study(job, facts)
        question = study.survey(2)
        assert question is not None
        assert (question.cuts, question.means, question.at_once) == ((1, 3), (), 2)
        assert len(question.specs) == 1, "one stands for all"
        assert study.survey(2) is None
        study.ask(2)
        assert study.survey(2) is None
        study.close()
    study = open_study(job, facts)
    assert study.survey()
    while study.snapshot().done < 4:
        assert study.survey() is None
        run_pack(study, study.ask())
    question = study.survey()
    assert question is not None
    assert (question.cuts, question.means) == (None, ())
    assert {spec.trial_id.rpartition("-")[2] for spec in question.specs} == {"c0", "c1", "c2"}
    assert study.survey() is None
    assert one(study.ask()) in question.specs
    assert study.survey() is None
    study.close()
    study = open_study(job, facts)  # the search is over: confirmations alone are asked about
    question = study.survey()
    assert question is not None
    assert len(question.specs) == 3
    study.close()


def test_heads_in_closed_form_come_once_a_study_and_say_where_its_arms_begin(study_folder: Path) -> None:
    job, facts = toy_job(study_folder), {**FACTS, "cached_cuts": [3], "probed_cuts": [1, 2, 3]}
    row = {"stages": 3, "features": 8, "n_train": 9, "n_val": 9, "seconds": 0.1, "strength": 0.5, "reason": None}
    row |= {f"val_{name}": 0.5 for name in ("nll", "accuracy", "balanced_accuracy", "macro_f1")}
    row |= dict.fromkeys(f"val_{name}" for name in ("micro_f1", "exact_match", "rmse", "mae", "r2"))
    rows = [
        {**row, "cut": cut, "method": method, "val_score": score}
        for cut, method, score in ((1, "lda", 0.5), (2, "ridge", 0.9), (3, "lda", 0.8))
    ]
    study = open_study(job, facts)
    assert study.survey()
    question = study.probe()
    assert question is not None
    assert question.cuts == (1, 2, 3)
    study.probed(rows)
    assert study.probe() is None
    study.ledger.commit()
    assert results.read_probes(job.folder).num_rows == 0, "they are committed with the next trial"
    asked = [one(study.ask()) for _ in range(3)]
    assert sorted(spec.config.freeze.depth for spec in asked) == [0, 2, 3], "both ends, and where the best head stands"
    assert len({spec.config.train.head_lr for spec in asked}) == 1, "with the job's own rates"
    for _ in steps(study, asked[:1]):
        pass
    study.close()
    assert sorted(results.read_probes(job.folder).to_pylist(), key=lambda row: row["cut"]) == rows
    again = open_study(job, facts)
    assert again.probe() is None
    assert again.proposers["freeze"].defaults == study.proposers["freeze"].defaults
    again.close()


def test_nothing_is_probed_once_the_search_has_ended(study_folder: Path) -> None:
    job, facts = toy_job(study_folder), {**FACTS, "probed_cuts": [3]}
    study = open_study(job, facts)
    while study.searching or study.running:
        run_pack(study, study.ask())
    assert study.probe() is None
    study.close()


def test_a_survey_covers_each_precision_that_an_arm_may_draw(study_folder: Path) -> None:
    arms = arms_of(one="linear_probe", two="full")
    arms["two"]["space"] |= {"train.precision": ["bf16", "fp32"]}
    study = open_study(toy_job(study_folder, arms=arms), LANES)
    question = study.survey()
    assert question is not None
    assert [spec.config.train.precision for spec in question.specs] == ["auto", "bf16", "fp32"]
    study.close()


def test_nothing_is_surveyed_where_nothing_is_stored(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder), {**FACTS, "cached_cuts": []})
    assert study.survey() is None
    assert not one(study.ask()).cached
    study.close()


def test_what_is_stored_was_decided_when_the_study_began(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=4"])
    study = open_study(job, LANES)
    run_pack(study, study.ask())
    study.close()
    again = open_study(job, {**FACTS, "cached_cuts": [1, 2]})
    assert again.cached_cuts == {3}
    again.close()


def test_what_trials_read_is_kept_while_the_study_is_open(study_folder: Path, tmp_path: Path) -> None:
    store, about = Store(tmp_path / "features"), {"cut": 3}
    store.put(key_of(about), about, np.arange(4), np.ones((4, 2), np.float32))
    study = open_study(toy_job(study_folder), LANES)
    study.hold(str(store.root), [key_of(about)])
    assert store.evict(0) == []
    study.close()
    assert [entry.key for entry in store.evict(0)] == [key_of(about)]


def test_the_rows_of_extractions_are_committed_with_the_next_trial(study_folder: Path) -> None:
    job = toy_job(study_folder)
    study = open_study(job, LANES)
    row = {
        "cuts": "3",
        "means": "",
        "view": None,
        "images": 7,
        "bytes": 70,
        "seconds": 0.5,
        "node": "n",
        "started_at": None,
    }
    study.supplied(Supply("unused", (), (Shard(next(study._sketches()), (3,), (), None, np.arange(7)),)))
    assert (study.snapshot().extracted, study.snapshot().to_extract) == (0, 7)
    study.extracted(row)
    assert study.snapshot().extracted == 7
    study.ledger.commit()
    assert results.read_extractions(job.folder).num_rows == 0
    run_pack(study, study.ask())
    study.close()
    assert results.read_extractions(job.folder).to_pylist() == [row]


def test_what_a_trial_costs_alone_is_worked_out_whatever_it_took(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=8", "search.sampler=random"])
    study = open_study(job, {**LANES, "stage_times": json.loads(json.dumps(asdict(TIMES)))})
    study.lose([one(study.ask(8)).trial_id], "gone")
    study.lose([one(study.ask(8)).trial_id], "gone again")
    run_all(study)
    study.close()
    rows = trials(job)
    assert len(rows) == 8 + 2
    for row in rows:
        if row["error_kind"] == "worker_lost":
            assert row["alone_s"] is None, "its data was never read"
        else:
            n_test = 30 if row["round"] == "confirm" else 0
            assert row["alone_s"] == alone_seconds(TIMES, {row["freeze_depth"]: row["epochs"]}, 100, 20, n_test)
    by_hand = next(row for row in rows if row["freeze_depth"] == 3 and row["epochs"] == 1 and row["round"] == "search")
    assert by_hand["alone_s"] == pytest.approx(0.5 + 100 * (0.04 + 0.001) + 20 * 0.04)


def test_nobody_knows_what_a_trial_costs_alone_where_nothing_was_timed(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=2"])
    study = open_study(job)
    run_all(study)
    study.close()
    assert {row["alone_s"] for row in trials(job)} == {None}


def replay(job: Job) -> tuple[int, int]:
    """Put the recorded questions to new samplers and pruners, in order and together where they were put together; the
    number of answers that were compared, and of the questions that had several."""
    share = job.search.trials // len(job.arms)
    arms = {name: Proposer(job, name, len(STAGES), share) for name in job.arms}
    rows = {row["trial_id"]: row for row in trials(job) if row["round"] == "search"}
    asks: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for ask in results.read_asks(job.folder).to_pylist():
        asks.setdefault((ask["arm"], ask["batch"]), []).append(ask)
    heard: dict[int, list[dict[str, Any]]] = {}
    for epoch in results.read_epochs(job.folder).to_pylist():
        if epoch["trial_id"] in rows:
            heard.setdefault(epoch["heard_seq"], []).append(epoch)
    assert all(min(epoch["seq"] for epoch in epochs) == seq for seq, epochs in heard.items())
    events = [
        *((min(ask["seq"] for ask in batch), "ask", batch) for batch in asks.values()),
        *((seq, "report", epochs) for seq, epochs in heard.items()),
        *((row["tell_seq"], "tell", [row]) for row in rows.values()),
    ]
    compared = 0
    for _, kind, entries in sorted(events, key=lambda event: event[0]):
        if kind == "ask":
            entries.sort(key=lambda ask: ask["number"])
            arm = arms[entries[0]["arm"]]
            assert (arm.asked, arm.asked + len(entries) - 1) == (entries[0]["batch"], entries[-1]["number"])
            assert arm.ask(len(entries)) == [json.loads(ask["params"]) for ask in entries]
        elif kind == "report":
            by_arm: dict[str, dict[int, tuple[int, float]]] = {}
            for epoch in entries:
                row = rows[epoch["trial_id"]]
                by_arm.setdefault(row["arm"], {})[row["number"]] = epoch["epoch"], epoch["val_score"]
            stops = {(name, n): stop for name, found in by_arm.items() for n, stop in arms[name].report(found).items()}
            for epoch in entries:
                row = rows[epoch["trial_id"]]
                assert stops[row["arm"], row["number"]] == (epoch["decision"] == "stop")
        else:
            arms[entries[0]["arm"]].tell(entries[0]["number"], entries[0]["status"], entries[0]["val_score"])
        compared += len(entries)
    return compared, sum(len(entries) > 1 for _, _, entries in events)


@pytest.mark.fault(47)
@either_way
@pytest.mark.parametrize("at_once", [1, 3])
def test_the_recorded_order_replays_to_the_same_proposals_and_stops(
    study_folder: Path, facts: Mapping[str, Any], at_once: int
) -> None:
    options = ["search.trials=200", "search.startup_trials=10", "confirm.seeds=1"]
    deep = {"strategy": "freeze_depth", "space": {"freeze.depth": [2, 3], "train.lr": {"low": 1e-4, "high": 1e-2}}}
    arms = {"deep": deep, **arms_of(probe="linear_probe")}
    job = toy_job(study_folder, [*options, "search.lanes=5"], arms=arms)
    study = open_study(job, facts)
    run_all(study, at_once)
    study.close()
    compared, together = replay(job)
    rows = [row for row in trials(job) if row["round"] == "search"]
    assert compared == 2 * 200 + sum(row["epochs"] for row in rows)
    assert max(row["lanes"] for row in rows) == (1 if facts is FACTS else 5)
    assert together > 40, "batches of proposals at least"


@pytest.mark.fault(47)
def test_the_replay_notices_reports_that_were_heard_together(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were they judged one by one, some stops would differ: the test above could fail."""
    job = toy_job(study_folder, ["search.trials=40", "search.sampler=random"], arms=arms_of(probe="linear_probe"))
    study = open_study(job, LANES)
    run_all(study)
    study.close()
    assert replay(job)[1] > 0
    read = results.read_epochs

    def apart(folder: Path) -> pa.Table:
        epochs = read(folder)
        place = epochs.schema.get_field_index("heard_seq")
        return epochs.set_column(place, "heard_seq", epochs["seq"])

    monkeypatch.setattr(results, "read_epochs", apart)
    with pytest.raises(AssertionError):
        replay(job)


def interrupt(study: Study) -> None:
    """A kill -9, as far as the folder can tell: nothing more is written, and the kernel frees the lease."""
    study.lease.release()


@pytest.mark.fault(12)
@either_way
def test_a_study_that_is_killed_anywhere_ends_with_every_row_once(study_folder: Path, facts: Mapping[str, Any]) -> None:
    job = toy_job(study_folder, ["search.trials=30", "search.sampler=random", "search.lanes=4"])
    seen: set[str] = set()
    for kill_after in range(12):
        study = open_study(job, facts)
        assert {row["trial_id"] for row in trials(job)} >= seen
        for _ in range(kill_after % 4):
            if pack := study.ask():
                run_pack(study, pack)
                study.ledger.commit()
        if lost := study.ask():
            study.report({spec.trial_id: record(spec, 1) for spec in lost})
        seen = {row["trial_id"] for row in trials(job)}
        interrupt(study)
    study = open_study(job, facts)
    run_all(study)
    assert study.done
    study.close()
    rows = [row["trial_id"] for row in trials(job)]
    assert len(rows) == len(set(rows)) == 30 + 2
    asks = [ask["trial_id"] for ask in results.read_asks(job.folder).to_pylist()]
    assert len(asks) == len(set(asks)) == 30


@pytest.mark.fault(12)
def test_of_a_pack_that_is_killed_what_had_finished_is_kept_and_the_rest_runs_again(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=9", "search.sampler=random"], arms=arms_of(probe="linear_probe"))
    study = open_study(job, LANES)
    pack = study.ask()
    assert len(pack) == 9
    running = steps(study, pack)
    next(running)
    study.ledger.commit()
    stopped = {row["trial_id"] for row in trials(job)}
    assert 0 < len(stopped) < 9, "halving has stopped some lanes after their first epoch"
    interrupt(study)
    again = open_study(job, LANES)
    rest = again.ask()
    assert rest == [spec for spec in pack if spec.trial_id not in stopped]
    run_pack(again, rest)
    run_all(again)
    again.close()
    rows = {row["trial_id"]: row for row in trials(job)}
    assert len(rows) == len(trials(job)) == 9 + 2
    assert {rows[spec.trial_id]["pack"] for spec in rest} == {rest[0].trial_id}
    assert {rows[trial_id]["lanes"] for trial_id in stopped} == {9}
    assert {rows[spec.trial_id]["lanes"] for spec in rest} == {len(rest)}
    epochs = [(epoch["trial_id"], epoch["epoch"]) for epoch in results.read_epochs(job.folder).to_pylist()]
    assert len(epochs) == len(set(epochs)) == sum(row["epochs"] for row in rows.values())


@pytest.mark.fault(12)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 9), max_size=5), at_once=st.integers(1, 3), packed=st.booleans())
def test_kills_between_commits_change_no_row_of_a_sampler_that_does_not_look(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], at_once: int, packed: bool
) -> None:
    """With qmc and no pruning an interrupted study ends with the configurations of an undisturbed one."""
    options = ["search.trials=8", "search.sampler=qmc", "search.pruner.kind=none", "search.lanes=3"]
    facts = LANES if packed else FACTS
    found = []
    for interruptions in ([], kills):
        job = toy_job(tmp_path_factory.mktemp("study") / "s", options)
        for epochs in interruptions:
            study = open_study(job, facts)
            flying: list[Iterator[None]] = []
            for _ in range(epochs):
                while len(flying) < at_once and (pack := study.ask(at_once)):
                    flying.append(steps(study, pack))
                flying = [run for run in flying if next(run, "over") is None]
                study.ledger.commit()
            interrupt(study)
        study = open_study(job, facts)
        run_all(study)
        study.close()
        found.append({(row["trial_id"], row["config_id"], row["seed"], row["val_score"]) for row in trials(job)})
    assert found[0] == found[1]


def test_what_was_asked_before_a_kill_is_run_with_the_same_configuration(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=8"])
    study = open_study(job)
    first, second, third = (study.ask() for _ in range(3))
    run_pack(study, second)
    study.ledger.commit()
    interrupt(study)
    again = open_study(job)
    assert sorted(one(again.ask()).trial_id for _ in range(2)) == sorted(one(pack).trial_id for pack in (first, third))
    assert {running.spec.trial_id: running.spec for running in again.running.values()} == {
        one(pack).trial_id: one(pack) for pack in (first, third)
    }
    again.close()


def test_more_trials_extend_a_study(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=4"])
    study = open_study(job)
    run_all(study)
    study.close()
    more = toy_job(study_folder, ["search.trials=7"])
    study = open_study(more)
    assert not study.done
    run_all(study)
    study.close()
    rows = trials(more)
    assert len([row for row in rows if row["round"] == "search"]) == 7
    assert results.read_job(study_folder)["job"]["search"]["trials"] == 7
    with pytest.raises(StudyMismatchError, match=r"search\.trials: was 7, now 4"):
        open_study(job)


@pytest.mark.fault(41)
def test_another_job_is_told_what_differs(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    run_pack(study, study.ask())
    study.close()
    with pytest.raises(StudyMismatchError) as refused:
        open_study(toy_job(study_folder, ["train.epochs=4", "search.trials=12"]))
    assert "train.epochs: was 3, now 4" in str(refused.value)
    assert "search.trials" not in str(refused.value).split("Give")[0]
    with pytest.raises(StudyMismatchError, match="data_hash: was 'd', now 'other'"):
        open_study(toy_job(study_folder), {**FACTS, "data_hash": "other"})
    open_study(toy_job(study_folder)).close()


def rewrite(study_folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the recorded job, as another version would have written it."""
    record = results.read_job(study_folder)
    change(record["job"])
    (study_folder / "job.json").write_text(json.dumps({**record, "digest": digest(record)}))


@pytest.mark.fault(48)
def test_a_study_goes_on_where_a_later_version_has_keys_that_it_lacks(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    run_pack(study, study.ask())
    study.close()
    rewrite(
        study_folder,
        lambda job: [job["train"].pop("compile"), job.pop("augment"), job["arms"]["freeze"].pop("sampler")],
    )
    kept = trials(toy_job(study_folder))
    study = open_study(toy_job(study_folder))
    run_all(study)
    study.close()
    assert kept == trials(toy_job(study_folder))[: len(kept)]
    with pytest.raises(StudyMismatchError, match=r"train\.compile: was False, now True\n[^:]*$"):
        open_study(toy_job(study_folder, ["train.compile=true"]))
    rewrite(study_folder, lambda job: job["train"].update(gone=1))
    with pytest.raises(StudyMismatchError, match=r"train\.gone: was 1, now None"):
        open_study(toy_job(study_folder))


def test_where_activations_are_may_change_and_what_they_are_may_not(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    run_pack(study, study.ask())
    study.close()
    open_study(toy_job(study_folder, ["features.path=elsewhere", "features.budget_gb=1.0"])).close()
    with pytest.raises(StudyMismatchError, match=r"features\.dtype: was 'float32', now 'float16'"):
        open_study(toy_job(study_folder, ["features.dtype=float16"]))
    with pytest.raises(StudyMismatchError, match=r"search\.lanes: was 64, now 8"):
        open_study(toy_job(study_folder, ["search.lanes=8"]))


@pytest.mark.fault(32)
def test_a_second_driver_is_told_who_holds_the_study(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder))
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import test_study\n"
        "from frostline.testing import toy_job\n"
        "test_study.open_study(toy_job(Path(sys.argv[1])))"
    )
    tests = str(Path(__file__).parent)
    second = subprocess.run(
        [sys.executable, "-c", script, str(study_folder), tests], capture_output=True, text=True, check=False
    )
    assert second.returncode != 0
    assert "StudyBusy" in second.stderr
    assert f"{os.getpid()}" in second.stderr
    with pytest.raises(StudyBusy):
        open_study(toy_job(study_folder))
    study.close()
    open_study(toy_job(study_folder)).close()


def test_a_study_without_a_complete_trial_confirms_nothing(study_folder: Path) -> None:
    study = open_study(toy_job(study_folder, ["search.trials=2"]))
    for _ in range(2):
        spec = one(study.ask())
        study.finish({spec.trial_id: outcome(spec, [], "failed")})
    assert study.ask() == []
    assert study.done
    assert study.snapshot().best is None
    study.close()


def test_a_trial_whose_worker_dies_before_its_first_epoch_is_run_again_once(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=3", "search.pruner.kind=none"])
    study = open_study(job)
    first, second, third = (one(study.ask()) for _ in range(3))
    study.report({second.trial_id: record(second, 1)})
    for spec in (first, second):
        study.lose([spec.trial_id], "gone")
    assert study.ask() == [first]
    study.lose([first.trial_id], "gone again")
    run_pack(study, [third])
    study.lose([third.trial_id], "after its end: too late to matter")
    run_all(study)
    study.close()
    rows = {row["trial_id"]: row for row in trials(job)}
    assert len(rows) == 3 + 2
    for spec in (first, second):
        assert (rows[spec.trial_id]["status"], rows[spec.trial_id]["error_kind"]) == ("failed", "worker_lost")
    assert rows[second.trial_id]["epochs"] == 1
    assert rows[third.trial_id]["status"] == "complete"


def test_lanes_whose_worker_dies_are_tried_again_alone(study_folder: Path) -> None:
    """So that the one that takes its process with it takes no other trial a second time."""
    options = ["search.trials=6", "search.sampler=random", "search.pruner.kind=none", "confirm.seeds=0"]
    job = toy_job(study_folder, options, arms=arms_of(probe="linear_probe"))
    study = open_study(job, LANES)
    pack = study.ask(2)
    assert len(pack) == 3
    study.lose([spec.trial_id for spec in pack], "gone")
    again = [study.ask() for _ in range(4)]
    assert [[spec.number for spec in each] for each in again] == [[0], [1], [2], [3, 4, 5]]
    study.lose([pack[1].trial_id], "gone again")
    for each in (again[0], again[2], again[3]):
        run_pack(study, each)
    assert study.done
    study.close()
    rows = {row["trial_id"]: row for row in trials(job)}
    assert [row["trial_id"] for row in rows.values() if row["status"] == "failed"] == [pack[1].trial_id]
    assert [rows[f"probe-{number:05d}"]["lanes"] for number in range(6)] == [1, 1, 1, 3, 3, 3]


def test_a_job_that_was_refused_leaves_no_mark(study_folder: Path) -> None:
    arms = {"freeze": {"strategy": "freeze_depth", "sampler": "grid", "space": {"freeze.depth": [0, 1]}}}
    with pytest.raises(ValueError, match="lower search.trials to 2"):
        open_study(toy_job(study_folder, ["search.trials=6"], arms=arms))
    open_study(toy_job(study_folder, ["search.trials=2"], arms=arms)).close()


def test_a_finalist_that_a_longer_search_replaces_leaves_its_confirmations_behind(study_folder: Path) -> None:
    options = ["search.sampler=random", "search.pruner.kind=none", "search.defaults=false"]
    finalists = []
    for count in (2, 12):
        study = open_study(toy_job(study_folder, [f"search.trials={count}", *options]))
        run_all(study)
        snapshot = study.snapshot()
        assert (snapshot.confirmed, snapshot.confirmed_complete, snapshot.to_confirm) == (2, 2, 2)
        finalists.append(snapshot.best)
        study.close()
    assert finalists[0] != finalists[1]
    assert len(trials(toy_job(study_folder))) == 12 + 2 + 2


def finished(name: str, number: int, score: float | None, arm: str = "a") -> Finished:
    return Finished(name, arm, number, "search", "complete" if score is not None else "pruned", score, 1.0)


def test_finalists_are_the_best_and_ties_go_to_the_lower_number() -> None:
    found = [finished("x", 3, 0.9), finished("y", 1, 0.9), finished("z", 0, None), finished("w", 2, 0.5, "b")]
    assert [trial.trial_id for trial in choose_finalists(found, "best", "max")] == ["y"]
    assert [trial.trial_id for trial in choose_finalists(found, "arms", "max")] == ["y", "w"]
    assert [trial.trial_id for trial in choose_finalists(found, "best", "min")] == ["w"]
    assert best_of([finished("z", 0, None)], "max") is None


def test_differences_are_named_by_dotted_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == {
        "a.c": (2, 5),
        "d": (3, None),
        "e": (None, 4),
    }


@pytest.mark.fault(46)
def test_two_studies_of_one_job_are_equal_whatever_runs_at_once(tmp_path: Path) -> None:
    """qmc and no pruning: the set of rows depends neither on packs nor on the order in which trials end."""
    found = []
    for at_once, facts in ((1, FACTS), (1, LANES), (4, FACTS), (4, LANES)):
        folder = tmp_path / str(len(found))
        job = toy_job(folder, ["search.trials=8", "search.sampler=qmc", "search.pruner.kind=none"])
        study = open_study(job, facts)
        run_all(study, at_once)
        study.close()
        found.append({(row["trial_id"], row["config_id"], row["seed"], row["val_score"]) for row in trials(job)})
    assert found[0] == found[1] == found[2] == found[3]


def test_the_tables_open_where_people_open_tables(study_folder: Path) -> None:
    import duckdb
    import pandas as pd

    job = toy_job(study_folder)
    study = open_study(job)
    run_all(study)
    study.close()
    count = duckdb.sql(f"select count(*) from '{study_folder}/trials/*.parquet'").fetchall()
    assert count == [(8,)]
    assert len(pd.read_parquet(study_folder / "trials")) == 8
    assert isinstance(results.query(study_folder, "select arm, count(*) n from trials group by all"), pa.Table)


def fail(study: Study, spec: TrialSpec, kind: str, reason: str) -> None:
    row = outcome(spec, [], "failed").row | {"error_kind": kind, "reason": reason}
    study.finish({spec.trial_id: Outcome(row)})


def test_a_search_of_which_all_fails_alike_is_stopped_and_goes_on_with_the_rest(study_folder: Path) -> None:
    options, arms = ["search.trials=40", "search.sampler=random", "confirm.seeds=1"], arms_of(one="full", two="full")
    job, ended = toy_job(study_folder, options, arms=arms), 0
    for _ in range(2):  # what had failed before does not stop it at once
        study, before = open_study(job), ended
        while not study.done:
            spec = one(study.ask())
            fail(study, spec, "data", f"DataError: cannot read /data/{spec.number}.png")
            ended += 1
        said = study.snapshot().stopped
        assert said is not None
        assert said.startswith(
            f"the search was stopped: all {ended - before} trials failed alike (data): DataError: cannot read"
        )
        assert f"for the {40 - ended} trials that are left" in said
        assert "mend the data" in said
        study.close()
        assert len(trials(job)) == ended
        assert "two" in {row["arm"] for row in trials(job)[before:]}, "every arm that has trials left"
        assert ended - before < 30
    study = open_study(job)
    run_all(study)
    assert study.done
    assert study.snapshot().stopped is None
    study.close()
    assert len(trials(job)) == 40 + 1


@pytest.mark.parametrize(("kind", "reason"), [("non_finite", "loss is nan"), ("data", "")])
def test_a_search_in_which_something_works_or_may_is_not_stopped(study_folder: Path, kind: str, reason: str) -> None:
    job = toy_job(study_folder, ["search.trials=12", "search.sampler=random", "confirm.seeds=0"])
    study = open_study(job)
    if kind == "data":
        run_pack(study, study.ask())
    while not study.done:
        fail(study, one(study.ask()), kind, reason)
    assert study.snapshot().stopped is None
    study.close()
    assert len(trials(job)) == 12


def test_a_full_disk_stops_the_search_and_costs_no_trial(study_folder: Path) -> None:
    job = toy_job(study_folder, ["search.trials=4", "search.sampler=qmc", "search.pruner.kind=none"])
    study = open_study(job)
    run_pack(study, study.ask())
    spec = one(study.ask())
    fail(study, spec, "disk_full", "OSError: [Errno 28] No space left on device")
    assert study.done
    said = study.snapshot().stopped
    assert said is not None
    assert (
        "a trial could not go on (disk_full): OSError: [Errno 28] No space left on device. To go on, free space there"
        in said
    )
    study.close()
    assert len(trials(job)) == 1
    again = open_study(job)
    assert not again.done
    run_all(again)
    again.close()
    rows = {row["trial_id"]: row for row in trials(job)}
    assert len(rows) == len(trials(job)) == 4 + 2
    assert rows[spec.trial_id]["config_id"] == spec.config.id


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 1]], ids=str)
@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_parts_that_are_moved_away_run_again_and_no_ask_is_doubled(
    study_folder: Path, sampler: str, lost: list[int]
) -> None:
    """As the remedy for a damaged part has it. Asks of trials in other parts are recalled from these; a trial that is lost with its ask
    keeps its number."""
    options = ["search.trials=12", f"search.sampler={sampler}", "search.startup_trials=4", "search.pruner.kind=none"]
    arms = {
        "freeze": toy_job(study_folder).arms["freeze"].model_dump(mode="json", exclude_unset=True),
        **arms_of(probe="linear_probe"),
    }
    job = toy_job(study_folder, options, arms=arms)
    study = open_study(job)
    while study.searching or study.running:
        run_pack(study, study.ask())
        study.ledger.commit()
        if study.snapshot().done == 9:
            break
    interrupt(study)
    before = {row["trial_id"]: row["config_id"] for row in trials(job)}
    for table in results.TABLES:
        for part in lost:
            (study_folder / table / f"part-{part:06d}.parquet").unlink(missing_ok=True)
    kept = {row["trial_id"] for row in trials(job)}
    assert len(kept) == 9 - len(lost)
    again = open_study(job)
    run_all(again)
    assert again.done
    again.close()
    rows = trials(job)
    assert len(rows) == len({row["trial_id"] for row in rows}) == 12 + 2
    search = [row for row in rows if row["round"] == "search"]
    assert len({row["config_id"] for row in search}) == 12, "no configuration twice"
    assert {row["trial_id"]: row["config_id"] for row in search if row["trial_id"] in kept} == {
        trial_id: before[trial_id] for trial_id in kept
    }
    asks = sorted(results.read_asks(job.folder).to_pylist(), key=lambda ask: (ask["arm"], ask["number"]))
    assert [(ask["arm"], ask["number"]) for ask in asks] == [(arm, n) for arm in sorted(arms) for n in range(6)]
    assert len({ask["seq"] for ask in asks}) == 12
    for ask in asks:
        config = configure(job, job.arms[ask["arm"]], json.loads(ask["params"]))
        (row,) = [row for row in search if row["trial_id"] == ask["trial_id"]]
        assert row["config_id"] == config.id
    last = open_study(job)
    assert last.done
    last.close()
