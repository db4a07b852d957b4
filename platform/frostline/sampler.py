"""Optuna's TPE, one fit of which makes many proposals.

Optuna's TPESampler fits anew, and walks its whole study, for each proposal; here its own parts are called once for many.
Two things make these as good as one at a time (benchmarks/proposals.py): each counts as a bad point for later ones, and
they are drawn with kernels of several widths. The parts are private to Optuna 5: tests compare a single proposal with
TPESampler's, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

WIDTHS = (1.0, 0.5, 0.25)  # of the good points' kernels, in turn
TOGETHER = 16  # at most so many proposals are drawn before they count as bad

Point = tuple[float, ...]
"""A configuration as Optuna stores it: in the order of the space, the value of a number or the index of a choice."""


@dataclass(frozen=True)
class Goal:
    """What Optuna's split into good and bad trials reads of a study."""

    direction: StudyDirection

    @property
    def directions(self) -> list[StudyDirection]:
        """One per objective."""
        return [self.direction]


def frozen(number: int, state: TrialState, score: float | None, last: tuple[int, float] | None) -> FrozenTrial:
    """What that split reads of a trial: its final `score`, or None and its `last` epoch with the score there."""
    return FrozenTrial(
        number=number,
        state=state,
        value=score,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values=dict([last]) if last else {},
        trial_id=number,
    )


class Estimator(_ParzenEstimator):
    """Optuna's, with the kernels of numbers `width` times as wide around observed points."""

    def __init__(self, width: float, *args: Any) -> None:
        self.width = width
        super().__init__(*args)

    def _calculate_numerical_distributions(self, observations: Any, search_space: Any, parameters: Any) -> Any:
        found: Any = super()._calculate_numerical_distributions(observations, search_space, parameters)
        return found._replace(sigma=np.append(found.sigma[:-1] * self.width, found.sigma[-1]))


class BatchSampler(TPESampler):
    """A fit to `trials`, ended and running, that stand at `points[number]`, for `k` proposals. Those that run count as bad
    (the constant liar)."""

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        trials: Sequence[FrozenTrial],
        points: Sequence[Point],
        k: int,
        *,
        maximize: bool,
        seed: int,
    ) -> None:
        super().__init__(seed=seed)
        self.space, self.k = space, k
        self.low = [getattr(dist, "low", -math.inf) for dist in space.values()]  # choices have no ends
        self.high = [getattr(dist, "high", math.inf) for dist in space.values()]
        goal = cast(Study, Goal(StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE))
        ended = sum(trial.state.is_finished() for trial in trials)
        good, bad = _split_trials(goal, list(trials), default_gamma(ended))
        self.good = [points[trial.number] for trial in good]
        self.bad = [points[trial.number] for trial in bad]
        self.lies = 0
        self.drawn = self._draw()

    def candidates(self) -> list[Point]:
        """For the next proposal, the best first; time after time."""
        return next(self.drawn)

    def lie(self, point: Point) -> None:
        """Count a proposal as bad until it is known, so that later ones keep off it."""
        self.bad.append(point)
        self.lies += 1

    def _draw(self) -> Iterator[list[Point]]:
        most, each = min(TOGETHER, math.ceil(self.k / len(WIDTHS))), self._n_ei_candidates
        good = [self._estimator(self.good, width) for width in WIDTHS[: self.k]]
        while True:
            for estimator in good:
                count = max(1, min(most, self.k - self.lies))
                drawn = estimator.sample(self._rng.rng, count * each)
                worth = self._compute_acquisition_func(drawn, estimator, self._estimator(self.bad))
                only = np.zeros_like(worth)  # the index of a choice of one, which Optuna does not model
                points = np.stack([drawn.get(path, only) for path in self.space], axis=1)
                points = np.clip(points, self.low, self.high)  # Optuna's arithmetic may miss an end by a last digit
                for group in range(0, len(worth), each):
                    order = group + np.argsort(-worth[group : group + each], kind="stable")
                    yield [tuple(point) for point in points[order].tolist()]

    def _estimator(self, points: Sequence[Point], width: float = 1.0) -> Estimator:
        table = np.array(points, float).reshape(len(points), len(self.space))
        space = {path: dist for path, dist in self.space.items() if not dist.single()}
        observed = {path: table[:, i] for i, path in enumerate(self.space) if path in space}
        return Estimator(width, observed, space, self._parzen_estimator_parameters)
