"""Sections of the report about arms: the verdict, scores on test, what decided, mistakes, costs, and how to run it again."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.filesize import decimal

from frostline import charts, drawn, page, results
from frostline.account import Account
from frostline.compare_text import Grid, arms_grid, budgets_grid, claims, configs_grid, importance_grid, pairs_grid
from frostline.jobfile import as_toml
from frostline.mistakes import Mistakes, confused, excerpts, read_mistakes
from frostline.page import Section, figure, listing, paragraph, table, text
from frostline.subject import Subject
from frostline.target_sections import MISTAKES
from frostline.text import duration

CLASSES = 30
"""Of a confusion matrix, at most."""
Pictures = Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, bytes]]
"""From a job's data section and sample id -> class to PNG files; see `mistakes.pictures`."""


def verdict(subject: Subject, costs: Account) -> Section:
    """What can be said of the arms, what limits that, and the figures to quote."""
    task, best = subject.task, next(iter(drawn.best_first(subject.trials, subject.mode)), None)
    shown: dict[str, Any] = {}
    if subject.winner and subject.winner.finalist:
        found = subject.winner.finalist
        span = "" if found.test.low is None else f" [{found.test.low:.3f}, {found.test.high:.3f}]"
        shown[f"{subject.winner.label}: {subject.metric} on test"] = (
            f"{found.test.mean:.3f}{span}, {found.test.n} seeds"
        )
        if found.freeze_depth is not None:
            shown["its freeze depth"] = f"{found.freeze_depth} of {found.stages} stages"
    if best and best["val_score"] is not None:
        shown["best on val in the search"] = f"{best['val_score']:.4f} ({best['trial_id']})"
    ended = {status: sum(row["status"] == status for row in subject.trials) for status in results.STATUSES}
    shown["trials of the search"] = ", ".join(f"{n:,} {status}" for status, n in ended.items())
    shown["device time"] = duration(costs.trials_s + costs.extractions_s)
    edges = [
        f"{arm.label}: {edge['key']} is best at the {'lower' if edge['end'] == 'low' else 'upper'} end of its range; a wider range may hold a better value"
        for arm in task.arms
        if arm.finalist
        for edge in arm.finalist.edges
    ]
    notes = listing([*task.notes, *edges], "notes")
    return Section("verdict", "Verdict", f"{paragraph(task.verdict, 'verdict')}{notes}{page.facts(shown)}")


def arms(subject: Subject) -> Section:
    """Arms on test, pairs of them, their best configurations, score against budget."""
    task, parts, shown = subject.task, [], []
    rows = [
        {"label": arm.label, "mean": found.test.mean, "low": found.test.low, "high": found.test.high}
        for arm in task.arms
        if (found := arm.finalist) and found.test.n
    ]
    on_test, pairs, configs = arms_grid(task, subject.metric), pairs_grid(task), configs_grid(task)
    if rows and on_test:
        seeds = [
            {"label": arm.label, "score": score}
            for arm in task.arms
            for score in arm.scores.values()
            if score is not None
        ]
        shown.append(charts.forest(rows, seeds, subject.arms, subject.metric))
        caption = "The mean over fresh seeds and its 95 % t-interval; the small marks are the seeds."
        parts.append(figure(shown[-1], "Arms on test", caption, on_test))
    else:
        parts.append(
            paragraph("No arm has a score on test yet: a finalist is re-run on fresh seeds and scored there once.")
        )
    if pairs:
        parts.append(table(pairs))
    if configs:
        parts.append(table(configs))
    budgets = budgets_grid(task)
    if budgets:
        points = [{"label": arm.label, **point} for arm in task.arms for point in arm.search.curve]
        shown.append(charts.budget(points, subject.arms, subject.metric))
        caption = "What so many trials of an arm would be expected to find (Tang et al. 2020), up to half of the trials there are."
        parts.append(figure(shown[-1], "Score against tuning budget", caption, budgets))
    return Section("arms", "Arms", "".join(parts) + listing(list(claims(subject.comparison)), "below"), shown)


def importance(subject: Subject) -> Section:
    """Which searched values decided, by arm."""
    rows = [
        {"label": arm.label, "key": key, "share": share}
        for arm in subject.task.arms
        for key, share in (arm.search.importance or {}).items()
    ]
    grid = importance_grid(subject.task)
    if not rows:
        return Section("importance", "Importance", table(grid))
    chart = charts.importance(rows, subject.arms)
    caption = "PED-ANOVA (Watanabe et al. 2023): which keys set the best tenth of an arm's trials, at least 5, apart from all of them."
    without = [f"{arm.label}: {arm.search.no_importance}" for arm in subject.task.arms if arm.search.no_importance]
    return Section(
        "importance", "Importance", figure(chart, "What decided", caption, grid) + listing(without, "below"), [chart]
    )


def mistakes(subject: Subject, pictures: Pictures) -> Section:
    """What the winner got wrong on test."""
    title, classes = "Mistakes", subject.facts["classes"]
    winner, of_others = subject.winner, MISTAKES.get(subject.job["data"].get("task"))
    done = [each["trial_id"] for each in winner.confirmations if each["test_score"] is not None] if winner else []
    if winner is None or not done:
        return Section("mistakes", title, paragraph("There are no predictions on test yet: confirmations make them."))
    if of_others is not None:
        return of_others(subject, winner.label, done)
    found = read_mistakes(subject.path, done, len(classes))
    if found is None:
        return Section("mistakes", title, paragraph("There are no predictions on test."))
    shown = confused(found, CLASSES)
    totals = found.counts.sum(axis=1)
    rows = [
        {
            "label": classes[i],
            "predicted": classes[j],
            "count": int(found.counts[i, j]),
            "share": float(found.counts[i, j] / max(1, totals[i])),
        }
        for i in shown
        for j in shown
    ]
    chart = charts.confusion(rows, [classes[i] for i in shown])
    caption = drawn.told(len(shown), len(classes), "classes", "those with most mistakes")
    caption += f"All {found.trials} confirmations of {winner.label} together. Grey cells are right, blue ones wrong."
    wrong = sorted(
        (row for row in rows if row["label"] != row["predicted"] and row["count"]), key=lambda row: -row["count"]
    )
    cells = [
        {
            "true class": row["label"],
            "predicted": row["predicted"],
            "times": str(row["count"]),
            "of its class": f"{row['share']:.1%}",
        }
        for row in wrong
    ]
    matrix = figure(
        chart, f"Confusion of {winner.label}", caption, Grid("classes taken for others, most often first", cells)
    )
    return Section("mistakes", title, matrix + _worst(subject, found, pictures), [chart])


def _worst(subject: Subject, found: Mistakes, pictures: Pictures) -> str:
    """The samples that the winner was most wrong about, with their pictures or texts where these can be had."""
    classes = subject.facts["classes"]
    if not found.worst:
        return paragraph("No test sample was taken for another class.")
    noun = "text" if subject.job["data"].get("tokenizer") else "image"
    try:
        wanted = {row["sample_id"]: classes[row["label"]] for row in found.worst}
        files, quoted = pictures(subject.job["data"], wanted), excerpts(subject.job["data"], wanted)
        lost = len(found.worst) - len(files) - len(quoted)
        why = f"{lost} of the {noun}s are not there any more, or are others now." if lost else ""
    except (ValueError, OSError) as error:
        files, quoted, why = {}, {}, f"The {noun}s cannot be shown: {error}"
    items = []
    for row in found.worst:
        said = f"{classes[row['label']]} taken for {classes[row['predicted']]}"
        image = files.get(row["sample_id"])
        shown = (
            f'<img alt="{text(said)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">' if image else ""
        )
        if row["sample_id"] in quoted:
            shown = f"<blockquote>{text(quoted[row['sample_id']])}</blockquote>"
        detail = f"by {row['wrong']} of {found.trials}, true class {row['likely']:.0%}"
        items.append(f"<li>{shown}{text(said)}<span>{text(detail)}</span><span>{text(row['sample_id'])}</span></li>")
    note = "Most confidently wrong, by how many confirmations erred and how little probability they left to the true class. A wrong label looks the same: look at them."
    return f'<h3>Worst mistakes</h3>{paragraph(note)}{paragraph(why, "below") if why else ""}<ul class="pictures">{"".join(items)}</ul>'


def costs(subject: Subject, found: Account) -> Section:
    """What the search cost and was spared, and what failed."""
    if not found.trials:
        return Section("costs", "Cost account", paragraph("No trial has finished yet."))
    parts = {
        "spent on trials": found.trials_s,
        "spent on stored activations": found.extractions_s,
        "saved by stored activations and packs": max(0.0, found.shared_s),
        "saved by early stops (estimate)": found.stopped_s,
    }
    chart = charts.costs(
        [{"part": part, "seconds": seconds, "order": order} for order, (part, seconds) in enumerate(parts.items())]
    )
    total = sum(parts.values())
    rows = [
        {"part": part, "device time": duration(seconds), "share": f"{seconds / total:.0%}" if total else ""}
        for part, seconds in parts.items()
    ]
    spent = found.trials_s + found.extractions_s
    lines = [
        f"One by one, with nothing stored or shared, the trials would have taken about {duration(found.alone_s)}; they took {duration(spent)}.",
        f"{found.epochs_left_out:,} epochs were not trained because trials were stopped early; {found.epochs:,} were. What they would have taken is estimated from each trial's own epochs.",
        f"{found.images:,} samples passed frozen stages for the feature store, which was given {decimal(found.stored_bytes)}. {found.packed:,} of {found.trials:,} trials trained beside others in a pack.",
    ]
    if found.shared_s < 0:
        lines.append(
            f"Stored activations and packs cost {duration(-found.shared_s)} more here than they saved; other studies find the activations stored."
        )
    if found.unknown:
        lines.append(
            f"Of {found.unknown:,} trials it is not known what they would have taken alone; they count as spent only."
        )
    failures = Counter(
        f"{row['error_kind'] or 'unknown'}: {row['reason'] or 'no reason given'}"
        for row in subject.trials
        if row["status"] == "failed"
    )
    failed = Grid(
        "failed trials",
        [{"reason": reason, "trials": str(n)} for reason, n in failures.most_common()],
    )
    title = "Device time, spent and saved"
    return Section(
        "costs",
        "Cost account",
        figure(chart, title, "", Grid(title, rows)) + listing(lines) + (table(failed) if failures else ""),
        [chart],
    )


def again(subject: Subject) -> Section:
    """Commands, the job, versions and hardware."""
    folder, job = shlex.quote(str(subject.path)), f"{subject.job['name']}.toml"
    commands = [
        f"frostline search {job}           # the job below, saved as a file",
        f"frostline results {folder}",
        f"frostline compare {folder}",
        f"frostline report {folder}",
        f'frostline results {folder} --sql "select freeze_depth, max(val_score) from trials group by 1 order by 1"',  # noqa: S608 (shown)
    ]
    toml = page.code(as_toml(subject.job), "job file")
    known = {"hardware": subject.facts.get("hardware"), **(subject.facts.get("versions") or {})}
    known |= {
        key.replace("_", " "): subject.facts.get(key)
        for key in ("data_hash", "split_hash", "weights_hash", "stages_hash")
    }
    shown = page.facts({name: value for name, value in known.items() if value})
    said = paragraph(
        "Same job, seed, versions and thread count give the same rows on the same hardware. A trial's row has all that it was given, in the column spec."
    )
    return Section(
        "again",
        "Run it again",
        f"{page.code(commands, 'commands')}{said}{page.folded('The job file', toml)}<h3>Versions and hardware</h3>{shown}",
    )
