"""Lanes: each gives what it gives alone, whatever trains beside it, and costs nothing once it has ended."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from frostline import lanes as lanes_module
from frostline.backbone import Backbone, load_backbone
from frostline.freeze import Network, apply_plan, compile_plan
from frostline.head import build_head, set_probe
from frostline.lanes import Lane, lanes_together, train_lanes
from frostline.outcome import EpochRecord
from frostline.spec import BackboneSpec, Freeze, Head, Metric, Task, Train
from frostline.targets import Target
from frostline.testing import TOY_BACKBONE
from frostline.training import Batches, NonFiniteError, Seeding, predict, train_epochs

CLASSES = 3
LINEAR = Head()
DIVERGING = Train(
    optimizer="sgd", momentum=0, head_lr=10, weight_decay=1, warmup=0, schedule="constant", epochs=60, batch_size=16
)
"""Weights are multiplied by -9 in every step."""

News = dict[int, EpochRecord | NonFiniteError]


@functools.cache
def no_backbone() -> Backbone:
    """What is left of a backbone for a head that trains on features."""
    toy = load_backbone(BackboneSpec(name=TOY_BACKBONE, weights="random"), image_size=16)
    return dataclasses.replace(toy, module=nn.Identity(), stages=(), module_stage={})


def problem(
    n: int,
    features: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1,
    task: Task = "classification",
) -> Batches:
    """Features whose mean depends on the class, labels in no order; samples are numbered from 100."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    table = torch.from_numpy(scale * (rng.normal(size=(n, features)) + np.eye(CLASSES, features)[labels])).to(dtype)
    if task == "multilabel":
        labels = rng.integers(0, 2, (n, CLASSES)).astype(np.float32)
    elif task == "regression":
        labels = rng.normal(size=(n, 1)).astype(np.float32)
    target = Target(task, 30.0, 2.0) if task == "regression" else Target(task)
    samples = np.arange(n) + 100
    return Batches(lambda wanted, _: table[torch.from_numpy(wanted) - 100], samples, torch.tensor(labels), target)


def lane(
    config: Train,
    head: Head = LINEAR,
    seed: int = 0,
    features: int = 6,
    dtype: torch.dtype = torch.float64,
    outputs: int = CLASSES,
) -> Lane:
    return Lane(build_head(head, features, outputs, seed).to(dtype), config, dropout_seed=seed)


def metric_of(batches: Batches) -> Metric:
    return "rmse" if batches.target.task == "regression" else "nll"


def alone(
    one: Lane, train: Batches, val: Batches, stop: int | None = None, autocast: torch.dtype | None = None
) -> tuple[list[EpochRecord | NonFiniteError], nn.Sequential]:
    """What `train_epochs` gives for a copy of the lane, which is stopped after an epoch unless that is its last."""
    network = Network(nn.Identity(), copy.deepcopy(one.head))
    (applied,) = apply_plan(compile_plan(Freeze(strategy="linear_probe"), ()), network, no_backbone())
    records: list[EpochRecord | NonFiniteError] = []
    epochs = train_epochs(
        network,
        [applied],
        one.config,
        train=train,
        val=val,
        metric=metric_of(val),
        seeding=Seeding(order=7, dropout=one.dropout_seed),
        autocast=autocast,
    )
    try:
        for record in epochs:
            records.append(record)
            if record.epoch == stop and stop < one.config.epochs:
                break
    except NonFiniteError as error:
        records.append(error)
    return records, network.head


def start(lanes: Sequence[Lane], train: Batches, val: Batches, autocast: torch.dtype | None = None):
    return train_lanes(lanes, train=train, val=val, metric=metric_of(val), order_seed=7, autocast=autocast)


def together(
    lanes: Sequence[Lane],
    train: Batches,
    val: Batches,
    stops: dict[int, int] | None = None,
    autocast: torch.dtype | None = None,
) -> list[list[EpochRecord | NonFiniteError]]:
    """What each lane of a pack yields; `stops` says after which epoch a lane is stopped."""
    found: list[list[EpochRecord | NonFiniteError]] = [[] for _ in lanes]
    program, stop = start(lanes, train, val, autocast), None
    for epoch in range(1, 1000):
        try:
            news = program.send(stop)
        except StopIteration:
            break
        for number, record in news.items():
            found[number].append(record)
        stop = {number for number, last in (stops or {}).items() if last == epoch and number in news}
    return found


def assert_same(
    mine: Sequence[EpochRecord | NonFiniteError], theirs: Sequence[EpochRecord | NonFiniteError], tolerance: float
) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, NonFiniteError) or isinstance(b, NonFiniteError):
            assert (type(a), str(a)) == (type(b), str(b))
            continue
        assert (a.epoch, a.images, a.lr, a.head_lr) == (b.epoch, b.images, b.lr, b.head_lr)
        assert a.train_loss == pytest.approx(b.train_loss, rel=tolerance, abs=tolerance)
        assert a.val_score == pytest.approx(b.val_score, rel=tolerance, abs=tolerance)
        assert a.val_loss == pytest.approx(b.val_loss, rel=tolerance, abs=tolerance)
        assert a.val.keys() == b.val.keys()


def assert_same_weights(mine: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def shares(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


TASKS: list[Task] = ["classification", "multilabel", "regression"]
UNWEIGHED = {"label_smoothing": 0.0, "class_weights": "none"}
"""As the jobs of regressions must have it."""
HEADS = st.builds(
    Head,
    hidden=st.sampled_from([0, 0, 1, 3, 8]),
    dropout=st.sampled_from([0.0, 0.0, 0.1, 0.6]),
    init=st.sampled_from(["random", "zero"]),
)
CONFIGS = st.builds(
    Train,
    optimizer=st.sampled_from(["adamw", "sgd"]),
    head_lr=st.sampled_from([1e-4, 3e-3, 0.02, 0.1]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    epochs=st.integers(1, 4),
    warmup=st.sampled_from([0.0, 0.1, 0.5]),
    schedule=st.sampled_from(["cosine", "constant"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    class_weights=st.sampled_from(["none", "none", "balanced"]),
    clip_norm=st.sampled_from([None, 0.05, 1.0, 100.0]),
    ema=st.sampled_from([None, 0.5, 0.99]),
)


@settings(max_examples=100)
@given(st.data())
def test_a_lane_gives_what_it_gives_alone(data: st.DataObject) -> None:
    """P4 in float64: losses, scores and weights, in any company, and whenever a lane stops.

    Except where AdamW stands on a stationary point, as a zero head with dead hidden units does under balanced weights in
    whole-set batches: its step is lr / eps times a gradient near zero, and rounding grows a thousandfold in every step."""
    task = data.draw(st.sampled_from(TASKS))
    train, val = problem(data.draw(st.integers(2, 30)), task=task), problem(9, seed=1, task=task)
    batch_size, rows = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 7, 20, 640]))
    drawn = data.draw(st.lists(st.tuples(HEADS, CONFIGS), min_size=1, max_size=6))
    lanes = [
        lane(
            config.model_copy(update={"batch_size": batch_size, **(UNWEIGHED if task == "regression" else {})}),
            head,
            seed=number,
            outputs=1 if task == "regression" else CLASSES,
        )
        for number, (head, config) in enumerate(drawn)
        if not (head.init == "zero" and config.class_weights == "balanced")
    ]
    assume(lanes)
    stops = data.draw(st.dictionaries(st.integers(0, len(lanes) - 1), st.integers(1, 3)))
    expected = [alone(one, train, val, stops.get(number)) for number, one in enumerate(lanes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes_module, "BLOCK_ROWS", rows)
        found = together(lanes, train, val, stops)
    for one, mine, (theirs, head) in zip(lanes, found, expected, strict=True):
        assert_same(mine, theirs, 1e-6)
        assert_same_weights(one.head, head, 1e-6)


def mixture(dtype: torch.dtype, features: int = 64) -> list[Lane]:
    """A lane of every kind, with learning rates that a search would draw."""
    rng = np.random.default_rng(0)
    kinds = [
        (hidden, optimizer, dropout, extras)
        for hidden in (0, 16, 64)
        for optimizer in ("adamw", "sgd")
        for dropout in (0.0, 0.3)
        for extras in ({}, {"label_smoothing": 0.1, "clip_norm": 0.5, "ema": 0.9})
    ]
    return [
        lane(
            Train(
                optimizer=optimizer,
                epochs=6,
                batch_size=32,
                head_lr=float(10 ** rng.uniform(-3.5, -1.5)),
                weight_decay=float(10 ** rng.uniform(-4, -1)),
                **extras,
            ),
            Head(hidden=hidden, dropout=dropout),
            number,
            features,
            dtype,
        )
        for number, (hidden, optimizer, dropout, extras) in enumerate(kinds)
    ]


def test_in_float32_logits_agree_to_5e_5_and_lanes_rank_alike() -> None:
    train, val = problem(500, 64, torch.float32), problem(200, 64, torch.float32, seed=1)
    lanes = mixture(torch.float32)
    expected = [alone(one, train, val) for one in lanes]
    found = together(lanes, train, val)
    for one, mine, (theirs, head) in zip(lanes, found, expected, strict=True):
        assert_same(mine, theirs, 2e-5)
        np.testing.assert_allclose(predict(one.head, val), predict(head, val), rtol=0, atol=5e-5)
    for metric in ("nll", "accuracy"):
        ours, theirs = ([row[-1].val[metric] for row in rows] for rows in (found, [records for records, _ in expected]))
        assert np.argsort(ours, kind="stable").tolist() == np.argsort(theirs, kind="stable").tolist()


def test_in_bfloat16_logits_agree_to_its_precision() -> None:
    train, val = problem(200, 64, torch.float32), problem(100, 64, torch.float32, seed=1)
    lanes = mixture(torch.float32)
    expected = [alone(one, train, val, autocast=torch.bfloat16) for one in lanes]
    found = together(lanes, train, val, autocast=torch.bfloat16)
    for one, mine, (theirs, head) in zip(lanes, found, expected, strict=True):
        assert_same(mine, theirs, 0.02)
        ours, alone_ = predict(one.head, val), predict(head, val)
        assert np.abs(ours - alone_).max() < 0.05 * np.abs(alone_).max()


@pytest.mark.fault(34)
@pytest.mark.parametrize(("scale", "reason"), [(1, "the training loss of epoch"), (1e6, "validation after epoch")])
def test_a_lane_that_diverges_fails_alone(scale: float, reason: str) -> None:
    train, val = problem(16, dtype=torch.float32), problem(50, dtype=torch.float32, seed=1, scale=scale)
    healthy = Train(epochs=60, batch_size=16, head_lr=0.01)
    lanes = [lane(healthy, seed=number, dtype=torch.float32) for number in range(4)]
    lanes.insert(2, lane(DIVERGING, dtype=torch.float32))
    lanes.insert(4, lane(DIVERGING.model_copy(update={"optimizer": "adamw"}), dtype=torch.float32))
    expected = [alone(one, train, val) for one in lanes]
    found = together(lanes, train, val)
    for number, (one, mine, (theirs, head)) in enumerate(zip(lanes, found, expected, strict=True)):
        if number in (2, 4):
            assert isinstance(mine[-1], NonFiniteError)
            assert str(mine[-1]) == str(theirs[-1])
            assert len(mine) == len(theirs) < 60
            assert number != 2 or str(mine[-1]).startswith(reason)
        else:
            assert_same(mine, theirs, 2e-5)
            np.testing.assert_allclose(predict(one.head, train), predict(head, train), rtol=0, atol=5e-5)


def test_a_lane_that_has_ended_costs_nothing() -> None:
    """Arithmetic of each epoch, counted: six lanes, of which two stop, one has fewer epochs and one diverges."""
    train, val = problem(64, dtype=torch.float32), problem(32, dtype=torch.float32, seed=1)
    long, short = Train(epochs=40, batch_size=16), Train(epochs=3, batch_size=16)
    lanes = [
        lane(config, seed=seed, dtype=torch.float32) for seed, config in enumerate([long] * 4 + [short, DIVERGING])
    ]
    program, stop, spent, live = start(lanes, train, val), None, [], []
    for epoch in range(1, 41):
        with FlopCounterMode(display=False) as counter:
            news = program.send(stop)
        spent.append(counter.get_total_flops())
        live.append(len(news))
        stop = {0, 3} if epoch == 2 else None
    one = 2 * (64 + 64 + 32) * 6 * CLASSES  # forward, by the weights, validation
    assert spent == [one * count for count in live]
    assert live[:4] == [6, 6, 4, 3]
    assert live[-1] == 2
    with pytest.raises(StopIteration):
        next(program)


def test_weights_are_back_in_the_head_when_a_lane_ends() -> None:
    """A lane that has gone through its epochs holds its average; one that was stopped, or the program closed, what it
    had, as `train_epochs` leaves it."""
    train, val = problem(20), problem(9, seed=1)
    config = Train(epochs=3, batch_size=8, ema=0.9, head_lr=0.05)
    lanes = [lane(config.model_copy(update={"epochs": epochs}), seed=epochs) for epochs in (2, 3, 3)]
    before = copy.deepcopy(lanes[2].head)
    through, stopped, closed = (alone(one, train, val, stop)[1] for one, stop in zip(lanes, (None, 1, 2), strict=True))
    program = start(lanes, train, val)
    next(program)
    assert_same_weights(lanes[2].head, before, 0)
    program.send([1])
    assert_same_weights(lanes[0].head, through, 1e-9)  # with its last record
    assert_same_weights(lanes[1].head, stopped, 1e-9)
    program.close()
    assert_same_weights(lanes[2].head, closed, 1e-9)
    assert all(parameter.requires_grad for one in lanes for parameter in one.head.parameters())


def test_a_head_that_starts_at_the_probe_starts_there() -> None:
    train, val = problem(60), problem(30, seed=1)
    one = lane(Train(epochs=1, batch_size=60, head_lr=1e-12))
    set_probe(one.head, train.fetch(train.samples, 1), train.labels)
    probe = copy.deepcopy(one.head)
    together([one], train, val)
    assert_same_weights(one.head, probe, 1e-9)


def test_train_features_are_fetched_once_for_all_lanes_and_val_once_a_block() -> None:
    train, val = problem(20), problem(9, seed=1)
    asked: list[tuple[int, list[int]]] = []

    def watched(batches: Batches) -> Batches:
        def fetch(wanted: np.ndarray, epoch: int) -> Tensor:
            asked.append((epoch, wanted.tolist()))
            return batches.fetch(wanted, epoch)

        return Batches(fetch, batches.samples, batches.labels)

    config = Train(epochs=2, batch_size=8)
    alone(lane(config), watched(train), watched(val))
    expected = asked.copy()
    assert [epoch for epoch, _ in expected] == [1, 1, 1, 0, 2, 2, 2, 0]
    asked.clear()
    lanes = [lane(config, Head(hidden=hidden), seed) for seed, hidden in enumerate((0, 4, 0, 4))]
    together(lanes, watched(train), watched(val))
    assert asked == [ask for ask in expected for _ in range(1 if ask[0] else 2)]


def test_the_time_of_an_epoch_is_split_by_the_lanes_parameters() -> None:
    train, val = problem(200), problem(50, seed=1)
    lanes = [lane(Train(epochs=2, batch_size=8), Head(hidden=hidden)) for hidden in (0, 0, 8)]
    started = time.perf_counter()
    program = start(lanes, train, val)
    records = [record for record in next(program).values() if isinstance(record, EpochRecord)]
    elapsed = time.perf_counter() - started
    seconds = [record.seconds for record in records]
    assert seconds[0] == seconds[1]
    assert seconds[2] / seconds[0] == pytest.approx((6 * 8 + 8 + 8 * 3 + 3) / (6 * 3 + 3))
    assert 0.5 * elapsed < sum(seconds) < elapsed
    assert all(0 < record.eval_seconds < record.seconds for record in records)


def test_blocks_are_as_large_as_pays_and_as_memory_allows() -> None:
    assert [lanes_together(rows, 128, "cpu") for rows in (1, 10, 64, 256, 641)] == [640, 64, 10, 2, 1]
    assert [lanes_together(256, size, "cuda") for size in (128, 4096, 1 << 30)] == [8192, 256, 1]


def test_a_pack_has_one_batch_size() -> None:
    with pytest.raises(AssertionError):
        next(start([lane(Train(batch_size=8)), lane(Train(batch_size=16))], problem(20), problem(9)))
