"""report.html: a study on one page that needs nothing beside it. The verdict comes first."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from frostline import mistakes, page, results, search_sections, sections
from frostline.account import account
from frostline.commit import write_file
from frostline.page import paragraph, text
from frostline.sections import Pictures
from frostline.subject import Subject, read_subject

NAME = "report.html"


def write_report(study: str | Path, path: Path | None = None, pictures: Pictures = mistakes.pictures) -> Path:
    """Write a study's report, into its folder where no other path is given, and answer where it is.

    Raises what the readers in `results` raise, and OSError; a report that was there is then there still.
    """
    path = path or Path(study) / NAME
    write_file(path, build(study, pictures).encode())
    return path


def build(study: str | Path, pictures: Pictures = mistakes.pictures) -> str:
    """The page, as of now; the study may be running. Raises what the readers in `results` raise."""
    subject = read_subject(study)
    trials = results.read_trials(study).select(["status", "spent_s", "alone_s", "epochs", "epochs_asked", "lanes"])
    spent = account(trials.to_pylist(), results.read_extractions(study).to_pylist())
    configurations, filters = search_sections.configurations(subject)
    parts = [
        sections.verdict(subject, spent),
        sections.arms(subject),
        search_sections.freezing(subject),
        search_sections.pareto(subject),
        search_sections.training(subject),
        configurations,
        sections.importance(subject),
        search_sections.heads(subject),
        sections.mistakes(subject, pictures),
        sections.costs(subject, spent),
        sections.again(subject),
    ]
    name = subject.job["name"]
    head = f"<h1>{text(name)}</h1>{paragraph(_about(subject), 'lead')}"
    return page.document(f"{name}: Frostline report", head, parts, {"filter": filters})


def _about(subject: Subject) -> str:
    sizes = ", ".join(
        f"{subject.facts[key]:,} {name}"
        for key, name in (("n_train", "train"), ("n_val", "val"), ("n_test", "test"))
        if key in subject.facts
    )
    asked, found = subject.job["search"]["trials"], len(subject.trials)
    state = f"{found:,} of {asked:,} trials have finished" if found < asked else f"{found:,} trials"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"What to freeze of {subject.job['backbone']['name']} for {subject.job['data']['path']}"
        f"{f' ({sizes})' if sizes else ''}, by {subject.metric}. {state}. Written by frostline report, {written}."
    )
