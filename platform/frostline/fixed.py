"""Jobs that train one configuration and search nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frostline import results
from frostline.jobfile import parse_job
from frostline.spec import SEARCHABLE, Job

ARM = "train"
"""What the one arm of such a job is called."""


def fixed_job(job: Job) -> Job:
    """The job as a study that trains the configuration of its [freeze], [head] and [train], on as many seeds as `confirm.seeds`
    says, one when it says nothing. Raises ValueError where the job has arms to search."""
    if job.search.trials and job.arms:
        raise ValueError(
            f"job {job.name!r} has arms to search: run `frostline search`, and then `frostline train {job.folder} --best`; or "
            "write what to train into [freeze], [head] and [train], and no arms"
        )
    raw = job.model_dump(mode="json", exclude_unset=True)
    raw.setdefault("arms", {ARM: {"strategy": job.freeze.strategy}})
    raw["search"] = {**raw.get("search", {}), "trials": 0}
    raw["confirm"] = {"seeds": 1, **raw.get("confirm", {})}
    return parse_job(raw)


def best_job(study: str | Path, overrides: Sequence[str] = ()) -> Job:
    """A job that trains a study's best configuration: by the mean validation score of confirmations where there are any, else
    of search trials. Its folder lies beside the study's, and is called NAME-best.

    Raises what the readers in `results` raise, JobError, and ValueError where no trial has completed.
    """
    job, trials = results.read_job(study)["job"], results.read_trials(study)
    found = results.leaderboard(trials, results.objective_of(study, job)[1])
    ranked = [row["trial_id"] for row in found.finalists if row["n"]] or [row["trial_id"] for row in found.trials]
    if not ranked:
        raise ValueError(f"no trial of {study} has completed, so that there is no best one to train")
    specs: dict[str, Any] = {
        row["finalist_of"] or row["trial_id"]: json.loads(row["spec"])["config"]
        for row in trials.select(["trial_id", "finalist_of", "spec", "status"]).to_pylist()
        if row["status"] == "complete"
    }
    config, name = specs[ranked[0]], f"{job.get('name')}-best"[:64]
    shared = ("seed", "data", "backbone", "augment", "features", "objective", "resources")
    raw = {key: job[key] for key in shared if key in job} | {section: config[section] for section in SEARCHABLE}
    raw |= {"name": name, "results": str(Path(study).absolute().parent / name)}
    return parse_job(_without_nulls(raw), overrides, source=f"the best configuration of {study}")


def _without_nulls(value: Any) -> Any:
    """JSON values as TOML could hold them: what is null is left out, which is what it stands for."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value
