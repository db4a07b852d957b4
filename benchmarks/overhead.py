"""What a trial costs beside its training: CPU time per trivial trial of a 10,000-trial study, and memory that grows with it.

The trials do nothing but report one epoch. All else is real: TPE proposes them over four dimensions, packs of them report to
the study, and each has an epoch and a row in its Parquet. Beside it is Ray Tune with OptunaSearch, reused actors and as many
trials at once, over the same space, with fewer trials: its cost per trial grows with their number, and is not scaled. CPU time is that of
the whole process tree (driver, study, raylet, workers) less what runs of 10 trials take (their median), which is start and
stop. The ratio is our milliseconds of CPU per trial. Memory is what the study's process, and the driver's, grow by per
trial, from a fifth of the trials on.

    python benchmarks/overhead.py [--trials 10000] [--theirs 1000] [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import say, tree_cpu_s

WIDTHS = (0, 16, 32, 64, 128)
SPACE = {"train.head_lr": (1e-4, 1e-1), "train.weight_decay": (1e-6, 1e-2), "train.label_smoothing": (1e-3, 0.3)}
STARTUP = 10


def score(values: Mapping[str, float]) -> float:
    """A smooth function of the configuration, so that TPE has something to model."""
    return -abs(WIDTHS.index(int(values["head.hidden"])) - 2) - sum(abs(math.log10(values[key]) + 2.5) for key in SPACE)


def ours(trials: int) -> dict[str, Any]:
    """Run a study of trials that report once; how it ended, and how much memory it took on the way."""
    from frostline import results
    from frostline.data import splits_table
    from frostline.outcome import EpochRecord, Outcome, summarise
    from frostline.pack import Finish, Report
    from frostline.prepare import prepare
    from frostline.rows import describe
    from frostline.snapshot import Snapshot
    from frostline.testing import toy_job
    from frostline.trialspec import TrialSpec
    from frostline.tune import run_tune
    from frostline.worker import Worker
    from frostline.world import World

    class Trivial(Worker):
        def run(self, specs: Sequence[TrialSpec], report: Report, finish: Finish) -> None:
            records, world = {}, World.here(specs[0].resources)
            for spec in specs:
                values = {"head.hidden": spec.config.head.hidden}
                values |= {key: getattr(spec.config.train, key.removeprefix("train.")) for key in SPACE}
                value = score(values)
                scores = {"accuracy": value, "balanced_accuracy": value, "macro_f1": value, "nll": -value}
                records[spec.trial_id] = EpochRecord(1, 0.0, scores, value, 0.0, 0.0, 0, 0.0, 0.0)
            report(records)
            finish(
                {
                    spec.trial_id: Outcome(
                        describe(spec, world)
                        | summarise(spec, [records[spec.trial_id]], "complete")
                        | {"seconds": 0.0, "spent_s": 0.0}
                    )
                    for spec in specs
                }
            )

    space = {key: {"low": low, "high": high, "log": True} for key, (low, high) in SPACE.items()}
    arms = {"probe": {"strategy": "linear_probe", "space": {"head.hidden": list(WIDTHS), **space}}}
    options = ["search.pruner.kind=none", "search.defaults=false", "confirm.seeds=0", "train.epochs=1"]
    with tempfile.TemporaryDirectory() as folder:
        job = toy_job(
            Path(folder) / "study", [f"search.trials={trials}", f"search.startup_trials={STARTUP}", *options], arms=arms
        )
        prepared = prepare(job)
        sizes: list[tuple[int, int, int]] = []  # trials done, KiB of the study's process, KiB of this one

        def weigh(snapshot: Snapshot) -> None:
            holder = json.loads((job.folder / "lease.json").read_text() or "{}")
            if "pid" in holder:  # not any more, once the study is closed
                sizes.append((snapshot.done, resident_kib(holder["pid"]), resident_kib("self")))

        run_tune(
            prepared.job,
            prepared.facts | {"cached_cuts": [len(prepared.backbone.stages)]},
            splits_table(prepared.dataset),
            who={},
            show=weigh,
            trainable=Trivial,
        )
        rows = results.read_trials(job.folder)
        return {
            "finished": rows.num_rows,
            "packs": len(rows["pack"].unique()),
            "fits": len(set(results.read_asks(job.folder)["batch"].to_pylist())),
            "bytes_per_trial": [growth(sizes, trials, column) for column in (1, 2)],
            "mib": [sizes[-1][column] / 1024 for column in (1, 2)],
        }


def resident_kib(pid: int | str) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def growth(sizes: Sequence[tuple[int, int, int]], trials: int, column: int) -> float | None:
    """Bytes per trial, from the first look after a fifth of the trials to the last; None without two such looks."""
    later = [size for size in sizes if size[0] >= trials / 5]
    if len(later) < 2 or later[-1][0] == later[0][0]:
        return None
    return 1024 * (later[-1][column] - later[0][column]) / (later[-1][0] - later[0][0])


def theirs(trials: int) -> dict[str, Any]:
    """The same with a function trainable under Tune and OptunaSearch."""
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trivial(config: dict[str, float]) -> None:
        tune.report({"score": score(config)})

    space = {key: tune.loguniform(low, high) for key, (low, high) in SPACE.items()}
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="warning")
    slots = int(ray.cluster_resources()["CPU"])
    with tempfile.TemporaryDirectory() as folder:
        found = tune.Tuner(
            trivial,
            param_space={"head.hidden": tune.choice(WIDTHS), **space},
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
    return {"finished": len(found)}


def measure(side: str, trials: int) -> dict[str, Any]:
    """CPU and wall seconds of a whole run of one side, and what the side says."""
    cpu, wall, line = tree_cpu_s([sys.executable, __file__, "--side", side, "--trials", str(trials)])
    said = json.loads(line)
    assert said["finished"] == trials, f"{side}: {said['finished']} of {trials} trials finished"
    print(f"{side}, {trials} trials: {cpu:.1f} s CPU, {wall:.1f} s wall, {said}", file=sys.stderr)
    return {"cpu_s": cpu, "wall_s": wall, **said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--theirs", type=int, default=1000, help="trials of Ray Tune with OptunaSearch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="300 trials of ours, 30 of theirs, one round")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[arguments.side](arguments.trials)))
        return
    trials, other, rounds = (300, 30, 1) if arguments.quick else (arguments.trials, arguments.theirs, arguments.rounds)
    sizes = {"ours": trials, "theirs": other}
    idle: dict[str, list[dict[str, Any]]] = {side: [] for side in sizes}
    whole: dict[str, list[dict[str, Any]]] = {side: [] for side in sizes}
    for _ in range(rounds):
        for side, size in sizes.items():
            idle[side].append(measure(side, STARTUP))
            whole[side].append(measure(side, size))

    def per_trial_ms(side: str, clock: str) -> list[float]:
        start_and_stop = statistics.median(each[clock] for each in idle[side])
        return [1e3 * (each[clock] - start_and_stop) / (sizes[side] - STARTUP) for each in whole[side]]

    cpu_ms, last = per_trial_ms("ours", "cpu_s"), whole["ours"][-1]
    say(
        "overhead",
        {
            "ratio": statistics.median(cpu_ms),
            "min": min(cpu_ms),
            "max": max(cpu_ms),
            "rounds": rounds,
            "counts": {"trials": trials, "packs": last["packs"], "fits": last["fits"], "theirs_trials": other},
            "theirs_cpu_ms": statistics.median(per_trial_ms("theirs", "cpu_s")),
            "wall_ms": {side: statistics.median(per_trial_ms(side, "wall_s")) for side in sizes},
            "bytes_per_trial": dict(zip(("study", "driver"), last["bytes_per_trial"], strict=True)),
            "mib": dict(zip(("study", "driver"), last["mib"], strict=True)),
        },
    )


if __name__ == "__main__":
    main()
