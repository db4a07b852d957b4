"""A study: what to run next, what to stop, and the rows. It has one owner and knows neither Ray nor Optuna.

`survey` and `probe` say what has to be done before the next trial, `ask` answers it, `report` hears an epoch and answers
whether to go on, `finish` takes a trial's outcome.
Rows go into a ledger. Opening a study again rebuilds it from what was committed: a trial that was
asked for and has no row runs again, whole; with the same configuration if its ask was committed, which asks are with the
next trial that ends.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import pyarrow as pa

from frostline import results
from frostline.budget import Budget
from frostline.claim import record_job, take_lease
from frostline.commit import clean, publish_folder
from frostline.costs import alone_seconds, times_of
from frostline.depths import cut_of, end_of
from frostline.failures import again, past_hope, stop_text, stops
from frostline.files import locate
from frostline.finalists import Finished, best_of, best_probe, choose_finalists, fixed, remember
from frostline.keeping import drop_checkpoint, keep_checkpoint, kept_trials, read_checkpoint
from frostline.ledger import Ledger
from frostline.outcome import EpochRecord, Outcome, epoch_row, lost
from frostline.packing import take_pack
from frostline.propose import Proposer, ask_row, batch, precisions, recalled
from frostline.seeds import Seeds
from frostline.snapshot import Snapshot, Training
from frostline.spec import Job, Mode, Round
from frostline.store import Store
from frostline.strategies import judged_epoch, run_cuts
from frostline.trialspec import Config, TrialSpec, configure, confirm_seeds, search_seeds, trial_of
from frostline.work import Probe, Supply, Survey


@dataclass
class Running:
    """A trial that was asked for and has not finished."""

    spec: TrialSpec
    finalist_of: str | None = None
    ask_seq: int | None = None
    pack: str | None = None
    lanes: int = 0
    records: list[EpochRecord] = field(default_factory=list)
    epoch_rows: list[dict[str, Any]] = field(default_factory=list)
    losses: int = 0  # of its workers


class Study:
    """One search in one folder. Raises StudyBusy, StudyMismatchError or SpaceError when it cannot be opened."""

    def __init__(self, job: Job, facts: Mapping[str, Any], splits: pa.Table, *, who: Mapping[str, Any]) -> None:
        self.job, self.folder = job, job.folder
        self.mode: Mode = job.objective.mode or "max"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lease = take_lease(self.folder, who)
        try:
            clean(self.folder)
            self.share = job.search.trials // len(job.arms)
            self.stages = len(facts["stages"])
            self.proposers = {name: Proposer(job, name, self.stages, self.share) for name in job.arms}
            shares = {name: min(self.share, each.points or self.share) for name, each in self.proposers.items()}
            self.budget = Budget(job.search, shares)
            facts = record_job(self.folder, job, facts, splits)
            self.cached_cuts = frozenset(facts.get("cached_cuts", ()))
            self.probed_cuts = tuple(facts.get("probed_cuts", ()))
            self.times = times_of(facts["stage_times"]) if facts.get("stage_times") else None
            self.finished: list[Finished] = []
            self.running: dict[str, Running] = {}
            self.waiting: list[Running] = []
            self.surveyed: set[str] = set()
            self.to_extract = self.extracted_images = 0
            self.held = ExitStack()
            self.ledger = Ledger(self.folder)
            beside = job.scaling.checkpoints
            self.checkpoints = locate(beside) / job.name if beside else locate(str(self.folder / "checkpoints"))
            self.with_checkpoint = kept_trials(self.checkpoints)  # to go on from
            self.trouble: str | None = None
            self.stopped: str | None = None  # before its end, and why
            self.seq, self.opened = 0, time.monotonic()
            self._restore()
            self.before = len(self.finished)
            self.promising = any(trial.round == "search" and not trial.failure for trial in self.finished)
        except BaseException:
            self.lease.release()
            raise

    # --- the conversation with an executor ---

    def ask(self, share: int = 1) -> list[TrialSpec]:
        """The next pack to run, where `share` packs can run at once; nothing where none can start now (see `done`).

        Trials are proposed in batches; of those that wait, strong defaults go first, then the ones that train least.
        """
        free = max(1, share - len({running.pack for running in self.running.values()}))
        if not self.waiting:
            self.waiting = self._next_search(free) or self._next_confirms()
        if not self.waiting:
            return []
        first, *others = self.waiting
        beside = [] if first.losses else [each.spec for each in others if not each.losses]
        specs = take_pack([first.spec, *beside], self.stages, self.job.search.lanes, free)
        taken = {spec.trial_id for spec in specs}
        for running in self.waiting:
            if running.spec.trial_id in taken:
                running.pack, running.lanes = specs[0].trial_id, len(specs)
                self.running[running.spec.trial_id] = running
        self.waiting = [each for each in self.waiting if each.spec.trial_id not in taken]
        return specs

    def survey(self, share: int = 1) -> Survey | None:
        """What has to be asked of the feature store before `ask`: before the search, about all that its trials may read;
        before confirmations, about all of them. None where nothing is stored, or the question has been put."""
        if not (self.cached_cuts or self.probed_cuts):
            return None
        if self.searching and "search" not in self.surveyed:
            self.surveyed.add("search")
            return Survey(tuple(self._sketches()), tuple(sorted(self.cached_cuts)), self.probed_cuts, share)
        if not self.searching and not self.waiting and "confirm" not in self.surveyed:
            self.waiting = self._next_confirms()
            if self.waiting:
                self.surveyed.add("confirm")
                return Survey(tuple(running.spec for running in self.waiting), None, (), share)
        return None

    def probe(self) -> Probe | None:
        """What heads in closed form are to be fitted to before the first trial of the search; None where that was done.
        The store must have been supplied."""
        if not self.searching or not self.probed_cuts or self.probes:
            return None
        return Probe(next(self._sketches()), self.probed_cuts)

    def _sketches(self) -> Iterator[TrialSpec]:
        """What the trials of the search have in common, once for each precision that an arm may draw: activations differ
        between these."""
        job, (arm, *_) = self.job, self.job.arms
        seed, seeds = search_seeds(job, arm, 0)
        for precision in precisions(job):
            train = job.train.model_copy(update={"precision": precision})
            config = Config(freeze=job.freeze, head=job.head, train=train)
            yield self._spec("sketch", arm, 0, "search", seed, seeds, config)

    def report(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        """Hear an epoch of running trials; for each, whether it should go on. All are heard before any is judged, and none is
        before its `judged_epoch`. What was heard before, from a trial that has gone back to its checkpoint, changes nothing."""
        answers = dict.fromkeys(records, True)
        records = {
            trial_id: record
            for trial_id, record in records.items()
            if record.epoch > len(self.running[trial_id].records)
        }
        by_arm: dict[str, dict[int, tuple[int, float]]] = {}
        for trial_id, record in records.items():
            spec = self.running[trial_id].spec
            if spec.round == "search" and (epoch := judged_epoch(spec.config, record.epoch)):
                by_arm.setdefault(spec.arm, {})[spec.number] = epoch, record.val_score
        ends = {
            (arm, number): stop
            for arm, heard in by_arm.items()
            for number, stop in self.proposers[arm].report(heard).items()
        }
        heard_seq = self.seq
        for trial_id, record in records.items():
            running = self.running[trial_id]
            stop = running.spec.round == "search" and ends.get((running.spec.arm, running.spec.number), False)
            running.records.append(record)
            running.epoch_rows.append(epoch_row(trial_id, record, self._next_seq(), heard_seq, stop))
            answers[trial_id] = not stop
        return answers

    def keep(self, trial_id: str, checkpoint: bytes) -> None:
        """Keep the state of a running trial, in the place of an earlier one; what goes wrong is told in the next snapshot."""
        if trial_id in self.running:
            if not (trouble := keep_checkpoint(self.checkpoints, trial_id, checkpoint)):
                self.with_checkpoint.add(trial_id)
            self.trouble = trouble or self.trouble

    def kept(self, trial_id: str) -> bytes | None:
        """What a trial goes on from, which was interrupted in this or an earlier run of the study."""
        return read_checkpoint(self.checkpoints, trial_id) if trial_id in self.with_checkpoint else None

    def hold(self, root: str, keys: Collection[str]) -> None:
        """Keep what the trials read from being deleted for as long as the study is open."""
        self.held.enter_context(Store(root).hold(keys))

    def supplied(self, supply: Supply) -> None:
        """Take the answer to a survey."""
        self.to_extract += sum(len(shard.samples) for shard in supply.shards)

    def extracted(self, row: Mapping[str, Any]) -> None:
        """Take the row of an extraction; it is committed with the next trial that ends."""
        self.ledger.add("extractions", [row])
        self.extracted_images += row["images"]

    def probed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take what heads in closed form reached, committed likewise; arms that search depths, or how a head begins, start with
        the best one."""
        self.ledger.add("probes", rows)
        self._learn(rows)

    def _learn(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.probes = list(rows)
        if best := best_probe(rows, self.mode):
            for proposer in self.proposers.values():
                proposer.begin_at(best["cut"])

    def finish(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take the outcomes of trials. Raises KeyError for a trial that is not running."""
        for trial_id, outcome in outcomes.items():
            kind = outcome.row.get("error_kind")
            if kind and stops(kind):  # it gets no row, and is run again
                self.waiting.insert(0, self.running.pop(trial_id))
                self._stop(kind, outcome.row["reason"])
            else:
                self._finish(trial_id, outcome)
        self._give_up()
        self.ledger.commit_if_due()

    def _finish(self, trial_id: str, outcome: Outcome) -> None:
        running = self.running[trial_id]
        row = outcome.row | {
            "finalist_of": running.finalist_of,
            "ask_seq": running.ask_seq,
            "tell_seq": self._next_seq(),
            "pack": running.pack,
            "lanes": running.lanes,
            "alone_s": self._alone_s(running.spec.config, outcome.row),
        }
        done = remember(row)
        if outcome.bundle and best_of([*self._confirmed(), done], self.mode) == done:
            publish_folder(self.folder / "bundle", outcome.bundle)
        if running.spec.round == "search":
            self.promising |= done.failure is None
            self.budget.charge(row)
            self.proposers[row["arm"]].tell(row["number"], row["status"], row.get("val_score"))
        self.ledger.add("trials", [row])
        self.ledger.add("epochs", running.epoch_rows)
        self.ledger.add("predictions", outcome.predictions)
        if trial_id in self.with_checkpoint:
            drop_checkpoint(self.checkpoints, trial_id)
            self.with_checkpoint.remove(trial_id)
        del self.running[trial_id]
        self.finished.append(done)

    def _give_up(self) -> None:
        """End the search once all that it has tried since it was opened has failed alike, and nothing before has not."""
        if self.stopped or self.promising:
            return
        ended = [trial for trial in self.finished[self.before :] if trial.round == "search"]
        tried = [
            (each.arm, self.proposers[each.arm].values(each.number), why) for each in ended if (why := each.failure)
        ]
        waiting = {running.spec.arm for running in self.waiting}
        left = [name for name, each in self.proposers.items() if name in waiting or self.budget.left(name, each.asked)]
        if left and past_hope(tried, {name: self.proposers[name].sizes for name in left}):
            self._stop(*tried[-1][2], failed=len(tried))

    def _stop(self, kind: str, reason: str, failed: int = 0) -> None:
        left = self.total - sum(trial.round == "search" for trial in self.finished)
        self.stopped = self.stopped or stop_text(kind, reason, failed, left)

    def lose(self, trial_ids: Sequence[str], reason: str) -> None:
        """End trials whose worker is gone, unless they had finished. Those that are tried `again` are tried alone: of a pack, the
        lane that takes its process with it may be any."""
        back = []
        for running in [self.running[trial_id] for trial_id in trial_ids if trial_id in self.running]:
            trial_id, losses = running.spec.trial_id, running.losses + 1
            kept, begun = trial_id in self.with_checkpoint, bool(running.records)
            if again("worker_lost", losses, restarts=self.job.scaling.restarts, kept=kept, begun=begun):
                del self.running[trial_id]
                back.append(replace(running, losses=losses))
            else:
                self.finish({trial_id: lost(running.spec, running.records, "worker_lost", reason)})
        self.waiting = [*back, *self.waiting]

    @property
    def total(self) -> int:
        """Trials of the search, as far as can be told: a finite space may have fewer points than its arm's share, and a limit
        of steps or seconds may be reached before."""
        return sum(proposer.asked for proposer in self.proposers.values()) + self._search_left()

    @property
    def searching(self) -> bool:
        """Whether trials of the search are left to start."""
        return self._search_left() > 0 or any(running.spec.round == "search" for running in self.waiting)

    @property
    def done(self) -> bool:
        """Whether every trial and confirmation has finished, or the search was stopped."""
        busy = self.running or self.waiting or self._search_left() or self._to_confirm()
        return self.stopped is not None or not busy

    def snapshot(self) -> Snapshot:
        """Where the study stands; commits what is due."""
        self.ledger.commit_if_due()
        search = [trial for trial in self.finished if trial.round == "search"]
        confirmed = self._confirmed()
        to_confirm = len(self._confirmations())
        if len(search) < self.total:
            to_confirm = self.job.confirm.seeds * (1 if self.job.confirm.finalists == "best" else len(self.job.arms))
        statuses = Counter(trial.status for trial in self.finished)
        return Snapshot(
            done=len(search),
            running=len(self.running),
            total=self.total,
            pruned=statuses["pruned"],
            failed=statuses["failed"],
            confirmed=len(confirmed),
            confirmed_complete=sum(trial.status == "complete" for trial in confirmed),
            to_confirm=to_confirm,
            best=best_of(search, self.mode),
            extracted=self.extracted_images,
            to_extract=self.to_extract,
            elapsed_s=time.monotonic() - self.opened,
            left_s=self._seconds_left(to_confirm - len(confirmed)),
            latest=self.finished[-1] if self.finished else None,
            stopped=self.stopped,
            training=() if self.job.search.trials else tuple(_training(each) for each in self.running.values()),
            trouble=self.trouble,
        )

    def close(self) -> None:
        """Commit what is left and let the folder go."""
        try:
            self.ledger.close()
        finally:
            self.held.close()
            self.lease.release()

    # --- what comes next ---

    def _search_left(self) -> int:
        return sum(self.budget.left(name, proposer.asked) for name, proposer in self.proposers.items())

    def _next_search(self, packs: int) -> list[Running]:
        """A batch of proposals, for as many packs at most, of the arm that has proposed least: its strong defaults first, of
        these and of the others those that train least."""
        left = {name: self.budget.left(name, proposer.asked) for name, proposer in self.proposers.items()}
        open_arms = [name for name in left if left[name]]
        if not open_arms:
            return []
        name = min(open_arms, key=lambda name: self.proposers[name].asked)
        proposer, search = self.proposers[name], self.job.search
        first, defaults = proposer.asked, len(proposer.defaults)
        size = batch(proposer.kind, first, first + left[name], search.lanes * packs, search.startup_trials)
        found = self._propose(name, size)
        return sorted(found, key=lambda each: (each.spec.number >= defaults, -cut_of(each.spec.config, self.stages)))

    def _propose(self, name: str, size: int) -> list[Running]:
        """The next trials of an arm, from one fit."""
        first, found = self.proposers[name].asked, []
        for number, values in enumerate(self.proposers[name].ask(size), first):
            running = Running(self._search_spec(name, number, values), ask_seq=self._next_seq())
            found.append(running)
            row = ask_row(running.ask_seq, running.spec.trial_id, name, number, first, values, datetime.now(UTC))
            self.ledger.add("asks", [row])
        return found

    def _search_spec(self, arm: str, number: int, values: Mapping[str, Any]) -> TrialSpec:
        seed, seeds = search_seeds(self.job, arm, number)
        config = configure(self.job, self.job.arms[arm], values)
        return self._spec(f"{arm}-{number:05d}", arm, number, "search", seed, seeds, config)

    def _next_confirms(self) -> list[Running]:
        """All confirmations that have not begun; those of one seed could train together."""
        confirmations = self._confirmations()
        return [
            Running(
                self._confirm_spec(trial_id, *confirmations[trial_id]), finalist_of=confirmations[trial_id][0].trial_id
            )
            for trial_id in self._to_confirm()
        ]

    def _confirm_spec(self, trial_id: str, finalist: Finished, index: int) -> TrialSpec:
        seed, seeds = confirm_seeds(self.job, index)
        arm = self.job.arms[finalist.arm]
        searched = self.proposers[finalist.arm].values(finalist.number) if self.job.search.trials else {}
        config = configure(self.job, arm, searched)
        return self._spec(trial_id, finalist.arm, finalist.number, "confirm", seed, seeds, config)

    def _spec(
        self, trial_id: str, arm: str, number: int, round_: Round, seed: int, seeds: Seeds, config: Config
    ) -> TrialSpec:
        return trial_of(
            self.job,
            config,
            seeds,
            trial_id=trial_id,
            arm=arm,
            number=number,
            round=round_,
            seed=seed,
            cached=self._is_cached(config),
            start_stored=config.head.init == "probe" and end_of(config.head, self.stages) in self.probed_cuts,
        )

    def _is_cached(self, config: Config) -> bool:
        """Whether what the trial reads is stored: activations at its cut or, where only a head trains, their means over
        positions, which are there for all heads in closed form."""
        cut, end = cut_of(config, self.stages), end_of(config.head, self.stages)
        if cut == end and cut in self.probed_cuts:
            return True
        return cut in self.cached_cuts and (cut < end or end == self.stages)

    def _alone_s(self, config: Config, row: Mapping[str, Any]) -> float | None:
        """What the trial would have taken by itself; null where its cut, its data or the cost of a stage is not known."""
        if self.times is None or row.get("n_val") is None:
            return None
        sizes = (row["n_train"], row["n_val"], row.get("n_test", 0))
        cut, end = row["freeze_depth"], row["head_depth"]
        early = (row["head_init"] == "probe") + (row["norm"] == "recalibrate" and cut < end)
        return alone_seconds(self.times, run_cuts(config, self.stages, row["epochs"]), *sizes, early=early, end=end)

    def _confirmations(self) -> dict[str, tuple[Finished, int]]:
        """Trial id of every confirmation -> its finalist and the number of its seed; none before the search has ended."""
        search = [trial for trial in self.finished if trial.round == "search"]
        if len(search) < self.total:
            return {}
        finalists = choose_finalists(search, self.job.confirm.finalists, self.mode)
        if not self.job.search.trials:
            finalists = [fixed(arm) for arm in self.job.arms]
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
            now = [left_s for each in self.running.values() if (left_s := _training(each).left_s) is not None]
            return max(now, default=None) if not self.job.search.trials and to_confirm == len(self.running) else None
        whole = [trial.seconds for trial in self.finished if trial.status == "complete"]
        left = (self.total - len(search)) * fmean(search) + to_confirm * fmean(whole or search)
        return left / max(1, len(self.running))

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1

    # --- opening a study again ---

    def _restore(self) -> None:
        """Rebuild proposals, pruners and what is finished from the committed rows. Asks that are lost with a damaged part are
        recalled from the trials that they led to; where there is none, the arm asks anew."""
        self._learn(results.read_probes(self.folder).to_pylist())
        rows, asks = (read(self.folder).to_pylist() for read in (results.read_trials, results.read_asks))
        epochs: dict[str, dict[int, float]] = {}
        seqs = [-1, *(ask["seq"] for ask in asks), *(row["tell_seq"] for row in rows)]
        for epoch in results.read_epochs(self.folder).select(["trial_id", "epoch", "val_score", "seq"]).to_pylist():
            epochs.setdefault(epoch["trial_id"], {})[epoch["epoch"]] = epoch["val_score"]
            seqs.append(epoch["seq"])
        self.seq = max(seqs) + 1
        found = recalled(asks, rows, self.proposers)
        self.ledger.add("asks", found)
        by_id = {row["trial_id"]: row for row in rows}
        for ask in sorted([*asks, *found], key=lambda ask: ask["number"]):
            values, row = json.loads(ask["params"]), by_id.get(ask["trial_id"])
            proposer = self.proposers[ask["arm"]]
            if gap := ask["number"] - proposer.asked:
                self.waiting += self._propose(ask["arm"], gap)
            if row is None:
                proposer.restore(values)
                spec = self._search_spec(ask["arm"], ask["number"], values)
                self.waiting.append(Running(spec, ask_seq=ask["seq"]))
            else:
                config = configure(self.job, self.job.arms[ask["arm"]], values)
                known = epochs.get(ask["trial_id"], {})
                heard = {judged: known[epoch] for epoch in known if (judged := judged_epoch(config, epoch))}
                proposer.restore(values, status=row["status"], score=row["val_score"], epochs=heard)
        for row in rows:
            if row["round"] == "search":
                self.budget.charge(row)
        self.finished = [remember(row) for row in sorted(rows, key=lambda row: row["tell_seq"])]


def _training(running: Running) -> Training:
    return Training(running.spec.trial_id, running.spec.config.train.epochs, running.records[-1:])
