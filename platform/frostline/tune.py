"""A study on Ray: Tune places trials and reuses their actors; the study itself is one actor beside the driver.

Tune sees only the start and the end of a trial. Epochs go from the worker straight to the study, which answers whether
to go on, so that Tune's result loop, loggers and schedulers have no part in it.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry; read when ray is imported
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
if (Path.home() / ".ray" / "auth_token").exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # verbose=0 is silent in the old one only

import ray
from ray import tune
from ray.exceptions import AuthenticationError, RayTaskError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from frostline.estimate import facts_of
from frostline.extract import Shard, Supply, Survey, extract, survey
from frostline.features import Feed
from frostline.pack import Finish, Report, run_pack
from frostline.prepare import prepare
from frostline.probes import Probe, probe
from frostline.spec import Job, TrialSpec
from frostline.study import Snapshot, Study
from frostline.train import EpochRecord
from frostline.trial import Outcome
from frostline.world import World, gpus_of_a_trial, trials_at_once

Work = Survey | Shard | Probe | list[TrialSpec]
"""What a Tune trial does; a list is a pack."""

POLL_SECONDS = 0.5
TRIES = 2  # of one piece of work before the trials whose worker dies
QUIET_LOGGERS = (
    "ray.tune",  # warns of result files that it was told not to write
    "ray._private.authentication.authentication_token_setup",  # says at each start that token authentication is on
)


class PlacementError(ValueError):
    """Trials that no node of the cluster can hold."""


class ClusterError(ConnectionError):
    """A Ray cluster that cannot be reached."""


class PreparationError(RuntimeError):
    """Work that trials wait for, and on which workers die."""


class StudyActor:
    """The study's one owner on a cluster."""

    def open(self, job: Job, facts: Mapping[str, Any], splits: pa.Table, who: Mapping[str, Any]) -> Snapshot:
        """Begin, or go on with what is in the folder."""
        self.study = Study(job, facts, splits, who={**who, "pid": os.getpid()})
        self.assigned: dict[str, Work] = {}  # by Tune trial, whose worker may still be starting
        self.packs: dict[str, list[TrialSpec]] = {}  # that Tune trials run
        return self.study.snapshot()

    def ask(self, share: int) -> tuple[Work | None, bool]:
        """The next piece of work, if one can start now, and whether the study is done."""
        self.share = share
        work = self.study.survey(share) or self.study.probe() or self.study.ask(share)
        return work or None, self.study.done

    def assign(self, tune_id: str, work: Work) -> None:
        """Have the work of a Tune trial ready: Tune would keep several copies of it to the end."""
        self.assigned[tune_id] = work

    def take(self, tune_id: str) -> Work:
        """The work of a Tune trial, whose worker has started."""
        work = self.assigned.pop(tune_id)
        if isinstance(work, list):
            self.packs[tune_id] = work
        return work

    def more(self, tune_id: str) -> list[TrialSpec]:
        """Another pack for a Tune trial that has run its own, as long as workers are starting: Tune would give the worker of
        a trial that ends to one whose own is starting, and stop that, so that short packs would never have more than one."""
        del self.packs[tune_id]
        if self.assigned and self.study.searching and (specs := self.study.ask(self.share)):
            self.packs[tune_id] = specs
        return self.packs.get(tune_id, [])

    def report(self, records: Mapping[str, EpochRecord]) -> dict[str, bool]:
        return self.study.report(records)

    def finish(self, outcomes: Mapping[str, Outcome]) -> None:
        self.study.finish(outcomes)

    def hold(self, root: str, keys: Collection[str]) -> None:
        self.study.hold(root, keys)

    def supplied(self, supply: Supply) -> None:
        self.study.supplied(supply)

    def probed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.study.probed(rows)

    def extracted(self, row: Mapping[str, Any]) -> None:
        self.study.extracted(row)

    def lose(self, tune_id: str, reason: str) -> None:
        """Take back what a Tune trial whose worker is gone was running or about to run."""
        work = self.assigned.pop(tune_id, None) or self.packs.pop(tune_id, [])
        if isinstance(work, list):
            self.study.lose([spec.trial_id for spec in work], reason)

    def snapshot(self) -> Snapshot:
        return self.study.snapshot()

    def close(self) -> Snapshot:
        self.study.close()
        return self.study.snapshot()


class StudySearcher(Searcher):
    """What Tune asks for work, each piece of which is a Tune trial: packs, and what they need in the store before that."""

    def __init__(self, study: Any, share: int) -> None:
        super().__init__()
        self.study, self.share = study, share
        self.before: list[Survey | Shard | Probe] = []  # without which nothing else can start
        self.running: dict[str, Work] = {}
        self.tries: Counter[int] = Counter()
        self.problem: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        if self.problem:
            return Searcher.FINISHED
        if self.before:
            work = self.before.pop()
        elif any(not isinstance(work, list) for work in self.running.values()):
            return None
        else:
            work, done = ray.get(self.study.ask.remote(self.share))
            if work is None:
                return Searcher.FINISHED if done else None
        self.running[trial_id] = work
        ray.get(self.study.assign.remote(trial_id, work))
        return {"work": trial_id}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        work, reason = self.running.pop(trial_id), "the worker ended before its result was recorded"
        if error:
            ray.get(self.study.lose.remote(trial_id, reason))
        if isinstance(work, list):
            return
        if error:
            self.tries[id(work)] += 1
            if self.tries[id(work)] < TRIES:
                self.before.append(work)
            else:
                what = "fitting heads in closed form" if isinstance(work, Probe) else "extracting activations"
                self.problem = PreparationError(f"{what} failed {TRIES} times: {reason}")
        else:
            assert result is not None
            self.problem = self.problem or result["problem"]
            self.before += result["shards"]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's rows are the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a study is restored from its rows")


class TrialActor(tune.Trainable):
    """One process that runs pack after pack, and keeps between them what the next one may need."""

    def setup(self, config: dict[str, Any], study: Any = None) -> None:
        self.study = study
        self.feed = Feed()
        self.work = config["work"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.work = new_config["work"]
        return True

    def step(self) -> dict[str, Any]:
        """Do a piece of work; answers what is to be extracted, if that was the question, and what went wrong with it."""
        shards: list[Shard] = []
        problem: Exception | None = None
        work: Work = ray.get(self.study.take.remote(self.work))
        if isinstance(work, list):
            pack: list[TrialSpec] = work
            while pack:
                self.run(
                    pack,
                    lambda records: ray.get(self.study.report.remote(records)),
                    lambda outcomes: ray.get(self.study.finish.remote(outcomes)),
                )
                pack = ray.get(self.study.more.remote(self.work))
        else:
            world = World.here(work.resources)
            try:
                if isinstance(work, Survey):
                    supply = survey(work, world, lambda root, keys: ray.get(self.study.hold.remote(root, keys)))
                    ray.get(self.study.supplied.remote(supply))
                    shards += supply.shards
                elif isinstance(work, Probe):
                    ray.get(self.study.probed.remote(probe(work, self.feed, world)))
                else:
                    ray.get(self.study.extracted.remote(extract(work, self.feed, world)))
            except ValueError as error:
                problem = getattr(error, "cause", error)  # around what the study raised, Ray puts its traceback
        return {"done": True, "shards": shards, "problem": problem}

    def run(self, specs: Sequence[TrialSpec], report: Report, finish: Finish) -> None:
        """The trials themselves."""
        run_pack(specs, feed=self.feed, world=World.here(specs[0].resources), report=report, finish=finish)


def run_tune(
    job: Job,
    facts: Mapping[str, Any] | None,
    splits: pa.Table,
    *,
    who: Mapping[str, Any],
    show: Callable[[Snapshot], None],
    address: str | None = None,
    trainable: type[TrialActor] = TrialActor,
) -> Snapshot:
    """Run the study on the cluster at `address`, or on a local one that is started and stopped here.

    Without `facts`, which say what the stages cost, a worker finds them on the hardware that trials get. `trainable` is what
    runs the trials; benchmarks and fault tests give one that does no work.
    Raises PlacementError before anything starts where no node can hold a trial.
    """
    with _cluster(address):
        gpus = gpus_of_a_trial(job.resources, ray.cluster_resources().get("GPU", 0))
        if job.resources.device == "cuda" and not gpus:
            raise PlacementError("resources.device = 'cuda', and no node has a GPU to give; use 'auto' or 'cpu'")
        slots = concurrency(job.resources.cpus, gpus, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        study: Any = ray.remote(num_cpus=0)(StudyActor).options(scheduling_strategy=here).remote()
        try:
            if facts is None:
                found = ray.remote(num_cpus=job.resources.cpus, num_gpus=gpus)(_facts)
                facts = ray.get(found.remote(job))
            show(ray.get(study.open.remote(job, facts, splits, dict(who))))
        except RayTaskError as error:
            raise error.cause from None
        searcher = StudySearcher(study, slots)
        try:
            with _watching(study, show), tempfile.TemporaryDirectory(prefix="frostline-tune-") as scratch:
                tune.Tuner(
                    tune.with_resources(
                        tune.with_parameters(trainable, study=study), {"cpu": job.resources.cpus, "gpu": gpus}
                    ),
                    tune_config=tune.TuneConfig(
                        search_alg=searcher,
                        num_samples=-1,
                        max_concurrent_trials=slots,
                        reuse_actors=True,
                        trial_name_creator=_short_name,
                        trial_dirname_creator=_short_name,
                    ),
                    run_config=tune.RunConfig(
                        name=job.name,
                        storage_path=scratch,
                        verbose=0,
                        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    ),
                ).fit()
        finally:
            last: Any = ray.get(study.close.remote())
        show(last)
        if searcher.problem:
            raise searcher.problem
        return last


def _facts(job: Job) -> dict[str, Any]:
    return facts_of(prepare(job))


def concurrency(cpus: float, gpus: float, nodes: list[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once. Raises PlacementError if none."""
    slots = sum(trials_at_once(cpus, gpus, node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    if slots == 0:
        largest = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise PlacementError(
            f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs on one node (resources.cpus, resources.gpus), "
            f"and no node has that; the nodes have: {largest}"
        )
    return slots


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connected to Ray: to a cluster that is there, which is sent this very code, or to one of our own."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    on_terminate = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        ray.init("local", include_dashboard=False, **options)
    else:
        try:
            ray.init(address, runtime_env={"py_modules": [str(Path(__file__).parent)]}, **options)
        except (ConnectionError, AuthenticationError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}. If there is one, it may want a "
                "token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where its token is not in ~/.ray/auth_token"
            ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler aborts the process
    try:
        yield
    finally:
        ray.shutdown()


def _short_name(trial: Any) -> str:
    """Tune's default holds the whole spec."""
    return trial.trial_id


@contextmanager
def _watching(study: Any, show: Callable[[Snapshot], None]) -> Iterator[None]:
    """Show snapshots from a thread while Tune has the main one; this also makes the study commit what is due."""
    stop = threading.Event()
    failed: list[Exception] = []

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            try:
                show(ray.get(study.snapshot.remote()))
                failed.clear()
            except Exception as error:  # noqa: BLE001 (a commit that failed is tried again at the next look)
                failed[:] = [error]

    thread = threading.Thread(target=watch, name="frostline-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
