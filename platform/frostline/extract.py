"""Extraction: what a search will read from the feature store is put there before its trials, each image passing the
frozen prefix once for all of its cuts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from frostline.closedform import pooled_width
from frostline.data import subset
from frostline.depths import cut_of, end_of
from frostline.features import EVAL_BATCH, Feed, Origin, chunks, to_rows
from frostline.spec import Features
from frostline.store import Store, key_of
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec
from frostline.work import Shard, Supply, Survey
from frostline.world import World

Hold = Callable[[str, Collection[str]], None]
"""Takes the root of a store and keys in it that are to stay there."""

SHARD_BYTES = 128 << 20
"""What an extraction holds in memory, at most, before it is written."""
SHARD_IMAGES = 2048


@dataclass(frozen=True)
class Need:
    """Activations that trials will read."""

    spec: TrialSpec
    """One of these trials: it says what the activations are made from."""
    cut: int
    view: int | None
    samples: np.ndarray
    """Sorted sample numbers."""
    mean: bool = False
    """Whether it is the activations' mean over positions that is read."""

    def about(self, origin: Origin) -> dict[str, Any]:
        return origin.about(self.cut, self.view, mean=self.mean)


def load(question: Survey, world: World) -> None:
    """Have in this process what the survey and the extractions after it go by: data, backbone, and its cuts, which are found
    together in a fraction of the time."""
    origin_of(question.specs[0], world).cuts({*(question.cuts or ()), *question.means})


def survey(question: Survey, world: World, hold: Hold) -> Supply:
    """What the trials will read, and what the store lacks of it: see `supply`."""
    load(question, world)
    wanted: list[Need] = []
    for spec in question.specs:
        origin = origin_of(spec, world)
        cuts, means = question.cuts, question.means
        if cuts is None:
            stages = len(origin.backbone.stages)
            cut, end = cut_of(spec.config, stages), end_of(spec.config.head, stages)
            cuts, means = (cut,) * (spec.cached and cut < end), (cut,) * spec.cached  # means for studies to come
        wanted += needs(spec, cuts, means, origin, probed=question.means)
    return supply(wanted, question.specs[0].features, world, hold, question.at_once)


def supply(wanted: Sequence[Need], features: Features, world: World, hold: Hold, at_once: int = 1) -> Supply:
    """What of all that is wanted the store of `features` lacks, or has in a damaged form; makes room for that.

    What is wanted is held before anybody looks whether it is there. Raises FeatureError where the store cannot be used.
    """
    assert features.path is not None
    store = Store(features.path)
    keys = {key_of(need.about(origin_of(need.spec, world))) for need in wanted}
    hold(features.path, keys)
    for key in sorted(keys):
        store.repair(key)
    found = shards(wanted, world, at_once)
    new = sum(
        len(shard.samples) * image_bytes(origin_of(shard.spec, world), shard.cuts, shard.means) for shard in found
    )
    if new:
        store.evict(max(0, int(features.budget_gb * 1e9) - new), keep=keys)
    return Supply(features.path, tuple(sorted(keys)), tuple(found))


def needs(
    spec: TrialSpec, cuts: Iterable[int], means: Iterable[int], origin: Origin, *, probed: Iterable[int] = ()
) -> list[Need]:
    """What a trial like this one reads, were its cut any of `cuts`, or were it to train nothing but a head at any of `means`:
    its train samples under every view that is stored, its val samples, and in a confirmation those of test, as they are.
    And for heads in closed form at the cuts of `probed`, and for one that starts there, its train samples as the first
    epoch shows them."""
    dataset, views = origin.dataset, spec.augment.views
    plain = [dataset.indices("val")] + [dataset.indices("test")] * (spec.round == "confirm")
    train = subset(dataset, spec.data.per_class, spec.seeds.subset)
    if views == 0:
        plain.append(train)
    shown = range(views) if isinstance(views, int) else ()
    samples = np.sort(np.concatenate(plain))
    found = [
        Need(spec, cut, view, which, mean)
        for cut, mean in [*((cut, False) for cut in cuts), *((cut, True) for cut in means)]
        for view, which in [(None, samples), *((view, train) for view in shown)]
    ]
    starts = {*probed, *[end_of(spec.config.head, len(origin.backbone.stages))] * spec.start_stored}
    return [*found, *(Need(spec, cut, origin.view(1), train, mean=True) for cut in sorted(starts))]


def shards(wanted: Sequence[Need], world: World, at_once: int) -> list[Shard]:
    """The extractions that supply what the store lacks of what is wanted: for each sample and view one pass for all the
    cuts that it lacks. They are small enough for memory, and for `at_once` of them to share the work."""
    found: list[Shard] = []
    passes: dict[str, list[Need]] = {}  # of one pass: what differs by the cut alone
    for need in wanted:
        about = need.about(origin_of(need.spec, world))
        passes.setdefault(key_of({**about, "cut": None, "boundary": None, "pool": None}), []).append(need)
    for together in passes.values():
        spec, view = together[0].spec, together[0].view
        origin = origin_of(spec, world)
        assert spec.features.path is not None
        store = Store(spec.features.path)
        lacking: dict[int, set[tuple[int, bool]]] = {}
        for need in together:
            flat = len(origin.cut(need.cut).shape) == 1  # its own mean
            for sample in store.missing(key_of(need.about(origin)), need.samples).tolist():
                lacking.setdefault(sample, set()).add((need.cut, need.mean and not flat))
        alike: dict[tuple[tuple[int, bool], ...], list[int]] = {}
        for sample in sorted(lacking):
            alike.setdefault(tuple(sorted(lacking[sample])), []).append(sample)
        for what, samples in alike.items():
            cuts, means = (tuple(cut for cut, mean in what if mean == wanted) for wanted in (False, True))
            size = shard_size(len(samples), image_bytes(origin, cuts, means), at_once)
            found += [Shard(spec, cuts, means, view, part) for part in chunks(np.array(samples, np.int64), size)]
    return found


def shard_size(images: int, image_bytes: int, at_once: int) -> int:
    """Images in a shard: whole batches, within `SHARD_BYTES` and `SHARD_IMAGES`, and as many shards as can be made at once."""
    fit = min(SHARD_IMAGES, SHARD_BYTES // image_bytes) // EVAL_BATCH
    each = -(-images // (at_once * EVAL_BATCH))
    return max(1, min(fit, each)) * EVAL_BATCH


def image_bytes(origin: Origin, cuts: Collection[int], means: Collection[int]) -> int:
    """Bytes of one image's activations at some cuts, and of their means at others, as they are stored."""
    numbers = sum(math.prod(cut.shape) for cut in origin.cuts(cuts).values())
    numbers += sum(pooled_width(cut.shape) for cut in origin.cuts(means).values())
    return numbers * np.dtype(origin.dtype).itemsize


def extract(shard: Shard, feed: Feed, world: World) -> dict[str, Any]:
    """Make a shard and put it into the store; answers its row for the `extractions` table."""
    started_at, started = datetime.now(UTC), time.perf_counter()
    origin, spec = origin_of(shard.spec, world), shard.spec
    assert spec.features.path is not None
    parts: dict[tuple[int, bool], list[np.ndarray]] = {
        **{(cut, False): [] for cut in shard.cuts},
        **{(cut, True): [] for cut in shard.means},
    }
    origin.expect(shard.samples)
    for samples in chunks(shard.samples, EVAL_BATCH):
        passed = feed.full_pass(origin, {cut for cut, _ in parts}, samples, shard.view)
        for (cut, mean), rows in parts.items():
            rows.append(to_rows(origin.backbone.inputs.pooled(passed[cut]) if mean else passed[cut], origin.dtype))
    feed.forget_passes()
    store, written = Store(spec.features.path), 0
    for (cut, mean), rows in parts.items():
        about, table = origin.about(cut, shard.view, mean=mean), np.concatenate(rows)
        store.put(key_of(about), about, shard.samples, table)
        written += table.nbytes
    return {
        "cuts": ",".join(map(str, shard.cuts)),
        "means": ",".join(map(str, shard.means)),
        "view": shard.view,
        "images": len(shard.samples),
        "bytes": written,
        "seconds": time.perf_counter() - started,
        "node": world.node,
        "started_at": started_at,
    }
