"""Trials trained together in one batched pass: the twin of `run_trial` for many. Each trial of a pack is a lane.

Lanes that train only heads on the same activations are one batched program (`lanes`). Lanes that share a live pass through
the frozen prefix take turns, step by step, so that the one pass that a mini-batch needs serves all of them. Either way a
lane gives what the trial alone gives, reports for itself, stops and fails alone, and has a row of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.backbone import Backbone
from frostline.checkpoint import Keep
from frostline.data import subset
from frostline.depths import end_of
from frostline.features import Feed, Origin
from frostline.freeze import Applied, FreezeError, Network, Plan, apply_plan, compile_plan
from frostline.head import in_units, set_probe
from frostline.lanes import Lane, train_lanes
from frostline.outcome import EpochRecord, Outcome, summarise
from frostline.rows import Cost, describe, describe_data, describe_network
from frostline.training import Batches, predict
from frostline.trial import confirm, failed, head_of, origin_of, trial_steps
from frostline.trialspec import TrialSpec
from frostline.weights import hash_weights
from frostline.world import World

Report = Callable[[Mapping[str, EpochRecord]], Mapping[str, bool]]
"""Takes the records of the trials, by trial id, that have ended an epoch, and answers for each whether to go on."""

Finish = Callable[[Mapping[str, Outcome]], None]
"""Takes the outcomes of trials that have ended, by trial id."""


def run_pack(
    specs: Sequence[TrialSpec],
    *,
    feed: Feed,
    world: World,
    report: Report,
    finish: Finish,
    keep: Callable[[TrialSpec], Keep] | None = None,
) -> None:
    """Train these trials, which `take_pack` put together; one alone as it is kept. What goes wrong in a trial is its outcome, a
    failed row; what goes wrong in `report` or `finish` is raised."""
    if len(specs) > 1 and specs[0].augment.views != "live":
        _train_heads(specs, feed, world, report, finish)
    else:
        _take_turns(specs, feed, world, report, finish, keep(specs[0]) if keep and len(specs) == 1 else None)


class Stopwatch:
    """Seconds of a lane's own: those within `with`, and those that it is given."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since: float | None = None

    def __call__(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds, self.since = self(), None


@dataclass
class _Lane:
    """A trial of a pack."""

    spec: TrialSpec
    row: dict[str, Any] = field(default_factory=dict)
    records: list[EpochRecord] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def fail(self, error: Exception) -> Outcome:
        return failed(self.spec, self.row, self.records, error, self.watch())


def _take_turns(
    specs: Sequence[TrialSpec], feed: Feed, world: World, report: Report, finish: Finish, keep: Keep | None
) -> None:
    """A step of each trial after the other, each with random numbers of its own, until the last one has ended."""
    lanes = {spec.trial_id: _Lane(spec) for spec in specs}
    steps = {
        trial_id: trial_steps(lane.spec, feed=feed, world=world, row=lane.row, clock=lane.watch, keep=keep)
        for trial_id, lane in lanes.items()
    }
    random: dict[str, list[Tensor]] = {}
    answers: Mapping[str, bool] = {}
    while lanes:
        records: dict[str, EpochRecord] = {}
        outcomes: dict[str, Outcome] = {}
        passed_s = feed.pass_s
        for trial_id, lane in lanes.items():
            before_s = feed.pass_s
            try:
                with lane.watch, _own_randomness(random, trial_id, world.device):
                    record = steps[trial_id].send(answers.get(trial_id))
            except StopIteration as end:
                outcomes[trial_id] = end.value
            except Exception as error:  # noqa: BLE001 (whatever it is, it ends this lane and no other)
                outcomes[trial_id] = lane.fail(error)
            else:
                if record is not None:
                    records[trial_id] = record
                    lane.records.append(record)
            lane.watch.seconds -= feed.pass_s - before_s
        for lane in lanes.values():
            lane.watch.seconds += (feed.pass_s - passed_s) / len(lanes)
        if outcomes:
            finish(outcomes)
            lanes = {trial_id: lane for trial_id, lane in lanes.items() if trial_id not in outcomes}
        answers = report(records) if records else {}
    feed.forget_passes()


@contextmanager
def _own_randomness(states: dict[str, list[Tensor]], lane: str, device: torch.device) -> Iterator[None]:
    """PyTorch's global generators as the lane left them."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if lane in states:
            torch.set_rng_state(states[lane][0])
            for state in states[lane][1:]:
                torch.cuda.set_rng_state(state, device)
        try:
            yield
        finally:
            states[lane] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]


def _train_heads(specs: Sequence[TrialSpec], feed: Feed, world: World, report: Report, finish: Finish) -> None:
    """Heads on the same features, as one batched program."""
    lanes = {spec.trial_id: _Lane(spec) for spec in specs}
    program = _head_program([*lanes.values()], feed, world)
    answers: Mapping[str, bool] | None = None
    while True:
        try:
            records, outcomes = program.send(answers)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, the program is gone, and with it every lane)
            finish({trial_id: lane.fail(error) for trial_id, lane in lanes.items()})
            return
        if outcomes:
            finish(outcomes)
            lanes = {trial_id: lane for trial_id, lane in lanes.items() if trial_id not in outcomes}
        answers = report(records) if records else {}


def _head_program(
    lanes: Sequence[_Lane], feed: Feed, world: World
) -> Generator[tuple[dict[str, EpochRecord], dict[str, Outcome]], Mapping[str, bool] | None, None]:
    """Yields after each epoch the records of the lanes that trained and the outcomes of those that are through; is sent
    which of the former go on."""
    started, lead = time.perf_counter(), lanes[0].spec
    costs = [Cost(world, feed.images_forwarded, lane.watch) for lane in lanes]
    for lane in lanes:
        lane.row |= describe(lane.spec, world)
    origin = origin_of(lead, world)
    backbone, dataset, module = origin.backbone, origin.dataset, feed.module(origin)
    plan = compile_plan(lead.config.freeze, backbone.stages, end_of(lead.config.head, len(backbone.stages)))

    def batches(samples: np.ndarray) -> Batches:
        read = feed.activations(origin, plan.end, samples, lead.features, mean=True)
        return Batches(read, samples, torch.from_numpy(dataset.targets(samples)).to(world.device), dataset.target)

    train, val = batches(subset(dataset, lead.data.per_class, lead.seeds.subset)), batches(dataset.indices("val"))
    networks = [Network(module, head_of(lane.spec, origin)) for lane in lanes]
    applied = _apply(plan, networks, backbone)
    _set_probes(lanes, networks, plan.end, train, origin, feed)
    for lane, network, masks in zip(lanes, networks, applied, strict=True):
        lane.row |= describe_network(network, masks, backbone, plan, lane.spec.config.train)
        lane.row |= {"inputs": "features", "precision": "bf16" if origin.autocast else "fp32"}
        lane.row |= describe_data(dataset, train, val)
    for lane, cost in zip(lanes, costs, strict=True):
        cost.lap("data")
        lane.watch.seconds += (time.perf_counter() - started) / len(lanes)
        cost.lap("setup")

    program = train_lanes(
        [
            Lane(network.head, lane.spec.config.train, lane.spec.seeds.dropout)
            for lane, network in zip(lanes, networks, strict=True)
        ],
        train=train,
        val=val,
        metric=lead.objective.metric,
        order_seed=lead.seeds.order,
        autocast=origin.autocast,
    )

    def end(number: int, status: str) -> Outcome:
        lane, network, cost = lanes[number], networks[number], costs[number]
        lane.row |= {"audit": "passed"} | summarise(lane.spec, lane.records, status)
        cost.lap("train")
        outcome = Outcome(lane.row)
        if lane.spec.round == "confirm" and status == "complete":
            with lane.watch:
                in_units(network.head, dataset.target)
                test = batches(dataset.indices("test"))
                logits = predict(network.head, test, origin.autocast, full_batches=True)
                confirm(outcome, lane.spec, test.samples, logits, network, applied[number], origin)
            cost.lap("eval")
        lane.row |= cost.columns(lane.records, lane.row, feed.images_forwarded, plan)
        return outcome

    stop: list[int] | None = None
    ended: dict[int, str] = {}  # lane -> status; its weights are in its head once the program has been told to go on
    while (news := _advance(program, stop)) or ended:
        if ended and hash_weights(module) != backbone.weights_hash:
            raise FreezeError("training moved a tensor of the frozen backbone")
        records: dict[str, EpochRecord] = {}
        outcomes = {lanes[number].spec.trial_id: end(number, status) for number, status in ended.items()}
        for number, record in news.items():
            lane = lanes[number]
            if isinstance(record, Exception):
                outcomes[lane.spec.trial_id] = lane.fail(record)
            else:
                records[lane.spec.trial_id] = record
                lane.records.append(record)
                lane.watch.seconds += record.seconds
        go_on = (yield records, outcomes) or {}
        ended = {}
        for number, lane in enumerate(lanes):
            if (record := records.get(lane.spec.trial_id)) is None:
                continue
            if record.epoch == lane.spec.config.train.epochs:
                ended[number] = "complete"
            elif not go_on[lane.spec.trial_id]:
                ended[number] = "pruned"
        stop = [number for number, status in ended.items() if status == "pruned"]


def _advance(program: Generator[Any, Any, None], message: Any) -> Any:
    """What a generator yields next; nothing when it is over."""
    try:
        return program.send(message)
    except StopIteration:
        return {}


def _apply(plan: Plan, networks: Sequence[Network], backbone: Backbone) -> list[Applied]:
    """The plan as it holds for each lane, which depends on the kind of its head alone: nothing else trains."""
    of_kind: dict[int, Applied] = {}
    for network in networks:
        if len(network.head) not in of_kind:
            (of_kind[len(network.head)],) = apply_plan(plan, network, backbone)
    return [of_kind[len(network.head)] for network in networks]


def _set_probes(
    lanes: Sequence[_Lane], networks: Sequence[Network], end: int, train: Batches, origin: Origin, feed: Feed
) -> None:
    """Lay the closed-form solutions over the heads that start at them; linear ones start alike."""
    pairs = zip(lanes, networks, strict=True)
    heads = [network.head for lane, network in pairs if lane.spec.config.head.init == "probe"]
    if heads:
        lead = lanes[0].spec
        start = feed.pretrained(origin, end, train.samples, lead.features if lead.start_stored else None)
        linear = [head for head in heads if len(head) == 2]
        for head in [*linear[:1], *(head for head in heads if len(head) > 2)]:
            set_probe(head, start, train.labels, train.target.task)
        for head in linear[1:]:
            head[-1].load_state_dict(linear[0][-1].state_dict())
