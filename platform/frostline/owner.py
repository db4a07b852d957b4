"""The study on a cluster: one actor beside the driver, which workers ask for work."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from frostline.outcome import EpochRecord, Outcome, lost
from frostline.snapshot import Snapshot
from frostline.spec import Job
from frostline.study import Study
from frostline.trialspec import TrialSpec
from frostline.work import Load, Probe, Shard, Supply, Survey

Preparation = Survey | Shard | Probe
"""What trials wait for."""
Work = Preparation | list[TrialSpec]
"""What a worker does; a list is a pack."""

TRIES = 2  # of a piece of preparation whose worker dies
STARTS = 5  # of workers in a row that die before they take any work


class PreparationError(RuntimeError):
    """Work that trials wait for, and on which workers die."""


class StudyActor:
    """The study's one owner on a cluster, and what workers ask for work."""

    def __init__(self) -> None:
        self.study: Study | None = None
        self.before: list[Preparation] = []  # without which nothing else can start
        self.doing: dict[str, Work] = {}  # by worker
        self.loaded: set[str] = set()  # workers that loaded while others surveyed
        self.tries: Counter[int] = Counter()  # of a piece of preparation
        self.dry = False  # since it was last found that nothing can start, nothing has ended
        self.stillborn = 0  # workers in a row that ended before they took any work
        self.problem: Exception | None = None

    def open(
        self, job: Job, facts: Mapping[str, Any], splits: pa.Table, who: Mapping[str, Any], share: int
    ) -> Snapshot:
        """Begin, or go on with what is in the folder; `share` packs can run at once."""
        self.share = share
        self.study = Study(job, facts, splits, who={**who, "pid": os.getpid()})
        return self.study.snapshot()

    def take(self, worker: str) -> Work | Load | Literal["wait", "end"]:
        """The next piece of work, the last one being done; `wait` where none can begin now, `end` where none will."""
        self.stillborn = 0
        if self.doing.pop(worker, None):
            self.dry = False
        if self.problem or self.study is None or self.study.done:
            return "end"
        if not self.dry and (work := self._next(self.study)):
            self.doing[worker] = work
            return work
        self.dry = True
        return self._meanwhile(worker)

    def _meanwhile(self, worker: str) -> Load | Literal["wait"]:
        """What a worker does that there is no work for; it need not be ready before there is."""
        surveys = [work for work in self.doing.values() if isinstance(work, Survey)]
        if not surveys or worker in self.loaded:
            return "wait"
        self.loaded.add(worker)
        return Load(surveys[0])

    def _next(self, study: Study) -> Work | None:
        if self.before:
            return self.before.pop()
        if any(not isinstance(work, list) for work in self.doing.values()):
            return None
        return study.survey(self.share) or study.probe() or study.ask(self.share) or None

    def report(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        return self._opened.report(records)

    def finish(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take outcomes; of a trial on several workers the first one that any of them tells."""
        self._opened.finish({trial_id: outcome for trial_id, outcome in outcomes.items() if self.runs(trial_id)})
        self.dry = False

    def keep(self, trial_id: str, checkpoint: bytes) -> None:
        self._opened.keep(trial_id, checkpoint)

    def kept(self, trial_id: str) -> bytes | None:
        return self._opened.kept(trial_id)

    def runs(self, trial_id: str) -> bool:
        """Whether a trial has not ended."""
        return trial_id in self._opened.running

    def give_up(self, trial_id: str, kind: str, reason: str) -> None:
        """End a trial that has lost its workers too often."""
        running = self._opened.running[trial_id]
        self._opened.finish({trial_id: lost(running.spec, running.records, kind, reason)})

    def hold(self, root: str, keys: Collection[str]) -> None:
        self._opened.hold(root, keys)

    def supplied(self, supply: Supply) -> None:
        self._opened.supplied(supply)
        self.before += supply.shards
        self.dry = False

    def probed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._opened.probed(rows)

    def extracted(self, row: Mapping[str, Any]) -> None:
        self._opened.extracted(row)

    def fail(self, problem: Exception) -> None:
        """End the search: what trials need cannot be had."""
        self.problem = self.problem or problem

    def lose(self, worker: str, reason: str) -> None:
        """Take back what a worker that is gone was doing."""
        work, self.dry = self.doing.pop(worker, None), False
        if isinstance(work, list):
            self._opened.lose([spec.trial_id for spec in work], reason)
        elif work:
            self.tries[id(work)] += 1
            self.before.append(work)
            if self.tries[id(work)] == TRIES:
                what = "fitting heads in closed form" if isinstance(work, Probe) else "extracting activations"
                self.fail(PreparationError(f"{what} failed {TRIES} times: {reason}"))
        else:
            self.stillborn += 1
            if self.stillborn == STARTS:
                self.fail(PreparationError(f"{STARTS} workers in a row ended before they began to work: {reason}"))

    def standing(self) -> tuple[bool, Exception | None]:
        """Whether there is no more work, and what ended the search before its end."""
        return self.problem is not None or self._opened.done, self.problem

    def snapshot(self) -> Snapshot:
        return self._opened.snapshot()

    def close(self) -> Snapshot | None:
        """Commit what is left; None where the study could not be opened."""
        if self.study is None:
            return None
        self.study.close()
        return self.study.snapshot()

    @property
    def _opened(self) -> Study:
        assert self.study is not None
        return self.study
