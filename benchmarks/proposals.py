"""What batches cost in quality: the regret of Frostline's proposals, many from one fit, against Optuna's TPE, one by one.

Both sides minimise the same functions over the same spaces from the same random start, paired by seed. Theirs is
optuna's TPESampler as it comes, which hears every result before its next proposal; ours proposes in the batches of
`frostline.propose.batch`. Neither forgets anything: there are no more trials than `search.history`. The functions are
published ones, some with choices and whole numbers beside intervals; and a recorded study of Frostline, the validation NLL
of 4,096 heads on digits (recorded.toml), of which a configuration gets the nearest one's. The ratio is the geometric mean, over functions and seeds, of their regret over ours; min and max are
those of single functions. To each regret a ten-thousandth of the function's spread is added (the median of 1,000 random
points minus the minimum), so that regrets near zero are equal. `one_at_a_time` is the same ratio for our proposals one
by one, which are Optuna's own with other seeds: how far it lies from 1 is noise. `cpu_ms` is the CPU time per trial.

    python benchmarks/proposals.py [--trials 256] [--rounds 20] [--lanes 64] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq

from frostline import results
from frostline.propose import Proposer, batch, distributions
from frostline.spec import Job
from frostline.testing import toy_job

STARTUP = 10
UNIT = ("head.dropout", "train.warmup", "train.momentum", "train.label_smoothing", "train.weight_decay", "train.ema")
LOW, HIGH = 0.05, 0.95  # any of these keys may hold this
RECORDED = Path(__file__).parent / "recorded.parquet"
RECORDED_SPACE = {
    "head.hidden": (0, 16, 64, 256),
    "head.dropout": (0.0, 0.6),
    "train.head_lr": (1e-4, 1e-1),
    "train.weight_decay": (1e-4, 1e-1),
    "train.label_smoothing": (0.0, 0.21),
}
LOG = ("train.head_lr", "train.weight_decay")
HARTMANN_A = [
    [10, 3, 17, 3.5, 1.7, 8],
    [0.05, 10, 17, 0.1, 8, 14],
    [3, 3.5, 1.7, 10, 17, 8],
    [17, 8, 0.05, 10, 0.1, 14],
]
HARTMANN_P = [[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
              [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A function of a configuration (dotted job key -> value), its space, and its minimum."""

    space: Mapping[str, Any]
    value: Callable[[Mapping[str, Any]], float]
    minimum: float = 0.0


def branin(x: float, y: float) -> float:
    bowl = (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2
    return bowl + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def hartmann(*x: float) -> float:
    distances = (np.array(HARTMANN_A) * (np.array(x) - np.array(HARTMANN_P) / 1e4) ** 2).sum(axis=1)
    return -float(np.array([1, 1.2, 3, 3.2]) @ np.exp(-distances))


def ackley(*x: float) -> float:
    square, cosine = (fmean(part) for part in ([v * v for v in x], [math.cos(2 * math.pi * v) for v in x]))
    return 20 + math.e - 20 * math.exp(-0.2 * math.sqrt(square)) - math.exp(cosine)


def rosenbrock(*x: float) -> float:
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in pairwise(x))


def smooth(function: Callable[..., float], ends: list[tuple[float, float]], minimum: float = 0.0) -> Problem:
    """A problem over a box."""
    space = {key: {"low": LOW, "high": HIGH} for key in UNIT[: len(ends)]}
    return Problem(space, lambda values: function(*scaled(values, ends)), minimum)


def scaled(values: Mapping[str, Any], ends: list[tuple[float, float]]) -> list[float]:
    pairs = zip(UNIT, ends, strict=False)
    return [low + (high - low) * (values[key] - LOW) / (HIGH - LOW) for key, (low, high) in pairs]


def mixed(function: Callable[..., float], ends: list[tuple[float, float]]) -> Problem:
    """A problem over a box, five choices without an order and 17 whole numbers."""
    choices = [3, 1, 5, 2, 4]
    space = {
        **smooth(function, ends).space,
        "train.batch_size": choices,
        "head.hidden": {"low": 0, "high": 16},
    }

    def value(values: Mapping[str, Any]) -> float:
        third = (values["train.batch_size"] - 3) / 2
        return function(*scaled(values, ends), values["head.hidden"] / 4 - 2, third)

    return Problem(space, value)


@functools.cache
def recorded_trials() -> tuple[np.ndarray, np.ndarray]:
    """(n, axes) places and (n,) values of the recorded trials."""
    table = pq.read_table(RECORDED)
    axes = [table[name.partition(".")[2]].to_numpy() for name in RECORDED_SPACE]
    return np.stack([place(name, axis) for name, axis in zip(RECORDED_SPACE, axes, strict=True)], 1), table[
        "val_nll"
    ].to_numpy()


def place(name: str, values: Any) -> Any:
    """Where values lie on an axis, from 0 to 1."""
    low, high = min(entry := RECORDED_SPACE[name]), max(entry)
    scale = np.log if name in LOG else np.asarray
    return (scale(values) - scale(low)) / (scale(high) - scale(low))


def recorded() -> Problem:
    """Validation NLL of the recorded trial that is nearest to a configuration."""
    places, values = recorded_trials()
    space: dict[str, Any] = {
        name: {"low": min(entry), "high": max(entry), **({"log": True} if name in LOG else {})}
        for name, entry in RECORDED_SPACE.items()
    }
    space["head.hidden"] = list(RECORDED_SPACE["head.hidden"])

    def value(configuration: Mapping[str, Any]) -> float:
        here = np.array([place(name, configuration[name]) for name in RECORDED_SPACE])
        return float(values[np.square(places - here).sum(axis=1).argmin()])

    return Problem(space, value, float(values.min()))


def record(study: Path) -> None:
    """Keep what a study of benchmarks/recorded.toml found."""
    columns = {"hidden": "head_hidden", "dropout": "head_dropout", "head_lr": "head_lr"}
    columns |= {"weight_decay": "weight_decay", "val_nll": "val_nll"}
    trials = results.read_trials(study)
    specs = [json.loads(spec) for spec in trials["spec"].to_pylist()]
    smoothing = [spec["config"]["train"]["label_smoothing"] for spec in specs]
    kept = pa.table({name: trials[column] for name, column in columns.items()})
    pq.write_table(kept.append_column("label_smoothing", pa.array(smoothing)), RECORDED)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "branin": lambda: smooth(branin, [(-5, 10), (0, 15)], 0.39788735772973816),
    "hartmann6": lambda: smooth(hartmann, [(0, 1)] * 6, -3.322368011415516),
    "ackley5": lambda: smooth(ackley, [(-20, 30)] * 5),
    "ackley_mixed": lambda: mixed(ackley, [(-20, 30)] * 3),
    "rosenbrock_mixed": lambda: mixed(lambda *x: rosenbrock(*x[:-1]) + 10 * abs(x[-1]), [(-2, 3)] * 3),
    "recorded": recorded,
}


def job_of(problem: Problem, trials: int, seed: int, *more: str) -> Job:
    """A search of one arm over the problem's space; its score is minimised."""
    options = [
        f"search.trials={trials}",
        f"search.startup_trials={STARTUP}",
        f"seed={seed}",
        "search.defaults=false",
        "search.pruner.kind=none",
        "objective.metric=nll",
        *more,
    ]
    return toy_job(Path("unused"), options, arms={"arm": {"strategy": "full", "space": problem.space}})


def ours(problem: Problem, trials: int, seed: int, lanes: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Values in the order of trials, and the configurations."""
    arm = Proposer(job_of(problem, trials, seed), "arm", 1, trials)
    values: list[float] = []
    asked: list[dict[str, Any]] = []
    while arm.asked < trials:
        k = batch(arm.kind, arm.asked, trials, lanes, STARTUP)
        configurations = arm.ask(k)
        for number, configuration in enumerate(configurations, start=len(asked)):
            values.append(problem.value(configuration))
            arm.tell(number, "complete", values[-1])
        asked += configurations
    return values, asked


def theirs(problem: Problem, trials: int, seed: int, start: list[dict[str, Any]]) -> list[float]:
    """The same with Optuna's own sampler and study, after the same start."""
    job = job_of(problem, trials, seed)
    space = distributions(job.arms["arm"], 1)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP))
    for values in start:
        study.enqueue_trial(values)
    found = []
    for _ in range(trials):
        trial = study.ask(space)
        found.append(problem.value(trial.params))
        study.tell(trial, found[-1])
    return found


def spread(problem: Problem) -> float:
    """The median of 1,000 random points minus the minimum."""
    points = Proposer(job_of(problem, 1000, 0, "search.sampler=random"), "arm", 1, 1000).ask(1000)
    return median(problem.value(point) for point in points) - problem.minimum


def compare(name: str, trials: int, rounds: int, lanes: int) -> dict[str, Any]:
    """Log of their regret over ours, per seed: in batches, and one at a time; CPU milliseconds per trial of each."""
    problem = PROBLEMS[name]()
    floor = 1e-4 * spread(problem)
    logs: dict[str, list[float]] = {"batches": [], "one_at_a_time": []}
    ms = {"batches": 0.0, "one_at_a_time": 0.0, "theirs": 0.0}
    for seed in range(rounds):
        regret = {}
        for side, most in (("batches", lanes), ("one_at_a_time", 1)):
            began = time.process_time()
            values, asked = ours(problem, trials, seed, most)
            ms[side] += 1e3 * (time.process_time() - began) / trials / rounds
            regret[side] = min(values) - problem.minimum + floor
        began = time.process_time()
        regret["theirs"] = min(theirs(problem, trials, seed, asked[:STARTUP])) - problem.minimum + floor
        ms["theirs"] += 1e3 * (time.process_time() - began) / trials / rounds
        for side, found in logs.items():
            found.append(math.log(regret["theirs"] / regret[side]))
    return {"logs": logs, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20, help="seeds")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="96 trials, two seeds")
    parser.add_argument("--record", type=Path, help="a study of recorded.toml, to be kept in recorded.parquet")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
        return
    if arguments.quick:
        arguments.trials, arguments.rounds = 96, 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    most = job_of(PROBLEMS["branin"](), arguments.trials, 0).search.history
    if arguments.trials > most:
        raise SystemExit(f"--trials {arguments.trials}: Optuna's side remembers all of them, ours {most}")
    found = {}
    for name in PROBLEMS:
        found[name] = compare(name, arguments.trials, arguments.rounds, arguments.lanes)
        for side, logs in found[name]["logs"].items():
            error = np.std(logs, ddof=1) / math.sqrt(len(logs))
            low, mean, high = (math.exp(np.mean(logs) + by * error) for by in (-2, 0, 2))
            wins = sum(log > 0 for log in logs), sum(log < 0 for log in logs)
            print(
                f"{name:17} {side:14} {mean:7.2f}x ({low:.2f} to {high:.2f}), better in {wins[0]}, worse in {wins[1]}"
            )
    ratios = {
        side: {name: math.exp(np.mean(one["logs"][side])) for name, one in found.items()}
        for side in ("batches", "one_at_a_time")
    }
    k = batch("tpe", STARTUP, arguments.trials, arguments.lanes, STARTUP)
    print(
        json.dumps(
            {
                "name": "proposals",
                "ratio": round(geometric_mean(ratios["batches"].values()), 3),
                "min": round(min(ratios["batches"].values()), 3),
                "max": round(max(ratios["batches"].values()), 3),
                "rounds": arguments.rounds,
                "counts": {"trials": arguments.trials, "batch": k, "functions": len(PROBLEMS)},
                "ratios": {name: round(ratio, 3) for name, ratio in ratios["batches"].items()},
                "one_at_a_time": {name: round(ratio, 3) for name, ratio in ratios["one_at_a_time"].items()},
                "cpu_ms": {
                    side: round(fmean([one["ms"][side] for one in found.values()]), 3)
                    for side in ("batches", "one_at_a_time", "theirs")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
