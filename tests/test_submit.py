"""Searches on a cluster elsewhere: what is packed for them, and what the Jobs API of a real head makes of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from safetensors.torch import save_file

from _head import TOKEN, Head, ray_head
from frostline import results
from frostline.cli import main
from frostline.jobfile import load_job
from frostline.submit import LIMIT_BYTES, SubmissionError, pack
from frostline.testing import TOY_BACKBONE, ToyNet
from frostline.versions import versions

JOB = """
name = "small"
results = "{results}"
[data]
path = "digits"
image_size = 16
per_class = 10
[backbone]
name = "{backbone}"
weights = "random"
[train]
epochs = 2
[search]
trials = 3
[confirm]
seeds = 1
[arms.freeze]
strategy = "freeze_depth"
[arms.freeze.space]
"freeze.depth" = "all"
"train.lr" = {{ low = 1e-4, high = 1e-2, log = true }}
"""
TRANSFER = '"""A network, from another file beside this one."""\nimport numpy\nfrom layers.toy import net as make\n'


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as started:
        yield started


def write_job(backbone: str = TOY_BACKBONE) -> str:
    """job.toml in the working directory, with its study in a folder beside it."""
    Path("job.toml").write_text(JOB.format(results=Path("study").absolute(), backbone=backbone))
    return "job.toml"


def write_network() -> None:
    """transfer.py, which imports from a folder without __init__.py, beside much that is not needed."""
    Path("transfer.py").write_text(TRANSFER)
    Path("layers").mkdir()
    Path("layers", "toy.py").write_text("from frostline.testing import toy_backbone as net\n")
    Path("other.py").write_text("1 / 0\n")
    for folder in (".git", "results", "data", "layers/__pycache__"):
        Path(folder).mkdir()
        Path(folder, "object.py").write_text("")
    with Path("stray.bin").open("wb") as file:
        file.truncate(200 << 20)


def packed(tmp_path: Path, *overrides: str) -> dict[str, Path]:
    submission = pack(load_job("job.toml", overrides), tmp_path / "packed", Path.cwd())
    found = submission.working_dir.rglob("*")
    return {str(path.relative_to(submission.working_dir)): path for path in found if path.is_file()}


def test_only_what_a_job_needs_is_packed(tmp_path: Path) -> None:
    write_job("python:transfer:make")
    write_network()
    files = packed(tmp_path, "search.trials=5", "search.pruner.kind=none")
    assert sorted(files) == ["job.toml", "layers/toy.py", "transfer.py"]
    sent = load_job(files["job.toml"])
    assert sent == load_job("job.toml", ["search.trials=5", "search.pruner.kind=none"])
    package = tmp_path / "packed" / "frostline"
    assert (package / "cli.py").is_file()
    assert not list(package.rglob("*.pyc"))


def test_a_network_that_is_installed_is_not_packed(tmp_path: Path) -> None:
    write_job()
    assert sorted(packed(tmp_path)) == ["job.toml"]


def test_weights_beside_a_job_are_packed_and_those_on_storage_are_not(tmp_path: Path) -> None:
    write_job()
    Path("mine").mkdir()
    save_file(ToyNet().state_dict(), "mine/toy.safetensors")
    files = packed(tmp_path, "backbone.weights=mine/toy.safetensors")
    assert sorted(files) == ["job.toml", "weights/toy.safetensors"]
    assert load_job(files["job.toml"]).backbone.weights == "weights/toy.safetensors"
    shutil.rmtree("packed")
    assert sorted(packed(tmp_path, "backbone.weights=/shared/toy.safetensors")) == ["job.toml"]
    with pytest.raises(SubmissionError, match=r'backbone.weights = "mine/tyo.pt": no such file'):
        packed(tmp_path, "backbone.weights=mine/tyo.pt")


def test_too_much_is_refused_by_name_before_anything_is_copied(tmp_path: Path) -> None:
    write_job("python:layers.toy:net")
    write_network()
    shutil.move("stray.bin", "layers/table.bin")
    with pytest.raises(SubmissionError, match=r"200 MiB, and Ray takes no package above 100 MiB(.|\n)*200\.0 MiB +.*/layers/table\.bin"):  # fmt: skip
        packed(tmp_path)
    assert not (tmp_path / "packed").exists()
    assert LIMIT_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_paths_that_mean_nothing_on_a_cluster_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    write_job()
    overrides = ["results=results/small", "data.path=photos", "features.path=features"]
    assert main(["submit", "job.toml", *overrides, "--address", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert 'results = "results/small": the study would be written to results/small in a temporary folder' in error
    assert "results=/shared/small" in error
    assert 'data.path = "photos": data are not sent along' in error
    assert 'features.path = "features"' in error
    assert main(["submit", "job.toml", "backbone.name=bundle/results/a/bundle", "--address", "http://127.0.0.1:1"]) == 2
    assert 'backbone.name = "bundle/results/a/bundle": bundles are not sent along' in capsys.readouterr().err


def test_a_job_without_arms_is_trained(tmp_path: Path) -> None:
    Path("job.toml").write_text('name = "bare"\nresults = "/shared/bare"\n[data]\npath = "digits"\n')
    assert pack(load_job("job.toml"), tmp_path / "packed", Path.cwd()).entrypoint[3:5] == ("train", "job.toml")


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "there is no module 'transfer' in"), ("def make(:\n", "transfer.py cannot be read as Python")],
)
def test_a_network_that_cannot_be_found_or_read_is_refused(tmp_path: Path, source: str | None, said: str) -> None:
    write_job("python:transfer:make")
    if source:
        Path("transfer.py").write_text(source)
    with pytest.raises(SubmissionError, match=said):
        packed(tmp_path)


def test_dry_run_prints_the_plain_command_and_no_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    write_job()
    assert main(["submit", "job.toml", "--address", "http://head:8265", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert TOKEN not in said
    words = shlex.split(said)
    assert words[:5] == ["ray", "job", "submit", "--address", "http://head:8265"]
    assert re.fullmatch(r"small-\d{8}-\d{6}", words[words.index("--submission-id") + 1])
    assert words[words.index("--") + 1 :] == [
        "python",
        "-m",
        "frostline.cli",
        "search",
        "job.toml",
        "--address",
        "auto",
    ]
    working_dir = Path(words[words.index("--working-dir") + 1])
    (package,) = json.loads(words[words.index("--runtime-env-json") + 1])["py_modules"]
    assert load_job(working_dir / "job.toml") == load_job("job.toml")
    assert (Path(package) / "cli.py").is_file()
    shutil.rmtree(working_dir.parent)


def test_an_address_that_is_no_dashboard_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    write_job()
    assert main(["submit", "job.toml", "--address", "head:6379"]) == 2
    assert "for example http://head:8265" in capsys.readouterr().err
    assert main(["jobs", "list", "--address", "auto"]) == 2
    assert "URL of the dashboard" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["jobs", "list", "--address", "http://127.0.0.1:1"]) == 2
    assert "pip install 'frostline[cluster]'" in capsys.readouterr().err


def test_a_study_goes_on_with_the_same_weights_in_another_file() -> None:
    """Ray unpacks them into another folder whenever anything that is sent along has changed."""
    write_job()
    save_file(ToyNet().state_dict(), "one.safetensors")
    shutil.copy("one.safetensors", "two.safetensors")
    save_file(ToyNet().state_dict(), "other.safetensors")
    command = ["search", "--inline", "job.toml"]
    assert main([*command, "backbone.weights=one.safetensors"]) == 0
    assert main([*command, "backbone.weights=two.safetensors", "search.trials=4"]) == 0
    assert main([*command, "backbone.weights=other.safetensors", "search.trials=4"]) == 2
    assert main([*command, "backbone.weights=random", "search.trials=4"]) == 2
    assert len(results.read_trials("study")) == 4 + 1


def test_a_submitted_search_runs_to_its_end_and_is_there_to_ask_for(head: Head, tmp_path: Path) -> None:
    write_job("python:transfer:make")
    write_network()
    done = head.run(tmp_path, "submit", "job.toml", "search.trials=4", "--address", head.dashboard)
    assert done.returncode == 0, done.stdout
    assert TOKEN not in done.stdout
    (job_id,) = set(re.findall(r"small-\d{8}-\d{6}", done.stdout))
    assert f"report: {tmp_path}/study/report.html" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{job_id}: SUCCEEDED"
    rows = results.read_trials("study").to_pylist()
    assert len(rows) >= 4 + 1
    assert {json.loads(row["versions"])["code"] for row in rows} == {versions()["code"]}
    assert main(["results", "study"]) == 0
    listed = head.run(tmp_path, "jobs", "list", "--address", head.dashboard)
    assert re.search(rf"{job_id} +SUCCEEDED +20\d\d-", listed.stdout), listed.stdout
    stands = head.run(tmp_path, "jobs", "status", job_id, "--address", head.dashboard)
    assert stands.stdout.splitlines() == [f"{job_id}: SUCCEEDED", f"its study is {tmp_path}/study, on the cluster"]
    logs = head.run(tmp_path, "jobs", "logs", job_id, "--address", head.dashboard)
    assert f"report: {tmp_path}/study/report.html" in logs.stdout


@pytest.mark.fault(19)
def test_a_job_that_no_node_can_hold_answers_with_its_exit_status(head: Head, tmp_path: Path) -> None:
    write_job()
    done = head.run(tmp_path, "submit", "job.toml", "resources.cpus=512", "--address", head.dashboard)
    assert done.returncode == 2, done.stdout
    assert "a trial needs 512 CPUs and 0 GPUs on one node (resources.cpus, resources.gpus)" in done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(": FAILED")
    assert not Path("study", "trials").exists()


@pytest.mark.parametrize("token", ["0" * 64, ""], ids=["wrong", "none"])
def test_a_cluster_that_wants_a_token_says_so(head: Head, tmp_path: Path, token: str) -> None:
    write_job()
    env = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "token" if token else "disabled"}
    done = head.run(tmp_path, "submit", "job.toml", "--address", head.dashboard, **env)
    assert done.returncode == 2, done.stdout
    assert f"the cluster at {head.dashboard} refuses" in done.stdout
    assert "RAY_AUTH_TOKEN_PATH" in done.stdout
    assert "Traceback" not in done.stdout
    assert not token or token not in done.stdout


def test_a_job_that_is_not_there_and_a_cluster_that_is_not(head: Head, tmp_path: Path) -> None:
    done = head.run(tmp_path, "jobs", "status", "nobody", "--address", head.dashboard)
    assert done.returncode == 2, done.stdout
    assert f"there is no job nobody at {head.dashboard}" in done.stdout
    done = head.run(tmp_path, "jobs", "list", "--address", "http://127.0.0.1:9")
    assert done.returncode == 2, done.stdout
    assert "no Ray dashboard answers at http://127.0.0.1:9" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.fault(18)
@pytest.mark.slow
def test_a_stopped_job_goes_on_when_it_is_submitted_again(head: Head, tmp_path: Path) -> None:
    """With more trials, so that the package and with it the folder of the weights are others."""
    write_job()
    save_file(ToyNet().state_dict(), "toy.safetensors")
    same = ["train.epochs=20", "backbone.weights=toy.safetensors", "--address", head.dashboard]
    began = head.run(tmp_path, "submit", "job.toml", "search.trials=40", *same, "--no-wait")
    assert began.returncode == 0, began.stdout
    (job_id,) = set(re.findall(r"small-\d{8}-\d{6}", began.stdout))
    while not Path("study", "trials").exists():
        time.sleep(0.2)
    stopped = head.run(tmp_path, "jobs", "stop", job_id, "--address", head.dashboard)
    assert stopped.stdout.strip() == f"{job_id}: STOPPED"
    kept = {row["trial_id"] for row in results.read_trials("study").to_pylist()}
    again = head.run(tmp_path, "submit", "job.toml", "search.trials=44", *same)
    assert again.returncode == 0, again.stdout
    rows = [row["trial_id"] for row in results.read_trials("study").to_pylist()]
    assert kept <= set(rows)
    assert len(rows) == len(set(rows)) == 44 + 1


@pytest.mark.fault(17)
@pytest.mark.slow
def test_a_job_whose_supervisor_is_killed_goes_on_when_it_is_submitted_again(head: Head, tmp_path: Path) -> None:
    """Ray ends the search with it, says that the job has failed, and does not start it again."""
    write_job()
    same = ["train.epochs=20", "--address", head.dashboard]
    began = head.run(tmp_path, "submit", "job.toml", "search.trials=40", *same, "--no-wait")
    assert began.returncode == 0, began.stdout
    (job_id,) = set(re.findall(r"small-\d{8}-\d{6}", began.stdout))
    while not Path("study", "trials").exists():
        time.sleep(0.2)
    (supervisor,) = [
        each for each in psutil.Process().children(recursive=True) if "JobSupervisor" in " ".join(each.cmdline())
    ]
    supervisor.kill()
    stands = ""
    while "FAILED" not in stands:
        stands = head.run(tmp_path, "jobs", "status", job_id, "--address", head.dashboard).stdout
    kept = {row["trial_id"] for row in results.read_trials("study").to_pylist()}
    assert len(kept) < 40
    again = head.run(tmp_path, "submit", "job.toml", "search.trials=44", *same)
    assert again.returncode == 0, again.stdout
    rows = [row["trial_id"] for row in results.read_trials("study").to_pylist()]
    assert kept <= set(rows)
    assert len(rows) == len(set(rows)) == 44 + 1
