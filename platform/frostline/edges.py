"""Best values at the edge of their range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from frostline.depths import stages_of
from frostline.models import Range
from frostline.spec import DEPTHS, Arm, is_searched, searchable_fields

EDGE = 0.05
"""A value within this share of its range (of the logarithm, where that is searched) of an end is at its edge."""


def at_the_edge(arm: Arm, values: Mapping[str, Any], stages: int) -> list[dict[str, Any]]:
    """Which of the searched `values` are at an end of their range, where a wider one could hold a better: not where the
    range ends at what the key itself allows, nor in a list of names or of fewer than 3 numbers."""
    found = []
    for key, dimension in arm.space.items():
        if key not in values or not is_searched(key, dimension) or dimension == "all":
            continue
        value, log, step = values[key], False, None
        if isinstance(dimension, Range):
            low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
        elif (
            isinstance(dimension, tuple)
            and len(dimension) > 2
            and all(type(each) in (int, float) for each in dimension)
        ):
            if key in DEPTHS:
                value, *depths = (stages_of(key, each, stages) for each in (value, *dimension))
                low, high = min(depths), max(depths)
            else:
                low, high = min(map(float, dimension)), max(map(float, dimension))
            step = high - low
        else:
            continue
        near = 0.0 if step or isinstance(value, int) else EDGE
        place = _place(value, low, high, log)
        least, most = _limits(key, stages)
        end = "low" if place <= near and low > least else "high" if place >= 1 - near and high < most else None
        if end:
            found.append({"key": key, "value": value, "low": low, "high": high, "end": end})
    return found


def _place(value: float, low: float, high: float, log: bool) -> float:
    """Where the value is in its range, 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _limits(key: str, stages: int) -> tuple[float, float]:
    """The least and the most that the key itself allows."""
    if key in DEPTHS:
        return int(key == "head.depth"), stages
    bounds = searchable_fields()[key].metadata
    least = [
        value
        for each in bounds
        for value in (getattr(each, "ge", None), getattr(each, "gt", None))
        if value is not None
    ]
    most = [
        value
        for each in bounds
        for value in (getattr(each, "le", None), getattr(each, "lt", None))
        if value is not None
    ]
    return max(least, default=-math.inf), min(most, default=math.inf)
