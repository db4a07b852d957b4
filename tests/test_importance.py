"""Which searched values decided."""

from __future__ import annotations

import numpy as np
import pytest

from frostline.importance import importance
from frostline.spec import Arm

ARM = Arm.model_validate(
    {
        "strategy": "freeze_depth",
        "space": {
            "freeze.depth": "all",
            "head.hidden": [0, 64],
            "train.lr": {"low": 1e-5, "high": 1e-2, "log": True},
            "train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True},
        },
    }
)


def drawn(n: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "freeze.depth": int(rng.integers(5)),
            "head.hidden": [0, 64][rng.integers(2)],
            "train.lr": float(10 ** rng.uniform(-5, -2)),
            "train.head_lr": float(10 ** rng.uniform(-3, -1)),
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("key", ["train.lr", "freeze.depth"])
def test_the_key_that_decides_comes_first(key: str) -> None:
    tried = drawn(200)
    scores = [-abs(np.log10(each[key]) + 3) if key == "train.lr" else float(each[key]) for each in tried]
    found = importance(ARM, 4, tried, scores)
    assert isinstance(found, dict)
    assert next(iter(found)) == key
    assert found[key] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_higher_scores_are_better() -> None:
    """The best tenth lies at one learning rate, the worst at one depth."""
    tried = drawn(300)
    scores = [
        1 - abs(np.log10(each["train.lr"]) + 3) if each["freeze.depth"] else -10 - each["train.head_lr"]
        for each in tried
    ]
    found = importance(ARM, 4, tried, scores)
    assert isinstance(found, dict)
    assert next(iter(found)) == "train.lr"


def test_why_there_is_none() -> None:
    assert importance(ARM, 4, drawn(9), [0.5] * 9) == "9 trials are too few for it, 10 are needed"
    alike = importance(ARM, 4, drawn(20), [0.5] * 20)
    assert isinstance(alike, str)
    assert "score the same" in alike
    fixed = Arm(strategy="full")
    assert importance(fixed, 4, [{}] * 20, [0.5] * 20) == "nothing is searched"
    single = Arm.model_validate({"strategy": "full", "space": {"head.hidden": [0, 8, 64]}})
    assert importance(single, 4, [{"head.hidden": 8}] * 20, [0.5] * 20) == "a single searched key has all of it"


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    importance(ARM, 4, drawn(20), list(range(20)))
    assert capfd.readouterr() == ("", "")
