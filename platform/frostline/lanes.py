"""Many heads on the same features, trained as one batched program. Each head is a lane.

A lane gives what `train_epochs` gives for it alone. Lanes of one kind (width, optimizer, …) are stacked into blocks: the
matrix products of a block are one product over all its lanes, and the gradient of the loss and the optimizers' steps are
written out over the stacked tensors, with a coefficient per lane. L lanes, B samples, D features, H hidden units and
C classes; activations are kept as (L, H, B), so that a layer of all lanes is one product with the features of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from frostline.features import EVAL_BATCH, chunks, widened
from frostline.head import SeededDropout, seed_dropout
from frostline.losses import balance, label_weights, softened
from frostline.metrics import scores
from frostline.outcome import EpochRecord
from frostline.spec import Metric, Task, Train
from frostline.training import REMEDY, Batches, NonFiniteError, rate_factor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # what torch.optim.AdamW takes by default
CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
BLOCK_ROWS = 640
NUMBERS = 1 << 28
"""The largest table of activations or logits of many lanes: 1 GiB in float32."""
FUSED = 4096
"""On a CPU, weights of a lane from this many on are stepped by PyTorch's fused AdamW, lane by lane: one pass over memory
where operations over all lanes take seven, a third of the time for a linear head of 1,280 features and more for wider ones.
Below, the calls cost more than the passes."""
VISIT = 8
"""Mini-batches that a block trains on before the next block does, while its weights and moments lie in the caches."""


@dataclass(frozen=True)
class Lane:
    """A head and how to train it."""

    head: nn.Sequential
    """As `build_head` makes it, on the device. It holds the lane's weights again once the lane has ended: their average
    where the lane has one and has gone through all its epochs, as `train_epochs` leaves it."""
    config: Train
    """`batch_size` must be that of all lanes; `lr` moves nothing here, and `precision` is `autocast`."""
    dropout_seed: int

    @property
    def dropout(self) -> SeededDropout:
        """The layer before the last."""
        dropout = self.head[-2]
        assert isinstance(dropout, SeededDropout)
        return dropout


def lanes_together(rows: int, samples: int, device: str) -> int:
    """How many lanes make a block, where each adds `rows` activations per sample: the outputs of its widest layer, or its
    own inputs where dropout varies them; `samples` is the most that a table of activations holds.

    On a CPU as many as fill `BLOCK_ROWS`, so that a lane that fills them alone trains alone, without autograd's cost.
    Measured on one core of a Zen 4 with 1,280 features and batches of 128: a product of 10 rows runs at 60 GFLOP/s, of 40
    at 91, and from 160 on at 100, which is all there is, so that wide heads gain by the optimizer's step alone; larger
    blocks only take memory. On a GPU, where launches are the cost, as many as `NUMBERS` allows.
    """
    return max(1, BLOCK_ROWS // rows if device == "cpu" else NUMBERS // (rows * samples))


def train_lanes(
    lanes: Sequence[Lane],
    *,
    train: Batches,
    val: Batches,
    metric: Metric,
    order_seed: int,
    autocast: torch.dtype | None,
) -> Generator[dict[int, EpochRecord | NonFiniteError], Collection[int] | None, None]:
    """Train all lanes; after each epoch yield the record of each lane that trained in it, by its number, or the error
    that ended it. Send the numbers of those that are to stop.

    Lanes that have failed, stopped or gone through their epochs take no part in what follows, and cost nothing. The time
    of an epoch is split over the lanes that trained in it in proportion to their parameters, and so to their arithmetic.
    """
    batch_size, samples = lanes[0].config.batch_size, len(train.samples)
    assert all(lane.config.batch_size == batch_size for lane in lanes)
    order, per_epoch = np.random.default_rng(order_seed), -(-samples // batch_size)
    most, truth = max(batch_size, len(val.samples)), val.labels.cpu().numpy()
    dtype = autocast or next(lanes[0].head.parameters()).dtype
    for lane in lanes:
        seed_dropout(lane.head, lane.dropout_seed)
    blocks = _grouped([_block_of(number, lane) for number, lane in enumerate(lanes)], most)
    epoch = 0
    try:
        while blocks:
            epoch += 1
            started = time.perf_counter()
            losses = _train_epoch(blocks, train, order.permutation(samples), epoch, dtype)
            eval_started = time.perf_counter()
            found: dict[int, dict[Metric, float]] = {}
            news: dict[int, EpochRecord | NonFiniteError] = {}
            for number, logits in _predictions(blocks, val, dtype):
                if not math.isfinite(losses[number]):
                    what = f"the training loss of epoch {epoch} is {losses[number]}"
                elif not np.isfinite(logits).all():
                    what = f"validation after epoch {epoch} gives logits that are not finite"
                else:
                    found[number] = scores(logits, truth, metric, target=val.target)
                    continue
                news[number] = NonFiniteError(f"{what}; {REMEDY}")
            ended = time.perf_counter()
            sizes = {number: sum(p.numel() for p in lanes[number].head.parameters()) for number in losses}
            for number, val_scores in found.items():
                config, share = lanes[number].config, sizes[number] / sum(sizes.values())
                factor = rate_factor(epoch * per_epoch - 1, config.epochs * per_epoch, config)
                news[number] = EpochRecord(
                    epoch=epoch,
                    train_loss=losses[number],
                    val=val_scores,
                    val_score=val_scores[metric],
                    lr=factor * config.lr,
                    head_lr=factor * config.head_lr,
                    images=samples,
                    seconds=(ended - started) * share,
                    eval_seconds=(ended - eval_started) * share,
                )
            through = {number for number in found if epoch == lanes[number].config.epochs}
            blocks = _without(blocks, through | (news.keys() - found.keys()), most, averaged=through)
            blocks = _without(blocks, (yield dict(sorted(news.items()))) or (), most)
    finally:
        _without(blocks, range(len(lanes)), most)


_Stack = dict[str, Tensor]
"""A parameter of each lane of a block, `value`, and what goes with it, (L, …) each: `first`, AdamW's mean of the gradients
or SGD's momentum; `second`, AdamW's mean of their squares; `average`, what is scored of a lane with an average."""


@dataclass(frozen=True)
class _Block:
    """Lanes of one kind."""

    lanes: dict[int, Lane]
    """By their numbers, in the order in which they are stacked."""
    stacks: list[_Stack]
    """In the order of a head's parameters: weight (L, outputs, inputs) and bias (L, outputs) of each layer."""

    @property
    def any(self) -> Lane:
        """One of the lanes; `kind` says what they have in common."""
        return next(iter(self.lanes.values()))

    def kind(self) -> tuple[Any, ...]:
        """What the lanes of a block have in common."""
        config, shapes = self.any.config, (stack["value"].shape[1:] for stack in self.stacks)
        extras = config.label_smoothing > 0, config.clip_norm is not None, config.ema is not None, config.class_weights
        return *shapes, config.optimizer, *extras, self.any.dropout.p > 0

    def each(self) -> Iterator[tuple[int, _Block]]:
        """Each lane as a block, which is a view of this one."""
        for row, (number, lane) in enumerate(self.lanes.items()):
            stacks = [{name: tensor[row : row + 1] for name, tensor in stack.items()} for stack in self.stacks]
            yield number, _Block({number: lane}, stacks)


def _block_of(number: int, lane: Lane) -> _Block:
    def stack(parameter: nn.Parameter) -> _Stack:
        value = parameter.detach()[None]
        second = {"second": torch.zeros_like(value)} if lane.config.optimizer == "adamw" else {}
        average = {"average": value} if lane.config.ema is not None else {}
        return {"value": value, "first": torch.zeros_like(value)} | second | average

    return _Block({number: lane}, [stack(parameter) for parameter in lane.head.parameters()])


def _grouped(singles: Iterable[_Block], samples: int) -> list[_Block]:
    """Blocks of one lane each, copied into blocks of the size that `lanes_together` says."""
    kinds: dict[tuple[Any, ...], list[_Block]] = {}
    for single in singles:
        kinds.setdefault(single.kind(), []).append(single)
    blocks = []
    for same in kinds.values():
        weight, classes = same[0].stacks[0]["value"], same[0].stacks[-1]["value"].shape[1]
        own_inputs = len(same[0].stacks) == 2 and same[0].any.dropout.p
        size = lanes_together(max(classes, weight.shape[2 if own_inputs else 1]), samples, weight.device.type)
        for group in (same[start : start + size] for start in range(0, len(same), size)):
            stacks = [
                {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                for parts in zip(*(single.stacks for single in group), strict=True)
            ]
            blocks.append(_Block({number: lane for single in group for number, lane in single.lanes.items()}, stacks))
    return blocks


def _without(
    blocks: list[_Block], leaving: Collection[int], samples: int, *, averaged: Collection[int] = ()
) -> list[_Block]:
    """The blocks less some lanes, whose weights, or averages of them, go back into their heads."""
    gone = {number for block in blocks for number in block.lanes if number in leaving}
    if not gone:
        return blocks
    singles = {number: single for block in blocks for number, single in block.each()}
    for number in gone:
        single = singles.pop(number)
        what = "average" if number in averaged and single.any.config.ema is not None else "value"
        for parameter, stack in zip(single.any.head.parameters(), single.stacks, strict=True):
            parameter.detach().copy_(stack[what][0])
    return _grouped(singles.values(), samples)


class _Batch(NamedTuple):
    """A mini-batch, the same for all lanes."""

    features: Tensor  # (B, D)
    truth: Tensor  # (C, B): 1 at the class or the labels, else 0; or the numbers of a regression
    weights: (
        Tensor | None
    )  # (B,) or (C, B): how much each sample's loss, or each label's, weighs where they are balanced
    labels: Tensor  # (B, …)
    task: Task


def _train_epoch(
    blocks: Sequence[_Block], train: Batches, order: np.ndarray, epoch: int, dtype: torch.dtype
) -> dict[int, float]:
    """Train all blocks on the same mini-batches; the mean loss of each lane by its number."""
    batches = list(chunks(order, blocks[0].any.config.batch_size))
    first_step = (epoch - 1) * len(batches)
    tables = [_coefficients(block, first_step, len(batches)) for block in blocks]
    totals = [torch.zeros(len(block.lanes), device=train.labels.device) for block in blocks]
    classes = blocks[0].stacks[-1]["value"].shape[1]
    task = train.target.task
    weights = balance(train.labels, classes, task) if task != "regression" else None

    def fetch(batch: np.ndarray) -> _Batch:
        features, labels = train.fetch(train.samples[batch], epoch), train.labels[batch]
        of_classes = task == "classification"
        truth = (functional.one_hot(labels, classes) if of_classes else labels).T.to(features.dtype).contiguous()
        if weights is None:
            return _Batch(features, truth, None, labels, task)
        weigh = weights[labels] if of_classes else label_weights(labels, weights).T
        return _Batch(features, truth, weigh.to(features.dtype), labels, task)

    for start in range(0, len(batches), VISIT):
        visit = [fetch(batch) for batch in batches[start : start + VISIT]]
        for block, (table, rates), total in zip(blocks, tables, totals, strict=True):
            for step, batch in enumerate(visit, start):
                *of_optimizer, smoothing = table[step]
                loss, gradients = _backward(block, batch, smoothing, dtype)
                total += loss * len(batch.labels)
                _update(block, gradients, of_optimizer, rates[step], first_step + step + 1)
    return {
        number: total / len(train.samples)
        for block, of_block in zip(blocks, totals, strict=True)
        for number, total in zip(block.lanes, of_block.tolist(), strict=True)
    }


def _coefficients(block: _Block, first_step: int, steps: int) -> tuple[Tensor, list[list[float]]]:
    """(steps, 6, L, 1): for each step of an epoch what the lanes' configurations say. Minus the learning rate, with AdamW's
    bias corrections; what AdamW leaves of a weight, or SGD's L2 penalty; momentum; the share of the new weights in their
    average; the limit of the gradient's norm; label smoothing. And the plain learning rates, (steps, L)."""
    configs, numbers = [lane.config for lane in block.lanes.values()], np.arange(first_step, first_step + steps)
    schedules = {(c.warmup, c.schedule, c.epochs): c for c in configs}
    factors = {key: [rate_factor(n, c.epochs * steps, c) for n in numbers.tolist()] for key, c in schedules.items()}

    def rates(config: Train) -> np.ndarray:
        return config.head_lr * np.array(factors[config.warmup, config.schedule, config.epochs])

    def of(config: Train) -> np.ndarray:
        rate = -rates(config)
        decay = config.weight_decay
        if config.optimizer == "adamw":
            decay = 1 + rate * config.weight_decay
            rate = rate * np.sqrt(1 - BETA2 ** (numbers + 1)) / (1 - BETA1 ** (numbers + 1))
        blend = 1 - np.minimum(config.ema or 0, (1 + numbers) / (10 + numbers))
        constants = config.clip_norm or 0, config.label_smoothing
        return np.stack(np.broadcast_arrays(rate, decay, config.momentum, blend, *constants))

    table, value = np.stack([of(config) for config in configs]), block.stacks[0]["value"]  # (L, 6, steps)
    plain = np.stack([rates(config) for config in configs], axis=1).tolist()
    return torch.from_numpy(table.transpose(2, 1, 0)[..., None].copy()).to(value), plain


def _logits(
    values: Sequence[Tensor], features: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(L, C, B) logits of (B, D) features; the last layer's inputs (L, H or D, B), None where they are the features
    themselves; the hidden activations (L, H, B) of an MLP. `noise` is what dropout multiplies those inputs by."""
    *first, weight, bias = values
    hidden = None
    if first:
        hidden = _shared_layer(first[0], first[1], features).relu_()
        inputs = hidden if noise is None else hidden * noise
    elif noise is None:
        return _shared_layer(weight, bias, features), None, None
    else:
        inputs = (features.mT * noise).to(weight.dtype)
    return torch.baddbmm(bias[..., None], weight, inputs), inputs, hidden


def _shared_layer(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """(L, outputs, B) of (B, D) features, which all lanes share: one product."""
    outputs = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), features.to(weight.dtype).mT)
    return outputs.view(*bias.shape, -1)


def _backward(block: _Block, batch: _Batch, smoothing: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The mean loss (L,) of each lane over a mini-batch, and its gradient by each parameter."""
    values = [stack["value"].to(dtype) for stack in block.stacks]
    weight, features = values[-2], batch.features
    noise = None
    if block.any.dropout.p:  # each lane draws in the shape (B, H or D), as it does alone
        like = features if len(values) == 2 else features.new_empty((len(features), weight.shape[2]), dtype=dtype)
        noise = torch.stack([lane.dropout.noise(like) for lane in block.lanes.values()]).mT
    logits, inputs, hidden = _logits(values, features, noise)
    config = block.any.config
    weights = batch.weights if config.class_weights == "balanced" else None
    loss, gradient = _LOSSES[batch.task](widened(logits), batch, smoothing if config.label_smoothing else None, weights)

    gradient, features = gradient.to(dtype), features.to(dtype)
    by_weight = torch.tensordot(gradient, features, 1) if inputs is None else gradient @ inputs.mT
    gradients = [by_weight, gradient.sum(2)]
    if hidden is not None:
        back = weight.mT @ gradient
        if noise is not None:
            back *= noise
        back *= hidden.sign()  # relu's
        gradients = [torch.tensordot(back, features, 1), back.sum(2), *gradients]
    return loss, [each.to(stack["value"].dtype) for each, stack in zip(gradients, block.stacks, strict=True)]


def _of_classes(
    logits: Tensor, batch: _Batch, smoothing: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy (L,) of (L, C, B) logits, of which samples may weigh (B,), and its gradient by them."""
    lanes, classes, samples = logits.shape
    likely, truth = functional.log_softmax(logits, 1), batch.truth
    losses = -likely.gather(1, batch.labels.expand(lanes, 1, samples))
    if weights is not None:
        losses = losses * weights
    loss = losses.mean((1, 2))
    if smoothing is not None:
        spread = likely if weights is None else likely * weights
        loss = (1 - smoothing[:, 0]) * loss - smoothing[:, 0] * spread.mean((1, 2))
        truth = torch.lerp(truth, truth.new_tensor(1 / classes), smoothing[..., None])
    gradient = likely.exp_().sub_(truth).div_(samples)
    return loss, gradient if weights is None else gradient.mul_(weights)


def _of_labels(
    logits: Tensor, batch: _Batch, smoothing: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of the binary cross-entropy, the mean over labels, each of which may weigh (C, B)."""
    truth = batch.truth if smoothing is None else softened(batch.truth, smoothing[..., None])
    losses, gradient = functional.softplus(logits) - logits * truth, logits.sigmoid().sub_(truth)
    if weights is not None:
        losses, gradient = losses * weights, gradient.mul_(weights)
    return losses.mean((1, 2)), gradient.div_(truth.shape[-2] * truth.shape[-1])


def _of_numbers(outputs: Tensor, batch: _Batch, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of the squared error."""
    errors = outputs - batch.truth
    return errors.square().mean((1, 2)), errors.mul_(2 / batch.truth.numel())


_LOSSES = {"classification": _of_classes, "multilabel": _of_labels, "regression": _of_numbers}


def _update(
    block: _Block, gradients: Sequence[Tensor], coefficients: Sequence[Tensor], rates: Sequence[float], step: int
) -> None:
    """The optimizer's step, counted from 1, at the lanes' plain `rates`, and the averages'. Uses up the gradients."""
    (rate, decay, momentum, blend, clip), config, shrink = coefficients, block.any.config, None
    if config.clip_norm is not None:
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
        shrink = (clip / (torch.linalg.vector_norm(norms, dim=0)[:, None] + CLIP_EPS)).clamp(max=1)
    for stack, by_value in zip(block.stacks, gradients, strict=True):
        value, first, gradient = (each.flatten(1) for each in (stack["value"], stack["first"], by_value))
        decayed = by_value.ndim == 3  # weights, not biases
        if shrink is not None:
            gradient *= shrink
        if config.optimizer == "sgd":
            if decayed:
                gradient.addcmul_(value, decay)
            first.mul_(momentum).add_(gradient)
            value.addcmul_(first, rate)
        elif decayed and value.device.type == "cpu" and value.shape[1] >= FUSED:
            _fused_step(block, stack, by_value, rates, step)
        else:
            second = stack["second"].flatten(1)
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            torch.sqrt(second, out=gradient).add_(EPS * math.sqrt(1 - BETA2**step))
            torch.div(first, gradient, out=gradient).mul_(rate)
            if decayed:
                value *= decay
            value += gradient
        if config.ema is not None:
            stack["average"].flatten(1).lerp_(value, blend)


def _fused_step(block: _Block, stack: _Stack, gradient: Tensor, rates: Sequence[float], step: int) -> None:
    """AdamW's step of one weight, lane by lane, by the kernel of torch.optim.AdamW(fused=True)."""
    number = torch.tensor(float(step))
    parts = zip(stack["value"], gradient, stack["first"], stack["second"], strict=True)
    for lane, rate, (value, slope, first, second) in zip(block.lanes.values(), rates, parts, strict=True):
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage] (what torch.optim calls)
            *([value], [slope], [first], [second], [], [number]),
            lr=rate,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=lane.config.weight_decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )


def _predictions(blocks: Sequence[_Block], val: Batches, dtype: torch.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Of each lane its number and the (n, C) logits of the validation samples, in float32 at least. One pass a block: what
    the lanes of all blocks say at once may not fit into memory."""
    for block in blocks:
        values = [stack.get("average", stack["value"]).to(dtype) for stack in block.stacks]
        parts = [widened(_logits(values, val.fetch(chunk, 0), None)[0]) for chunk in chunks(val.samples, EVAL_BATCH)]
        yield from zip(block.lanes, torch.cat(parts, 2).mT.cpu().numpy(), strict=True)
