"""A search on a cluster elsewhere, through Ray's Jobs API: what is packed for it, its command, and jobs that are there.

Two packages travel: this `frostline`, for every worker to import, and a working directory with the job as one file, the modules of
a `python:` backbone and a weights file that the job names by a relative path. Data, results and all else stay here.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from frostline.credentials import censored, holds_credentials
from frostline.extras import extra
from frostline.jobfile import as_toml
from frostline.modality import BUNDLE, PREFIX
from frostline.rayenv import TOKEN_HINT, ClusterError, settings
from frostline.spec import Job
from frostline.versions import VERSION

LIMIT_BYTES = 100 << 20  # of a package; Ray's dashboard takes no larger one
STOP_WAIT_S = 30  # from SIGTERM to SIGKILL when a job is stopped: time to commit rows
POLL_S = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
QUIET_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
SHIPPED_DATA = ("digits", "fashion-mnist", "fortunes")


class SubmissionError(ValueError):
    """A job that cannot be submitted as it is, or one that is not there."""


@dataclass(frozen=True)
class Submission:
    """A job packed for a cluster."""

    submission_id: str
    """The job's name, and when it was packed (UTC)."""
    working_dir: Path
    package: Path
    """A copy of `frostline`."""
    entrypoint: tuple[str, ...]
    """The command that runs it there: to search, or to train where the job has no arms."""
    metadata: dict[str, str]

    @property
    def runtime_env(self) -> dict[str, Any]:
        """As the Jobs API takes it."""
        return {
            "working_dir": str(self.working_dir),
            "py_modules": [str(self.package)],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }


def pack(job: Job, into: Path, here: Path, *, allow_open_cluster: bool = False) -> Submission:
    """Copy what the job needs of the folder `here` into two folders in `into`; there the job is run as `frostline.search` says.

    Raises SubmissionError where a path of the job means nothing on a cluster, and before anything is copied where the files are
    too large.
    """
    check_arms_and_paths(job)
    files: dict[str, Path] = {}
    backbone = job.backbone
    if backbone.name.startswith("python:"):
        files |= _modules_of(backbone.name, here.resolve())
    if backbone.weights not in ("pretrained", "random") and not _is_absolute(backbone.weights):
        weights = here / backbone.weights
        if not weights.is_file():
            raise SubmissionError(
                f'backbone.weights = "{backbone.weights}": no such file in {here}; give "pretrained", "random", a file that is '
                "there and is sent along, or an absolute path that the head node sees"
            )
        sent = f"weights/{weights.name}"
        files[sent] = weights
        job = job.model_copy(update={"backbone": backbone.model_copy(update={"weights": sent})})
    check_size(files)
    working_dir, package = into / "working_dir", into / "frostline"
    working_dir.mkdir(parents=True)
    for target, source in files.items():
        (working_dir / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, working_dir / target)
    lines = as_toml(job.model_dump(mode="json", exclude_unset=True))
    (working_dir / "job.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copytree(Path(__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return Submission(
        submission_id=f"{job.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        working_dir=working_dir,
        package=package,
        entrypoint=(
            "python",
            "-m",
            "frostline.cli",
            "search" if job.arms else "train",
            "job.toml",
            "--address",
            "auto",
            *["--allow-open-cluster"] * allow_open_cluster,
        ),
        metadata={"study": str(job.folder), "frostline": VERSION},
    )


def check_arms_and_paths(job: Job) -> None:
    """Whether there is something to search, and whether what the job reads and writes lies where a cluster sees it. Raises
    SubmissionError, which lists every key."""
    lines = []
    if not job.folder.is_absolute():
        given = f'results = "{job.results}"' if job.results else "results (not given)"
        lines.append(
            f"{given}: the study would be written to {job.folder} in a temporary folder of Ray and be lost; give an absolute "
            f"path on storage that the head node sees, for example results=/shared/{job.name}"
        )
    if job.data.path not in SHIPPED_DATA and not _is_absolute(job.data.path):
        lines.append(
            f'data.path = "{job.data.path}": data are not sent along; give an absolute path that every node sees, or a URI '
            "(s3://…)"
        )
    if job.backbone.name.startswith(BUNDLE) and not _is_absolute(job.backbone.name.removeprefix(BUNDLE)):
        lines.append(
            f'backbone.name = "{job.backbone.name}": bundles are not sent along; give an absolute path that the head node sees'
        )
    for key, name in (("backbone.name", job.backbone.name), ("data.tokenizer", job.data.tokenizer or "")):
        folder = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and not _is_absolute(folder) and Path(folder).is_dir():
            lines.append(
                f'{key} = "{name}": encoders are not sent along; give an absolute path that the head node sees'
            )
    if job.features.path and not _is_absolute(job.features.path):
        lines.append(
            f'features.path = "{job.features.path}": give an absolute path that every node sees, or a URI (s3://…)'
        )
    if lines:
        raise SubmissionError("\n  ".join([f"job {job.name!r} cannot run on a cluster elsewhere:", *lines]))


def check_size(files: Mapping[str, Path]) -> None:
    """Whether files fit into a package. Raises SubmissionError, which lists the largest."""
    sizes = sorted(((source.stat().st_size, str(source)) for source in files.values()), reverse=True)
    if (total := sum(size for size, _ in sizes)) > LIMIT_BYTES:
        largest = [f"{size / 2**20:8.1f} MiB  {source}" for size, source in sizes[:5]]
        raise SubmissionError(
            "\n  ".join(
                [
                    f"what the job needs of this machine takes {total / 2**20:.0f} MiB, and Ray takes no package above "
                    f"{LIMIT_BYTES >> 20} MiB. The largest files:",
                    *largest,
                    "Put them on storage that the head node sees, and name weights by an absolute path (backbone.weights=/shared/…)",
                ]
            )
        )


def _is_absolute(path: str) -> bool:
    return "://" in path or Path(path).expanduser().is_absolute()


def _modules_of(backbone: str, here: Path) -> dict[str, Path]:
    """Path in the working directory -> file, for the module of a `python:` backbone and all that it imports from `here` and from
    PYTHONPATH, found without running any of it. Installed packages are left out: nodes have them. Raises SubmissionError."""
    name = backbone.removeprefix("python:").partition(":")[0].partition(".")[0]
    paths = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    roots = [here, *(path for path in paths if "site-packages" not in path.parts)]
    importlib.invalidate_caches()
    if _find(name, roots) is None:
        raise SubmissionError(f'backbone.name = "{backbone}": there is no module {name!r} in {here} or on PYTHONPATH')
    found: dict[str, Path] = {}
    seen, waiting = {"frostline"}, [name]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            files = _local_files(name, roots)
            found |= files
            waiting += [each for source in files.values() if source.suffix == ".py" for each in _imports(source)]
    return found


def _find(name: str, roots: Sequence[Path]) -> Any:
    return PathFinder.find_spec(name, [*map(str, roots), *sys.path])


def _local_files(name: str, roots: Sequence[Path]) -> dict[str, Path]:
    """A module's file or all files of a package, by their path under the root that they lie in; none where it lies elsewhere."""
    spec = _find(name, roots)
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        source = Path(spec.origin or "")
        return {source.name: source} if source.parent in roots else {}
    folders = [Path(folder) for folder in spec.submodule_search_locations if Path(folder).parent in roots]
    return {
        str(path.relative_to(folder.parent)): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    }


def _imports(source: Path) -> set[str]:
    """The top-level modules that a file imports anywhere. Raises SubmissionError where it is no Python."""
    try:
        tree = ast.parse(source.read_bytes(), str(source))
    except (SyntaxError, ValueError) as error:
        raise SubmissionError(f"{source} cannot be read as Python: {error}") from None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def as_command(submission: Submission, address: str) -> str:
    """The `ray job submit` that does the same."""
    env = submission.runtime_env
    working_dir = env.pop("working_dir")
    return shlex.join(
        [
            *("ray", "job", "submit", "--address", address, "--submission-id", submission.submission_id),
            *("--working-dir", working_dir, "--runtime-env-json", json.dumps(env)),
            *("--metadata-json", json.dumps(submission.metadata), "--", *submission.entrypoint),
        ]
    )


def check_address(address: str) -> None:
    """Whether an address is a dashboard's. Raises SubmissionError."""
    if not address.startswith(("http://", "https://")):
        raise SubmissionError(
            f"--address {address}: the Jobs API is at the URL of the dashboard of the cluster's head, for example "
            f"http://{address.partition(':')[0]}:8265"
        )
    if holds_credentials(address):
        raise SubmissionError(
            f"--address {censored(address)}: leave the credentials out; Ray's token is found by itself"
        )


def connect(address: str) -> Any:
    """A JobSubmissionClient for the dashboard at `address`, with a token from Ray's own places.

    Raises MissingExtraError without the extra `cluster`, SubmissionError for what is no URL, ClusterError where nothing answers.
    """
    check_address(address)
    extra("cluster", "aiohttp")
    os.environ.update(settings())
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would take RAY_ADDRESS before what it is given
    from ray.job_submission import JobSubmissionClient

    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _asking(address):
        return JobSubmissionClient(address)


def start(client: Any, submission: Submission) -> None:
    """Upload the packages where the cluster has not got them yet, and start the job. Raises ClusterError."""
    with _asking(client.get_address()):
        client.submit_job(
            entrypoint=shlex.join(submission.entrypoint),
            submission_id=submission.submission_id,
            runtime_env=submission.runtime_env,
            metadata=submission.metadata,
        )


def follow(client: Any, job_id: str, say: Callable[[str], object]) -> Any:
    """Say all that a job writes until it has ended, and answer its details. Raises SubmissionError and ClusterError."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            say(text)

    find(client, job_id)
    with _asking(client.get_address(), job_id):
        asyncio.run(tail())
    return wait(client, job_id)


def wait(client: Any, job_id: str) -> Any:
    """Wait until a job has ended, and answer its details."""
    while (details := find(client, job_id)).status not in ENDED:
        time.sleep(POLL_S)
    return details


def find(client: Any, job_id: str) -> Any:
    """A job's details. Raises SubmissionError where there is none."""
    with _asking(client.get_address(), job_id):
        return client.get_job_info(job_id)


def logs(client: Any, job_id: str) -> str:
    """All that a job has written. Raises SubmissionError where there is none."""
    with _asking(client.get_address(), job_id):
        return client.get_job_logs(job_id)


def stop(client: Any, job_id: str) -> Any:
    """Ask a job to end, wait until it has, and answer its details. Raises SubmissionError where there is none."""
    with _asking(client.get_address(), job_id):
        client.stop_job(job_id)
    return wait(client, job_id)


def list_jobs(client: Any) -> list[Any]:
    """Details of the submitted jobs, the latest first."""
    with _asking(client.get_address()):
        return sorted(
            (each for each in client.list_jobs() if each.submission_id), key=lambda each: -(each.start_time or 0)
        )


def exit_status(details: Any) -> int:
    """That of the job's process; 1 where it has none and did not succeed."""
    return 0 if details.status == "SUCCEEDED" else details.driver_exit_code or 1


@contextmanager
def _asking(address: str, job_id: str | None = None) -> Iterator[None]:
    """Around whatever asks the Jobs API: its failures become SubmissionError (no such job) and ClusterError, in one line."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} refuses: {_line(error)}. Set RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN, in a "
            "file at RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token; `ray get-auth-token` on the head node prints it"
        ) from error
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise ClusterError(f"no Ray dashboard answers at {address}: {_line(error)}. {TOKEN_HINT}") from error
    except RuntimeError as error:
        if job_id and "404" in str(error):
            raise SubmissionError(
                f"there is no job {job_id} at {address}; `frostline jobs list --address {address}` shows those there are"
            ) from None
        raise ClusterError(f"the cluster at {address} did not do it: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
