"""A study as offline runs of Weights & Biases, one a trial, for `wandb sync`. Nothing is sent anywhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from frostline.extras import extra
from frostline.runs import FINAL, Run, Tracked, lacking

PROJECT = "frostline"


def export(study: Tracked, out: Path) -> str:
    """Write OUT/STUDY/TRIAL/offline-run-…-KEY for each trial that has ended and has none there; what was written.

    A run's folder appears when it is whole, and is never touched again. Raises MissingExtraError, ExportError, as
    `runs.lacking`, and OSError.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when it is imported
    wandb = extra("wandb", "wandb")
    folder = out / study.name
    there = {path.parent.name: path.name.rpartition("-")[2] for path in folder.glob("*/offline-run-*")}
    runs = lacking(study, there, folder)
    if runs:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            try:
                for run in runs:
                    _write(wandb, study, run, Path(partial), folder / run.trial_id)
            finally:
                wandb.teardown()  # it has a process of its own, which writes here
    return f"{len(runs):,} trials more, {len(study.ended):,} in all"


def _write(wandb: Any, study: Tracked, run: Run, partial: Path, final: Path) -> None:
    settings = wandb.Settings(
        mode="offline",
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,  # of this process and machine, which trained nothing
        x_disable_stats=True,
        x_save_requirements=False,
    )
    made = wandb.init(
        project=PROJECT,
        group=study.name,
        job_type=run.arm,
        id=run.key,
        name=run.trial_id,
        tags=[run.round, run.status],
        config={**run.config, "facts": run.facts, "metric": study.metric, "mode": study.mode},
        dir=str(partial),
        settings=settings,
    )
    for epoch in run.epochs:
        made.log({**epoch.metrics, "epoch": epoch.epoch, "_timestamp": epoch.at_s}, step=epoch.epoch)
    made.summary.update({f"{FINAL}{name}": value for name, value in run.finals.items()})
    written = Path(made.dir).parent
    made.finish(exit_code=int(run.status == "failed"))
    final.mkdir(exist_ok=True)
    written.rename(final / written.name)
