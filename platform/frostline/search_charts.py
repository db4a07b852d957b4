"""The report's charts of a search's trials: by depth, rates, cost and epoch, and all searched values at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from frostline.drawn import Axis
from frostline.encodings import (
    INK,
    LINE,
    RAMP,
    SOFT,
    Chart,
    arm_colour,
    log_ticks,
    made,
    ramp,
    score_axis,
    tip,
    told_apart,
)
from frostline.spec import Mode


def depth(
    trials: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    stages: int,
    metric: str,
) -> Chart:
    """Every trial with a score by freeze depth (arm, depth, score, id, status), and the means of `drawn.depths`."""
    x = alt.X(
        "depth:O",
        title=f"freeze depth, of {stages} stages",
        scale=alt.Scale(type="band", domain=list(range(stages + 1)), paddingInner=0.15),
        axis=alt.Axis(labelAngle=0, grid=True, tickBand="extent"),
    )
    offset = alt.XOffset("arm:N", sort=list(arms)) if len(arms) > 1 else alt.Undefined
    points = alt.Chart(alt.NamedData("trials")).mark_point(size=32, filled=True, clip=True)
    scores = [row["score"] for row in trials]
    margin = (max(scores) - min(scores)) / 12 or 0.01
    y = alt.Y(
        "score:Q",
        title=f"{metric} on val",
        scale=alt.Scale(domain=[min(scores) - margin, max(scores) + margin], nice=False),
        axis=alt.Axis(tickCount=6, format="~r"),
    )
    mean = alt.Chart(alt.NamedData("means")).encode(x=x, xOffset=offset, color=arm_colour("arm", arms))
    tips = [
        tip("arm", "arm", "N"),
        tip("n", "trials", "Q", "d"),
        tip("mean", "mean"),
        tip("low", "from"),
        tip("high", "to"),
        tip("best", "best"),
    ]
    chart = alt.layer(
        points.encode(
            x=x,
            xOffset=offset,
            y=y,
            color=arm_colour("arm", arms),
            shape=alt.when("datum.status == 'pruned'").then(alt.value("triangle-down")).otherwise(alt.value("circle")),
            opacity=alt.when("datum.status == 'pruned'").then(alt.value(0.3)).otherwise(alt.value(0.5)),
            tooltip=[tip("id", "trial", "N"), tip("status", "status", "N"), tip("score", metric)],
        ),
        mean.mark_rule(strokeWidth=2.5, clip=True).encode(y="low:Q", y2="high:Q", tooltip=tips),
        mean.mark_point(size=90, filled=True, shape="diamond", opacity=1).encode(y="mean:Q", tooltip=tips),
    )
    return made(
        "depth",
        f"Validation {metric} of trials by freeze depth, with means and 95 % intervals, which are cut at the range of scores",
        320,
        chart,
        quiet=True,
        trials=trials,
        means=means,
    )


def heat(name: str, cells: Sequence[Mapping[str, Any]], rate: str, stages: int, metric: str, mode: Mode) -> Chart:
    """The best score by learning rate and freeze depth, from `drawn.rate_cells`."""
    low, high = min(cell["low"] for cell in cells), max(cell["high"] for cell in cells)
    chart = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(stroke="var(--paper)", strokeWidth=2)
        .encode(
            x=alt.X(
                "low:Q",
                title=f"{rate} (log)",
                scale=alt.Scale(type="log", domain=[low, high], nice=False),
                axis=alt.Axis(values=log_ticks(low, high), format="~e", grid=False),
            ),
            x2="high:Q",
            y=alt.Y(
                "depth:O", title="freeze depth", scale=alt.Scale(domain=list(range(stages + 1))), sort="descending"
            ),
            color=ramp("best", [cell["best"] for cell in cells], f"best {metric}", mode),
            tooltip=[
                tip("best", f"best {metric}"),
                tip("n", "trials", "Q", "d"),
                tip("depth", "freeze depth", "O"),
                tip("low", f"{rate} from", "Q", ".2e"),
                tip("high", "to", "Q", ".2e"),
            ],
        )
    )
    return made(
        name, f"Best validation {metric} by {rate} and freeze depth", 120 + 24 * (stages + 1), chart, cells=cells
    )


def pareto(
    name: str,
    trials: Sequence[Mapping[str, Any]],
    line: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    cost: str,
    metric: str,
) -> Chart:
    """Scores of complete trials against a cost (arm, cost, score, id), and those on the front."""
    costs = [row["cost"] for row in trials if row["cost"] > 0]
    log = len(costs) == len(trials) and max(costs) > 20 * min(costs)
    x = alt.X(
        "cost:Q",
        title=f"{cost}{' (log)' * log}",
        scale=alt.Scale(type="log") if log else alt.Scale(zero=False),
        axis=alt.Axis(format="~s" if max(row["cost"] for row in trials) >= 1e4 else "~r", tickCount=4),
    )
    y = score_axis("score", f"{metric} on val")
    tips = [tip("id", "trial", "N"), tip("score", metric), tip("cost", cost, "Q", ",.4~g")]
    chart = alt.layer(
        alt.Chart(alt.NamedData("front"))
        .mark_line(interpolate="step-after", color=SOFT, strokeDash=[4, 3])
        .encode(x=x, y=y),
        alt.Chart(alt.NamedData("trials"))
        .mark_point(size=40, filled=True, opacity=0.5)
        .encode(x=x, y=y, tooltip=tips, **told_apart("arm", arms)),
        alt.Chart(alt.NamedData("front"))
        .mark_point(size=110, filled=True, opacity=1, stroke=INK, strokeWidth=1.2)
        .encode(x=x, y=y, tooltip=tips, **told_apart("arm", arms)),
    )
    return made(
        name,
        f"Validation {metric} against {cost}; {len(line)} of {len(trials)} trials are on the front",
        260,
        chart,
        quiet=True,
        trials=trials,
        front=line,
    )


def curves(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], metric: str) -> Chart:
    """Score by epoch; rows of id, arm, epoch, score, how (`searched` or `confirmed`). The legend picks an arm."""
    picked = alt.selection_point(name="picked", fields=["arm"], bind="legend")
    how = alt.StrokeDash(
        "how:N",
        title=None,
        scale=alt.Scale(domain=["searched", "confirmed"], range=[[1, 0], [5, 3]]),
        legend=alt.Legend(orient="bottom"),
    )
    lines = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(format="d", tickMinStep=1, grid=False)),
        y=score_axis("score", f"{metric} on val"),
        color=arm_colour("arm", arms, always=True),
        detail="id:N",
        opacity=alt.when(picked).then(alt.value(0.55)).otherwise(alt.value(0.05)),
    )
    dots = lines.mark_circle(size=26).encode(
        tooltip=[tip("id", "trial", "N"), tip("epoch", "epoch", "Q", "d"), tip("score", metric)]
    )
    chart = alt.layer(lines.mark_line(strokeWidth=1.6).encode(strokeDash=how), dots).add_params(picked)
    return made("curves", f"Validation {metric} of trials after each epoch", 340, chart, quiet=True, rows=rows)


def parallel(trials: Sequence[Mapping[str, Any]], axes: Sequence[Axis], metric: str, mode: Mode) -> Chart:
    """A line a trial through its places on the axes (`p0`, `p1` …), coloured by `score`.

    The last of the trials lie on top. A rectangle drawn on it is the selection `brush`; the page fills the data set `kept` with what it keeps, and `ranges`
    (axis, low, high) with what it keeps to.
    """
    names: list[Any] = [f"p{number}" for number in range(len(axes))]
    titles = json.dumps(
        {name: metric if axis.key == "score" else axis.key for name, axis in zip(names, axes, strict=True)}
    )
    x = alt.X(
        "axis:N",
        sort=names,
        title=None,
        scale=alt.Scale(padding=0.35),
        axis=alt.Axis(
            orient="top",
            domain=False,
            ticks=False,
            grid=True,
            labelAngle=0,
            labelColor=INK,
            labelPadding=14,
            labelExpr=f"({titles})[datum.value]",
            labelOverlap=False,
        ),
    )
    y = alt.Y("place:Q", title=None, scale=alt.Scale(domain=[-0.08, 1.08], nice=False), axis=None)

    def lines(data: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(data)).transform_fold(names, as_=["axis", "place"]).mark_line(aria=False)

    ticks = [
        {"axis": name, "place": place, "text": text}
        for name, axis in zip(names, axes, strict=True)
        for place, text in _ticks(axis)
    ]
    scores = [row["score"] for row in trials if row["score"] is not None]
    colour = ramp("score", scores, f"{metric} on val", mode, RAMP[2:])
    brush = alt.selection_interval(
        name="brush", encodings=["x", "y"], mark=alt.BrushConfig(fill=INK, fillOpacity=0.08, stroke=INK)
    )
    chart = alt.layer(
        lines("trials").mark_line(strokeWidth=1, color=LINE).encode(x=x, y=y, detail="id:N"),
        lines("kept")
        .mark_line(strokeWidth=1.5, opacity=0.75 if len(trials) <= 200 else 0.4)
        .encode(x=x, y=y, detail="id:N", color=colour),
        alt.Chart(alt.NamedData("ranges"))
        .mark_rule(strokeWidth=12, opacity=0.35, color=INK)
        .encode(x=x, y=alt.Y("low:Q", title=None, axis=None), y2="high:Q"),
        alt.Chart(alt.NamedData("ticks"))
        .mark_text(align="left", dx=6, fontSize=11, stroke="var(--paper)", strokeWidth=4, strokeOpacity=0.85)
        .encode(x=x, y=y, text="text:N"),
        alt.Chart(alt.NamedData("ticks")).mark_text(align="left", dx=6, fontSize=11).encode(x=x, y=y, text="text:N"),
        alt.Chart(alt.NamedData("ticks"))
        .mark_tick(color=SOFT, size=8, thickness=1.5, orient="horizontal")
        .encode(x=x, y=y)
        .add_params(brush),
    )
    return made(
        "parallel",
        f"Parallel coordinates of {len(trials)} trials over {', '.join(axis.key for axis in axes)}; filter them with the fields below",
        400,
        chart,
        trials=trials,
        kept=trials,
        ranges=[],
        ticks=ticks,
    )


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """Places and texts along an axis."""
    if axis.choices:
        return [(axis.place(choice) or 0.0, str(choice)) for choice in axis.choices]
    assert axis.low is not None
    assert axis.high is not None
    if axis.log:
        middle = math.sqrt(axis.low * axis.high)
        return [
            (place, f"{value:.1e}".replace("e-0", "e-"))
            for place, value in ((0, axis.low), (0.5, middle), (1, axis.high))
        ]
    if isinstance(axis.low, int) and isinstance(axis.high, int) and axis.high - axis.low <= 12:
        return [(axis.place(value) or 0.0, str(value)) for value in range(axis.low, axis.high + 1)]
    return [(place, f"{axis.low + place * (axis.high - axis.low):.3g}") for place in (0, 0.25, 0.5, 0.75, 1)]
