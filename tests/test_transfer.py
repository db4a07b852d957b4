"""What pretrained weights gained, from studies with an arm that starts from nothing."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from _studies import RATES, STAGES, write_study
from frostline.compare_text import render
from frostline.comparison import compare
from frostline.transfer import Gain

SCRATCH = {"scratch": {"strategy": "scratch", "space": RATES}}
HIGH, LOW = [0.90, 0.91, 0.93, 0.92, 0.90], [0.60, 0.62, 0.63, 0.60, 0.61]
PROBES = [
    {"cut": cut, "stages": STAGES, "method": "lda", "val_score": score} for cut, score in [(1, 0.5), (3, 0.8), (4, 0.7)]
]


def gain(folder: Path, full: list[Any], scratch: list[Any], **more: Any) -> Gain | None:
    return compare([write_study(folder, {"full": full, "scratch": scratch}, arms=SCRATCH, **more)]).tasks[0].transfer


def test_a_gain(tmp_path: Path) -> None:
    curves = {"scratch": [0.3, 0.5, 0.6], "full": [0.55, 0.7, 0.9]}
    found = gain(tmp_path / "s", HIGH, LOW, curves=curves, probes=PROBES)
    assert found is not None
    assert (found.arm, found.scratch) == ("full", "scratch")
    assert (found.score, found.scratch_score) == (pytest.approx(0.912), pytest.approx(0.612))
    mean, low, high = found.gain.mean, found.gain.low, found.gain.high
    assert mean == pytest.approx(0.3)
    assert low is not None
    assert high is not None
    assert 0.28 < low < 0.3 < high < 0.32
    assert (found.target, found.epochs, found.reached, found.scratch_epochs) == (0.6, 2, 5, 3)
    assert found.closed_form is not None
    assert [found.closed_form[key] for key in ("cut", "method", "val_score")] == [3, "lda", 0.8]


def test_a_loss_is_a_gain_below_zero(tmp_path: Path) -> None:
    curves = {"scratch": [0.3, 0.9], "full": [0.4, 0.5]}
    found = gain(tmp_path / "s", LOW, HIGH, curves=curves)
    assert found is not None
    mean, low, high = found.gain.mean, found.gain.low, found.gain.high
    assert (mean, found.epochs, found.reached) == (pytest.approx(-0.3), None, 0)
    assert low is not None
    assert high is not None
    assert low < -0.3 < high < 0
    assert found.closed_form is None


def test_of_losses_less_is_better(tmp_path: Path) -> None:
    curves = {"scratch": [0.9, 0.5], "full": [0.5, 0.2]}
    found = gain(tmp_path / "s", [0.2, 0.25, 0.3], [0.6, 0.65, 0.75], metric="nll", curves=curves)
    assert found is not None
    assert (found.arm, found.epochs) == ("full", 1)


@pytest.mark.parametrize(
    "scores", [{"full": HIGH, "probe": LOW}, {"scratch": LOW}, {"full": [None] * 5, "scratch": LOW}]
)
def test_it_takes_an_arm_from_nothing_and_one_from_weights(tmp_path: Path, scores: dict[str, list[Any]]) -> None:
    arms = {name: arm for name, arm in SCRATCH.items() if name in scores}
    (task,) = compare([write_study(tmp_path / "s", scores, arms=arms)]).tasks
    assert task.transfer is None


def test_gains_from_few_samples_to_many(tmp_path: Path) -> None:
    curves = {"scratch": [0.5, 0.6], "full": [0.7, 0.9]}
    studies = [
        write_study(
            tmp_path / f"n{size}",
            {"full": HIGH, "scratch": LOW},
            arms=SCRATCH,
            per_class=size,
            curves=curves,
            probes=PROBES,
        )
        for size in (50, 5)
    ]
    console = Console(file=StringIO(), width=100)
    render(compare(studies), console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    at = lines.index("What pretrained weights gained: full against scratch")
    assert [line.split()[:4] for line in lines[at + 2 : at + 4]] == [
        ["n5", "10", "0.912", "0.612"],
        ["n50", "100", "0.912", "0.612"],
    ]
    assert "+0.300 [+0.28" in lines[at + 2]
    assert lines[at + 2].split()[-4:] == ["1.0", "of", "2", "0.800"]
