"""The spine: one configuration, trained once with one seed, to one row."""

from __future__ import annotations

import copy
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.backbone import BackboneError, load_backbone
from frostline.bundle import bundle_files
from frostline.data import DataError, Dataset, load_data, subset
from frostline.features import FeatureStore, feature_fetch, image_fetch
from frostline.freeze import (
    Applied,
    FreezeError,
    Network,
    apply_plan,
    compile_plan,
    fixed_hash,
    stage_rates,
)
from frostline.head import build_head, set_probe
from frostline.metrics import probabilities, scores
from frostline.spec import TrialSpec
from frostline.train import Batches, EpochRecord, NonFiniteError, Seeding, predict, recalibrate, train_epochs
from frostline.world import World, autocast_dtype, hardware, peak_mib, reset_peak, versions

Report = Callable[[EpochRecord], bool]
"""Takes the record of an epoch and answers whether to go on."""


@dataclass
class Outcome:
    """What a trial leaves: its row, and for a confirmation its predictions on test and its bundle."""

    row: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    bundle: dict[str, bytes] = field(default_factory=dict)


def run_trial(spec: TrialSpec, *, store: FeatureStore, world: World, report: Report) -> Outcome:
    """Train one configuration and score it on val; a confirmation also on test, once, with predictions and a bundle.

    Raises what goes wrong; `attempt` makes a failed row of it.
    """
    clock, config, device = Clock(), spec.config, world.device
    reset_peak(device)
    passes_before = store.images_forwarded

    dataset = load_data(spec.data, spec.seeds.split)
    train_samples = subset(dataset, spec.data.per_class, spec.seeds.subset)
    val_samples = dataset.indices("val")
    clock.lap("data")

    backbone = load_backbone(spec.backbone, image_size=spec.data.image_size)
    head = build_head(config.head, backbone.feature_dim, len(dataset.classes), spec.seeds.head)
    plan = compile_plan(config.freeze, backbone.stages)
    head_only = plan.cut == len(backbone.stages)
    network = Network(copy.deepcopy(backbone.module), head).to(device, memory_format=torch.channels_last)
    applied = apply_plan(plan, network, backbone)
    fixed_before = fixed_hash(network, applied)

    def features(samples: np.ndarray) -> Tensor:
        return store.features(backbone, network.backbone, dataset, samples, device)

    def batches(samples: np.ndarray) -> Batches:
        fetch = feature_fetch(features(samples), samples) if head_only else image_fetch(backbone, dataset, device)
        return Batches(fetch, samples, torch.from_numpy(dataset.labels[samples]).to(device))

    if config.head.init == "probe":
        set_probe(head, features(train_samples), dataset.labels[train_samples])
    train, val = batches(train_samples), batches(val_samples)
    clock.lap("features")

    if applied.recalibrated:
        recalibrate(network, applied, train, config.train.batch_size)
        fixed_before = fixed_hash(network, applied)
    records: list[EpochRecord] = []
    autocast = autocast_dtype(config.train.precision, device)
    status = "complete"
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
    if fixed_hash(network, applied) != fixed_before:
        raise FreezeError("training moved a tensor that the freeze plan holds fixed")
    clock.lap("train")

    outcome = Outcome(
        {
            **describe(spec, world),
            **summarise(spec, records, status),
            **_sizes(network, applied),
            "freeze_depth": plan.cut,
            "freeze_fraction": plan.cut / len(backbone.stages),
            "stages": len(backbone.stages),
            "stages_hash": backbone.stages_hash,
            "weights_hash": backbone.weights_hash,
            "data_hash": dataset.data_hash,
            "split_hash": dataset.split_hash,
            "n_train": len(train_samples),
            "n_val": len(val_samples),
            "inputs": "features" if head_only else "images",
            "precision": "bf16" if autocast is torch.bfloat16 else "fp32",
            "applied_lrs": json.dumps(stage_rates(applied, backbone.stages, config.train.lr, config.train.head_lr)),
            "audit": "passed",
        }
    )
    if spec.round == "confirm" and status == "complete":
        test = batches(dataset.indices("test"))
        logits = predict(network.head if head_only else network, test, autocast)
        outcome.row |= _test_scores(logits, dataset, test.samples, spec)
        outcome.predictions = _prediction_rows(spec, logits, dataset, test.samples)
        outcome.bundle = bundle_files(spec, network, applied, backbone, dataset.classes, outcome.row)
        clock.lap("eval")

    eval_s = sum(record.eval_seconds for record in records)
    backward = 0 if head_only else len(records) * len(train_samples)
    live = 0 if head_only else len(records) * len(val_samples) + outcome.row.get("n_test", 0)
    outcome.row |= {
        "seconds": clock.total(),
        "device_s": clock.total(),
        "seconds_data": clock.laps["data"],
        "seconds_features": clock.laps["features"],
        "seconds_train": clock.laps["train"] - eval_s,
        "seconds_eval": clock.laps.get("eval", 0.0) + eval_s,
        "images_forward": store.images_forwarded - passes_before + backward + live,
        "images_backward": backward,
        "peak_mib": peak_mib(device),
        "finished_at": datetime.now(UTC),
    }
    return outcome


def attempt(spec: TrialSpec, *, store: FeatureStore, world: World, report: Report) -> Outcome:
    """`run_trial`, with whatever goes wrong in it as a row of status `failed`: a kind, a reason, the traceback's end."""
    records: list[EpochRecord] = []
    clock = Clock()

    def listen(record: EpochRecord) -> bool:
        records.append(record)
        return report(record)

    try:
        return run_trial(spec, store=store, world=world, report=listen)
    except Exception as error:  # noqa: BLE001 (a trial may fail in any way, and the failure is its result)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        row = {**describe(spec, world), **summarise(spec, records, "failed"), **failure(error)}
        return Outcome(row | {"seconds": clock.total(), "device_s": clock.total(), "finished_at": datetime.now(UTC)})


def lost(spec: TrialSpec, records: Sequence[EpochRecord], reason: str) -> Outcome:
    """The outcome of a trial whose process is gone: what it had reported, and that it was lost."""
    row = describe(spec, World(torch.device("cpu"), "unknown")) | {"device": None, "hardware": None, "node": None}
    lost_row = {"error_kind": "worker_lost", "reason": reason, "seconds": sum(record.seconds for record in records)}
    return Outcome(row | summarise(spec, records, "failed") | lost_row | {"finished_at": datetime.now(UTC)})


def failure(error: Exception) -> dict[str, Any]:
    """The columns that say why a trial failed."""
    kinds = {
        "oom": isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error),
        "non_finite": isinstance(error, NonFiniteError),
        "audit": isinstance(error, FreezeError),
        "data": isinstance(error, DataError),
        "user_error": isinstance(error, BackboneError | ValueError),
    }
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return {
        "error_kind": next((kind for kind, fits in kinds.items() if fits), "internal"),
        "reason": f"{type(error).__name__}: {error}"[:500],
        "error": "\n".join(lines[-12:]),
        "audit": str(error)[:500] if isinstance(error, FreezeError) else None,
    }


def describe(spec: TrialSpec, world: World) -> dict[str, Any]:
    """The columns that are known before a trial has begun."""
    config = spec.config
    return {
        "trial_id": spec.trial_id,
        "arm": spec.arm,
        "number": spec.number,
        "round": spec.round,
        "strategy": config.freeze.strategy,
        "config_id": config.id,
        "spec": spec.model_dump_json(),
        "seed": spec.seed,
        "seeds": spec.seeds.model_dump_json(),
        "norm": config.freeze.norm,
        "layer_decay": config.freeze.layer_decay,
        "head_hidden": config.head.hidden,
        "head_dropout": config.head.dropout,
        "head_init": config.head.init,
        "optimizer": config.train.optimizer,
        "lr": config.train.lr,
        "head_lr": config.train.head_lr,
        "weight_decay": config.train.weight_decay,
        "batch_size": config.train.batch_size,
        "epochs_asked": config.train.epochs,
        "device": str(world.device),
        "threads": spec.resources.threads,
        "node": world.node,
        "hardware": hardware(world.device),
        "versions": json.dumps(versions()),
        "started_at": datetime.now(UTC),
    }


def summarise(spec: TrialSpec, records: Sequence[EpochRecord], status: str) -> dict[str, Any]:
    """The columns that follow from a trial's epochs. The score is the last epoch's, and null unless complete."""
    row: dict[str, Any] = {"status": status, "epochs": len(records), "val_score": None}
    if records:
        pick = max if spec.objective.mode == "max" else min
        best, last = pick(records, key=lambda record: record.val_score), records[-1]
        row |= {"last_score": last.val_score, "best_epoch_score": best.val_score, "best_epoch": best.epoch}
        row |= {"val_nll": last.val["nll"]}
        if status == "complete":
            row["val_score"] = last.val_score
    if status == "pruned":
        row["reason"] = f"stopped after epoch {len(records)} of {spec.config.train.epochs}"
    return row


@dataclass
class Clock:
    """Wall time of a trial, by part."""

    started: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        self.laps[name] = self.total() - sum(self.laps.values())

    def total(self) -> float:
        return time.perf_counter() - self.started


def _sizes(network: Network, applied: Applied) -> dict[str, int]:
    counts = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return {
        "total_params": sum(counts.values()),
        "trainable_params": sum(count for name, count in counts.items() if name in applied.trained),
    }


def _test_scores(logits: np.ndarray, dataset: Dataset, samples: np.ndarray, spec: TrialSpec) -> dict[str, Any]:
    found = scores(logits, dataset.labels[samples])
    named = {f"test_{name}": value for name, value in found.items()}
    return {**named, "test_score": found[spec.objective.metric], "n_test": len(samples)}


def _prediction_rows(
    spec: TrialSpec, logits: np.ndarray, dataset: Dataset, samples: np.ndarray
) -> list[dict[str, Any]]:
    likely = probabilities(logits)
    return [
        {
            "trial_id": spec.trial_id,
            "sample_id": dataset.sample_ids[sample],
            "label": int(dataset.labels[sample]),
            "predicted": int(logits[row].argmax()),
            "probabilities": likely[row],
        }
        for row, sample in enumerate(samples)
    ]
