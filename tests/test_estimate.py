"""What a search would cost: exact numbers from given times, the timing itself, and what is printed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from frostline import results
from frostline.api import search
from frostline.backbone import stage_table
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
    StepCosts,
    affordable_batch,
    arm_cuts,
    cuts_to_time,
    estimate,
    expected_epochs,
    local_slots,
    measure,
    step_seconds,
)
from frostline.plan import render_plan
from frostline.prepare import prepare
from frostline.propose import SpaceError
from frostline.spec import Job, Pruner, Resources
from frostline.stages import StageCost
from frostline.testing import image_folder, toy_job

STAGES = tuple(
    StageCost(name, parameters, parameters / 1000, 0, share, None)
    for name, parameters, share in (("stem", 100, 0.5), ("body", 300, 0.25), ("neck", 600, 0.25))
)
SIZES = Sizes(n_train=100, n_val=20, n_test=50, classes=10, feature_dim=8, pixels_bytes=12345)
COSTS = StepCosts(
    device="cpu", hardware="a machine", threads=1, batch_size=32, forward_s=0.01, steps={0: 0.1, 2: 0.05, 3: 0.001}, start_s=2.0
)  # fmt: skip


def job_with(arms: dict[str, Any], overrides: list[str], **sections: Any) -> Job:
    return toy_job(Path("unused"), overrides, arms=arms, **sections)


def depths(*choices: Any, **space: Any) -> dict[str, Any]:
    return {"strategy": "freeze_depth", "space": {"freeze.depth": list(choices), **space}}


def priced(job: Job, costs: StepCosts = COSTS, slots: int = 1) -> Estimate:
    return estimate(job, STAGES, SIZES, costs, slots)


def close(cost: Cost, forward: float, backward: float, device_s: float, wall_s: float) -> bool:
    found = (cost.images_forward, cost.images_backward, cost.device_s, cost.wall_s)
    return found == pytest.approx((forward, backward, device_s, wall_s))


def test_one_live_depth_costs_its_steps_its_validation_and_its_start() -> None:
    job = job_with(
        {"a": depths(0)}, ["search.trials=4", "train.epochs=3", "search.pruner.kind=none", "confirm.seeds=0"]
    )
    found = priced(job, slots=2)
    seconds = 4 * (2 + 3 * (100 * 0.1 + 20 * 0.01))
    assert (found.trials, found.confirmations) == (4, 0)
    assert close(found.at_most, 4 * 3 * 120, 4 * 3 * 100, seconds, seconds / 2)
    assert found.expected == found.at_most


def test_heads_train_on_features_that_each_process_extracts_once() -> None:
    job = job_with(
        {"a": {"strategy": "linear_probe"}},
        ["search.trials=4", "train.epochs=3", "search.pruner.kind=none", "confirm.seeds=0"],
    )
    heads = 4 * (2 + 3 * 120 * 0.001)
    for slots, processes in ((1, 1), (2, 2), (8, 4)):  # a fifth process would have no trial
        seconds = heads + processes * 120 * 0.01
        assert close(priced(job, slots=slots).at_most, processes * 120, 0, seconds, seconds / processes)


def test_expected_is_the_mean_over_depths_stopped_early_and_at_most_is_the_dearest_depth_to_its_end() -> None:
    job = job_with(
        {"a": depths(0, 3)}, ["search.trials=6", "train.epochs=4", "search.pruner.factor=2", "confirm.seeds=2"]
    )
    # rungs at 1 and 2 epochs: 1 + 1 / 2 + 2 / 4
    found = priced(job)
    extracted = 120 * 0.01
    live, head = 2 + 2 * (100 * 0.1 + 20 * 0.01), 2 + 2 * 120 * 0.001
    live_full, head_full = 2 + 4 * (100 * 0.1 + 20 * 0.01), 2 + 4 * 120 * 0.001
    live_final = live_full + 50 * 0.01  # test
    head_final = head_full + 150 * 0.01  # test, and a fresh subset of train
    expected = 6 * (live + head) / 2 + extracted + 2 * (live_final + head_final) / 2
    at_most = 6 * live_full + extracted + 2 * live_final
    forward = 6 * 2 * 120 / 2 + 120 + 2 * (4 * 120 + 50 + 150) / 2
    assert close(found.expected, forward, 6 * 2 * 100 / 2 + 2 * 4 * 100 / 2, expected, expected)
    assert close(found.at_most, 6 * 4 * 120 + 120 + 2 * (4 * 120 + 50), 8 * 4 * 100, at_most, at_most)


def test_without_per_class_a_confirmation_trains_on_features_that_are_there() -> None:
    job = job_with({"a": {"strategy": "linear_probe"}}, ["search.trials=1", "train.epochs=1"], data={"path": "digits"})
    assert priced(job).at_most.images_forward == 120 + 2 * 50


def test_arms_share_the_trials_and_finalists_are_one_or_one_of_each() -> None:
    arms = {"full": {"strategy": "full"}, "probe": {"strategy": "linear_probe"}}
    overrides = ["search.trials=6", "train.epochs=2", "search.pruner.kind=none", "confirm.seeds=3"]
    live, head = 2 + 2 * 10.2, 2 + 2 * 0.12
    search_s = 3 * live + 3 * head + 2 * 1.2

    best = priced(job_with(arms, overrides), slots=2)
    assert (best.trials, best.confirmations) == (6, 3)
    assert best.at_most.device_s == pytest.approx(search_s + 3 * (live + 0.5))
    assert best.expected.device_s == pytest.approx(search_s + 3 * (live + 0.5 + head + 1.5) / 2)
    assert best.at_most.wall_s == pytest.approx(search_s / 2 + 2 * (live + 0.5))  # 3 confirmations: 2, then 1

    each = priced(job_with(arms, overrides, confirm={"seeds": 3, "finalists": "arms"}), slots=2)
    assert each.confirmations == 6
    assert each.at_most.device_s == pytest.approx(search_s + 3 * (live + 0.5 + head + 1.5))
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


def test_recalibration_is_a_pass_over_train_and_a_probe_start_its_own_time() -> None:
    base = ["search.trials=1", "train.epochs=1", "search.pruner.kind=none", "confirm.seeds=0"]
    plain = priced(job_with({"a": depths(0)}, base))
    some = priced(job_with({"a": depths(0, **{"freeze.norm": ["frozen", "recalibrate"]})}, base))
    assert some.expected.images_forward - plain.expected.images_forward == 50
    assert some.at_most.images_forward - plain.at_most.images_forward == 100
    costs = StepCosts(**{**vars(COSTS), "probe_s": 7.0})
    probed = priced(job_with({"a": depths(0, **{"head.init": ["random", "probe"]})}, base), costs)
    assert probed.expected.device_s - plain.expected.device_s == pytest.approx(3.5 + 120 * 0.01)
    assert probed.at_most.device_s - plain.at_most.device_s == pytest.approx(7 + 120 * 0.01)


def test_disk_counts_files_rows_predictions_and_the_tensors_that_can_train() -> None:
    job = job_with(
        {"a": depths(1, **{"head.hidden": [0, 16]})}, ["search.trials=10", "train.epochs=3", "confirm.seeds=2"]
    )
    costs = StepCosts(**{**vars(COSTS), "forward_s": 0.0, "steps": {1: 0.0}, "start_s": 0.4})
    assert priced(job, costs).disk == {  # 12 trials in 4.8 s are 3 commits, and one for the last of them
        "rows": 4 * PART_BYTES + 12 * TRIAL_BYTES + 36 * EPOCH_BYTES + 170 * SAMPLE_BYTES,
        "predictions": 100 * (40 + PREDICTION_BYTES),
        "bundle": 4 * (900 + 8 * 16 + 16 * 10) + BUNDLE_BYTES,
        "pixels": 12345,
    }
    assert priced(job_with({"a": depths(1)}, ["confirm.seeds=0"]), costs).disk["bundle"] == 0


def test_between_timed_cuts_a_step_is_linear_in_the_share_of_flops_behind_it() -> None:
    assert [step_seconds(cut, STAGES, COSTS) for cut in range(4)] == pytest.approx(
        [0.1, 0.1 - 0.05 * 2 / 3, 0.05, 0.001]
    )


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


def test_cuts_to_time_hold_both_ends_and_the_head() -> None:
    assert cuts_to_time({0, 1, 2, 3, 4, 5, 6, 7, 8}, 8) == [0, 4, 7, 8]
    assert cuts_to_time({6, 1, 3}, 8) == [1, 3, 6]
    assert cuts_to_time({8}, 8) == [8]


@given(st.integers(1, 512), st.floats(1e-6, 100), st.integers(0, 3))
def test_batches_to_time_are_never_larger_than_asked_nor_one_where_two_are(
    wanted: int, image_s: float, cuts: int
) -> None:
    batch = affordable_batch(wanted, image_s, cuts)
    assert min(2, wanted) <= batch <= wanted
    assert batch <= affordable_batch(wanted, image_s / 2, cuts)


def test_slots_are_what_a_local_ray_would_hold() -> None:
    assert local_slots(Resources(), cores=6, gpus=0) == 6
    assert local_slots(Resources(cpus=4), cores=6, gpus=0) == 1
    assert local_slots(Resources(cpus=8), cores=6, gpus=0) == 0
    assert local_slots(Resources(), cores=6, gpus=2) == 2
    assert local_slots(Resources(device="cpu"), cores=6, gpus=2) == 6
    assert local_slots(Resources(gpus=0.25), cores=6, gpus=1) == 4


def test_the_real_loop_is_timed_at_the_cuts_that_the_job_can_draw(tmp_path: Path) -> None:
    costs = measure(prepare(toy_job(tmp_path, ["train.ema=0.9", "train.batch_size=16"])))
    assert sorted(costs.steps) == [0, 1, 2, 3]
    assert (costs.device, costs.threads, costs.batch_size, costs.probe_s) == ("cpu", 1, 16, 0.0)
    assert 0 < costs.forward_s < 0.1
    assert 0 < costs.steps[3] < costs.steps[0] < 0.1
    assert 0 < costs.start_s < 1
    arms = {"a": depths(1, **{"head.init": ["random", "probe"]})}
    probed = measure(prepare(toy_job(tmp_path, arms=arms)))
    assert list(probed.steps) == [1]
    assert probed.probe_s > 0


def test_a_search_stays_within_the_images_and_bytes_of_its_estimate(tmp_path: Path) -> None:
    job = toy_job(tmp_path / "study", ["search.trials=9"])
    prepared = prepare(job)
    dataset = prepared.dataset
    sizes = Sizes(
        n_train=100,
        n_val=len(dataset.indices("val")),
        n_test=len(dataset.indices("test")),
        classes=10,
        feature_dim=24,
        pixels_bytes=dataset.pixels.nbytes,
    )
    costs = measure(prepared)
    found = estimate(prepared.job, stage_table(prepared.backbone, 16), sizes, costs, slots=1)
    study = search(job, inline=True, console=Console(file=io.StringIO()))
    rows = results.read_trials(study).to_pylist()
    assert len(rows) == found.trials + found.confirmations
    for name in ("images_forward", "images_backward"):
        assert sum(row[name] for row in rows) <= getattr(found.at_most, name)
    tables = ("asks", "epochs", "trials", "splits.parquet")
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
    assert not (tmp_path / "study").exists()


def test_a_job_without_arms_gets_its_stage_table(tmp_path: Path) -> None:
    text = plan(toy_job(tmp_path, arms={}))
    assert "block2" in text
    assert "There is nothing to search" in text
    assert "at most" not in text


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "[bold]photos\x1b[31m")
    job = toy_job(tmp_path / "study", data={"path": str(folder), "image_size": 16}, arms={})
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
