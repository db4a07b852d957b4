"""A study on Ray: Tune places workers and replaces those that die; the study itself is one actor beside the driver.

To Tune a worker is one trial from the study's beginning to its end. It asks the study for work, a pack of trials as a rule,
and epochs go straight to the study, which answers whether to go on: Tune's result loop, loggers and schedulers have no part
in it. Workers and study start at the same time, and a worker that is ready before the others begins.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pyarrow as pa

from frostline.connection import cluster  # isort: skip (it says what Ray's environment is, which Ray reads when it is imported)

import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from frostline.estimate import facts_of
from frostline.owner import StudyActor
from frostline.prepare import prepare
from frostline.snapshot import Snapshot
from frostline.spec import Job
from frostline.staging import Parcel
from frostline.worker import Worker, bring_from
from frostline.world import gpus_of_a_trial, trials_at_once

POLL_SECONDS = 0.5
ROOM_SECONDS = 2.0
"""Between two looks at what the nodes have."""


class PlacementError(ValueError):
    """Trials that no node of the cluster can hold."""


class StudySearcher(Searcher):
    """What Tune asks for trials, each of which is a worker: as many as run at once, and others for those that die."""

    def __init__(self, study: Any, opening: Any, workers: int) -> None:
        super().__init__()
        self.study, self.opening, self.workers = study, opening, workers
        self.running: set[str] = set()
        self.ended = 0
        self.problem: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        """Workers start while the study opens; raises what it finds wrong."""
        if self.opening and ray.wait([self.opening], timeout=0)[0]:
            opening, self.opening = self.opening, None
            ray.get(opening)
        if len(self.running) == self.workers:
            return None
        if self.ended:
            done, self.problem = ray.get(self.study.standing.remote())
            if done:
                return Searcher.FINISHED
        self.running.add(trial_id)
        return {"worker": trial_id}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.running.remove(trial_id)
        self.ended += 1
        if error:
            ray.get(self.study.lose.remote(trial_id, "the worker ended before its result was recorded"))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's rows are the truth."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a study is restored from its rows")


class Room(tune.Callback):
    """Ends a search on a cluster that has lost all room for its trials, and for so many seconds has not got it back."""

    def __init__(self, job: Job, gpus: float) -> None:
        self.job, self.gpus = job, gpus
        self.looked = self.seen = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Look, every other second, whether there is room. Raises PlacementError."""
        if (now := time.monotonic()) - self.looked < ROOM_SECONDS:
            return
        self.looked = now
        try:
            concurrency(self.job, self.gpus, resources_of_nodes())
        except PlacementError as error:
            if now - self.seen > self.job.scaling.timeout_s:
                raise PlacementError(
                    f"{error}. So it has been for {now - self.seen:.0f} s (scaling.timeout_s); what is committed stays, and the "
                    "same search goes on once there are nodes again"
                ) from None
        else:
            self.seen = now


def run_tune(
    job: Job,
    facts: Mapping[str, Any] | None,
    splits: pa.Table,
    *,
    who: Mapping[str, Any],
    show: Callable[[Snapshot], None],
    address: str | None = None,
    connected: Callable[[], bool] | None = None,
    allow_open: bool = False,
    parcels: Sequence[Parcel] = (),
    trainable: type[Worker] = Worker,
) -> Snapshot:
    """Run the study on the cluster at `address`, or on a local one that is started and stopped here; or (`connected`) on one
    that is being connected to.

    Without `facts`, which say what the stages cost, a worker finds them on the hardware that trials get; that a cluster was open,
    which `allow_open` lets it be, is one of them. `parcels` are brought to the nodes that lack them. `trainable` is what runs the
    trials; benchmarks and fault tests give one that does no work.
    Raises PlacementError before anything starts where no node can hold a trial, and later where none can any more (`Room`).
    """
    with nullcontext(connected) if connected else cluster(address, allow_open=allow_open) as wait:
        is_open = wait()
        gpus = gpus_of_a_trial(job.resources, ray.cluster_resources().get("GPU", 0))
        if job.resources.device == "cuda" and not gpus:
            raise PlacementError("resources.device = 'cuda', and no node has a GPU to give; use 'auto' or 'cpu'")
        slots = concurrency(job, gpus, resources_of_nodes())
        here = ray.get_runtime_context().get_node_id()
        beside = NodeAffinitySchedulingStrategy(here, soft=False)
        study: Any = ray.remote(num_cpus=0)(StudyActor).options(scheduling_strategy=beside).remote()
        have = partial(bring_from, here, list(parcels))
        if facts is None:
            found = ray.remote(num_cpus=job.resources.cpus, num_gpus=gpus)(_facts)
            try:
                facts = ray.get(found.remote(job, have))
            except RayTaskError as error:
                raise error.cause from None
        if is_open:
            facts = {**facts, "open_cluster": True}
        opening = study.open.remote(job, facts, splits, dict(who), slots)
        workers = min(slots, max(job.search.trials, job.confirm.seeds))
        own: dict[str, float] = {"cpu": job.resources.cpus, "gpu": gpus}
        if job.scaling.workers > 1:  # a worker that starts others takes nothing from them, and stays beside the driver
            own = {f"node:{ray.util.get_node_ip_address()}": 0.001}
        searcher = StudySearcher(study, opening, workers)
        # else each worker waits until the one before has started
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers + 1)
        try:
            with _watching(study, show), tempfile.TemporaryDirectory(prefix="frostline-tune-") as scratch:
                tune.Tuner(
                    tune.with_resources(tune.with_parameters(trainable, study=study, have=have), own),
                    tune_config=tune.TuneConfig(
                        search_alg=searcher,
                        num_samples=-1,
                        trial_name_creator=_short_name,
                        trial_dirname_creator=_short_name,
                    ),
                    run_config=tune.RunConfig(
                        name=job.name,
                        storage_path=scratch,
                        verbose=0,
                        callbacks=[Room(job, gpus)],
                        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    ),
                ).fit()
        except RayTaskError as error:
            raise error.cause from None
        finally:
            last: Any = ray.get(study.close.remote())
        show(last)
        if searcher.problem:
            raise searcher.problem
        return last


def _facts(job: Job, have: Callable[[], None]) -> dict[str, Any]:
    have()
    return facts_of(prepare(job))


def resources_of_nodes() -> list[Mapping[str, float]]:
    """What each node that is there has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def concurrency(job: Job, gpus: float, nodes: list[Mapping[str, float]]) -> int:
    """How many trials the nodes hold at once, all of their workers together. Raises PlacementError if none."""
    cpus, scaling = job.resources.cpus, job.scaling
    places = sum(trials_at_once(cpus, gpus, node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    if (needed := scaling.min_workers or scaling.workers) > places:
        largest = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        each = "a trial needs" if scaling.workers == 1 else f"a trial has {needed} workers (scaling.workers), each with"
        held = "no node has that" if not places else f"there is room for {places}"
        raise PlacementError(
            f"{each} {cpus:g} CPUs and {gpus:g} GPUs on one node (resources.cpus, resources.gpus), "
            f"and {held}; the nodes have: {largest}"
        )
    return max(1, places // scaling.workers)


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
