"""The timing that costs go by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline.costs import times_of
from frostline.measure import TIMING_S, CostError, affordable, measure, resumable
from frostline.prepare import Prepared, prepare
from frostline.testing import toy_job


@given(st.integers(1, 512), st.integers(2, 30), st.floats(1e-6, 100))
def test_timing_stays_within_its_time_or_does_the_least(wanted: int, count: int, image_s: float) -> None:
    cuts = [*range(count)]
    batch, timed = affordable(wanted, cuts, image_s)
    least = min(2, wanted)
    assert least <= batch <= wanted
    assert (timed[0], timed[-1]) == (0, count - 1)
    assert timed == sorted(set(timed))
    spent = image_s * batch * (6 * len(timed) + 6)
    assert spent <= TIMING_S * (1 + 1e-9) or (batch, len(timed)) == (least, 2)
    if len(timed) < count:
        assert batch == least or image_s * least * (6 * (len(timed) + 1) + 6) > TIMING_S
    assert affordable(wanted, cuts, image_s / 2) >= (batch, [])


# --- measuring ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


@pytest.fixture
def toy(tmp_path: Path) -> Prepared:
    return prepare(toy_job(tmp_path / "study"))


def test_the_toy_backbone_is_timed_at_the_cuts_asked_for(cache: Path, toy: Prepared) -> None:
    times = measure(toy, [0, 2], batch_size=32, hidden=0)
    assert (times.device, times.threads, times.batch, times.view_s) == ("cpu", 1, 32, 0.0)
    assert [*times.prefix_s] == [*times.step_s] == [0, 2, 3]
    assert 0 == times.prefix_s[0] < times.prefix_s[2] <= times.prefix_s[3] == times.forward_s < 0.1
    assert 0 < times.step_s[3] <= times.step_s[2] <= times.step_s[0] < 0.1
    assert 0 < times.start_s < 5
    assert times.read_bytes_per_s > 1e7
    assert not torch.backends.mha.get_fastpath_enabled()
    assert times_of(json.loads(json.dumps(asdict(times)))) == times
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_what_was_measured_once_is_read_the_next_time(cache: Path, toy: Prepared) -> None:
    first = measure(toy, [3], 32, 0)
    assert measure(toy, [3, 3], 32, 0) == first
    (file,) = cache.iterdir()
    marked = asdict(first) | {"start_s": 12.5}
    file.write_text(json.dumps(marked))
    assert measure(toy, [3], 32, 0).start_s == 12.5
    assert measure(toy, [3], 10_000, 0).start_s != 12.5, "another batch is another cost"
    assert measure(toy, [3], 32, 64).start_s != 12.5
    assert len([*cache.iterdir()]) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * len(text),
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"start_s"', '"begin_s"'),
        lambda text: json.dumps(json.loads(text) | {"extra": 1}),
        lambda text: json.dumps(json.loads(text) | {"prefix_s": {"3": -1.0}}),
        lambda text: json.dumps(json.loads(text) | {"step_s": [1.0]}),
        lambda text: json.dumps(json.loads(text) | {"read_bytes_per_s": 0}),
    ],
)
def test_a_damaged_cache_file_is_measured_again(cache: Path, toy: Prepared, spoil: Callable[[str], str]) -> None:
    measure(toy, [3], 32, 0)
    (file,) = cache.iterdir()
    file.write_text(spoil(file.read_text()))
    again = measure(toy, [3], 32, 0)
    assert times_of(json.loads(file.read_text())) == again


def test_views_are_timed(cache: Path, tmp_path: Path) -> None:
    varied = prepare(toy_job(tmp_path / "study", ["augment.views=live", "augment.colour=0.3"]))
    assert 0 < measure(varied, [3], 8, 0).view_s < 0.1


def test_of_many_dear_cuts_some_are_timed_and_the_others_lie_between(
    cache: Path, toy: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frostline.measure.TIMING_S", 1e-6)
    times = measure(toy, [0, 1, 2], 32, 0)
    assert times.batch == 2
    before = [0.0, 0.3, 0.7, 1.0]  # of the FLOPs, as `plan` shows them
    for table in (times.prefix_s, times.step_s):
        assert [*table] == [0, 1, 2, 3]
        line = [table[0] + share * (table[3] - table[0]) for share in before]
        assert [*table.values()] == pytest.approx(line, rel=0.01)


NETWORKS = """
import torch
from torch import nn
from frostline.testing import ToyNet

BATCH = 10_000

class Net(ToyNet):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(4_000_000))
        self.side = nn.Conv2d(8, 24, 8, 8)

    def forward(self, images):
        if len(images) > BATCH and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        stem = self.stem(images)
        return self.pool(self.block2(self.block1(stem))) + self.side(stem).flatten(1) + self.extra[:1]

def network():
    torch.manual_seed(0)
    net = Net()
    names = [("stem", ["stem"]), ("block1", ["block1"]), ("block2", ["block2"]), ("rest", ["side", "extra"])]
    return {"module": net, "stages": names, "image_size": 16}
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's: a network whose second cut cannot be resumed, as a branch goes around it, and whose
    optimizer is most of a step."""
    (tmp_path / "networks_of_costs.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import networks_of_costs  # pyright: ignore[reportMissingImports]

    yield networks_of_costs
    networks_of_costs.BATCH = 10_000


def of_networks(tmp_path: Path) -> Prepared:
    named = {"name": "python:networks_of_costs:network", "weights": "random"}
    return prepare(toy_job(tmp_path / "study", backbone=named, arms={"a": {"strategy": "full"}}))


def test_a_cut_that_cannot_be_resumed_lies_between_those_that_can(cache: Path, tmp_path: Path, networks: Any) -> None:
    prepared = of_networks(tmp_path)
    assert [*resumable(prepared, [0, 1, 2, 4])] == [1, 4]
    times = measure(prepared, [2], 32, 0)
    assert [*times.prefix_s] == [2, 4]
    assert 0 < times.prefix_s[2] < times.prefix_s[4]
    assert times.step_s[4] < times.step_s[2]


def test_an_optimizer_is_paid_a_step_not_an_image(
    cache: Path, tmp_path: Path, networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = of_networks(tmp_path)
    small = measure(prepared, [0], 2, 0)
    monkeypatch.setattr("frostline.measure.TIMING_S", 1e-6)
    monkeypatch.setattr("frostline.measure._optimizer_seconds", lambda *_: 10.0)  # longer than any step here
    large = measure(prepared, [0], 100, 0)
    assert (small.batch, large.batch) == (2, 2)
    assert small.step_s[0] < 5, "a batch of the wanted size is timed whole"
    assert large.step_s[0] == 10 / 100


def test_a_clock_that_stands_still_is_no_division_by_zero(
    cache: Path, tmp_path: Path, networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frostline.measure._clock", lambda _: lambda: 1.0)
    found = measure(of_networks(tmp_path), [0, 4], 2, 0)
    assert found.prefix_s[4] > 0
    assert found.read_bytes_per_s > 0


def test_batches_that_do_not_fit_in_memory_are_halved(cache: Path, tmp_path: Path, networks: Any) -> None:
    prepared = of_networks(tmp_path)
    resumable(prepared, [4])
    networks.BATCH = 5
    assert measure(prepared, [0], 40, 0).batch == 5
    networks.BATCH = 0
    with pytest.raises(CostError, match="not even one image at a time fits in memory; freeze more stages"):
        measure(prepared, [0], 41, 0)
