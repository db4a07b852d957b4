"""Training one network on one process, step by step."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from frostline.collectives import full, gathered, is_part, replicated, share, total, unsynchronised
from frostline.compiling import compiled
from frostline.cuts import widened
from frostline.features import EVAL_BATCH, Fetch, chunks, filled
from frostline.freeze import (
    Applied,
    FreezeError,
    Network,
    check_gradients,
    check_masks,
    enforce,
    fixed_hash,
    train_mode,
    whole,
)
from frostline.head import seed_dropout, show_rows
from frostline.losses import balance, mean_loss
from frostline.metrics import scores
from frostline.outcome import EpochRecord
from frostline.seeds import derive_seed
from frostline.spec import Metric, Train
from frostline.targets import CLASSES, Target
from frostline.world import ALONE, World, mixed

REMEDY = "try a lower learning rate"
VAL_BATCH = 32
"""Samples of a pass that scores val."""


class NonFiniteError(ArithmeticError):
    """A loss that is NaN or infinite."""


@dataclass(frozen=True)
class Batches:
    """The labelled samples of one split, read in mini-batches."""

    fetch: Fetch
    samples: np.ndarray  # (n,) int64 sample numbers
    labels: Tensor  # (n, …) as `Dataset.targets` has them, on the device
    target: Target = CLASSES
    expect: Callable[[np.ndarray], None] = lambda _: None
    """Is told what will be fetched next, sample numbers in their order."""


@dataclass(frozen=True)
class Seeding:
    """The random streams that training draws from."""

    order: int
    dropout: int


def train_epochs(*arguments: Any, **named: Any) -> Iterator[EpochRecord]:
    """Train, and answer the record of each epoch: `Training` without its steps."""
    return (record for record in Training(*arguments, **named).steps() if record)


class Training:
    """One network in training, phase by phase. `steps` may be begun once; after any epoch `checkpoint.save_training` takes all that
    another training of the same making needs to go on from there to the bit (P8)."""

    def __init__(
        self,
        network: Network,
        phases: Sequence[Applied],
        config: Train,
        *,
        train: Batches,
        val: Batches,
        metric: Metric,
        seeding: Seeding,
        autocast: torch.dtype | None,
        clock: Callable[[], float] = time.perf_counter,
        world: World = ALONE,
        micro_batch: int | None = None,
    ) -> None:
        """`clock` answers seconds. Every worker of `world` makes the same training, on all samples."""
        self.network, self.phases, self.config = network, phases, config
        self.train, self.val = train, val
        self.metric: Metric = metric
        self.seeding, self.autocast, self.clock = seeding, autocast, clock
        self.world, self.micro_batch = world, micro_batch
        self.model: nn.Module = network
        """What is called in training steps."""
        self.trained = whole(phases).trained
        self.average = Average(network, self.trained, config.ema) if config.ema is not None else None
        self.pull = Pull(network, self.trained, config.l2_sp) if config.l2_sp else None
        self.blend: Blend | None = None
        self.relative: RelativeNorms | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.order = np.random.default_rng(seeding.order)
        self.per_epoch = -(-len(train.samples) // config.batch_size)
        self.factor = 0.0
        balanced = config.class_weights == "balanced"
        self.weights = balance(train.labels, outputs(network), train.target.task) if balanced else None
        self.records: list[EpochRecord] = []
        self.go_on: Callable[[], None] | None = None
        """Lays what was saved over the first phase that begins."""

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return len(self.records)

    def steps(self) -> Iterator[EpochRecord | None]:
        """Train; yield None after each step of an epoch but its last, and the record after that. Stop by closing it.

        Raises NonFiniteError, or FreezeError where masks, optimizer and gradients do not agree, or a phase has moved what it
        holds fixed.
        """
        seed_dropout(self.network.head, self.seeding.dropout)
        for number, (applied, stretch) in enumerate(
            zip(self.phases, stretches(self.phases, self.config.epochs), strict=True)
        ):
            if stretch.last < self.epoch:
                continue
            self._begin(applied, last=stretch.last == self.config.epochs)
            held = fixed_hash(self.network, applied) if len(self.phases) > 1 else None
            for epoch in range(max(stretch.first, self.epoch + 1), stretch.last + 1):
                started = self.clock()
                train_loss = yield from self._epoch(epoch, applied, stretch)
                self.records.append(self._record(epoch, number, train_loss, started))
                yield self.records[-1]
            if held is not None and fixed_hash(self.network, applied) != held:
                raise FreezeError(f"phase {number} of training moved a tensor that it holds fixed")
        if scored := self.average or self.blend:
            scored.keep()

    def _begin(self, applied: Applied, *, last: bool) -> None:
        """A phase: what it trains, by which optimizer."""
        enforce(self.network, applied)
        compiles = self.config.compile and any(name.startswith("backbone.") for name in applied.trained)
        self.model = replicated(self.world, compiled(self.network) if compiles else self.network)
        before = None if applied.restart else self.optimizer
        self.optimizer = build_optimizer(self.network, applied, self.config, before)
        check_masks(self.network, applied, self.optimizer)
        self.relative = RelativeNorms(self.optimizer) if applied.relative else None
        if last and self.config.wise is not None:
            self.blend = Blend(self.network, self.trained, self.config.wise)
        if self.go_on:
            self.go_on()
            self.go_on = None

    def _epoch(self, epoch: int, applied: Applied, stretch: Stretch) -> Generator[None, None, float]:
        """Train for an epoch; yields between steps and answers the mean training loss."""
        assert self.optimizer is not None
        config, train = self.config, self.train
        first_step, from_step = (self.per_epoch * epochs for epochs in (stretch.first - 1, stretch.from_epoch - 1))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        torch.manual_seed(derive_seed(self.seeding.dropout, "backbone", epoch, self.world.rank))
        train_mode(self.network, applied)
        losses = torch.zeros((), device=train.labels.device)
        batches = list(chunks(self.order.permutation(len(train.samples)), config.batch_size))
        train.expect(train.samples[np.concatenate([batch[share(self.world, len(batch))] for batch in batches])])
        for step, batch in enumerate(batches, (epoch - 1) * self.per_epoch):
            if step % self.per_epoch:
                yield None
            self.optimizer.zero_grad(set_to_none=True)
            losses += self._gradients(batch, epoch)
            if step == first_step:
                check_gradients(self.network, applied)
            if self.pull is not None:
                self.pull.add()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            if self.relative is not None:
                self.relative.take()
            self.factor = rate_factor(step - from_step, self.per_epoch * stretch.scheduled, config)
            for group in self.optimizer.param_groups:
                group["lr"] = self.factor * group["peak_lr"] * group.get("weight", 1.0)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(step)
        train_loss = float(total(self.world, losses)) / len(train.samples)
        if not math.isfinite(train_loss):
            raise NonFiniteError(f"the training loss of epoch {epoch} is {train_loss}; {REMEDY}")
        if self.relative is not None:
            self.relative.settle()
        return train_loss

    def _gradients(self, batch: np.ndarray, epoch: int) -> Tensor:
        """Sum up the gradients of the mean loss over a batch, of this worker's share of it, a piece at a time; answers the sum of
        the losses of that share. A worker that has none takes part with a sample that weighs nothing."""
        train, size = self.train, len(batch)
        own = share(self.world, size)
        pieces = list(_pieces(own, self.micro_batch)) or [slice(0, 1)]
        losses = torch.zeros((), device=train.labels.device)
        for number, piece in enumerate(pieces, 1):
            samples = batch[piece]
            counted = len(samples) if own.start < own.stop else 0
            if self.world.workers > 1 or self.micro_batch:
                show_rows(self.network.head, piece, size, begin=number == 1)
            with nullcontext() if number == len(pieces) else unsynchronised(self.model):
                with mixed(train.labels.device, self.autocast):
                    logits = self.model(train.fetch(train.samples[samples], epoch))
                    smoothing, task = self.config.label_smoothing, train.target.task
                    loss = mean_loss(widened(logits), train.labels[samples], task, smoothing, self.weights)
                (loss * (counted * self.world.workers / size)).backward()
            losses += loss.detach() * counted
        return losses

    def _record(self, epoch: int, phase: int, train_loss: float, started: float) -> EpochRecord:
        """An epoch that has ended, scored on val."""
        eval_started, scored = self.clock(), self.average or self.blend
        with scored.swapped_in() if scored is not None else nullcontext():
            logits = predict(self.network, self.val, self.autocast, world=self.world)
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"validation after epoch {epoch} gives logits that are not finite; {REMEDY}")
        val_scores = scores(logits, self.val.labels.cpu().numpy(), self.metric, target=self.val.target)
        finished = self.clock()
        return EpochRecord(
            epoch=epoch,
            phase=phase,
            train_loss=train_loss,
            val=val_scores,
            val_score=val_scores[self.metric],
            lr=self.factor * self.config.lr,
            head_lr=self.factor * self.config.head_lr,
            images=len(self.train.samples),
            seconds=finished - started,
            eval_seconds=finished - eval_started,
        )


def outputs(network: Network) -> int:
    """How many its head gives."""
    last = network.head[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features


def _pieces(rows: slice, size: int | None) -> Iterator[slice]:
    """Consecutive pieces of at most `size` rows; of no rows, none."""
    step = size or max(1, rows.stop - rows.start)
    return (slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step))


@dataclass(frozen=True)
class Stretch:
    """The epochs of a phase, counted from 1, and the schedule that they are part of."""

    first: int
    last: int
    from_epoch: int
    """At which the schedule begins."""
    scheduled: int
    """Epochs of it."""


def stretches(phases: Sequence[Applied], epochs: int) -> list[Stretch]:
    """When each phase runs; the last one takes all epochs that are left. A schedule goes on over the phases that do not
    restart it."""
    ends = [*accumulate(phase.epochs for phase in phases[:-1]), epochs]
    firsts = [1, *(end + 1 for end in ends[:-1])]
    begins = [first for phase, first in zip(phases, firsts, strict=True) if phase.restart or first == 1]
    found = []
    for first, last in zip(firsts, ends, strict=True):
        begin = max(each for each in begins if each <= first)
        until = min((each for each in begins if each > first), default=epochs + 1)
        found.append(Stretch(first, last, begin, until - begin))
    return found


def build_optimizer(
    network: Network, applied: Applied, config: Train, before: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """One group per (peak learning rate, weight decay), or per tensor where rates follow gradients; every trained parameter is
    in exactly one. What trained under the optimizer `before` keeps its moments."""
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if name in applied.trained:
            head = name.startswith("head.")
            base = config.head_lr if head else config.lr
            decay = 0.0 if name in applied.undecayed else config.weight_decay
            alone = (name,) if applied.relative and not head else ()
            groups.setdefault((base * applied.trained[name], decay, *alone), []).append(parameter)
    table = [
        {"params": params, "peak_lr": lr, "weight_decay": decay, "relative": bool(alone)}
        for (lr, decay, *alone), params in groups.items()
    ]
    if config.optimizer == "sgd":
        fused = not any(is_part(parameter) for group in table for parameter in group["params"])  # not known to PyTorch
        optimizer = torch.optim.SGD(table, lr=config.lr, momentum=config.momentum, fused=fused)
    else:
        optimizer = torch.optim.AdamW(table, lr=config.lr, fused=True)  # one pass over memory a step, on every device
    if before is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.state.update({each: before.state[each] for each in parameters if each in before.state})
        if config.optimizer == "sgd" and config.momentum:  # fused SGD takes a group with all moments or with none
            for parameter in parameters:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    return optimizer


def rate_factor(step: int, steps: int, config: Train) -> float:
    """The learning rate at `step` (from 0) relative to its peak: a linear warm-up, then constant or half a cosine to 0."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Batches,
    autocast: torch.dtype | None = None,
    *,
    epoch: int = 0,
    world: World = ALONE,
    full_batches: bool = False,
) -> np.ndarray:
    """(n, outputs) of a model in eval mode, in the order of the samples: float32, or float64 where it computes in that.

    Workers take batches in turn, the same ones whatever their number, and small, so that shares are even; where there is none left for
    some workers of a sharded network, they pass one for nothing, as it is called by all or by none. With `full_batches` they are of
    EVAL_BATCH, the last one being `filled`, so that a sample gives the same bits whatever others there are.
    """
    model.eval()
    parts = list(chunks(batches.samples, EVAL_BATCH if full_batches else VAL_BATCH))
    own = parts[world.rank :: world.workers]
    idle = -(-len(parts) // world.workers) - len(own) if world.sharded else 0
    batches.expect(np.concatenate([batches.samples[:0], *own]))
    with mixed(batches.labels.device, autocast):
        made = []
        for part in [*own, *parts[:idle]]:
            inputs = batches.fetch(part, epoch)
            made.append(widened(model(filled(inputs) if full_batches else inputs)[: len(part)]).cpu())
    everyone = gathered(world, made)
    return torch.cat(
        [everyone[number % world.workers][number // world.workers] for number in range(len(parts))]
    ).numpy()


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
    train.expect(order)
    for part in np.array_split(order, -(-len(order) // EVAL_BATCH)):
        network(train.fetch(part, 1))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.training = False


class Pull:
    """L2-SP (Li et al. 2018): the gradient of strength / 2 times the squared distance of trained backbone weights from where
    they were."""

    def __init__(self, network: Network, trained: Collection[str], strength: float) -> None:
        parameters = [p for name, p in network.named_parameters() if name in trained and name.startswith("backbone.")]
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self.strength = strength

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the gradients that are there."""
        for parameter, start in self.pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.strength)


class RelativeNorms:
    """Auto-RGN (Lee et al. 2023): each tensor's learning rate is weighted by the norm of its gradient over its own, summed
    over the last epoch's steps (before that, of the first step), the largest being 1. A tensor of zeros has weight 1."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups = [group for group in optimizer.param_groups if group["relative"]]
        self.sums: Tensor | None = None
        self.settled = False

    def take(self) -> None:
        """Take in the gradients of a step."""
        parameters = [group["params"][0] for group in self.groups]
        if not parameters:
            return
        own = torch.stack([full(parameter.detach().norm()) for parameter in parameters])
        found = torch.stack([full(parameter.grad.norm()) for parameter in parameters]) / own  # inf, or NaN, for zeros
        self.sums = found if self.sums is None else self.sums + found
        if not self.settled:
            self.settle()

    def settle(self) -> None:
        """Set the weights by what was taken in since the last time."""
        if self.sums is None:
            return
        finite = self.sums.isfinite()
        largest = self.sums[finite].max() if finite.any() else self.sums.new_ones(())
        weights = torch.where(finite, self.sums / largest.clamp(min=1e-30), 1.0)
        for group, weight in zip(self.groups, weights.tolist(), strict=True):
            group["weight"] = weight
        self.sums, self.settled = None, True


class Scored(ABC):
    """Other values of the trained parameters than the live ones, which are scored and saved in their place."""

    def __init__(self, network: Network, trained: Collection[str]) -> None:
        self.live = [p for name, p in network.named_parameters() if name in trained]
        self.held = [p.detach().clone() for p in self.live]

    @abstractmethod
    def values(self) -> Sequence[Tensor]:
        """Those."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the network holds them."""
        kept = [live.detach().clone() for live in self.live]
        self.keep()
        yield
        self._put(kept)

    def keep(self) -> None:
        """Put them into the network for good."""
        self._put(self.values())

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for live, value in zip(self.live, values, strict=True):
            live.copy_(value)


class Average(Scored):
    """An exponential moving average of the trained parameters, with the usual short memory at the start."""

    def __init__(self, network: Network, trained: Collection[str], decay: float) -> None:
        super().__init__(network, trained)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for mean, live in zip(self.held, self.live, strict=True):
            mean.lerp_(live, 1 - keep)

    def values(self) -> Sequence[Tensor]:
        """The averages."""
        return self.held


class Blend(Scored):
    """WiSE-FT (Wortsman et al. 2022): weights between where they were (0) and where they are (1)."""

    def __init__(self, network: Network, trained: Collection[str], share: float) -> None:
        super().__init__(network, trained)
        self.share = share

    @torch.no_grad()
    def values(self) -> Sequence[Tensor]:
        """Those between."""
        return [torch.lerp(start, live, self.share) for start, live in zip(self.held, self.live, strict=True)]
