"""Sections of the report about a search's trials: depths, costs, training, everything that was tried, heads in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frostline import charts, drawn, results, search_charts
from frostline.compare_text import Grid, fronts_grid
from frostline.page import Section, figure, paragraph, table, text
from frostline.spec import Arm
from frostline.subject import Subject
from frostline.text import brief, decimals, short

LISTED = 50
"""Trials in the table beside the parallel coordinates, at most."""
COSTS = {
    "alone_s": "device seconds alone",
    "peak_mib": "peak memory in MiB",
    "trainable_params": "trainable parameters",
}


def freezing(subject: Subject) -> Section:
    """Scores by freeze depth, and by learning rate and depth."""
    means, shown, parts = drawn.depths(subject.trials, subject.mode), [], []
    if means:
        scored = [row for row in subject.trials if drawn.score_of(row) is not None and row["freeze_depth"] is not None]
        few = drawn.thinned(scored, drawn.TRIALS, subject.mode)
        points = [
            {
                "arm": row["arm"],
                "depth": row["freeze_depth"],
                "score": drawn.score_of(row),
                "id": row["trial_id"],
                "status": row["status"],
            }
            for row in few
        ]
        shown.append(search_charts.depth(points, means, subject.arms, subject.stages, subject.metric))
        caption = (
            f"{drawn.told(len(few), len(scored), 'trials')}Dots are complete trials, faint triangles pruned ones after their last epoch. Diamonds are means of "
            "complete trials, with 95 % t-intervals from three on, cut at the range of scores. These trials differ in learning rates too, and a sampler chose "
            "them: an interval describes what was tried, not the depth alone."
        )
        rows = [
            {
                "arm": row["arm"],
                "depth": str(row["depth"]),
                "trials": str(row["n"]),
                "mean": decimals(row["mean"]),
                "from": decimals(row["low"]),
                "to": decimals(row["high"]),
                "best": decimals(row["best"]),
            }
            for row in means
        ]
        parts.append(
            figure(shown[-1], "Score against freeze depth", caption, Grid("complete trials by freeze depth", rows))
        )
    pair = []
    for rate, key in (("lr", "train.lr"), ("head_lr", "train.head_lr")):
        if cells := drawn.rate_cells(subject.trials, rate, subject.mode):
            shown.append(
                search_charts.heat(
                    f"heat-{rate.replace('_', '-')}", cells, key, subject.stages, subject.metric, subject.mode
                )
            )
            rows = [
                {
                    "depth": str(cell["depth"]),
                    f"{key} from": short(cell["low"]),
                    "to": short(cell["high"]),
                    "trials": str(cell["n"]),
                    "best": decimals(cell["best"]),
                }
                for cell in cells
            ]
            caption = (
                "The best score in each cell, of pruned trials after their last epoch; empty cells were not tried."
            )
            if rate == "lr":
                caption += " Trials in which only the head trains are left out: this rate moves nothing there."
            pair.append(
                figure(
                    shown[-1],
                    f"{key} and freeze depth",
                    caption,
                    Grid(f"best {subject.metric} by {key} and freeze depth", rows),
                )
            )
    if not shown:
        parts.append(paragraph("No trial has completed yet."))
    return Section(
        "freezing", "Freeze depth", "".join(parts) + f'<div class="pair">{"".join(pair)}</div>' * bool(pair), shown
    )


def pareto(subject: Subject) -> Section:
    """Scores against what trials cost."""
    shown, parts = [], []
    for cost, name in COSTS.items():
        rows = [row for row in subject.few if row["val_score"] is not None and row[cost] is not None]
        if not rows:
            continue
        line = drawn.front(subject.trials, cost, subject.mode)
        points, on_front = (
            [{"id": row["trial_id"], "arm": row["arm"], "score": row["val_score"], "cost": row[cost]} for row in each]
            for each in (rows, line)
        )
        shown.append(
            search_charts.pareto(
                f"pareto-{cost.replace('_', '-')}", points, on_front, subject.arms, name, subject.metric
            )
        )
        cells = [
            {"trial": row["trial_id"], name: f"{row[cost]:,.4g}", subject.metric: decimals(row["val_score"])}
            for row in line
        ]
        parts.append(figure(shown[-1], f"Against {name}", "", Grid(f"the front against {name}", cells)))
    if not shown:
        return Section("pareto", "Score against cost", paragraph("No trial has completed yet."))
    complete = sum(row["val_score"] is not None for row in subject.trials)
    said = (
        f"{drawn.told(sum(row['val_score'] is not None for row in subject.few), complete, 'complete trials')}Validation scores of complete trials. Those with a "
        "rim are on the front: no other scores as well for less. Peak memory on a CPU is that of the whole process."
    )
    fronts = fronts_grid(subject.task)
    return Section(
        "pareto",
        "Score against cost",
        f'{paragraph(said)}<div class="pair">{"".join(parts)}</div>{table(fronts) if fronts else ""}',
        shown,
    )


def training(subject: Subject) -> Section:
    """Scores by epoch."""
    few = drawn.thinned(subject.trials, drawn.CURVES, subject.mode)
    arms = {row["trial_id"]: (row["arm"], "searched") for row in few}
    arms |= {each["trial_id"]: (arm.arm, "confirmed") for arm in subject.task.arms for each in arm.confirmations}
    rows = [
        {
            "id": row["trial_id"],
            "arm": arms[row["trial_id"]][0],
            "how": arms[row["trial_id"]][1],
            "epoch": row["epoch"],
            "score": row["val_score"],
        }
        for row in drawn.curves(subject.path, list(arms))
    ]
    if not rows:
        return Section("training", "Training", paragraph("No epoch of a finished trial has been recorded yet."))
    chart = search_charts.curves(rows, subject.arms, subject.metric)
    caption = (
        f"{drawn.told(len(few), len(subject.trials), 'trials of the search')}A line that ends early was stopped, or failed. Dashed lines are "
        "confirmations on fresh seeds. A click on an arm in the legend shows it alone."
    )
    ends: dict[str, dict[str, str]] = {}
    for row in rows:
        ends[row["id"]] = {
            "trial": row["id"],
            "round": row["how"],
            "epochs": str(row["epoch"]),
            f"{subject.metric} after the last": decimals(row["score"]),
        }
    return Section(
        "training",
        "Training",
        figure(chart, "Score by epoch", caption, Grid("trials drawn, after their last epoch", list(ends.values()))),
        [chart],
    )


def configurations(subject: Subject) -> tuple[Section, dict[str, Any] | None]:
    """All searched values of trials at once; and what the filters of that section are about."""
    arms = {name: Arm.model_validate(raw) for name, raw in subject.job["arms"].items()}
    axes = drawn.axes(arms, subject.few)
    trials = [row for row in drawn.best_first(subject.few, subject.mode) if drawn.score_of(row) is not None]
    if len(axes) < 2 or len(trials) < 2:
        return Section(
            "configurations",
            "Configurations",
            paragraph("Fewer than two trials have a score yet: there is nothing to set side by side."),
        ), None

    def value(row: Mapping[str, Any], axis: drawn.Axis) -> Any:
        return (
            row["arm"]
            if axis.key == "arm"
            else drawn.score_of(row)
            if axis.key == "score"
            else drawn.value_of(row, axis.key)
        )

    lines = [
        {
            "id": row["trial_id"],
            "score": drawn.score_of(row),
            **{f"p{number}": axis.place(value(row, axis)) for number, axis in enumerate(axes)},
        }
        for row in trials
    ]
    chart = search_charts.parallel(lines[::-1], axes, subject.metric, subject.mode)
    names = ["trial", "status", *(subject.metric if axis.key == "score" else axis.key for axis in axes)]
    cells = [[row["trial_id"], row["status"], *(brief(value(row, axis)) for axis in axes)] for row in trials]
    grid = Grid("trials kept, the best first", [dict(zip(names, row, strict=True)) for row in cells[:LISTED]])
    filters = "".join(_filter(number, axis, names[number + 2]) for number, axis in enumerate(axes))
    beside = (
        f'<div class="filters" role="group" aria-label="Filter trials">{filters}</div><div class="match">'
        '<output id="match" aria-live="polite"></output><button type="button" id="all-trials">Show all trials</button></div>'
        f'<div id="trials-table">{table(grid, "fixed")}</div>'
    )
    failed = sum(drawn.score_of(row) is None for row in subject.few)
    caption = (
        f"{drawn.told(len(subject.few), len(subject.trials), 'trials')}{f'{failed} that failed have no score and are left out. ' * bool(failed)}A line is a trial. Draw a rectangle over an "
        "axis to keep the trials that pass through it, then another over the next axis; a double click keeps all again. The fields below do the same."
    )
    known = {
        "axes": [
            {
                "key": axis.key,
                "low": axis.low,
                "high": axis.high,
                "log": axis.log,
                "choices": list(map(str, axis.choices)) or None,
            }
            for axis in axes
        ],
        "trials": cells,
        "shown": LISTED,
    }
    return Section(
        "configurations",
        "Configurations",
        figure(chart, "What was tried", caption, beside=beside, kind="wide"),
        [chart],
    ), known


def _filter(number: int, axis: drawn.Axis, name: str) -> str:
    if axis.choices:
        fields = "".join(f'<label><input type="checkbox" checked> {text(choice)}</label>' for choice in axis.choices)
    else:
        fields = "".join(
            f'<label>{word} <input type="number" step="any" placeholder="{text(brief(bound))}"></label>'
            for word, bound in (("from", axis.low), ("to", axis.high))
        )
    return f'<fieldset data-axis="{number}"><legend>{text(name)}</legend>{fields}</fieldset>'


def heads(subject: Subject) -> Section:
    """Heads in closed form by cut."""
    probes = results.read_probes(subject.path).to_pylist()
    rows = [row for row in probes if row["val_score"] is not None]
    if not rows:
        why = (
            "They were tried and have no score."
            if probes
            else "None were tried: they are where the feature store is used (features.cache)."
        )
        return Section("heads", "Heads in closed form", paragraph(why))
    points = [{key: row[key] for key in ("cut", "method", "val_score")} for row in rows]
    chart = charts.heads(points, subject.stages, subject.metric)
    cells = [
        {
            "cut": str(row["cut"]),
            "head": row["method"],
            "features": f"{row['features']:,}",
            subject.metric: decimals(row["val_score"]),
            **({"nll": decimals(row["val_nll"])} if row["val_nll"] is not None else {}),
            "s": decimals(row["seconds"]),
        }
        for row in sorted(rows, key=lambda row: (row["cut"], row["method"]))
    ]
    caption = "Before anything trains: ridge regression and discriminant analysis on the pretrained features at each cut. A fall towards the end says that the last stages are the source's own."
    agreement = results.agreement(probes, results.read_trials(subject.path), subject.mode)
    said = "".join(paragraph(f"{each['text'][:1].upper()}{each['text'][1:]}.") for each in agreement)
    return Section(
        "heads",
        "Heads in closed form",
        figure(chart, "Score by cut", caption, Grid("heads in closed form", cells)) + said,
        [chart],
    )
