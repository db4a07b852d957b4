"""One trial on several workers, by Ray Train: each runs `run_trial` alike, with a share of every batch.

A worker that dies takes the others with it; all of them start again and go on from the last checkpoint. Epochs, checkpoints
and the outcome go from the first worker straight to the study.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

# a worker that does not answer is gone; Ray itself waits for 600 s
os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "30")

import ray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from frostline.checkpoint import Keep
from frostline.collectives import agreed
from frostline.failures import AGAIN, again, kind_of
from frostline.features import Feed
from frostline.machine import interface_settings
from frostline.outcome import EpochRecord
from frostline.trial import failed, run_trial
from frostline.trialspec import TrialSpec
from frostline.world import World, gpus_of_a_trial


class _Backend(TorchConfig().backend_cls):
    """PyTorch's process group, on interfaces where workers find each other."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


class _Group(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _choose_interface() -> None:
    os.environ.update(interface_settings(ray.util.get_node_ip_address()))


def train_together(
    spec: TrialSpec, study: Any, keep: Callable[[Any, TrialSpec], Keep], have: Callable[[], None]
) -> None:
    """Train one trial on its workers, which Ray places wherever there is room, and start again when some are lost. `keep` says how
    a study keeps a trial, `have` has on a node what it loads from.
    """
    kind, reason, losses = "worker_lost", "", 0
    while losses == 0 or again(kind, losses, restarts=spec.scaling.restarts, kept=True, begun=True):
        with tempfile.TemporaryDirectory(prefix="frostline-train-") as scratch:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"spec": spec, "study": study, "keep": keep, "have": have},
                scaling_config=_scaling(spec),
                run_config=train.RunConfig(name=f"{spec.trial_id}-{losses}", storage_path=scratch),
                torch_config=_Group(timeout_s=int(spec.scaling.timeout_s)),
            )
            try:
                trainer.fit()
            except TrainingFailedError as error:
                kind, reason = _ended(error)
        if not ray.get(study.runs.remote(spec.trial_id)):
            return
        losses += 1
    ray.get(study.give_up.remote(spec.trial_id, kind, reason))


def _ended(error: TrainingFailedError) -> tuple[str, str]:
    """What ended the workers: the kind, and the end of the first one's complaint. What says nothing of itself, as when a
    connection breaks, comes of a worker that is gone."""
    complaints = [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else [error]
    causes = [error, *(getattr(each, "controller_failure", each) for each in complaints)]
    kinds = [kind for cause in causes if (kind := kind_of(cause)) in AGAIN]
    lines = [line.strip() for line in str(complaints[0]).splitlines() if line.strip()]
    said = lines[-1] if lines else type(complaints[0]).__name__
    return next(iter(kinds), "worker_lost"), f"a worker ended: {said}"[:500]


def _scaling(spec: TrialSpec) -> train.ScalingConfig:
    scaling, resources = spec.scaling, spec.resources
    gpus = gpus_of_a_trial(resources, ray.cluster_resources().get("GPU", 0))
    fewest = scaling.min_workers or scaling.workers
    return train.ScalingConfig(
        num_workers=scaling.workers if fewest == scaling.workers else (fewest, scaling.workers),
        use_gpu=gpus > 0,
        resources_per_worker={"CPU": resources.cpus, **({"GPU": gpus} if gpus else {})},
    )


def _work(config: dict[str, Any]) -> None:
    """What each worker does. What goes wrong with the trial is told to the study, and then ends all workers."""
    spec, study = config["spec"], config["study"]
    if not ray.get(study.runs.remote(spec.trial_id)):
        return
    context = train.get_context()
    world = World.here(
        spec.resources,
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        sharded=spec.scaling.mode == "fsdp",
    )
    row: dict[str, Any] = {}
    records: list[EpochRecord] = []

    def report(record: EpochRecord) -> bool:
        records.append(record)
        return agreed(world, lambda: ray.get(study.report.remote({spec.trial_id: record}))[spec.trial_id])

    try:
        config["have"]()
        outcome = run_trial(spec, feed=Feed(), world=world, report=report, keep=config["keep"](study, spec), row=row)
    except Exception as error:
        if kind_of(error) not in (*AGAIN, "internal"):  # those may be another worker's end, as this one sees it
            ray.get(study.finish.remote({spec.trial_id: failed(spec, row, records, error, 0.0)}))
        raise
    if world.rank == 0:
        ray.get(study.finish.remote({spec.trial_id: outcome}))
