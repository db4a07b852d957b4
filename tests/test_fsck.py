"""A study's folder is checked to the last bit, and what can be had again is mended: then the same search completes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import frostline
from frostline import ledger, results
from frostline.cli import main
from frostline.commit import Lease, StudyBusy, commit_of, commit_part, committed_parts, read_table
from frostline.fsck import ASIDE, Found, examine, lines, repair
from frostline.results import RECORD, TABLES, table_of
from frostline.spec import Job
from frostline.study import Study
from frostline.testing import toy_job

OPTIONS = [
    "search.trials=5",
    "search.startup_trials=2",
    "search.pruner.kind=none",
    "confirm.seeds=2",
    "features.cache=all",
]


def job_of(folder: Path) -> Job:
    """A search of seconds, its features beside it."""
    return toy_job(folder, [*OPTIONS, f"features.path={folder.parent / 'features'}"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was searched to its end, with a part for each commit."""
    folder = tmp_path_factory.mktemp("made") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "COMMIT_SECONDS", 0.0)
        frostline.search(job_of(folder), inline=True)
    assert len(committed_parts(folder, RECORD)) > 3
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "study")


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file, its content and time."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rows_of(folder: Path) -> dict[str, Any]:
    """Trial -> what of its row does not depend on the clock."""
    rows = results.read_trials(folder).to_pylist()
    found = {row["trial_id"]: (row["config_id"], row["seed"], row["val_score"], row["test_score"]) for row in rows}
    assert len(found) == len(rows), "each row once"
    return found


def only(found: Found) -> Any:
    (problem,) = found.problems
    return problem


def test_a_study_that_is_as_it_was_written_has_no_problems_and_is_not_touched(made: Path) -> None:
    before = state(made)
    found = examine(made)
    assert found.problems == []
    rows = sum(results._read(made, table).num_rows for table in TABLES) + results.read_splits(made).num_rows
    assert found.rows == rows > 100
    files = [path for path in made.rglob("*") if path.is_file() and path.name != "lease.json"]
    assert found.files == len(files)
    assert list(lines(found)) == [f"0 problems in {len(files):,} files, {rows:,} rows"]
    assert state(made) == before


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ("asks", 0),
        ("predictions", -1),
        pytest.param(RECORD, 0, marks=pytest.mark.slow),
        pytest.param("epochs", 1, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_part_is_moved_aside_and_its_trials_run_again(study: Path, table: str, place: int) -> None:
    """With the first part go asks of trials in others, which these recall; nothing else runs again."""
    before, numbers = rows_of(study), committed_parts(study, RECORD)
    part = committed_parts(study, table)[place]
    file = f"{table}/part-{part:06d}.parquet"
    own = set(read_table(study, RECORD, RECORD, results.SCHEMAS[RECORD], [part])["trial_id"].to_pylist())
    flip(study / file)
    (problem,) = [each for each in examine(study).problems if each.repair != "search"]
    assert (problem.file, problem.repair, problem.part) == (file, "aside", part)
    assert "is not what was written" in problem.what
    done, after = repair(study)
    assert after.sound(repaired=True)
    assert committed_parts(study, RECORD) == [number for number in numbers if number != part]
    assert {path.name for path in (study / ASIDE).rglob("*.parquet")} == {Path(file).name}
    assert f"{file}: moved to damaged/" in "\n".join(done)
    assert rows_of(study) == {trial_id: row for trial_id, row in before.items() if trial_id not in own}
    ran: list[str] = []
    finish = Study._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "_finish", lambda self, *trial: (ran.append(trial[0]), finish(self, *trial)))
        frostline.search(job_of(study), inline=True)
    assert {*ran} == own
    assert rows_of(study) == before, "to the bit"
    asks = results.read_asks(study)["trial_id"].to_pylist()
    assert len(asks) == len({*asks}) == 5
    assert examine(study).problems == []


def test_what_killed_processes_left_is_cleared_up(study: Path) -> None:
    """Of a commit that was not yet in place nothing is lost."""
    before, part = rows_of(study), committed_parts(study, "epochs")[-1]
    token, _ = commit_of(study / RECORD / f"part-{part:06d}.parquet")
    final = study / "epochs" / f"part-{part:06d}.parquet"
    final.rename(final.with_name(f".tmp-{final.name}-{token}"))
    (study / ".tmp-job.json-0123456789ab").write_bytes(b"{")
    (study / "bundle").rename(study / ".old-bundle-frostline")
    (study / "asks" / ".tmp-mine").write_bytes(b"not ours")
    found = examine(study)
    assert {each.file for each in found.problems} == {
        f"epochs/.tmp-{final.name}-{token}",
        ".tmp-job.json-0123456789ab",
        ".old-bundle-frostline",
    }
    done, after = repair(study)
    assert after.problems == []
    assert len(done) == 3
    assert final.exists()
    assert (study / "bundle" / "manifest.json").exists()
    assert (study / "asks" / ".tmp-mine").exists()
    assert rows_of(study) == before


def test_a_part_of_no_commit_is_moved_aside_alone(study: Path) -> None:
    """Also where its number is that of a commit, without this table."""
    before = rows_of(study)
    known = committed_parts(study, "predictions")
    other = next(part for part in committed_parts(study, RECORD) if part not in known)
    strays = [study / f"asks/part-{99:06d}.parquet", study / f"predictions/part-{other:06d}.parquet"]
    shutil.copy(study / "asks/part-000000.parquet", strays[0])
    shutil.copy(study / f"predictions/part-{known[0]:06d}.parquet", strays[1])
    problems = examine(study).problems
    assert {(each.file, each.repair) for each in problems} == {
        (str(path.relative_to(study)), "aside") for path in strays
    }
    assert repair(study)[1].problems == []
    assert rows_of(study) == before
    assert {path.name for path in (study / ASIDE).rglob("*.parquet")} == {path.name for path in strays}
    assert not any(path.exists() for path in strays)


def test_checkpoints_that_cannot_be_used_are_dropped_and_nothing_else(study: Path) -> None:
    folder = study / "checkpoints"
    folder.mkdir(exist_ok=True)
    ended, running = folder / "freeze-00000.safetensors", folder / "freeze-00099.safetensors"
    for path in (ended, running, folder / "thesis.safetensors", folder / "notes.txt"):
        path.write_bytes(b"years of work")
    problems = {each.file: each for each in examine(study).problems}
    assert set(problems) == {f"checkpoints/{path.name}" for path in (ended, running)}
    assert "has ended" in problems[f"checkpoints/{ended.name}"].what
    assert "no checkpoint, or a damaged one" in problems[f"checkpoints/{running.name}"].what
    assert repair(study)[1].problems == []
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "thesis.safetensors"]


def test_a_damaged_bundle_is_told_and_left(study: Path) -> None:
    flip(study / "bundle" / "model.safetensors")
    before = state(study / "bundle")
    for found in (examine(study), repair(study)[1]):
        problem = only(found)
        assert (problem.file, problem.repair) == ("bundle/model.safetensors", "none")
        assert "SHA-256" in problem.what
        assert f"frostline train {study} --best" in problem.remedy
        assert not found.sound(repaired=True)
    assert state(study / "bundle") == before
    shutil.rmtree(study / "bundle")
    assert only(examine(study)).what == "is missing, and 2 confirmations have completed"


@pytest.mark.parametrize("hurt", [flip, Path.unlink], ids=["flipped", "missing"])
def test_the_splits_are_written_again_by_the_same_search(study: Path, hurt: Callable[[Path], None]) -> None:
    splits = results.read_splits(study)
    hurt(study / "splits.parquet")
    found = repair(study)[1]
    assert (only(found).file, only(found).repair) == ("splits.parquet", "search")
    assert found.sound(repaired=True)
    frostline.search(job_of(study), inline=True)
    assert results.read_splits(study).equals(splits)
    assert examine(study).problems == []


def test_a_damaged_job_is_told(study: Path) -> None:
    before = rows_of(study)
    text = (study / "job.json").read_text()
    (study / "job.json").write_text(text.replace('"epochs": 3', '"epochs": 7', 1))
    for found in (examine(study), repair(study)[1]):
        problem = only(found)
        assert (problem.file, problem.what, problem.repair) == ("job.json", "is not what was written", "none")
    (study / "job.json").unlink()
    assert only(examine(study)).what == "is missing"
    frostline.search(job_of(study), inline=True)
    assert examine(study).problems == []
    assert rows_of(study) == before


@pytest.mark.parametrize(
    "hurt", [lambda path: path.write_bytes(path.read_bytes()[:999]), Path.unlink], ids=["cut", "missing"]
)
def test_the_report_is_written_again(study: Path, hurt: Callable[[Path], None]) -> None:
    hurt(study / "report.html")
    assert only(examine(study)).file == "report.html"
    done, found = repair(study)
    assert (done, found.problems) == (["report.html: written"], [])
    assert "</html>" in (study / "report.html").read_text()


def test_a_study_that_is_held_is_examined_and_not_repaired(study: Path) -> None:
    (study / ".tmp-job.json-0123456789ab").write_bytes(b"{")
    (study / "report.html").unlink()
    with Lease.take(study, {}):
        found = examine(study)
        assert (found.in_use, found.problems) == (True, [])
        assert list(lines(found))[-1].endswith("; a search is running, and what it is just writing was left out")
        with pytest.raises(StudyBusy, match=f"pid {os.getpid()} "):
            repair(study)
    assert (study / ".tmp-job.json-0123456789ab").exists()
    assert not examine(study).in_use


def test_what_is_no_study_is_not_touched(tmp_path: Path) -> None:
    for what in (examine, repair):
        with pytest.raises(results.NotAStudyError, match="is not a study"):
            what(tmp_path)
    assert list(tmp_path.iterdir()) == []


def trial(name: str, **columns: Any) -> dict[str, Any]:
    kept = {"round": "search", "status": "complete", "epochs": 2, "ask_seq": int(name[-1])}
    return {"trial_id": name, "arm": "a", **kept, **columns}


def confirmation(name: str, **columns: Any) -> dict[str, Any]:
    return trial(name, round="confirm", ask_seq=None, n_test=2, epochs=0, **columns)


def epochs(name: str, *numbers: int) -> list[dict[str, Any]]:
    return [{"trial_id": name, "epoch": number} for number in numbers]


def ask(seq: int, name: str) -> dict[str, Any]:
    return {"seq": seq, "trial_id": name}


def said(name: str, *samples: str) -> list[dict[str, Any]]:
    return [{"trial_id": name, "sample_id": sample} for sample in samples]


SOUND: dict[str, list[dict[str, Any]]] = {
    "asks": [ask(0, "a-0"), ask(1, "a-1"), ask(2, "a-2")],
    "epochs": [*epochs("a-0", 1, 2), *epochs("a-1", 1, 2)],
    "predictions": said("a-0-c0", "x", "y"),
    RECORD: [trial("a-0"), trial("a-1", data_hash="d", split_hash="s"), confirmation("a-0-c0")],
}


@pytest.mark.parametrize(
    ("table", "changed", "file", "what"),
    [
        (RECORD, [*SOUND[RECORD], trial("a-1")], RECORD, "trials that have a row already: 1, for example a-1"),
        (RECORD, [*SOUND[RECORD], trial("a-2", epochs=0, data_hash="e")], RECORD, "trials on other data, or another split"),
        ("asks", SOUND["asks"][1:], RECORD, "trials whose asks are not there: 1, for example a-0"),
        ("asks", [*SOUND["asks"], ask(3, "a-0")], "asks", "asked for more than once"),
        ("asks", [*SOUND["asks"], ask(2, "a-4")], "asks", "in the place of another's ask"),
        ("epochs", [*SOUND["epochs"], *epochs("a-7", 1)], "epochs", "trials that have epochs and no row: 1, for example a-7"),
        ("epochs", [*epochs("a-0", 1, 3), *epochs("a-1", 1, 2)], "epochs", "not numbered from 1 on"),
        ("epochs", [*epochs("a-0", 1, 1, 2), *epochs("a-1", 1, 2)], "epochs", "not numbered from 1 on"),
        ("epochs", [*epochs("a-0", 1, 2, 3), *epochs("a-1", 1, 2)], "epochs", "not as many as they trained"),
        ("epochs", epochs("a-0", 1, 2), "epochs", "not as many as they trained: 1, for example a-1"),
        ("predictions", [*SOUND["predictions"], *said("a-1", "x")], "predictions", "are no complete confirmations"),
        ("predictions", said("a-0-c0", "x"), "predictions", "confirmations without one prediction for each"),
        ("predictions", said("a-0-c0", "x", "x"), "predictions", "confirmations without one prediction for each"),
        ("predictions", [], "predictions", "confirmations without one prediction for each"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_told(tmp_path: Path, table: str, changed: Any, file: str, what: str) -> None:
    for folder, rows in ((tmp_path / "sound", SOUND), (tmp_path / "not", {**SOUND, table: changed})):
        made = {name: table_of(name, rows[name]) for name in TABLES if rows.get(name)}
        commit_part(folder, made, 0)
        (folder / "job.json").write_text(json.dumps({"job": {}, "facts": {"data_hash": "d", "split_hash": "s"}}))
    usual = {"splits.parquet", "bundle", "report.html"}
    assert {each.file for each in examine(tmp_path / "sound").problems} == usual
    (problem,) = [each for each in examine(tmp_path / "not").problems if each.file not in usual]
    assert problem.file == f"{file}/part-000000.parquet"
    assert what in problem.what


def test_the_command_says_it_with_its_exit_status(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", str(study)]) == 0
    assert capsys.readouterr().out.startswith("0 problems in ")
    part = f"part-{committed_parts(study, RECORD)[-1]:06d}.parquet"
    flip(study / RECORD / part)
    assert main(["fsck", str(study)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        f"trials/{part}: is not what was written. Put it back from a copy, or move every {part} of the study away: the same search "
        "then runs those trials again"
    )
    assert shown[-1].startswith("1 problem in ")
    assert main(["fsck", str(study), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == []
    assert [(each["file"], each["repair"]) for each in found["problems"]] == [(f"trials/{part}", "aside")]
    assert main(["fsck", str(study), "--repair"]) == 0
    assert capsys.readouterr().out.startswith(f"trials/{part}: moved to damaged/")
    assert main(["fsck", str(study.parent)]) == 2
    assert "is not a study" in capsys.readouterr().err
