"""One arm's proposals: what to try next and what to stop, at a cost per trial that does not grow with the study.

A proposal depends on the job's seed, the arm, the numbers that are asked for together and what the arm had heard by then,
never on a generator's hidden state. So a study that is rebuilt from its rows goes on as if nothing had happened, and a
recorded order of asks, reports and tells replays to the same proposals.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count, islice
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from frostline.depths import end_of, stages_of
from frostline.halving import Scores, build_rule
from frostline.models import Range, Scalar
from frostline.sampler import BatchSampler, Point, frozen
from frostline.seeds import derive_seed
from frostline.spec import DEPTHS, Arm, Head, Job, Sampler, holds_integers, is_searched

FITS = (
    32  # at least, of an arm's model: batches are then no worse than one proposal at a time (benchmarks/proposals.py)
)
REDRAWS = 4  # of a configuration that the arm has had, before a finite space is searched for one that it has not
ENDED = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}

Number = FloatDistribution | IntDistribution


class SpaceError(ValueError):
    """A space that does not fit the backbone or the budget at hand."""


class Proposer:
    """The trials of one arm, numbered in the order of asking; no two have the same configuration."""

    def __init__(self, job: Job, name: str, stages: int, budget: int) -> None:
        arm = job.arms[name]
        self.kind: Sampler = arm.sampler or job.search.sampler
        self.search, self.maximize = job.search, job.objective.mode == "max"
        self.seed = derive_seed(job.seed, "sampler", name)
        self.space = dict(sorted(distributions(arm, stages).items()))
        self.axes = {path: _axis(dist) for path, dist in self.space.items()}
        self.cube = _SearchSpaceTransform({**self.axes}, transform_0_1=True) if self.axes else None
        self.sizes = {path: _size(axis) for path, axis in self.axes.items()}
        """How many values each searched key has, None where they have no end."""
        sizes = [size for size in self.sizes.values() if size]
        self.points = math.prod(sizes) if len(sizes) == len(self.axes) else None
        """How many configurations the space has, None where it has no end; an arm ends with them."""
        if self.kind == "grid" and self.axes and (points := self.points or 0) < budget:
            raise SpaceError(
                f"arms.{name}: its share of search.trials is {budget}, and its grid has only {points} points; "
                f"lower search.trials to {points * len(job.arms)} or widen the space"
            )
        first = strong_defaults(job, self.space) if job.search.defaults and self.kind != "grid" else []
        self.stages, self.defaults = stages, [self._point(values) for values in first]
        self.rule = build_rule(job.search.pruner, maximize=self.maximize)
        self.asks: list[Point] = []
        self.used: set[Point] = set()
        self.running: dict[int, tuple[int, float] | None] = {}  # number -> last epoch and score, None before the first
        self.ended = 0  # complete or pruned
        self.best: list[tuple[float, float, int, FrozenTrial]] = []  # a quarter of the history, by rank and number
        self.latest: list[FrozenTrial] = []  # of the others, by number
        self.passed = 0  # how far `_unused` has come

    @property
    def asked(self) -> int:
        """How many trials the arm has proposed."""
        return len(self.asks)

    def begin_at(self, depth: int) -> None:
        """Add strong defaults for a backbone whose features serve best after `depth` stages. Where the arm searches where
        the head stands: there, once with all before it frozen and once with nothing. Else, where it searches the freeze
        depth: frozen up to there. The nearest depths of the space are taken, and the head begins at the closed form where
        the arm searches how it begins."""
        if not self.defaults:
            return
        first = zip(self.space.items(), self.defaults[0], strict=True)
        values = {path: dist.to_external_repr(entry) for (path, dist), entry in first}
        if isinstance(init := self.space.get("head.init"), CategoricalDistribution) and "probe" in init.choices:
            values["head.init"] = "probe"
        added = [values]
        for path in ("head.depth", "freeze.depth"):
            if dist := self.space.get(path):
                near = min(entries_of(dist), key=lambda entry: abs(stages_of(path, entry, self.stages) - depth))
                added = [values | {path: near}]
                if path == "head.depth" and "freeze.depth" in self.space:
                    added.append(added[0] | {"freeze.depth": entries_of(self.space["freeze.depth"])[0]})
                break
        self.defaults += [point for point in map(self._point, added) if point not in self.defaults]

    def values(self, number: int) -> dict[str, Any]:
        """The configuration that trial `number` was asked with, by dotted job key."""
        entries = zip(self.space.items(), self.asks[number], strict=True)
        return {path: dist.to_external_repr(entry) for (path, dist), entry in entries}

    def values_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial of the arm was asked with, as its configuration (section -> key -> JSON value) tells."""
        parts = {path: path.split(".", 1) for path in self.space}
        return {path: _nearest(self.space[path], config[section][key]) for path, (section, key) in parts.items()}

    def reserve(self, values: Mapping[str, Any]) -> None:
        """Keep a configuration from being proposed again."""
        self.used.add(self._point(values))

    def ask(self, k: int = 1) -> list[dict[str, Any]]:
        """The arm's next `k` configurations, from one fit. There must be as many left (`points`)."""
        first = self.asked
        assert self.points is None or first + k <= self.points, f"{self.points} configurations, {first} asked for"
        model = self._fit(k) if self.kind == "tpe" and self.ended >= self.search.startup_trials else None
        sobol = self._sobol(k) if self.kind == "qmc" and self.axes else []
        for number in range(first, first + k):
            drawn = self._drawn(number, model, sobol[number - first :][:1])
            point = next((point for point in drawn if point not in self.used), None) or self._unused()
            if model:
                model.lie(point)
            self._add(point)
        return [self.values(number) for number in range(first, first + k)]

    def report(self, scores: Scores) -> dict[int, bool]:
        """Take scores of running trials (number -> (epoch, score)); which of them should stop now. Those that report
        together are compared with each other."""
        self.running.update(scores)
        return self.rule.report(scores)

    def tell(self, number: int, status: str, score: float | None) -> None:
        """End a trial: `complete` with its score, `pruned` or `failed`."""
        last = self.running.pop(number)
        self.rule.end(number, status)
        if status == "failed":
            return
        self.ended += 1
        score, kept = score if status == "complete" else None, self.search.history // 4
        trial = frozen(number, ENDED[status], score, last)
        insort(self.best, (*rank(score, last, maximize=self.maximize), number, trial))
        for *_, worst in self.best[kept:]:
            insort(self.latest, worst, key=lambda trial: trial.number)
        del self.best[kept:], self.latest[: kept - self.search.history]

    def restore(
        self,
        values: Mapping[str, Any],
        *,
        status: str | None = None,
        score: float | None = None,
        epochs: Mapping[int, float] | None = None,
    ) -> None:
        """Add the arm's next trial as the rows have it: ended with `status`, or (None) still to be run."""
        number = self.asked
        self._add(self._point(values))
        for epoch, heard in sorted((epochs or {}).items()):
            self.report({number: (epoch, heard)})
        if status:
            self.tell(number, status, score)

    def _add(self, point: Point) -> None:
        self.running[self.asked] = None
        self.asks.append(point)
        self.used.add(point)

    def _point(self, values: Mapping[str, Any]) -> Point:
        return tuple(_entry(dist, values[path]) for path, dist in self.space.items())

    # --- where points come from ---

    def _drawn(self, number: int, model: BatchSampler | None, sobol: Sequence[Point]) -> Iterator[Point]:
        """What the arm's sampler would try, in this order; without end in a space without end."""
        yield from self.defaults[number : number + 1]
        if self.kind == "grid":
            yield self._nth(number)
        yield from sobol
        if model:
            for _ in range(REDRAWS):
                yield from model.candidates()
        rng = np.random.default_rng(derive_seed(self.seed, "random", number))
        for _ in count() if self.points is None else range(REDRAWS):
            yield self._at(rng.random((1, len(self.axes))))[0]

    def _fit(self, k: int) -> BatchSampler:
        """A model of the trials that have ended, in which those that run are bad ones."""
        ended = [*(trial for *_, trial in self.best), *self.latest]
        running = islice(reversed(self.running), self.search.history // 2)
        trials = [*ended, *(frozen(number, TrialState.RUNNING, None, None) for number in running)]
        trials.sort(key=lambda trial: trial.number)
        seed = derive_seed(self.seed, "tpe", self.asked)
        return BatchSampler(self.space, trials, self.asks, k, maximize=self.maximize, seed=seed)

    def _sobol(self, k: int) -> list[Point]:
        """The next `k` points of a scrambled Sobol sequence that is the arm's own."""
        from scipy.stats import qmc  # takes half a second to import

        engine = qmc.Sobol(len(self.axes), rng=self.seed)
        if self.asked:
            engine.fast_forward(self.asked)
        return self._at(engine.random(1 << (k - 1).bit_length())[:k])  # it warns where a draw is no power of two

    def _at(self, places: np.ndarray) -> list[Point]:
        """The points at (n, axes) places of the unit cube."""
        if self.cube is None:
            return [()] * len(places)
        return [tuple(map(float, self.cube.untransform(place).values())) for place in places]

    def _unused(self) -> Point:
        """The first point that the arm has not had, of a finite space in its seeded order."""
        while (point := self._nth(self.passed)) in self.used:
            self.passed += 1
        return point

    def _nth(self, index: int) -> Point:
        assert self.points
        entries, place = [], shuffled(index, self.points, self.seed)
        for axis in self.axes.values():
            assert axis.step
            place, step = divmod(place, _size(axis) or 0)
            entries.append(float(min(axis.low + step * axis.step, axis.high)))
        return tuple(entries)


def ask_row(
    seq: int | None, trial_id: str, arm: str, number: int, batch: int, values: Mapping[str, Any], asked_at: datetime
) -> dict[str, Any]:
    """A row of the table `asks`; `batch` is the number of the first of those that were asked for together."""
    known = {"seq": seq, "trial_id": trial_id, "arm": arm, "number": number, "batch": batch}
    return {**known, "params": json.dumps(values), "asked_at": asked_at}


def recalled(
    asks: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]], proposers: Mapping[str, Proposer]
) -> list[dict[str, Any]]:
    """The rows of asks that the table lacks, of search trials that have a row; what is known is not proposed again."""
    known, found = {ask["trial_id"] for ask in asks}, []
    for row in trials:
        if row["round"] == "search" and row["trial_id"] not in known:
            values = proposers[row["arm"]].values_of(json.loads(row["spec"])["config"])
            number, asked_at = row["number"], row["started_at"] or row["finished_at"]
            found.append(ask_row(row["ask_seq"], row["trial_id"], row["arm"], number, number, values, asked_at))
    for ask in [*asks, *found]:
        proposers[ask["arm"]].reserve(json.loads(ask["params"]))
    return found


def batch(sampler: Sampler, asked: int, share: int, lanes: int, startup: int) -> int:
    """How many configurations an arm that has proposed `asked` of its `share` should propose at once, at most `lanes`.

    All that fit, where they do not depend on results: without a model, and at random before it. Then a share of the arm
    that leaves the model `FITS` fits: 1 in studies of up to 63 trials, 64 from 2,048.
    """
    if sampler == "tpe":
        lanes = min(lanes, startup - asked if asked < startup else max(1, share // FITS))
    return min(lanes, share - asked)


def rank(score: float | None, last: tuple[int, float] | None, *, maximize: bool) -> tuple[float, float]:
    """Where an ended trial stands, the least being the best, as TPE has it: complete trials by their `score`, then pruned
    ones (None) by their last epoch, which more are better of, and the score there."""
    sign = -1 if maximize else 1
    if score is not None:
        return -math.inf, sign * score
    if last is None:
        return 1, 0.0
    return -last[0], math.inf if math.isnan(last[1]) else sign * last[1]


def shuffled(index: int, size: int, seed: int) -> int:
    """Number `index` of the numbers below `size` in a seeded order, none of which are kept: a Feistel network over the
    next power of four, taken again while it leads out of them."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(4):
            text = f"{seed} {turn} {right}".encode()
            left, right = right, left ^ (int.from_bytes(hashlib.sha256(text).digest()) & ((1 << half) - 1))
        index = left << half | right
        if index < size:
            return index


def precisions(job: Job) -> list[str]:
    """The values of train.precision that the arms may draw, sorted; the job's own where there are no arms."""
    entries = [arm.space.get("train.precision", job.train.precision) for arm in job.arms.values()]
    entries = entries or [job.train.precision]
    return sorted({str(each) for one in entries for each in (one if isinstance(one, tuple) else (one,))})


def distributions(arm: Arm, stages: int) -> dict[str, BaseDistribution]:
    """Optuna's distributions of an arm's space, for a backbone with this many stages. Raises SpaceError."""
    return {path: _distribution(path, dim, stages) for path, dim in arm.space.items() if is_searched(path, dim)}


def _distribution(path: str, dim: Range | tuple[Scalar, ...] | Scalar, stages: int) -> BaseDistribution:
    if isinstance(dim, Range):
        if holds_integers(path):
            return IntDistribution(int(dim.low), int(dim.high), log=dim.log, step=int(dim.step or 1))
        return FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
    if isinstance(dim, tuple):
        return CategoricalDistribution(_distinct_depths(path, dim, stages) if path in DEPTHS else dim)
    return IntDistribution(1 if path == "head.depth" else 0, stages)  # "all"


def _distinct_depths(path: str, choices: Sequence[Any], stages: int) -> list[Scalar]:
    """The choices that differ in stages of this backbone, in order of depth."""
    by_depth: dict[int, Scalar] = {}
    for choice in choices:
        try:
            depth = end_of(Head(depth=choice), stages) if path == "head.depth" else stages_of(path, choice, stages)
        except ValueError as error:
            raise SpaceError(f'space."{path}" holds {choice!r}: {error}') from None
        by_depth.setdefault(depth, choice)
    return [by_depth[depth] for depth in sorted(by_depth)]


def entries_of(dist: BaseDistribution) -> Sequence[Any]:
    """What a searched depth may be, ascending."""
    if isinstance(dist, CategoricalDistribution):
        return dist.choices
    assert isinstance(dist, IntDistribution)
    return range(dist.low, dist.high + 1)


def _axis(dist: BaseDistribution) -> Number:
    """Of choices, their indices."""
    if isinstance(dist, CategoricalDistribution):
        return IntDistribution(0, len(dist.choices) - 1)
    assert isinstance(dist, Number)
    return dist


def _size(axis: Number) -> int | None:
    """How many values there are; None where they are continuous."""
    return None if axis.step is None else round((axis.high - axis.low) / axis.step) + 1


def _entry(dist: BaseDistribution, value: Any) -> float:
    """As Optuna stores it, save that 1 and 1.0 are different choices."""
    if isinstance(dist, CategoricalDistribution):
        return float([(type(choice), choice) for choice in dist.choices].index((type(value), value)))
    return float(value)


def strong_defaults(job: Job, space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """What a practitioner would try first: the job's own values where the space has them, the head as deep as it may stand,
    at the deepest and the shallowest freeze depth of the space."""
    values = {path: _nearest(dist, _own_value(job, path)) for path, dist in space.items() if path not in DEPTHS}
    deepest = values | {path: entries_of(space[path])[-1] for path in DEPTHS if path in space}
    if "freeze.depth" in space:
        return [deepest, deepest | {"freeze.depth": entries_of(space["freeze.depth"])[0]}]
    return [deepest] if space else []


def _own_value(job: Job, path: str) -> Any:
    section, key = path.split(".", 1)
    return getattr(getattr(job, section), key)


def _nearest(dist: BaseDistribution, value: Any) -> Any:
    """`value` where the distribution has it; else the nearest end of its range, or its first choice."""
    if isinstance(dist, CategoricalDistribution):
        equal = [choice for choice in dist.choices if choice == value]
        alike = [choice for choice in equal if type(choice) is type(value)]  # 1 stage, or 1.0 of them
        return [*alike, *equal, *dist.choices][0]
    assert isinstance(dist, IntDistribution | FloatDistribution)
    held = min(max(value if value is not None else dist.low, dist.low), dist.high)
    if dist.step is not None:
        held = min(dist.low + round((held - dist.low) / dist.step) * dist.step, dist.high)
    return int(held) if isinstance(dist, IntDistribution) else held
