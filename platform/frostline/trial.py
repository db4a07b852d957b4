"""The spine: one configuration, trained once with one seed, to one row."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.backbone import load_backbone
from frostline.bundle import bundle_files
from frostline.data import load_data, subset
from frostline.features import FeatureStore, feature_fetch, image_fetch
from frostline.freeze import FreezeError, Network, apply_plan, compile_plan, fixed_hash
from frostline.head import build_head, set_probe
from frostline.rows import (
    Cost,
    describe,
    describe_data,
    describe_network,
    failure,
    prediction_rows,
    score_on_test,
    summarise,
)
from frostline.spec import TrialSpec
from frostline.train import Batches, EpochRecord, Seeding, predict, recalibrate, train_epochs
from frostline.world import World, autocast_dtype

Report = Callable[[EpochRecord], bool]
"""Takes the record of an epoch and answers whether to go on."""


@dataclass
class Outcome:
    """What a trial leaves: its row, and for a confirmation its predictions on test and its bundle."""

    row: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    bundle: dict[str, bytes] = field(default_factory=dict)


def run_trial(
    spec: TrialSpec, *, store: FeatureStore, world: World, report: Report, row: dict[str, Any] | None = None
) -> Outcome:
    """Train one configuration and score it on val; a confirmation also on test, once, with predictions and a bundle.

    Columns are put into `row` as they become known. Raises what goes wrong; `attempt` makes a failed row of it.
    """
    config, device, cost = spec.config, world.device, Cost(world.device, store.images_forwarded)
    outcome = Outcome({} if row is None else row)
    row = outcome.row
    row |= describe(spec, world)
    dataset = load_data(spec.data, spec.seeds.split)
    train_samples = subset(dataset, spec.data.per_class, spec.seeds.subset)
    cost.lap("data")

    backbone = load_backbone(spec.backbone, image_size=spec.data.image_size)
    plan = compile_plan(config.freeze, backbone.stages)
    head_only = plan.cut == len(backbone.stages)
    head = build_head(config.head, backbone.feature_dim, len(dataset.classes), spec.seeds.head)
    network = Network(copy.deepcopy(backbone.module), head).to(device).to(memory_format=torch.channels_last)
    applied = apply_plan(plan, network, backbone)
    autocast = autocast_dtype(config.train.precision, device)
    row |= describe_network(network, applied, backbone, plan.cut, config.train)
    row |= {"inputs": "features" if head_only else "images", "precision": "bf16" if autocast else "fp32"}

    def features(samples: np.ndarray) -> Tensor:
        return store.features(backbone, network.backbone, dataset, samples, device, autocast)

    def batches(samples: np.ndarray) -> Batches:
        fetch = feature_fetch(features(samples), samples) if head_only else image_fetch(backbone, dataset, device)
        return Batches(fetch, samples, torch.from_numpy(dataset.labels[samples]).to(device))

    train, val = batches(train_samples), batches(dataset.indices("val"))
    row |= describe_data(dataset, train, val)
    if config.head.init == "probe":
        set_probe(head, features(train_samples), dataset.labels[train_samples])
    if applied.recalibrated:
        recalibrate(network, applied, train, spec.seeds.order)
    cost.lap("features")

    held = fixed_hash(network, applied)
    records, status = [], "complete"
    for record in train_epochs(
        network,
        applied,
        config.train,
        train=train,
        val=val,
        metric=spec.objective.metric,
        seeding=Seeding(spec.seeds.order, spec.seeds.dropout),
        head_only=head_only,
        autocast=autocast,
    ):
        records.append(record)
        if not report(record) and record.epoch < config.train.epochs:
            status = "pruned"
            break
    if fixed_hash(network, applied) != held:
        raise FreezeError("training moved a tensor that the freeze plan holds fixed")
    row |= {"audit": "passed"} | summarise(spec, records, status)
    cost.lap("train")

    if spec.round == "confirm" and status == "complete":
        test = batches(dataset.indices("test"))
        logits = predict(network.head if head_only else network, test, autocast)
        row |= score_on_test(spec, logits, dataset.labels[test.samples])
        outcome.predictions = prediction_rows(spec, logits, dataset, test.samples)
        outcome.bundle = bundle_files(spec, network, applied, backbone, dataset.classes, row)
        cost.lap("eval")
    row |= cost.columns(records, row, store.images_forwarded)
    return outcome


def attempt(spec: TrialSpec, *, store: FeatureStore, world: World, report: Report) -> Outcome:
    """`run_trial`, with whatever goes wrong in it as a row of status `failed`: a kind, a reason, the traceback's end.

    What goes wrong in `report` is not the trial's failure, and is raised.
    """
    row: dict[str, Any] = {}
    records: list[EpochRecord] = []
    unheard: list[Exception] = []
    started = time.perf_counter()

    def listen(record: EpochRecord) -> bool:
        records.append(record)
        try:
            return report(record)
        except Exception as error:
            unheard.append(error)
            raise

    try:
        return run_trial(spec, store=store, world=world, report=listen, row=row)
    except Exception as error:
        if unheard:
            raise
        seconds = time.perf_counter() - started
        row |= summarise(spec, records, "failed") | failure(error)
        row |= {"seconds": seconds, "device_s": seconds, "finished_at": datetime.now(UTC)}
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return Outcome(row)


def lost(spec: TrialSpec, records: Sequence[EpochRecord], reason: str) -> Outcome:
    """The outcome of a trial whose process is gone: what it had reported, and that it was lost."""
    row = describe(spec, World(torch.device("cpu"), "unknown")) | summarise(spec, records, "failed")
    row |= dict.fromkeys(("device", "hardware", "node", "started_at"))
    seconds = sum(record.seconds for record in records)
    row |= {"error_kind": "worker_lost", "reason": reason, "seconds": seconds, "device_s": seconds}
    return Outcome(row | {"finished_at": datetime.now(UTC)})
