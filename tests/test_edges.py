"""Best values at the edge of their range."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from frostline.edges import at_the_edge
from frostline.spec import Arm


def arm(**space: Any) -> Arm:
    return Arm.model_validate(
        {"strategy": "freeze_depth", "space": {key.replace("__", "."): each for key, each in space.items()}}
    )


LR = {"low": 1e-4, "high": 1e-2, "log": True}


@pytest.mark.parametrize(
    ("space", "value", "end"),
    [
        ({"train__lr": LR}, 1.2e-4, "low"),
        ({"train__lr": LR}, 9e-3, "high"),
        ({"train__lr": LR}, 2e-4, None),
        ({"train__lr": {**LR, "log": False}}, 2e-4, "low"),
        ({"train__epochs": {"low": 3, "high": 30}}, 30, "high"),
        ({"train__epochs": {"low": 3, "high": 30}}, 29, None),
        ({"train__epochs": {"low": 1, "high": 30}}, 1, None),
        ({"head__hidden": (0, 64, 256)}, 256, "high"),
        ({"head__hidden": (0, 64, 256)}, 0, None),
        ({"head__hidden": (0, 64)}, 64, None),
        ({"freeze__norm": ("frozen", "batch", "affine")}, "affine", None),
        ({"freeze__layer_decay": {"low": 0.5, "high": 1.0}}, 1.0, None),
        ({"freeze__layer_decay": {"low": 0.5, "high": 0.9}}, 0.9, "high"),
        ({"freeze__layer_decay": {"low": 0.5, "high": 0.9, "step": 0.1}}, 0.8, None),
        ({"freeze__depth": "all"}, 4, None),
        ({"freeze__depth": (1, 2, 3)}, 3, "high"),
        ({"freeze__depth": (0.0, 0.25, 0.5)}, 0.5, "high"),
        ({"freeze__depth": (0.0, 0.25, 1.0)}, 1.0, None),
        ({"freeze__depth": (0.0, 0.5, "all")}, "all", None),
        ({"train__weight_decay": 0.05}, 0.05, None),
    ],
)
def test_edges_are_where_a_wider_range_could_help(space: dict[str, Any], value: Any, end: str | None) -> None:
    (key,) = space
    flagged = at_the_edge(arm(**space), {key.replace("__", "."): value}, 4)
    assert [each["end"] for each in flagged] == ([end] if end else [])
    if end and key != "freeze__depth":
        assert flagged[0]["key"] == key.replace("__", ".")
        assert flagged[0]["low"] <= flagged[0]["value"] <= flagged[0]["high"]


@given(st.floats(1e-6, 1), st.floats(1.1, 1e3), st.floats(0, 1), st.booleans())
def test_a_tenth_of_a_range_is_edge(low: float, ratio: float, place: float, log: bool) -> None:
    high = min(10.0, low * ratio)
    if low >= high:
        return
    value = low * (high / low) ** place if log else low + place * (high - low)
    flagged = at_the_edge(arm(train__lr={"low": low, "high": high, "log": log}), {"train.lr": value}, 4)
    if 0.051 < place < 0.949:
        assert not flagged
    elif (place < 0.049 or place > 0.951) and high < 10:
        assert flagged[0]["end"] == ("low" if place < 0.5 else "high")
