"""The report's section of mistakes where what is predicted is not one class: how far numbers are off, and each label by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np

from frostline.compare_text import Grid
from frostline.encodings import INK, LINE, Chart, made, score_axis, tip
from frostline.mistakes import predictions_of
from frostline.page import Section, figure
from frostline.subject import Subject

POINTS = 1500
"""Drawn, at most."""
WORST = 20
"""Samples listed."""


def numbers(subject: Subject, winner: str, trial_ids: Sequence[str]) -> Section:
    """Predicted against true numbers, over these confirmations of the winner, and the samples that are furthest off in the mean."""
    tables = [*predictions_of(subject.path, trial_ids)]
    ids, true, said = (
        np.concatenate([np.asarray(table[column]) for table in tables])
        for column in ("sample_id", "value", "predicted_value")
    )
    drawn = np.random.default_rng(0).permutation(len(true))[:POINTS]
    rows = [{"value": float(true[i]), "predicted": float(said[i]), "sample": str(ids[i])} for i in drawn]
    name = subject.job["data"]["label_column"]
    unique, place = np.unique(ids, return_inverse=True)
    times = np.bincount(place)
    off = np.bincount(place, np.abs(said - true)) / times
    means = np.bincount(place, true) / times, np.bincount(place, said) / times
    cells = [
        {
            "sample": str(unique[i]),
            "true": f"{means[0][i]:.4g}",
            "predicted": f"{means[1][i]:.4g}",
            "off by": f"{off[i]:.4g}",
        }
        for i in np.argsort(-off, kind="stable")[:WORST]
    ]
    chart = _scatter(rows, name)
    caption = (
        f"{len(trial_ids)} confirmations of {winner} together; {len(rows):,} of {len(true):,} predictions are drawn. On the line a "
        "prediction is right. A wrong label looks as a wrong prediction does: look at those that are furthest off."
    )
    grid = Grid("samples that are furthest off, by the mean over confirmations", cells)
    return Section("mistakes", "Mistakes", figure(chart, f"Predicted and true {name}", caption, grid), [chart])


def labels(subject: Subject, winner: str, trial_ids: Sequence[str]) -> Section:
    """How well each label is told, over these confirmations of the winner."""
    classes = subject.facts["classes"]
    have, told, both = (np.zeros(len(classes), np.int64) for _ in range(3))
    for table in predictions_of(subject.path, trial_ids):
        true = np.zeros((len(table), len(classes)), bool)
        for row, own in zip(true, table["labels"].to_pylist(), strict=True):
            row[own] = True
        said = np.asarray(table["probabilities"].combine_chunks().flatten()).reshape(true.shape) > 0.5
        have, told, both = have + true.sum(axis=0), told + said.sum(axis=0), both + (true & said).sum(axis=0)
    rows = [
        {
            "label": name,
            "f1": _share(2 * both[i], have[i] + told[i]),
            "precision": _share(both[i], told[i]),
            "recall": _share(both[i], have[i]),
            "samples": int(have[i]) // len(trial_ids),
        }
        for i, name in enumerate(classes)
    ]
    rows.sort(key=lambda row: row["f1"] or 0.0)
    cells = [
        {"label": row["label"], "samples": f"{row['samples']:,}"}
        | {key: "" if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall", "f1")}
        for row in rows
    ]
    chart = _bars(rows)
    caption = (
        f"{len(trial_ids)} confirmations of {winner} together; a label is told where its probability is above one half."
    )
    grid = Grid("labels, those told worst first", cells)
    return Section("mistakes", "Mistakes", figure(chart, "F1 of each label on test", caption, grid), [chart])


MISTAKES: dict[str, Callable[[Subject, str, Sequence[str]], Section]] = {"multilabel": labels, "regression": numbers}
"""Task -> what makes its section."""


def _share(part: Any, of: Any) -> float | None:
    return float(part / of) if of else None


def _scatter(rows: list[dict[str, Any]], name: str) -> Chart:
    ends = [row[key] for row in rows for key in ("value", "predicted")]
    line = [{"value": each, "predicted": each} for each in (min(ends), max(ends))]
    x, y = score_axis("value", f"true {name} on test"), score_axis("predicted", f"predicted {name}")
    tips = [tip("sample", "sample", "N"), tip("value", "true"), tip("predicted", "predicted")]
    chart = alt.layer(
        alt.Chart(alt.NamedData("line")).mark_line(color=LINE, strokeWidth=2).encode(x=x, y=y),
        alt.Chart(alt.NamedData("rows")).mark_point(size=18, filled=True, opacity=0.5).encode(x=x, y=y, tooltip=tips),
    )
    return made(
        "numbers", f"Predicted against true {name} of {len(rows)} test samples", 380, chart, rows=rows, line=line
    )


def _bars(rows: list[dict[str, Any]]) -> Chart:
    order = [row["label"] for row in rows]
    axis = alt.Axis(labelColor=INK, domain=False, ticks=False, labelLimit=160)
    tips = [tip("label", "label", "N"), *(tip(key, key) for key in ("f1", "precision", "recall", "samples"))]
    chart = (
        alt.Chart(alt.NamedData("rows"))
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("f1:Q", title="F1 on test", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)),
            y=alt.Y("label:N", sort=order, title=None, axis=axis),
            tooltip=tips,
        )
    )
    told = "; ".join(f"{row['label']} {row['f1'] or 0:.3f}" for row in rows[:8])
    return made("labels", f"F1 on test of each label, the lowest first: {told}", 70 + 22 * len(rows), chart, rows=rows)
