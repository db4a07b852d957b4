"""Studies on a real Ray: the rows of an inline run, lost workers, placement, kills, a cluster that is there."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import frostline
from _head import ray_head
from frostline import results
from frostline.api import SearchFailedError
from frostline.prepare import prepare
from frostline.shards import FeatureError
from frostline.testing import TOY_BACKBONE, toy_job

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

BESIDE_THE_NUMBERS = {
    *("seconds", "spent_s", "alone_s", "seconds_data", "seconds_setup", "seconds_train", "seconds_eval", "peak_mib"),
    *("started_at", "finished_at", "node", "hardware", "images_forward", "ask_seq", "tell_seq", "versions"),
}
"""Columns that say where and how fast a trial ran, in which order, and what its process had at hand already."""


def numbers(study: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for row in results.read_trials(study).to_pylist():
        spec = json.loads(row["spec"])
        del spec["features"]["path"]
        found[row["trial_id"]] = {k: v for k, v in row.items() if k not in BESIDE_THE_NUMBERS} | {"spec": spec}
    return found


def epoch_numbers(study: Path) -> list[tuple]:
    rows = results.read_epochs(study).to_pylist()
    return sorted((r["trial_id"], r["epoch"], r["train_loss"], r["val_loss"], r["val_score"], r["lr"]) for r in rows)


def same_on_ray(tmp_path: Path, *options: str) -> Path:
    """Search inline and on Ray, each with a store of its own, hold one against the other, and answer the folder of the
    latter. qmc does not look at results, and nothing is pruned: they are identical to the last bit, predictions included."""
    options = (*options, "search.trials=6", "search.sampler=qmc", "search.pruner.kind=none")
    inline, on_ray = (toy_job(tmp_path / name / "study", options) for name in ("inline", "ray"))
    frostline.search(inline, inline=True)
    frostline.search(on_ray)
    assert len(numbers(inline.folder)) == 6 + 2
    assert numbers(inline.folder) == numbers(on_ray.folder)
    assert epoch_numbers(inline.folder) == epoch_numbers(on_ray.folder)
    key = [("trial_id", "ascending"), ("sample_id", "ascending")]
    predictions = [results.read_predictions(job.folder).sort_by(key) for job in (inline, on_ray)]
    assert predictions[0].equals(predictions[1])
    return on_ray.folder


@pytest.mark.fault(46)
def test_a_search_on_ray_gives_the_rows_of_an_inline_search_packs_and_extractions_included(tmp_path: Path) -> None:
    """One pack at a time, as inline: packs and shards that differ in size may differ in the last bits."""
    study = same_on_ray(tmp_path, "features.cache=all", "augment.views=2", f"resources.cpus={os.cpu_count()}")
    rows = results.read_trials(study).to_pylist()
    assert {row["inputs"] for row in rows} == {"features", "images"}
    assert max(row["lanes"] for row in rows) > 1
    extracted = results.read_extractions(study).to_pylist()
    assert {row["view"] for row in extracted} == {None, 0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("views", ["0", "live"])
def test_trials_that_run_side_by_side_give_the_rows_of_an_inline_search(tmp_path: Path, views: str) -> None:
    study = same_on_ray(tmp_path, "features.cache=none", f"augment.views={views}")
    assert {row["inputs"] for row in results.read_trials(study).to_pylist()} == {"images"}
    assert results.read_extractions(study).num_rows == 0


@pytest.mark.slow
def test_packs_that_run_side_by_side_give_the_scores_of_an_inline_search(tmp_path: Path) -> None:
    options = ["features.cache=all", "search.trials=12", "search.sampler=qmc", "search.pruner.kind=none"]
    options += ['arms.freeze.space."freeze.depth"=[2, 3]']
    found = []
    for name, inline in (("inline", True), ("ray", False)):
        job = toy_job(tmp_path / name / "study", options)
        frostline.search(job, inline=inline)
        found.append(sorted((trial_id, epoch, loss) for trial_id, epoch, _, loss, *_ in epoch_numbers(job.folder)))
    assert [entry[:2] for entry in found[0]] == [entry[:2] for entry in found[1]]
    assert [entry[2] for entry in found[0]] == pytest.approx([entry[2] for entry in found[1]], rel=1e-4)


MORTAL = '''
"""Workers that die: at the pieces of work of these numbers, and with trial number 1 of the search whenever it runs."""
import os, sys
from pathlib import Path
from frostline.data import splits_table
from frostline.estimate import facts_of
from frostline.prepare import prepare
from frostline.testing import toy_job
from frostline.tune import run_tune
from frostline.worker import Worker

log = Path(sys.argv[1]).parent / "steps"
deaths = sys.argv[2:]

class Mortal(Worker):
    def note(self):
        with log.open("a") as file:
            file.write("x")
        if str(log.stat().st_size) in deaths:
            os._exit(1)

    def prepare(self, work):
        self.note()
        return super().prepare(work)

    def run(self, specs, report, finish):
        self.note()
        if any(spec.number == 1 and spec.round == "search" for spec in specs):
            os._exit(1)
        return super().run(specs, report, finish)

options = ["search.trials=5", "search.sampler=random", "search.pruner.kind=none", "confirm.seeds=1"]
options += ["features.cache=all", f"resources.cpus={os.cpu_count()}"]
arms = {"probe": {"strategy": "linear_probe", "space": {"train.head_lr": {"low": 1e-3, "high": 1e-1}}}}
job = toy_job(Path(sys.argv[1]), options, arms=arms)
ready = prepare(job)
run_tune(ready.job, facts_of(ready), splits_table(ready.dataset), who={}, show=lambda _: None, trainable=Mortal)
'''


@pytest.mark.fault(4)
@pytest.mark.parametrize("deaths", [[], pytest.param(["1", "3"], marks=pytest.mark.slow)], ids=["trial", "extraction"])
def test_what_a_dead_worker_did_is_done_again_and_the_search_goes_on(tmp_path: Path, deaths: list[str]) -> None:
    """The survey comes first, its second try next, then the one shard, then heads in closed form. The five trials are one pack: tried again one by
    one, all but the one that is to blame complete."""
    script = tmp_path / "mortal.py"
    script.write_text(MORTAL)
    subprocess.run([sys.executable, str(script), str(tmp_path / "study"), *deaths], check=True, capture_output=True)
    search, again, confirmation = ["survey", "shard", "probe", "pack"], ["trial"] * 5, ["survey", "shard", "trial"]
    assert (tmp_path / "steps").stat().st_size == len([*search, *again, *confirmation]) + len(deaths)
    rows = {row["trial_id"]: row for row in results.read_trials(tmp_path / "study").to_pylist()}
    assert len(rows) == 5 + 1
    lost = rows.pop("probe-00001")
    assert (lost["status"], lost["error_kind"], lost["val_score"]) == ("failed", "worker_lost", None)
    assert {row["status"] for row in rows.values()} == {"complete"}
    assert {row["inputs"] for row in rows.values()} == {"features"}
    assert {row["cuts"] for row in results.read_extractions(tmp_path / "study").to_pylist()} == {"3"}


UNUSABLE = "/sys/frostline"  # nobody may make a folder there, not even root


@pytest.mark.parametrize("where", [["--inline"], pytest.param([], marks=pytest.mark.slow)], ids=["inline", "ray"])
def test_a_store_that_cannot_be_written_ends_the_search_before_any_trial(tmp_path: Path, where: list[str]) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    driver = start(tmp_path, "features.cache=all", f"features.path={UNUSABLE}", *where)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 2, output
    said = output.strip().splitlines()[-1]
    assert said.startswith(f"frostline: the feature store {UNUSABLE}/")
    assert "Operation not permitted" in said or "Read-only" in said
    assert "name another place (features.path" in said
    assert "Traceback" not in output
    assert not (tmp_path / "results" / "killed" / "trials").exists()


def test_activations_beyond_half_precision_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud.py").write_text(
        "from frostline.testing import toy_backbone\n"
        "def loud():\n"
        "    made = toy_backbone()\n"
        "    made['module'].block2[1].weight.data.fill_(1e6)\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = toy_job(
        tmp_path / "study", ["backbone.name=python:loud:loud", "features.cache=all", "features.dtype=float16"]
    )
    with pytest.raises(FeatureError, match=r'set features\.dtype = "float32"'):
        frostline.search(job, inline=True)
    assert not (tmp_path / "study" / "trials").exists()


def test_concurrency_is_what_the_nodes_hold() -> None:
    from frostline.tune import PlacementError, concurrency

    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0}, {}]

    def held(cpus: float, gpus: float, *overrides: str) -> int:
        return concurrency(toy_job(Path("study"), [f"resources.cpus={cpus}", *overrides]), gpus, nodes)

    assert held(1, 0) == 7
    assert held(2, 0) == 3
    assert held(1, 0.5) == 4
    assert held(4, 1) == 1
    assert held(1, 0, "scaling.workers=3") == 2
    assert held(1, 0, "scaling.workers=7") == 1
    assert held(1, 0, "scaling.workers=9", "scaling.min_workers=2") == 1
    with pytest.raises(PlacementError, match=r"needs 8 CPUs and 0 GPUs on one node .* 4 CPUs and 2 GPUs; 3 CPUs"):
        held(8, 0)
    with pytest.raises(PlacementError, match=r"8 workers .* there is room for 7"):
        held(1, 0, "scaling.workers=8")


def test_a_trial_that_no_node_can_hold_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a trial needs 512 CPUs"):
        frostline.search(toy_job(tmp_path / "study", ["resources.cpus=512"]))
    assert not (tmp_path / "study" / "trials").exists()


@pytest.mark.fault(34, 36)
def test_a_search_in_which_every_trial_fails_is_a_failure(tmp_path: Path) -> None:
    space = {"freeze.depth": [0, 1], "train.lr": 10.0, "train.head_lr": 10.0}
    job = toy_job(tmp_path / "study", ["search.trials=2", "train.optimizer=sgd", "train.weight_decay=1.0", "train.warmup=0.0"],
                  arms={"freeze": {"strategy": "freeze_depth", "space": space}})  # fmt: skip
    with pytest.raises(SearchFailedError, match="none of 2 trials completed"):
        frostline.search(job, inline=True)
    assert {row["error_kind"] for row in results.read_trials(job.folder).to_pylist()} == {"non_finite"}


JOB = f"""
name = "killed"
[data]
path = "digits"
image_size = 16
per_class = 20
[backbone]
name = "{TOY_BACKBONE}"
weights = "random"
[train]
epochs = 120
[search]
trials = 30
startup_trials = 5
[search.pruner]
grace_epochs = 20
[confirm]
seeds = 2
[arms.freeze]
strategy = "freeze_depth"
[arms.freeze.space]
"freeze.depth" = "all"
"train.lr" = {{ low = 1e-4, high = 1e-2, log = true }}
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """A search of its own, which hears Ctrl-C even where these tests run as a background job that does not."""
    command = [sys.executable, "-m", "frostline.cli", "search", "job.toml", *arguments]
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hear
    )


@pytest.mark.fault(13, 20, 50)
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kills_of_the_driver_lose_and_double_no_row(
    tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    kills = request.config.getoption("--kills")
    options = [f"search.trials={3 * kills}"]
    (tmp_path / "job.toml").write_text(JOB)
    study, rng, seen = tmp_path / "results" / "killed", random.Random(0), set()
    for kill in range(kills):
        driver = start(tmp_path, *options)
        deadline = time.monotonic() + 120
        before = len(seen)
        while driver.poll() is None and len(committed(study)) < before + 1 and time.monotonic() < deadline:
            time.sleep(0.2)  # each attempt earns at least one row, then dies at a random moment
        time.sleep(rng.uniform(0, 3))
        if kill == 0:
            second = start(tmp_path, *options)
            answer, _ = second.communicate(timeout=120)
            assert second.returncode == 2, answer
            assert "is in use: pid" in answer, answer
        driver.kill()
        driver.communicate()
        now = committed(study)
        assert seen <= now
        seen = now
    last = start(tmp_path, *options)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    rows = [row["trial_id"] for row in results.read_trials(study).to_pylist()]
    assert len(rows) == len(set(rows)) == 3 * kills + 2
    record_property("figure", f"{kills} kills, {len(rows)} rows, none lost, none twice")
    assert seen <= set(rows)
    wait_until_gone(study)


def committed(study: Path) -> set[str]:
    if not (study / "trials").exists():
        return set()
    return {row["trial_id"] for row in results.read_trials(study).to_pylist()}


def wait_until_gone(study: Path) -> None:
    """No process of ours may outlive its study."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = [p for p in psutil.process_iter(["cmdline"]) if "StudyActor" in " ".join(p.info["cmdline"] or [])]
        if not left:
            return
        time.sleep(0.5)
    raise AssertionError(f"still running: {left}")


@pytest.mark.fault(14)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_says_so_and_goes_on_later(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    study = tmp_path / "results" / "killed"
    driver = start(tmp_path, "search.trials=8")
    while driver.poll() is None and not committed(study):
        time.sleep(0.2)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 128 + number, output
    assert "the same command goes on from there" in output
    kept = committed(study)
    again = start(tmp_path, "search.trials=8")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert kept <= committed(study)
    assert len(committed(study)) == 8 + 2


@pytest.mark.long
@pytest.mark.fault(14)
def test_whoever_will_not_wait_for_the_end_of_an_interrupted_search_loses_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    study = tmp_path / "results" / "killed"
    driver = start(tmp_path, "search.trials=8")
    while driver.poll() is None and not committed(study):
        time.sleep(0.2)
    kept = committed(study)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, output
    wait_until_gone(study)
    again = start(tmp_path, "search.trials=8")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert kept <= committed(study)
    assert len(committed(study)) == 8 + 2


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray head of our own, for whose token this process is set up."""
    (tmp_path / "head").mkdir()
    with ray_head(tmp_path / "head") as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, head.env[name])
        yield head.address


@pytest.mark.slow
def test_a_cluster_that_wants_a_token_tells_so(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "wrong").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong"))
    driver = start(tmp_path, "search.trials=6", "--address", cluster)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 2, output
    assert "RAY_AUTH_TOKEN_PATH" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_search_on_a_cluster_that_is_there(tmp_path: Path, cluster: str) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    driver = start(tmp_path, "search.trials=6", "train.epochs=3", "--address", cluster)
    output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, output
    study = tmp_path / "results" / "killed"
    assert len(committed(study)) == 6 + 2
    assert json.loads(results.read_trials(study)["versions"][0].as_py())["code"]
    assert prepare(toy_job(tmp_path / "x")).facts["versions"]["code"]
