"""Arms against each other within a task, and over several: verdicts, costs, ranks. Everything is read from Parquet.

What an interval claims is in `stats.mean_interval` and in docs/guide.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from frostline import stats
from frostline.across import Across, across
from frostline.arms import ArmResult, StudyResult, read_study
from frostline.pairs import Pair, compare_pairs
from frostline.spec import Mode
from frostline.transfer import Gain, gain_of

COSTS = ("alone_s", "peak_mib", "trainable_params", "stored_bytes")
"""What a test score is held against."""
FEW = 5
"""Fewer seeds than this are remarked on."""


class ComparisonError(ValueError):
    """Studies that cannot be compared with each other; the text says which, and what to do."""


@dataclass(frozen=True)
class Task:
    """Arms that trained on as many samples of the same pool and were tested on the same samples, as JSON values."""

    name: str
    studies: list[str]
    data: str
    pool: int | None
    n_train: int | None
    n_test: int | None
    overlap: float
    """Share of its train samples that a confirmation has in common with one of another seed, on average."""
    verdict: str
    arms: list[ArmResult]
    """By mean test score, the best first; those without one last."""
    pairs: list[Pair]
    transfer: Gain | None
    """What pretrained weights gained; None where no arm started from random ones, or none from pretrained ones."""
    fronts: dict[str, list[dict[str, Any]]]
    """Cost -> a point an arm: label, cost, score (mean on test), non_dominated, and share: of bootstrap replicates, in which
    it is non-dominated."""
    notes: list[str]


@dataclass(frozen=True)
class Comparison:
    """What `frostline compare` answers; `dataclasses.asdict` makes it JSON."""

    metric: str
    mode: Mode
    tasks: list[Task]
    across: Across | None
    """None for one task, or where no two arms are confirmed in all."""
    notes: list[str]
    """What holds for all of it."""


def compare(studies: Sequence[str | Path]) -> Comparison:
    """Compare the arms of studies. Those with the same data, split and number of train samples are one task.

    Raises ComparisonError where a study is named twice or objectives differ, and what `arms.read_study` raises.
    """
    for place, times in Counter(Path(study).absolute().resolve() for study in studies).items():
        if times > 1:
            raise ComparisonError(f"{place} is named {times} times; name each study once")
    found = [read_study(study) for study in studies]
    if len({study.metric for study in found}) > 1:
        told = ", ".join(f"{study.path} ({study.metric})" for study in found)
        raise ComparisonError(f"objectives differ: {told}. Compare studies that searched for the same score")
    metric, mode = found[0].metric, found[0].mode
    groups: dict[tuple[Any, ...], list[StudyResult]] = {}
    for study in _labelled(found):
        groups.setdefault(study.task, []).append(study)
    tasks = [_task(group, mode) for group in groups.values()]
    return Comparison(metric, mode, tasks, across([task.arms for task in tasks], mode), list(_notes(found, tasks)))


def front(arms: Sequence[ArmResult], cost: str, mode: Mode) -> list[dict[str, Any]]:
    """Arms with a mean test score and this cost: which of them no other beats, and in what share of bootstrap replicates."""
    known = [arm for arm in arms if arm.finalist and arm.finalist.test.n and getattr(arm.finalist, cost) is not None]
    if not known:
        return []
    seeds = sorted({seed for arm in known for seed in arm.scores})
    scores, costs = np.full((2, len(known), len(seeds)), np.nan)
    for row, arm in enumerate(known):
        for each in arm.confirmations:
            if each["test_score"] is not None:
                column = seeds.index(each["seed"])
                scores[row, column] = each["test_score"] if mode == "max" else -each["test_score"]
                value = each.get(cost, getattr(arm.finalist, cost))
                costs[row, column] = np.nan if value is None else value
    best = stats.non_dominated(np.nanmean(scores, axis=1), np.nanmean(costs, axis=1)).tolist()
    shares = stats.front_shares(scores, costs).tolist()
    return [
        {
            "label": arm.label,
            "cost": getattr(arm.finalist, cost),
            "score": arm.finalist.test.mean if arm.finalist else None,
            "non_dominated": is_best,
            "share": share,
        }
        for arm, is_best, share in zip(known, best, shares, strict=True)
    ]


def _labelled(studies: Sequence[StudyResult]) -> list[StudyResult]:
    """Arms under the shortest names that are unique in every task: the arm's, with its backbone's, or with its study's."""

    def names(arm: ArmResult, study: StudyResult) -> tuple[str, ...]:
        backbone = arm.backbone.rpartition("/")[2]
        return arm.arm, f"{arm.arm} {backbone}", f"{study.name}/{arm.arm}", f"{study.path}/{arm.arm}"

    def unique(kind: int) -> bool:
        used = Counter((study.task, names(arm, study)[kind]) for study in studies for arm in study.arms)
        return all(times == 1 for times in used.values())

    kind = next(kind for kind in range(4) if unique(kind))
    return [
        replace(study, arms=[replace(arm, label=names(arm, study)[kind]) for arm in study.arms]) for study in studies
    ]


def _task(studies: Sequence[StudyResult], mode: Mode) -> Task:
    sign = 1 if mode == "max" else -1
    means = {arm.label: arm.finalist.test.mean if arm.finalist else None for study in studies for arm in study.arms}
    order = {label: (mean is None, -sign * (mean or 0.0), label) for label, mean in means.items()}
    arms = sorted((arm for study in studies for arm in study.arms), key=lambda arm: order[arm.label])
    confirmed = [arm for arm in arms if arm.confirmations]
    answers = {
        arm.label: {
            each["seed"]: study.answers[each["trial_id"]]
            for each in arm.confirmations
            if each["trial_id"] in study.answers
        }
        for study in studies
        for arm in study.arms
    }
    overlap = min(study.overlap for study in studies)  # the same in all that have confirmations
    pairs = compare_pairs({arm.label: arm.scores for arm in confirmed}, answers, mode, overlap)
    sizes = next((each for arm in confirmed for each in arm.confirmations if each["n_test"]), {})
    return Task(
        name=" + ".join(study.name for study in studies),
        studies=[study.path for study in studies],
        data=studies[0].data,
        pool=next((study.pool for study in studies if study.pool), None),
        n_train=sizes.get("n_train"),
        n_test=sizes.get("n_test"),
        overlap=overlap,
        verdict=_verdict(confirmed, pairs),
        arms=arms,
        pairs=pairs,
        transfer=gain_of(arms, pairs, mode),
        fronts={cost: front(confirmed, cost, mode) for cost in COSTS},
        notes=list(_task_notes(studies, arms)),
    )


def _verdict(confirmed: Sequence[ArmResult], pairs: Sequence[Pair]) -> str:
    """The arm with the best mean test score, and what sets it apart from each of the others."""
    scored = [arm.label for arm in confirmed if arm.finalist and arm.finalist.test.n]
    if not scored:
        why = "all confirmations failed" if confirmed else "none has been re-run on fresh seeds and scored on test"
        return f"Nothing can be said of the arms: {why}."
    leader = scored[0]
    if len(confirmed) == 1:
        return f"Only {leader} has been re-run on fresh seeds and scored on test: there is nothing to compare it with."
    groups: dict[str, list[str]] = {}
    for pair in pairs:
        if leader in (pair.a, pair.b):
            other = pair.b if pair.a == leader else pair.a
            behind = pair.verdict.startswith("better") and pair.b == leader
            groups.setdefault("behind" if behind else pair.verdict, []).append(other)
    words = {
        "better": "It is better than {}.",
        "better here": "On these test samples it is better than {}; others may not show it.",
        "not distinguishable": "It is not distinguishable from {}.",
        "not compared": "It cannot be compared with {}.",
        "behind": "On the seeds that both completed it is worse than {}.",
    }
    said = [text.format(_listed(groups[group])) for group, text in words.items() if group in groups]
    pool_bound = [pair.b for pair in pairs if pair.a == leader and pair.pool_bound]
    if pool_bound:
        said.append(f"Trained from another pool it may not be better than {_listed(pool_bound)}.")
    return " ".join([f"{leader} has the best mean test score.", *said])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _task_notes(studies: Sequence[StudyResult], arms: Sequence[ArmResult]) -> Iterator[str]:
    """What limits the task's verdict."""
    asked = {study.path: study.seeds for study in studies}
    for arm in arms:
        found, ended = arm.finalist, len(arm.confirmations)
        if found is None:
            yield f"{arm.label}: no trial completed ({', '.join(f'{n} {status}' for status, n in arm.search.counts.items())})"
        elif 0 < ended < asked[arm.study]:
            yield f"{arm.label}: {ended} of {asked[arm.study]} confirmations have ended; the same search command runs the others"
        if found and found.failed:
            reason = next(each["reason"] for each in arm.confirmations if each["reason"])
            yield f"{arm.label}: {found.failed} of {ended} confirmations failed, for example: {reason}"
    few = [f"{arm.label} {len(arm.confirmations)}" for arm in arms if 0 < len(arm.confirmations) < FEW]
    if few:
        yield f"fewer than {FEW} seeds make wide intervals: {', '.join(few)}"
    left = [arm.label for arm in arms if arm.finalist and not arm.confirmations]
    if left:
        yield (
            f"not re-run on fresh seeds: {_listed(left)}. Validation scores of a search are no basis for a comparison, as the best of "
            'many looks better than it is: run the job under another name with confirm.finalists = "arms" and confirm.seeds = 5'
        )
    budgets = {arm.label: sum(arm.search.counts.values()) for arm in arms}
    if len(set(budgets.values())) > 1:
        yield "arms had different numbers of trials: " + ", ".join(f"{label} {n}" for label, n in budgets.items())
    if len({study.hardware for study in studies}) > 1:
        yield "costs were measured on different hardware: " + ", ".join(sorted({study.hardware for study in studies}))


def _notes(studies: Sequence[StudyResult], tasks: Sequence[Task]) -> Iterator[str]:
    """What holds for the whole comparison."""
    if len({study.task[0] for study in studies}) < len(tasks):
        yield "some tasks are the same data, split otherwise or trained on fewer samples: they are not independent"
    if len(tasks) > 1:
        shared = set.intersection(*({arm.label for arm in task.arms if arm.confirmations} for task in tasks))
        if len(shared) < 2:
            yield "fewer than two arms are confirmed in every task: nothing is said over tasks. Arms are matched by their names"
