import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import duckdb
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from rich.console import Console

from frostline import results
from frostline.commit import DamagedFile, UnusableRoot, commit_part, write_file
from frostline.results import (
    RECORD,
    SCHEMAS,
    TABLES,
    NotAStudyError,
    QueryError,
    leaderboard,
    query,
    read_asks,
    read_epochs,
    read_extractions,
    read_job,
    read_predictions,
    read_probes,
    read_splits,
    read_trials,
    render,
    table_of,
    to_json,
    write_splits,
)
from frostline.sealed import VERSION, UnknownSchema
from frostline.text import render_table

JOB = {"job": {"name": "digits", "objective": {"metric": "accuracy", "mode": "max"}}, "facts": {"classes": ["0", "1"]}}
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync does cannot be seen without a power cut; the processes that the tests start do it."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def trial(number: int, status: str = "complete", score: float | None = None, **more: Any) -> dict[str, Any]:
    arm = more.get("arm", "depth")
    return {
        "trial_id": f"{arm}-{number:05d}",
        "arm": arm,
        "number": number,
        "round": "search",
        "status": status,
        "val_score": score,
        "strategy": "freeze_depth",
        "config_id": f"c{number}",
        "spec": json.dumps({"config": {"head": {"hidden": 64}}}),
        "freeze_depth": 12,
        "stages": 18,
        "norm": "recalibrate",
        "head_hidden": 256,
        "lr": 3.2e-4,
        "head_lr": 1e-3,
        "epochs": 10,
        "seconds": 12.4,
        "spent_s": 12.0,
        "alone_s": 30.0,
        "trainable_params": 3_412_345,
        "tell_seq": 10 + number,
        **more,
    }


def confirmation(finalist: dict[str, Any], index: int, val: float | None, test: float | None) -> dict[str, Any]:
    status = "failed" if val is None else "complete"
    return finalist | {
        "trial_id": f"{finalist['trial_id']}-c{index}",
        "round": "confirm",
        "status": status,
        "finalist_of": finalist["trial_id"],
        "val_score": val,
        "test_score": test,
        "error_kind": "oom" if val is None else None,
        "reason": "out of memory" if val is None else None,
    }


def make(study: Path, rows: list[dict[str, Any]], part: int = 0, **others: list[dict[str, Any]]) -> Path:
    write_file(study / "job.json", json.dumps(JOB).encode())
    tables = {name: table_of(name, others[name]) for name in TABLES[:-1] if name in others}
    commit_part(study, {**tables, RECORD: table_of(RECORD, rows)}, part)
    return study


def epoch(trial_id: str, number: int, score: float) -> dict[str, Any]:
    return {
        "trial_id": trial_id,
        "epoch": number,
        "phase": 0,
        "seq": number,
        "heard_seq": number,
        "val_score": score,
        "decision": "continue",
    }


A, B, C = trial(0, score=0.90), trial(1, score=0.95), trial(2, score=0.95, arm="probe", head_hidden=0, lr=0.1)
PRUNED = trial(3, "pruned", reason="stopped after epoch 2 of 10", last_score=0.5)
FAILED = trial(4, "failed", error_kind="non_finite", reason="loss is nan", error="Traceback …")
CONFIRMED = [confirmation(B, 0, 0.94, 0.90), confirmation(B, 1, 0.96, 0.92), confirmation(B, 2, None, None)]
ROWS = [A, B, C, PRUNED, FAILED, *CONFIRMED, confirmation(C, 0, 0.97, 0.80)]


EXTRACTION = {
    "cuts": "2,3",
    "means": "1",
    "view": None,
    "images": 1437,
    "bytes": 7_356_672,
    "seconds": 6.5,
    "node": "n1",
    "started_at": NOW,
}


def shown(study: Path, width: int = 100, color: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=color, highlight=False)
    render(study, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


READERS = (read_asks, read_epochs, read_extractions, read_predictions, read_probes, read_trials)


def test_rows_come_back(tmp_path: Path) -> None:
    ask = {"seq": 0, "trial_id": A["trial_id"], "arm": "depth", "number": 0, "batch": 0, "params": "{}"}
    likely = np.array([0.25, 0.75], np.float32)
    prediction = {"trial_id": "x", "sample_id": "img/1.png", "label": 0, "predicted": 1, "probabilities": likely}
    study = make(
        tmp_path,
        [A | {"started_at": NOW, "finished_at": NOW + timedelta(seconds=12)}],
        asks=[ask | {"asked_at": NOW}],
        epochs=[epoch(A["trial_id"], 1, 0.8), epoch(A["trial_id"], 2, 0.9)],
        extractions=[EXTRACTION],
        predictions=[prediction],
    )
    row = read_trials(study).to_pylist()[0]
    assert {key: row[key] for key in A} == A
    assert row["started_at"] == NOW
    assert row["test_score"] is None
    assert read_asks(study).to_pylist() == [ask | {"asked_at": NOW}]
    assert read_epochs(study)["val_score"].to_pylist() == [0.8, 0.9]
    assert read_extractions(study).to_pylist() == [EXTRACTION]
    others = dict.fromkeys(("labels", "value", "predicted_value"))  # of other tasks
    assert read_predictions(study).to_pylist() == [prediction | others | {"probabilities": [0.25, 0.75]}]
    for name, read in zip(TABLES, READERS, strict=True):
        assert read(study).schema.equals(SCHEMAS[name], check_metadata=True)
    assert read_job(study) == JOB


def test_a_study_without_rows_yet(tmp_path: Path) -> None:
    write_file(tmp_path / "job.json", json.dumps(JOB).encode())
    assert read_trials(tmp_path).num_rows == 0
    assert read_epochs(tmp_path).schema == SCHEMAS["epochs"]
    assert "No trial has finished yet." in shown(tmp_path)
    assert to_json(tmp_path)["trials"] == []
    assert query(tmp_path, "SELECT count(*) AS n FROM trials").to_pylist() == [{"n": 0}]


@given(
    st.dictionaries(st.sampled_from(["lr", "val_score", "reason", "epochs"]), st.none(), max_size=4),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_table_of_keeps_every_value(absent: dict[str, None], lr: float, reason: str) -> None:
    row = {"trial_id": "a", "status": "failed", "lr": lr, "reason": reason} | absent
    found = table_of(RECORD, [row])
    assert found.schema.equals(SCHEMAS[RECORD], check_metadata=True)
    kept = {key: value for key, value in found.to_pylist()[0].items() if value is not None}
    assert repr(kept) == repr({key: row[key] for key in SCHEMAS[RECORD].names if row.get(key) is not None})


def test_table_of_refuses_our_own_mistakes() -> None:
    with pytest.raises(AssertionError, match=r"epochs has no columns \['learning_rate'\]"):
        table_of("epochs", [{"trial_id": "a", "learning_rate": 1.0}])
    with pytest.raises(AssertionError, match="running"):
        table_of(RECORD, [{"trial_id": "a", "status": "running"}])
    with pytest.raises(AssertionError, match="only a complete trial has a val_score"):
        table_of(RECORD, [trial(0, "pruned", score=0.5)])


def test_other_readers_see_the_same_rows(tmp_path: Path) -> None:
    study = make(tmp_path, [A, B], epochs=[epoch("a", 1, 0.5)])
    make(study, [C, PRUNED, FAILED], 1, epochs=[epoch("b", n, 0.5) for n in (1, 2, 3)])
    for name, rows in (("trials", 5), ("epochs", 4)):
        pattern = str(study / name / "*.parquet")
        assert duckdb.sql(f"SELECT count(*) FROM '{pattern}'").fetchall() == [(rows,)]
        assert len(pd.read_parquet(study / name)) == rows
        assert pq.read_table(study / name).num_rows == rows
    trials = str(study / "trials" / "*.parquet")
    assert duckdb.sql(f"SELECT spec->>'$.config.head.hidden' FROM '{trials}' LIMIT 1").fetchall() == [("64",)]
    assert pd.read_parquet(study / "trials")["val_score"].max() == 0.95


@pytest.mark.parametrize("version", [1, 2, 6])
def test_a_study_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    """Version 1 had no packs and no extractions, version 2 no probes."""
    other = table_of(RECORD, [A]).replace_schema_metadata({VERSION: str(version).encode()})
    if version == 1:
        other = other.drop_columns(["pack", "lanes", "spent_s", "alone_s"])
    write_file(tmp_path / "job.json", json.dumps(JOB).encode())
    commit_part(tmp_path, {RECORD: other}, 0)
    with pytest.raises(UnknownSchema, match=f"written with schema {version}, and this Frostline reads schema 5"):
        read_trials(tmp_path)


def test_what_is_not_a_study_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "results" / "digits", [A])
    make(tmp_path / "results" / "flowers", [A])
    monkeypatch.chdir(tmp_path)
    for read in (read_trials, read_epochs, read_job, read_splits, to_json):
        with pytest.raises(NotAStudyError) as error:
            read("results/digist")
        assert str(error.value) == (
            "results/digist is not a study: it has no job.json. Did you mean results/digits? "
            "Studies here: results/digits, results/flowers."
        )
    with pytest.raises(NotAStudyError, match="Did you mean results/digits"):
        query(tmp_path / "digits", "SELECT 1")
    monkeypatch.chdir("/")
    with pytest.raises(NotAStudyError, match="`frostline search JOB` makes one"):
        read_trials(tmp_path / "a" / "b")
    with pytest.raises(UnusableRoot):
        read_trials("s3://bucket/study")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(NotAStudyError, match="holds no `job` and `facts`"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text('{"job": {}, "facts": {}, "digesd": "0123456789abcdef"}')
    with pytest.raises(NotAStudyError, match="holds no `job` and `facts`, or more"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text('{"job": {}, "facts": {}, "digest": "0123456789abcdef"}')
    with pytest.raises(DamagedFile, match=r"job\.json is not what was written"):
        read_job(tmp_path)
    (tmp_path / "job.json").write_text('{"job')
    with pytest.raises(DamagedFile, match=r"job\.json is not what was written"):
        read_job(tmp_path)


def test_splits(tmp_path: Path) -> None:
    study = make(tmp_path, [A])
    columns = {"split": ["train", "excluded"], "label": ["cat", None], "sample_id": ["a.png", "b.png"]}
    columns |= {"group_id": pa.nulls(2), "reason": [None, "not an image"]}
    with pytest.raises(DamagedFile, match=r"splits\.parquet is missing"):
        read_splits(study)
    with pytest.raises(AssertionError, match="'extra'"):
        write_splits(study, pa.table({**columns, "extra": [0, 1]}))
    write_splits(study, pa.table(columns))
    assert read_splits(study).schema.equals(SCHEMAS["splits"], check_metadata=True)
    found = query(study, "SELECT sample_id, reason FROM splits WHERE split = 'excluded'")
    assert found.to_pylist() == [{"sample_id": "b.png", "reason": "not an image"}]
    assert pd.read_parquet(study / "splits.parquet")["label"].tolist()[0] == "cat"


def test_the_leaderboard_by_hand() -> None:
    board = leaderboard(table_of(RECORD, ROWS[::-1]), "max")
    assert [row["trial_id"] for row in board.trials] == ["depth-00001", "probe-00002", "depth-00000"]
    probe, depth = board.finalists
    assert (probe["trial_id"], probe["n"], probe["failed"]) == ("probe-00002", 1, 0)
    assert (probe["val_mean"], probe["val_sd"], probe["test_mean"], probe["test_sd"]) == (0.97, None, 0.80, None)
    assert (depth["trial_id"], depth["n"], depth["failed"]) == ("depth-00001", 2, 1)
    assert depth["val_mean"] == pytest.approx(0.95, abs=1e-15)
    assert depth["val_sd"] == pytest.approx(0.02 / 2**0.5, abs=1e-15)
    assert depth["test_mean"] == pytest.approx(0.91, abs=1e-15)
    assert depth["test_sd"] == pytest.approx(0.02 / 2**0.5, abs=1e-15)
    assert (depth["arm"], depth["freeze_depth"], depth["lr"]) == ("depth", 12, 3.2e-4)
    assert board.counts == {
        "search": {"complete": 3, "pruned": 1, "failed": 1},
        "confirm": {"complete": 3, "pruned": 0, "failed": 1},
    }
    assert board.stopped == {
        "non_finite": {"loss is nan": 1},
        "oom": {"out of memory": 1},
        "pruned": {"stopped after epoch 2 of 10": 1},
    }


def test_the_leaderboard_of_a_loss_is_ascending_and_knows_no_nan() -> None:
    rows = [trial(0, score=0.5), trial(1, score=float("nan")), trial(2, score=0.4, seconds=float("inf"))]
    rows += [confirmation(rows[1], 0, None, None)]
    board = leaderboard(table_of(RECORD, rows), "min")
    assert [row["trial_id"] for row in board.trials] == ["depth-00002", "depth-00000", "depth-00001"]
    assert [row["val_score"] for row in board.trials] == [0.4, 0.5, None]
    assert board.trials[0]["seconds"] is None
    assert (board.finalists[0]["n"], board.finalists[0]["failed"], board.finalists[0]["val_mean"]) == (0, 1, None)


def test_to_json_is_json_with_stable_keys(tmp_path: Path) -> None:
    found = to_json(make(tmp_path, [*ROWS, trial(9, score=float("nan"), spent_s=float("nan"))]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == [
        *("study", "name", "metric", "mode", "cost", "probes", "agreement", "finalists", "trials", "counts", "stopped"),
    ]
    assert found["cost"] == {
        "trials_s": 12.0 * len(ROWS),
        "extractions_s": 0.0,
        "alone_s": 30.0 * (len(ROWS) + 1),
        "images_extracted": 0,
    }
    assert to_json(tmp_path) == found


def test_how_well_heads_in_closed_form_foretold_trials_is_told(tmp_path: Path) -> None:
    rows = [trial(number, score=0.5 + number / 10, freeze_depth=3 + number) for number in range(4)]
    probes = [
        {"cut": 3 + number, "stages": 18, "method": "lda", "val_score": 0.9 - number / 10, "seconds": 0.1}
        for number in range(4)
    ]
    study = make(tmp_path, rows, probes=probes)
    (found,) = to_json(study)["agreement"]
    assert (found["by"], found["tau"], found["cuts"]) == ("freeze_depth", pytest.approx(-1), 4)
    assert f"\n{found['text']}\n" in shown(study)
    assert "Kendall's tau -1.00, that of the depth alone 1.00 (4 depths, 4 complete trials" in found["text"]


def test_of_fewer_than_three_depths_nothing_is_foretold(tmp_path: Path) -> None:
    rows = [trial(number, score=0.5 + number / 10, freeze_depth=3 + number % 2) for number in range(4)]
    probes = [{"cut": cut, "stages": 18, "method": "lda", "val_score": cut / 10, "seconds": 0.1} for cut in (3, 4, 5)]
    study = make(tmp_path, rows, probes=probes)
    assert to_json(study)["agreement"] == []
    assert "Kendall" not in shown(study)


def test_extractions_are_part_of_what_a_study_cost(tmp_path: Path) -> None:
    second = EXTRACTION | {"view": 0, "images": 563, "seconds": 3.5}
    study = make(tmp_path, ROWS, extractions=[EXTRACTION, second])
    assert to_json(study)["cost"] == {
        "trials_s": 12.0 * len(ROWS),
        "extractions_s": 10.0,
        "alone_s": 30.0 * len(ROWS),
        "images_extracted": 2000,
    }
    lines = shown(study).splitlines()
    assert "device time: 1 min 58 s, of which 10.0 s for 2,000 samples through frozen stages" in lines
    assert "the trials one by one, nothing stored or shared: about 4 min 30 s" in lines
    views = query(study, "SELECT view, sum(images)::BIGINT AS images FROM extractions GROUP BY 1 ORDER BY 1")
    assert views.to_pylist() == [{"view": 0, "images": 563}, {"view": None, "images": 1437}]


def test_queries(tmp_path: Path) -> None:
    study = make(
        tmp_path, [A, B, FAILED | {"started_at": NOW}], epochs=[epoch(A["trial_id"], n, n / 10) for n in (1, 2)]
    )
    best = query(
        study, "SELECT trial_id, max(e.val_score) AS best FROM trials t JOIN epochs e USING (trial_id) GROUP BY 1"
    )
    assert best.to_pylist() == [{"trial_id": "depth-00000", "best": 0.2}]
    assert query(study, "SELECT spec->>'$.config.head.hidden' AS h FROM trials LIMIT 1").to_pylist() == [{"h": "64"}]
    started = query(study, "SELECT started_at, started_at::VARCHAR AS text FROM trials WHERE started_at IS NOT NULL")
    assert started.to_pylist() == [{"started_at": NOW, "text": "2026-01-02 03:04:05.678901+00"}]
    assert query(study, "SELECT count(*) AS n FROM predictions; SELECT 2 AS n").to_pylist() == [{"n": 2}]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT scroe FROM trials", "scroe"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM trails", "trails"),
        ("", "answers nothing"),
        ("DELETE FROM trials", "delete"),
        ("SELECT * FROM read_text('/etc/hostname')", "file system operations are disabled"),
        ("SELECT * FROM '/etc/hostname'", "hostname"),
        ("COPY trials TO '/tmp/frostline-stolen.csv'", "file system operations are disabled"),
        ("ATTACH '/tmp/frostline-stolen.db'", "file system operations are disabled"),
        ("INSTALL httpfs", "disabled by configuration"),
        ("SET enable_external_access = true", "locked"),
        ("SELECT * FROM tables", "tables"),
        ("SELECT * FROM JOB", "JOB"),
        ("SELECT error('[bold]\x1b[31m')", "bold"),
    ],
)
def test_sql_that_fails_teaches(sql: str, message: str, tmp_path: Path) -> None:
    study = make(tmp_path, [A])
    with pytest.raises(QueryError) as error:
        query(study, sql)
    assert message.lower() in str(error.value).lower()
    assert "  trials: trial_id, arm, number, round, status" in str(error.value)
    assert "  epochs: trial_id, epoch" in str(error.value)
    assert not list(Path("/tmp").glob("frostline-stolen*"))


def test_a_query_never_sees_damage(tmp_path: Path) -> None:
    study = make(tmp_path, [A], epochs=[epoch("a", 1, 0.5)])
    path = study / "epochs" / "part-000000.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="epochs"):
        query(study, "SELECT 1")


def test_the_leaderboard_for_people(tmp_path: Path) -> None:
    study = make(tmp_path / "digits", ROWS)
    lines = [line.rstrip() for line in shown(study).splitlines()]
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "head train",
        "# arm trial status depth norm head lr lr val test ep s able",
        "1 probe 00002 finalist 12/18 recal linear 1e-1 1e-3 0.9700 0.800 (1) 10 12 3.4M",
    ]
    lines = lines[1:]
    assert "0.910±0.014 (2)" in lines[2]
    assert [line.split()[:4] for line in lines[3:6]] == [
        ["1", "depth", "00001", "complete"],
        ["2", "probe", "00002", "complete"],
        ["3", "depth", "00000", "complete"],
    ]
    assert lines[6:] == [
        "",
        "search: 3 complete, 1 pruned, 1 failed",
        "confirm: 3 complete, 0 pruned, 1 failed",
        "failed, non_finite: 1, for example: loss is nan (lower the learning rates)",
        "failed, oom: 1, for example: out of memory (lower train.batch_size, or search.lanes, or give a trial more memory)",
        "device time: 1 min 48 s",
        "the trials one by one, nothing stored or shared: about 4 min 30 s",
        f"study: {study}",
        "val, test: accuracy, mean±sd over (n) fresh seeds; finalists are ranked by val",
    ]


def test_the_widest_table_fits_100_columns(tmp_path: Path) -> None:
    arm = "a-very-long-name-of-an-arm-with-sixty-four-characters-in-it-0123"
    wide = trial(99_999, score=0.123456, arm=arm, freeze_depth=64, stages=64, head_hidden=2048, epochs=1000)
    wide |= {"seconds": 86_399.0, "lr": 1.25e-5, "head_lr": 9.9e-5, "trainable_params": 123_456_789}
    confirmed = [confirmation(wide, n, 0.9, 0.1 * n) for n in range(10)]
    lines = shown(make(tmp_path, [wide, *confirmed])).splitlines()
    assert max(map(len, lines[: lines.index("")])) <= 100
    text = "\n".join(lines)
    for whole in (
        "64/64",
        "mlp2048",
        "1.3e-5",
        "0.450±0.303 (10)",
        "1000",
        "86399",
        "123M",
        "finalist",
        "recal",
    ):
        assert whole in text
    folded = "".join(line[2 : line.index(" ", 2)] for line in lines[2 : lines.index("")])
    assert folded == 2 * arm, "a long name is folded, not cut"
    assert shown(tmp_path, width=40).splitlines()[: lines.index("")] == lines[: lines.index("")], "nor is a number"


def test_only_the_first_rows_are_printed(tmp_path: Path) -> None:
    text = shown(make(tmp_path, [trial(n, score=n / 100) for n in range(30)]))
    assert "and 10 more complete trials" in text
    assert "00029" in text
    assert "00009" not in text
    assert "test" not in text.splitlines()[0].split(), "no column without a value in it"


NASTY = "[bold red]x[/bold red] [link=http://e] \x1b[31m\x07\r'; DROP TABLE trials; --"


def test_names_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    rows = [trial(0, score=0.5, arm=NASTY), FAILED | {"arm": NASTY, "error_kind": NASTY, "reason": NASTY}]
    study = make(tmp_path, rows)
    for color in (False, True):
        text = shown(study, width=400, color=color)
        assert "[bold red]x[/bold red] [link=http://e]" in text
        assert "\x1b[31m" not in text
        assert "\x07" not in text
        assert "\r" not in text
    assert query(study, "SELECT DISTINCT arm FROM trials")["arm"].to_pylist() == [NASTY]
    console = Console(file=StringIO(), width=400, force_terminal=True)
    render_table(query(study, 'SELECT arm, 1 AS "[red]\x1b[31m" FROM trials'), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31m" not in text
    assert "[bold red]x" in text


def test_render_table(tmp_path: Path) -> None:
    study = make(tmp_path, [A, B])
    console = Console(file=StringIO(), highlight=False)
    render_table(query(study, "SELECT trial_id, val_score, reason FROM trials ORDER BY 1"), console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [line.split() for line in lines] == [
        ["trial_id", "val_score", "reason"],
        ["depth-00000", "0.9"],
        ["depth-00001", "0.95"],
        ["2", "rows"],
    ]


WRITER = """
import itertools, sys, time
from pathlib import Path
from frostline.commit import commit_part
from frostline.results import RECORD, table_of
study = Path(sys.argv[1])
for part in itertools.takewhile(lambda _: not (study / "stop").exists(), itertools.count()):
    trials = [{"trial_id": f"t-{part}", "status": "complete", "val_score": 0.5, "round": "search"}]
    epochs = [{"trial_id": f"t-{part}", "epoch": n} for n in (1, 2, 3)]
    commit_part(study, {"epochs": table_of("epochs", epochs), RECORD: table_of(RECORD, trials)}, part)
    time.sleep(0.01)
"""


def test_reading_while_another_process_commits(tmp_path: Path) -> None:
    write_file(tmp_path / "job.json", json.dumps(JOB).encode())
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    sql = "SELECT count(DISTINCT trial_id) AS trials, (SELECT count(*) FROM epochs) AS epochs FROM trials"
    seen: list[int] = []
    try:
        while len(set(seen)) < 8:
            assert writer.poll() is None
            counts = query(tmp_path, sql).to_pylist()[0]
            assert counts["epochs"] == 3 * counts["trials"], "a reader sees whole commits"
            assert read_trials(tmp_path).num_rows >= counts["trials"]
            seen.append(counts["trials"])
    finally:
        (tmp_path / "stop").touch()
        writer.wait(timeout=60)
    assert writer.returncode == 0
    assert seen == sorted(seen)
    assert read_epochs(tmp_path).num_rows == 3 * read_trials(tmp_path).num_rows


def test_the_module_stays_light() -> None:
    code = "import sys, frostline.results; print([m for m in ('torch', 'ray', 'optuna', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert results.TABLES[-1] == results.RECORD
