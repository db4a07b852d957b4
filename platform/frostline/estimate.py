"""What a search would run and what it would cost, said before anything is spent.

Measuring and deciding are separate: `measure` times a few training steps on this machine, `estimate` is a pure function
of the job, those times and the sizes of data and backbone, and `render_plan` prints both.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from optuna.distributions import CategoricalDistribution
from rich.console import Console
from rich.table import Table
from rich.text import Text

from frostline.backbone import Backbone, stage_table
from frostline.features import EVAL_BATCH, feature_fetch, image_fetch
from frostline.freeze import Network, apply_plan, compile_plan, fixed_hash
from frostline.head import build_head, set_probe
from frostline.prepare import Prepared, prepare
from frostline.progress import Progress, duration
from frostline.propose import Proposer, distributions
from frostline.spec import Arm, Freeze, Head, Job, Pruner, Range, Resources, depth_of
from frostline.stages import StageCost
from frostline.study import COMMIT_ROWS, COMMIT_SECONDS
from frostline.train import Batches, Seeding, predict, train_epochs
from frostline.world import World, autocast_dtype, hardware

TIMING_S = 6.0  # what the timed steps may take on a CPU; batches shrink to fit
LIVE_CUTS = 3  # cuts below the head that are timed
PART_BYTES, TRIAL_BYTES, EPOCH_BYTES = (
    42_000,
    400,
    80,
)  # measured: a commit's Parquet files, and what a row adds to them
PREDICTION_BYTES, SAMPLE_BYTES = 20, 20  # measured: a row without its probabilities, and a line of the splits


@dataclass(frozen=True)
class StepCosts:
    """What was timed; seconds at best, on an otherwise idle device."""

    device: str
    threads: int
    batch_size: int
    """Of the timed steps below the head: the job's, or less where those would take too long."""
    forward_s: float
    """Per image through the whole network in eval mode."""
    steps: Mapping[int, float]
    """Cut -> seconds per image of a training step, forward, backward and optimizer; at the cut after the last stage
    those of the head alone, on features. Holds the first and the last cut that the job can draw, and some between."""
    start_s: float
    """Per trial before its first step: to build, freeze and audit the network."""
    probe_s: float = 0.0
    """Per trial whose head starts at the closed-form solution: to find it."""


@dataclass(frozen=True)
class Sizes:
    """What of data and backbone the cost depends on."""

    n_train: int  # after data.per_class
    n_val: int
    n_test: int
    classes: int
    feature_dim: int
    pixels_bytes: int


@dataclass(frozen=True)
class Cost:
    """Of a whole search."""

    images_forward: float
    images_backward: float
    device_s: float
    wall_s: float


@dataclass(frozen=True)
class Estimate:
    """How much a search would take; `at_most` holds where trials take what the timed steps took."""

    trials: int
    confirmations: int
    at_most: Cost
    """Every trial takes the dearest configuration of its arm, and none is stopped."""
    expected: Cost
    """Configurations are spread evenly over each arm's space, and the pruner stops as `expected_epochs` says."""
    disk: Mapping[str, int]
    """What is written -> bytes, at most."""


# --- measuring ---


def measure(prepared: Prepared) -> StepCosts:
    """Time the job's own network, loop and optimizer on a few real batches, on the device and threads of a trial.

    Batch size and head width are the mean of what the arms may draw; the norm policy is the job's. Takes about
    `TIMING_S` on a CPU. Raises ValueError where `resources.device` is not there.
    """
    job, backbone, dataset = prepared.job, prepared.backbone, prepared.dataset
    device, last = World.here(job.resources).device, len(backbone.stages)
    cuts = cuts_to_time({cut for arm in job.arms.values() for cut in arm_cuts(job, arm, last)}, last)
    samples = dataset.indices("train")
    images = image_fetch(backbone, dataset, device)
    autocast = autocast_dtype(job.train.precision, device)
    head = Head(hidden=round(fmean(_mean(job, arm, "head.hidden") for arm in job.arms.values())))
    wanted = min(round(fmean(_mean(job, arm, "train.batch_size") for arm in job.arms.values())), prepared.n_train)

    def rows(fetch, chosen: np.ndarray) -> Batches:
        return Batches(fetch, chosen, torch.from_numpy(dataset.labels[chosen]).to(device))

    def forward_s(count: int) -> float:
        """Seconds per image, the best of two passes after a warm-up."""
        network, some, passes = (
            _network(backbone, head, len(dataset.classes), device),
            rows(images, samples[:count]),
            [],
        )
        for _ in range(3):
            started = time.perf_counter()
            predict(network, some, autocast)
            passes.append(time.perf_counter() - started)
        return min(passes[1:]) / len(some.samples)

    rough_s = forward_s(2)
    affordable = wanted if device.type != "cpu" else affordable_batch(wanted, rough_s, len(cuts))
    steps, starts = {}, []
    for cut in cuts:
        batch = wanted if cut == last else affordable
        chosen = samples[: 8 * batch if cut == last else batch]
        started = time.perf_counter()
        network = _network(backbone, head, len(dataset.classes), device)
        plan = compile_plan(Freeze(strategy="freeze_depth", depth=cut, norm=job.freeze.norm), backbone.stages)
        applied = apply_plan(plan, network, backbone)
        for _ in range(2):  # before and after training
            fixed_hash(network, applied)
        starts.append(time.perf_counter() - started)
        fetch = feature_fetch(torch.rand(len(chosen), backbone.feature_dim, device=device), chosen)
        train = rows(fetch if cut == last else images, chosen)
        config = job.train.model_copy(update={"epochs": 3, "batch_size": batch, "lr": 1e-6, "head_lr": 1e-6})
        _, *timed = train_epochs(
            network,
            applied,
            config,
            train=train,
            val=rows(train.fetch, chosen[:2]),
            metric=job.objective.metric,
            seeding=Seeding(0, 0),
            head_only=cut == last,
            autocast=autocast,
        )
        steps[cut] = min(record.seconds - record.eval_seconds for record in timed) / len(chosen)

    probed = any(_chance(job, arm, "head.init", "probe") for arm in job.arms.values())
    return StepCosts(
        device=hardware(device),
        threads=torch.get_num_threads(),
        batch_size=affordable,
        forward_s=forward_s(min(EVAL_BATCH, affordable_batch(EVAL_BATCH, rough_s, len(cuts)))),
        steps=steps,
        start_s=min(starts),
        probe_s=_probe_s(prepared) if probed else 0.0,
    )


def _network(backbone: Backbone, head: Head, classes: int, device: torch.device) -> Network:
    network = Network(copy.deepcopy(backbone.module), build_head(head, backbone.feature_dim, classes, seed=0))
    return network.to(device, memory_format=torch.channels_last)


def _probe_s(prepared: Prepared) -> float:
    dim, classes = prepared.backbone.feature_dim, len(prepared.dataset.classes)
    head, labels = build_head(Head(), dim, classes, seed=0), np.arange(prepared.n_train) % classes
    started = time.perf_counter()
    set_probe(head, torch.rand(prepared.n_train, dim), labels)
    return time.perf_counter() - started


def cuts_to_time(cuts: Collection[int], last: int) -> list[int]:
    """Of the cuts that a job may draw: the first, the middle and the last below the head, and the head's if it is there."""
    live = sorted(cut for cut in set(cuts) if cut < last)
    if len(live) > LIVE_CUTS:
        live = [live[0], live[len(live) // 2], live[-1]]
    return live + [last] * (last in cuts)


def affordable_batch(wanted: int, image_s: float, cuts: int) -> int:
    """The largest batch up to `wanted`, and at least 2, with which timing `cuts` cuts stays within `TIMING_S`, where an
    image takes `image_s` forward and a step three times that; three steps are taken at each cut, and three passes."""
    return min(wanted, max(2, int(TIMING_S / (image_s * (9 * cuts + 3)))))


# --- deciding ---


def estimate(job: Job, stages: Sequence[StageCost], sizes: Sizes, costs: StepCosts, slots: int) -> Estimate:
    """What the search of `job` takes with `slots` trials at once.

    A trial at a cut below the head takes epochs x (n_train x step(cut) + n_val x forward); between the cuts that were
    timed, step(cut) is linear in the share of FLOPs behind the cut. A trial of the head alone takes
    epochs x (n_train + n_val) x step(head), and the features are extracted once by each process that needs them.
    """
    arms, last, both = list(job.arms.values()), len(stages), job.confirm.finalists == "arms"
    share = job.search.trials // len(arms)
    trials, confirmations = share * len(arms), job.confirm.seeds * (len(arms) if both else 1)

    def draws(epochs: Callable[[Arm], float], tested: bool = False) -> list[list[_Draw]]:
        return [
            [_draw(job, arm, cut, epochs(arm), stages, sizes, costs, tested) for cut in arm_cuts(job, arm, last)]
            for arm in arms
        ]

    def longest(arm: Arm) -> float:
        return _largest(job, arm, "train.epochs")

    def typical(arm: Arm) -> float:
        return _mean(job, arm, "train.epochs")

    def stopped(arm: Arm) -> float:
        return expected_epochs(job.search.pruner, typical(arm))

    def cost(searched: Sequence[_Draw], confirmed: Sequence[_Draw]) -> Cost:
        """From a trial of each arm, and a confirmation of each finalist."""
        search = share * np.sum([draw.work for draw in searched], axis=0)
        confirm = confirmations * np.mean([draw.work for draw in confirmed], axis=0)
        cached = confirmations * fmean(draw.cached for draw in confirmed)
        search += _forward(sizes.n_train + sizes.n_val, costs) * min(
            slots, share * sum(draw.cached for draw in searched)
        )
        confirm += _forward(sizes.n_test, costs) * min(slots, cached)
        if job.data.per_class is not None:  # each confirmation draws its own train samples
            confirm += _forward(sizes.n_train, costs) * cached
        rounds = math.ceil(confirmations / slots) / max(1, confirmations)
        wall_s = search[2] / min(slots, trials) + confirm[2] * rounds
        return Cost(*map(float, search + confirm), wall_s=float(wall_s))

    finals = [max(choices, key=_seconds) for choices in draws(longest, tested=True)]
    at_most = cost(
        [max(choices, key=_seconds) for choices in draws(longest)], finals if both else [max(finals, key=_seconds)]
    )
    expected = cost(
        [_evenly(choices) for choices in draws(stopped)],
        [_evenly(choices) for choices in draws(typical, tested=True)],
    )
    epochs = share * sum(map(longest, arms)) + confirmations * max(map(longest, arms))
    disk = _disk(job, stages, sizes, trials + confirmations, confirmations, epochs, at_most.wall_s)
    return Estimate(trials, confirmations, at_most, expected, disk)


@dataclass(frozen=True)
class _Draw:
    """What a trial takes."""

    work: np.ndarray  # (3,): images forward, images backward, seconds
    cached: float  # chance that it reads features


def _draw(
    job: Job,
    arm: Arm,
    cut: int,
    epochs: float,
    stages: Sequence[StageCost],
    sizes: Sizes,
    costs: StepCosts,
    tested: bool,
) -> _Draw:
    probe = _chance(job, arm, "head.init", "probe")
    start = np.array([0.0, 0.0, costs.start_s + probe * costs.probe_s])
    step_s = step_seconds(cut, stages, costs)
    if cut == len(stages):
        return _Draw(start + [0.0, 0.0, epochs * (sizes.n_train + sizes.n_val) * step_s], 1.0)
    steps = epochs * sizes.n_train * np.array([1.0, 1.0, step_s])
    recalibrated = _chance(job, arm, "freeze.norm", "recalibrate") * sizes.n_train
    return _Draw(start + steps + _forward(epochs * sizes.n_val + recalibrated + tested * sizes.n_test, costs), probe)


def _evenly(draws: Sequence[_Draw]) -> _Draw:
    return _Draw(np.mean([draw.work for draw in draws], axis=0), fmean(draw.cached for draw in draws))


def _seconds(draw: _Draw) -> float:
    return draw.work[2]


def _forward(images: float, costs: StepCosts) -> np.ndarray:
    return images * np.array([1.0, 0.0, costs.forward_s])


def step_seconds(cut: int, stages: Sequence[StageCost], costs: StepCosts) -> float:
    """Seconds per image of a training step at a cut: as timed, or between two timed cuts, linear in the FLOPs behind it."""
    if cut == len(stages):
        return costs.steps[cut]
    timed = sorted(each for each in costs.steps if each < len(stages))
    frozen = np.cumsum([0.0, *(stage.flop_share for stage in stages)])  # at each cut
    return float(np.interp(frozen[cut], frozen[timed], [costs.steps[each] for each in timed]))


def expected_epochs(pruner: Pruner, epochs: float) -> float:
    """Epochs of a mean trial. Under halving one in `factor` trials survives each rung, at grace_epochs x factor^k:
    r_0 + (r_1 - r_0) / factor + (r_2 - r_1) / factor^2 + …, each rung r_k being at most `epochs`. No claim is made for
    other pruners: all of `epochs`."""
    if pruner.kind != "halving":
        return epochs
    total, reached, share, rung = 0.0, 0.0, 1.0, pruner.grace_epochs
    while rung < epochs:
        total, reached = total + share * (rung - reached), rung
        share, rung = share / pruner.factor, rung * pruner.factor
    return total + share * (epochs - reached)


def arm_cuts(job: Job, arm: Arm, stages: int) -> list[int]:
    """The cuts that an arm may draw, each as likely as the others. Raises SpaceError."""
    depth = distributions(arm, stages).get("freeze.depth")
    if isinstance(depth, CategoricalDistribution):
        depths = depth.choices
    elif depth is not None:
        depths = range(stages + 1)
    else:
        depths = [arm.space.get("freeze.depth", job.freeze.depth) if arm.strategy == "freeze_depth" else None]
    freezes = (Freeze.model_validate({"strategy": arm.strategy, "depth": depth}) for depth in depths)
    return [depth_of(freeze, stages) for freeze in freezes]


def local_slots(resources: Resources, cores: int, gpus: int) -> int:
    """How many trials a Ray of this machine alone would run at once; 0 where it cannot hold one."""
    wanted = resources.gpus
    if wanted is None:
        wanted = float(gpus >= 1 and resources.device in ("auto", "cuda"))
    return int(min(cores / resources.cpus, gpus / wanted if wanted else math.inf))


def _disk(
    job: Job, stages: Sequence[StageCost], sizes: Sizes, trials: int, confirmations: int, epochs: float, wall_s: float
) -> dict[str, int]:
    parts = min(trials, math.ceil(wall_s / COMMIT_SECONDS) + math.ceil(trials / COMMIT_ROWS))
    samples = sizes.n_train + sizes.n_val + sizes.n_test
    first = min(cut for arm in job.arms.values() for cut in arm_cuts(job, arm, len(stages)))
    hidden = max(_largest(job, arm, "head.hidden") for arm in job.arms.values())
    head = (hidden or sizes.feature_dim) * sizes.classes + hidden * sizes.feature_dim
    weights = sum(stage.parameters for stage in stages[first:]) + head
    return {
        "rows": int(PART_BYTES * parts + TRIAL_BYTES * trials + EPOCH_BYTES * epochs + SAMPLE_BYTES * samples),
        "predictions": confirmations * sizes.n_test * (4 * sizes.classes + PREDICTION_BYTES),
        "bundle": int(4 * weights) if confirmations else 0,
        "pixels": sizes.pixels_bytes,
    }


def _entry(job: Job, arm: Arm, path: str) -> Any:
    """What the arm's space says of a key, else the job."""
    section, key = path.split(".", 1)
    return arm.space.get(path, getattr(getattr(job, section), key))


def _mean(job: Job, arm: Arm, path: str) -> float:
    """Of a number over the arm's space, or the value that it is held at."""
    match _entry(job, arm, path):
        case Range(low=low, high=high, log=True):
            return (high - low) / math.log(high / low)
        case Range(low=low, high=high):
            return (low + high) / 2
        case tuple(choices):
            return fmean(choices)
        case value:
            return float(value)


def _largest(job: Job, arm: Arm, path: str) -> float:
    match _entry(job, arm, path):
        case Range(high=high):
            return high
        case tuple(choices):
            return max(choices)
        case value:
            return float(value)


def _chance(job: Job, arm: Arm, path: str, value: str) -> float:
    """Share of the arm's choices for `path` that are `value`."""
    entry = _entry(job, arm, path)
    choices = entry if isinstance(entry, tuple) else (entry,)
    return choices.count(value) / len(choices)


# --- showing ---


def render_plan(job: Job, console: Console) -> None:
    """Print what a search of `job` would run and cost; 100 columns suffice.

    Decodes the data into the cache, loads the backbone and times a few steps. Raises a ValueError where a search would.
    """
    with Progress(Console(stderr=True)) as progress:
        prepared = prepare(job, progress.decoding)
    job, dataset, depths = prepared.job, prepared.dataset, len(prepared.backbone.stages)
    assert job.data.image_size is not None
    share = job.search.trials // max(1, len(job.arms))
    proposers = {name: Proposer(job, name, depths, share) for name in job.arms}  # refuses what a search would refuse
    stages = stage_table(prepared.backbone, job.data.image_size)
    console.print(_stage_table(stages))
    console.print(_facts(_about(prepared)))
    for name, arm in job.arms.items():
        console.print(_text(f"\narm {name}: {arm.strategy}, {proposers[name].kind} sampler, {share:,} trials"))
        console.print(_facts(_space(job, arm, depths)))
    if not job.arms:
        console.print("\nThere is nothing to search: add [arms.NAME] with a strategy and a space.")
        return
    sizes = Sizes(
        n_train=prepared.n_train,
        n_val=len(dataset.indices("val")),
        n_test=len(dataset.indices("test")),
        classes=len(dataset.classes),
        feature_dim=prepared.backbone.feature_dim,
        pixels_bytes=dataset.pixels.nbytes,
    )
    costs = measure(prepared)
    slots = local_slots(job.resources, os.cpu_count() or 1, torch.cuda.device_count())
    found = estimate(job, stages, sizes, costs, max(1, slots))
    console.print(_cost_table(found), end="\n\n")
    console.print(_facts(_grounds(job, costs, found, slots)))


def _stage_table(stages: Sequence[StageCost]) -> Table:
    """A line a stage, under the freeze depth that freezes it last."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("freeze\ndepth", "last\nfrozen stage", "para-\nmeters", "\nshare", "frozen\nshare"):
        table.add_column(name, justify="left" if "stage" in name else "right", overflow="fold")
    for name in ("MFLOPs\nan image", "\nshare", "KiB an image\nat the cut"):
        table.add_column(name, justify="right")
    table.add_row("0", "none", "", "", "0.0%", "", "", "")
    frozen = 0.0
    for depth, stage in enumerate(stages, 1):
        frozen += stage.parameter_share
        parameters = f"{stage.parameters:,}", f"{stage.parameter_share:.1%}", f"{frozen:.1%}"
        kept = "-" if stage.cut_bytes is None else f"{stage.cut_bytes / 1024:,.1f}"
        table.add_row(
            str(depth), _text(stage.name), *parameters, f"{stage.flops / 1e6:,.1f}", f"{stage.flop_share:.1%}", kept
        )
    return table


def _about(prepared: Prepared) -> Iterator[tuple[str, str]]:
    job, backbone, dataset = prepared.job, prepared.backbone, prepared.dataset
    parameters = sum(parameter.numel() for parameter in backbone.module.parameters())
    yield "", ""
    yield "backbone", f"{backbone.name}, weights {backbone.weights_hash}"
    yield "", f"{parameters:,} parameters, {backbone.feature_dim:,} features"
    yield "data", job.data.path
    yield "", f"{len(dataset.classes):,} classes, images of {job.data.image_size} x {job.data.image_size} pixels"
    drawn = f" of {len(dataset.indices('train')):,} ({job.data.per_class:,} a class)" if job.data.per_class else ""
    others = f"val {len(dataset.indices('val')):,}, test {len(dataset.indices('test')):,}"
    yield "", f"train {prepared.n_train:,}{drawn}, {others}, excluded {len(dataset.excluded):,}"


def _space(job: Job, arm: Arm, stages: int) -> Iterator[tuple[str, str]]:
    cuts = arm_cuts(job, arm, stages)
    head = "" if stages not in cuts else f" ({stages}: only the head trains)"
    yield "stages frozen", ", ".join(map(str, cuts)) + head
    for path, entry in arm.space.items():
        if path == "freeze.depth":
            continue
        match entry:
            case Range(low=low, high=high, log=log, step=step):
                yield path, f"{low:g} to {high:g}" + (", log" if log else f" by {step:g}" if step else "")
            case tuple(choices):
                yield path, ", ".join(map(str, choices))
            case value:
                yield path, f"{value} (held)"


def _cost_table(found: Estimate) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
    for name in ("", "expected", "at most"):
        table.add_column(f"\n{name}", justify="right" if name else "left")
    costs = (found.expected, found.at_most)
    table.add_row("trials", *[f"{found.trials:,}"] * 2)
    table.add_row("confirmations", *[f"{found.confirmations:,}"] * 2)
    table.add_row("images forward", *(_rounded(cost.images_forward) for cost in costs))
    table.add_row("images backward", *(_rounded(cost.images_backward) for cost in costs))
    table.add_row("device time", *(duration(cost.device_s) for cost in costs))
    table.add_row("wall time", *(duration(cost.wall_s) for cost in costs))
    table.add_row("disk", "", _bytes(sum(found.disk.values())))
    return table


def _grounds(job: Job, costs: StepCosts, found: Estimate, slots: int) -> Iterator[tuple[str, str]]:
    """What the estimate stands on: what was measured, what is assumed, what is left out."""
    pruner, cores = job.search.pruner, os.cpu_count() or 1
    live = [cut for cut in sorted(costs.steps) if cut * costs.forward_s >= 0]
    cuts = ", ".join(map(str, live))
    yield (
        "measured",
        f"steps at freeze depth {cuts}, in batches of {costs.batch_size}, {costs.threads} thread(s), on {costs.device}",
    )
    if slots == 0:
        yield "assumed", "one trial at a time, on a machine like this, which has not what resources asks for a trial"
    else:
        crowded = slots * costs.threads > cores and costs.device.endswith("cores)")
        slower = f"; {slots * costs.threads} threads on {cores} cores will be slower" if crowded else ""
        yield "assumed", f"{slots} trial(s) at once, as on this machine, none slowed by the others{slower}"
    if pruner.kind == "halving":
        yield "expected", f"depths drawn evenly; 1 in {pruner.factor} trials goes on at each rung"
    else:
        yield (
            "expected",
            "depths drawn evenly" + ("" if pruner.kind == "none" else "; no claim is made for median stopping"),
        )
    yield "at most", "every trial takes the dearest configuration of its arm, and none is stopped"
    yield "disk", ", ".join(f"{name} {_bytes(size)}" for name, size in found.disk.items())
    yield "left out", "the start of Ray and of its workers"


def _facts(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(_text(name), _text(text))
    return table


def _rounded(count: float) -> str:
    """Three digits of a count: `1,230`, `12,300`."""
    return f"{float(f'{count:.3g}'):,.0f}"


def _bytes(size: int) -> str:
    """`12 kB`, `3.4 MB`, `120 GB`."""
    scaled, unit = next(
        (size / scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= scale or unit == "kB"
    )
    return f"{scaled:,.{int(scaled < 10)}f} {unit}"


def _text(value: str) -> Text:
    """Text that neither markup nor terminal control codes can come out of."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in value))
