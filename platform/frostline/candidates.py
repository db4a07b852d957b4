"""Backbones as cheap probes saw them: where to cut each, which to take, how far its source is from the target. Pure functions
from scores to decisions, and those in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from frostline.spec import LOWER_IS_BETTER, Metric, Mode, Task
from frostline.stats import kendall
from frostline.text import count

NAMES = {"knn": "kNN", "mean": "nearest class mean", "lda": "LDA", "ridge": "ridge"}
SIZES = ("parameters", "features")
"""Of a place: orders that know nothing of the data, to see any other beside."""


@dataclass(frozen=True)
class HeadScore:
    """What a head without training reached at a cut. A score that it does not have is None."""

    method: str
    strength: float | None
    """k of the neighbours, LDA's shrinkage, or ridge's penalty in mean eigenvalues of the scatter; of the fit to all of train."""
    inner: float | None
    """The objective by cross-validation on train, all choices of the method being made anew in each fold."""
    val: float | None
    """The objective on val."""
    val_scores: dict[Metric, float] = field(default_factory=dict)
    """All metrics on val; nll of those only that give probabilities."""
    losses: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(n,) of each train sample in the cross-validation: `probing.losses_of`."""
    reason: str | None = None
    """Why there are no scores."""


@dataclass(frozen=True)
class Place:
    """A cut where a head may stand."""

    cut: int
    stage: str
    """The last stage before it."""
    parameters: int
    """Of all stages before it."""
    features: int
    heads: tuple[HeadScore, ...]
    logme: float | None
    h_score: float | None


@dataclass(frozen=True)
class Candidate:
    """A backbone, at every cut where it can be left."""

    backbone: str
    weights: str
    """As the job has it: `pretrained`, `random` or a path."""
    weights_hash: str
    size: int
    """Of an input: the side in pixels, or the length in tokens."""
    stages: int
    images_passed: int
    """Through the backbone, now; those whose means were stored already passed before."""
    seconds: float
    places: tuple[Place, ...]
    """By cut, ascending; the last is the end."""

    @property
    def label(self) -> str:
        """Its name, and its weights where they are not those that the name stands for."""
        return self.backbone if self.weights == "pretrained" else f"{self.backbone} (weights: {self.weights})"


@dataclass(frozen=True)
class Probed:
    """Candidates for one task, in the order in which they were named."""

    name: str
    """Of the job."""
    metric: Metric
    mode: Mode
    n_train: int
    n_val: int
    task: Task
    classes: int
    inputs: str
    """What was classified: `images` or `texts`."""
    folds: int
    """Of the cross-validation on train; 0 where there is none."""
    no_folds: str | None
    """Why not."""
    candidates: tuple[Candidate, ...]


def standing(head: HeadScore) -> float | None:
    """The score by which heads are chosen: never val's, unless there is no other."""
    return head.val if head.inner is None else head.inner


def best_head(place: Place, mode: Mode, score: Callable[[HeadScore], float | None] = standing) -> HeadScore | None:
    """The head with the best score; None where none has any."""
    sign = 1 if mode == "max" else -1
    scored = [(sign * found, head) for head in place.heads if (found := score(head)) is not None]
    return max(scored, key=lambda each: each[0])[1] if scored else None


def best_place(candidate: Candidate, mode: Mode) -> tuple[Place, HeadScore] | None:
    """The cut with the best head, of equal ones the deepest, where training costs least; None where no head has a score."""
    sign = 1 if mode == "max" else -1
    found = [(place, head) for place in candidate.places if (head := best_head(place, mode))]
    return max(found, key=lambda each: (sign * (standing(each[1]) or 0.0), each[0].cut), default=None)


def ranked(probed: Probed) -> list[tuple[Candidate, Place, HeadScore]]:
    """The candidates at their best cuts, best first; those without any score are left out."""
    sign = 1 if probed.mode == "max" else -1
    found = [(each, *best) for each in probed.candidates if (best := best_place(each, probed.mode))]
    return sorted(found, key=lambda each: -sign * (standing(each[2]) or 0.0))


def equals(candidate: Candidate, mode: Mode) -> list[int]:
    """Other cuts whose best head cannot be told apart from the best of all (`alike`)."""
    best = best_place(candidate, mode)
    if best is None:
        return []
    heads = [(place.cut, best_head(place, mode)) for place in candidate.places if place is not best[0]]
    return [cut for cut, head in heads if head and alike(best[1], head)]


def alike(a: HeadScore, b: HeadScore) -> bool:
    """Whether their losses on the same left-out train images differ by less than two standard errors of that difference, by
    the number of images. False where these are not known."""
    if a.losses is None or b.losses is None:
        return False
    apart = b.losses - a.losses
    return bool(abs(apart.mean()) <= 2 * apart.std(ddof=1) / np.sqrt(len(apart)))


def binomial_error(share: float, n: int) -> float:
    """Standard error of a share of n samples; of one that is 0 or 1 too, as if one more had been of each kind."""
    share = (share * n + 1) / (n + 2)
    return float(np.sqrt(share * (1 - share) / n))


def distance(candidate: Candidate, metric: Metric, mode: Mode) -> tuple[str, float, float] | None:
    """How far source and target are: in a word, as what the features lose from the best cut to the end (0 or more, of the
    objective), and as the loss at the end over that at the best cut (1 or more; the loss is 1 - score, or the score where lower is better).

    `near` where the end is the best cut or cannot be told apart from it, `far` where the loss at least doubles, `some way
    off` between. None where the end has no score.
    """
    best, end = best_place(candidate, mode), best_head(candidate.places[-1], mode)
    if best is None or end is None:
        return None
    scores = standing(best[1]), standing(end)
    losses = [score if metric in LOWER_IS_BETTER else 1 - score for score in scores if score is not None]
    drop, ratio = losses[1] - losses[0], losses[1] / max(losses[0], 1e-12)
    if best[0] is candidate.places[-1] or candidate.places[-1].cut in equals(candidate, mode):
        return "near", drop, ratio
    return ("far" if ratio >= 2 else "some way off"), drop, ratio


def orders(places: Sequence[Place], mode: Mode) -> dict[str, list[float | None]]:
    """What orders places -> its value at each, greater where it takes them to be better: each method's own score, `logme`,
    `h_score`, and the sizes."""
    sign = 1 if mode == "max" else -1
    found: dict[str, list[float | None]] = {}
    for number, head in enumerate(places[0].heads):
        scores = [standing(place.heads[number]) for place in places]
        found[head.method] = [None if score is None else sign * score for score in scores]
    found |= {"logme": [place.logme for place in places], "h_score": [place.h_score for place in places]}
    for size in SIZES:
        found[size] = [float(getattr(place, size)) for place in places]
    return found


def rank_correlations(places: Sequence[Place], mode: Mode) -> dict[str, float | None]:
    """What orders places -> Kendall's tau with the best score on val at each, which no choice has looked at; None where
    fewer than 3 places have both."""
    sign = 1 if mode == "max" else -1
    heads = [best_head(place, mode, lambda head: head.val) for place in places]
    val = [None if head is None or head.val is None else sign * head.val for head in heads]
    return {name: _tau(values, val) for name, values in orders(places, mode).items()}


def between_methods(places: Sequence[Place], mode: Mode) -> list[float]:
    """Kendall's tau between each two methods, ascending; the sizes are none."""
    found = [values for name, values in orders(places, mode).items() if name not in SIZES]
    return sorted(tau for a, b in combinations(found, 2) if (tau := _tau(a, b)) is not None)


def _tau(a: Sequence[float | None], b: Sequence[float | None]) -> float | None:
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return kendall(*zip(*both, strict=True)) if len(both) >= 3 else None


def advice(candidate: Candidate, probed: Probed) -> Iterator[tuple[str, str]]:
    """What follows for one backbone: what it is about, and what is said of it."""
    best = best_place(candidate, probed.mode)
    if best is None:
        reason = next((head.reason for place in candidate.places for head in place.heads if head.reason), None)
        yield "where to cut", f"no head could be scored by {probed.metric}{f': {reason}' if reason else ''}"
        return
    place, head = best
    yield "where to cut", f"after stage {place.cut} of {candidate.stages} ({place.stage}), head.depth={place.cut}"
    yield "", f"{_named(head)} there: {_said(head, probed)}"
    if others := equals(candidate, probed.mode):
        also = f"cut{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
        yield "", f"not told apart from it: {also}; of these the earliest runs least"
    if candidate.weights != "random" and (found := distance(candidate, probed.metric, probed.mode)):
        word, drop, ratio = found
        where = f"{word}: the features are best at {100 * place.cut / candidate.stages:.0f} % of the depth"
        lower = probed.metric in LOWER_IS_BETTER
        lost = f"{'add' if lower else 'lose'} {drop:.4f} {probed.metric}"
        loss = probed.metric if lower else f"1 - {probed.metric}"
        rest = f" and {lost} from there to the end ({loss}: {ratio:.1f} times)" if place.cut < candidate.stages else ""
        yield "source, target", where + rest
    if taus := between_methods(candidate.places, probed.mode):
        yield (
            "rank correlation",
            f"Kendall's tau over {len(candidate.places)} cuts: {taus[0]:.2f} to {taus[-1]:.2f} between any two methods; with "
            "the best score on val, as sizes have it too, in the table's last line",
        )


def verdict(probed: Probed) -> Iterator[tuple[str, str]]:
    """What follows for the choice between backbones, and what all of it stands on."""
    found = ranked(probed)
    if len(probed.candidates) > 1 and found:
        for number, (each, place, head) in enumerate(found):
            close = "; not told apart from the first" * (number > 0 and alike(found[0][2], head))
            where = f"cut {place.cut} of {each.stages}, {_named(head)}{close}"
            yield "" if number else "which backbone", f"{standing(head):.4f} {each.label} ({where})"
        yield from (("other orders", said) if not number else ("", said) for number, said in enumerate(_takes(probed)))
        taus = rank_correlations([place for _, place, _ in found], probed.mode)
        if said := ", ".join(f"{name} {tau:.2f}" for name, tau in taus.items() if tau is not None):
            yield "", f"Kendall's tau with the best score on val, {len(found)} backbones at these cuts: {said}"
    if probed.folds:
        how = f"by {probed.folds}-fold cross-validation on {probed.n_train:,} train {probed.inputs}"
        yield "chosen", f"{how}; val's {probed.n_val:,} {probed.inputs} have had no part in it, and test is not read"
    else:
        yield (
            "chosen",
            f"on val's {probed.n_val:,} {probed.inputs}, so that what is best looks better than it is: {probed.no_folds}",
        )
    yield (
        "nothing trained",
        "these are estimates for heads on frozen stages, of where to begin; how many to freeze where later stages train, "
        "only a search says",
    )


def _takes(probed: Probed) -> Iterator[str]:
    """How scores after the last stage order the backbones, and how their sizes do, which know nothing of the data."""
    for name in ("logme", "h_score", *SIZES):
        ends = [(getattr(each.places[-1], name), each.label) for each in probed.candidates]
        known = sorted([(value, label) for value, label in ends if value is not None], reverse=True)
        words = {"logme": "LogME after the last stage", "h_score": "H-score after the last stage"}.get(name, name)
        shown = [f"{label} {count(value) if name in SIZES else f'{value:.3f}'}" for value, label in known]
        if shown:
            yield f"{words}: {', '.join(shown)}"


def _named(head: HeadScore) -> str:
    return f"kNN (k = {head.strength:.0f})" if head.method == "knn" else NAMES[head.method]


def _said(head: HeadScore, probed: Probed) -> str:
    """A head's scores, with what those on val stand on."""
    accuracy, more = head.val_scores.get("accuracy"), ""
    if accuracy is not None:
        also = "" if probed.metric == "accuracy" else f"; accuracy {accuracy:.4f}"
        more = f"{also}, binomial standard error {binomial_error(accuracy, probed.n_val):.4f}"
    val = f"{head.val:.4f} on val ({probed.n_val:,} {probed.inputs}{more})"
    if head.inner is None:
        return f"{probed.metric} {val}"
    return f"{probed.metric} {head.inner:.4f} in cross-validation on train, {val}"
