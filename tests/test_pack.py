"""Packs: which trials train together, and that their lanes report, stop, fail and pay each for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline.extract import extract, survey
from frostline.features import Feed
from frostline.outcome import EpochRecord, Outcome
from frostline.pack import Stopwatch, run_pack
from frostline.packing import SUFFIXES, pack_key, take_pack
from frostline.prepare import prepare
from frostline.results import table_of
from frostline.spec import Job
from frostline.testing import toy_job
from frostline.trialspec import TrialSpec, configure, confirm_seeds, search_seeds, trial_of
from frostline.work import Survey
from frostline.world import World

STAGES = 3
CPU = World(torch.device("cpu"), "here")
DIVERGES = {"train.optimizer": "sgd", "train.head_lr": 10.0, "train.lr": 10.0, "train.weight_decay": 1.0}
kinds = pytest.mark.parametrize("views", [0, "live"], ids=["heads", "live"])


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync does cannot be seen without a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def spec_of(job: Job, number: int, values: Mapping[str, Any], round_: str = "search", index: int = 0) -> TrialSpec:
    seed, seeds = search_seeds(job, "freeze", number) if round_ == "search" else confirm_seeds(job, index)
    values = {"freeze.depth": 3, "head.hidden": 0, "train.schedule": "constant", "train.warmup": 0.0, **values}
    config = configure(job, job.arms["freeze"], values)
    return trial_of(
        job,
        config,
        seeds,
        trial_id=f"freeze-{number:05d}",
        arm="freeze",
        number=number,
        round="search" if round_ == "search" else "confirm",
        seed=seed,
        cached=True,
    )


def lanes_of(root: Path, views: int | str, *configs: Mapping[str, Any], **of_spec: Any) -> list[TrialSpec]:
    """Trials of one pack whose activations are in the store."""
    job = prepare(toy_job(root / "study", [f"augment.views={views}"])).job
    specs = [spec_of(job, number, values, **of_spec) for number, values in enumerate(configs)]
    for shard in survey(Survey(tuple(specs), None, (), 1), CPU, lambda *_: None).shards:
        extract(shard, Feed(), CPU)
    assert take_pack(specs, STAGES, 64, 1) == specs
    return specs


class Ran:
    """A pack that has run: the epochs of each trial, in which company it reported them, its outcome."""

    def __init__(self, specs: Sequence[TrialSpec], go_on: Callable[[str, int], bool] = lambda *_: True) -> None:
        self.heard: list[dict[str, int]] = []
        self.records: dict[str, list[EpochRecord]] = {spec.trial_id: [] for spec in specs}
        self.outcomes: dict[str, Outcome] = {}
        self.ended: list[list[str]] = []
        self.feed, self.go_on = Feed(), go_on
        started = time.perf_counter()
        run_pack(specs, feed=self.feed, world=CPU, report=self.report, finish=self.finish)
        self.seconds = time.perf_counter() - started

    def report(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        self.heard.append({trial_id: record.epoch for trial_id, record in records.items()})
        for trial_id, record in records.items():
            assert trial_id not in self.outcomes, "it has ended"
            self.records[trial_id].append(record)
        return {trial_id: self.go_on(trial_id, record.epoch) for trial_id, record in records.items()}

    def finish(self, outcomes: Mapping[str, Outcome]) -> None:
        assert not outcomes.keys() & self.outcomes.keys(), "it has ended before"
        self.outcomes |= outcomes
        self.ended.append(sorted(outcomes))

    def row(self, number: int) -> dict[str, Any]:
        row = self.outcomes[f"freeze-{number:05d}"].row
        table_of("trials", [row])
        return row

    def losses(self, number: int) -> list[float]:
        return [record.val["nll"] for record in self.records[f"freeze-{number:05d}"]]


# --- deciding ---

JOB = toy_job(Path("unused"))
LIVE = toy_job(Path("unused"), ["augment.views=live"])


@st.composite
def waiting_trials(draw: st.DrawFn) -> list[TrialSpec]:
    """Trials of a study, cached or not, in both rounds, of several cuts, batch sizes and precisions."""
    job = draw(st.sampled_from([JOB, LIVE]))
    return [
        spec_of(
            job,
            number,
            {
                "freeze.depth": draw(st.integers(1, STAGES)),
                "train.batch_size": draw(st.sampled_from([16, 32])),
                "train.precision": draw(st.sampled_from(["fp32", "bf16"])),
            },
            draw(st.sampled_from(["search", "search", "confirm"])),
            draw(st.integers(0, 1)),
        ).model_copy(update={"cached": draw(st.booleans())})
        for number in range(draw(st.integers(1, 12)))
    ]


@given(waiting=waiting_trials(), lanes=st.integers(1, 20), share=st.integers(1, 5))
def test_packs_keep_the_order_mix_nothing_and_leave_nothing(waiting: list[TrialSpec], lanes: int, share: int) -> None:
    left = list(waiting)
    while left:
        pack = take_pack(left, STAGES, lanes, share)
        assert pack[0] == left[0], "the first is never passed over"
        assert [spec for spec in left if spec in pack] == pack
        keys = {pack_key(spec, STAGES) for spec in pack}
        assert len(keys) == 1
        (key,) = keys
        assert len(pack) == 1 or key is not None
        fitting = sum(pack_key(spec, STAGES) == key for spec in left)
        limit = 1 if key is None else min(lanes, SUFFIXES) if key[0] == "live" else lanes
        assert len(pack) == min(limit, -(-fitting // share)), "as many as may, and no more than the share"
        assert len({(spec.seeds.order, spec.seeds.subset, spec.seeds.augment) for spec in pack}) == 1
        left = [spec for spec in left if spec not in pack]


def test_what_may_train_together_is_what_sees_the_same_batches() -> None:
    def key(job: Job = JOB, round_: str = "search", index: int = 0, number: int = 0, **values: Any) -> Any:
        return pack_key(spec_of(job, number, {k.replace("_", ".", 1): v for k, v in values.items()}, round_, index), 3)

    same = key()
    own = {"head.hidden": 9, "head.dropout": 0.3, "head.init": "zero", "train.lr": 0.1, "train.head_lr": 0.2}
    own |= {"train.optimizer": "sgd", "train.weight_decay": 0.3, "train.epochs": 7, "train.ema": 0.9}
    own |= {"train.clip_norm": 1.0, "train.label_smoothing": 0.1, "train.schedule": "cosine"}
    assert pack_key(spec_of(JOB, 5, own), STAGES) == same, "of these each lane has its own"
    different = [
        *(key(train_batch_size=16), key(train_precision="bf16")),
        *(
            key(round_="confirm"),
            key(round_="confirm", index=1),
            key(job=LIVE),
            key(job=toy_job(Path("x"), ["seed=1"])),
        ),
    ]
    assert len({same, *different}) == 1 + len(different)
    alone = spec_of(JOB, 0, {})
    for name in ("split", "subset", "augment", "order", "head", "dropout"):
        other = alone.model_copy(update={"seeds": alone.seeds.model_copy(update={name: 7})})
        assert (pack_key(other, STAGES) == same) == (name in ("head", "dropout"))
    assert key(round_="confirm", number=1) == key(round_="confirm", number=2), "finalists on one seed"
    assert key(freeze_depth=2) is None, "a suffix shares nothing where activations are read"
    assert key(job=LIVE, freeze_depth=2) == key(job=LIVE, freeze_depth=1) == key(job=LIVE), "but a live pass it does"
    assert pack_key(spec_of(JOB, 0, {}).model_copy(update={"cached": False}), STAGES) is None
    assert key(train_compile=True) == same, "heads alone are not compiled"
    assert key(job=LIVE, freeze_depth=2, train_compile=True) is None


def test_as_many_packs_as_can_start_share_what_fits() -> None:
    specs = [spec_of(JOB, number, {}) for number in range(10)]
    assert [len(take_pack(specs, STAGES, 64, share)) for share in (1, 2, 3, 20)] == [10, 5, 4, 1]
    assert len(take_pack(specs, STAGES, 3, 1)) == 3
    assert len(take_pack([spec_of(LIVE, number, {}) for number in range(10)], STAGES, 64, 1)) == SUFFIXES == 8


# --- running ---


@kinds
def test_lanes_report_together_and_end_each_at_its_own_last_epoch(tmp_path: Path, views: int | str) -> None:
    ran = Ran(lanes_of(tmp_path, views, *({"train.epochs": epochs} for epochs in (3, 1, 2))))
    first, second, third = (f"freeze-{number:05d}" for number in range(3))
    assert ran.heard == [{first: 1, second: 1, third: 1}, {first: 2, third: 2}, {first: 3}]
    assert ran.ended == [[second], [third], [first]]
    assert [ran.row(number)["epochs"] for number in range(3)] == [3, 1, 2]
    assert {ran.row(number)["status"] for number in range(3)} == {"complete"}
    assert {ran.row(number)["inputs"] for number in range(3)} == {"features"}


@kinds
def test_a_lane_is_stopped_alone_and_the_others_do_not_notice(tmp_path: Path, views: int | str) -> None:
    specs = lanes_of(tmp_path, views, *({"train.head_lr": lr, "head.dropout": 0.2} for lr in (1e-3, 1e-2, 3e-2)))
    together = Ran(specs)
    stopped = Ran(specs, lambda trial_id, epoch: (trial_id, epoch) != ("freeze-00001", 1))
    row = stopped.row(1)
    assert (row["status"], row["epochs"], row["val_score"]) == ("pruned", 1, None)
    assert row["reason"] == "stopped after epoch 1 of 3"
    assert stopped.ended[0] == ["freeze-00001"]
    assert [list(heard) for heard in stopped.heard[1:]] == [["freeze-00000", "freeze-00002"]] * 2
    for number in (0, 2):
        assert stopped.row(number)["status"] == "complete"
        np.testing.assert_allclose(stopped.losses(number), together.losses(number), rtol=1e-6)
    assert stopped.losses(1) == together.losses(1)[:1]


@kinds
def test_a_stop_after_the_last_epoch_is_no_stop(tmp_path: Path, views: int | str) -> None:
    ran = Ran(lanes_of(tmp_path, views, {}, {}), lambda _, epoch: epoch < 3)
    assert {ran.row(number)["status"] for number in (0, 1)} == {"complete"}


@kinds
def test_a_lane_that_diverges_fails_alone(tmp_path: Path, views: int | str) -> None:
    healthy = {"train.optimizer": "sgd", "train.head_lr": 1e-2}
    specs = lanes_of(tmp_path, views, healthy, {**healthy, **DIVERGES}, {**healthy, "head.hidden": 4})
    ran = Ran([spec.model_copy(update={"config": longer(spec)}) for spec in specs])
    failed = ran.row(1)
    assert (failed["status"], failed["error_kind"], failed["val_score"]) == ("failed", "non_finite", None)
    assert "try a lower learning rate" in failed["reason"]
    assert failed["spent_s"] > 0
    assert failed["epochs"] == len(ran.records["freeze-00001"]) < 15
    for number in (0, 2):
        assert ran.row(number)["status"] == "complete"
        assert np.isfinite(ran.losses(number)).all()
    assert ran.ended == [["freeze-00001"], ["freeze-00000", "freeze-00002"]]
    alone = Ran([spec.model_copy(update={"config": longer(spec)}) for spec in specs[:1]])
    np.testing.assert_allclose(ran.losses(0), alone.losses(0), rtol=1e-4)


def longer(spec: TrialSpec) -> Any:
    """Long enough for a loss to leave what float32 holds."""
    return spec.config.model_copy(update={"train": spec.config.train.model_copy(update={"epochs": 15})})


@kinds
@pytest.mark.parametrize("where", ["report", "finish"])
def test_an_error_of_the_study_is_raised_and_is_no_trials_failure(tmp_path: Path, views: int | str, where: str) -> None:
    specs = lanes_of(tmp_path, views, {}, {})
    outcomes: dict[str, Outcome] = {}

    def report(records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        return dict.fromkeys(records, bool(1 / (where != "report")))

    def finish(ended: Mapping[str, Outcome]) -> None:
        outcomes.update(ended)
        assert where != "finish", "the study is gone"

    with pytest.raises((ZeroDivisionError, AssertionError), match="division by zero|the study is gone"):
        run_pack(specs, feed=Feed(), world=CPU, report=report, finish=finish)
    assert {outcome.row["status"] for outcome in outcomes.values()} <= {"complete"}


@kinds
def test_where_the_data_cannot_be_read_every_lane_fails_with_its_reason(tmp_path: Path, views: int | str) -> None:
    specs = lanes_of(tmp_path, views, {}, {"head.hidden": 4}, {})
    gone = specs[0].data.model_copy(update={"path": str(tmp_path / "gone")})
    ran = Ran([spec.model_copy(update={"data": gone}) for spec in specs])
    assert ran.heard == []
    for number in range(3):
        row = ran.row(number)
        assert (row["status"], row["error_kind"], row["epochs"]) == ("failed", "data", 0)
        assert "gone" in row["reason"]
        assert row["error"].splitlines()[-1].startswith("frostline.files.DataError")


@kinds
def test_where_activations_are_missing_every_lane_says_so(tmp_path: Path, views: int | str) -> None:
    specs = lanes_of(tmp_path, views, {}, {})
    elsewhere = specs[0].features.model_copy(update={"path": str(tmp_path / "empty")})
    ran = Ran([spec.model_copy(update={"features": elsewhere}) for spec in specs])
    assert {ran.row(number)["error_kind"] for number in (0, 1)} == {"user_error"}
    assert all("holds no activations: extract them first" in ran.row(number)["reason"] for number in (0, 1))


def test_one_lane_of_a_live_pack_that_cannot_begin_fails_alone(tmp_path: Path) -> None:
    """Deeper than the network is."""
    specs = lanes_of(tmp_path, "live", {"freeze.depth": 1}, {"freeze.depth": 2}, {"freeze.depth": 3})
    broken = specs[1].config.model_copy(update={"freeze": specs[1].config.freeze.model_copy(update={"depth": 7})})
    ran = Ran([specs[0], specs[1].model_copy(update={"config": broken}), specs[2]])
    assert [ran.row(number)["status"] for number in range(3)] == ["complete", "failed", "complete"]
    assert ran.row(1)["error_kind"] == "user_error"


@kinds
def test_what_lanes_spent_adds_up_to_what_the_pack_took(tmp_path: Path, views: int | str) -> None:
    configs = [
        {"head.hidden": hidden, "train.epochs": epochs} for hidden, epochs in ((0, 20), (64, 20), (16, 10), (0, 5))
    ]
    ran = Ran(lanes_of(tmp_path, views, *configs), lambda trial_id, epoch: (trial_id, epoch) != ("freeze-00001", 15))
    rows = [ran.row(number) for number in range(4)]
    total = sum(row["spent_s"] for row in rows)
    assert 0.7 * ran.seconds < total < 1.02 * ran.seconds
    for row in rows:
        parts = sum(row[name] for name in ("seconds_data", "seconds_setup", "seconds_train", "seconds_eval"))
        assert parts == pytest.approx(row["spent_s"], rel=0.05, abs=2e-3)
        assert 0 < row["spent_s"] <= row["seconds"] * 1.001


def test_a_wide_head_pays_for_its_width(tmp_path: Path) -> None:
    ran = Ran(lanes_of(tmp_path, 0, {"head.hidden": 2048}, {}, {}))
    wide, *narrow = (sum(record.seconds for record in ran.records[f"freeze-{number:05d}"]) for number in range(3))
    assert wide / narrow[0] == pytest.approx(ran.row(0)["trainable_params"] / ran.row(1)["trainable_params"])
    assert narrow[0] == narrow[1]


def test_lanes_of_a_live_pack_share_its_passes(tmp_path: Path) -> None:
    """Whatever their cuts: 100 images an epoch, however many lanes; validation is read."""
    depths = (1, 2, 3, 3)
    ran = Ran(lanes_of(tmp_path, "live", *({"freeze.depth": depth} for depth in depths)))
    assert ran.feed.images_forwarded == 3 * 100
    assert not ran.feed._passed_cuts, "the next pack is not charged with them"
    for number, depth in enumerate(depths):
        row = ran.row(number)
        assert (row["status"], row["freeze_depth"], row["views"]) == ("complete", depth, "live")
        assert row["images_forward"] == 3 * 100, "each saw every pass"
        assert row["images_backward"] == (3 * 100 if depth < STAGES else 0)


def test_a_live_pass_goes_on_for_those_that_are_left_only(tmp_path: Path) -> None:
    ran = Ran(lanes_of(tmp_path, "live", {"freeze.depth": 1, "train.epochs": 1}, {"freeze.depth": 2}))
    assert ran.feed.images_forwarded == 3 * 100
    assert (ran.row(0)["images_forward"], ran.row(1)["images_forward"]) == (100, 300)
    again = Ran(lanes_of(tmp_path, "live", {"freeze.depth": 1}))
    assert again.feed.images_forwarded == 3 * 100


def test_reading_heads_pass_no_image(tmp_path: Path) -> None:
    ran = Ran(lanes_of(tmp_path, 2, {}, {"head.hidden": 4}))
    assert ran.feed.images_forwarded == 0
    for number in (0, 1):
        row = ran.row(number)
        assert (row["images_forward"], row["images_backward"], row["views"]) == (0, 0, "2")


@kinds
def test_confirmations_in_a_pack_are_scored_on_test_each_with_its_bundle(tmp_path: Path, views: int | str) -> None:
    specs = lanes_of(tmp_path, views, {"train.head_lr": 1e-3}, {"train.head_lr": 1e-1}, round_="confirm")
    ran = Ran(specs, lambda trial_id, epoch: trial_id == "freeze-00000" or epoch < 2)
    kept, pruned = (ran.outcomes[spec.trial_id] for spec in specs)
    assert kept.row["test_accuracy"] == np.mean([each["label"] == each["predicted"] for each in kept.predictions])
    assert len(kept.predictions) == kept.row["n_test"]
    assert set(kept.bundle) == {"model.safetensors", "bundle.json", "README.md"}
    assert (pruned.row["status"], pruned.predictions, pruned.bundle) == ("pruned", [], {})


@kinds
def test_a_pack_repeats_exactly_and_leaves_no_random_number_behind(tmp_path: Path, views: int | str) -> None:
    specs = lanes_of(tmp_path, views, *({"head.dropout": 0.5, "head.hidden": hidden} for hidden in (8, 0, 8)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = Ran(specs)
    assert torch.equal(torch.get_rng_state(), before)
    second = Ran(specs)
    for number in range(3):
        assert first.losses(number) == second.losses(number)
    assert first.losses(0) != first.losses(2), "their seeds differ"


def test_a_stopwatch_runs_within_its_block_and_takes_what_it_is_given() -> None:
    watch = Stopwatch()
    assert watch() == 0
    with watch:
        time.sleep(0.01)
        assert watch() >= 0.01
    held = watch()
    time.sleep(0.01)
    assert watch() == held
    watch.seconds -= 5
    with watch:
        pass
    assert held - 5 <= watch() < held - 4.9
