"""The report's charts of arms: what they score on test, cost, get wrong; and of heads in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from frostline.encodings import INK, LINE, RAMP, Chart, arm_colour, arm_scale, made, score_axis, tip, told_apart


def forest(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]], arms: Sequence[str], metric: str
) -> Chart:
    """Means with intervals, `rows` of label, mean, low, high; and every seed's score, `seeds` of label and score."""
    order = [row["label"] for row in rows]
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False, labelColor=INK))
    colour = alt.Color("label:N", scale=arm_scale(arms), legend=None)
    mean = alt.Chart(alt.NamedData("rows")).encode(y=y, color=colour)
    tips = [
        tip("label", "arm", "N"),
        *(tip(key, name) for key, name in (("mean", "mean"), ("low", "from"), ("high", "to"))),
    ]
    chart = alt.layer(
        alt.Chart(alt.NamedData("seeds"))
        .mark_tick(thickness=2, size=14, opacity=0.45)
        .encode(
            y=y,
            x=score_axis("score", f"{metric} on test"),
            color=colour,
            tooltip=[tip("label", "arm", "N"), tip("score", "one seed")],
        ),
        mean.mark_rule(strokeWidth=3).encode(x="low:Q", x2="high:Q", tooltip=tips),
        mean.mark_point(size=130, filled=True, opacity=1).encode(x="mean:Q", tooltip=tips),
    )
    told = "; ".join(f"{row['label']} {row['mean']:.3f}" for row in rows[:12])
    return made(
        "forest",
        f"Mean {metric} on test of each arm with its 95 % interval: {told}",
        64 + 46 * len(rows),
        chart,
        rows=rows,
        seeds=seeds,
    )


def budget(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], metric: str) -> Chart:
    """Expected best score against the number of trials; rows of label, trials, score."""
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_line(strokeWidth=2.5, interpolate="monotone")
        .encode(
            x=alt.X(
                "trials:Q",
                title="trials of an arm (log)",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(format="d", values=_doubling(rows)),
            ),
            y=score_axis("score", f"expected best {metric} on val"),
            color=arm_colour("label", arms),
        )
    )
    return made(
        "budget", f"Expected best validation {metric} against how many trials an arm has", 280, chart, rows=rows
    )


def _doubling(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """1, 2, 4 … up to the largest number of trials."""
    return [2**power for power in range(int(max(row["trials"] for row in rows)).bit_length())]


def importance(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> Chart:
    """Shares of searched keys; rows of label, key, share."""
    keys = list(dict.fromkeys(row["key"] for row in rows))
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X(
                "share:Q",
                title="share of importance",
                axis=alt.Axis(format="%", tickCount=5),
                scale=alt.Scale(domainMin=0),
            ),
            y=alt.Y("key:N", sort=keys, title=None, axis=alt.Axis(labelColor=INK, domain=False, ticks=False)),
            yOffset=alt.YOffset("label:N", sort=list(arms)),
            color=arm_colour("label", arms),
            tooltip=[tip("label", "arm", "N"), tip("key", "key", "N"), tip("share", "share", "Q", ".0%")],
        )
    )
    return made(
        "importance",
        "What set the best trials of each arm apart: "
        + "; ".join(f"{row['label']} {row['key']} {row['share']:.0%}" for row in rows[:8]),
        70 + len(keys) * max(24, 14 * len(arms)),
        chart,
        rows=rows,
    )


def heads(rows: Sequence[Mapping[str, Any]], stages: int, metric: str) -> Chart:
    """Scores of heads in closed form by cut; rows of the table `probes`."""
    methods = sorted({row["method"] for row in rows})
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=70, filled=True))
        .encode(
            x=alt.X("cut:O", title=f"cut: stages passed, of {stages}", axis=alt.Axis(labelAngle=0, grid=False)),
            y=score_axis("val_score", f"{metric} on val"),
            tooltip=[tip("method", "head", "N"), tip("cut", "cut", "O"), tip("val_score", metric)],
            **told_apart("method", methods),
        )
    )
    return made("heads", f"Validation {metric} of heads in closed form by cut", 280, chart, rows=rows)


def confusion(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Chart:
    """Rows of label, predicted (class names), count and share of the label's samples; mistakes only are coloured."""
    x = alt.X(
        "predicted:N",
        sort=list(classes),
        title="predicted",
        scale=alt.Scale(domain=list(classes)),
        axis=alt.Axis(labelAngle=-40 if max(map(len, classes)) > 3 else 0, labelLimit=110),
    )
    y = alt.Y(
        "label:N",
        sort=list(classes),
        title="true class",
        scale=alt.Scale(domain=list(classes)),
        axis=alt.Axis(labelLimit=130),
    )
    tips = [
        tip("label", "true class", "N"),
        tip("predicted", "predicted", "N"),
        tip("count", "times", "Q", ","),
        tip("share", "of its class", "Q", ".1%"),
    ]
    base = alt.Chart(alt.NamedData("rows")).encode(x=x, y=y, tooltip=tips)
    top = max((row["share"] for row in rows if row["label"] != row["predicted"]), default=0.0) or 1.0
    wrong = base.transform_filter("datum.label != datum.predicted && datum.count > 0")
    chart = alt.layer(
        base.transform_filter("datum.label == datum.predicted").mark_rect(color=LINE, stroke="var(--paper)"),
        wrong.mark_rect(stroke="var(--paper)").encode(
            color=alt.Color(
                "share:Q",
                title="share of its class",
                scale=alt.Scale(type="quantize", domain=[0, top], range=RAMP[1:]),
                legend=alt.Legend(format=".1%"),
            )
        ),
        *(
            [
                base.transform_filter("datum.count > 0")
                .mark_text(fontSize=11, stroke="var(--paper)", strokeWidth=3, strokeOpacity=0.8)
                .encode(text="count:Q"),
                base.transform_filter("datum.count > 0").mark_text(fontSize=11).encode(text="count:Q"),
            ]
            if len(classes) <= 15
            else []
        ),
    )
    return made(
        "confusion",
        f"Confusion matrix over {len(classes)} classes: how often samples of a class were taken for another",
        150 + min(26, max(14, 520 // len(classes))) * len(classes),
        chart,
        rows=rows,
    )


def costs(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """A stacked bar of device time; rows of part, seconds, order."""
    parts = [row["part"] for row in rows]
    scale = alt.Scale(
        domain=parts, range=["var(--arm-0)", "var(--arm-5)", "var(--saved-0)", "var(--saved-1)"][: len(parts)]
    )
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_bar(size=38, stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("seconds:Q", title="device seconds", stack="zero", axis=alt.Axis(format="~s", tickCount=8)),
            color=alt.Color("part:N", title=None, scale=scale, legend=alt.Legend(columns=1, labelLimit=400)),
            order="order:Q",
            tooltip=[tip("part", "part", "N"), tip("seconds", "seconds", "Q", ",.3~f")],
        )
    )
    return made(
        "costs",
        "Device time: " + "; ".join(f"{row['part']} {row['seconds']:.0f} s" for row in rows),
        190,
        chart,
        rows=rows,
    )
