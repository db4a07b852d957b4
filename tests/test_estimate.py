"""What a search would cost: exact numbers from given times, the timing itself, and what is printed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from frostline import results
from frostline.api import search
from frostline.backbone import stage_table
from frostline.costs import StageTimes, alone_seconds
from frostline.estimate import (
    BUNDLE_BYTES,
    EPOCH_BYTES,
    PART_BYTES,
    PREDICTION_BYTES,
    SAMPLE_BYTES,
    TRIAL_BYTES,
    Cost,
    Estimate,
    Sizes,
    arm_cuts,
    arm_places,
    cut_choices,
    estimate,
    expected_epochs,
    expected_reads,
    facts_of,
    local_slots,
    mean_bytes,
    stage_times,
)
from frostline.fixed import fixed_job
from frostline.plan import render_plan
from frostline.prepare import prepare
from frostline.propose import SpaceError
from frostline.spec import Job, Pruner, Resources
from frostline.stages import StageCost
from frostline.testing import image_folder, toy_job, toy_training

STAGES = tuple(
    StageCost(name, parameters, parameters / 1000, 0, share, 40)
    for name, parameters, share in (("stem", 100, 0.5), ("body", 300, 0.25), ("neck", 600, 0.25))
)
SIZES = Sizes(n_train=100, n_val=20, n_test=50, classes=10, feature_dim=8, inputs_bytes=12345)
TIMES = StageTimes(
    device="cpu",
    hardware="a machine",
    threads=1,
    batch=32,
    prefix_s={0: 0.0, 1: 0.005, 2: 0.0075, 3: 0.01},
    step_s={0: 0.1, 1: 0.06, 2: 0.05, 3: 0.001},
    view_s=0.0,
    read_bytes_per_s=100_000.0,
    start_s=2.0,
)
READ = 32 / TIMES.read_bytes_per_s  # seconds, of 8 features
HEADS = {3: 32}


def job_with(arms: dict[str, Any], overrides: list[str], **sections: Any) -> Job:
    return toy_job(Path("unused"), overrides, arms=arms, **sections)


def depths(*choices: Any, **space: Any) -> dict[str, Any]:
    return {"strategy": "freeze_depth", "space": {"freeze.depth": list(choices), **space}}


def priced(job: Job, stored: Mapping[int, int] | None = None, times: StageTimes = TIMES, slots: int = 1) -> Estimate:
    heads = HEADS if any(3 in arm_cuts(job, arm, 3) for arm in job.arms.values()) else {}
    return estimate(job, STAGES, SIZES, times, slots, heads if stored is None else stored, 0)


def close(cost: Cost, forward: float, backward: float, device_s: float, wall_s: float) -> bool:
    found = (cost.images_forward, cost.images_backward, cost.device_s, cost.wall_s)
    return found == pytest.approx((forward, backward, device_s, wall_s))


def test_one_live_depth_costs_its_steps_its_validation_and_its_start() -> None:
    base = ["search.trials=4", "train.epochs=3", "search.pruner.kind=none", "confirm.seeds=0"]
    for options, probed in ((["features.cache=none"], 0), ([], 120)):  # heads in closed form take a pass of each image
        job = job_with({"a": depths(0)}, [*base, *options])
        found = priced(job, slots=2)
        seconds = 4 * (2 + 3 * (100 * 0.1 + 20 * 0.01)) + probed * 0.01
        assert (found.trials, found.confirmations) == (4, 0)
        assert close(found.at_most, 4 * 3 * 120 + probed, 4 * 3 * 100, seconds, seconds / 2)
        assert found.expected == found.at_most


def test_heads_read_what_was_extracted_once() -> None:
    job = job_with(
        {"a": {"strategy": "linear_probe"}},
        ["search.trials=4", "train.epochs=3", "search.pruner.kind=none", "confirm.seeds=0"],
    )
    heads = 4 * (2 + 3 * (100 * 0.001 + 120 * READ))
    seconds = heads + 120 * (0.01 + READ)  # extracted and written
    for slots in (1, 2, 4):
        found = priced(job, slots=slots)
        assert close(found.at_most, 120, 0, seconds, seconds / slots)
        assert found.disk["features"] == 120 * 32
    live = 4 * (2 + 3 * (100 * 0.011 + 20 * 0.01)) + 120 * 0.01
    assert close(priced(job, {}).at_most, 4 * 3 * 120 + 120, 0, live, live)
    assert priced(job, {}).disk["features"] == 0


def test_expected_is_the_mean_over_depths_stopped_early_and_at_most_is_the_dearest_depth_to_its_end() -> None:
    job = job_with(
        {"a": depths(0, 3)}, ["search.trials=6", "train.epochs=4", "search.pruner.factor=2", "confirm.seeds=2"]
    )
    # rungs at 1 and 2 epochs: 1 + 1 / 2 + 2 / 4
    found = priced(job)
    extracted = (120 + 50 + 2 * 100) * (0.01 + READ)  # test, and two fresh subsets of train
    live, head = (2 + epochs * (100 * 0.1 + 20 * 0.01) for epochs in (2, 4)), 100 * 0.001 + 120 * READ
    stopped, full = live
    expected = 6 * (stopped + 2 + 2 * head) / 2 + extracted + 2 * (full + 50 * 0.01 + 2 + 4 * head + 50 * READ) / 2
    at_most = 6 * full + extracted + 2 * (full + 50 * 0.01)
    forward = 6 * 2 * 120 / 2 + 370 + 2 * (4 * 120 + 50) / 2
    assert close(found.expected, forward, 6 * 2 * 100 / 2 + 2 * 4 * 100 / 2, expected, expected)
    assert close(found.at_most, 6 * 4 * 120 + 370 + 2 * (4 * 120 + 50), 8 * 4 * 100, at_most, at_most)


def test_without_per_class_a_confirmation_trains_on_features_that_are_there() -> None:
    job = job_with({"a": {"strategy": "linear_probe"}}, ["search.trials=1", "train.epochs=1"], data={"path": "digits"})
    assert priced(job).at_most.images_forward == 120 + 50


def test_a_trial_costs_what_it_would_take_alone() -> None:
    base = ["search.trials=1", "train.epochs=3", "search.pruner.kind=none", "confirm.seeds=0"]
    base += ["augment.views=live", "features.cache=none"]
    times = replace(TIMES, view_s=0.003)
    for cut in range(4):
        job = job_with({"a": depths(cut)}, base)
        assert priced(job, {}, times).expected.device_s == pytest.approx(alone_seconds(times, {cut: 3}, 100, 20, 0))


def test_views_are_stored_each_and_made_once_or_always() -> None:
    base = ["search.trials=1", "train.epochs=6", "search.pruner.kind=none", "confirm.seeds=0"]
    times, probe = replace(TIMES, view_s=0.003), {"a": {"strategy": "linear_probe"}}
    fixed = priced(job_with(probe, [*base, "augment.views=4"]), times=times)
    extraction = 420 * (0.01 + READ) + 400 * 0.003
    assert close(fixed.at_most, 420, 0, *[2 + 6 * (100 * 0.001 + 120 * READ) + extraction] * 2)
    live = priced(job_with(probe, [*base, "augment.views=live"]), times=times)
    seconds = 2 + 6 * (100 * (0.003 + 0.01 + 0.001) + 20 * READ) + 20 * (0.01 + READ)  # val alone is stored
    seconds += 100 * (0.003 + 0.01)  # one view of train for heads in closed form
    assert close(live.at_most, 6 * 100 + 120, 0, seconds, seconds)
    assert live.disk["features"] == 20 * 32


def test_images_of_the_search_pass_once_to_the_end() -> None:
    job = job_with({"a": depths(1, 2)}, ["search.trials=2", "train.epochs=1", "confirm.seeds=0"])
    extraction = 120 * (0.01 + 64 / TIMES.read_bytes_per_s)
    found = priced(job, {1: 40, 2: 24})
    trials = [
        2 + 100 * (size / 1e5 + TIMES.step_s[cut]) + 20 * (size / 1e5 + 0.01 - TIMES.prefix_s[cut])
        for cut, size in ((1, 40), (2, 24))
    ]
    assert close(found.expected, 120, 200, *[sum(trials) + extraction] * 2)
    assert found.disk["features"] == 120 * 64


def test_reads_are_the_trials_and_epochs_that_a_cut_can_expect() -> None:
    base = ["search.trials=12", "train.epochs=4", "search.pruner.kind=none"]
    job = job_with({"a": depths(1, 2, 3), "b": {"strategy": "linear_probe"}}, base)
    assert expected_reads(job, 3) == pytest.approx({1: 8, 2: 8, 3: 8 + 24})
    views = job_with({"a": depths(1, 2, 3)}, [*base, "augment.views=4"])
    assert expected_reads(views, 3) == pytest.approx({1: 4, 2: 4, 3: 4})
    stopped = job_with({"a": depths(3)}, ["search.trials=12", "train.epochs=3", "search.pruner.factor=3"])
    assert expected_reads(stopped, 3) == pytest.approx({3: 12 * (1 + 2 / 3)})


def test_arms_share_the_trials_and_finalists_are_one_or_one_of_each() -> None:
    arms = {"full": {"strategy": "full"}, "probe": {"strategy": "linear_probe"}}
    overrides = ["search.trials=6", "train.epochs=2", "search.pruner.kind=none", "confirm.seeds=3"]
    live, head = 2 + 2 * 10.2, 2 + 2 * (0.1 + 120 * READ)
    search_s = 3 * live + 3 * head + (120 + 50 + 3 * 100) * (0.01 + READ)

    best = priced(job_with(arms, overrides), slots=2)
    assert (best.trials, best.confirmations) == (6, 3)
    assert best.at_most.device_s == pytest.approx(search_s + 3 * (live + 0.5))
    assert best.expected.device_s == pytest.approx(search_s + 3 * (live + 0.5 + head + 50 * READ) / 2)
    assert best.at_most.wall_s == pytest.approx(search_s / 2 + 2 * (live + 0.5))  # 3 confirmations: 2, then 1

    each = priced(job_with(arms, overrides, confirm={"seeds": 3, "finalists": "arms"}), slots=2)
    assert each.confirmations == 6
    assert each.at_most.device_s == pytest.approx(search_s + 3 * (live + 0.5 + head + 50 * READ))
    assert each.expected == each.at_most


def test_searched_epochs_count_as_their_mean_and_at_most_as_their_largest() -> None:
    base = ["search.trials=1", "search.pruner.kind=none", "confirm.seeds=0"]
    means = {(2, 5, 8): 5, (1, 2): 1.5}
    for choices, mean in means.items():
        found = priced(job_with({"a": depths(0, **{"train.epochs": list(choices)})}, base))
        assert found.expected.images_backward == pytest.approx(100 * mean)
        assert found.at_most.images_backward == pytest.approx(100 * choices[-1])
    uniform = {"train.epochs": {"low": 2, "high": 10}}
    assert priced(job_with({"a": depths(0, **uniform)}, base)).expected.images_backward == pytest.approx(600)
    log = {"train.epochs": {"low": 1, "high": 100, "log": True}}  # 99 / ln 100
    assert priced(job_with({"a": depths(0, **log)}, base)).expected.images_backward == pytest.approx(2149.76, abs=0.01)


def test_recalibration_and_a_probe_start_are_passes_over_train() -> None:
    base = ["search.trials=1", "train.epochs=1", "search.pruner.kind=none", "confirm.seeds=0"]
    plain = priced(job_with({"a": depths(0)}, base))
    for key, choices in (("freeze.norm", ["frozen", "recalibrate"]), ("head.init", ["random", "probe"])):
        some = priced(job_with({"a": depths(0, **{key: choices})}, base))
        assert some.expected.images_forward - plain.expected.images_forward == 50
        assert some.at_most.images_forward - plain.at_most.images_forward == 100
        assert some.at_most.device_s - plain.at_most.device_s == pytest.approx(100 * 0.01)
    heads = priced(job_with({"a": depths(3)}, base))
    probed = priced(job_with({"a": depths(3, **{"head.init": ["probe"]})}, base))
    assert probed.at_most.images_forward == heads.at_most.images_forward
    assert probed.at_most.device_s - heads.at_most.device_s == pytest.approx(100 * READ)
    assert priced(job_with({"a": depths(3, **{"freeze.norm": ["recalibrate"]})}, base)) == heads  # all is frozen


def test_disk_counts_files_rows_predictions_and_the_tensors_that_can_train() -> None:
    job = job_with(
        {"a": depths(1, **{"head.hidden": [0, 16]})}, ["search.trials=10", "train.epochs=3", "confirm.seeds=2"]
    )
    times = replace(TIMES, prefix_s=dict.fromkeys(range(4), 0.0), step_s=dict.fromkeys(range(4), 0.0), start_s=0.4)
    assert priced(job, times=times).disk == {  # 12 trials in 4.8 s are 3 commits, and one for the last of them
        "rows": 4 * PART_BYTES + 12 * TRIAL_BYTES + 36 * EPOCH_BYTES + 170 * SAMPLE_BYTES,
        "predictions": 100 * (40 + PREDICTION_BYTES),
        "bundle": 4 * (900 + 8 * 16 + 16 * 10) + BUNDLE_BYTES,
        "inputs": 12345,
        "features": 0,
    }
    assert priced(job_with({"a": depths(1)}, ["confirm.seeds=0"]), times=times).disk["bundle"] == 0


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "expected"),
    [
        (1, 3, 4, 1 + 2 / 3 + 1 / 9),
        (1, 3, 3, 1 + 2 / 3),  # at the last epoch there is nothing left to stop
        (2, 4, 10, 2 + 6 / 4 + 2 / 16),
        (5, 2, 5, 5),
        (9, 2, 5, 5),
    ],
)
def test_halving_lets_one_in_factor_trials_past_each_rung(
    grace: int, factor: int, epochs: int, expected: float
) -> None:
    assert expected_epochs(Pruner(kind="halving", grace_epochs=grace, factor=factor), epochs) == pytest.approx(expected)


def test_no_claim_is_made_for_other_pruners() -> None:
    assert expected_epochs(Pruner(kind="median"), 12) == expected_epochs(Pruner(kind="none"), 12) == 12


@given(st.integers(1, 9), st.integers(2, 5), st.integers(1, 200))
def test_halving_never_trains_longer_nor_less_than_its_grace(grace: int, factor: int, epochs: int) -> None:
    pruner = Pruner(kind="halving", grace_epochs=grace, factor=factor)
    assert min(grace, epochs) <= expected_epochs(pruner, epochs) <= epochs
    assert expected_epochs(pruner, epochs) <= expected_epochs(pruner, epochs + 1)


@pytest.mark.parametrize(
    ("arm", "cuts"),
    [
        ({"strategy": "full"}, [0]),
        ({"strategy": "linear_probe"}, [3]),
        ({"strategy": "freeze_depth", "space": {"freeze.depth": "all"}}, [0, 1, 2, 3]),
        ({"strategy": "freeze_depth", "space": {"freeze.depth": 2}}, [2]),
        (depths(0.0, 0.3, 0.4, 1.0), [0, 1, 3]),  # 0.3 and 0.4 are one stage each
        (depths("all", 1), [1, 3]),
    ],
)
def test_an_arm_draws_these_cuts(arm: dict[str, Any], cuts: list[int]) -> None:
    job = job_with({"a": arm}, [])
    assert arm_cuts(job, job.arms["a"], 3) == cuts


def test_an_arm_that_searches_where_the_head_stands_draws_every_pair() -> None:
    job = job_with({"a": depths(0, 2, **{"head.depth": [1, 3]})}, [])
    assert sorted(arm_places(job, job.arms["a"], 3)) == [(0, 1), (0, 3), (1, 1), (2, 3)]
    assert arm_cuts(job, job.arms["a"], 3) == [0, 1, 2]
    probe = job_with({"a": {"strategy": "linear_probe", "space": {"head.depth": "all"}}}, [])
    assert arm_places(probe, probe.arms["a"], 3) == [(1, 1), (2, 2), (3, 3)]
    assert expected_reads(probe, 3).keys() == {3}, "what only a head reads before the end is a mean over positions"


def test_slots_are_what_a_local_ray_would_hold() -> None:
    assert local_slots(Resources(), cores=6, gpus=0) == 6
    assert local_slots(Resources(cpus=4), cores=6, gpus=0) == 1
    assert local_slots(Resources(cpus=8), cores=6, gpus=0) == 0
    assert local_slots(Resources(), cores=6, gpus=2) == 2
    assert local_slots(Resources(device="cpu"), cores=6, gpus=2) == 6
    assert local_slots(Resources(gpus=0.25), cores=6, gpus=1) == 4


def test_stages_are_timed_at_what_the_arms_may_draw(tmp_path: Path) -> None:
    times = stage_times(prepare(toy_job(tmp_path, ["train.ema=0.9", "train.batch_size=16"])))
    assert [*times.prefix_s] == [*times.step_s] == [0, 1, 2, 3]
    assert times.batch == 16
    searched = {"a": depths(1, **{"train.batch_size": [8, 16], "head.hidden": [0, 9]})}
    times = stage_times(prepare(toy_job(tmp_path, arms=searched)))
    assert [*times.prefix_s] == [1, 3]
    assert times.batch == 12


def test_facts_say_what_is_stored_and_what_that_was_decided_by(tmp_path: Path) -> None:
    facts = facts_of(prepare(toy_job(tmp_path, ["features.cache=all"])))
    assert facts["cached_cuts"] == [1, 2, 3]
    assert facts["stage_times"]["device"] == "cpu"
    assert facts["probed_cuts"] == [1, 2, 3]
    assert facts["stages"] == ["stem", "block1", "block2"]
    none = facts_of(prepare(toy_job(tmp_path, ["features.cache=none"])))
    assert (none["cached_cuts"], none["probed_cuts"]) == ([], [])
    json.dumps(facts)


def test_what_is_stored_follows_dtype_views_and_budget(tmp_path: Path) -> None:
    def sizes(*overrides: str) -> dict[int, int | None]:
        prepared = prepare(toy_job(tmp_path, ["features.cache=all", *overrides]))
        choices = cut_choices(prepared, stage_times(prepared))
        return {choice.cut: choice.image_bytes for choice in choices if choice.stored}

    assert sizes() == {1: 2048, 2: 1024, 3: 96}
    assert sizes("features.dtype=float16") == {1: 1024, 2: 512, 3: 48}
    images = 100 + 270  # train and val
    assert sizes(f"features.budget_gb={images * 96 / 1e9}") == {3: 96}
    assert sizes(f"features.budget_gb={images * 96 / 1e9}", "augment.views=2") == {}
    assert 3 in sizes(f"features.budget_gb={470 * 96 / 1e9}", "augment.views=2")


def test_a_search_stays_within_the_images_and_bytes_of_its_estimate(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "study", ["search.trials=9", "features.cache=all"])
    prepared = prepare(job)
    dataset = prepared.dataset
    sizes = Sizes(
        n_train=100,
        n_val=len(dataset.indices("val")),
        n_test=len(dataset.indices("test")),
        classes=10,
        feature_dim=24,
        inputs_bytes=dataset.inputs.nbytes,
    )
    times, stored = stage_times(prepared), {1: 2048, 2: 1024, 3: 96}
    found = estimate(prepared.job, stage_table(prepared.backbone, 16), sizes, times, 1, stored, mean_bytes(prepared))
    study = search(job, inline=True, console=Console(file=io.StringIO()))
    rows, extractions = results.read_trials(study).to_pylist(), results.read_extractions(study).to_pylist()
    assert len(rows) == found.trials + found.confirmations
    forward = sum(row["images_forward"] for row in rows) + sum(row["images"] for row in extractions)
    assert sizes.n_train + sizes.n_val <= forward <= found.at_most.images_forward
    assert sum(row["images_backward"] for row in rows) <= found.at_most.images_backward
    assert sum(row["bytes"] for row in extractions) <= found.disk["features"]
    for row in rows:
        test = row["n_test"] or 0
        alone_s = alone_seconds(times, {row["freeze_depth"]: row["epochs"]}, row["n_train"], row["n_val"], test)
        assert row["alone_s"] == pytest.approx(alone_s)
    tables = ("asks", "epochs", "extractions", "probes", "trials", "splits.parquet")
    assert _bytes_in(study, tables) <= found.disk["rows"] <= 4 * _bytes_in(study, tables)
    assert _bytes_in(study, ["predictions"]) <= found.disk["predictions"] <= 2 * _bytes_in(study, ["predictions"])
    assert _bytes_in(study, ["bundle"]) <= found.disk["bundle"] <= 2 * _bytes_in(study, ["bundle"])


def _bytes_in(study: Path, names: Any) -> int:
    files = [path for name in names for path in (study / name, *(study / name).glob("*")) if path.is_file()]
    return sum(path.stat().st_size for path in files)


def plan(job: Job, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    render_plan(job, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plan_fits_100_columns_and_says_what_it_stands_on(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "study")
    text, dataset = plan(job), prepare(job).dataset
    train, val, test = (len(dataset.indices(name)) for name in ("train", "val", "test"))
    assert max(map(len, text.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "3 block2 3,528 71.1% 100.0% 0.0 30.0% 0.1" in lines
    for part in (
        f"train 100 of {train:,} (10 a class), val {val}, test {test}, excluded 0",
        "arm freeze: freeze_depth, tpe sampler, 6 trials",
        "stages frozen 0, 1, 2, 3 (3: only the head trains)",
        "train.lr 0.0001 to 0.01, log",
        "trials 6 6",
        "confirmations 2 2",
    ):
        assert part in lines
    assert "1 in 3 goes on at each rung" in text
    cut = next(line for line in lines if line.startswith("3 ") and "stored" in line)
    assert re.fullmatch(r"3 (not )?stored [\d.]+x 0\.1 .+", cut), cut
    assert not (tmp_path / "study").exists()


def test_a_training_has_a_plan_too(tmp_path: Path) -> None:
    text = plan(fixed_job(toy_training(tmp_path)))
    assert "block2" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "trials 0 0" in lines
    assert "confirmations 1 1" in lines
    assert "images backward 300 300" in lines


def test_a_plan_says_of_each_cut_whether_it_is_stored_and_why(tmp_path: Path) -> None:
    text = plan(toy_job(tmp_path / "study", ["features.cache=none"]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "depth activations gain image why" in lines
    for cut, size in ((1, "2.0"), (2, "1.0"), (3, "0.1")):
        (line,) = (line for line in lines if re.match(rf"{cut} not stored", line))
        assert re.fullmatch(rf'{cut} not stored [\d.]+x {re.escape(size)} features.cache = "none"', line)
    full = plan(toy_job(tmp_path / "study", arms={"a": {"strategy": "full"}}))
    assert "activations" not in full


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "[bold]photos\x1b[31m")
    job = toy_job(tmp_path / "study", data={"path": str(folder), "image_size": 16})
    text = plan(job, width=400)
    assert "[bold]photos\N{REPLACEMENT CHARACTER}[31m" in text
    assert "\x1b" not in text


def test_a_job_that_a_search_would_refuse_is_refused(tmp_path: Path) -> None:
    grid = {"a": {"strategy": "freeze_depth", "sampler": "grid", "space": {"freeze.depth": "all"}}}
    with pytest.raises(SpaceError, match="only 4 points"):
        plan(toy_job(tmp_path, arms=grid))
    with pytest.raises(SpaceError, match="this backbone has 3 stages"):
        plan(toy_job(tmp_path, arms={"a": depths(5)}))


def test_a_trial_too_big_for_this_machine_and_threads_too_many_are_said(tmp_path: Path) -> None:
    probe = {"a": {"strategy": "linear_probe"}}
    assert "less than resources asks for" in plan(toy_job(tmp_path, ["resources.cpus=4096"], arms=probe))
    assert "they will be" in plan(toy_job(tmp_path, ["resources.threads=2"], arms=probe))


def test_a_search_that_stores_nothing_has_a_price_too() -> None:
    """Where only the head trains, the last cut alone is timed."""
    times = replace(TIMES, prefix_s={3: 0.01}, step_s={3: 0.001})
    found = priced(job_with({"a": {"strategy": "linear_probe"}}, ["search.trials=1"]), {}, times)
    assert found.expected.device_s > 0
