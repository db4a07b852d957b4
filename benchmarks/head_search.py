"""A search over 256 heads on frozen features, against four ways of doing it without Frostline.

EfficientNet-Lite0 (ImageNet weights), 10,000 Fashion-MNIST images at 64 px and 600 for validation after every epoch, 20
epochs, batches of 128, AdamW, no pruning. All sides train one fixed list of configurations (a grid of learning rates and
weight decays) from the same seeds: initial weights, order of the images and schedule of a trial are the same everywhere.

    ours  frostline.search on a local Ray, with every core, from an empty feature store
    B0    Ray Tune with OptunaSearch as documented: each trial loads the backbone and passes the images live
    B1    the same, but each trial extracts its own features once, then trains on them
    B2    DINOv2's way: all heads in a loop, under one optimizer, on one live pass that they share
    B3    an expert's script: features extracted once into .npy, then a plain PyTorch loop over the heads, with the fastest
          AdamW there is (fused) and a process of one thread for each core, which beats one process of several threads

`ratio` is B3's time over ours after the extraction that both do once: what follows it, in processes that have loaded
everything, on features that are there, 128 heads (on two cores: a pack of 64 on each). Ours is then a study on each core
with all that belongs to it (proposals, reports, rows in Parquet), without Ray. `mlp64` and `mlp256` are the same for MLP
heads, fewer of them and for fewer epochs. `end_to_end` is the whole, 256 linear heads, from the start of a process to its
end: imports, Ray's start, extraction, rows. Warm on all sides are the decoded pixels, and on ours the stage times, which
are measured once per machine. `b0`, `b1`, `b2` are times over ours end to end. They are scaled up from fewer images and
epochs, B0 and B1 from fewer trials too, as `measured` says; what does not grow with these (imports, Ray's start, Tune's
and Optuna's own work) is left out, which favours them. `cpu_ratio` is of CPU seconds. `equal_scores` says whether the
validation scores of ours and of every other side, which trained the same trials equally long, agree trial by trial within
NLL_TOLERANCE and IMAGES_TOLERANCE, MLP heads within MLP_NLL_TOLERANCE and MLP_IMAGES_TOLERANCE (of `differences`, the largest
found).

    python benchmarks/head_search.py [--rounds 5] [--searches 3] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from _measure import interleaved, ratios, say, tree_cpu_s
from frostline import results
from frostline.backbone import load_backbone
from frostline.data import load_data, splits_table, subset
from frostline.estimate import facts_of
from frostline.features import EVAL_BATCH, chunks, on_device
from frostline.head import build_head
from frostline.inline import run_inline
from frostline.jobfile import as_toml, parse_job
from frostline.prepare import prepare
from frostline.propose import Proposer
from frostline.seeds import Seeds
from frostline.spec import Job, Train
from frostline.testing import TOY_BACKBONE
from frostline.training import rate_factor
from frostline.trialspec import Config, configure, search_seeds

CORES = os.cpu_count() or 1
DECAYS = (0.0, 1e-3, 1e-2, 1e-1)
RATES = (1e-4, 1e-2)  # the ends of the grid's
NLL_TOLERANCE, IMAGES_TOLERANCE = 1e-4, 1  # nats, and val images: float32, in other orders of sums
MLP_NLL_TOLERANCE, MLP_IMAGES_TOLERANCE = 2e-2, 6
"""For MLP heads, on features that differ in their last bits: AdamW and ReLU amplify these, so that the plain loop differs from
itself by 6e-3 nats where the samples of a mini-batch are reversed. On the same features ours and the loop differ by 4e-8."""

Score = tuple[float, float]
"""Mean negative log-likelihood and accuracy on val, after the last epoch."""


@dataclass(frozen=True)
class Load:
    """What is run."""

    heads: int
    hidden: int
    epochs: int
    per_class: int
    toy: bool = False
    """Digits at 16 px under the toy backbone."""

    def __str__(self) -> str:
        kind = f"MLP-{self.hidden}" if self.hidden else "linear"
        return f"{self.heads} {kind} heads, {self.epochs} epochs, {10 * self.per_class:,} images"


@dataclass(frozen=True)
class Plan:
    search: Load
    """The whole."""
    packs: tuple[Load, Load, Load]
    """What follows the extraction: linear, MLP-64, MLP-256."""
    slow: Load
    """What B0, B1 and B2 are scaled up from: all of the heads."""
    slow_trials: int
    """Trials of B0 and B1."""


FULL = Plan(
    search=Load(256, 0, 20, 1000),
    packs=(Load(128, 0, 20, 1000), Load(128, 64, 5, 1000), Load(32, 256, 4, 1000)),
    slow=Load(256, 0, 2, 100),
    slow_trials=4,
)
QUICK = Plan(
    search=Load(16, 0, 3, 50, toy=True),
    packs=(Load(16, 0, 2, 50, toy=True), Load(16, 64, 2, 50, toy=True), Load(16, 256, 1, 50, toy=True)),
    slow=Load(16, 0, 2, 10, toy=True),
    slow_trials=1,
)


# --- the list of configurations ---


@dataclass(frozen=True)
class Trial:
    trial_id: str
    config: Config
    seeds: Seeds


def job_of(load: Load, root: Path) -> Job:
    """The search, whose list is split into an arm for each core, so that a core can be given one of them."""
    if load.heads % (len(DECAYS) * CORES):
        raise SystemExit(f"{load.heads} heads cannot be split over {CORES} cores: use 1, 2 or 4 of them")
    rates = np.geomspace(*RATES, load.heads // len(DECAYS)).tolist()
    spaces = [{"train.head_lr": rates[core::CORES], "train.weight_decay": DECAYS} for core in range(CORES)]
    raw = {
        "name": "study",
        "results": str(root / "study"),
        "data": {"path": "fashion-mnist", "image_size": 64, "per_class": load.per_class, "val": 0.01},
        "head": {"hidden": load.hidden},
        "train": {"epochs": load.epochs, "batch_size": 128},
        "features": {"path": str(root / "features")},
        "search": {"trials": load.heads, "sampler": "grid", "pruner": {"kind": "none"}},
        "confirm": {"seeds": 0},
        "arms": {f"core{core}": {"strategy": "linear_probe", "space": space} for core, space in enumerate(spaces)},
    }
    if load.toy:
        raw["data"] = {"path": "digits", "image_size": 16, "per_class": load.per_class}
        raw["backbone"] = {"name": TOY_BACKBONE, "weights": "random"}
    return parse_job(raw, [])


def by_core(job: Job) -> list[Job]:
    """A job for each arm: the same trials under the same seeds, in studies of their own."""
    share = job.search.model_copy(update={"trials": job.search.trials // len(job.arms)})
    return [
        job.model_copy(update={"arms": {name: arm}, "search": share, "results": f"{job.folder}-{name}"})
        for name, arm in job.arms.items()
    ]


def trials_of(load: Load) -> list[Trial]:
    """What a study of this load will train."""
    job, found = job_of(load, Path("unused")), []
    for name, arm in job.arms.items():
        share = load.heads // CORES
        for number, values in enumerate(Proposer(job, name, 1, share).ask(share)):
            _, seeds = search_seeds(job, name, number)
            found.append(Trial(f"{name}-{number:05d}", configure(job, arm, values), seeds))
    return found


# --- what the baselines share ---


@dataclass(frozen=True)
class Split:
    """Samples to train on, or to score."""

    labels: Tensor  # (n,)
    fetch: Callable[[np.ndarray], Tensor]
    """Positions (B,) among the samples to features (B, D)."""
    features: Tensor | None = None
    """(n, D), where they are known."""

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, features: Tensor) -> Split:
        """The same samples with known features."""
        return Split(self.labels, lambda rows: features[torch.from_numpy(rows)], features)


@dataclass(frozen=True)
class Site:
    """Data and backbone, as each baseline loads them."""

    train: Split
    val: Split
    width: int
    outputs: int


def load_site(load: Load) -> Site:
    """Splits whose features come of a live pass: channels last, eval mode, no graph."""
    job = job_of(load, Path("unused"))
    _, seeds = search_seeds(job, "core0", 0)
    backbone = load_backbone(job.backbone, image_size=job.data.image_size)
    dataset = load_data(job.data, seeds.split)
    network = on_device(backbone, torch.device("cpu"))
    mean, std = (255 * torch.tensor(each).view(1, 3, 1, 1) for each in (backbone.inputs.mean, backbone.inputs.std))

    def split(samples: np.ndarray) -> Split:
        @torch.no_grad()
        def fetch(rows: np.ndarray) -> Tensor:
            pixels = torch.from_numpy(dataset.inputs[samples[rows]])
            return network(pixels.permute(0, 3, 1, 2).float().sub_(mean).div_(std))

        return Split(torch.from_numpy(dataset.labels[samples]), fetch)

    train, val = subset(dataset, job.data.per_class, seeds.subset), dataset.indices("val")
    return Site(split(train), split(val), backbone.feature_dim, len(np.unique(dataset.labels)))


def extracted(split: Split) -> Tensor:
    """(n, D) features of all samples of a split, by one pass where they are not known."""
    if split.features is not None:
        return split.features
    return torch.cat([split.fetch(rows) for rows in chunks(np.arange(len(split)), EVAL_BATCH)])


@dataclass(frozen=True)
class Pace:
    """Seconds of a trial, or of all heads where one loop trains them."""

    setup_s: float
    extract_s: float
    train_s: float  # an epoch's
    val_s: float  # an epoch's

    def scaled(self, site: Site, images: int, epochs: int) -> float:
        """The whole, with this many train images and epochs."""
        n_train, n_val = len(site.train), len(site.val)
        extract_s = self.extract_s * (images + n_val) / (n_train + n_val)
        return self.setup_s + extract_s + epochs * (self.train_s * images / n_train + self.val_s)


def adamw(heads: Sequence[nn.Sequential], configs: Sequence[Train]) -> torch.optim.AdamW:
    """One optimizer of all heads, each with its own peak rate and its decay on weights alone."""
    groups = []
    for head, config in zip(heads, configs, strict=True):
        for decay, ndim in ((config.weight_decay, 2), (0.0, 1)):
            layers = [layer for layer in head.parameters() if layer.ndim == ndim]
            groups.append({"params": layers, "peak": config.head_lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=True)


def train_heads(
    trials: Sequence[Trial],
    train: Split,
    val: Split,
    width: int,
    classes: int,
    report: Callable[[Score], None] = lambda _: None,
) -> tuple[dict[str, Score], float, float]:
    """Plain PyTorch: all these heads on the same mini-batches, one after the other. Their scores, and the seconds of a mean
    epoch's training and validation."""
    heads = [build_head(trial.config.head, width, classes, trial.seeds.head) for trial in trials]
    config, seeds = trials[0].config.train, trials[0].seeds
    optimizer = adamw(heads, [trial.config.train for trial in trials])
    order = np.random.default_rng(seeds.order)
    steps = itertools.count()
    total = config.epochs * -(-len(train) // config.batch_size)
    train_s = val_s = 0.0
    scores: list[Score] = []
    for _ in range(config.epochs):
        started = time.perf_counter()
        for rows in chunks(order.permutation(len(train)), config.batch_size):
            factor = rate_factor(next(steps), total, config)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak"]
            features, labels = train.fetch(rows), train.labels[torch.from_numpy(rows)]
            losses = [functional.cross_entropy(head(features), labels) for head in heads]
            optimizer.zero_grad()
            torch.autograd.backward(losses)
            optimizer.step()
        trained = time.perf_counter()
        scores = scored(heads, val)
        report(scores[0])
        train_s, val_s = train_s + trained - started, val_s + time.perf_counter() - trained
    by_id = {trial.trial_id: score for trial, score in zip(trials, scores, strict=True)}
    return by_id, train_s / config.epochs, val_s / config.epochs


@torch.no_grad()
def scored(heads: Sequence[nn.Sequential], val: Split) -> list[Score]:
    features, found = extracted(val), []
    for head in heads:
        logits = head(features)
        hits = (logits.argmax(1) == val.labels).float().mean()
        found.append((float(functional.cross_entropy(logits, val.labels)), float(hits)))
    return found


# --- B0, B1: Ray Tune ---


def on_tune(load: Load, count: int, *, own_features: bool) -> list[dict[str, Any]]:
    """The last reports of the list's first trials, under Ray Tune with OptunaSearch."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    wanted = trials_of(load)[:count]

    def trainable(config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        started = time.perf_counter()
        trial, site = wanted[config["number"]], load_site(load)
        train, val, ready = site.train, site.val, time.perf_counter()
        if own_features:
            train, val = train.of(extracted(train)), val.of(extracted(val))
        extract_s = time.perf_counter() - ready
        scores, train_s, val_s = train_heads(
            [trial], train, val, site.width, site.outputs, lambda score: tune.report({"accuracy": score[1]})
        )
        pace = Pace(ready - started, extract_s, train_s, val_s)
        tune.report({"accuracy": scores[trial.trial_id][1], "scores": scores, "pace": asdict(pace)})

    points = [
        {"number": n, "head_lr": trial.config.train.head_lr, "weight_decay": trial.config.train.weight_decay}
        for n, trial in enumerate(wanted)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = tune.Tuner(
            trainable,
            param_space={
                "number": tune.randint(0, count),
                "head_lr": tune.loguniform(*RATES),
                "weight_decay": tune.choice(DECAYS),
            },
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                search_alg=OptunaSearch(points_to_evaluate=points),
                num_samples=count,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        assert not found.errors, found.errors
        return [{name: (result.metrics or {})[name] for name in ("scores", "pace")} for result in found]


# --- B3: an expert's script ---


def cores() -> ProcessPoolExecutor:
    """A process of one thread for each core; forked, so that nothing is imported again."""
    forking = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(CORES, forking, initializer=torch.set_num_threads, initargs=(1,))


@functools.cache
def known_site(load: Load) -> Site:
    """Loaded once per process."""
    return load_site(load)


def warm(load: Load) -> None:
    """Load what a round takes for granted."""
    known_site(load)


def extract_part(load: Load, core: int, folder: Path) -> None:
    """This core's share of train and val, into .npy files."""
    site = known_site(load)
    for name, split in (("train", site.train), ("val", site.val)):
        part = np.array_split(np.arange(len(split)), CORES)[core]
        rows = [split.fetch(rows).numpy() for rows in chunks(part, EVAL_BATCH)]
        np.save(folder / f"{name}-{core}.npy", np.concatenate(rows))


def loop(load: Load, core: int, folder: Path) -> tuple[dict[str, Score], float]:
    """This core's share of the trials, one after the other: scores, and CPU seconds."""
    started, site = time.process_time(), known_site(load)
    train, val = (
        split.of(torch.from_numpy(np.concatenate([np.load(folder / f"{name}-{k}.npy") for k in range(CORES)])))
        for name, split in (("train", site.train), ("val", site.val))
    )
    scores: dict[str, Score] = {}
    for trial in trials_of(load)[core::CORES]:
        scores |= train_heads([trial], train, val, site.width, site.outputs)[0]
    return scores, time.process_time() - started


def expert(load: Load, folder: Path) -> dict[str, Score]:
    """The whole of it."""
    folder.mkdir()
    with cores() as workers:
        arguments = [load] * CORES, range(CORES), [folder] * CORES
        list(workers.map(extract_part, *arguments))
        return {trial_id: score for scores, _ in workers.map(loop, *arguments) for trial_id, score in scores.items()}


# --- ours ---


def study(job: Job, facts: Mapping[str, Any], splits: Any) -> float:
    """A study in this process; CPU seconds."""
    started = time.process_time()
    run_inline(job, facts, splits, who={"driver": os.getpid()}, show=lambda _: None)
    return time.process_time() - started


def scores_in(folder: Path) -> dict[str, Score]:
    """The scores of a study, all of whose trials must be complete."""
    rows = results.read_trials(folder).select(["trial_id", "status", "reason", "val_nll", "val_score"]).to_pylist()
    for row in rows:
        assert row["status"] == "complete", row
    return {row["trial_id"]: (row["val_nll"], row["val_score"]) for row in rows}


def counts_of(folder: Path) -> dict[str, float]:
    trials, extractions = results.read_trials(folder), results.read_extractions(folder)
    first = trials.slice(0, 1).to_pylist()[0]
    images = first["n_train"] + first["n_val"]
    passed = sum(extractions["images"].to_pylist()) + sum(trials["images_forward"].to_pylist())
    return {
        "trials": trials.num_rows,
        "epochs": first["epochs"],
        "images": first["n_train"],
        "val_images": first["n_val"],
        "passes": passed / images,
        "packs": len(set(trials["pack"].to_pylist())),
    }


# --- the measurements ---


Differences = dict[str, Score]
"""Side -> the largest differences from ours in NLL and in accuracy, over all trials and rounds."""


def compare(differences: Differences, name: str, ours: Mapping[str, Score], theirs: Mapping[str, Score]) -> None:
    """Enter a side's scores, trial by trial."""
    before = differences.get(name, (0.0, 0.0))
    pairs = [np.abs(np.subtract(ours[trial_id], score)) for trial_id, score in theirs.items()]
    nll, accuracy = np.stack([before, *pairs]).max(axis=0).tolist()
    differences[name] = nll, accuracy


def agree(name: str, nll: float, accuracy: float, val_images: float) -> bool:
    """Whether a side's largest differences from ours are within tolerance."""
    mlp = "MLP" in name
    images = MLP_IMAGES_TOLERANCE if mlp else IMAGES_TOLERANCE
    return nll <= (MLP_NLL_TOLERANCE if mlp else NLL_TOLERANCE) and accuracy <= (images + 0.5) / val_images


def end_to_end(plan: Plan, root: Path, searches: int, differences: Differences) -> dict[str, Any]:
    """Whole searches, each by a process of its own; the last ones stay in `root`/ours and `root`/b3."""
    quick = ["--quick"] if plan is QUICK else []
    cpu: dict[str, list[float]] = {"ours": [], "b3": []}

    def whole(name: str) -> float:
        shutil.rmtree(root / name, ignore_errors=True)
        command = [sys.executable, __file__, "--side", name, "--root", str(root / name), *quick]
        if name == "ours":
            job = job_of(plan.search, root / name).model_dump(mode="json", exclude_unset=True)
            (root / "job.toml").write_text("\n".join(as_toml(job)) + "\n")
            command = [sys.executable, "-m", "frostline", "search", str(root / "job.toml")]
        cpu_s, wall_s, found = tree_cpu_s(command)
        cpu[name].append(cpu_s)
        if name == "b3":
            compare(differences, "b3, end to end", scores_in(root / "ours" / "study"), json.loads(found))
        return wall_s

    wall = interleaved({name: functools.partial(whole, name) for name in cpu}, searches)
    return {
        **ratios(wall["ours"], wall["b3"]),
        "rounds": searches,
        "cpu_ratio": ratios(cpu["ours"], cpu["b3"])["ratio"],
        "ours_s": statistics.median(wall["ours"]),
        "b3_s": statistics.median(wall["b3"]),
        "load": str(plan.search),
    }


def after_extraction(
    load: Load, root: Path, workers: ProcessPoolExecutor, rounds: int, differences: Differences
) -> dict[str, Any]:
    """What follows the extraction, on the features that `end_to_end` has left."""
    cpu: dict[str, list[float]] = {"ours": [], "b3": []}
    folders = (root / f"{load.hidden}-{number}" for number in itertools.count())
    scores: dict[str, Score] = {}
    list(workers.map(warm, [load] * CORES))

    def ours() -> float:
        arguments = studies(load, next(folders), root / "ours" / "features")
        started = time.perf_counter()
        cpu["ours"].append(sum(workers.map(study, *arguments)))
        wall_s = time.perf_counter() - started
        for job in arguments[0]:
            assert results.read_extractions(job.folder).num_rows == 0, "the features were there"
            scores.update(scores_in(job.folder))
        return wall_s

    def theirs() -> float:
        started = time.perf_counter()
        found = list(workers.map(loop, [load] * CORES, range(CORES), [root / "b3"] * CORES))
        wall_s = time.perf_counter() - started
        cpu["b3"].append(sum(cpu_s for _, cpu_s in found))
        for part, _ in found:
            compare(differences, f"b3, {load}", scores, part)
        return wall_s

    wall = interleaved({"ours": ours, "b3": theirs}, rounds)
    cpu_ratio = ratios(cpu["ours"], cpu["b3"])["ratio"]
    return {**ratios(wall["ours"], wall["b3"]), "rounds": rounds, "cpu_ratio": cpu_ratio, "load": str(load)}


def slow_rungs(plan: Plan, root: Path, differences: Differences) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds that B0, B1 and B2 would take for the whole search, and what was measured of each."""
    arguments = studies(plan.slow, root / "slow", root / "ours" / "features")
    list(map(study, *arguments))
    ours = {key: score for job in arguments[0] for key, score in scores_in(job.folder).items()}
    images, site = 10 * plan.search.per_class, load_site(plan.slow)

    quick = ["--quick"] if plan is QUICK else []
    *_, tuned = tree_cpu_s([sys.executable, __file__, "--side", "tune", *quick])
    seconds, measured = {}, {}
    for rung, trials in json.loads(tuned).items():
        for trial in trials:
            compare(differences, rung, ours, trial["scores"])
        alone_s = [Pace(**trial["pace"]).scaled(site, images, plan.search.epochs) for trial in trials]
        seconds[rung] = plan.search.heads * statistics.fmean(alone_s) / CORES
        measured[rung] = f"{len(trials)} trials of {plan.slow}"

    torch.set_num_threads(CORES)
    started = time.perf_counter()
    site, trials = load_site(plan.slow), trials_of(plan.slow)
    setup_s = time.perf_counter() - started
    scores, train_s, val_s = train_heads(trials, site.train, site.val, site.width, site.outputs)
    torch.set_num_threads(1)
    compare(differences, "b2", ours, scores)
    seconds["b2"] = Pace(setup_s, 0.0, train_s, val_s).scaled(site, images, plan.search.epochs)
    return seconds, {**measured, "b2": str(plan.slow)}


def studies(load: Load, folder: Path, features: Path) -> tuple[list[Job], list[Mapping[str, Any]], list[Any]]:
    """The arguments of `study` for each core."""
    job = job_of(load, folder)
    job = job.model_copy(update={"features": job.features.model_copy(update={"path": str(features)})})
    prepared = prepare(job)
    return by_core(prepared.job), [facts_of(prepared)] * CORES, [splits_table(prepared.dataset)] * CORES


def side(name: str, plan: Plan, root: Path) -> Any:
    """What a process of its own does; what it prints."""
    if name == "b3":
        return expert(plan.search, root)
    import ray

    ray.init("local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    rungs = {"b0": False, "b1": True}
    found = {rung: on_tune(plan.slow, plan.slow_trials, own_features=own) for rung, own in rungs.items()}
    ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of what follows the extraction")
    parser.add_argument("--searches", type=int, default=3, help="rounds of the whole")
    parser.add_argument("--quick", action="store_true", help="a toy of everything in less than a minute, 1 round each")
    parser.add_argument("--side", choices=["b3", "tune"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.side:
        print(json.dumps(side(arguments.side, plan, arguments.root)))
        return
    rounds, searches = (1, 1) if arguments.quick else (arguments.rounds, arguments.searches)
    torch.set_num_threads(1)
    differences: Differences = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for load in (plan.search, *plan.packs):
            facts_of(prepare(job_of(load, root)))
        whole = end_to_end(plan, root, searches, differences)
        with cores() as workers:  # after `tree_cpu_s`, which waits for all that this process has started
            linear, mlp64, mlp256 = (after_extraction(load, root, workers, rounds, differences) for load in plan.packs)
        seconds, measured = slow_rungs(plan, root, differences)
        counts = counts_of(root / "ours" / "study")
    say(
        "head_search",
        {
            **linear,
            "counts": counts,
            "equal_scores": all(agree(name, *found, counts["val_images"]) for name, found in differences.items()),
            **{rung: seconds[rung] / whole["ours_s"] for rung in ("b0", "b1", "b2")},
            "end_to_end": whole,
            "mlp64": mlp64,
            "mlp256": mlp256,
            "measured": measured,
            "differences": {name: {"nll": nll, "accuracy": hits} for name, (nll, hits) in differences.items()},
        },
    )


if __name__ == "__main__":
    main()
