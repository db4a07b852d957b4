"""The command line: `frostline search | plan | probe | submit | jobs | doctor | results | compare | predict | …`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

import frostline
from frostline import bundle_commands, cluster_commands, feature_commands, results
from frostline.commit import StudyBusy
from frostline.credentials import censored
from frostline.ending import leave
from frostline.fixed import fixed_job
from frostline.jobfile import load_job
from frostline.reference import starter_job
from frostline.spec import Job
from frostline.text import complain, plain, render_table

FORMATS = ("safetensors", "timm", "torchvision", "transformers", "torch-export", "onnx")
TRACKERS = ("optuna", "tensorboard", "mlflow", "wandb")
INTERRUPTED = "frostline: interrupted; what had finished is kept, and the same command goes on from there"
OVERRIDE_HELP = "dotted job keys laid over the file, for example train.lr=1e-3 or data.path=photos/"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and answer its exit status: 0 done, 1 failed, 2 a mistake in the input, 130 and 143 interrupted."""
    arguments = _parsed(argv)
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if received:
            # whoever asks twice does not wait for Ray: what is committed stays, and Ray's processes follow this one
            Console(stderr=True).show_cursor()
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C, and may
            signal.signal(number, interrupt)
    if "" not in sys.path:
        sys.path.insert(0, "")  # python:MODULE:FUNCTION backbones lie in the working directory
    try:
        return arguments.run(arguments)
    except (ValueError, ConnectionError, StudyBusy) as error:
        complain(f"frostline: {error}")
        return 2
    except RuntimeError as error:
        if type(error).__module__.partition(".")[0] != "frostline":
            raise
        complain(f"frostline: {error}")
        return 1
    except OSError as error:
        full = "; what is committed stays: make room, and give the same command again"
        complain(f"frostline: {error}{full if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}")
        return 1
    except (KeyboardInterrupt, SystemExit):
        if not received:
            raise  # with a signal behind it, SystemExit is Ray's way to say KeyboardInterrupt
        complain(arguments.interrupted)
        return 128 + received[-1]


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand behind options, where argparse does not look for them."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not ("overrides" in arguments and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {censored(' '.join(rest))}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="frostline",
        description="Search what to freeze, how big a head and which learning rates: transfer learning on Ray.",
    )
    parser.add_argument("--version", action="version", version=f"frostline {frostline.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = _command(commands, "search", _search, "run a search, or go on with one that was interrupted")
    _add_job(search)
    _add_where(search)

    trained = _command(
        commands,
        "train",
        _train,
        "train one configuration, or go on with one that was interrupted; on several workers too",
    )
    trained.add_argument("job", help="a job file (TOML) without arms; with --best, a study's folder")
    trained.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE_HELP)
    trained.add_argument("--best", action="store_true", help="the best configuration that the study has found")
    _add_where(trained)

    _add_job(_command(commands, "plan", _plan, "show what a search would run and cost, before anything is spent"))

    probed = _command(
        commands, "probe", _probe, "say in minutes, without training, where to cut a backbone, and which one to take"
    )
    _add_job(probed)
    probed.add_argument(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME[=WEIGHTS]",
        help="another candidate beside the job's, named as in a job; may be given several times",
    )
    probed.add_argument("--json", action="store_true", help="all scores as JSON")

    _add_submission(commands)

    _add_reading(commands)
    _add_bundles(commands)
    _add_features(commands)
    _add_cluster(commands)
    _command(commands, "schema", _schema, "print the JSON Schema of a job file, for editors")

    init = _command(commands, "init", _init, "write a commented job file to start from")
    init.add_argument("path", nargs="?", default="job.toml", help="where to write it (default: job.toml)")
    return parser


def _add_reading(commands) -> None:
    """`results`, `compare`, `report`, `track` and `fsck`: what is made of a study's rows, and whether they are right."""
    shown = _command(commands, "results", _results, "show a study's leaderboard, or query its tables")
    shown.add_argument("study", help="the study's folder, for example results/quickstart")
    how = shown.add_mutually_exclusive_group()
    how.add_argument(
        "--sql", help="a DuckDB query over the tables trials, epochs, asks, extractions, predictions and splits"
    )
    how.add_argument("--json", action="store_true", help="the leaderboard as JSON")

    compared = _command(commands, "compare", _compare, "compare the arms of studies: which is better, or that none is")
    compared.add_argument(
        "studies", nargs="+", metavar="study", help="a study's folder; of several, arms are matched by name"
    )
    how = compared.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="all of it as JSON, curves and seeds included")
    how.add_argument("--markdown", action="store_true", help="the same tables as Markdown")

    reported = _command(
        commands, "report", _report, "write a study's report: one HTML file that needs nothing beside it"
    )
    reported.add_argument("study", help="the study's folder; it may be running")
    reported.add_argument(
        "--out", metavar="PATH", help="where to write it (default: report.html in the study's folder)"
    )

    tracked = _command(commands, "track", _track, "export a study to Optuna, TensorBoard, MLflow or Weights & Biases")
    tracked.add_argument(
        "study", help="the study's folder; it may be running, and the same command adds what has ended"
    )
    tracked.add_argument(
        "--to",
        required=True,
        choices=TRACKERS,
        help="optuna: a journal for optuna-dashboard; tensorboard: event files; mlflow: a database of SQLite; wandb: offline "
        "runs. The last three need the extra of that name",
    )
    tracked.add_argument(
        "--out", metavar="PATH", help="the file (optuna, mlflow) or folder (default: in the study's folder `tracked`)"
    )

    checked = _command(commands, "fsck", _fsck, "check every file and row of a study, and mend what can be had again")
    checked.add_argument("study", help="the study's folder; it may be running, but not be repaired meanwhile")
    checked.add_argument(
        "--repair",
        action="store_true",
        help="clear up after killed processes, move damaged parts into the study's folder `damaged`, drop damaged checkpoints, "
        "write the report; the same search then runs again what is missing",
    )
    checked.add_argument("--json", action="store_true", help="what was found, and done, as JSON")


def _add_bundles(commands) -> None:
    """`predict`, `export` and `serve`."""
    predicted = _command(
        commands,
        "predict",
        bundle_commands.predict,
        "predict all images or texts of a folder or table with a bundle, into Parquet",
    )
    predicted.add_argument("bundle", help="the bundle's folder, for example results/quickstart/bundle")
    predicted.add_argument(
        "data",
        help="an image folder, one image, Parquet, a table of texts, or what else a job's data.path takes; local or a URI",
    )
    predicted.add_argument(
        "overrides", nargs="*", metavar="key=value", help="how the data is read, for example data.image_column=photo"
    )
    predicted.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a folder for the predictions; again, it goes on with what is missing",
    )
    predicted.add_argument("--split", choices=("train", "val", "test"), help="only the samples of this split")
    predicted.add_argument("--features", action="store_true", help="keep the features that the head is given, too")
    predicted.add_argument(
        "--batch", type=int, metavar="N", help="samples a pass (default: 64; on a GPU by its memory)"
    )
    predicted.add_argument(
        "--address", help="a running Ray cluster, 'auto' on one of its nodes; else a local Ray where that pays"
    )
    _add_open(predicted)

    exported = _command(commands, "export", bundle_commands.export, "write a bundle for another library, or whole")
    exported.add_argument("bundle", help="the bundle's folder")
    what = exported.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--full", action="store_true", help="a bundle with all tensors, which needs no backbone's weights"
    )
    what.add_argument("--to", choices=FORMATS, help="the library or format; onnx needs the extra of that name")
    exported.add_argument("--out", metavar="PATH", help="the folder to write (default: beside the bundle)")

    what = "answer images and texts over HTTP with bundles, on Ray Serve"
    served = _command(commands, "serve", bundle_commands.serve, what)
    bundle_commands.serve_arguments(served)
    _add_open(served)


def _add_features(commands) -> None:
    stored = commands.add_parser(
        "features", help="list, verify or clean a feature store", description="List, verify or clean a feature store."
    )
    whats = stored.add_subparsers(required=True, metavar="WHAT")
    _add_root(
        _command(whats, "list", feature_commands.list_features, "show what is stored, the least recently used first")
    )
    _add_root(
        _command(whats, "verify", feature_commands.verify_features, "read every byte of it, and show what is damaged")
    )
    clean = _command(whats, "clean", feature_commands.clean_features, "delete what no search is using")
    _add_root(clean)
    clean.add_argument(
        "--unused-days", type=_days, default=0.0, metavar="N", help="only what was not used for N days (default: 0)"
    )


def _add_submission(commands) -> None:
    """`submit`, `jobs` and `doctor`."""
    submitted = _command(
        commands, "submit", cluster_commands.submit, "run a search on a cluster elsewhere, through Ray's Jobs API"
    )
    _add_job(submitted)
    _add_dashboard(submitted)
    _add_open(submitted)
    how = submitted.add_mutually_exclusive_group()
    how.add_argument("--no-wait", action="store_true", help="do not follow the job's logs until it has ended")
    how.add_argument(
        "--dry-run", action="store_true", help="pack it, and print the `ray job submit` that would do the same"
    )

    jobs = commands.add_parser(
        "jobs", help="list, follow or stop submitted jobs", description="List, follow or stop submitted jobs."
    )
    whats = jobs.add_subparsers(required=True, metavar="WHAT")
    _add_dashboard(_command(whats, "list", cluster_commands.list_jobs, "show all submitted jobs, the latest first"))
    for name, run, summary in (
        ("status", cluster_commands.job_status, "show how a job stands"),
        ("logs", cluster_commands.job_logs, "print what a job has written"),
        ("stop", cluster_commands.stop_job, "end a job; what its search had committed is kept"),
    ):
        parser = _command(whats, name, run, summary)
        parser.add_argument("id", help="as `submit` has printed it and `jobs list` shows it")
        _add_dashboard(parser)
        if name == "logs":
            parser.add_argument("--follow", action="store_true", help="go on until the job has ended")

    examined = _command(
        commands,
        "doctor",
        cluster_commands.doctor,
        "check whether this machine, or each node of a cluster, is fit to search",
    )
    examined.add_argument(
        "--address", help="a running Ray cluster, 'auto' on one of its nodes; else this machine alone"
    )
    examined.add_argument(
        "--storage", metavar="PATH", help="a folder that all nodes should see, for example that of a job's results"
    )
    examined.add_argument("--json", action="store_true", help="the findings as JSON")


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", required=True, help="the dashboard of the cluster's head, http://HEAD:8265")


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
    parser.set_defaults(run=run, interrupted=INTERRUPTED)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", help="a job file (TOML); `frostline init` writes one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE_HELP)


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--address", help="a running Ray cluster, 'auto' on one of its nodes; else a local Ray is started"
    )
    where.add_argument("--inline", action="store_true", help="run in this process, without Ray, for debugging")
    _add_open(parser)


def _add_open(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-open-cluster",
        action="store_true",
        help="use a cluster even if it lets in whoever reaches it, and runs what they send",
    )


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root",
        nargs="?",
        default="results/features",
        help="the store: a folder, or a URI as in a job's features.path (default: results/features)",
    )


def _add_cluster(commands) -> None:
    what = "start, look at and take down a Ray cluster of several nodes on this host, for trying things out"
    parser = commands.add_parser("cluster", help=what, description=what[:1].upper() + what[1:] + ".")
    whats = parser.add_subparsers(required=True, metavar="WHAT")
    started = _command(
        whats,
        "up",
        cluster_commands.cluster_up,
        "start one; as root on Linux each node has an address of its own, elsewhere a port",
    )
    started.add_argument("--nodes", type=int, default=3, metavar="N", help="nodes beside the head (default: 3)")
    started.add_argument("--cpus", type=int, metavar="N", help="CPUs a node (default: this host's, divided)")
    started.add_argument(
        "--subnet", metavar="A.B.C.0/24", help="where the addresses are (default: the first free of 10.87.0.0/24, …)"
    )
    shown = _command(
        whats, "status", cluster_commands.cluster_status, "show its nodes: address, CPUs, alive, dead, cut off or lost"
    )
    shown.add_argument("--json", action="store_true", help="the same as JSON")
    _command(whats, "down", cluster_commands.cluster_down, "take it down, whole or half-made; nothing of it is left")
    for name, (fault, summary) in cluster_commands.FAULTS.items():
        _command(whats, name, cluster_commands.cluster_fault, summary).add_argument(
            "node", help="its name, as `status` shows it"
        )
        whats.choices[name].set_defaults(fault=fault)


def _search(arguments: argparse.Namespace) -> int:
    job = load_job(arguments.job, arguments.overrides)
    _show_end(frostline.search(job, **_where(arguments)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    read = frostline.best_job if arguments.best else load_job
    job = read(arguments.job, arguments.overrides)
    _show_end(folder := frostline.train(job, **_where(arguments)))
    _stdout().print(Text(f"bundle: {folder / 'bundle'}"), soft_wrap=True)
    return 0


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("inline", "address", "allow_open_cluster")}


def _show_end(study: Path) -> None:
    console = _stdout()
    results.render(study, console)
    if (report := study / "report.html").is_file():
        console.print(Text(f"report: {report}"), soft_wrap=True)


def _plan(arguments: argparse.Namespace) -> int:
    from frostline.plan import render_plan

    job = load_job(arguments.job, arguments.overrides)
    render_plan(job if job.arms else fixed_job(job), _stdout())
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from frostline.probe_text import render_probed, to_json

    found = frostline.probe(arguments.job, arguments.overrides, backbones=arguments.backbone)
    if arguments.json:
        print(json.dumps(to_json(found), indent=2, allow_nan=False))
    else:
        render_probed(found, _stdout())
    return 0


def _results(arguments: argparse.Namespace) -> int:
    study = Path(arguments.study)
    if arguments.sql:
        render_table(results.query(study, arguments.sql), _stdout())
    elif arguments.json:
        print(json.dumps(results.to_json(study), indent=2, allow_nan=False))
    else:
        results.render(study, _stdout())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from frostline.compare_text import markdown, render
    from frostline.comparison import compare

    found = compare(arguments.studies)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, allow_nan=False))
    elif arguments.markdown:
        print(markdown(found))
    else:
        render(found, _stdout())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from frostline.report import write_report

    print(write_report(arguments.study, Path(arguments.out) if arguments.out else None))
    return 0


def _track(arguments: argparse.Namespace) -> int:
    from frostline.track import track

    done = track(arguments.study, arguments.to, Path(arguments.out) if arguments.out else None)
    console = _stdout()
    for line in (f"{done.path}: {done.wrote}", f"open it with: {done.opened}"):
        console.print(Text(line), soft_wrap=True)
    return 0


def _fsck(arguments: argparse.Namespace) -> int:
    from frostline.fsck import examine, lines, repair

    done, found = repair(arguments.study) if arguments.repair else ([], examine(arguments.study))
    if arguments.json:
        print(json.dumps({"study": arguments.study, "done": done, **asdict(found)}, indent=2))
    else:
        for line in [*done, *lines(found)]:
            _stdout().print(plain(line), soft_wrap=True)
    return 0 if found.sound(repaired=arguments.repair) else 1


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (days := float(text)) < math.inf:
            return days
    raise argparse.ArgumentTypeError(f"{text!r} is no number of days; give 0 or more")


def _schema(_: argparse.Namespace) -> int:
    print(json.dumps(Job.model_json_schema(), indent=2))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_job(path.stem))
    except FileExistsError:
        raise ValueError(f"{path} exists; name another file: frostline init OTHER.toml") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    print(f"wrote {path}; next: frostline plan {path}")
    return 0


def _stdout() -> Console:
    return Console(highlight=False)


if __name__ == "__main__":
    leave(main())
