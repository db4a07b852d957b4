"""What a trial costs beside its training: CPU time per trivial trial, against Ray Tune with OptunaSearch.

Both sides run the same number of trials that do nothing but report one score, over the same four-dimensional space with
TPE, at the same concurrency, on one local Ray. Frostline's side commits a Parquet row per trial. CPU time is that of the
whole process tree (driver, study, raylet, workers) from start to end, less what starting and stopping Ray takes (measured
with 20 trials). The ratio is theirs over ours.

    python benchmarks/overhead.py [--trials 1000] [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPACE = {"train.lr": (1e-5, 1e-2), "train.head_lr": (1e-4, 1e-1), "train.weight_decay": (1e-6, 1e-2)}
DEPTHS = 4


def score(values: dict[str, float]) -> float:
    """A smooth function of the configuration, so that TPE has something to model."""
    import math

    return -abs(values["freeze.depth"] - 2) - sum(abs(math.log10(values[key]) + 3.5) for key in SPACE)


def ours(trials: int) -> int:
    """Run a Frostline study of trials that report once; answers the number of committed rows."""
    from frostline import results
    from frostline.rows import describe, summarise
    from frostline.spec import configure
    from frostline.testing import toy_job
    from frostline.train import EpochRecord
    from frostline.trial import Outcome, Report
    from frostline.tune import TrialActor, run_tune
    from frostline.world import World

    class Trivial(TrialActor):
        def run(self, report: Report) -> Outcome:
            config = self.spec.config
            depth = config.freeze.depth
            value = score({"freeze.depth": depth, **{key: getattr(config.train, key[6:]) for key in SPACE}})
            scores = {"accuracy": value, "balanced_accuracy": value, "macro_f1": value, "nll": -value}
            record = EpochRecord(1, 0.0, scores, value, 0.0, 0.0, 0, 0.0, 0.0)
            report(record)
            row = {**describe(self.spec, World.here(self.spec.resources)), **summarise(self.spec, [record], "complete")}
            return Outcome(row | {"seconds": 0.0, "device_s": 0.0})

    space = {key: {"low": low, "high": high, "log": True} for key, (low, high) in SPACE.items()}
    arms = {"freeze": {"strategy": "freeze_depth", "space": {"freeze.depth": "all", **space}}}
    with tempfile.TemporaryDirectory() as folder:
        job = toy_job(
            Path(folder) / "study",
            [f"search.trials={trials}", "search.pruner.kind=none", "search.defaults=false", "confirm.seeds=0"],
            arms=arms,
        )
        assert configure(job, job.arms["freeze"], {"freeze.depth": 1})
        facts = {"stages": [str(stage) for stage in range(DEPTHS)]}
        run_tune(job, facts, results.SCHEMAS["splits"].empty_table(), who={}, show=lambda _: None, trainable=Trivial)
        return results.read_trials(job.folder).num_rows


def theirs(trials: int) -> int:
    """The same with a function trainable under Tune and OptunaSearch; answers the number of finished trials."""
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trivial(config: dict[str, float]) -> None:
        tune.report({"score": score(config)})

    space = {key: tune.loguniform(low, high) for key, (low, high) in SPACE.items()}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    slots = int(ray.cluster_resources()["CPU"])
    with tempfile.TemporaryDirectory() as folder:
        found = tune.Tuner(
            trivial,
            param_space={"freeze.depth": tune.randint(0, DEPTHS + 1), **space},
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                search_alg=OptunaSearch(),
                num_samples=trials,
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    ray.shutdown()
    return len(found)


def tree_cpu_s(command: list[str]) -> tuple[float, float, int]:
    """Run a command: CPU seconds of it and all it started, wall seconds, and the number that it printed last."""
    started, before = time.perf_counter(), os.times()
    # Ray's processes are reaped by their parents, so their CPU time reaches us through the children's counters only if
    # every one of them has been waited for; a subreaper makes this process the parent of those that outlive theirs.
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.perf_counter() - started, int(done.stdout.split()[-1])


def per_trial_ms(side: str, trials: int) -> tuple[float, float]:
    """CPU and wall milliseconds per trial of one side, start and stop taken off."""
    few = 20
    base_cpu, base_wall, _ = tree_cpu_s([sys.executable, __file__, "--side", side, "--trials", str(few)])
    cpu, wall, finished = tree_cpu_s([sys.executable, __file__, "--side", side, "--trials", str(trials)])
    assert finished == trials, f"{side}: {finished} of {trials} trials finished"
    return 1e3 * (cpu - base_cpu) / (trials - few), 1e3 * (wall - base_wall) / (trials - few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print({"ours": ours, "theirs": theirs}[arguments.side](arguments.trials))
        return
    ratios, found = [], {"ours": [], "theirs": []}
    for number in range(arguments.rounds):
        for side, figures in found.items():
            figures.append(per_trial_ms(side, arguments.trials))
            print(f"round {number + 1}, {side}: {figures[-1][0]:.1f} ms CPU, {figures[-1][1]:.1f} ms wall per trial")
        ratios.append(found["theirs"][-1][0] / found["ours"][-1][0])
    print(
        json.dumps(
            {
                "name": "overhead",
                "ratio": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
                "rounds": arguments.rounds,
                "counts": {"trials": arguments.trials},
                "ours_cpu_ms": [round(cpu, 2) for cpu, _ in found["ours"]],
                "theirs_cpu_ms": [round(cpu, 2) for cpu, _ in found["theirs"]],
                "ours_wall_ms": [round(wall, 2) for _, wall in found["ours"]],
                "theirs_wall_ms": [round(wall, 2) for _, wall in found["theirs"]],
            }
        )
    )


if __name__ == "__main__":
    main()
