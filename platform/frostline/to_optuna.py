"""A study as an Optuna journal, which optuna.load_study and optuna-dashboard open: one Optuna study an arm."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages.journal import BaseJournalBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from frostline import results
from frostline.commit import write_file
from frostline.propose import distributions
from frostline.runs import RUNNING, ExportError, Run, Tracked

STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    RUNNING: TrialState.RUNNING,
}
_MEASURED = ("last_score", "spent_s", "alone_s", "peak_mib", "trainable_params")
_SAID = ("reason", "error_kind", "strategy", "config_id", "device", "hardware")


def export(study: Tracked, path: Path) -> str:
    """Write the journal at `path`, replacing one of the same study as a whole; what was written.

    The same rows give the same bytes. Raises ExportError where `path` holds anything that this function has not written, an
    entry that a dashboard has added included, and OSError: what was there is there still then.
    """
    refuse_foreign(path, study.name)
    journal = Journal(_author(study.name))
    with _quiet():
        storage = JournalStorage(journal)
        for arm in study.arms:
            _add_arm(storage, study, arm)
    write_file(path, journal.text().encode())
    counts = {run.trial_id for run in study.runs if run.round == "search"}
    return f"{len(counts):,} trials in {len(study.arms)} Optuna {'study' if len(study.arms) == 1 else 'studies'}"


def study_name(study: str, arm: str) -> str:
    """What an arm's Optuna study is called: `quickstart/freeze`."""
    return f"{study}/{arm}"


class Journal(BaseJournalBackend):
    """A journal in memory, all by one author: JournalFileBackend locks and fsyncs its file for each trial."""

    def __init__(self, author: str) -> None:
        self.author = author
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return islice(self.logs, log_number_from, None)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += logs

    def text(self) -> str:
        """As JournalFileBackend writes it."""
        signed = (log | {"worker_id": self.author} for log in self.logs)
        return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in signed)


def refuse_foreign(path: Path, study: str) -> None:
    """Raise ExportError unless nothing is at `path`, or a journal of this study to which nobody has added."""
    if not path.exists():
        return
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file: --out {path / 'optuna.journal'}")
    lines = path.read_bytes().splitlines()
    authors = set(map(_author_of, lines))
    if authors != {_author(study)}:
        what = (
            "entries that others have added" if _author(study) in authors else "something else than this study's export"
        )
        raise ExportError(f"{path} holds {what}, and was left as it is; give another file: --out PATH")


def trial_of(run: Run, space: Mapping[str, BaseDistribution], confirmations: Sequence[Run]) -> FrozenTrial:
    """A search trial as Optuna's; only a complete one has a value. Confirmations are attributes of their finalist."""
    said = {"trial_id": run.trial_id} | {key: run.facts[key] for key in _SAID if key in run.facts}
    if "seed" in run.facts:
        said |= {"seed": int(run.facts["seed"]), "seeds": json.loads(run.facts.get("seeds", "{}"))}
    measured = {key: run.finals[key] for key in _MEASURED if key in run.finals}
    return FrozenTrial(
        number=run.number,
        trial_id=run.number,
        state=STATES[run.status],
        value=run.finals["val_score"] if run.status == "complete" else None,
        datetime_start=run.started,
        datetime_complete=run.finished,
        params={key: run.params[key] for key in space},
        distributions=dict(space),
        user_attrs={**said, **measured, **_confirmed(confirmations)},
        system_attrs={},
        intermediate_values={
            epoch.epoch: epoch.metrics["val_score"] for epoch in run.epochs if "val_score" in epoch.metrics
        },
    )


def _add_arm(storage: JournalStorage, study: Tracked, arm: str) -> None:
    direction = "maximize" if study.mode == "max" else "minimize"
    made = optuna.create_study(storage=storage, study_name=study_name(study.name, arm), direction=direction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made.set_metric_names([study.metric])  # which the dashboard puts on its axes
    made.set_user_attr("strategy", study.arms[arm].strategy)
    space = distributions(study.arms[arm], study.stages)
    confirmed: dict[str, list[Run]] = {}
    for run in study.runs:
        if run.round == "confirm":
            confirmed.setdefault(run.facts["finalist_of"], []).append(run)
    searched = [run for run in study.runs if run.arm == arm and run.round == "search"]
    for place, run in enumerate(searched):
        if run.number != place or not run.params.keys() >= space.keys():
            raise results.NotAStudyError(
                f"{study.name}: the table asks lacks what {arm}-{place:05d} was proposed with, so that Optuna cannot be told. "
                "Put the study's folder asks back from a copy"
            )
        made.add_trial(trial_of(run, space, confirmed.get(run.trial_id, [])))


def _confirmed(runs: Sequence[Run]) -> dict[str, Any]:
    """Test scores of a finalist by seed; None where a confirmation has none."""
    if not runs:
        return {}
    scores = [run.finals.get("test_score") for run in runs]
    known = [score for score in scores if score is not None]
    mean = {"test_score_mean": sum(known) / len(known)} if known else {}
    return {"test_scores": scores, "test_seeds": [int(run.facts["seed"]) for run in runs], **mean}


def _author(study: str) -> str:
    return f"frostline track {study}"


def _author_of(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("worker_id") if isinstance(entry, dict) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of each study that it makes."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
