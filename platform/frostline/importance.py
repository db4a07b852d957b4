"""Which searched values decided whether a trial was among an arm's best, by PED-ANOVA. The only reader of Optuna in a comparison."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from frostline.propose import distributions
from frostline.spec import Arm

TOP = 5
"""At least so many trials are among the best; fewer make no density (Optuna's own advice)."""


def importance(
    arm: Arm, stages: int, values: Sequence[Mapping[str, Any]], scores: Sequence[float]
) -> dict[str, float] | str:
    """Searched key -> its share of the importances, the largest first; or why there is none.

    PED-ANOVA (Watanabe et al. 2023) compares where an arm's best tenth of trials (at least 5) lies with where all its trials
    lie, one key at a time: what a sampler tried more often does not look important for that. `values` are those that trials
    were asked with, `scores` higher for better, of pruned and failed trials too.
    """
    if len(scores) < 2 * TOP:
        return f"{len(scores)} trials are too few for it, {2 * TOP} are needed"
    space = distributions(arm, stages)
    if len(space) < 2:
        return "a single searched key has all of it" if space else "nothing is searched"
    study = _study()
    study.add_trials(
        create_trial(state=TrialState.COMPLETE, params=dict(each), distributions=dict(space), value=score)
        for each, score in zip(values, scores, strict=True)
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, TOP / len(scores)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scores that tie are told below
        found = evaluator.evaluate(study)
    total = sum(found.values())
    if total <= 0:
        return "the best trials lie where all others lie, or all score the same"
    return {key: value / total for key, value in sorted(found.items(), key=lambda item: (-item[1], item[0]))}


def _study() -> optuna.Study:
    """An empty one in memory, made without a line in the log."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(before)
