"""What the report's charts have in common: colours, scales, axes, and how one becomes a Vega-Lite spec.

Colours are names of CSS variables, so that a page's theme decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from frostline.spec import Mode

COLOURS = [f"var(--arm-{number})" for number in range(8)]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
RAMP = [f"var(--ramp-{number})" for number in range(7)]
INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"

CONFIG = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 220,
        "titlePadding": 8,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": SOFT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "top",
        "direction": "horizontal",
        "columns": 4,
        "symbolStrokeWidth": 2,
        "labelLimit": 220,
    },
    "mark": {"color": COLOURS[0]},
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
}
"""Of all charts."""


@dataclass(frozen=True)
class Chart:
    """One chart. It is as wide as its place on the page."""

    name: str
    description: str
    """What it shows, in a sentence, for those who cannot see it."""
    height: int
    spec: dict[str, Any]


def made(name: str, description: str, height: int, chart: Any, quiet: bool = False, **data: Any) -> Chart:
    """The chart with its data, which is not checked against the schema: that takes most of the time. A `quiet` one has too
    many marks to be read out one by one."""
    spec = chart.properties(width="container", height=height, description=description).to_dict()
    del spec["config"]
    if quiet:
        spec["config"] = {"aria": False}
    return Chart(
        name,
        description,
        height,
        spec | {"datasets": {key: [_brief(row) for row in rows] for key, rows in data.items()}},
    )


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def tip(field: str, title: str, kind: str = "Q", shape: str | None = None) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:{kind}", title=title, format=shape or (".4f" if kind == "Q" else alt.Undefined))


def score_axis(field: str, title: str) -> Any:
    """An axis of scores: `x` where they lie along it, else `y`."""
    channel = alt.X if title.endswith("on test") else alt.Y
    return channel(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(zero=False, nice=True, padding=6),
        axis=alt.Axis(tickCount=6, format="~r"),
    )


def arm_scale(domain: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(domain), range=[COLOURS[number % len(COLOURS)] for number in range(len(domain))])


def arm_colour(field: str, arms: Sequence[str], always: bool = False) -> alt.Color:
    legend = alt.Legend(symbolOpacity=1) if len(arms) > 1 or always else None
    return alt.Color(f"{field}:N", title=None, scale=arm_scale(arms), legend=legend)


def told_apart(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and shape: neither alone tells more than eight apart, nor helps everyone."""
    shapes = alt.Scale(domain=list(names), range=[SHAPES[(number + number // 8) % 8] for number in range(len(names))])
    legend = alt.Legend(symbolOpacity=1) if len(names) > 1 else None
    return {
        "color": arm_colour(field, names),
        "shape": alt.Shape(f"{field}:N", title=None, scale=shapes, legend=legend),
    }


def ramp(field: str, values: Sequence[float], title: str, mode: Mode, colours: Sequence[str] = RAMP) -> alt.Color:
    """Colour in steps, the strongest for the best."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    steps = list(colours if mode == "max" else reversed(colours))
    return alt.Color(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(type="quantize", domain=[low, high], range=steps),
        legend=alt.Legend(format=".3~g"),
    )


def log_ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30 … within a range, or its ends where fewer than two of them are."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [step * 10.0**power for power in powers for step in (1, 3) if low <= step * 10.0**power <= high]
    return found if len(found) > 1 else [low, high]
