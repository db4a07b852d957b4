"""The commands `submit`, `jobs`, `doctor` and `cluster`: from parsed arguments to what is printed, and an exit status."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from frostline import localcluster
from frostline import submit as jobs_api
from frostline.doctor import Finding, findings
from frostline.jobfile import load_job
from frostline.nodes import examine
from frostline.text import duration, plain, render_table

FAULTS = {
    "kill": (localcluster.kill, "kill all processes of a node, as a power cut would"),
    "cut": (localcluster.cut, "pull a node's link: it runs on and reaches nobody"),
    "heal": (localcluster.heal, "plug a node's link in again, and start it anew where it is dead or given up"),
}


def submit(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job, arguments.overrides)
    jobs_api.check_address(arguments.address)
    if arguments.dry_run:
        into = Path(tempfile.mkdtemp(prefix=f"frostline-{job.name}-"))
        submission = jobs_api.pack(job, into, Path.cwd(), allow_open_cluster=arguments.allow_open_cluster)
        print(jobs_api.as_command(submission, arguments.address))
        return 0
    with tempfile.TemporaryDirectory(prefix="frostline-submit-") as scratch:
        submission = jobs_api.pack(job, Path(scratch), Path.cwd(), allow_open_cluster=arguments.allow_open_cluster)
        client = jobs_api.connect(arguments.address)
        jobs_api.start(client, submission)
    job_id, at = submission.submission_id, f"--address {arguments.address}"
    console = Console(highlight=False)
    console.print(Text(f"submitted {job_id}; its study is {job.folder}, on the cluster"), soft_wrap=True)
    if not arguments.no_wait:
        return _follow(client, job_id, arguments.address)
    console.print(Text(f"follow it with: frostline jobs logs {job_id} --follow {at}"), soft_wrap=True)
    return 0


def _follow(client: Any, job_id: str, address: str) -> int:
    """A job's logs until it has ended, and its exit status."""
    try:
        details = jobs_api.follow(client, job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe job goes on: frostline jobs logs {job_id} --follow --address {address}", file=sys.stderr)
        return 130
    _show_end(details)
    return jobs_api.exit_status(details)


def _show_end(details: Any) -> None:
    """A line on how a job stands and, where its process did not get to say why it failed, Ray's reason."""
    console = Console(highlight=False)
    console.print(Text(f"{details.submission_id}: {details.status}"), soft_wrap=True)
    if details.status == "FAILED" and details.driver_exit_code is None and details.message:
        console.print(Text(details.message), soft_wrap=True)


def list_jobs(arguments: argparse.Namespace) -> int:
    jobs = jobs_api.list_jobs(jobs_api.connect(arguments.address))
    ms = [(each.start_time or 0, each.end_time or 1000 * time.time()) for each in jobs]
    columns = {
        "job": [each.submission_id for each in jobs],
        "status": [str(each.status) for each in jobs],
        "began": [datetime.fromtimestamp(began / 1000).strftime("%Y-%m-%d %H:%M") for began, _ in ms],
        "took": [duration((ended - began) / 1000) for began, ended in ms],
    }
    render_table(pa.table(columns), Console(highlight=False))
    return 0


def job_status(arguments: argparse.Namespace) -> int:
    details = jobs_api.find(jobs_api.connect(arguments.address), arguments.id)
    _show_end(details)
    if study := (details.metadata or {}).get("study"):
        Console(highlight=False).print(Text(f"its study is {study}, on the cluster"), soft_wrap=True)
    return 0


def job_logs(arguments: argparse.Namespace) -> int:
    client = jobs_api.connect(arguments.address)
    if arguments.follow:
        return _follow(client, arguments.id, arguments.address)
    print(jobs_api.logs(client, arguments.id), end="")
    return 0


def stop_job(arguments: argparse.Namespace) -> int:
    _show_end(jobs_api.stop(jobs_api.connect(arguments.address), arguments.id))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    found = findings(examine(arguments.address, arguments.storage))
    if arguments.json:
        print(json.dumps([asdict(each) for each in found], indent=2, allow_nan=False))
    else:
        show_findings(found, Console(highlight=False))
    return 1 if any(each.state == "fail" for each in found) else 0


def show_findings(found: Sequence[Finding], console: Console) -> None:
    """A table of findings, one a line however long, each node's under its name; remedies stand below what they are for."""
    for node in dict.fromkeys(each.node for each in found):
        console.print(plain(node, "bold"), soft_wrap=True)
        for each in found:
            if each.node == node:
                console.print(plain(f"  {each.state:4}  {each.check:14}  {each.found}"), soft_wrap=True)
                if each.remedy:
                    console.print(plain(f"        {'to do':14}  {each.remedy}"), soft_wrap=True)
    counts = [sum(each.state == state for each in found) for state in ("ok", "warn", "fail")]
    console.print("{} ok, {} to look at, {} failed".format(*counts))


def cluster_up(arguments: argparse.Namespace) -> int:
    made, console = localcluster.up(arguments.nodes, arguments.cpus, arguments.subnet), Console(highlight=False)
    if made.lacking:
        console.print(Text(f"the nodes share this host's address: {made.lacking}"), soft_wrap=True)
    _show_cluster(made)
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in localcluster.environment().items())
    for line in (f"export {exports}", f"frostline search JOB --address {made.address}"):
        console.print(Text(f"    {line}"), soft_wrap=True)
    return 0


def cluster_status(arguments: argparse.Namespace) -> int:
    if (there := localcluster.current()) is None:
        print("null" if arguments.json else "no cluster is up; `frostline cluster up` starts one")
    elif arguments.json:
        print(json.dumps(_cluster_rows(there), indent=2))
    else:
        _show_cluster(there)
    return 0


def cluster_down(_: argparse.Namespace) -> int:
    gone = localcluster.down()
    print(f"took down {len(gone.nodes)} nodes, the head's included" if gone else "no cluster is up")
    return 0


def cluster_fault(arguments: argparse.Namespace) -> int:
    arguments.fault(arguments.node)
    return 0


def _cluster_rows(there: localcluster.Cluster) -> list[dict[str, str | int]]:
    found = localcluster.states(there)
    return [{"node": n.name, "address": n.address, "cpus": n.cpus, "state": found[n.name]} for n in there.nodes]


def _show_cluster(there: localcluster.Cluster) -> None:
    render_table(pa.Table.from_pylist(_cluster_rows(there)), Console(highlight=False))
