"""Frostline from Python; the command line is a thin layer over this.

PyTorch is imported by the functions that need it: on Ray, while that starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from frostline.fixed import best_job, fixed_job
from frostline.jobfile import load_job, parse_job
from frostline.progress import Progress
from frostline.refresh import refreshing
from frostline.snapshot import Snapshot
from frostline.spec import BackboneSpec, Job
from frostline.text import plain

if TYPE_CHECKING:
    from frostline.candidates import Probed

__all__ = ["SearchFailedError", "best_job", "probe", "search", "train"]


class SearchFailedError(RuntimeError):
    """A search that ended without what it was for: no trial, or not every confirmation, has completed, or it was stopped."""


def search(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    inline: bool = False,
    address: str | None = None,
    allow_open_cluster: bool = False,
    console: Console | None = None,
) -> Path:
    """Run a search to its end, or go on with one that was begun, and answer the folder of its study.

    `job` is a job file or a `Job`; `overrides` are `key=value` strings that are laid over it. The search runs on a local Ray
    that is started and stopped for it, on the cluster at `address`, or (`inline`) in this process. A cluster that lets in
    whoever reaches it is refused unless `allow_open_cluster` is given, which the study records.

    At the end, and now and then before, report.html is written into that folder.

    Raises a ValueError that lists what is wrong with the job, data or backbone; StudyBusy while another process holds
    the study; ClusterError for the cluster; SearchFailedError where every trial failed, or the search was stopped since others would
    have failed too.
    """
    if inline and address:
        raise ValueError("inline = True runs in this process, and address names a cluster: give one of them")
    job = _job(job, overrides)
    if not job.arms:
        raise ValueError(
            f"job {job.name!r} has no arms to search; add [arms.NAME] with a strategy and a space, or train its one "
            "configuration: `frostline train`"
        )
    console = console or Console(stderr=True)
    who = {"driver": os.getpid()}
    with Progress(console) as progress, refreshing(job.folder) as report:

        def show(snapshot: Snapshot) -> None:
            progress.show(snapshot)
            report.look()

        if inline:
            last = _run_inline(job, progress, who=who, show=show)
        else:
            last = _run_on_ray(job, progress, address, allow_open_cluster, who=who, show=show)
    folder = job.folder
    _write_report(folder, console)
    if last.stopped:
        raise SearchFailedError(f"{last.stopped}. `frostline results {folder}` shows what there is")
    if last.best is None and job.search.trials:
        raise SearchFailedError(f"none of {last.done} trials completed; `frostline results {folder}` says why")
    if last.confirmed_complete < last.to_confirm:
        lost = last.to_confirm - last.confirmed_complete
        what = "confirmations" if job.search.trials else "trainings"
        raise SearchFailedError(f"{lost} of {last.to_confirm} {what} failed; `frostline results {folder}` says why")
    return folder


def _run_inline(job: Job, progress: Progress, **run: Any) -> Snapshot:
    from frostline.data import splits_table
    from frostline.estimate import facts_of
    from frostline.inline import run_inline
    from frostline.prepare import prepare

    ready = prepare(job, progress.decoding)
    return run_inline(ready.job, facts_of(ready), splits_table(ready.dataset), **run)


def _run_on_ray(job: Job, progress: Progress, address: str | None, allow_open: bool, **run: Any) -> Snapshot:
    """Ray starts, or is connected to, while this process imports PyTorch and reads the data."""
    from frostline.connection import cluster

    with cluster(address, allow_open=allow_open) as connected:
        from frostline.data import splits_table
        from frostline.estimate import facts_of
        from frostline.prepare import prepare
        from frostline.tune import run_tune

        ready = prepare(job, progress.decoding)
        facts = None if address else facts_of(ready)  # of this machine, unless trials run on others
        return run_tune(
            ready.job, facts, splits_table(ready.dataset), **run, parcels=ready.parcels, connected=connected
        )


def train(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    inline: bool = False,
    address: str | None = None,
    allow_open_cluster: bool = False,
    console: Console | None = None,
) -> Path:
    """Train the one configuration that a job without arms says, on `scaling.workers` workers, and answer its folder: rows,
    predictions on test and the bundle, as of a search's confirmations. One that was interrupted goes on from its last checkpoint.

    The rest is as in `search`. A search's winner: `train(best_job("results/NAME"))`.
    """
    job = fixed_job(_job(job, overrides))
    if inline and job.scaling.workers > 1:
        raise ValueError(f"scaling.workers = {job.scaling.workers}: several workers train on Ray; leave --inline out")
    return search(job, inline=inline, address=address, allow_open_cluster=allow_open_cluster, console=console)


def probe(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    backbones: Sequence[str] = (),
    console: Console | None = None,
) -> Probed:
    """What heads without training make of the features of the job's backbone at every cut, and of other `backbones`, in this
    process and without Ray: where a search should begin, and with which backbone.

    `backbones` are names as in a job, each alone or as `NAME=WEIGHTS`; without, they have the job's `backbone.weights`
    where that is `pretrained` or `random`, else `pretrained`. What images give at the cuts is put into the job's feature
    store, where a search finds it. Val scores heads and chooses none, if train allows for cross-validation; test is not read.

    Raises a ValueError that lists what is wrong with the job, data or a backbone.
    """
    from frostline.probing import probe_backbones

    job = _job(job, overrides)
    usual = job.backbone.weights if job.backbone.weights == "random" else "pretrained"
    parts = [name.partition("=") for name in backbones]
    others = [BackboneSpec(name=name, weights=weights or usual) for name, _, weights in parts]
    with Progress(console or Console(stderr=True)) as progress:
        return probe_backbones(job, others, say=progress.tell, decoding=progress.decoding)


def _job(job: Job | str | Path, overrides: Sequence[str]) -> Job:
    if isinstance(job, Job):
        return parse_job(job.model_dump(mode="json", exclude_unset=True), overrides)
    return load_job(job, overrides)


def _write_report(folder: Path, console: Console) -> None:
    try:
        from frostline.report import write_report  # the plotting library takes a moment to import

        write_report(folder)
    except Exception as error:  # noqa: BLE001 (the rows are there, and a report can be made of them at any time)
        said = f"no report was written ({type(error).__name__}: {error}); `frostline report {folder}` tries again"
        console.print(plain(said), soft_wrap=True)
