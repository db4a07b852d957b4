"""What a study remembers of trials that have ended, and which of them are the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.spec import Mode


@dataclass(frozen=True)
class Finished:
    """What the study remembers of a finished trial."""

    trial_id: str
    arm: str
    number: int
    round: str
    status: str
    score: float | None
    seconds: float
    finalist_of: str | None = None
    failure: tuple[str, str] | None = None
    """Of one that failed: its kind and reason."""


def best_of(trials: Sequence[Finished], mode: str) -> Finished | None:
    """The complete trial with the best score; the earlier one where two are equal."""
    complete = [trial for trial in trials if trial.score is not None]
    sign = 1 if mode == "max" else -1
    return max(complete, key=lambda trial: sign * (trial.score or 0.0), default=None)


def choose_finalists(trials: Sequence[Finished], finalists: str, mode: str) -> list[Finished]:
    """Which configurations are re-run on fresh seeds: the best by validation, of the study or (`arms`) of each arm.

    Ties go to the lower number, so that the choice does not depend on which trial happened to finish first.
    """
    ordered = sorted(trials, key=lambda trial: (trial.number, trial.arm))
    arms = sorted({trial.arm for trial in trials})
    groups = [ordered] if finalists == "best" else [[t for t in ordered if t.arm == arm] for arm in arms]
    return [best for group in groups if (best := best_of(group, mode))]


def fixed(arm: str) -> Finished:
    """What stands for the one configuration of an arm that is not searched."""
    return Finished(f"{arm}-00000", arm, 0, "search", "complete", None, 0.0)


def best_probe(rows: Sequence[Mapping[str, Any]], mode: Mode) -> Mapping[str, Any] | None:
    """The row with the best score; of equal ones that at the deepest cut, where training costs least."""
    sign = 1 if mode == "max" else -1
    scored = [row for row in rows if row.get("val_score") is not None]
    return max(scored, key=lambda row: (sign * row["val_score"], row["cut"]), default=None)


def remember(row: Mapping[str, Any]) -> Finished:
    """What of a trial's row the study needs later."""
    return Finished(
        trial_id=row["trial_id"],
        arm=row["arm"],
        number=row["number"],
        round=row["round"],
        status=row["status"],
        score=row.get("val_score"),
        seconds=row["seconds"],
        finalist_of=row.get("finalist_of"),
        failure=(row.get("error_kind") or "internal", row.get("reason") or "") if row["status"] == "failed" else None,
    )
