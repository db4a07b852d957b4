"""A study: what to run next, what to stop, and the rows. It has one owner and knows neither Ray nor Optuna.

`ask` answers the next trial, `report` hears an epoch and answers whether to go on, `finish` takes a trial's outcome.
Rows are committed every 2 s or 256 rows. Opening a study again rebuilds it from what was committed: a trial that was
asked for and has no row runs again, whole; with the same configuration if its ask was committed, which asks are with the
next trial that ends.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from frostline import results
from frostline.commit import (
    Lease,
    StudyBusy,
    clean,
    commit_part,
    committed_parts,
    next_part,
    publish_folder,
    write_file,
)
from frostline.propose import Proposal, Proposer
from frostline.spec import Job, TrialSpec, configure, confirm_seeds, search_seeds
from frostline.train import EpochRecord
from frostline.trial import Outcome, lost

COMMIT_ROWS = 256
COMMIT_SECONDS = 2.0
DYING_SECONDS = 30.0
MAY_GROW = ("search.trials",)  # what may change, upwards, when a study is opened again


class StudyMismatchError(ValueError):
    """A study folder that was begun with another job, or on other data or weights."""


@dataclass
class Running:
    """A trial that was asked for and has not finished."""

    spec: TrialSpec
    finalist_of: str | None = None
    ask_seq: int | None = None
    records: list[EpochRecord] = field(default_factory=list)
    epoch_rows: list[dict[str, Any]] = field(default_factory=list)
    lost: bool = False  # its worker has died once, before the first epoch


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


@dataclass(frozen=True)
class Snapshot:
    """Where a study stands, for people who wait for it."""

    done: int
    running: int
    total: int
    pruned: int
    failed: int
    confirmed: int
    confirmed_complete: int
    to_confirm: int
    best: Finished | None
    elapsed_s: float
    left_s: float | None
    latest: Finished | None


class Study:
    """One search in one folder. Raises StudyBusy, StudyMismatchError or SpaceError when it cannot be opened."""

    def __init__(self, job: Job, facts: Mapping[str, Any], splits: pa.Table, *, who: Mapping[str, Any]) -> None:
        self.job, self.folder, self.mode = job, job.folder, job.objective.mode or "max"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lease = _take_lease(self.folder, who)
        try:
            clean(self.folder)
            self.share = job.search.trials // len(job.arms)
            self.proposers = {name: Proposer(job, name, len(facts["stages"]), self.share) for name in job.arms}
            _record_job(self.folder, job, facts, splits)
            self.finished: list[Finished] = []
            self.running: dict[str, Running] = {}
            self.again: deque[Running] = deque()
            self.part = next_part(self.folder, results.RECORD)
            self.seq = 0
            self.pending = _no_rows()
            self.sending: dict[str, list[dict[str, Any]]] | None = None
            self.opened = self.committed = time.monotonic()
            self._restore()
        except BaseException:
            self.lease.release()
            raise

    # --- the conversation with an executor ---

    def ask(self) -> TrialSpec | None:
        """The next trial to run; None where nothing can start now (see `done`)."""
        running = self.again.popleft() if self.again else self._next_search() or self._next_confirm()
        if running is None:
            return None
        self.running[running.spec.trial_id] = running
        return running.spec

    def report(self, trial_id: str, record: EpochRecord) -> bool:
        """Hear an epoch of a running trial; whether the trial should go on."""
        running = self.running[trial_id]
        spec = running.spec
        stop = spec.round == "search" and self.proposers[spec.arm].report(spec.number, record.epoch, record.val_score)
        running.records.append(record)
        running.epoch_rows.append(_epoch_row(trial_id, record, self._next_seq(), stop))
        return not stop

    def finish(self, trial_id: str, outcome: Outcome) -> None:
        """Take a trial's outcome. Raises KeyError for a trial that is not running."""
        running = self.running[trial_id]
        row = outcome.row | {
            "finalist_of": running.finalist_of,
            "ask_seq": running.ask_seq,
            "tell_seq": self._next_seq(),
        }
        done = remember(row)
        if outcome.bundle and best_of([*self._confirmed(), done], self.mode) == done:
            publish_folder(self.folder / "bundle", outcome.bundle)
        if running.spec.round == "search":
            told = self.proposers[row["arm"]].tell(row["number"], row["status"], row.get("val_score"))
            row["sampler"] = json.dumps(told)
        self.pending["trials"].append(row)
        self.pending["epochs"] += running.epoch_rows
        self.pending["predictions"] += outcome.predictions
        del self.running[trial_id]
        self.finished.append(done)
        self.commit_if_due()

    def lose(self, trial_id: str, reason: str) -> None:
        """End a trial whose worker is gone, unless it had finished. One that had not begun is run again, once."""
        running = self.running.get(trial_id)
        if running is None:
            return
        if running.records or running.lost:
            self.finish(trial_id, lost(running.spec, running.records, reason))
        else:
            del self.running[trial_id]
            self.again.append(replace(running, lost=True))

    @property
    def done(self) -> bool:
        """Whether every trial and confirmation has finished."""
        return not (self.running or self.again) and self._search_left() == 0 and not self._to_confirm()

    def snapshot(self) -> Snapshot:
        """Where the study stands; commits what is due."""
        self.commit_if_due()
        search = [trial for trial in self.finished if trial.round == "search"]
        confirmed = self._confirmed()
        to_confirm = len(self._confirmations())
        if len(search) < self.job.search.trials:
            to_confirm = self.job.confirm.seeds * (1 if self.job.confirm.finalists == "best" else len(self.job.arms))
        statuses = Counter(trial.status for trial in self.finished)
        return Snapshot(
            done=len(search),
            running=len(self.running),
            total=self.job.search.trials,
            pruned=statuses["pruned"],
            failed=statuses["failed"],
            confirmed=len(confirmed),
            confirmed_complete=sum(trial.status == "complete" for trial in confirmed),
            to_confirm=to_confirm,
            best=best_of(search, self.mode),
            elapsed_s=time.monotonic() - self.opened,
            left_s=self._seconds_left(to_confirm - len(confirmed)),
            latest=self.finished[-1] if self.finished else None,
        )

    def commit_if_due(self) -> None:
        """Commit finished trials if 2 s have passed since the last commit, or 256 rows wait."""
        rows = len(self.pending["trials"]) + (len(self.sending["trials"]) if self.sending else 0)
        if rows and (rows >= COMMIT_ROWS or time.monotonic() - self.committed >= COMMIT_SECONDS):
            self.commit()

    def commit(self) -> None:
        """Commit finished trials, with the asks and epochs that belong to them, as one part.

        Rows that a failed commit was sending are sent again, unless it had failed after they were in place.
        """
        if self.sending is None:
            if not self.pending["trials"]:
                return
            self.sending, self.pending = self.pending, _no_rows()
        elif self.part in committed_parts(self.folder, results.RECORD):
            self._sent()
            self.commit()
            return
        tables = {name: results.table_of(name, rows) for name, rows in self.sending.items() if rows}
        commit_part(self.folder, tables, self.part)
        self._sent()

    def _sent(self) -> None:
        self.part += 1
        self.sending = None
        self.committed = time.monotonic()

    def close(self) -> None:
        """Commit what is left and let the folder go."""
        try:
            while self.sending or self.pending["trials"]:
                self.commit()
        finally:
            self.lease.release()

    # --- what comes next ---

    def _search_left(self) -> int:
        return sum(max(0, self.share - proposer.asked) for proposer in self.proposers.values())

    def _next_search(self) -> Running | None:
        open_arms = [name for name, proposer in self.proposers.items() if proposer.asked < self.share]
        if not open_arms:
            return None
        name = min(open_arms, key=lambda name: self.proposers[name].asked)
        number = self.proposers[name].asked
        proposal = self.proposers[name].ask()
        running = Running(self._search_spec(name, number, proposal), ask_seq=self._next_seq())
        self.pending["asks"].append(
            {
                "seq": running.ask_seq,
                "trial_id": running.spec.trial_id,
                "arm": name,
                "number": number,
                "params": json.dumps(proposal.values),
                "sampler": json.dumps(proposal.state),
                "asked_at": datetime.now(UTC),
            }
        )
        return running

    def _search_spec(self, arm: str, number: int, proposal: Proposal) -> TrialSpec:
        seed, seeds = search_seeds(self.job, arm, number)
        return TrialSpec(
            trial_id=f"{arm}-{number:05d}",
            arm=arm,
            number=number,
            round="search",
            seed=seed,
            seeds=seeds,
            config=configure(self.job, self.job.arms[arm], proposal.values),
            **self._shared(),
        )

    def _next_confirm(self) -> Running | None:
        missing = self._to_confirm()
        if not missing:
            return None
        finalist, index = self._confirmations()[missing[0]]
        seed, seeds = confirm_seeds(self.job, index)
        spec = TrialSpec(
            trial_id=missing[0],
            arm=finalist.arm,
            number=finalist.number,
            round="confirm",
            seed=seed,
            seeds=seeds,
            config=configure(
                self.job, self.job.arms[finalist.arm], self.proposers[finalist.arm].values(finalist.number)
            ),
            **self._shared(),
        )
        return Running(spec, finalist_of=finalist.trial_id)

    def _shared(self) -> dict[str, Any]:
        job = self.job
        return {
            "data": job.data,
            "backbone": job.backbone,
            "objective": job.objective,
            "resources": job.resources,
        }

    def _confirmations(self) -> dict[str, tuple[Finished, int]]:
        """Trial id of every confirmation -> its finalist and the number of its seed; none before the search has ended."""
        search = [trial for trial in self.finished if trial.round == "search"]
        if len(search) < self.job.search.trials:
            return {}
        finalists = choose_finalists(search, self.job.confirm.finalists, self.mode)
        return {
            f"{finalist.trial_id}-c{index}": (finalist, index)
            for finalist in finalists
            for index in range(self.job.confirm.seeds)
        }

    def _confirmed(self) -> list[Finished]:
        """The confirmations that have ended; those of a finalist that a longer search has replaced do not count."""
        wanted = self._confirmations()
        return [trial for trial in self.finished if trial.trial_id in wanted]

    def _to_confirm(self) -> list[str]:
        """The confirmations that have not begun."""
        begun = {trial.trial_id for trial in self.finished} | set(self.running)
        return [trial_id for trial_id in self._confirmations() if trial_id not in begun]

    def _seconds_left(self, to_confirm: int) -> float | None:
        search = [trial.seconds for trial in self.finished if trial.round == "search"]
        if not search:
            return None
        whole = [trial.seconds for trial in self.finished if trial.status == "complete"]
        left = (self.job.search.trials - len(search)) * fmean(search) + to_confirm * fmean(whole or search)
        return left / max(1, len(self.running))

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1

    # --- opening a study again ---

    def _restore(self) -> None:
        """Rebuild proposals, pruners and what is finished from the committed rows, in the order of the asks."""
        rows = results.read_trials(self.folder).to_pylist()
        epochs: dict[str, dict[int, float]] = {}
        last_seq = -1
        for epoch in results.read_epochs(self.folder).select(["trial_id", "epoch", "val_score", "seq"]).to_pylist():
            epochs.setdefault(epoch["trial_id"], {})[epoch["epoch"]] = epoch["val_score"]
            last_seq = max(last_seq, epoch["seq"])
        by_id = {row["trial_id"]: row for row in rows}
        for ask in sorted(results.read_asks(self.folder).to_pylist(), key=lambda ask: ask["seq"]):
            proposal = Proposal(json.loads(ask["params"]), json.loads(ask["sampler"]))
            row = by_id.get(ask["trial_id"])
            if row is None:
                self.proposers[ask["arm"]].restore(proposal)
                spec = self._search_spec(ask["arm"], ask["number"], proposal)
                self.again.append(Running(spec, ask_seq=ask["seq"]))
            else:
                self.proposers[ask["arm"]].restore(
                    proposal,
                    status=row["status"],
                    score=row["val_score"],
                    epochs=epochs.get(ask["trial_id"]),
                    attrs=json.loads(row["sampler"]),
                )
            last_seq = max(last_seq, ask["seq"])
        self.finished = [remember(row) for row in sorted(rows, key=lambda row: row["tell_seq"])]
        self.seq = max([last_seq, *(row["tell_seq"] for row in rows)]) + 1


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
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) wherever two nested mappings differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        here, before, after = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differences(before, after, f"{here}.")
        elif json.dumps(before) != json.dumps(after):  # 1 and 1.0 are different freeze depths
            found[here] = (before, after)
    return found


def _take_lease(folder: Path, who: Mapping[str, Any]) -> Lease:
    """Hold the folder. Where the holder's driver is dead, its study actor is about to follow: wait for that."""
    try:
        return Lease.take(folder, who)
    except StudyBusy:
        holder = json.loads((folder / "lease.json").read_text(encoding="utf-8") or "{}")
        driver = holder.get("driver")
        if driver is None or holder.get("host") != socket.gethostname() or Path(f"/proc/{driver}").exists():
            raise
        return Lease.take(folder, who, wait_s=DYING_SECONDS)


def _record_job(folder: Path, job: Job, facts: Mapping[str, Any], splits: pa.Table) -> None:
    """Write the resolved job and the splits into a new study; hold them against those that an old one was begun with."""
    path = folder / "job.json"
    record = {"job": job.model_dump(mode="json", exclude={"results"}), "facts": dict(facts)}
    if path.exists() and committed_parts(folder, results.RECORD):
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = differences(old["job"], record["job"])
        refused = {key: pair for key, pair in changed.items() if key not in MAY_GROW or pair[1] < pair[0]}
        refused |= differences(
            {key: old["facts"].get(key) for key in results.FIXED_FACTS},
            {key: facts.get(key) for key in results.FIXED_FACTS},
        )
        if refused:
            lines = [f"  {key}: was {was!r}, now {now!r}" for key, (was, now) in refused.items()]
            raise StudyMismatchError(
                f"{folder} holds a study of another job. What differs:\n"
                + "\n".join(lines)
                + "\nGive this job another "
                "name (name=NEW), or set these keys back to continue the study; only search.trials may grow."
            )
        if not changed:
            return
    results.write_splits(folder, splits)
    write_file(path, (json.dumps(record, indent=2) + "\n").encode())


def _epoch_row(trial_id: str, record: EpochRecord, seq: int, stop: bool) -> dict[str, Any]:
    return {
        "trial_id": trial_id,
        "epoch": record.epoch,
        "phase": 0,
        "seq": seq,
        "train_loss": record.train_loss,
        "val_loss": record.val["nll"],
        "val_score": record.val_score,
        **{f"val_{name}": value for name, value in record.val.items() if name != "nll"},
        "lr": record.lr,
        "head_lr": record.head_lr,
        "seconds": record.seconds,
        "images": record.images,
        "decision": "stop" if stop else "continue",
    }


def _no_rows() -> dict[str, list[dict[str, Any]]]:
    return {name: [] for name in results.TABLES}
