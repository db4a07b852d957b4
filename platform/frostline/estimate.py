"""What a search would store, run and cost, said before anything is spent: pure functions of the job, of times measured on
this hardware (`costs`), and of the sizes of data and backbone. `plan` prints them, and the study goes by them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution

from frostline.closedform import pooled_width
from frostline.costs import Choice, StageTimes, choose_cuts, trial_seconds
from frostline.depths import end_of, frozen_stages
from frostline.ledger import COMMIT_ROWS, COMMIT_SECONDS
from frostline.measure import measure, resumable
from frostline.models import Range
from frostline.packing import SUFFIXES
from frostline.prepare import Prepared
from frostline.propose import distributions
from frostline.spec import OWN_KEYS, Arm, Freeze, Head, Job, Pruner, Resources
from frostline.stages import StageCost
from frostline.strategies import phases_of
from frostline.world import gpus_of_a_trial, trials_at_once

PART_BYTES = 42_000  # measured, as are the next: the Parquet files of a commit
TRIAL_BYTES, EPOCH_BYTES, SAMPLE_BYTES = 400, 80, 20  # what a row adds to them, and to the splits
PREDICTION_BYTES, BUNDLE_BYTES = 40, 8_000  # without the probabilities, without the tensors


@dataclass(frozen=True)
class Sizes:
    """What of data and backbone the cost depends on."""

    n_train: int  # after data.per_class
    n_val: int
    n_test: int
    classes: int
    feature_dim: int
    inputs_bytes: int


@dataclass(frozen=True)
class Cost:
    images_forward: float
    images_backward: float
    device_s: float
    wall_s: float


@dataclass(frozen=True)
class Estimate:
    """What a search would take, as far as its steps take what the timed ones took."""

    trials: int
    confirmations: int
    at_most: Cost
    """Every trial takes the dearest configuration of its arm, and none is stopped."""
    expected: Cost
    """Configurations are spread evenly over each arm's space, and the pruner stops as `expected_epochs` says."""
    disk: Mapping[str, int]
    """What is written -> bytes, at most."""


def stage_times(prepared: Prepared) -> StageTimes:
    """What the stages cost here at the cuts that the arms may draw, for the mean of their batch sizes and head widths.

    Raises CostError where the network cannot be timed.
    """
    job, arms = prepared.job, list(prepared.job.arms.values())
    return measure(
        prepared,
        _drawn(prepared),
        batch_size=round(fmean(_mean(job, arm, "train.batch_size") for arm in arms)),
        hidden=round(fmean(_mean(job, arm, "head.hidden") for arm in arms)),
    )


def cut_choices(prepared: Prepared, times: StageTimes) -> list[Choice]:
    """Which of the cuts that the arms may draw are stored, and why; none where several workers train a trial, each of which
    passes its share."""
    if prepared.job.scaling.workers > 1:
        return []
    job, views = prepared.job, prepared.job.augment.views
    item = 2 if job.features.dtype == "float16" else 4
    cuts = resumable(prepared, _drawn(prepared))
    return choose_cuts(
        times,
        {cut: item * math.prod(there.shape) for cut, there in cuts.items()},
        expected_reads(job, len(prepared.backbone.stages)),
        images=_shown(job) * prepared.n_train + len(prepared.dataset.indices("val")),
        lanes=min(job.search.lanes, SUFFIXES),
        live_views=views == "live",
        cache=job.features.cache,
        budget_bytes=1e9 * job.features.budget_gb,
    )


def expected_reads(job: Job, stages: int) -> dict[int, float]:
    """Cut -> how often the search is expected to show a train image (a view of it, where these are stored) to trials at
    that cut: trials x epochs until the pruner stops them; of a job that searches nothing, the epochs of a training."""
    reads: defaultdict[int, float] = defaultdict(float)
    for arm in job.arms.values():
        places = arm_places(job, arm, stages)
        epochs = expected_epochs(job.search.pruner, _mean(job, arm, "train.epochs"))
        if not job.search.trials:
            epochs = _mean(job, arm, "train.epochs")
        for cut, end in places:
            if cut < end or end == stages:  # heads on fewer stages than all read means over positions
                reads[cut] += (job.search.trials // len(job.arms) or 1) * epochs / len(places)
    return {cut: shown / max(1, _shown(job)) for cut, shown in reads.items()}


def _drawn(prepared: Prepared) -> set[int]:
    job, stages = prepared.job, len(prepared.backbone.stages)
    found: set[int] = set()
    for arm in job.arms.values():
        for cut, end in arm_places(job, arm, stages):
            all_phases = phases_of(Freeze.model_construct(strategy=arm.strategy), cut, end, epochs=stages + 2)
            found |= {cut, end, *(min(phase.rates, default=end) for phase in all_phases)}
    return found


def _shown(job: Job) -> int:
    """Of each train image, how many views are stored; the image as it is counts as one."""
    views = job.augment.views
    return 0 if isinstance(views, str) else max(1, views)


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What is recorded beside the job, as JSON values: what it stands on, what is stored, what that was decided by, and at
    which cuts heads in closed form are tried."""
    times = stage_times(prepared)
    stored = [choice.cut for choice in cut_choices(prepared, times) if choice.stored]
    return {
        **prepared.facts,
        "cached_cuts": stored,
        "probed_cuts": probed_cuts(prepared),
        "stage_times": asdict(times),
    }


def probed_cuts(prepared: Prepared) -> list[int]:
    """Where heads in closed form are tried: at all cuts that the arms may draw and the network can be left at, and the last;
    nowhere where nothing may be stored or is searched."""
    job = prepared.job
    if job.features.cache == "none" or not job.search.trials or job.scaling.workers > 1:
        return []
    return [*resumable(prepared, {*_drawn(prepared), len(prepared.backbone.stages)})]


def mean_bytes(prepared: Prepared) -> int:
    """What heads in closed form have stored of an image: its means over positions, at all of their cuts."""
    cuts = resumable(prepared, probed_cuts(prepared)).values()
    return (2 if prepared.job.features.dtype == "float16" else 4) * sum(pooled_width(cut.shape) for cut in cuts)


def estimate(
    job: Job,
    stages: Sequence[StageCost],
    sizes: Sizes,
    times: StageTimes,
    slots: int,
    stored: Mapping[int, int],
    means: int,
) -> Estimate:
    """What the search of `job` takes with `slots` trials at once, activations being stored at the cuts of `stored`, in so
    many bytes an image, and their `mean_bytes`.

    A trial takes what `trial_seconds` says. Unless features.cache is "none", all train and val samples pass the whole
    backbone once, for heads in closed form and for what is stored on the way; for confirmations test passes to the deepest
    cut that is stored, and so does what their own subsets and views add. Trials that train together take less than that.
    """
    arms, each_arm = list(job.arms.values()), job.confirm.finalists == "arms" or not job.search.trials
    share = job.search.trials // len(arms)
    trials, confirmations = share * len(arms), job.confirm.seeds * (len(arms) if each_arm else 1)
    longest = [_largest(job, arm, "train.epochs") for arm in arms]
    typical = [_mean(job, arm, "train.epochs") for arm in arms]
    stopped = [expected_epochs(job.search.pruner, epochs) for epochs in typical]
    redrawn = job.confirm.seeds * (job.data.per_class is not None or job.augment.views != 0)
    shown, probed = _shown(job) * sizes.n_train, job.features.cache != "none"
    searched = max(shown, sizes.n_train) * probed, sizes.n_val * probed
    confirmed = shown * redrawn * bool(stored), sizes.n_test * (confirmations > 0) * bool(stored)
    kept_bytes = (shown * (1 + redrawn) + sizes.n_val + confirmed[1]) * sum(stored.values())
    kept_bytes += sum(searched) * means
    extraction_s = kept_bytes / times.read_bytes_per_s  # to write is taken to cost what reading does
    extraction_s += sum(searched) * times.forward_s + (searched[0] + confirmed[0]) * times.view_s
    extraction_s += sum(confirmed) * (times.prefix_s[max(stored)] if stored else 0.0)
    extraction = np.array([sum(searched) + sum(confirmed), 0.0, extraction_s])

    def works(epochs: Sequence[float], confirm: bool = False, dearest: bool = False) -> list[np.ndarray]:
        return [
            _work(job, arm, each, len(stages), sizes, times, stored, confirm=confirm, dearest=dearest)
            for arm, each in zip(arms, epochs, strict=True)
        ]

    def cost(searched: Sequence[np.ndarray], finalists: Sequence[np.ndarray]) -> Cost:
        search = share * np.sum(searched, axis=0) + extraction
        confirm = confirmations * np.mean(finalists, axis=0)
        rounds = math.ceil(confirmations / slots) / max(1, confirmations)
        forward, backward, device_s = map(float, search + confirm)
        return Cost(forward, backward, device_s, float(search[2] / max(1, min(slots, trials)) + confirm[2] * rounds))

    finals = works(longest, confirm=True, dearest=True)
    at_most = cost(works(longest, dearest=True), finals if each_arm else [max(finals, key=itemgetter(2))])
    expected = cost(works(stopped), works(typical, confirm=True))
    epochs = share * sum(longest) + confirmations * max(longest)
    disk = _disk(job, stages, sizes, trials + confirmations, confirmations, epochs, at_most.wall_s)
    return Estimate(trials, confirmations, at_most, expected, {**disk, "features": kept_bytes})


def _work(
    job: Job,
    arm: Arm,
    epochs: float,
    stages: int,
    sizes: Sizes,
    times: StageTimes,
    stored: Mapping[int, int],
    *,
    confirm: bool,
    dearest: bool,
) -> np.ndarray:
    """(3,): images forward, images backward and seconds of one trial of an arm, its mean or its dearest one."""
    likely = math.ceil if dearest else float
    recalibrated = likely(_chance(job, arm, "freeze.norm", "recalibrate"))
    probed = likely(_chance(job, arm, "head.init", "probe"))
    scored = epochs * sizes.n_val + confirm * sizes.n_test

    def at(cut: int, end: int) -> np.ndarray:
        live_views = job.augment.views == "live"
        trained = {first: share * epochs * sizes.n_train for first, share in _shares(job, arm, cut, end).items()}
        early = (probed + recalibrated * (cut < end)) * sizes.n_train
        size = stored.get(cut)
        if cut == end < stages and job.features.cache != "none":
            size = 4 * sizes.feature_dim  # the mean over positions: about as wide
        seconds = trial_seconds(times, cut, trained, scored, early, end=end, read_bytes=size, live_views=live_views)
        shown, deep = sum(trained.values()), sum(images for first, images in trained.items() if first < end)
        forward = (live_views or size is None) * (shown + early) + (size is None) * scored
        return np.array([forward, deep, seconds])

    works = [at(*place) for place in arm_places(job, arm, stages)]
    return max(works, key=itemgetter(2)) if dearest else np.mean(works, axis=0)


def _shares(job: Job, arm: Arm, cut: int, end: int) -> dict[int, float]:
    """Of a typical trial's epochs, by the first stage that trains in them."""
    typical = {key: _middle(_entry(job, arm, f"freeze.{key}")) for key in ("every", "probe_share")}
    freeze = Freeze.model_construct(strategy=arm.strategy, **typical)
    epochs, shares = round(_mean(job, arm, "train.epochs")), defaultdict[int, float](float)
    for phase in phases_of(freeze, cut, end, epochs):
        shares[min(phase.rates, default=end)] += phase.epochs / epochs
    return shares


def _middle(entry: Any) -> Any:
    """A value in the middle of what a space has of a number."""
    if isinstance(entry, Range):
        return (entry.low + entry.high) / 2
    return sorted(entry)[len(entry) // 2] if isinstance(entry, tuple) else entry


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
    """The cuts that an arm may draw, ascending. Raises SpaceError."""
    return sorted({cut for cut, _ in arm_places(job, arm, stages)})


def arm_places(job: Job, arm: Arm, stages: int) -> list[tuple[int, int]]:
    """The cuts that an arm may draw and the stages that its head then stands on, each pair as likely as the others. Raises
    SpaceError."""
    searched = distributions(arm, stages)

    def entries(path: str, default: Any) -> Sequence[Any]:
        found = searched.get(path)
        if isinstance(found, IntDistribution):
            return range(found.low, found.high + 1)
        return found.choices if isinstance(found, CategoricalDistribution) else [arm.space.get(path, default)]

    own = arm.strategy in OWN_KEYS["depth"]
    depths = entries("freeze.depth", job.freeze.depth) if own else [None]
    freezes = [frozen_stages(arm.strategy, depth, stages) for depth in depths]
    ends = [end_of(Head.model_validate({"depth": depth}), stages) for depth in entries("head.depth", job.head.depth)]
    return [(min(cut, end), end) for end in ends for cut in freezes]


def local_slots(resources: Resources, cores: int, gpus: int) -> int:
    """How many trials a Ray of this machine alone would run at once; 0 where it cannot hold one."""
    return trials_at_once(resources.cpus, gpus_of_a_trial(resources, gpus), cores, gpus)


def _disk(
    job: Job, stages: Sequence[StageCost], sizes: Sizes, trials: int, confirmations: int, epochs: float, wall_s: float
) -> dict[str, int]:
    parts = min(trials, math.ceil(wall_s / COMMIT_SECONDS) + math.ceil(trials / COMMIT_ROWS))
    first = min(cut for arm in job.arms.values() for cut in arm_cuts(job, arm, len(stages)))
    hidden = max(_largest(job, arm, "head.hidden") for arm in job.arms.values())
    head = (hidden or sizes.feature_dim) * sizes.classes + hidden * sizes.feature_dim
    weights = sum(stage.parameters for stage in stages[first:]) + head
    rows = PART_BYTES * parts + TRIAL_BYTES * trials + EPOCH_BYTES * epochs
    return {
        "rows": int(rows + SAMPLE_BYTES * (sizes.n_train + sizes.n_val + sizes.n_test)),
        "predictions": confirmations * sizes.n_test * (4 * sizes.classes + PREDICTION_BYTES),
        "bundle": int(4 * weights) + BUNDLE_BYTES if confirmations else 0,
        "inputs": sizes.inputs_bytes,
    }


def _entry(job: Job, arm: Arm, path: str) -> Any:
    """What the arm's space says of a key, else the job."""
    section, key = path.split(".", 1)
    return arm.space.get(path, getattr(getattr(job, section), key))


def _mean(job: Job, arm: Arm, path: str) -> float:
    """Of a number, over what the arm may draw."""
    entry = _entry(job, arm, path)
    if isinstance(entry, Range):
        span = entry.high - entry.low
        return span / math.log(entry.high / entry.low) if entry.log else entry.low + span / 2
    return fmean(entry) if isinstance(entry, tuple) else entry


def _largest(job: Job, arm: Arm, path: str) -> float:
    entry = _entry(job, arm, path)
    return entry.high if isinstance(entry, Range) else max(entry) if isinstance(entry, tuple) else entry


def _chance(job: Job, arm: Arm, path: str, value: str) -> float:
    """Share of the arm's choices for `path` that are `value`."""
    entry = _entry(job, arm, path)
    choices = entry if isinstance(entry, tuple) else (entry,)
    return choices.count(value) / len(choices)
