"""The report as a file: what it says, that nothing in it can run or be fetched, and how large it becomes."""

from __future__ import annotations

import html
import json
import re
import tomllib
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline
from _studies import search_row, write_study
from frostline import drawn
from frostline.claim import MAY_DIFFER
from frostline.cli import main
from frostline.commit import DamagedFile, commit_part, write_file
from frostline.files import DataError
from frostline.jobfile import parse_job
from frostline.report import build, write_report
from frostline.results import RECORD, read_job, table_of
from frostline.testing import toy_job

SEEDS = (0.91, 0.92, 0.93, 0.92, 0.91)
WORSE = (0.81, 0.83, 0.82, 0.83, 0.81)
EVIL = """</script><img src=x onerror="alert(1)">'&\x1b[31m"""


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.raw = ""
        self.feed(page)
        self.data = json.loads(next(each for each in re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.raw = tag if tag in ("script", "style") else ""

    def handle_data(self, data: str) -> None:
        if not self.raw:
            self.said.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.raw = ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def none(_data: Mapping[str, Any], _samples: Mapping[str, str]) -> dict[str, bytes]:
    """No pictures."""
    return {}


def edit(study: Path, **facts: Any) -> None:
    record = read_job(study)
    record["facts"] |= facts
    write_file(study / "job.json", json.dumps(record).encode())


def asked(arm: str, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of asks."""
    trial_id = f"{arm}-{number:05d}"
    return {"seq": number, "trial_id": trial_id, "arm": arm, "number": number, "batch": 0, "params": json.dumps(values)}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real search of three arms, all of them confirmed."""
    rates = {"train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    arms = {
        "freeze": {"strategy": "freeze_depth", "space": {"freeze.depth": "all", "head.hidden": [0, 16], **rates}},
        "full": {"strategy": "full", "space": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, **rates}},
        "probe": {"strategy": "linear_probe", "space": rates},
    }
    job = toy_job(
        tmp_path_factory.mktemp("results") / "three",
        ["search.trials=18"],
        arms=arms,
        confirm={"seeds": 2, "finalists": "arms"},
    )
    return frostline.search(job, inline=True)


def test_a_search_leaves_its_report(searched: Path) -> None:
    page = Page((searched / "report.html").read_text())
    charts = {attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes}
    fronts = {"pareto-alone-s", "pareto-peak-mib", "pareto-trainable-params"}
    always = {
        "forest",
        "depth",
        "heat-lr",
        "heat-head-lr",
        "curves",
        "parallel",
        "heads",
        "confusion",
        "costs",
        "budget",
    }
    assert always | fronts <= charts
    assert charts == set(page.data["charts"])
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert "best mean test score" in page.text
    assert "18 trials" in page.text
    assert [tag for tag, _ in page.tags].count("img") > 0
    for name in ("Verdict", "Arms", "Freeze depth", "Cost account", "Run it again"):
        assert name in page.text


def test_the_verdict_comes_first_and_the_contents_lead_to_every_section(searched: Path) -> None:
    page = Page(build(searched, none))
    sections = [attributes for tag, attributes in page.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert sections[0]["id"] == "verdict"
    assert links[0] == "#verdict"  # skips the contents
    assert links[1:] == [f"#{each['id']}" for each in sections]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert labelled <= set(ids)


def test_every_chart_has_a_description_and_a_table(searched: Path) -> None:
    text = build(searched, none)
    for figure in re.findall(r"<figure.*?</figure>", text, re.DOTALL):
        assert "<table>" in figure
    for spec in Page(text).data["charts"].values():
        assert len(spec["description"]) > 20
        assert spec["width"] == "container"


def test_the_job_in_it_is_the_job(searched: Path) -> None:
    code = re.findall(r"<code>(.*?)</code>", build(searched, none), re.DOTALL)[1]
    again = parse_job(tomllib.loads(html.unescape(code)))
    assert again.model_dump(mode="json", exclude=MAY_DIFFER) == read_job(searched)["job"]


def test_nothing_is_fetched_and_only_its_own_scripts_run(searched: Path) -> None:
    text = build(searched, none)
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "@import" not in text
    assert "url(" not in re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[0]


def test_names_and_texts_cannot_leave_their_place(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS, "full": WORSE})
    row = search_row("full", 99, "failed", None, error_kind="internal", reason=EVIL, tell_seq=99)
    ask = asked("full", 99, {"train.lr": 1e-4, "train.head_lr": 1e-2})
    commit_part(study_folder, {"asks": table_of("asks", [ask]), "trials": table_of("trials", [row])}, 1)
    edit(study_folder, classes=[EVIL, "b"], hardware=EVIL, versions={EVIL: EVIL})
    record = read_job(study_folder)
    record["job"]["name"] = record["job"]["data"]["path"] = record["job"]["backbone"]["name"] = EVIL
    record["job"]["arms"][EVIL] = {"strategy": "full"}
    write_file(study_folder / "job.json", json.dumps(record).encode())

    def pictures(_data: Mapping[str, Any], _samples: Mapping[str, str]) -> dict[str, bytes]:
        raise DataError(EVIL)

    text = build(study_folder, pictures)
    page = Page(text)
    assert "\x1b" not in text
    assert text.count("<script") == text.count("</script>") == 3
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = EVIL.replace("\x1b", "�")
    assert page.text.count(shown) >= 5
    assert shown in json.dumps(page.data, ensure_ascii=False).replace('\\"', '"')
    assert "The images cannot be shown" in page.text


def test_without_trials_it_says_so(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": []}, trials=0)
    page = Page(build(study_folder, none))
    assert "Nothing can be said of the arms" in page.text
    assert "0 of 1 trials have finished" in page.text
    assert page.data["charts"] == {}
    assert "No trial has completed yet" in page.text


def test_how_well_heads_in_closed_form_foretold_trials_is_told(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": []}, trials=1)
    assert "Kendall's tau" not in Page(build(study_folder, none)).text
    rows = [search_row("freeze", 5 + cut, "complete", 0.5 + cut / 10, freeze_depth=cut) for cut in (1, 2, 3)]
    probes = [
        {"cut": cut, "stages": 4, "method": "lda", "features": 8, "val_score": cut / 5, "val_nll": 1.0, "seconds": 0.1}
        for cut in (1, 2, 3, 4)
    ]
    commit_part(study_folder, {"probes": table_of("probes", probes), RECORD: table_of(RECORD, rows)}, 1)
    text = Page(build(study_folder, none)).text
    assert "Heads in closed form against the best trial of each freeze depth: Kendall's tau 0.33, that of" in text


def test_without_confirmations_there_is_no_winner(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": [], "full": []})
    page = Page(build(study_folder, none))
    assert "none has been re-run on fresh seeds" in page.text
    assert "no basis for a comparison" in page.text
    assert "No arm has a score on test yet" in page.text
    assert {"forest", "confusion"}.isdisjoint(page.data["charts"])
    assert "depth" in page.data["charts"]


def test_one_arm_has_nothing_to_be_compared_with(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS})
    page = Page(build(study_folder, none))
    assert "there is nothing to compare it with" in page.text
    assert "forest" in page.data["charts"]


def test_arms_that_cannot_be_told_apart_are_called_that(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS, "full": (0.92, 0.91, 0.93, 0.92, 0.92)})
    assert "not distinguishable from" in Page(build(study_folder, none)).text


def test_failures_are_counted_and_their_reasons_listed(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": (0.9, None, 0.91)}, statuses=("failed",))
    page = Page(build(study_folder, none))
    assert "11 failed" in page.text
    assert "loss is nan" in page.text
    assert "1 of 3 confirmations failed" in page.text


def test_all_failed(study_folder: Path) -> None:
    rows = [search_row("freeze", number, "failed", None) for number in range(3)]
    write_study(study_folder, {"freeze": []}, trials=0)
    commit_part(study_folder, {"trials": table_of("trials", rows)}, 0)
    assert "3 failed" in Page(build(study_folder, none)).text


def test_a_lower_score_is_better_where_the_objective_says_so(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": (0.1, 0.12, 0.11), "full": (0.5, 0.52, 0.51)}, metric="nll")
    page = Page(build(study_folder, none))
    assert "freeze has the best mean test score" in page.text
    front = page.data["charts"]["pareto-alone-s"]["datasets"]["front"]
    assert front[0]["score"] == min(
        each["score"] for each in page.data["charts"]["pareto-alone-s"]["datasets"]["trials"]
    )


def test_a_value_at_the_edge_of_its_range_is_told(study_folder: Path) -> None:
    write_study(
        study_folder, {"full": SEEDS}, arms={"full": {"strategy": "full", "space": {"train.batch_size": [16, 32, 64]}}}
    )
    asks = [
        {
            "seq": 0,
            "trial_id": "full-00000",
            "arm": "full",
            "number": 0,
            "batch": 0,
            "params": '{"train.batch_size": 64}',
        }
    ]
    again = search_row("full", 100, "pruned", 0.2)
    assert "train.batch_size" in Page(build(study_folder, none)).text
    commit_part(study_folder, {"asks": table_of("asks", asks), "trials": table_of("trials", [again])}, 1)
    assert "train.batch_size is best at the upper end of its range" in Page(build(study_folder, none)).text


def test_a_large_study_is_thinned_and_says_so(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS, "full": WORSE}, trials=2500)
    rng, epochs = np.random.default_rng(0), []
    for number in range(2500):
        for epoch in range(1, 51):
            epochs.append(
                {"trial_id": f"full-{number:05d}", "epoch": epoch, "phase": 0, "val_score": float(rng.random())}
            )
    late, asks = (
        search_row("full", 2500, "pruned", 0.2),
        [asked("full", 2500, {"train.lr": 1e-4, "train.head_lr": 1e-2})],
    )
    part = len(list((study_folder / "trials").glob("*.parquet")))
    commit_part(
        study_folder,
        {"asks": table_of("asks", asks), "epochs": table_of("epochs", epochs), "trials": table_of("trials", [late])},
        part,
    )
    text = build(study_folder, none)
    page = Page(text)
    assert len(text.encode()) < 5e6
    assert f"{drawn.TRIALS:,} of 5,001 trials" in page.text
    assert f"{drawn.CURVES} of 5,001 trials of the search" in page.text
    assert len(page.data["charts"]["curves"]["datasets"]["rows"]) <= drawn.CURVES * drawn.EPOCHS
    assert any(row["score"] == 0.97 for row in page.data["charts"]["depth"]["datasets"]["trials"])  # the best is drawn


def test_the_command_writes_it_and_says_where(
    study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(study_folder, {"freeze": SEEDS})
    assert main(["report", str(study_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(study_folder / "report.html")
    assert main(["report", str(study_folder), "--out", str(tmp_path / "a" / "b.html")]) == 0
    assert (tmp_path / "a" / "b.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "is not a study" in capsys.readouterr().err


def test_pictures_that_are_lost_are_told_and_the_others_shown(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS})
    edit(study_folder, classes=["a", "b"])

    def one(_data: Mapping[str, Any], samples: Mapping[str, str]) -> dict[str, bytes]:
        assert set(samples.values()) == {"a"}
        return {next(iter(samples)): b"png"}

    page = Page(build(study_folder, one))
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ["a taken for b"]
    assert re.search(r"\d+ of the images are not there any more", page.text)


def test_a_report_that_cannot_be_written_leaves_the_old_one(study_folder: Path) -> None:
    write_study(study_folder, {"freeze": SEEDS})
    path = write_report(study_folder, pictures=none)
    before = path.read_bytes()
    next((study_folder / "trials").glob("*.parquet")).write_bytes(b"damaged")
    with pytest.raises(DamagedFile):
        write_report(study_folder, pictures=none)
    assert path.read_bytes() == before


def test_a_search_whose_report_fails_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("frostline.report.write_file", broken)
    folder = frostline.search(
        toy_job(tmp_path / "toy", ["search.trials=2", "train.epochs=1", "confirm.seeds=1"]), inline=True
    )
    assert not (folder / "report.html").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "no report was written (OSError: the disk is full)" in said
    assert "frostline report" in said
