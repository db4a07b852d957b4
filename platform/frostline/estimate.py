"""What a search would run and what it would cost, said before anything is spent.

Measuring and deciding are separate: `measure` times a few training steps on this machine, `estimate` is a pure function
of the job, those times and the sizes of data and backbone. `plan` prints both.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np
import torch
from optuna.distributions import CategoricalDistribution

from frostline.features import EVAL_BATCH, Fetch, feature_fetch, image_fetch
from frostline.freeze import Network, apply_plan, compile_plan, fixed_hash
from frostline.head import build_head, set_probe
from frostline.prepare import Prepared
from frostline.propose import distributions
from frostline.spec import Arm, Freeze, Head, Job, Pruner, Range, Resources, depth_of
from frostline.stages import StageCost
from frostline.study import COMMIT_ROWS, COMMIT_SECONDS
from frostline.train import Batches, Seeding, predict, train_epochs
from frostline.world import World, autocast_dtype, gpus_of_a_trial, hardware, trials_at_once

TIMING_S = 6.0  # what the timed steps may take on a CPU; batches shrink to fit
PART_BYTES = 42_000  # measured, as are the next: the Parquet files of a commit
TRIAL_BYTES, EPOCH_BYTES, SAMPLE_BYTES = 400, 80, 20  # what a row adds to them, and to the splits
PREDICTION_BYTES, BUNDLE_BYTES = 40, 8_000  # without the probabilities, without the tensors


@dataclass(frozen=True)
class StepCosts:
    """What was timed, on the device and with the threads of a trial."""

    device: str  # `cpu`, `cuda` or `mps`
    hardware: str
    threads: int
    batch_size: int
    """Of the timed steps below the head: the job's, or less where those would take too long."""
    forward_s: float
    """Per image through the network in eval mode."""
    steps: Mapping[int, float]
    """Cut -> seconds per image of a training step, forward, backward and optimizer; at the cut after the last stage
    those of the head alone, on features. Holds the first and the last cut that the job can draw, and some between."""
    start_s: float
    """Per trial before its first step: to build, freeze and audit the network."""
    probe_s: float = 0.0
    """Per trial whose head starts at the closed-form solution: to find it."""


@dataclass(frozen=True)
class Sizes:
    """What of data and backbone the cost depends on."""

    n_train: int  # after data.per_class
    n_val: int
    n_test: int
    classes: int
    feature_dim: int
    pixels_bytes: int


@dataclass(frozen=True)
class Cost:
    images_forward: float
    images_backward: float
    device_s: float
    wall_s: float


@dataclass(frozen=True)
class Estimate:
    """What a search would take, as far as its steps take what the timed ones took."""

    trials: int
    confirmations: int
    at_most: Cost
    """Every trial takes the dearest configuration of its arm, and none is stopped."""
    expected: Cost
    """Configurations are spread evenly over each arm's space, and the pruner stops as `expected_epochs` says."""
    disk: Mapping[str, int]
    """What is written -> bytes, at most."""


# --- measuring ---


def measure(prepared: Prepared) -> StepCosts:
    """Time the job's own network, loop and optimizer on a few real batches, the best of two after a warm-up.

    Batch size and head width are the mean of what the arms may draw; the norm policy is the job's. Takes some `TIMING_S`
    on a CPU. Raises ValueError where `resources.device` is not there.
    """
    job, last, arms = prepared.job, len(prepared.backbone.stages), list(prepared.job.arms.values())
    device = World.here(job.resources).device
    cuts = cuts_to_time({cut for arm in arms for cut in arm_cuts(job, arm, last)}, last)
    wanted = min(round(fmean(_mean(job, arm, "train.batch_size") for arm in arms)), prepared.n_train)
    head = Head(hidden=round(fmean(_mean(job, arm, "head.hidden") for arm in arms)))
    batch, passed = wanted, EVAL_BATCH
    if device.type == "cpu":
        rough_s, live = _forward_seconds(prepared, 2, device), sum(cut < last for cut in cuts)
        batch, passed = (affordable_batch(size, rough_s, live) for size in (wanted, EVAL_BATCH))
    timed = {cut: _step_seconds(prepared, cut, head, wanted if cut == last else batch, device) for cut in cuts}
    probed = any(_chance(job, arm, "head.init", "probe") for arm in arms)
    return StepCosts(
        device=device.type,
        hardware=hardware(device),
        threads=torch.get_num_threads(),
        batch_size=batch,
        forward_s=_forward_seconds(prepared, passed, device),
        steps={cut: step_s for cut, (step_s, _) in timed.items()},
        start_s=min(start_s for _, start_s in timed.values()),
        probe_s=_probe_seconds(prepared) if probed else 0.0,
    )


def _step_seconds(prepared: Prepared, cut: int, head: Head, batch: int, device: torch.device) -> tuple[float, float]:
    """Seconds per image of a training step at a cut, and seconds per trial before its first step."""
    job, backbone, head_only = prepared.job, prepared.backbone, cut == len(prepared.backbone.stages)
    started = time.perf_counter()
    network = _network(prepared, head, device)
    plan = compile_plan(Freeze(strategy="freeze_depth", depth=cut, norm=job.freeze.norm), backbone.stages)
    applied = apply_plan(plan, network, backbone)
    for _ in range(2):  # a trial's audit, before and after
        fixed_hash(network, applied)
    start_s = time.perf_counter() - started

    count = 8 * batch if head_only else batch  # steps of a head are too short to time one
    samples = prepared.dataset.indices("train")[:count]
    fetch = image_fetch(backbone, prepared.dataset, device)
    if head_only:
        fetch = feature_fetch(torch.rand(len(samples), backbone.feature_dim, device=device), samples)
    _, *records = train_epochs(
        network,
        applied,
        job.train.model_copy(update={"epochs": 3, "batch_size": batch, "lr": 1e-6, "head_lr": 1e-6}),
        train=_batches(prepared, fetch, samples, device),
        val=_batches(prepared, fetch, samples[:2], device),
        metric=job.objective.metric,
        seeding=Seeding(0, 0),
        head_only=head_only,
        autocast=autocast_dtype(job.train.precision, device),
    )
    return min(record.seconds - record.eval_seconds for record in records) / len(samples), start_s


def _forward_seconds(prepared: Prepared, count: int, device: torch.device) -> float:
    """Seconds per image of the network in eval mode, `count` images at a time."""
    fetch = image_fetch(prepared.backbone, prepared.dataset, device)
    batches = _batches(prepared, fetch, prepared.dataset.indices("train")[:count], device)
    network, passes = _network(prepared, Head(), device), []
    for _ in range(3):
        started = time.perf_counter()
        predict(network, batches, autocast_dtype(prepared.job.train.precision, device))
        passes.append(time.perf_counter() - started)
    return min(passes[1:]) / len(batches.samples)


def _network(prepared: Prepared, head: Head, device: torch.device) -> Network:
    on_top = build_head(head, prepared.backbone.feature_dim, len(prepared.dataset.classes), seed=0)
    network = Network(copy.deepcopy(prepared.backbone.module), on_top)
    return network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _probe_seconds(prepared: Prepared) -> float:
    dim, classes, n = prepared.backbone.feature_dim, len(prepared.dataset.classes), prepared.n_train
    started = time.perf_counter()
    set_probe(build_head(Head(), dim, classes, seed=0), torch.rand(n, dim), np.arange(n) % classes)
    return time.perf_counter() - started


def _batches(prepared: Prepared, fetch: Fetch, samples: np.ndarray, device: torch.device) -> Batches:
    return Batches(fetch, samples, torch.from_numpy(prepared.dataset.labels[samples]).to(device))


def cuts_to_time(cuts: Collection[int], last: int) -> list[int]:
    """Of the cuts that a job may draw: the first, the middle and the last below the head, and the head's if it is there."""
    live = sorted(cut for cut in set(cuts) if cut < last)
    some = [live[0], live[len(live) // 2], live[-1]] if len(live) > 3 else live
    return some + [last] * (last in cuts)


def affordable_batch(wanted: int, image_s: float, cuts: int) -> int:
    """The largest batch up to `wanted`, but 2 if it can be, with which timing stays within `TIMING_S`, where an image
    takes `image_s` forward and three times that in a step: three steps at each of `cuts` cuts, and three passes."""
    return min(wanted, max(2, int(TIMING_S / (image_s * (9 * cuts + 3)))))


# --- deciding ---


def estimate(job: Job, stages: Sequence[StageCost], sizes: Sizes, costs: StepCosts, slots: int) -> Estimate:
    """What the search of `job` takes with `slots` trials at once.

    A trial at a cut below the head takes epochs x (n_train x step(cut) + n_val x forward) seconds; one of the head alone
    epochs x (n_train + n_val) x step(head), on features that each of the `slots` processes extracts once. To both comes
    what a trial takes to start, and, to a confirmation, a pass over test (and, for features, over its own train samples).
    """
    arms, each_arm = list(job.arms.values()), job.confirm.finalists == "arms"
    share = job.search.trials // len(arms)
    trials, confirmations = share * len(arms), job.confirm.seeds * (len(arms) if each_arm else 1)
    longest = [_largest(job, arm, "train.epochs") for arm in arms]
    typical = [_mean(job, arm, "train.epochs") for arm in arms]
    stopped = [expected_epochs(job.search.pruner, epochs) for epochs in typical]
    probed = any(_chance(job, arm, "head.init", "probe") for arm in arms)
    cached = probed or any(len(stages) in arm_cuts(job, arm, len(stages)) for arm in arms)

    def works(epochs: Sequence[float], confirm: bool = False, dearest: bool = False) -> list[np.ndarray]:
        return [
            _work(job, arm, each, stages, sizes, costs, confirm=confirm, dearest=dearest)
            for arm, each in zip(arms, epochs, strict=True)
        ]

    def cost(searched: Sequence[np.ndarray], finalists: Sequence[np.ndarray]) -> Cost:
        search = share * np.sum(searched, axis=0)
        if cached:
            search += min(slots, trials) * _pass(sizes.n_train + sizes.n_val, costs)
        confirm = confirmations * np.mean(finalists, axis=0)
        rounds = math.ceil(confirmations / slots) / max(1, confirmations)
        forward, backward, device_s = map(float, search + confirm)
        return Cost(forward, backward, device_s, float(search[2] / min(slots, trials) + confirm[2] * rounds))

    finals = works(longest, confirm=True, dearest=True)
    at_most = cost(works(longest, dearest=True), finals if each_arm else [max(finals, key=itemgetter(2))])
    expected = cost(works(stopped), works(typical, confirm=True))
    epochs = share * sum(longest) + confirmations * max(longest)
    disk = _disk(job, stages, sizes, trials + confirmations, confirmations, epochs, at_most.wall_s)
    return Estimate(trials, confirmations, at_most, expected, disk)


def _work(
    job: Job,
    arm: Arm,
    epochs: float,
    stages: Sequence[StageCost],
    sizes: Sizes,
    costs: StepCosts,
    *,
    confirm: bool,
    dearest: bool,
) -> np.ndarray:
    """(3,): images forward, images backward and seconds of one trial of an arm, its mean or its dearest one."""
    likely = math.ceil if dearest else float
    probe = likely(_chance(job, arm, "head.init", "probe"))
    recalibrated = likely(_chance(job, arm, "freeze.norm", "recalibrate")) * sizes.n_train
    redrawn = sizes.n_train if job.data.per_class is not None else 0

    def at(cut: int) -> np.ndarray:
        step_s = step_seconds(cut, stages, costs)
        started = np.array([0.0, 0.0, costs.start_s + probe * costs.probe_s])
        if cut == len(stages):
            trained = np.array([0.0, 0.0, epochs * (sizes.n_train + sizes.n_val) * step_s])
            return started + trained + _pass(confirm * (sizes.n_test + redrawn), costs)
        trained = epochs * sizes.n_train * np.array([1.0, 1.0, step_s])
        passed = epochs * sizes.n_val + recalibrated + confirm * (sizes.n_test + probe * redrawn)
        return started + trained + _pass(passed, costs)

    works = [at(cut) for cut in arm_cuts(job, arm, len(stages))]
    return max(works, key=itemgetter(2)) if dearest else np.mean(works, axis=0)


def _pass(images: float, costs: StepCosts) -> np.ndarray:
    return images * np.array([1.0, 0.0, costs.forward_s])


def step_seconds(cut: int, stages: Sequence[StageCost], costs: StepCosts) -> float:
    """Seconds per image of a training step at a cut: as timed, or between two timed cuts, linear in the FLOPs behind it."""
    if cut == len(stages):
        return costs.steps[cut]
    timed = sorted(each for each in costs.steps if each < len(stages))
    frozen = np.cumsum([0.0, *(stage.flop_share for stage in stages)])  # at each cut
    return float(np.interp(frozen[cut], frozen[timed], [costs.steps[each] for each in timed]))


def expected_epochs(pruner: Pruner, epochs: float) -> float:
    """Epochs of a mean trial. Under halving one in `factor` trials survives each rung, at grace_epochs x factor^k:
    r_0 + (r_1 - r_0) / factor + (r_2 - r_1) / factor^2 + …, each rung r_k being at most `epochs`. No claim is made for
    other pruners: all of `epochs`."""
    if pruner.kind != "halving":
        return epochs
    total, reached, share, rung = 0.0, 0.0, 1.0, pruner.grace_epochs
    while rung < epochs:
        total, reached = total + share * (rung - reached), rung
        share, rung = share / pruner.factor, rung * pruner.factor
    return total + share * (epochs - reached)


def arm_cuts(job: Job, arm: Arm, stages: int) -> list[int]:
    """The cuts that an arm may draw, each as likely as the others. Raises SpaceError."""
    searched = distributions(arm, stages).get("freeze.depth")
    if isinstance(searched, CategoricalDistribution):
        depths: Sequence[Any] = searched.choices
    elif searched:
        depths = range(stages + 1)
    else:
        depths = [arm.space.get("freeze.depth", job.freeze.depth) if arm.strategy == "freeze_depth" else None]
    freezes = (Freeze.model_validate({"strategy": arm.strategy, "depth": depth}) for depth in depths)
    return [depth_of(freeze, stages) for freeze in freezes]


def local_slots(resources: Resources, cores: int, gpus: int) -> int:
    """How many trials a Ray of this machine alone would run at once; 0 where it cannot hold one."""
    return trials_at_once(resources.cpus, gpus_of_a_trial(resources, gpus), cores, gpus)


def _disk(
    job: Job, stages: Sequence[StageCost], sizes: Sizes, trials: int, confirmations: int, epochs: float, wall_s: float
) -> dict[str, int]:
    parts = min(trials, math.ceil(wall_s / COMMIT_SECONDS) + math.ceil(trials / COMMIT_ROWS))
    first = min(cut for arm in job.arms.values() for cut in arm_cuts(job, arm, len(stages)))
    hidden = max(_largest(job, arm, "head.hidden") for arm in job.arms.values())
    head = (hidden or sizes.feature_dim) * sizes.classes + hidden * sizes.feature_dim
    weights = sum(stage.parameters for stage in stages[first:]) + head
    rows = PART_BYTES * parts + TRIAL_BYTES * trials + EPOCH_BYTES * epochs
    return {
        "rows": int(rows + SAMPLE_BYTES * (sizes.n_train + sizes.n_val + sizes.n_test)),
        "predictions": confirmations * sizes.n_test * (4 * sizes.classes + PREDICTION_BYTES),
        "bundle": int(4 * weights) + BUNDLE_BYTES if confirmations else 0,
        "pixels": sizes.pixels_bytes,
    }


def _entry(job: Job, arm: Arm, path: str) -> Any:
    """What the arm's space says of a key, else the job."""
    section, key = path.split(".", 1)
    return arm.space.get(path, getattr(getattr(job, section), key))


def _mean(job: Job, arm: Arm, path: str) -> float:
    """Of a number, over what the arm may draw."""
    entry = _entry(job, arm, path)
    if isinstance(entry, Range):
        span = entry.high - entry.low
        return span / math.log(entry.high / entry.low) if entry.log else entry.low + span / 2
    return fmean(entry) if isinstance(entry, tuple) else entry


def _largest(job: Job, arm: Arm, path: str) -> float:
    entry = _entry(job, arm, path)
    return entry.high if isinstance(entry, Range) else max(entry) if isinstance(entry, tuple) else entry


def _chance(job: Job, arm: Arm, path: str, value: str) -> float:
    """Share of the arm's choices for `path` that are `value`."""
    entry = _entry(job, arm, path)
    choices = entry if isinstance(entry, tuple) else (entry,)
    return choices.count(value) / len(choices)


# --- showing ---
