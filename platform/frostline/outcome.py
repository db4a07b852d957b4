"""What a trial tells its study: a record of each epoch, and its outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from frostline.spec import Metric
from frostline.targets import EVERY
from frostline.trialspec import TrialSpec
from frostline.versions import versions

_OF_EPOCHS = {name for names in EVERY.values() for name in names} - {"nll"}
"""Metrics that have a column of their own in the table of epochs; the NLL is `val_loss`."""


@dataclass(frozen=True)
class EpochRecord:
    """What is known after one epoch; scores are of the weights at its end."""

    epoch: int  # counts from 1
    train_loss: float
    val: dict[Metric, float]
    val_score: float
    lr: float
    head_lr: float
    images: int
    seconds: float  # of this epoch's training and validation
    eval_seconds: float
    phase: int = 0  # of the strategy, counted from 0

    @property
    def val_loss(self) -> float:
        """The mean loss on val: the NLL, or of a regression the squared error over the variance of val's labels."""
        return self.val["nll"] if "nll" in self.val else 1 - self.val["r2"]


@dataclass
class Outcome:
    """What a trial leaves: its row, and for a confirmation its predictions on test and its bundle."""

    row: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    bundle: dict[str, bytes] = field(default_factory=dict)


def lost(spec: TrialSpec, records: Sequence[EpochRecord], kind: str, reason: str) -> Outcome:
    """The outcome of a trial that cannot speak for itself, its process being gone: what it had reported, and how it ended."""
    row = asked(spec) | summarise(spec, records, "failed")
    seconds = sum(record.seconds for record in records)
    row |= {"error_kind": kind, "reason": reason, "seconds": seconds, "spent_s": seconds}
    return Outcome(row | {"finished_at": datetime.now(UTC)})


def asked(spec: TrialSpec) -> dict[str, Any]:
    """The columns that say what a trial was to be."""
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
        "views": str(spec.augment.views),
        "threads": spec.resources.threads,
        "versions": json.dumps(versions()),
    }


def summarise(spec: TrialSpec, records: Sequence[EpochRecord], status: str) -> dict[str, Any]:
    """The columns that follow from a trial's epochs. The score is the last epoch's, and null unless complete."""
    row: dict[str, Any] = {"status": status, "epochs": len(records), "val_score": None}
    if records:
        pick = max if spec.objective.mode == "max" else min
        best, last = pick(records, key=lambda record: record.val_score), records[-1]
        row |= {"last_score": last.val_score, "best_epoch_score": best.val_score, "best_epoch": best.epoch}
        row |= {"val_nll": last.val.get("nll")}
        if status == "complete":
            row["val_score"] = last.val_score
    if status == "pruned":
        row["reason"] = f"stopped after epoch {len(records)} of {spec.config.train.epochs}"
    return row


def epoch_row(trial_id: str, record: EpochRecord, seq: int, heard_seq: int, stop: bool) -> dict[str, Any]:
    """The row of an epoch that was heard at `seq`, judged with those from `heard_seq` on, and stopped or not."""
    return {
        "trial_id": trial_id,
        "epoch": record.epoch,
        "phase": record.phase,
        "seq": seq,
        "heard_seq": heard_seq,
        "train_loss": record.train_loss,
        "val_loss": record.val_loss,
        "val_score": record.val_score,
        **{f"val_{name}": value for name, value in record.val.items() if name in _OF_EPOCHS},
        "lr": record.lr,
        "head_lr": record.head_lr,
        "seconds": record.seconds,
        "images": record.images,
        "decision": "stop" if stop else "continue",
    }
