"""What the parts of a backbone cost on this hardware: the network is timed, cut by cut, once; times are kept in the node's cache."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from frostline.backbone import stage_table
from frostline.cache import cache_root
from frostline.commit import write_file
from frostline.costs import TIMES, StageTimes
from frostline.cuts import Cut, cuts_at, resume
from frostline.features import EVAL_BATCH, Feed, Fetch, Origin, chunks, on_device
from frostline.freeze import Applied, Network, apply_plan, compile_plan, fixed_hash
from frostline.head import build_head
from frostline.modality import size_key
from frostline.models import digest
from frostline.prepare import Prepared
from frostline.spec import Freeze, Head, Train
from frostline.training import Batches, Seeding, build_optimizer, train_epochs
from frostline.versions import versions
from frostline.views import augmented
from frostline.world import World, autocast_dtype, hardware

TIMING_S = 10.0  # what the timed passes and steps may take on a CPU


class CostError(ValueError):
    """A network that can neither be timed nor trained on this hardware."""


def resumable(prepared: Prepared, cuts: Collection[int]) -> dict[int, Cut]:
    """Those of `cuts` that the backbone can be resumed from."""
    return cuts_at(prepared.backbone, prepared.dataset.size, set(cuts) - {0})


def measure(prepared: Prepared, cuts: Collection[int], batch_size: int, hidden: int) -> StageTimes:
    """The times at these cuts, for steps of `batch_size` images under a head of this width: taken now or, where this network
    has been timed on this hardware before, read from the cache.

    Takes some `TIMING_S` on a CPU, or what the least that says something takes: two images a batch at two cuts. Raises
    CostError where the network does not fit in memory.
    """
    job, backbone, device = prepared.job, prepared.backbone, World.here(prepared.job.resources).device
    batch, cuts = min(batch_size, prepared.n_train), sorted({*cuts, len(backbone.stages)})
    key = digest(
        [
            *(backbone.name, backbone.stages_hash, backbone.source_hash, prepared.dataset.size, cuts, batch),
            *(hidden, len(prepared.dataset.classes), job.freeze.norm, job.augment.model_dump()),
            *(job.train.precision, job.train.optimizer, job.train.clip_norm is None, job.train.ema is None),
            *(hardware(device), torch.get_num_threads(), versions()["torch"], versions()["frostline"]),
        ]
    )
    path = cache_root() / "costs" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or not what was written
        return TIMES.validate_json(path.read_bytes())
    times = _measured(prepared, device, cuts, batch, hidden)
    write_file(path, TIMES.dump_json(times, indent=2))
    return times


def _measured(prepared: Prepared, device: torch.device, cuts: Sequence[int], wanted: int, hidden: int) -> StageTimes:
    origin = Origin(
        backbone=prepared.backbone,
        dataset=prepared.dataset,
        device=device,
        autocast=autocast_dtype(prepared.job.train.precision, device),
        dtype="float32",
        augment=prepared.job.augment,
        augment_seed=0,
    )
    feed, samples = Feed(), prepared.dataset.indices("train")[:wanted]
    known = [*resumable(prepared, cuts)]
    known = known if known == cuts else [0, *known]  # what cannot be resumed lies between what can, or the images
    if device.type == "cpu":
        batch, known = affordable(wanted, known, _pass_seconds(origin, feed, known[-1], samples[:2]))
        samples = samples[:batch]
    while True:
        try:
            prefix_s = {cut: _pass_seconds(origin, feed, cut, samples) if cut else 0.0 for cut in known}
            steps = {cut: _step_seconds(prepared, origin, feed, cut, hidden, samples, wanted) for cut in known}
            step_s = {cut: seconds for cut, (seconds, _) in steps.items()}
            break
        except torch.OutOfMemoryError as error:
            if len(samples) == 1:
                where = f"{prepared.backbone.name} at a size of {prepared.dataset.size} on {hardware(device)}"
                raise CostError(
                    f"{where}: not even one {prepared.backbone.inputs.noun} at a time fits in memory; freeze more stages in "
                    f"every arm, or set a smaller data.{size_key(prepared.backbone.name)}"
                ) from error
            samples = samples[: len(samples) // 2]
        finally:
            feed.forget_passes()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # trials in other processes need it
    for cut, deeper in reversed([*pairwise(known)]):  # what is less work took longer by chance
        prefix_s[cut] = min(prefix_s[cut], prefix_s[deeper])
    for shallower, cut in pairwise(known):
        step_s[cut] = min(step_s[cut], step_s[shallower])
    return StageTimes(
        device=device.type,
        hardware=hardware(device),
        threads=torch.get_num_threads(),
        batch=len(samples),
        prefix_s=_filled_in(prepared, prefix_s, cuts),
        step_s=_filled_in(prepared, step_s, cuts),
        view_s=_view_seconds(origin, samples),
        read_bytes_per_s=_read_bytes_per_s(device),
        start_s=median(start_s for _, start_s in steps.values()),
    )


def affordable(wanted: int, cuts: Sequence[int], image_s: float) -> tuple[int, list[int]]:
    """The largest batch up to `wanted`, and the most of `cuts`, with which timing stays within `TIMING_S`: at least two
    images (if so many are wanted), and the first and the last cut.

    An image takes `image_s` forward and at most three times that in a step; there are three passes and three steps at each
    cut, which take half of that on average.
    """
    forwards = TIMING_S / image_s
    least = min(2, wanted)
    count = min(len(cuts), max(2, int((forwards / least - 6) / 6)))
    spread = np.linspace(0, len(cuts) - 1, count).round().astype(int)
    return min(wanted, max(least, int(forwards / (6 * count + 6)))), [cuts[index] for index in spread]


def _filled_in(prepared: Prepared, known: Mapping[int, float], cuts: Sequence[int]) -> dict[int, float]:
    """The seconds at all of `cuts`: between two known ones in proportion to the FLOPs between them."""
    if known.keys() >= set(cuts):
        return {cut: known[cut] for cut in cuts}
    stages = stage_table(prepared.backbone, prepared.dataset.size)
    before = np.cumsum([0, *(stage.flops for stage in stages)])
    return {cut: float(np.interp(before[cut], before[[*known]], [*known.values()])) for cut in cuts}


def _pass_seconds(origin: Origin, feed: Feed, cut: int, samples: np.ndarray) -> float:
    """Per image, of a forward pass from pixels to a cut."""

    def work() -> None:
        feed.forget_passes()
        feed.pass_through(origin, {cut}, samples, None)

    return _best_seconds(work, origin.device) / len(samples)


def _step_seconds(
    prepared: Prepared, origin: Origin, feed: Feed, cut: int, hidden: int, samples: np.ndarray, wanted: int
) -> tuple[float, float]:
    """Per image, of a training step from a cut in batches of `wanted`; and per trial, before its first step."""
    job, backbone, device = prepared.job, prepared.backbone, origin.device
    clock = _clock(device)
    started = clock()
    head = build_head(Head(hidden=hidden), backbone.feature_dim, len(prepared.dataset.classes), seed=0)
    network = Network(on_device(backbone, device), head.to(device))
    plan = compile_plan(Freeze(strategy="freeze_depth", depth=cut, norm=job.freeze.norm), backbone.stages)
    phases = apply_plan(plan, network, backbone)
    (applied,) = phases
    for _ in range(2):  # a trial's audit, before and after
        fixed_hash(network, applied)
    start_s = clock() - started

    only_head = cut == len(backbone.stages)
    batch = wanted if only_head else len(samples)
    numbers = np.arange(8 * batch if only_head else batch)  # one step of a head is too short to be timed
    dataset = prepared.dataset
    labels = torch.from_numpy(dataset.targets(samples[numbers % len(samples)])).to(device)
    fetch = _fetch(origin, feed, cut, samples)
    if cut:
        resume(network.backbone, origin.cut(cut))
    config = {"epochs": 3, "batch_size": batch, "lr": 1e-6, "head_lr": 1e-6}
    _, *records = train_epochs(
        network,
        phases,
        job.train.model_copy(update=config),
        train=Batches(fetch, numbers, labels, dataset.target),
        val=Batches(fetch, numbers[:1], labels[:1], dataset.target),
        metric=job.objective.metric,
        seeding=Seeding(0, 0),
        autocast=origin.autocast,
        clock=clock,
    )
    trained_s = min(record.seconds - record.eval_seconds for record in records)
    if batch == wanted:
        return trained_s / len(numbers), start_s
    optimizer_s = _optimizer_seconds(network, applied, job.train)  # of a step, however many images are in it
    return max(0.0, trained_s - optimizer_s) / batch + optimizer_s / wanted, start_s


def _fetch(origin: Origin, feed: Feed, cut: int, samples: np.ndarray) -> Fetch:
    """Images, or activations that are there; numbers count the samples, round and round."""
    if not cut:
        return lambda numbers, _: origin.inputs(samples[numbers % len(samples)], None)
    held = feed.pass_through(origin, {cut}, samples, None)[cut]
    return lambda numbers, _: held[torch.from_numpy(numbers % len(samples)).to(origin.device)]


def _optimizer_seconds(network: Network, applied: Applied, config: Train) -> float:
    """Of an optimizer's step on a network that has gradients."""
    return _best_seconds(build_optimizer(network, applied, config).step, next(network.parameters()).device)


def _view_seconds(origin: Origin, samples: np.ndarray) -> float:
    """Per image, to make a view of it."""
    if origin.augment.views == 0:
        return 0.0
    pixels = origin.dataset.inputs[samples]
    view = _best_seconds(lambda: augmented(pixels, samples, 0, origin.augment, 0), torch.device("cpu"))
    return view / len(samples)


def _read_bytes_per_s(device: torch.device) -> float:
    """At which rows are gathered at random from a mapped file in the page cache, and moved to the device."""
    rows = np.ones((1024, 16384), np.float32)  # 64 MiB
    order = np.random.default_rng(0).permutation(len(rows))
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="costs-", dir=cache_root()) as folder:
        path = Path(folder, "rows")
        rows.tofile(path)
        mapped = np.memmap(path, rows.dtype, "r", shape=rows.shape)

        def read() -> None:
            for batch in chunks(order, EVAL_BATCH):
                torch.from_numpy(mapped.take(batch, axis=0)).to(device)

        return rows.nbytes / _best_seconds(read, device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The better of two, after a warm-up."""
    clock, took = _clock(device), []
    for _ in range(3):
        started = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took.append(clock() - started)
    return max(min(took[1:]), 1e-9)  # a process's clock may stand still over short work


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of one CPU thread those that it had the core, so that others on the machine do not count."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
