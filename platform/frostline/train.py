"""Training one network on one process: a generator of steps and epoch records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from frostline.cuts import widened
from frostline.features import EVAL_BATCH, Fetch, chunks
from frostline.freeze import Applied, Network, check_gradients, check_masks, train_mode
from frostline.head import seed_dropout
from frostline.metrics import scores
from frostline.spec import Metric, Train, derive_seed
from frostline.world import mixed

REMEDY = "try a lower learning rate"


class NonFiniteError(ArithmeticError):
    """A loss that is NaN or infinite."""


@dataclass(frozen=True)
class Batches:
    """The labelled samples of one split, read in mini-batches."""

    fetch: Fetch
    samples: np.ndarray  # (n,) int64 sample numbers
    labels: Tensor  # (n,) int64, on the device


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


@dataclass(frozen=True)
class Seeding:
    """The random streams that training draws from."""

    order: int
    dropout: int


def train_epochs(*arguments: Any, **named: Any) -> Iterator[EpochRecord]:
    """`train_steps` without its steps: the record of each epoch."""
    return (record for record in train_steps(*arguments, **named) if record)


def train_steps(
    network: Network,
    applied: Applied,
    config: Train,
    *,
    train: Batches,
    val: Batches,
    metric: Metric,
    seeding: Seeding,
    autocast: torch.dtype | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[EpochRecord | None]:
    """Train; yield None after each step of an epoch but its last, and the record after that. Stop by closing it.

    `clock` answers seconds. Raises NonFiniteError, or FreezeError where masks, optimizer and gradients do not agree.
    """
    optimizer = build_optimizer(network, applied, config)
    check_masks(network, applied, optimizer)
    average = Average(network, applied, config.ema) if config.ema is not None else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = np.random.default_rng(seeding.order)
    torch.manual_seed(derive_seed(seeding.dropout, "backbone"))
    seed_dropout(network.head, seeding.dropout)
    per_epoch = -(-len(train.samples) // config.batch_size)
    step, factor = 0, 0.0

    for epoch in range(1, config.epochs + 1):
        started = clock()
        train_mode(network, applied)
        total = torch.zeros((), device=train.labels.device)
        for batch in chunks(order.permutation(len(train.samples)), config.batch_size):
            factor = rate_factor(step, per_epoch * config.epochs, config)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.zero_grad(set_to_none=True)
            with mixed(train.labels.device, autocast):
                logits = network(train.fetch(train.samples[batch], epoch))
                loss = functional.cross_entropy(
                    widened(logits), train.labels[batch], label_smoothing=config.label_smoothing
                )
            loss.backward()
            if step == 0:
                check_gradients(network, applied)
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            if average is not None:
                average.update(step)
            total += loss.detach() * len(batch)
            step += 1
            if step % per_epoch:
                yield None
        train_loss = float(total) / len(train.samples)
        if not math.isfinite(train_loss):
            raise NonFiniteError(f"the training loss of epoch {epoch} is {train_loss}; {REMEDY}")

        eval_started = clock()
        with average.swapped_in() if average is not None else nullcontext():
            logits = predict(network, val, autocast)
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"validation after epoch {epoch} gives logits that are not finite; {REMEDY}")
        val_scores = scores(logits, val.labels.cpu().numpy())
        finished = clock()
        yield EpochRecord(
            epoch=epoch,
            train_loss=train_loss,
            val=val_scores,
            val_score=val_scores[metric],
            lr=factor * config.lr,
            head_lr=factor * config.head_lr,
            images=len(train.samples),
            seconds=finished - started,
            eval_seconds=finished - eval_started,
        )
    if average is not None:
        average.keep()


def build_optimizer(network: Network, applied: Applied, config: Train) -> torch.optim.Optimizer:
    """One group per (peak learning rate, weight decay); every trained parameter is in exactly one."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if name in applied.trained:
            base = config.head_lr if name.startswith("head.") else config.lr
            decay = 0.0 if name in applied.undecayed else config.weight_decay
            groups.setdefault((base * applied.trained[name], decay), []).append(parameter)
    table = [{"params": params, "peak_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(table, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(table, lr=config.lr, fused=True)  # one pass over memory a step, on every device


def rate_factor(step: int, steps: int, config: Train) -> float:
    """The learning rate at `step` (from 0) relative to its peak: a linear warm-up, then constant or half a cosine to 0."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def predict(model: nn.Module, batches: Batches, autocast: torch.dtype | None = None, *, epoch: int = 0) -> np.ndarray:
    """(n, outputs) of a model in eval mode, in the order of the samples: float32, or float64 where it computes in that."""
    model.eval()
    with mixed(batches.labels.device, autocast):
        parts = [widened(model(batches.fetch(chunk, epoch))).cpu() for chunk in chunks(batches.samples, EVAL_BATCH)]
    return torch.cat(parts).numpy()


@torch.no_grad()
def recalibrate(network: Network, applied: Applied, train: Batches, seed: int) -> None:
    """Recompute the running statistics of the plan's norm layers as averages over one pass of the train samples.

    Samples are drawn in an order of their own: in the order of a folder a batch would hold one class, and its variance
    would lack what lies between classes. Batches are of equal size, so that they weigh the same.
    """
    layers = [network.get_submodule(name) for name in sorted(applied.recalibrated)]
    momenta = []
    network.eval()
    for layer in layers:
        assert isinstance(layer, _NormBase)
        momenta.append(layer.momentum)
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True
    order = np.random.default_rng(seed).permutation(train.samples)
    for part in np.array_split(order, -(-len(order) // EVAL_BATCH)):
        network(train.fetch(part, 1))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.training = False


class Average:
    """An exponential moving average of the trained parameters, with the usual short memory at the start."""

    def __init__(self, network: Network, applied: Applied, decay: float) -> None:
        self.live = [p for name, p in network.named_parameters() if name in applied.trained]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for mean, live in zip(self.mean, self.live, strict=True):
            mean.lerp_(live, 1 - keep)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the network holds the averages."""
        kept = [live.detach().clone() for live in self.live]
        self.keep()
        yield
        self._put(kept)

    def keep(self) -> None:
        """Put the averages into the network for good."""
        self._put(self.mean)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for live, value in zip(self.live, values, strict=True):
            live.copy_(value)
