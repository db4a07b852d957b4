"""The columns of a trial's row: what it was, what it ran on, how it went, what it cost."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from frostline.backbone import Backbone
from frostline.data import Dataset
from frostline.failures import kind_of
from frostline.freeze import Applied, FreezeError, Network, Plan, stage_rates
from frostline.metrics import probabilities, scores
from frostline.outcome import EpochRecord, asked
from frostline.spec import Train
from frostline.targets import FURTHER, Target
from frostline.training import Batches
from frostline.trialspec import TrialSpec
from frostline.world import World, hardware, peak_mib, reset_peak


def describe(spec: TrialSpec, world: World) -> dict[str, Any]:
    """The columns that are known when a trial begins."""
    return {
        **asked(spec),
        "workers": world.workers,
        "device": str(world.device),
        "node": world.node,
        "hardware": hardware(world.device),
        "started_at": datetime.now(UTC),
    }


def describe_data(dataset: Dataset, train: Batches, val: Batches) -> dict[str, Any]:
    """The columns that say what the trial was trained and scored on."""
    return {
        "data_hash": dataset.data_hash,
        "split_hash": dataset.split_hash,
        "n_train": len(train.samples),
        "n_val": len(val.samples),
    }


def describe_network(
    network: Network, applied: Applied, backbone: Backbone, plan: Plan, config: Train
) -> dict[str, Any]:
    """The columns that say what of the network runs, and what trains in any phase of the plan."""
    left_out = {f"backbone.{tensor}" for stage in backbone.stages[plan.end :] for tensor in stage.tensors}
    sizes = {name: each.numel() for name, each in network.named_parameters() if name not in left_out}
    return {
        "freeze_depth": plan.cut,
        "freeze_fraction": plan.cut / len(backbone.stages),
        "head_depth": plan.end,
        "stages": len(backbone.stages),
        "stages_hash": backbone.stages_hash,
        "weights_hash": backbone.weights_hash,
        "total_params": sum(sizes.values()),
        "trainable_params": sum(size for name, size in sizes.items() if name in applied.trained),
        "applied_lrs": json.dumps(stage_rates(applied, backbone.stages, config.lr, config.head_lr)),
    }


def failure(error: Exception) -> dict[str, Any]:
    """The columns that say why a trial failed."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return {
        "error_kind": kind_of(error),
        "reason": f"{type(error).__name__}: {error}"[:500],
        "error": "\n".join(lines[-12:]),
        "audit": str(error)[:500] if isinstance(error, FreezeError) else None,
    }


def score_on_test(spec: TrialSpec, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The columns of a confirmation's scores on test."""
    target = Target(spec.data.task)
    found = scores(logits, labels, *FURTHER[target.task], target=target)
    named = {f"test_{name}": value for name, value in found.items()}
    return {**named, "test_score": found[spec.objective.metric], "n_test": len(labels)}


def prediction_rows(spec: TrialSpec, logits: np.ndarray, dataset: Dataset, samples: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the predictions table for (n, outputs) of these samples, of a regression in the unit of the data."""
    task, labels = spec.data.task, dataset.labels[samples]
    said: list[dict[str, Any]]
    if task == "classification":
        best = logits.argmax(axis=1)
        said = [{"label": label, "predicted": each} for label, each in zip(labels.tolist(), best.tolist(), strict=True)]
    elif task == "multilabel":
        said = [{"labels": np.flatnonzero(row)} for row in labels]
    else:
        pairs = zip(labels[:, 0].tolist(), logits[:, 0].tolist(), strict=True)
        said = [{"value": value, "predicted_value": each} for value, each in pairs]
    if task != "regression":
        said = [each | {"probabilities": row} for each, row in zip(said, probabilities(logits, task), strict=True)]
    named = ({"trial_id": spec.trial_id, "sample_id": dataset.sample_ids[sample]} for sample in samples)
    return [of | each for of, each in zip(named, said, strict=True)]


@dataclass
class Cost:
    """What a trial takes: time by part, passes through the backbone, peak memory. Measured from its making."""

    world: World
    passes_before: int
    clock: Callable[[], float] = time.perf_counter
    """Seconds of the trial's own: in a pack it runs while the trial's lane does."""
    laps: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began, self.started = self.clock(), time.perf_counter()
        reset_peak(self.world.device)

    def lap(self, part: str) -> None:
        """The time since the last lap belongs to this part."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.laps[part] = self.spent() - sum(self.laps.values())

    def spent(self) -> float:
        return self.clock() - self.began

    def columns(self, records: Sequence[EpochRecord], row: dict[str, Any], passes: int, plan: Plan) -> dict[str, Any]:
        """The columns of cost, at the end of a trial with this row; `passes` through frozen prefixes by now."""
        scoring = sum(record.eval_seconds for record in records)
        trained = len(records) * row["n_train"]
        scored = len(records) * row["n_val"] + row.get("n_test", 0)
        live = row["inputs"] != "features"
        deep = sum(record.images for record in records if plan.phases[record.phase].stages)
        return {
            "seconds": time.perf_counter() - self.started,
            "spent_s": self.spent() * self.world.workers,
            "seconds_data": self.laps["data"],
            "seconds_setup": self.laps["setup"],
            "seconds_train": self.laps["train"] - scoring,
            "seconds_eval": self.laps.get("eval", 0.0) + scoring,
            "images_forward": passes - self.passes_before + live * (trained + scored),
            "images_backward": deep,
            "peak_mib": peak_mib(self.world.device),
            "finished_at": datetime.now(UTC),
        }
