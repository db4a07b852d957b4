"""A study in this process, one trial after the other: for debugging, and as the measure of the other executors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from frostline.features import FeatureStore
from frostline.spec import Job
from frostline.study import Snapshot, Study
from frostline.train import EpochRecord
from frostline.trial import attempt
from frostline.world import World


def run_inline(
    job: Job, facts: Mapping[str, Any], splits: pa.Table, *, who: Mapping[str, Any], show: Callable[[Snapshot], None]
) -> Snapshot:
    """Run every trial of the study here; `show` is called after each epoch and each trial."""
    store, world = FeatureStore(), World.here(job.resources)
    study = Study(job, facts, splits, who=who)
    try:
        while spec := study.ask():

            def report(record: EpochRecord, trial_id: str = spec.trial_id) -> bool:
                go_on = study.report(trial_id, record)
                show(study.snapshot())
                return go_on

            study.finish(spec.trial_id, attempt(spec, store=store, world=world, report=report))
            show(study.snapshot())
        return study.snapshot()
    finally:
        study.close()
