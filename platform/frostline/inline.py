"""A study in this process, one pack after the other: for debugging, and as the measure of the other executors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from frostline.checkpoint import Keep
from frostline.extract import extract, survey
from frostline.features import Feed
from frostline.outcome import EpochRecord, Outcome
from frostline.pack import run_pack
from frostline.probes import probe
from frostline.snapshot import Snapshot
from frostline.spec import Job
from frostline.study import Study
from frostline.trialspec import TrialSpec
from frostline.world import World


def run_inline(
    job: Job, facts: Mapping[str, Any], splits: pa.Table, *, who: Mapping[str, Any], show: Callable[[Snapshot], None]
) -> Snapshot:
    """Run every trial of the study here; `show` is called after each epoch and each trial."""
    feed, world = Feed(), World.here(job.resources)
    study = Study(job, facts, splits, who=who)

    def report(records: Mapping[str, EpochRecord]) -> Mapping[str, bool]:
        answers = study.report(records)
        show(study.snapshot())
        return answers

    def finish(outcomes: Mapping[str, Outcome]) -> None:
        study.finish(outcomes)
        show(study.snapshot())

    def keep(spec: TrialSpec) -> Keep:
        save = partial(study.keep, spec.trial_id)
        return Keep(partial(study.kept, spec.trial_id), save, job.scaling.checkpoint_s)

    try:
        while not study.done:
            if question := study.survey():
                supply = survey(question, world, study.hold)
                study.supplied(supply)
                for shard in supply.shards:
                    study.extracted(extract(shard, feed, world))
                    show(study.snapshot())
            elif heads := study.probe():
                study.probed(probe(heads, feed, world))
            else:
                run_pack(study.ask(), feed=feed, world=world, report=report, finish=finish, keep=keep)
        return study.snapshot()
    finally:
        study.close()
