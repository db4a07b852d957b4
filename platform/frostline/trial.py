"""The spine: one configuration, trained once with one seed, to one row."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters import adapt
from frostline.backbone import load_backbone
from frostline.bundle import bundle_files
from frostline.checkpoint import DamagedCheckpointError, Keep, load_training, save_training
from frostline.collectives import agreed, gathered, shard, spanning_norms
from frostline.cuts import leave_at, pooled_cut, resume, round_at
from frostline.data import load_data, subset
from frostline.depths import end_of
from frostline.features import Feed, Origin, on_device
from frostline.freeze import Applied, FreezeError, Network, Plan, apply_plan, compile_plan, fixed_hash, whole
from frostline.head import build_head, in_units, set_probe
from frostline.models import digest
from frostline.outcome import EpochRecord, Outcome, summarise
from frostline.rows import Cost, describe, describe_data, describe_network, failure, prediction_rows, score_on_test
from frostline.training import Batches, Seeding, Training, predict, recalibrate
from frostline.trialspec import TrialSpec
from frostline.world import CPU, World, autocast_dtype

Report = Callable[[EpochRecord], bool]
"""Takes the record of an epoch and answers whether to go on."""


def run_trial(
    spec: TrialSpec,
    *,
    feed: Feed,
    world: World,
    report: Report,
    keep: Keep | None = None,
    row: dict[str, Any] | None = None,
) -> Outcome:
    """Train one configuration and score it on val; a confirmation also on test, once, with predictions and a bundle.

    Every worker of `world` calls it alike, and gets the same. Columns are put into `row` as they become known.

    With `keep` the state is saved at the ends of epochs, and a trial that finds one goes on from it to the bit; epochs from before
    are reported again, at once. One that is damaged is warned of, and the trial begins again. Raises CheckpointError for one of
    another trial.
    """
    row = {} if row is None else row
    steps, answer = trial_steps(spec, feed=feed, world=world, row=row, keep=keep), None
    while True:
        try:
            record = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = report(record) if record else None


def trial_steps(
    spec: TrialSpec,
    *,
    feed: Feed,
    world: World,
    row: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
    keep: Keep | None = None,
) -> Generator[EpochRecord | None, bool | None, Outcome]:
    """A trial, step by step: yields None before and between steps, and after an epoch its record, for which it is sent
    whether to go on. Columns are put into `row` as they become known. Raises what goes wrong.
    """
    config, cost = spec.config, Cost(world, feed.images_forwarded, clock)
    row |= describe(spec, world)
    origin = origin_of(spec, world)
    backbone, dataset = origin.backbone, origin.dataset
    cost.lap("data")

    end = end_of(config.head, len(backbone.stages))
    plan = compile_plan(config.freeze, backbone.stages, end, config.train.epochs)
    network, phases = network_of(spec, origin, plan, world)
    applied = whole(phases)
    row |= describe_network(network, applied, backbone, plan, config.train)
    row |= {
        "inputs": "features" if spec.cached else f"{backbone.inputs.noun}s",
        "precision": "bf16" if origin.autocast else "fp32",
    }
    row["node"] = ", ".join(sorted({*gathered(world, world.node)}))
    feed_in(network.backbone, plan, origin, cached=spec.cached)

    def batches(samples: np.ndarray) -> Batches:
        targets = torch.from_numpy(dataset.targets(samples)).to(world.device)
        if spec.cached:
            read = feed.activations(origin, plan.cut, samples, spec.features, mean=plan.only_head)
            return Batches(read, samples, targets, dataset.target)
        return Batches(feed.inputs(origin), samples, targets, dataset.target, origin.expect)

    train = batches(subset(dataset, spec.data.per_class, spec.seeds.subset))
    val = batches(dataset.indices("val"))
    row |= describe_data(dataset, train, val)
    if config.head.init == "probe":
        start = feed.pretrained(origin, plan.end, train.samples, spec.features if spec.start_stored else None)
        set_probe(network.head, start, train.labels, train.target.task)
    shard(world, network)
    if applied.recalibrated:
        recalibrate(network, applied, train, spec.seeds.order)
    held = fixed_hash(network, applied)
    cost.lap("setup")
    yield None

    training = Training(
        network,
        phases,
        config.train,
        train=train,
        val=val,
        metric=spec.objective.metric,
        seeding=Seeding(spec.seeds.order, spec.seeds.dropout),
        autocast=origin.autocast,
        clock=clock,
        world=world,
        micro_batch=spec.scaling.micro_batch,
    )
    status = "complete"
    for record in kept_records(training, spec, row, keep, clock):
        go_on = yield record
        if record and record.epoch < config.train.epochs and not go_on:
            status = "pruned"
            break
    records = training.records
    if {fixed_hash(network, applied)} != {held, *gathered(world, held)}:
        raise FreezeError("training moved a tensor that the freeze plan holds fixed")
    row |= {"audit": "passed"} | summarise(spec, records, status)
    cost.lap("train")

    outcome = Outcome(row)
    if spec.round == "confirm" and status == "complete":
        in_units(network.head, dataset.target)
        test = batches(dataset.indices("test"))
        logits = predict(network, test, origin.autocast, world=world, full_batches=True)
        confirm(outcome, spec, test.samples, logits, network, applied, origin)
        cost.lap("eval")
    row |= cost.columns(records, row, feed.images_forwarded, plan)
    return outcome


def kept_records(
    training: Training, spec: TrialSpec, row: dict[str, Any], keep: Keep | None, clock: Callable[[], float]
) -> Iterator[EpochRecord | None]:
    """The steps of a training, from its checkpoint on where a whole one was kept; first the records of the epochs before that. Between
    epochs its state is kept, once the record of the last one has been taken."""
    if keep is None:
        yield from training.steps()
        return
    of, world = training_id(spec, row), training.world
    if (checkpoint := agreed(world, keep.load)) is not None:
        try:
            load_training(training, checkpoint, of)
        except DamagedCheckpointError as error:
            warnings.warn(f"{spec.trial_id} begins again: {error}", RuntimeWarning, stacklevel=2)
        yield from list(training.records)
    saved_s = clock()
    for record in training.steps():
        yield record
        if record is None or record.epoch == spec.config.train.epochs:
            continue
        if agreed(world, keep.is_due, clock() - saved_s):
            checkpoint = save_training(training, of) if world.sharded or world.rank == 0 else b""
            if world.rank == 0:
                keep.save(checkpoint)
            saved_s = clock()


def training_id(spec: TrialSpec, row: dict[str, Any]) -> str:
    """What a checkpoint is of: all that a training's bits depend on, the number of its workers apart, which may change."""
    columns = ("device", "precision", "data_hash", "split_hash", "weights_hash", "versions")
    return digest([spec.model_dump(mode="json", exclude={"scaling"}), *(row[column] for column in columns)])


def network_of(spec: TrialSpec, origin: Origin, plan: Plan, world: World) -> tuple[Network, list[Applied]]:
    """The trial's network as it starts, for images or texts, and what each phase of the plan means for it."""
    backbone, freeze = origin.backbone, spec.config.freeze
    trunk = on_device(backbone, CPU if world.sharded else world.device)  # no device may hold all of it
    network = Network(spanning_norms(world, trunk) if plan.live_statistics else trunk, head_of(spec, origin))
    adapt(network.backbone, freeze, backbone.stages[plan.cut : plan.end], spec.seeds.head)
    return network, apply_plan(plan, network, backbone)


def head_of(spec: TrialSpec, origin: Origin) -> nn.Sequential:
    """The trial's head as it starts, on its device."""
    head, classes = spec.config.head, len(origin.dataset.classes)
    features = origin.width(end_of(head, len(origin.backbone.stages)))
    return build_head(head, features, classes, spec.seeds.head).to(origin.device)


def feed_in(backbone: nn.Module, plan: Plan, origin: Origin, *, cached: bool) -> None:
    """Make a backbone end where its head stands and begin with what it is fed: activations at its cut, if they are `cached`,
    else images, the activations being rounded on the way as storing them would."""
    if cached and plan.only_head:
        resume(backbone, pooled_cut(origin.cut(plan.end)))
        return
    dtype, rounding = getattr(torch, origin.dtype), origin.rounding(plan.cut)
    if plan.end < len(origin.backbone.stages):
        pool = origin.backbone.inputs.pooled
        leave_at(backbone, origin.cut(plan.end), pool, dtype if rounding and plan.only_head else None)
    if cached:
        resume(backbone, origin.cut(plan.cut))
    elif rounding:
        round_at(backbone, rounding, dtype)


def confirm(
    outcome: Outcome,
    spec: TrialSpec,
    samples: np.ndarray,
    logits: np.ndarray,
    network: Network,
    applied: Applied,
    origin: Origin,
) -> None:
    """Score a trained network by its (n, outputs) of the test samples, as `in_units`; keep the predictions and the bundle."""
    dataset = origin.dataset
    outcome.row |= score_on_test(spec, logits, dataset.labels[samples])
    outcome.predictions = prediction_rows(spec, logits, dataset, samples)
    outcome.bundle = bundle_files(spec, network, applied, origin.backbone, dataset.classes, outcome.row)
    outcome.row["stored_bytes"] = len(outcome.bundle["model.safetensors"])


def origin_of(spec: TrialSpec, world: World) -> Origin:
    """What the trial's activations are made from: data and backbone are loaded once per process."""
    return Origin(
        backbone=load_backbone(spec.backbone, image_size=spec.data.image_size),
        dataset=load_data(spec.data, spec.seeds.split),
        device=world.device,
        autocast=autocast_dtype(spec.config.train.precision, world.device),
        dtype=spec.features.dtype,
        augment=spec.augment,
        augment_seed=spec.seeds.augment,
    )


def failed(
    spec: TrialSpec, row: dict[str, Any], records: Sequence[EpochRecord], error: Exception, spent_s: float
) -> Outcome:
    """The outcome of a trial in which something went wrong, with the columns known by then: a kind, a reason, the
    traceback's end."""
    row |= summarise(spec, records, "failed") | failure(error)
    return Outcome(row | {"seconds": spent_s, "spent_s": spent_s, "finished_at": datetime.now(UTC)})
