"""What a report is about: a study, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostline import drawn, results
from frostline.arms import ArmResult
from frostline.comparison import Comparison, Task, compare
from frostline.spec import Mode


@dataclass(frozen=True)
class Subject:
    """What all sections of a report are about."""

    path: Path
    job: Mapping[str, Any]
    facts: Mapping[str, Any]
    metric: str
    mode: Mode
    comparison: Comparison
    task: Task
    trials: Sequence[Mapping[str, Any]]
    """Of the search: see `drawn.search_trials`."""
    few: Sequence[Mapping[str, Any]]
    """Those that are drawn."""
    winner: ArmResult | None
    """The confirmed arm with the best mean test score."""

    @property
    def arms(self) -> list[str]:
        return list(self.job["arms"])

    @property
    def stages(self) -> int:
        return len(self.facts["stages"])


def read_subject(study: str | Path) -> Subject:
    """A study as of now; it may be running. Raises what the readers in `results` raise."""
    record, comparison = results.read_job(study), compare([study])
    task, trials = comparison.tasks[0], drawn.search_trials(study)
    return Subject(
        path=Path(study),
        job=record["job"],
        facts=record["facts"],
        metric=comparison.metric,
        mode=comparison.mode,
        comparison=comparison,
        task=task,
        trials=trials,
        few=drawn.thinned(trials, drawn.TRIALS, comparison.mode),
        winner=next((arm for arm in task.arms if arm.finalist and arm.finalist.test.n), None),
    )
