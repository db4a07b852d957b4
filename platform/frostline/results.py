"""A study's rows: the schemas of its tables, reading them, the leaderboard, and SQL.

A study is a folder: job.json (the job, and the facts that it was resolved with), splits.parquet, and one folder of numbered
Parquet parts for each of asks, epochs, extractions, predictions, probes and trials. A part counts once its trials are there. Everything here may
be called while the study is being written; a reader sees whole commits only.
"""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from frostline.commit import DamagedFile, committed_parts, load_table, local_folder, read_table, write_table
from frostline.failures import KINDS
from frostline.models import digest
from frostline.sealed import VERSION
from frostline.spec import Metric, Mode, Objective
from frostline.text import count, duration, plain, print_whole, short

_TYPES = {
    "text": pa.string(),
    "json": pa.string(),  # as plain text it opens everywhere, and DuckDB's ->> reads it all the same
    "time": pa.timestamp("us", tz="UTC"),
    "floats": pa.list_(pa.float32()),
    "ints": pa.list_(pa.int32()),
}


def _schema(columns: str) -> pa.Schema:
    """A schema from lines of a type and the columns that have it, in order."""
    lines = [line.split() for line in columns.strip().splitlines()]
    fields = [(name, _TYPES.get(kind) or pa.type_for_alias(kind)) for kind, *names in lines for name in names]
    return pa.schema(fields, {VERSION: b"5"})


SCHEMAS = {
    "asks": _schema("""
        int64   seq
        text    trial_id arm
        int32   number batch
        json    params
        time    asked_at
    """),
    "epochs": _schema("""
        text    trial_id
        int32   epoch
        int8    phase
        int64   seq heard_seq
        float64 train_loss val_loss val_score val_accuracy val_balanced_accuracy val_macro_f1
        float64 val_micro_f1 val_exact_match val_rmse val_mae val_r2 lr head_lr seconds
        int64   images
        text    decision
    """),
    "extractions": _schema("""
        text    cuts means
        int32   view
        int64   images bytes
        float64 seconds
        text    node
        time    started_at
    """),
    "predictions": _schema("""
        text    trial_id sample_id
        int32   label predicted
        ints    labels
        float64 value predicted_value
        floats  probabilities
    """),
    "probes": _schema("""
        int32   cut stages
        text    method
        int32   features
        int64   n_train n_val
        float64 strength val_score val_nll val_accuracy val_balanced_accuracy val_macro_f1
        float64 val_micro_f1 val_exact_match val_rmse val_mae val_r2 seconds
        text    reason
    """),
    "trials": _schema("""
        text    trial_id arm
        int32   number
        text    round status error_kind reason error strategy config_id
        json    spec
        int64   seed
        json    seeds
        text    finalist_of
        int32   freeze_depth
        float64 freeze_fraction
        int32   stages
        text    stages_hash norm
        int32   head_depth head_hidden
        float64 head_dropout
        text    head_init optimizer
        float64 lr head_lr layer_decay weight_decay
        int32   batch_size epochs epochs_asked
        float64 val_score last_score best_epoch_score
        int32   best_epoch
        float64 val_nll test_score test_nll test_accuracy test_balanced_accuracy test_macro_f1 test_auroc test_top5_accuracy test_ece test_brier
        float64 test_micro_f1 test_exact_match test_average_precision test_rmse test_mae test_r2 test_spearman
        int64   n_train n_val n_test
        float64 seconds spent_s alone_s seconds_data seconds_setup seconds_train seconds_eval
        int64   images_forward images_backward
        float64 peak_mib
        int64   trainable_params total_params stored_bytes
        text    inputs pack
        int32   lanes
        text    views audit
        json    applied_lrs
        text    device precision
        int32   threads workers
        text    node hardware
        json    versions
        text    data_hash split_hash weights_hash
        time    started_at finished_at
        int64   ask_seq tell_seq
    """),
    "splits": _schema("""
        text    sample_id label group_id split reason
    """),
}
"""Table -> its columns, the one place where they are defined. One may be added, and is null in rows from before it; the version
rises when a column goes, or means something else."""

RECORD = "trials"
TABLES = ("asks", "epochs", "extractions", "predictions", "probes", RECORD)
"""The tables of a commit, in its order: the record is last."""

STATUSES: tuple[str, ...] = ("complete", "pruned", "failed")
FIXED_FACTS = ("classes", "data_hash", "split_hash", "stages_hash", "weights_hash")
"""The facts in job.json that a study keeps for life."""
_FACTS = {
    int: ("n_train", "n_val", "n_test", "excluded", "feature_dim"),
    list: ("classes", "stages"),
    str: ("data_hash", "split_hash", "stages_hash", "weights_hash", "hardware"),
}
"""What facts are, those that a study has."""

_CONFIG = (
    *("strategy", "config_id", "freeze_depth", "stages", "norm", "head_depth", "head_hidden", "head_dropout"),
    *("head_init", "optimizer", "lr", "head_lr", "layer_decay", "weight_decay", "batch_size"),
    *("inputs", "trainable_params", "total_params"),
)


class NotAStudyError(ValueError):
    """A folder that holds no study."""


def foreign(path: str | Path, error: Exception, todo: str) -> NotAStudyError:
    """What is to be said of a job.json in which a reader found this error."""
    problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return NotAStudyError(
        f"{path} was not written by a search of this version of Frostline ({problem}); {todo} with the version that wrote it"
    )


class QueryError(ValueError):
    """SQL that DuckDB refuses; the text names the tables and their columns."""


@dataclass(frozen=True)
class Leaderboard:
    """Who leads, as JSON values. A score that is missing or not finite is None."""

    finalists: list[dict[str, Any]]
    """By mean validation score (never by test): trial_id, arm, configuration, n, failed, and mean and sd (n - 1; None
    below two) over the n complete confirmations of val_score and test_score, mean seconds and epochs."""
    trials: list[dict[str, Any]]
    """Complete search trials by val_score; ties in the order in which they finished."""
    counts: dict[str, dict[str, int]]
    """Round -> status -> trials."""
    stopped: dict[str, dict[str, int]]
    """`pruned`, or the kind of a failure -> reason -> trials, of both rounds, the most frequent first."""


def table_of(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of the study; columns that a row leaves out are null."""
    schema = SCHEMAS[name]
    for row in rows:
        assert row.keys() <= set(schema.names), f"{name} has no columns {sorted(row.keys() - set(schema.names))}"
        if name == RECORD:
            assert row["status"] in STATUSES, row["status"]
            assert row["status"] == "complete" or row.get("val_score") is None, "only a complete trial has a val_score"
    return pa.Table.from_pylist([dict(row) for row in rows], schema)


def read_trials(study: str | Path) -> pa.Table:
    """One row a finished trial, no rows before the first. Raises NotAStudyError, DamagedFile, UnknownSchema, as all readers."""
    return _read(study, "trials")


def read_epochs(study: str | Path) -> pa.Table:
    """One row an epoch of a finished trial."""
    return _read(study, "epochs")


def read_predictions(study: str | Path) -> pa.Table:
    """One row a test sample and complete confirmation."""
    return _read(study, "predictions")


def prediction_parts(study: str | Path) -> Iterator[pa.Table]:
    """The predictions, a commit at a time: of large test sets with many classes, all do not fit in memory."""
    folder = _folder(study)
    for part in committed_parts(folder, RECORD):
        yield read_table(folder, "predictions", RECORD, SCHEMAS["predictions"], [part])


def read_asks(study: str | Path) -> pa.Table:
    """One row a proposal of a sampler, also of trials that never finished."""
    return _read(study, "asks")


def read_extractions(study: str | Path) -> pa.Table:
    """One row a pass that put activations into the feature store."""
    return _read(study, "extractions")


def read_probes(study: str | Path) -> pa.Table:
    """One row a head in closed form, of a cut and a method, from before the search."""
    return _read(study, "probes")


def write_splits(study: Path, splits: pa.Table) -> None:
    """Record which sample is in which split, and what was excluded for which reason."""
    schema = SCHEMAS["splits"]
    assert set(splits.column_names) == set(schema.names), splits.column_names
    write_table(study / "splits.parquet", splits.select(schema.names).cast(schema))


def read_splits(study: str | Path) -> pa.Table:
    """What `write_splits` recorded."""
    return load_table(_folder(study) / "splits.parquet", SCHEMAS["splits"])


def read_job(study: str | Path) -> dict[str, Any]:
    """job.json: `job`, resolved, and `facts`, verified by their digest."""
    path = _folder(study) / "job.json"
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not what was written ({error}). Put it back from a copy") from None
    known = isinstance(record, dict) and {*record} - {"digest"} == {"job", "facts"}
    if not (known and isinstance(record["job"], dict) and isinstance(record["facts"], dict)):
        raise NotAStudyError(f"{path} was not written by Frostline: it holds no `job` and `facts`, or more")
    if record.pop("digest", None) not in (None, digest(record)):  # a study of an earlier version has none
        raise DamagedFile(f"{path} is not what was written. Put it back from a copy")
    facts = record["facts"]
    wrong = [key for kind, keys in _FACTS.items() for key in keys if not isinstance(facts.get(key, kind()), kind)]
    if wrong or not all(isinstance(name, str) for key in _FACTS[list] for name in facts.get(key, ())):
        raise NotAStudyError(
            f"{path} was not written by Frostline: facts that are something else: {wrong or _FACTS[list]}"
        )
    return record


def objective_of(study: str | Path, job: Mapping[str, Any]) -> tuple[Metric, Mode]:
    """What a recorded job searches for, and which of two scores is better. Raises NotAStudyError."""
    try:
        objective = Objective.model_validate(job["objective"])
    except (KeyError, ValueError) as error:
        raise foreign(Path(study) / "job.json", error, "read it") from None
    return objective.metric, objective.mode or "max"


def leaderboard(trials: pa.Table, mode: Mode) -> Leaderboard:
    """Finalists and search trials, best first, from `read_trials`; `max` or `min` says which score is better."""
    columns = ["trial_id", "arm", "round", "status", "error_kind", "reason", "finalist_of", "val_score", "test_score"]
    rows = [
        {key: _finite(value) for key, value in row.items()}
        for row in trials.select(
            [*columns, "epochs", "seconds", "spent_s", "alone_s", "tell_seq", *_CONFIG]
        ).to_pylist()
    ]
    confirmed: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(STATUSES, 0) for name in ("search", "confirm")}
    stopped: dict[str, Counter[str]] = {}
    for row in rows:
        counts[row["round"]][row["status"]] += 1
        if row["round"] == "confirm":
            confirmed.setdefault(row["finalist_of"], []).append(row)
        if row["status"] != "complete":
            kind = "pruned" if row["status"] == "pruned" else row["error_kind"] or "unknown"
            stopped.setdefault(kind, Counter())[row["reason"] or "no reason given"] += 1
    complete = [row for row in rows if row["round"] == "search" and row["status"] == "complete"]
    complete.sort(key=lambda row: row["tell_seq"] or 0)
    shown = ["trial_id", "arm", "val_score", "epochs", "seconds", "spent_s", "alone_s", *_CONFIG]
    return Leaderboard(
        finalists=_ranked([_finalist(trial_id, seeds) for trial_id, seeds in confirmed.items()], "val_mean", mode),
        trials=_ranked([{key: row[key] for key in shown} for row in complete], "val_score", mode),
        counts=counts,
        stopped={kind: dict(reasons.most_common()) for kind, reasons in sorted(stopped.items())},
    )


def query(study: str | Path, sql: str) -> pa.Table:
    """The answer to a DuckDB query over trials, epochs, extractions, predictions, probes, asks and splits, all as of one commit.

    The rows are verified before DuckDB sees them, and it sees nothing else: no files, no network. Raises QueryError.
    """
    folder = _folder(study)
    parts = committed_parts(folder, RECORD)
    tables = {name: read_table(folder, name, RECORD, SCHEMAS[name], parts) for name in TABLES}
    if (folder / "splits.parquet").exists():
        tables["splits"] = read_splits(folder)
    with duckdb.connect(":memory:") as connection:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET TimeZone = 'UTC'; SET enable_external_access = false; SET lock_configuration = true")
        try:
            answer = connection.sql(sql)
            if answer is not None:
                return answer.to_arrow_table()
            problem = "this statement answers nothing; write a SELECT"
        except duckdb.Error as error:
            problem = str(error).strip()
    columns = "\n".join(f"  {name}: {', '.join(table.column_names)}" for name, table in tables.items())
    raise QueryError(f"{problem}\nThe tables of {folder}, and their columns:\n{columns}")


def to_json(study: str | Path) -> dict[str, Any]:
    """The leaderboard and what it is about, as JSON values."""
    job, trials, probes = read_job(study)["job"], read_trials(study), read_probes(study).to_pylist()
    metric, mode = objective_of(study, job)
    return {
        "study": str(study),
        "name": job.get("name"),
        "metric": metric,
        "mode": mode,
        "cost": _cost(trials, read_extractions(study)),
        "probes": probes,
        "agreement": agreement(probes, trials, mode),
        **asdict(leaderboard(trials, mode)),
    }


def agreement(probes: Sequence[Mapping[str, Any]], trials: pa.Table, mode: Mode) -> list[dict[str, Any]]:
    """How well heads in closed form foretold what training reached: `agreement.Agreement` as JSON values, and its `text`."""
    if not probes:
        return []
    from frostline.agreement import agreements, told  # SciPy takes a moment to import

    columns = ["round", "val_score", "freeze_depth", "head_depth", "stages"]
    found = agreements(probes, trials.select(columns).to_pylist(), mode)
    return [asdict(each) | {"text": told(each)} for each in found]


def render(study: str | Path, console: Console, rows: int = 20) -> None:
    """Print the leaderboard, at most `rows` search trials, and a summary; 100 columns suffice."""
    found = to_json(study)
    trials, metric = found["trials"][:rows], found["metric"]
    lines = [_line(rank, row, "finalist") for rank, row in enumerate(found["finalists"], 1)]
    lines += [_line(rank, row, "complete") for rank, row in enumerate(trials, 1)]
    if lines:
        left = ("arm", "trial", "status", "norm", "head")
        hidden = {"test"} if not found["finalists"] else set()
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name in [name for name in lines[0] if name not in hidden]:
            align, fold = ("left" if name in left else "right"), name in ("arm", "trial")
            table.add_column(name, justify=align, no_wrap=not fold, overflow="fold", min_width=5 if fold else None)
        for line in lines:
            table.add_row(*(plain(value) for name, value in line.items() if name not in hidden))
        print_whole(table, console)  # squeezed, a number reads as another number
    if len(found["trials"]) > rows:
        console.print(plain(f"… and {len(found['trials']) - rows} more complete trials"))
    console.print()
    for line in _summary(found, Path(study)):
        console.print(plain(line), soft_wrap=True)
    if found["finalists"]:
        console.print(plain(f"val, test: {metric}, mean±sd over (n) fresh seeds; finalists are ranked by val"))


def _folder(study: str | Path) -> Path:
    folder = local_folder(study)
    if (folder / "job.json").is_file():
        return folder
    known = sorted({path.parent for root in (folder.parent, Path("results")) for path in root.glob("*/job.json")})
    near = difflib.get_close_matches(folder.name, [path.name for path in known], 1)
    guess = next((f" Did you mean {path}?" for path in known if [path.name] == near), "")
    there = f" Studies here: {', '.join(map(str, known[:20]))}." if known else " `frostline search JOB` makes one."
    raise NotAStudyError(f"{folder} is not a study: it has no job.json.{guess}{there}")


def _read(study: str | Path, table: str) -> pa.Table:
    return read_table(_folder(study), table, RECORD, SCHEMAS[table])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ranked(rows: list[dict[str, Any]], key: str, mode: Mode) -> list[dict[str, Any]]:
    """Best first, rows without a score last, ties as they were."""
    sign = -1 if mode == "max" else 1
    return sorted(rows, key=lambda row: math.inf if row[key] is None else sign * row[key])


def _finalist(trial_id: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    complete = [row for row in seeds if row["status"] == "complete"]
    val, test = ([row[key] for row in complete if row[key] is not None] for key in ("val_score", "test_score"))
    return {
        "trial_id": trial_id,
        "arm": seeds[0]["arm"],
        "n": len(complete),
        "failed": len(seeds) - len(complete),
        "val_mean": _mean(val),
        "val_sd": statistics.stdev(val) if len(val) > 1 else None,
        "test_mean": _mean(test),
        "test_sd": statistics.stdev(test) if len(test) > 1 else None,
        "epochs": _mean([row["epochs"] for row in complete]),
        "seconds": _mean([row["seconds"] for row in complete]),
        **{key: (complete or seeds)[0][key] for key in _CONFIG},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _cost(trials: pa.Table, extractions: pa.Table) -> dict[str, float]:
    """Seconds of device time: what the trials took, what extractions took for all of them, and what the trials would have
    taken one by one with nothing stored and nothing shared; and the images that the extractions passed."""
    spent, alone, made = (
        math.fsum(value for value in table[name].to_pylist() if _finite(value) is not None)
        for table, name in ((trials, "spent_s"), (trials, "alone_s"), (extractions, "seconds"))
    )
    images = sum(extractions["images"].to_pylist())
    return {"trials_s": spent, "extractions_s": made, "alone_s": alone, "images_extracted": images}


def _line(rank: int, row: Mapping[str, Any], status: str) -> dict[str, str]:
    """One line of the table: heading -> text."""
    hidden, depth, stages = row["head_hidden"], row["freeze_depth"], row["stages"]
    at = f"@{row['head_depth']}" if (row["head_depth"] or stages) != stages else ""
    test = "" if row.get("test_mean") is None else f"{row['test_mean']:.3f}"
    if row.get("test_sd") is not None:
        test += f"±{row['test_sd']:.3f}"
    return {
        "#": str(rank),
        "arm": row["arm"],
        "trial": row["trial_id"].removeprefix(f"{row['arm']}-"),
        "status": status,
        "depth": "" if depth is None else f"{depth}/{stages}",
        "norm": (row["norm"] or "").removesuffix("ibrate"),
        "head": "" if hidden is None else f"{f'mlp{hidden}' if hidden else 'linear'}{at}",
        "lr": short(row["lr"]),
        "head\nlr": short(row["head_lr"]),
        "val": "" if (val := row.get("val_score", row.get("val_mean"))) is None else f"{val:.4f}",
        "test": f"{test} ({row['n']})" if status == "finalist" else "",
        "ep": "" if row["epochs"] is None else f"{row['epochs']:.0f}",
        "s": "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        "train\nable": count(row["trainable_params"]),
    }


def _summary(found: Mapping[str, Any], study: Path) -> Iterable[str]:
    search, confirm = found["counts"]["search"], found["counts"]["confirm"]
    if not any((*search.values(), *confirm.values())):
        yield "No trial has finished yet."
    if any(search.values()):
        yield "search: " + ", ".join(f"{n} {status}" for status, n in search.items())
    if any(confirm.values()):
        yield "confirm: " + ", ".join(f"{n} {status}" for status, n in confirm.items())
    for kind, reasons in found["stopped"].items():
        if kind != "pruned":
            said = f"failed, {kind}: {sum(reasons.values())}, for example: {next(iter(reasons))}"
            yield f"{said} ({KINDS[kind].remedy})" if kind in KINDS else said
    yield from _closed_form(found["probes"], found["mode"])
    yield from (each["text"] for each in found["agreement"])
    cost = found["cost"]
    spent = f"device time: {duration(cost['trials_s'] + cost['extractions_s'])}"
    if cost["images_extracted"]:
        spent += f", of which {duration(cost['extractions_s'])} for {cost['images_extracted']:,} samples through frozen stages"
    yield spent
    yield f"the trials one by one, nothing stored or shared: about {duration(cost['alone_s'])}"
    yield f"study: {study}"


def _closed_form(probes: Sequence[Mapping[str, Any]], mode: Mode) -> Iterable[str]:
    """What the best head without training reached, and where; and at the last cut, if that is another."""
    scored = _ranked([dict(row) for row in probes if row["val_score"] is not None], "val_score", mode)
    if not scored:
        return
    best, last = scored[0], max(row["cut"] for row in scored)
    said = [best, *[row for row in scored if row["cut"] == last != best["cut"]][:1]]
    told = ", ".join(f"{row['val_score']:.4f} at cut {row['cut']} of {row['stages']} ({row['method']})" for row in said)
    yield f"heads in closed form, on val: {told}; {duration(math.fsum(row['seconds'] for row in probes))}"
