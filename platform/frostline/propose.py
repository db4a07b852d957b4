"""One arm's proposals: Optuna's samplers and pruners behind ask, report and tell.

A proposal depends on the arm's history and its own number, never on a generator's hidden state: the sampler is made
afresh for each ask, seeded by the number. So a study that is rebuilt from its rows goes on as if nothing had happened,
and a recorded order of asks, reports and tells replays to the same proposals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from frostline.spec import (
    Arm,
    Freeze,
    Job,
    Pruner,
    Range,
    Scalar,
    depth_of,
    derive_seed,
    holds_integers,
    is_searched,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class SpaceError(ValueError):
    """A space that does not fit the backbone or the budget at hand."""


@dataclass(frozen=True)
class Proposal:
    """What an ask answers: values by dotted job key, and what Optuna keeps about them."""

    values: dict[str, Any]
    state: dict[str, Any]


class Sobol(optuna.samplers.QMCSampler):
    """Optuna's scrambled Sobol sequence over a space that is given, rather than inferred from earlier trials: a point
    then depends on its number alone, however many trials run at once."""

    def __init__(self, space: dict[str, BaseDistribution], seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(scramble=True, seed=seed)
        self.space = space

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return self.space


class Grid(optuna.samplers.GridSampler):
    """Optuna's grid, without its call to stop an optimize loop, which ask and tell do not have."""

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        pass


class Proposer:
    """The Optuna study of one arm; its trial numbers are the arm's."""

    def __init__(self, job: Job, name: str, stages: int, budget: int) -> None:
        arm = job.arms[name]
        self.kind = arm.sampler or job.search.sampler
        self.job, self.name = job, name
        self.space = distributions(arm, stages)
        self.grid = {path: _grid_values(dist) for path, dist in self.space.items()} if self.kind == "grid" else {}
        points = math.prod(len(values) for values in self.grid.values())
        if self.grid and points < budget:
            raise SpaceError(
                f"arms.{name}: its share of search.trials is {budget}, and its grid has only {points} points; "
                f"lower search.trials to {points * len(job.arms)} or widen the space"
            )
        self.defaults = strong_defaults(job, arm, self.space, stages) if job.search.defaults and not self.grid else []
        self.storage = optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(
            storage=self.storage,
            direction="maximize" if job.objective.mode == "max" else "minimize",
            pruner=build_pruner(job.search.pruner),
        )
        self.study_id = self.storage.get_study_id_from_name(self.study.study_name)

    @property
    def asked(self) -> int:
        """How many trials the arm has proposed."""
        return self.storage.get_n_trials(self.study_id)

    def values(self, number: int) -> dict[str, Any]:
        """The configuration that trial `number` was asked with, by dotted job key."""
        return dict(self.storage.get_trial(self._trial_id(number)).params)

    def ask(self) -> Proposal:
        """The arm's next configuration."""
        number = self.asked
        self.study.sampler = self._sampler(number)
        if number < len(self.defaults):
            self.study.enqueue_trial(self.defaults[number])
        trial = self.study.ask(self.space)
        kept = self.storage.get_trial(self._trial_id(number)).system_attrs
        return Proposal(
            dict(trial.params), {"trial": kept, "study": self.storage.get_study_system_attrs(self.study_id)}
        )

    def report(self, number: int, epoch: int, score: float) -> bool:
        """Take a running trial's score after an epoch; True where the pruner would stop it now."""
        trial_id = self._trial_id(number)
        self.storage.set_trial_intermediate_value(trial_id, epoch, score)
        return self.study.pruner.prune(self.study, self.storage.get_trial(trial_id))

    def tell(self, number: int, status: str, score: float | None) -> dict[str, Any]:
        """End a trial; answers what Optuna keeps about it."""
        self.study.tell(number, score if status == "complete" else None, state=STATES[status])
        return self.storage.get_trial(self._trial_id(number)).system_attrs

    def restore(
        self,
        proposal: Proposal,
        *,
        status: str | None = None,
        score: float | None = None,
        epochs: Mapping[int, float] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the arm's next trial as the rows have it: finished with `status`, or (None) still to be run."""
        epochs = epochs or {}
        if status == "pruned":  # as Optuna's own tell does
            score = epochs[max(epochs)]
        for key, value in proposal.state["study"].items():
            self.storage.set_study_system_attr(self.study_id, key, value)
        self.study.add_trial(
            optuna.trial.create_trial(
                state=STATES[status] if status else TrialState.RUNNING,
                params=proposal.values,
                distributions=self.space,
                value=score,
                intermediate_values=dict(epochs),
                system_attrs=dict(attrs if attrs is not None else proposal.state["trial"]),
            )
        )

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        if not self.space:
            return optuna.samplers.RandomSampler(seed=0)
        whole_arm = derive_seed(self.job.seed, "sampler", self.name)
        this_ask = derive_seed(self.job.seed, "sampler", self.name, number)
        match self.kind:
            case "tpe":
                return optuna.samplers.TPESampler(seed=this_ask, n_startup_trials=self.job.search.startup_trials)
            case "random":
                return optuna.samplers.RandomSampler(seed=this_ask)
            case "qmc":
                return Sobol(self.space, whole_arm)
        return Grid(self.grid, seed=whole_arm)


def build_pruner(pruner: Pruner) -> optuna.pruners.BasePruner:
    """Optuna's pruner for a job's; it hears epochs counted from 1."""
    match pruner.kind:
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=pruner.grace_epochs, reduction_factor=pruner.factor
            )
        case "median":
            return optuna.pruners.MedianPruner(n_warmup_steps=pruner.grace_epochs)
        case "none":
            return optuna.pruners.NopPruner()


def distributions(arm: Arm, stages: int) -> dict[str, BaseDistribution]:
    """Optuna's distributions of an arm's space, for a backbone with this many stages. Raises SpaceError."""
    return {path: _distribution(path, dim, stages) for path, dim in arm.space.items() if is_searched(path, dim)}


def _distribution(path: str, dim: Range | tuple[Scalar, ...] | Scalar, stages: int) -> BaseDistribution:
    if isinstance(dim, Range):
        if holds_integers(path):
            return IntDistribution(int(dim.low), int(dim.high), log=dim.log, step=int(dim.step or 1))
        return FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
    if isinstance(dim, tuple):
        return CategoricalDistribution(_distinct_depths(dim, stages) if path == "freeze.depth" else dim)
    return IntDistribution(0, stages)  # "freeze.depth" = "all"


def _distinct_depths(choices: Sequence[Scalar], stages: int) -> list[Scalar]:
    """The choices that freeze different stages of this backbone, in order of depth."""
    by_depth: dict[int, Scalar] = {}
    for choice in choices:
        try:
            depth = depth_of(Freeze.model_validate({"strategy": "freeze_depth", "depth": choice}), stages)
        except ValueError as error:
            raise SpaceError(f'space."freeze.depth" holds {choice!r}: {error}') from None
        by_depth.setdefault(depth, choice)
    return [by_depth[depth] for depth in sorted(by_depth)]


def _grid_values(dist: BaseDistribution) -> list[Any]:
    if isinstance(dist, CategoricalDistribution):
        return list(dist.choices)
    assert isinstance(dist, IntDistribution | FloatDistribution)
    assert dist.step is not None
    count = math.floor((dist.high - dist.low) / dist.step + 1e-9) + 1
    return [dist.low + index * dist.step for index in range(count)]


def strong_defaults(job: Job, arm: Arm, space: Mapping[str, BaseDistribution], stages: int) -> list[dict[str, Any]]:
    """What a practitioner would try first: the job's own values where the space has them, at the deepest and the
    shallowest freeze depth of the space."""
    values = {path: _nearest(dist, _own_value(job, path)) for path, dist in space.items()}
    depth = space.get("freeze.depth")
    if depth is None:
        return [values] if values else []
    ends = depth.choices if isinstance(depth, CategoricalDistribution) else (0, stages)
    return [values | {"freeze.depth": end} for end in (ends[-1], ends[0])]


def _own_value(job: Job, path: str) -> Any:
    section, key = path.split(".", 1)
    return getattr(getattr(job, section), key)


def _nearest(dist: BaseDistribution, value: Any) -> Any:
    """`value` where the distribution has it; else the nearest end of its range, or its first choice."""
    if isinstance(dist, CategoricalDistribution):
        return value if value in dist.choices else dist.choices[0]
    assert isinstance(dist, IntDistribution | FloatDistribution)
    held = min(max(value if value is not None else dist.low, dist.low), dist.high)
    if dist.step is not None:
        held = dist.low + round((held - dist.low) / dist.step) * dist.step
    return int(held) if isinstance(dist, IntDistribution) else held
