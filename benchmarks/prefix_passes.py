"""How often each image passes frozen stages in a whole study: all cuts, trials and confirmations, on several raylets.

A Ray cluster of three raylets is started on this host. On it run a search of digits at 64 px on EfficientNet-Lite0 with
features.cache = "all", an arm for the head alone and one for each of two more cuts, and confirmations of each arm's best; the
driver is killed with SIGKILL when a third of the trials have been committed, and the same study goes on in a new one. The
ratio is the passes through frozen stages, those of extractions and those that trials made themselves, per distinct image, by
the rows of the study; 1 is the least. A second study, of another name, seed (and so another split), arms and train subset,
must find all that it reads in the store. Timing the stages, once for a hardware, is not counted.

    python benchmarks/prefix_passes.py [--quick]
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

import frostline
from _measure import say
from frostline import results
from frostline.commit import committed_parts
from frostline.jobfile import parse_job
from frostline.spec import Job
from frostline.testing import TOY_BACKBONE

RAYLETS = 3
LR = {"low": 1e-4, "high": 1e-2, "log": True}


def job_of(root: Path, name: str, quick: bool) -> Job:
    """The `first` or the `second` study; they share the feature store."""
    cuts = [1, 2, 3] if quick else [6, 7, 8]
    first, rates = name == "first", {"train.lr": LR, "train.head_lr": LR}
    arms: dict[str, Any] = {
        "probe": {"strategy": "linear_probe", "space": {"head.hidden": [0, 32] if first else [16], "train.head_lr": LR}}
    }
    for arm, depths in {f"cut_{cut}": [cut] for cut in cuts[:-1]}.items() if first else [("depth", cuts)]:
        arms[arm] = {"strategy": "freeze_depth", "space": {"freeze.depth": depths, **rates}}
    return parse_job(
        {
            "name": name,
            "results": str(root / name),
            "seed": 0 if first else 7,
            "data": {"path": "digits", "image_size": 16 if quick else 64, **({} if first else {"per_class": 30})},
            "backbone": {"name": TOY_BACKBONE, "weights": "random"} if quick else {"name": "efficientnet-lite0"},
            "train": {"epochs": 8 if quick else 2},
            "features": {"cache": "all", "path": str(root / "features")},
            "search": {"trials": 60 if quick else 24},
            "confirm": {"seeds": 3, "finalists": "arms"},
            "arms": arms,
        },
        [],
    )


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """A Ray cluster of three raylets on this host, with a token of its own; its address."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster  # reads these when it is imported

    raylets = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(RAYLETS - 1):
            raylets.add_node(num_cpus=1)
        yield raylets.address
    finally:
        raylets.shutdown()


def search(root: Path, name: str, quick: bool, address: str, kill: bool = False) -> int:
    """Run a study in a process of its own; how many trials were committed when it ended or was killed."""
    command = [sys.executable, __file__, "--study", name, "--root", str(root), "--address", address]
    driver = subprocess.Popen(
        [*command, "--quick"] if quick else command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    job = job_of(root, name, quick)
    while kill and driver.poll() is None:
        if committed(job.folder) >= job.search.trials // 3:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            return committed(job.folder)
        time.sleep(0.05)
    said, _ = driver.communicate()
    if driver.returncode or kill:
        what = "ended before it could be killed" if kill else f"exited with {driver.returncode}"
        raise SystemExit(f"the {name} study {what}:\n{said.decode()[-4000:]}")
    return committed(job.folder)


def committed(study: Path) -> int:
    """How many rows of trials there are."""
    return results.read_trials(study).num_rows if committed_parts(study, results.RECORD) else 0


def passes(study: Path) -> dict[str, Any]:
    """Images that passed through frozen stages in a study: for all trials in extractions, and in the trials themselves."""
    trials = results.read_trials(study).to_pylist()
    lost = [row for row in trials if row["status"] == "failed" or row["inputs"] != "features"]
    assert not lost, f"these trials failed, or read no features: {lost}"
    extractions = results.read_extractions(study).to_pylist()
    facts = results.read_job(study)["facts"]
    return {
        "images": facts["n_train"] + facts["n_val"] + facts["n_test"],
        "extractions": len(extractions),
        "extracted": sum(row["images"] for row in extractions),
        "by_trials": sum(row["images_forward"] for row in trials),
        "cuts": facts["cached_cuts"],
        "trials": sum(row["round"] == "search" for row in trials),
        "confirmations": sum(row["round"] == "confirm" for row in trials),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy network at 16 px")
    parser.add_argument("--study", choices=["first", "second"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.study:
        job = job_of(arguments.root, arguments.study, arguments.quick)
        frostline.search(job, address=arguments.address, console=Console(file=io.StringIO()))
        return
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as address:
        root, run = Path(folder), (arguments.quick, address)
        killed = search(root, "first", *run, kill=True)
        search(root, "first", *run)
        first = passes(root / "first")
        search(root, "second", *run)
        second = passes(root / "second")
    found = {name: study["extracted"] + study["by_trials"] for name, study in (("first", first), ("second", second))}
    ratio = found["first"] / first["images"]
    say(
        "prefix_passes",
        {
            "ratio": ratio,
            "min": ratio,
            "max": ratio,
            "rounds": 1,
            "counts": {**first, "passes": found["first"], "raylets": RAYLETS, "committed_when_killed": killed},
            "second": {**second, "passes": found["second"]},
        },
    )


if __name__ == "__main__":
    main()
