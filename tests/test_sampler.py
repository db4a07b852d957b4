"""Optuna's TPE for many proposals: one of them is what TPESampler proposes, and more of them keep apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from frostline.propose import Proposer
from frostline.sampler import TOGETHER, WIDTHS, BatchSampler, Estimator, frozen
from frostline.seeds import derive_seed
from frostline.testing import toy_job

SPACE = {
    "freeze.depth": [0.0, 0.5, 1.0],
    "freeze.norm": ["affine"],  # Optuna does not model a choice of one
    "head.hidden": {"low": 0, "high": 512, "step": 16},
    "head.dropout": {"low": 0.0, "high": 0.5},
    "train.epochs": {"low": 1, "high": 300, "log": True},
    "train.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "train.warmup": {"low": 0.0, "high": 0.3, "step": 0.1},
}
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "running": TrialState.RUNNING}
CHANGED = """
Optuna {}: TPESampler proposes {}, frostline.sampler.BatchSampler {} from the same trials and seed. It is built from private
parts of optuna.samplers._tpe, which must have changed: compare TPESampler._sample with it, or hold Optuna back.
"""


def history(seed: int, *, maximize: bool, ended: int) -> tuple[Proposer, optuna.Study]:
    """An arm and a study of Optuna's with the same trials: complete, pruned, failed and, last, running ones."""
    options = ["search.startup_trials=1", "search.trials=999", "search.defaults=false", "search.pruner.kind=none"]
    options += [f"seed={seed}", *([] if maximize else ["objective.metric=nll"])]
    job = toy_job(Path("unused"), options, arms={"arm": {"strategy": "freeze_depth", "space": SPACE}})
    arm = Proposer(job, "arm", 4, 999)
    study = optuna.create_study(direction="maximize" if maximize else "minimize")
    rng = np.random.default_rng(seed)
    for number, params in enumerate(arm.ask(ended + 5)):  # at random, nothing having ended
        status = str(rng.choice(["complete", "complete", "pruned", "failed"])) if number < ended else "running"
        heard = {epoch: float(rng.normal()) for epoch in range(1, int(rng.integers(1, 4)))}
        for epoch, score in heard.items():
            arm.report({number: (epoch, score)})
        value = float(rng.integers(9)) if status == "complete" else None
        if status != "running":
            arm.tell(number, status, value)
        state = STATES.get(status, TrialState.FAIL)
        study.add_trial(
            create_trial(
                state=state, value=value, params=params, distributions=arm.space, intermediate_values=heard
            )
        )  # fmt: skip
    return arm, study


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(("seed", "ended"), [(0, 8), (1, 30), (2, 30), (3, 120), (4, 390)])
def test_a_single_proposal_is_that_of_optunas_own_sampler(seed: int, ended: int, maximize: bool) -> None:
    arm, study = history(seed, maximize=maximize, ended=ended)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=0, seed=derive_seed(arm.seed, "tpe", arm.asked))
    theirs = study.ask(arm.space).params
    (ours,) = arm.ask()
    assert ours == theirs, CHANGED.format(optuna.__version__, theirs, ours)


def fit(space: dict[str, BaseDistribution], points: list[tuple[float, ...]], k: int) -> BatchSampler:
    """A model of complete trials, the first of which are the best."""
    trials = [frozen(number, TrialState.COMPLETE, float(number), None) for number in range(len(points))]
    return BatchSampler(space, trials, points, k, maximize=False, seed=0)


def test_each_is_the_best_of_24_by_optunas_own_measure() -> None:
    model = fit({"x": FloatDistribution(0, 1)}, [(x,) for x in np.linspace(0.4, 1, 40)], 1)
    found = model.candidates()
    assert len(set(found)) == 24
    samples = {"x": np.array(found)[:, 0]}
    worth = model._compute_acquisition_func(samples, model._estimator(model.good), model._estimator(model.bad))
    assert np.all(np.diff(worth) <= 0)


def test_proposals_keep_off_those_before_them() -> None:
    points, spread = [(0.5,)] * 3 + [(x,) for x in np.linspace(0, 1, 27)], []
    for lies in (True, False):
        model, found = fit({"x": FloatDistribution(0, 1)}, points, 10 * TOGETHER), []
        for _ in range(10 * TOGETHER):
            found.append(model.candidates()[0])
            if lies:
                model.lie(found[-1])
        spread.append(np.std(found))
    assert spread[0] > 1.2 * spread[1]


@pytest.mark.parametrize(("k", "drawn"), [(1, [1]), (2, [1, 1]), (8, [3, 3, 2]), (64, [16, 16, 16, 16])])
def test_how_many_are_drawn_together(k: int, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts, sample = [], Estimator.sample

    def counting(self: Estimator, rng: np.random.RandomState, size: int) -> Any:
        counts.append((size // 24, self.width))
        return sample(self, rng, size)

    monkeypatch.setattr(Estimator, "sample", counting)
    model = fit({"x": FloatDistribution(0, 1)}, [(x,) for x in np.linspace(0, 1, 30)], k)
    for _ in range(k):
        model.lie(model.candidates()[0])
    assert counts == [(count, WIDTHS[i % len(WIDTHS)]) for i, count in enumerate(drawn)]


def test_kernels_are_narrower_around_points_and_not_the_one_as_wide_as_the_space() -> None:
    model = fit({"x": FloatDistribution(0, 1), "n": IntDistribution(0, 9)}, [(0.25, 3.0), (0.5, 4.0)], 1)
    points = [(0.25, 3.0), (0.5, 4.0)]
    wide, narrow = (model._estimator(points, width)._mixture_distribution.distributions for width in (1.0, 0.25))
    for one, other, whole in zip(wide, narrow, (1.0, 10.0), strict=True):
        np.testing.assert_allclose(other.sigma[:2], one.sigma[:2] / 4)
        assert one.sigma[2] == other.sigma[2] == whole
