"""A worker of a study on Ray: to Tune, one trial from the study's beginning to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from frostline.checkpoint import Keep
from frostline.extract import extract, load, survey
from frostline.features import Feed
from frostline.files import DataError
from frostline.pack import Finish, Report, run_pack
from frostline.probes import probe
from frostline.staging import Parcel, bring
from frostline.trialspec import TrialSpec
from frostline.work import Load, Probe, Shard, Survey
from frostline.world import World

WAIT_SECONDS = 0.05  # between two questions for work
PIECE_BYTES = 64 << 20  # of a file that is brought; it passes through the object stores of two nodes


class Worker(tune.Trainable):
    """One process that does piece of work after piece of work, and keeps between them what the next one may need."""

    def setup(self, config: dict[str, Any], study: Any = None, have: Callable[[], None] | None = None) -> None:
        """`have` has on this node what trials load from; what is wrong with that ends the search."""
        assert have is not None
        self.study, self.feed, self.name, self.have = study, Feed(), config["worker"], have
        try:
            have()
        except ValueError as error:
            ray.get(study.fail.remote(error))

    def step(self) -> dict[str, Any]:
        """All that there is to do until the study has no more."""
        while (work := ray.get(self.study.take.remote(self.name))) != "end":
            if work == "wait":
                time.sleep(WAIT_SECONDS)
            elif isinstance(work, list):
                self.run(
                    work,
                    lambda records: ray.get(self.study.report.remote(records)),
                    lambda outcomes: ray.get(self.study.finish.remote(outcomes)),
                )
            else:
                self.prepare(work)
        return {"done": True}

    def run(self, specs: Sequence[TrialSpec], report: Report, finish: Finish) -> None:
        """Train a pack, or a trial that has workers of its own."""
        if specs[0].scaling.workers > 1:
            from frostline.distributed import train_together  # others do not pay for Ray Train

            for spec in specs:
                train_together(spec, self.study, keep_with, self.have)
            return
        world = World.here(specs[0].resources)
        keep = partial(keep_with, self.study)
        run_pack(specs, feed=self.feed, world=world, report=report, finish=finish, keep=keep)

    def prepare(self, work: Load | Survey | Shard | Probe) -> None:
        """Do what trials wait for; what is wrong with it ends the search."""
        world = World.here(work.resources)
        try:
            if isinstance(work, Load):
                load(work.survey, world)
            elif isinstance(work, Survey):
                supply = survey(work, world, lambda root, keys: ray.get(self.study.hold.remote(root, keys)))
                ray.get(self.study.supplied.remote(supply))
            elif isinstance(work, Probe):
                ray.get(self.study.probed.remote(probe(work, self.feed, world)))
            else:
                ray.get(self.study.extracted.remote(extract(work, self.feed, world)))
        except ValueError as error:
            # around what the study raised, Ray puts its traceback
            ray.get(self.study.fail.remote(getattr(error, "cause", error)))


def bring_from(node: str, parcels: Sequence[Parcel]) -> None:
    """Have on this node what lies on the one that Ray knows as `node`. Raises DataError."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    piece = ray.remote(num_cpus=0)(_piece).options(scheduling_strategy=there)

    def read(path: str, offset: int) -> memoryview:
        try:
            return ray.get(piece.remote(path, offset)).data
        except RayTaskError as error:
            raise DataError(f"{path} cannot be read beside the driver: {error.cause}") from None

    bring(parcels, read)


def _piece(path: str, offset: int) -> np.ndarray:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return np.frombuffer(file.read(PIECE_BYTES), np.uint8)  # which is mapped where it arrives; bytes are copied


def keep_with(study: Any, spec: TrialSpec) -> Keep:
    """Checkpoints through the study, which writes one while training goes on."""
    written: list[Any] = []

    def save(checkpoint: bytes) -> None:
        if written:
            ray.get(written.pop())
        written.append(study.keep.remote(spec.trial_id, checkpoint))

    return Keep(lambda: ray.get(study.kept.remote(spec.trial_id)), save, spec.scaling.checkpoint_s)
