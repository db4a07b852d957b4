"""What is stored, from tables of numbers; and what a trial takes by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.costs import WORTH, Choice, StageTimes, alone_seconds, choose_cuts, trial_seconds

# resnet18 on a CPU: cut -> the share of the work that comes after it; a step is three forwards of that
SUFFIX = {0: 1.0, 1: 0.93, 2: 0.57, 3: 0.43, 4: 0.13, 5: 0.0}
CPU = StageTimes(
    device="cpu",
    hardware="a processor",
    threads=1,
    batch=32,
    prefix_s={cut: 0.01 * (1 - share) for cut, share in SUFFIX.items()},
    step_s={cut: 0.03 * share + 1e-5 for cut, share in SUFFIX.items()},
    view_s=0.0,
    read_bytes_per_s=5e9,
    start_s=0.1,
)
CPU_BYTES = {1: 65536, 2: 65536, 3: 32768, 4: 16384, 5: 2048}

# resnet50 on a GPU at 224 pixels in half precision: layer1 leaves 1.6 MB an image, the pool 4 KiB
GPU = StageTimes(
    device="cuda",
    hardware="a GPU",
    threads=1,
    batch=64,
    prefix_s={0: 0.0, 1: 30e-6, 2: 80e-6, 3: 160e-6, 4: 260e-6, 5: 300e-6},
    step_s={0: 900e-6, 1: 810e-6, 2: 660e-6, 3: 420e-6, 4: 120e-6, 5: 2e-6},
    view_s=0.0,
    read_bytes_per_s=5e9,
    start_s=0.5,
)
GPU_BYTES = {1: 401_408 * 4, 2: 401_408 * 4, 3: 401_408 * 2, 4: 401_408, 5: 4096}


def chosen(times: StageTimes, image_bytes: Mapping[int, int], **different: Any) -> dict[int, Choice]:
    given = {
        "reads": dict.fromkeys(times.step_s, 1000.0),
        "images": 1000,
        "lanes": 8,
        "live_views": False,
        "cache": "auto",
        "budget_bytes": 1e12,
    }
    return {choice.cut: choice for choice in choose_cuts(times, image_bytes, **{**given, **different})}


def stored(choices: Mapping[int, Choice]) -> list[int]:
    return [cut for cut, choice in choices.items() if choice.stored]


def test_on_a_cpu_late_cuts_are_stored_and_early_ones_below_the_ceiling_are_not() -> None:
    choices = chosen(CPU, CPU_BYTES)
    assert stored(choices) == [3, 4, 5]
    for cut, share in SUFFIX.items():
        if 0 < share < 1:
            assert choices[cut].gain == pytest.approx((1 + 2 * share) / (3 * share), rel=0.02)
    assert choices[1].reason == "it would gain less than 1.3 times"
    assert choices[4].reason == "reading is faster than computing"
    assert choices[4].image_bytes == 16384


def test_on_a_gpu_early_cuts_are_computed_again_and_pooled_features_are_read() -> None:
    choices = chosen(GPU, GPU_BYTES)
    assert stored(choices) == [4, 5]
    for cut in (1, 2):
        assert choices[cut].reason == "reading is slower than computing"
        gain = choices[cut].gain
        assert gain is not None
        assert gain < 1
    faster = replace(GPU, read_bytes_per_s=200e9)
    assert stored(chosen(faster, GPU_BYTES)) == [3, 4, 5]


def test_what_would_be_read_too_seldom_is_not_stored() -> None:
    choices = chosen(CPU, CPU_BYTES, reads={4: 1000.0, 5: 1.0})
    assert stored(choices) == [4]
    assert choices[5].reason == "it would be read too seldom, 1 times"
    assert stored(chosen(CPU, CPU_BYTES, reads={4: 1.0, 5: 1.5})) == [5]


def test_a_budget_keeps_what_saves_most_per_byte() -> None:
    pooled, layer3 = 2048 * 1000, 16384 * 1000
    choices = chosen(CPU, CPU_BYTES, budget_bytes=pooled + layer3 + 5e6)
    assert stored(choices) == [4, 5]
    assert choices[3].reason == "it takes 0.0328 GB, and features.budget_gb leaves 0.005"
    assert stored(chosen(CPU, CPU_BYTES, budget_bytes=layer3)) == [5]
    assert stored(chosen(CPU, CPU_BYTES, budget_bytes=pooled - 1)) == []
    assert stored(chosen(CPU, CPU_BYTES, budget_bytes=pooled - 1, cache="all")) == []


def test_the_job_may_decide() -> None:
    everything = chosen(GPU, GPU_BYTES, cache="all")
    assert stored(everything) == [1, 2, 3, 4, 5]
    assert everything[1].reason == 'features.cache = "all"'
    nothing = chosen(CPU, CPU_BYTES, cache="none")
    assert stored(nothing) == []
    assert nothing[5].reason == 'features.cache = "none"'


def test_only_cuts_that_can_be_drawn_and_resumed_come_into_question() -> None:
    choices = chosen(CPU, {4: 16384, 5: 2048}, reads={0: 9.0, 3: 9.0, 5: 9.0}, cache="all")
    assert [*choices] == [3, 5]
    assert choices[3] == Choice(3, False, None, None, "the backbone cannot be resumed here")


def test_under_live_views_a_pass_is_shared_and_augmentation_counts() -> None:
    choices = chosen(CPU, CPU_BYTES, live_views=True, reads=dict.fromkeys(SUFFIX, 1.0))
    for cut, share in SUFFIX.items():
        if cut:
            live = 0.01 * (1 - share)
            gain = (live + CPU.step_s[cut]) / (live / 8 + CPU.step_s[cut])
            assert choices[cut].gain == pytest.approx(gain)
            assert choices[cut].stored == (gain >= WORTH)
    assert choices[4].gain == pytest.approx(2.52, abs=0.02)  # of 3.3 for any number
    assert choices[4].reason == "a live pass serves 8 trials"
    assert stored(chosen(CPU, CPU_BYTES, live_views=True, lanes=1)) == []
    dear = replace(CPU, view_s=0.02)
    assert stored(chosen(dear, CPU_BYTES, live_views=True)) == [1, 2, 3, 4, 5]
    assert stored(chosen(dear, CPU_BYTES)) == [1, 2, 3, 4, 5]


seconds = st.floats(1e-6, 1.0)
TABLES = st.integers(1, 6).flatmap(
    lambda last: st.fixed_dictionaries(
        {
            "prefix": st.lists(seconds, min_size=last, max_size=last).map(sorted),
            "step": st.lists(seconds, min_size=last, max_size=last).map(lambda each: sorted(each, reverse=True)),
            "bytes": st.lists(st.integers(1, 10**7), min_size=last, max_size=last),
            "reads": st.lists(st.floats(0.1, 1e4), min_size=last, max_size=last),
            "rate": st.floats(1e6, 1e11),
            "budget": st.floats(0, 1e11),
            "cache": st.sampled_from(["auto", "all", "none"]),
            "live": st.booleans(),
        }
    )
)


@given(TABLES)
def test_whatever_the_numbers_stored_cuts_pay_and_fit(table: dict[str, Any]) -> None:
    cuts = range(1, len(table["prefix"]) + 1)
    times = replace(
        CPU,
        prefix_s={0: 0.0, **dict(zip(cuts, table["prefix"], strict=True))},
        step_s={0: 1.0, **dict(zip(cuts, table["step"], strict=True))},
        read_bytes_per_s=table["rate"],
    )
    sizes = dict(zip(cuts, table["bytes"], strict=True))
    reads = dict(zip(cuts, table["reads"], strict=True))
    named = {"cache": table["cache"], "live_views": table["live"], "budget_bytes": table["budget"]}
    choices = chosen(times, sizes, reads=reads, **named)
    assert [*choices] == [*cuts]
    assert sum(1000 * sizes[cut] for cut in stored(choices)) <= table["budget"]
    for cut, choice in choices.items():
        passed, step = times.prefix_s[cut], times.step_s[cut]
        assert choice.gain is not None
        assert choice.gain <= (passed + step) / step * (1 + 1e-9), "the ceiling"
        if choice.stored:
            assert table["cache"] != "none"
            assert table["cache"] == "all" or choice.gain >= WORTH
        elif table["cache"] == "auto" and choice.gain >= WORTH:
            assert "budget_gb" in choice.reason


def test_a_trial_by_itself_passes_every_image_live() -> None:
    seconds = 0.1 + 3 * (100 * (CPU.prefix_s[3] + CPU.step_s[3]) + 20 * 0.01) + 50 * 0.01
    assert alone_seconds(CPU, {3: 3}, n_train=100, n_val=20, n_test=50) == pytest.approx(seconds)
    varied = replace(CPU, view_s=0.002)
    assert alone_seconds(varied, {3: 3}, 100, 20, 50) - seconds == pytest.approx(3 * 100 * 0.002)
    assert alone_seconds(CPU, {3: 3}, 100, 20, 50, early=2) - seconds == pytest.approx(2 * 100 * 0.01)
    assert alone_seconds(CPU, {}, 100, 20, 0) == CPU.start_s


def test_stages_after_the_head_cost_nothing() -> None:
    """A step that ends at stage 4 is one from cut 3, less one from cut 4, and a head's."""
    last = max(CPU.prefix_s)
    step = CPU.step_s[3] - CPU.step_s[4] + CPU.step_s[last]
    seconds = 0.1 + 3 * (100 * (CPU.prefix_s[3] + step) + 20 * CPU.prefix_s[4]) + 50 * CPU.prefix_s[4]
    assert alone_seconds(CPU, {3: 3}, 100, 20, 50, end=4) == pytest.approx(seconds)
    assert alone_seconds(CPU, {3: 3}, 100, 20, 50, end=last) == alone_seconds(CPU, {3: 3}, 100, 20, 50)
    head = 0.1 + 3 * (100 * (CPU.prefix_s[4] + CPU.step_s[last]) + 20 * CPU.prefix_s[4]) + 50 * CPU.prefix_s[4]
    assert alone_seconds(CPU, {4: 3}, 100, 20, 50, end=4) == pytest.approx(head)


def test_epochs_of_the_head_alone_cost_less_than_those_that_train_stages() -> None:
    last = max(CPU.prefix_s)
    both = alone_seconds(CPU, {last: 2, 0: 1}, 100, 20, 0)
    heads = 2 * (100 * (CPU.prefix_s[last] + CPU.step_s[last]) + 20 * CPU.prefix_s[last])
    assert both == pytest.approx(0.1 + heads + 100 * CPU.step_s[0] + 20 * CPU.prefix_s[last])


def test_what_is_read_takes_the_place_of_what_is_passed() -> None:
    read = 16384 / 5e9
    rest = CPU.forward_s - CPU.prefix_s[4]
    live = trial_seconds(CPU, 4, {4: 300}, 60, 100)
    assert live == pytest.approx(0.1 + 300 * (CPU.prefix_s[4] + CPU.step_s[4]) + 160 * 0.01)
    assert trial_seconds(CPU, 4, {4: 300}, 60, 100, read_bytes=16384) == pytest.approx(
        0.1 + 300 * (read + CPU.step_s[4]) + 160 * (read + rest)
    )
    shared = trial_seconds(CPU, 4, {4: 300}, 60, 100, read_bytes=16384, live_views=True)
    assert shared == pytest.approx(live - 60 * (CPU.prefix_s[4] - read))
