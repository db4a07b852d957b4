"""A comparison as people read it."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from _studies import RATES, write_study
from frostline.compare_text import markdown, render
from frostline.comparison import compare

GOOD = [0.90, 0.91, 0.93, 0.92, 0.90]
CLOSE = [0.895, 0.92, 0.925, 0.905, 0.91]
BAD = [0.60, 0.62, 0.63, 0.60, 0.61]


def shown(*studies: Path, width: int = 100, color: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=color, highlight=False)
    render(compare(studies), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_verdict_comes_first_and_100_columns_suffice(tmp_path: Path) -> None:
    study = write_study(tmp_path / "digits", {"freeze": CLOSE, "full": GOOD, "probe": BAD})
    lines = [line.rstrip() for line in shown(study).splitlines()]
    assert lines[:3] == [
        "digits: accuracy on 200 test samples, 100 of 400 train samples",
        "full has the best mean test score. It is better than probe. It is not distinguishable from freeze.",
        "",
    ]
    assert max(map(len, lines)) <= 100
    at = lines.index("Arms, on test")
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 3]] == [
        "arm seeds accuracy, 95 % interval nll ece alone s spent s peak MiB trainable stored",
        "full 5 0.912 [0.896, 0.928] 0.088 0.144 2 1 102 20.0k 80.1 kB",
    ]
    at = lines.index("Pairs, by seed")
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 6]] == [
        "pair seeds difference, 95 % interval other pools Holm p P(A > B) McNemar p",
        "full ≈ freeze 5 +0.001 [-0.012, +0.014] [-0.021, +0.023] 0.847 0.60 0.417",
        "full > probe 5 +0.300 [+0.285, +0.315] [+0.275, +0.325] <0.001 1.00 <0.001",
        "freeze > probe 5 +0.299 [+0.294, +0.304] [+0.291, +0.307] <0.001 1.00 <0.001",
        "> better, ≈ not distinguishable",
    ]
    assert shown(study, width=40).splitlines()[:2] == shown(study).splitlines()[:2], (
        "nor is it squeezed where no width is known"
    )


def test_names_of_strategies_are_not_folded(tmp_path: Path) -> None:
    text = shown(write_study(tmp_path / "s", {"discriminative": GOOD, "surgical": BAD}))
    assert re.search(r"^discriminative 5 ", re.sub(" +", " ", text), re.MULTILINE)
    assert "discriminative > surgical" in text
    long = "a-very-long-name-of-an-arm-with-sixty-four-characters-in-it-0123"
    lines = shown(write_study(tmp_path / "t", {long: GOOD, "surgical": [*BAD[:4], None]})).splitlines()
    assert max(map(len, lines)) <= 100
    assert "4 (1 failed)" in "\n".join(lines)


def test_score_against_budget_importance_and_fronts(tmp_path: Path) -> None:
    lines = shown(write_study(tmp_path / "s", {"full": GOOD, "probe": BAD}, trials=20)).splitlines()
    at = lines.index("Expected best validation score of so many trials")
    assert lines[at + 1].split() == ["arm", "1", "2", "4", "8", "s", "a", "trial", "complete", "pruned", "failed"]
    assert lines[at + 2].split()[5:] == ["2", "10", "5", "5"]
    assert "pruned trials count at their last epoch's score, failed ones at the worst score" in lines[at + 4]
    at = next(n for n, line in enumerate(lines) if "PED-ANOVA" in line)
    assert re.search(r"^full +train\.(head_)?lr \d+%, train\.(head_)?lr \d+%", lines[at + 2])
    assert re.search(r"^probe +a single searched key has all of it", lines[at + 3])
    at = next(n for n, line in enumerate(lines) if line.startswith("On the front"))
    assert lines[at + 3].split() == ["probe", "no", "(0%)", "no", "(0%)", "yes", "(100%)", "yes", "(100%)"]


def test_the_edge_of_a_range_is_told(tmp_path: Path) -> None:
    narrow = {"strategy": "full", "space": {"head.hidden": [0, 64, 256], "train.lr": RATES["train.lr"]}}
    for seed in range(9):
        text = " ".join(
            shown(write_study(tmp_path / f"s{seed}", {"full": GOOD}, seed=seed, arms={"full": narrow})).split()
        )
        at_edge = "head.hidden is at the upper end of its range, 0 to 256: widen it" in text
        assert at_edge == ("head.hidden 256," in text)


def test_a_loss_has_no_second_column_of_it_and_other_scores_have_accuracy(tmp_path: Path) -> None:
    loss = shown(write_study(tmp_path / "s", {"full": [0.2, 0.3], "probe": [0.5, 0.7]}, metric="nll"))
    assert "arm seeds nll, 95 % interval accuracy ece" in " ".join(loss.split())
    f1 = shown(write_study(tmp_path / "t", {"full": [0.2, 0.3], "probe": [0.5, 0.7]}, metric="macro_f1"))
    assert "macro_f1, 95 % interval accuracy nll ece" in " ".join(f1.split())


def test_several_tasks_begin_with_all_of_them(tmp_path: Path) -> None:
    scores = {"full": GOOD, "freeze": CLOSE, "probe": BAD}
    studies = [write_study(tmp_path / name, scores, data=name) for name in ("digits", "flowers")]
    lines = [line.rstrip() for line in shown(*studies).splitlines()]
    assert lines[0] == "2 tasks"
    assert lines[1].startswith("Over 2 tasks full has the best mean rank, 1.00. No arm is distinguishable")
    assert any(
        line.startswith("Friedman chi-square 4.00, p 0.135; mean ranks more than 2.34 apart differ") for line in lines
    )
    assert lines.index("digits: accuracy on 200 test samples, 100 of 400 train samples") < lines.index(
        "flowers: accuracy on 200 test samples, 100 of 400 train samples"
    )


def test_what_the_numbers_claim_is_said_once(tmp_path: Path) -> None:
    text = " ".join(shown(write_study(tmp_path / "s", {"full": GOOD, "probe": BAD})).split())
    assert "for this train pool and these test samples" in text
    assert "train subsets of two seeds share 25%" in text
    whole = " ".join(shown(write_study(tmp_path / "w", {"full": GOOD, "probe": BAD}, per_class=None)).split())
    assert "Where each seed trains on the whole pool, nothing is said of other pools" in whole
    assert "other pools:" not in whole
    none = shown(write_study(tmp_path / "n", {"full": [], "probe": []}))
    assert "Intervals" not in none


def test_markdown_is_the_same_as_tables(tmp_path: Path) -> None:
    text = markdown(
        compare([write_study(tmp_path / "digits", {"freeze": [*CLOSE[:4], None], "full": GOOD, "probe": BAD})])
    )
    lines = text.splitlines()
    assert lines[0] == "## digits: accuracy on 200 test samples, 100 of 400 train samples"
    assert lines[2].startswith("**full has the best mean test score.")
    assert "- freeze: 1 of 5 confirmations failed, for example: RuntimeError: out of memory" in lines
    assert "| freeze | 4 (1 failed) | 0.911 " in text
    assert "| full \\> probe | 5 | +0.300 " in text
    for n, line in enumerate(lines):
        if re.fullmatch(r"\|( -+:? \|)+", line):
            columns = line.count("|")
            assert lines[n - 1].count("|") == lines[n + 1].count("|") == columns
            assert lines[n - 2] == ""


NASTY = "x[red]_y"


def test_names_cannot_speak_to_the_terminal_or_to_markdown(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", {"full": GOOD, "probe": [0.5, 0.5, 0.5, 0.5, None]}, data="d\x1b[31m")
    path = study / "job.json"
    path.write_text(path.read_text().replace('"name": "s"', '"name": "a\\u001b[31m|*b*[red]"'))
    for color in (False, True):
        assert "\x1b[31m" not in shown(study, color=color)
        assert "|*b*[red]: accuracy" in shown(study)
    assert "\\|\\*b\\*\\[red\\]" in markdown(compare([study]))
