"""Cheap probes of candidate backbones: features at every cut from the feature store, heads and scores without training.

What images give at the cuts is stored as a search stores it, so that each image passes a backbone once, whoever asks first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue] (it is documented)
from torch.nn import functional

from frostline.backbone import BackboneError
from frostline.candidates import Candidate, HeadScore, Place, Probed
from frostline.closedform import lda, ridge
from frostline.data import Dataset
from frostline.extract import Need, extract, supply
from frostline.features import Feed, Origin
from frostline.measure import resumable
from frostline.metrics import OF_PROBABILITIES, losses_of_sets, scores
from frostline.neighbours import nearest_mean, nearest_neighbours
from frostline.prepare import Prepared, prepare
from frostline.probes import fitted_to, methods
from frostline.propose import precisions
from frostline.seeds import derive_seed
from frostline.spec import BackboneSpec, Freeze, Head, Job, Metric, Task
from frostline.store import Store
from frostline.targets import CLASSES, Target
from frostline.transferability import h_score, logme
from frostline.trial import origin_of
from frostline.trialspec import Config, TrialSpec, search_seeds, trial_of
from frostline.world import World

Fit = Callable[[Tensor, Tensor, int], Any]
"""(N, D) features, (N,) labels and the number of classes to a head, (N, D) features to (N, C) logits, with its `strength`."""

METHODS: dict[str, Fit] = {"knn": nearest_neighbours, "mean": nearest_mean, "lda": lda, "ridge": ridge}
"""Of a classification; other tasks have what `probes.methods` says."""
PROBABLE = ("lda", "ridge")
"""Those whose logits stand for probabilities, so that their NLL says something."""
FOLDS = 5


def probe_backbones(
    job: Job,
    others: Sequence[BackboneSpec] = (),
    *,
    say: Callable[[str], None] = lambda _: None,
    decoding: Callable[[int, int], None] | None = None,
) -> Probed:
    """Probe the job's backbone and `others` at every cut, in this process; `say` is told what is being done.

    Raises DataError, BackboneError or FeatureError, and a ValueError where the job forbids to store anything.
    """
    if job.features.cache == "none":
        raise ValueError(
            'features.cache = "none", but probes read features from the feature store: set it to "auto" or leave it out'
        )
    bare = job.model_copy(update={"arms": {}, "freeze": Freeze(), "head": Head()})  # arms need not fit other backbones
    first, precision, found = prepare(bare, decoding), precisions(job)[0], []
    dataset = first.dataset
    train = fitted_to(dataset, spec_of(first.job, precision))
    folds, why = folds_of(dataset, train, derive_seed(job.seed, "folds"))
    jobs = [bare.model_copy(update={"backbone": backbone}) for backbone in dict.fromkeys([job.backbone, *others])]
    for each in jobs[1:]:  # what cannot be had is told before anything is spent
        say(f"{each.backbone.name}: loading")
        try:
            prepare(each, decoding)
        except BackboneError as error:
            name = each.backbone.name
            raise BackboneError(
                f"{error}\n(of a candidate beside the job's own: {name}=PATH or {name}=random)"
            ) from None
    for each in jobs:
        prepared = prepare(each, decoding)
        assert prepared.dataset.split_hash == dataset.split_hash, "splits do not depend on the image size"
        found.append(probe_backbone(prepared, spec_of(prepared.job, precision), train, folds, say))
    return Probed(
        name=job.name,
        metric=job.objective.metric,
        mode=job.objective.mode or "max",
        n_train=len(train),
        n_val=len(dataset.indices("val")),
        task=dataset.target.task,
        classes=len(dataset.classes),
        inputs=f"{first.backbone.inputs.noun}s",
        folds=len(folds),
        no_folds=why,
        candidates=tuple(found),
    )


def spec_of(job: Job, precision: str) -> TrialSpec:
    """A trial that reads what a search of this prepared job reads for its own heads in closed form."""
    seed, seeds = search_seeds(job, "probe", 0)
    train = job.train.model_copy(update={"precision": precision})
    return trial_of(
        job,
        Config(freeze=job.freeze, head=job.head, train=train),
        seeds,
        trial_id="probe",
        arm="probe",
        number=0,
        round="search",
        seed=seed,
    )


def folds_of(dataset: Dataset, train: np.ndarray, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], str | None]:
    """Stratified folds of train samples (n,), as positions to fit to and to score on; samples of a group stay together. Five,
    or as many as the rarest class has images; none, and why, where some fit would lack a class."""
    labels = dataset.labels[train]
    if dataset.target.task != "classification":
        labels = np.zeros(len(train), np.int64)  # drawn from all alike
    least = int(np.bincount(labels).min())
    if least < 2:
        return [], "a class has fewer than 2 train samples, so that none can be left out"
    folds = min(FOLDS, least)
    if dataset.groups is None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        groups = np.unique(np.array(dataset.groups)[train], return_inverse=True)[1]
        if groups.max() + 1 < folds:
            return [], f"train has {groups.max() + 1} groups, which must stay together, for {folds} folds"
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    found = [(fit, held) for fit, held in parts if len(held)]
    if any(len(np.unique(labels[fit])) < len(np.unique(labels)) for fit, _ in found):
        return [], "a class has all its train samples in so few groups that leaving one out leaves none"
    return found, None


def probe_backbone(
    prepared: Prepared,
    spec: TrialSpec,
    train: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    say: Callable[[str], None],
) -> Candidate:
    """One backbone at every cut where it can be left; what the store lacks for that passes through it first."""
    started = time.perf_counter()
    backbone, features = prepared.backbone, spec.features
    cuts = [*resumable(prepared, range(1, len(backbone.stages) + 1))]
    feed, world = Feed(), World.here(spec.resources)
    origin = origin_of(spec, world)
    val = origin.dataset.indices("val")
    assert features.path is not None, "made absolute by `prepare`"
    with ExitStack() as held:
        lacking = supply(
            [Need(spec, cut, *which, mean=True) for cut in cuts for which in ((origin.view(1), train), (None, val))],
            features,
            world,
            lambda root, keys: held.enter_context(Store(root).hold(keys)),
        )
        if images := sum(len(shard.samples) for shard in lacking.shards):
            say(f"{backbone.name}: {images:,} {backbone.inputs.noun}s through {len(backbone.stages)} stages")
        for shard in lacking.shards:
            extract(shard, feed, world)
        places = []
        for cut in cuts:
            say(f"{backbone.name}: cut {cut} of {len(backbone.stages)}")
            places.append(place_of(origin, spec, cut, feed, train, val, folds))
    return Candidate(
        backbone=backbone.name,
        weights=spec.backbone.weights,
        weights_hash=backbone.weights_hash,
        size=origin.dataset.size,
        stages=len(backbone.stages),
        images_passed=feed.images_forwarded,
        seconds=time.perf_counter() - started,
        places=tuple(places),
    )


def place_of(
    origin: Origin,
    spec: TrialSpec,
    cut: int,
    feed: Feed,
    train: np.ndarray,
    val: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Place:
    """All scores of the features at one cut."""
    dataset, stages = origin.dataset, origin.backbone.stages
    asked = Asked(len(dataset.classes), spec.objective.metric, dataset.target)
    task = asked.target.task
    inputs = feed.means(origin, cut, origin.view(1), train, spec.features)
    shown = feed.means(origin, cut, None, val, spec.features)
    labels, truth = torch.from_numpy(dataset.targets(train)), dataset.targets(val)
    sizes = {name: each.numel() for name, each in origin.backbone.module.named_parameters()}
    passed = [*accumulate(sum(sizes.get(name, 0) for name in stage.tensors) for stage in stages)]
    return Place(
        cut=cut,
        stage=stages[cut - 1].name,
        parameters=passed[cut - 1],
        features=inputs.shape[1],
        heads=tuple(
            score_head(method, fit, inputs, labels, shown, truth, asked, folds)
            for method, fit in (METHODS if task == "classification" else methods(task)).items()
        ),
        logme=_or_none(partial(logme, task=task), inputs, labels, asked.classes),
        h_score=_or_none(h_score, inputs, labels, asked.classes) if task == "classification" else None,
    )


@dataclass(frozen=True)
class Asked:
    """What heads are fitted and scored for."""

    classes: int
    """Or outputs."""
    metric: Metric
    target: Target = CLASSES


def score_head(
    method: str,
    fit: Fit,
    inputs: Tensor,
    labels: Tensor,
    shown: Tensor,
    truth: np.ndarray,
    asked: Asked,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> HeadScore:
    """Fit a head to (n, D) features and (n, …) labels, and score it on (m, D) features of val and their (m, …) labels; and, fitted
    to the others of its fold, on each sample that it was fitted to."""
    classes, metric, target = asked.classes, asked.metric, asked.target
    try:
        head = fit(inputs, labels, classes)
        found = scores(head(shown).numpy(), truth, metric, target=target)
        left_out = torch.zeros(len(inputs), classes, dtype=torch.float64)
        for kept, held in folds:
            left_out[held] = fit(inputs[kept], labels[kept], classes)(inputs[held]).double()
    except LinAlgError as error:
        return HeadScore(method, None, None, None, reason=str(error)[:500])
    inner = scores(left_out.numpy(), labels.numpy(), metric, target=target) if folds else {}
    if method not in PROBABLE:
        for name in OF_PROBABILITIES:
            found.pop(name, None)
            inner.pop(name, None)
    if not all(map(math.isfinite, [*found.values(), *inner.values()])):
        return HeadScore(method, head.strength, None, None, reason="its scores are not finite numbers")
    losses = losses_of(left_out, labels, metric, target.task) if metric in inner else None
    return HeadScore(method, head.strength, inner.get(metric), found.get(metric), found, losses)


def losses_of(logits: Tensor, labels: Tensor, metric: Metric, task: Task) -> np.ndarray:
    """(N,) losses of (N, C) logits for (N, …) labels: NLL under metrics of probabilities, else 1 where the class is wrong; of several
    labels their mean NLL; of numbers the squared error."""
    if task == "regression":
        return (logits - labels).square().mean(dim=1).numpy()
    if task == "multilabel":
        return losses_of_sets(logits.numpy(), labels.numpy())
    if metric in OF_PROBABILITIES:
        return functional.cross_entropy(logits, labels, reduction="none").numpy()
    return (logits.argmax(dim=1) != labels).double().numpy()


def _or_none(
    score: Callable[[Tensor, Tensor, int], float], inputs: Tensor, labels: Tensor, classes: int
) -> float | None:
    """A score, where the decomposition that it needs exists and it is a number."""
    try:
        found = score(inputs, labels, classes)
    except LinAlgError:
        return None
    return found if math.isfinite(found) else None
