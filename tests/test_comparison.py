"""Studies into a comparison: what is compared with what, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from _studies import RATES, search_row, write_study
from frostline import results
from frostline.commit import DamagedFile, commit_part
from frostline.comparison import COSTS, Comparison, ComparisonError, compare
from frostline.results import RECORD, NotAStudyError, table_of

GOOD = [0.90, 0.91, 0.93, 0.92, 0.90]
CLOSE = [0.895, 0.92, 0.925, 0.905, 0.91]
BAD = [0.60, 0.62, 0.63, 0.60, 0.61]


def test_a_study_of_three_arms(tmp_path: Path) -> None:
    found = compare([write_study(tmp_path / "s", {"freeze": CLOSE, "full": GOOD, "probe": BAD})])
    (task,) = found.tasks
    assert (found.metric, found.mode, found.across, found.notes) == ("accuracy", "max", None, [])
    assert (task.name, task.n_train, task.pool, task.n_test, task.overlap) == ("s", 100, 400, 200, 0.25)
    assert [arm.label for arm in task.arms] == ["full", "freeze", "probe"]
    assert [(pair.a, pair.b, pair.verdict) for pair in task.pairs] == [
        ("full", "freeze", "not distinguishable"),
        ("full", "probe", "better"),
        ("freeze", "probe", "better"),
    ]
    assert (
        task.verdict
        == "full has the best mean test score. It is better than probe. It is not distinguishable from freeze."
    )
    assert task.notes == []


def test_the_front_of_score_against_cost(tmp_path: Path) -> None:
    (task,) = compare([write_study(tmp_path / "s", {"freeze": CLOSE, "full": GOOD, "probe": BAD})]).tasks
    assert tuple(task.fronts) == COSTS
    points = {point["label"]: point for point in task.fronts["trainable_params"]}
    assert [points[label]["cost"] for label in ("probe", "freeze", "full")] == [250, 5000, 20_000]
    assert [points[label]["non_dominated"] for label in ("probe", "freeze", "full")] == [True, True, True]
    assert points["probe"]["share"] == points["freeze"]["share"] == 1
    assert 0.4 < points["full"]["share"] < 0.9, "its lead over freeze is within the noise"
    assert points["full"]["score"] == pytest.approx(np.mean(GOOD))
    same = {point["label"]: point["non_dominated"] for point in task.fronts["alone_s"]}
    assert same == {"full": True, "freeze": False, "probe": False}, "they cost the same"


def test_it_is_json(tmp_path: Path) -> None:
    scores: dict[str, list[float | None]] = {"freeze": [*GOOD[:4], None], "full": [None] * 5, "probe": [0.5]}
    study = write_study(tmp_path / "s", scores)
    row = search_row("freeze", 50, "failed", None, peak_mib=float("nan"), alone_s=float("inf"), last_score=float("nan"))
    params = json.dumps({"freeze.depth": 0, "train.lr": 1e-3, "train.head_lr": 1e-2})
    ask = {"seq": 50, "trial_id": row["trial_id"], "arm": "freeze", "number": 50, "batch": 0, "params": params}
    commit_part(study, {"asks": table_of("asks", [ask]), RECORD: table_of(RECORD, [row])}, 1)
    other = write_study(tmp_path / "t", scores, data="flowers", metric="accuracy")
    found = compare([study, other])
    assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)
    again = json.dumps(asdict(compare([study, other])))
    assert again == json.dumps(asdict(found)), "every bootstrap is seeded"


@pytest.mark.parametrize(
    ("scores", "verdict", "note"),
    [
        ({"freeze": [], "full": []}, "Nothing can be said of the arms: none has been re-run", "not re-run on fresh seeds: freeze and full"),
        ({"freeze": GOOD}, "Only freeze has been re-run", ""),
        ({"freeze": GOOD, "full": []}, "Only freeze has been re-run", 'confirm.finalists = "arms"'),
        ({"freeze": [None] * 5, "full": [None] * 5}, "all confirmations failed", "5 of 5 confirmations failed, for example: RuntimeError"),
        ({"freeze": GOOD, "full": [None] * 5}, "It cannot be compared with full", "full: 5 of 5 confirmations failed"),
        ({"freeze": [*GOOD[:4], None], "full": BAD}, "It is not distinguishable from full", "freeze: 1 of 5 confirmations failed"),
        ({"freeze": GOOD, "full": BAD[:3]}, "It is better than full", "full: 3 of 5 confirmations have ended; the same search"),
        ({"freeze": [0.9], "full": [0.5]}, "It cannot be compared with full", "fewer than 5 seeds make wide intervals: freeze 1, full 1"),
        ({"freeze": GOOD, "full": GOOD}, "It is not distinguishable from full", ""),
    ],
)  # fmt: skip
def test_studies_that_do_not_answer_the_question_say_so(tmp_path: Path, scores, verdict: str, note: str) -> None:
    (task,) = compare([write_study(tmp_path / "s", scores)]).tasks
    assert verdict in task.verdict
    assert note in "\n".join(task.notes)
    assert bool(note) == bool(task.notes)


def test_a_study_without_trials_or_arms_that_completed(tmp_path: Path) -> None:
    (task,) = compare([write_study(tmp_path / "s", {"freeze": [], "full": []}, trials=0)]).tasks
    assert "Nothing can be said" in task.verdict
    assert task.notes == [
        "freeze: no trial completed (0 complete, 0 pruned, 0 failed)",
        "full: no trial completed (0 complete, 0 pruned, 0 failed)",
    ]


def test_a_verdict_bound_to_the_pool_says_so(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s", {"full": GOOD, "probe": [score - 0.1 - n / 50 for n, score in enumerate(GOOD)]}, per_class=190
    )
    (task,) = compare([study]).tasks
    assert task.verdict.endswith("Trained from another pool it may not be better than probe.")


def test_arms_of_several_studies_of_one_task_are_paired_by_seed(tmp_path: Path) -> None:
    bare = write_study(tmp_path / "bare", {"surgical": []})
    one = write_study(tmp_path / "one", {"full": GOOD})
    two = write_study(tmp_path / "two", {"probe": BAD})
    other_seeds = write_study(tmp_path / "three", {"freeze": CLOSE}, seed=99)
    found = compare([bare, one, two, other_seeds])
    (task,) = found.tasks
    assert (task.name, task.studies) == ("bare + one + two + three", [str(bare), str(one), str(two), str(other_seeds)])
    assert (task.overlap, task.pool) == (0.25, 400)
    verdicts = {(pair.a, pair.b): (pair.verdict, pair.difference.n) for pair in task.pairs}
    assert verdicts["full", "probe"] == ("better", 5)
    assert verdicts["full", "freeze"] == ("not compared", 0)
    assert "It cannot be compared with freeze" in task.verdict


@pytest.mark.parametrize(
    ("backbones", "labels"),
    [(("timm/a", "timm/b"), ["full a", "full b"]), (("timm/a", "timm/a"), ["one/full", "two/full"])],
)
def test_arms_of_the_same_name_are_told_apart(tmp_path: Path, backbones: tuple[str, str], labels: list[str]) -> None:
    studies = [
        write_study(tmp_path / name, {"full": scores}, backbone=backbone)
        for name, scores, backbone in zip(("one", "two"), (GOOD, BAD), backbones, strict=True)
    ]
    (task,) = compare(studies).tasks
    assert [arm.label for arm in task.arms] == labels
    assert [(pair.a, pair.b) for pair in task.pairs] == [tuple(labels)]


def test_other_data_another_split_or_fewer_samples_are_another_task(tmp_path: Path) -> None:
    scores = {"full": GOOD, "probe": BAD}
    base = write_study(tmp_path / "base", scores)
    data = write_study(tmp_path / "data", scores, data="flowers")
    split = write_study(tmp_path / "split", scores, split="s1")
    fewer = write_study(tmp_path / "fewer", scores, per_class=5)
    found = compare([base, data, split, fewer])
    assert [task.name for task in found.tasks] == ["base", "data", "split", "fewer"]
    assert found.across is not None
    assert found.across.tasks == 4
    assert ["not independent" in note for note in found.notes] == [True]
    assert compare([base, data]).notes == []
    apart = compare([base, write_study(tmp_path / "x", {"freeze": CLOSE}, data="flowers")])
    assert apart.across is None
    assert "nothing is said over tasks" in apart.notes[0]


def test_unequal_budgets_and_hardware_are_remarked_on(tmp_path: Path) -> None:
    one = write_study(tmp_path / "one", {"full": GOOD}, trials=12)
    two = write_study(tmp_path / "two", {"probe": BAD}, trials=20)
    path = two / "job.json"
    path.write_text(path.read_text().replace("a CPU", "another CPU"))
    (task,) = compare([one, two]).tasks
    assert "arms had different numbers of trials: full 12, probe 20" in task.notes
    assert "costs were measured on different hardware: a CPU, another CPU" in task.notes


def test_studies_that_cannot_be_compared(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"full": GOOD})
    with pytest.raises(ComparisonError, match=r"/s is named 2 times; name each study once"):
        compare([study, tmp_path / "." / "s"])
    loss = write_study(tmp_path / "loss", {"full": GOOD}, metric="nll")
    with pytest.raises(ComparisonError, match=r"objectives differ: .*/s \(accuracy\), .*/loss \(nll\)"):
        compare([study, loss])
    with pytest.raises(NotAStudyError, match="has no job"):
        compare([study, tmp_path / "nothing"])
    (study / "splits.parquet").unlink()
    with pytest.raises(DamagedFile, match=r"splits\.parquet is missing"):
        compare([study])


def test_a_loss_is_better_when_it_is_lower(tmp_path: Path) -> None:
    (task,) = compare(
        [write_study(tmp_path / "s", {"full": [0.4, 0.42, 0.41], "probe": [0.1, 0.12, 0.1]}, metric="nll")]
    ).tasks
    assert [arm.label for arm in task.arms] == ["probe", "full"]
    assert (task.pairs[0].a, task.pairs[0].verdict) == ("probe", "better")
    front = {point["label"]: point["non_dominated"] for point in task.fronts["trainable_params"]}
    assert front == {"probe": True, "full": False}


def test_every_part_is_read_once_and_epochs_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a comparison costs grows with trials and confirmations, not with epochs."""
    study = write_study(tmp_path / "s", {"full": GOOD, "probe": BAD})
    read: list[str] = []
    real = results.read_table
    monkeypatch.setattr(
        results, "read_table", lambda folder, table, *rest: read.append(table) or real(folder, table, *rest)
    )
    compare([study])
    assert sorted(read) == ["asks", "predictions", "trials"]
    read.clear()
    compare(
        [
            write_study(
                tmp_path / "t",
                {"full": GOOD, "scratch": BAD},
                arms={"scratch": {"strategy": "scratch", "space": RATES}},
            )
        ]
    )
    assert sorted(read) == ["asks", "epochs", "predictions", "probes", "trials"], "these say what transfer gained"


def test_neither_torch_nor_ray_and_optuna_for_importance_only(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"full": GOOD, "probe": BAD})
    code = "import sys, frostline.comparison, frostline.compare_text; before = set(sys.modules)\n"
    code += f"frostline.comparison.compare([{str(study)!r}])\n"
    code += "print([[m in loaded for m in ('torch', 'ray', 'optuna')] for loaded in (before, sys.modules)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[False, False, False], [False, False, True]]"


MEASURE = """
import json, re, sys, time
from pathlib import Path
from frostline.comparison import compare
started = time.perf_counter()
task, = compare([sys.argv[1]]).tasks
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"mib": peak, "s": time.perf_counter() - started, "trials": [sum(a.search.counts.values()) for a in task.arms]}))
"""


@pytest.mark.slow
def test_ten_thousand_trials_of_fifty_epochs_fit_in_a_gibibyte(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s",
        {"freeze": GOOD, "full": CLOSE, "probe": BAD, "other": BAD},
        trials=2500,
        n_test=10_000,
        spec_bytes=3000,
    )
    epochs = 50 * 10_000
    table = results.SCHEMAS["epochs"].empty_table()
    columns = {field.name: pa.nulls(epochs, field.type) for field in table.schema}
    columns["trial_id"] = pa.array(np.repeat([f"full-{n:05d}" for n in range(10_000)], 50))
    table = pa.table(columns, schema=table.schema)
    commit_part(study, {"epochs": table, RECORD: results.SCHEMAS[RECORD].empty_table()}, 999)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(study)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    assert found["trials"] == [2500] * 4
    assert found["mib"] < 1024
    assert found["s"] < 60


def test_a_comparison_is_frozen(tmp_path: Path) -> None:
    found = compare([write_study(tmp_path / "s", {"full": GOOD})])
    with pytest.raises(AttributeError):
        found.metric = "nll"  # type: ignore[misc]
    assert isinstance(found, Comparison)
