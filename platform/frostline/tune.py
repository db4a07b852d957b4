"""A study on Ray: Tune places workers and replaces those that die; the study itself is one actor beside the driver.

To Tune a worker is one trial from the study's beginning to its end. It asks the study for work, a pack of trials as a rule,
and epochs go straight to the study, which answers whether to go on: Tune's result loop, loggers and schedulers have no part
in it. Workers and study start at the same time, and a worker that is ready before the others begins.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from frostline.rayenv import TOKEN_HINT, ClusterError, settings

os.environ.update(settings())
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # verbose=0 is silent in the old one only

import ray
from ray import tune
from ray.exceptions import AuthenticationError, RayTaskError
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
QUIET_LOGGERS = (
    "ray.tune",  # warns of result files that it was told not to write
    "ray._private.authentication.authentication_token_setup",  # says at each start that token authentication is on
)


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


def run_tune(
    job: Job,
    facts: Mapping[str, Any] | None,
    splits: pa.Table,
    *,
    who: Mapping[str, Any],
    show: Callable[[Snapshot], None],
    address: str | None = None,
    connected: Callable[[], None] | None = None,
    parcels: Sequence[Parcel] = (),
    trainable: type[Worker] = Worker,
) -> Snapshot:
    """Run the study on the cluster at `address`, or on a local one that is started and stopped here; or (`connected`) on one
    that is being connected to.

    Without `facts`, which say what the stages cost, a worker finds them on the hardware that trials get. `parcels` are brought to
    the nodes that lack them. `trainable` is what runs the trials; benchmarks and fault tests give one that does no work.
    Raises PlacementError before anything starts where no node can hold a trial.
    """
    with nullcontext(connected) if connected else cluster(address) as wait:
        wait()
        gpus = gpus_of_a_trial(job.resources, ray.cluster_resources().get("GPU", 0))
        if job.resources.device == "cuda" and not gpus:
            raise PlacementError("resources.device = 'cuda', and no node has a GPU to give; use 'auto' or 'cpu'")
        slots = concurrency(job, gpus, [node["Resources"] for node in ray.nodes() if node["Alive"]])
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


@contextmanager
def cluster(address: str | None) -> Iterator[Callable[[], None]]:
    """Connected to Ray, in a thread of its own, as that takes seconds: call what is yielded to wait for it."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1, "frostline-ray") as pool:
        connecting = pool.submit(_connect, address)

        def wait() -> None:
            connecting.result()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler aborts the process

        try:
            yield wait
        finally:
            futures.wait([connecting])
            ray.shutdown()


def _connect(address: str | None) -> None:
    """To a cluster that is there, which is sent this very code, or to one of our own. Raises ClusterError."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        ray.init("local", include_dashboard=False, **options)
    else:
        try:
            ray.init(address, runtime_env=_own_code(), **options)
        except (ConnectionError, AuthenticationError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}. {TOKEN_HINT}"
            ) from error


def _own_code() -> dict[str, Any]:
    """What sends this package to the workers; nothing in a job of the Jobs API that has brought it, which Ray sends on."""
    brought = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    return {} if brought.get("py_modules") else {"py_modules": [str(Path(__file__).parent)]}


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
