"""Seconds until the best validation accuracy reaches a target, against Ray Tune with OptunaSearch and ASHA.

Both search the same space (freeze depth x where the head stands x learning rate x head learning rate x head width) for
scikit-learn's digits at 96 px under EfficientNet-Lite0 (ImageNet weights), 10 train images a class, with the same number of trials at once, up to 9
epochs each, successive halving with the same rungs, TPE that draws its first 10 trials at random, and the same two
configurations first. Theirs is Tune as documented, a function that reports after every epoch, and spares what an expert
would spare: worker processes are reused, each loads data and backbone once, and what is frozen has no backward pass. It
trains with Frostline's own live path (`run_trial` with nothing stored), so that an epoch is the same work on both sides.
Ours does all that a search of Frostline does: it stores activations, tries heads in closed form at every cut and begins at
the best of them, trains heads together, and starts every head at the closed form (`head.init = "probe"`; `--init random`
takes that away, `--their-init probe` gives it to their side too).

Seeds are paired: one seed gives both sides the same splits. Their side goes first. Its best score is the target, and our
search is stopped when a trial that was there has ended; where none is, the target is our best. A score counts from the end
of its epoch: on their side from its report, on ours from the end of its trial less what its later epochs took. The clock of both starts when Ray is up: starting its processes and
importing PyTorch there counts on both sides, loading the data and starting Ray before that on neither; `with_start` is the
ratio with those too. Warm are the decoded pixels and, on our side, the stage times, which are measured once per machine.

`ratio` is the median over the seeds of their time over ours, `low` to `high` its interval from order statistics, which
covers with probability `coverage`; `reached` counts the seeds in which we came to their best score. `equal_scores` says
whether the trial with which ours was there scores the same, within IMAGES_TOLERANCE validation images, when their side's
function runs it, alone and with nothing stored.

Few images and a backbone that serves them favour us: where full fine-tuning of many images wins the search, both sides spend
their time on the same steps. `--per-class 32 --pixels 64` is such a case.

    python benchmarks/time_to_score.py [--rounds 10] [--trials 24] [--per-class 10] [--pixels 96]
                                       [--init probe] [--their-init random] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from _measure import interleaved, interval, ratios, say, tree_cpu_s
from frostline import results, search
from frostline.estimate import facts_of
from frostline.features import Feed
from frostline.jobfile import parse_job
from frostline.outcome import EpochRecord
from frostline.prepare import Prepared, prepare
from frostline.propose import Proposer
from frostline.spec import Job
from frostline.testing import TOY_BACKBONE
from frostline.trial import run_trial
from frostline.trialspec import TrialSpec, configure, search_seeds, trial_of
from frostline.world import World

ARM, HIDDEN = "freeze", (0, 128)
LR, HEAD_LR = (1e-5, 1e-2), (1e-3, 3e-2)
FIRST = 2  # configurations that both sides start with: our strong defaults
IMAGES_TOLERANCE = 2
LOOK_S = 0.5


def job_of(seed: int, trials: int, root: Path, *, init: str, per_class: int, pixels: int, toy: bool) -> Job:
    data = {"path": "digits", "image_size": pixels, "per_class": per_class, "val": 0.12, "test": 0.2}
    raw = {
        "name": "time_to_score",
        "results": str(root / "study"),
        "seed": seed,
        "data": {**data, "image_size": 16} if toy else data,
        "head": {"init": init},
        "train": {"epochs": 3 if toy else 9, "batch_size": 32, "lr": 1e-4},
        "features": {"path": str(root / "features")},
        "search": {"trials": trials, "pruner": {"kind": "halving", "grace_epochs": 1, "factor": 3}},
        "confirm": {"seeds": 0},
        "arms": {
            ARM: {
                "strategy": "freeze_depth",
                "space": {
                    "freeze.depth": "all",
                    "head.depth": "all",
                    "head.hidden": HIDDEN,
                    "train.lr": {"low": LR[0], "high": LR[1], "log": True},
                    "train.head_lr": {"low": HEAD_LR[0], "high": HEAD_LR[1], "log": True},
                },
            }
        },
    }
    return parse_job({**raw, "backbone": {"name": TOY_BACKBONE, "weights": "random"}} if toy else raw, [])


def started() -> list[float]:
    """Will hold the moment at which Ray is up."""
    from frostline.connection import ray  # the same settings of Ray on both sides: it reads them when it is imported

    init, moments = ray.init, []

    def timed(*arguments: Any, **options: Any) -> Any:
        context = init(*arguments, **options)
        moments.append(time.time())
        return context

    ray.init = timed
    return moments


def said(began: float, up: float, events: Sequence[tuple[float, float]], **more: Any) -> dict[str, Any]:
    """What a side prints: when which score was known, in seconds since Ray was up."""
    return {"events": [(at - up, score) for at, score in events], "start_s": up - began, **more}


# --- ours ---


def ours(job: Job, target: float) -> dict[str, Any]:
    began, up = time.time(), started()
    threading.Thread(target=stop_at, args=(job.folder, target), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        search(job)
    trials = results.read_trials(job.folder).to_pylist()
    trained = [row for row in trials if row["epochs"]]
    there = [row for row in trained if row["best_epoch_score"] >= target]
    first = min(there, key=itemgetter("finished_at")) if there else max(trained, key=itemgetter("best_epoch_score"))
    extracted = sum(results.read_extractions(job.folder)["images"].to_pylist())
    return said(
        began,
        up[0],
        events(trained, results.read_epochs(job.folder).to_pylist()),
        trials=len(trials),
        again=[first["last_score"], alone(first)],
        images=extracted + sum(row["images_forward"] for row in trials),
        sizes={"train_images": trials[0]["n_train"], "val_images": trials[0]["n_val"]},
    )


def events(trials: Sequence[dict[str, Any]], epochs: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """When which score was there at the latest: an epoch ends before those that come after it, and the trial then."""
    found = []
    for row in trials:
        at = row["finished_at"].timestamp()
        mine = [each for each in epochs if each["trial_id"] == row["trial_id"]]
        for epoch in sorted(mine, key=itemgetter("epoch"), reverse=True):
            found.append((at, epoch["val_score"]))
            at -= epoch["seconds"]
    return found


def stop_at(folder: Path, target: float) -> None:
    """Interrupt this process, as Ctrl-C does, once the study has a trial that was at the target."""
    while True:
        time.sleep(LOOK_S)
        with contextlib.suppress(results.NotAStudyError):
            best = results.read_trials(folder)["best_epoch_score"].to_pylist()
            if any(score is not None and score >= target for score in best):
                os.kill(os.getpid(), signal.SIGINT)
                return


def alone(row: dict[str, Any]) -> float:
    """The last score of a trial of ours, run for as many epochs, alone and with nothing stored."""
    spec = TrialSpec.model_validate_json(row["spec"]).model_copy(update={"cached": False, "start_stored": False})
    scores: list[float] = []

    def report(record: EpochRecord) -> bool:
        scores.append(record.val_score)
        return record.epoch < row["epochs"]

    run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=report)
    return scores[-1]


# --- theirs ---


def spec_of(job: Job, number: int, values: dict[str, Any]) -> TrialSpec:
    """A trial of Tune's, as ours of the same number would be."""
    seed, seeds = search_seeds(job, ARM, number)
    return trial_of(
        job,
        configure(job, job.arms[ARM], values),
        seeds,
        trial_id=f"{ARM}-{number:05d}",
        arm=ARM,
        number=number,
        round="search",
        seed=seed,
        cached=False,
    )


def theirs(job: Job, root: Path) -> dict[str, Any]:
    began, up = time.time(), started()
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    prepared = prepare(job)
    job, stages = prepared.job, len(prepared.backbone.stages)
    numbers = itertools.count()
    reports: list[dict[str, Any]] = []

    class Numbered(OptunaSearch):
        """As it comes, but that its trials know their number."""

        def suggest(self, trial_id: str) -> dict[str, Any] | None:
            values = super().suggest(trial_id)
            return values and {**values, "number": next(numbers)}

    class Heard(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            reports.append({name: result[name] for name in ("at", "score", "epoch", "number")})

    def trainable(config: dict[str, Any]) -> None:
        number = config["number"]
        spec = spec_of(job, number, {key: value for key, value in config.items() if key != "number"})

        def report(record: EpochRecord) -> bool:
            tune.report({"score": record.val_score, "epoch": record.epoch, "number": number, "at": time.time()})
            return True  # where ASHA stops a trial, `tune.report` does not come back

        outcome = run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=report)
        assert outcome.row["status"] == "complete", outcome.row

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    ended = tune.Tuner(
        trainable,
        param_space={
            "freeze.depth": tune.randint(0, stages + 1),
            "head.depth": tune.randint(1, stages + 1),
            "head.hidden": tune.choice(HIDDEN),
            "train.lr": tune.loguniform(*LR),
            "train.head_lr": tune.loguniform(*HEAD_LR),
        },
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=Numbered(points_to_evaluate=defaults(job, stages), seed=job.seed),
            scheduler=ASHAScheduler(max_t=job.train.epochs, grace_period=1, reduction_factor=3),
            num_samples=job.search.trials,
            max_concurrent_trials=os.cpu_count(),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(root), verbose=0, callbacks=[Heard()]),
    ).fit()
    assert not ended.errors, ended.errors
    ray.shutdown()
    images = prepared.n_train + len(prepared.dataset.indices("val"))
    return said(
        began,
        up[0],
        [(report["at"], report["score"]) for report in reports],
        images=len(reports) * images,
    )


def defaults(job: Job, stages: int) -> list[dict[str, Any]]:
    """The configurations that our search starts with."""
    return Proposer(job, ARM, stages, job.search.trials).ask(FIRST)


# --- the measurement ---


def reached_s(side: dict[str, Any], target: float) -> float:
    """When the score was first at the target."""
    return min(at for at, score in side["events"] if score >= target)


def best(side: dict[str, Any]) -> float:
    return max(score for _, score in side["events"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="seeds")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--per-class", type=int, default=10, help="train images a class")
    parser.add_argument("--pixels", type=int, default=96, help="side of the images")
    parser.add_argument("--init", default="probe", help="head.init on our side")
    parser.add_argument("--their-init", default="random", help="head.init on their side")
    parser.add_argument("--quick", action="store_true", help="a toy of it in less than a minute: 1 seed, 6 trials")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds, trials = (1, 6) if arguments.quick else (arguments.rounds, arguments.trials)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        init = arguments.their_init if arguments.side == "theirs" else arguments.init
        sizes = {"per_class": arguments.per_class, "pixels": arguments.pixels}
        job = job_of(arguments.seed, trials, root, init=init, **sizes, toy=arguments.quick)
        if arguments.side:
            print(json.dumps(ours(job, arguments.target) if arguments.side == "ours" else theirs(job, root)))
            return
        prepared: Prepared = prepare(job)
        facts_of(prepared)
    sides: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}

    def searched(name: str) -> float:
        seed = len(sides[name])
        options = ["--side", name, "--seed", str(seed), "--trials", str(trials)]
        options += ["--init", arguments.init, "--their-init", arguments.their_init]
        options += ["--per-class", str(arguments.per_class), "--pixels", str(arguments.pixels)]
        if name == "ours":
            options += ["--target", str(best(sides["theirs"][seed]))]
        *_, line = tree_cpu_s([sys.executable, __file__, *options, *(["--quick"] if arguments.quick else [])])
        printed = json.loads(line)
        sides[name].append(printed)
        return best(printed)

    interleaved({name: functools.partial(searched, name) for name in sides}, rounds)
    pairs = list(zip(sides["ours"], sides["theirs"], strict=True))
    targets = [min(best(one), best(other)) for one, other in pairs]
    seconds = {
        name: [reached_s(side, target) for side, target in zip(each, targets, strict=True)]
        for name, each in sides.items()
    }
    whole = {
        name: [side["start_s"] + at for side, at in zip(each, seconds[name], strict=True)]
        for name, each in sides.items()
    }
    sizes = sides["ours"][0]["sizes"]
    say(
        "time_to_score",
        {
            **ratios(seconds["ours"], seconds["theirs"]),
            **interval(seconds["ours"], seconds["theirs"]),
            "rounds": rounds,
            "counts": {
                "trials": trials,
                "trials_ours": median(side["trials"] for side in sides["ours"]),
                "reached": sum(best(one) >= best(other) for one, other in pairs),
                **sizes,
                **{f"images_{name}": median(side["images"] for side in each) for name, each in sides.items()},
            },
            "equal_scores": all(
                abs(a - b) <= (IMAGES_TOLERANCE + 0.5) / sizes["val_images"]
                for a, b in (side["again"] for side in sides["ours"])
            ),
            "init": arguments.init,
            "their_init": arguments.their_init,
            "with_start": ratios(whole["ours"], whole["theirs"])["ratio"],
            "target": median(targets),
            **{f"{name}_s": median(each) for name, each in seconds.items()},
            **{f"{name}_start_s": median(side["start_s"] for side in each) for name, each in sides.items()},
            **{f"{name}_best": median(map(best, each)) for name, each in sides.items()},
        },
    )


if __name__ == "__main__":
    main()
