import re
import tomllib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from jsonschema import Draft202012Validator

from frostline.jobfile import JobError, parse_job
from frostline.reference import allowed, job_reference, starter_job, strategies_reference, type_name
from frostline.spec import Freeze, Job, Objective, Train, searchable_fields, section_models

PAGE = Path(__file__).parent.parent / "docs" / "job.md"
COMMENTED = re.compile(r"# ([a-z0-9_]+ = .*)")


def uncomment(line: str) -> str:
    """A line `# key = default` without its mark; any other as it is, also `# key = …`, which has no default."""
    return line.removeprefix("# ") if COMMENTED.fullmatch(line) and not line.endswith("…") else line


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == job_reference(), (
        "docs/job.md is old; write it again: "
        "python -c \"from frostline.reference import job_reference as page; print(page(), end='')\" > docs/job.md"
    )


def test_the_page_of_strategies_is_what_the_catalogue_says() -> None:
    page = PAGE.with_name("strategies.md")
    assert page.read_text(encoding="utf-8") == strategies_reference(), (
        "docs/strategies.md is old; write it again: "
        "python -c \"from frostline.reference import strategies_reference as page; print(page(), end='')\" > docs/strategies.md"
    )


def test_the_page_has_every_key_under_its_section() -> None:
    page = job_reference()
    for section, model in {"": Job, **section_models()}.items():
        block = page.split(f"## `[{section}]`\n" if section else "## Top level\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \|", block, re.MULTILINE)
        below = {name.rpartition(".")[2] for name in section_models() if name.rpartition(".")[0] == section} | {"arms"}
        assert rows == [key for key in model.model_fields if key not in below]
    for path in searchable_fields():
        assert f"`{path}`" in page


def test_every_row_of_the_page_has_four_cells() -> None:
    rows = [line for line in job_reference().split("\n") if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (Freeze.model_fields["depth"], 'integer | float | "all"'),
        (Objective.model_fields["mode"], '"max" | "min"'),
        (Train.model_fields["lr"], "float, > 0, ≤ 10"),
        (Train.model_fields["clip_norm"], "float, > 0"),
        (Train.model_fields["epochs"], "integer, ≥ 1, ≤ 10000"),
        (Train.model_fields["optimizer"], '"adamw" | "sgd"'),
        (Job.model_fields["name"], "string"),
        (Job.model_fields["arms"], "table"),
        (section_models()["search"].model_fields["defaults"], "true | false"),
    ],
)
def test_types_read_like_a_job_file(field: Any, text: str) -> None:
    assert allowed(field) == text


def test_an_optional_type_is_the_type() -> None:
    assert type_name(int | None) == "integer"


def test_the_starter_job_is_a_job() -> None:
    text = starter_job("my-search")
    job = parse_job(tomllib.loads(text))
    assert job.name == "my-search"
    assert (job.data.path, job.backbone.name) == ("digits", "efficientnet-lite0")
    assert set(job.arms["freeze"].space) == {
        *("freeze.depth", "freeze.norm", "head.hidden", "train.lr", "train.head_lr")
    }


@given(st.text())
@example("a" * 65)
@example("...")
def test_any_name_starts_a_job(name: str) -> None:
    parse_job(tomllib.loads(starter_job(name)))


def test_the_starter_job_shows_every_key() -> None:
    uncommented = COMMENTED.sub(r"\1", starter_job("x").replace("…", "0"))
    raw = tomllib.loads(uncommented)
    for section, model in {"": Job, **section_models()}.items():
        table = raw
        for word in section.split(".") if section else ():
            table = table[word]
        assert set(table) == set(model.model_fields), section


def test_what_the_starter_job_comments_out_are_the_defaults() -> None:
    text = starter_job("x")
    plain = parse_job(tomllib.loads(text))
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines) if uncomment(line) != line]
    assert len(numbers) > 25
    for number in numbers:
        changed = [*lines[:number], uncomment(lines[number]), *lines[number + 1 :]]
        assert parse_job(tomllib.loads("\n".join(changed))) == plain, lines[number]
    assert parse_job(tomllib.loads("\n".join(map(uncomment, lines)))) == plain


def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(Job.model_json_schema())
    return Draft202012Validator(Job.model_json_schema())


def test_the_schema_takes_the_starter_job_and_what_it_comments_out() -> None:
    text = starter_job("x")
    schema().validate(tomllib.loads(text))
    schema().validate(tomllib.loads("\n".join(map(uncomment, text.split("\n")))))


@pytest.mark.parametrize("path", searchable_fields())
def test_the_schema_describes_every_key_of_a_space(path: str) -> None:
    spaces = Job.model_json_schema()["$defs"]["Arm"]["properties"]["space"]
    assert spaces["properties"][path]["description"]
    assert set(spaces["properties"]) == set(searchable_fields())


ENTRIES = [
    ("train.lr", {"low": 1e-5, "high": 1e-3, "log": True}, True),
    ("train.lr", [1e-5, 1e-3], True),
    ("train.lr", 1e-3, True),
    ("train.epochs", {"low": 1, "high": 4, "step": 1}, True),
    ("head.init", ["zero", "probe"], True),
    ("freeze.depth", "all", True),
    ("freeze.depth", [0.0, 0.5, 1.0], True),
    ("freeze.depth", [0, 3], True),
    ("train.lr", [], False),
    ("train.lr", "fast", False),
    ("train.lr", [0], False),
    ("train.lr", {"low": 1e-5}, False),
    ("train.lr", {"low": 1e-5, "high": 1e-3, "hihg": 1}, False),
    ("train.lrr", 1e-3, False),
    ("data.val", 0.1, False),
    ("freeze.strategy", "full", False),
    ("train.schedule", {"low": 1, "high": 2}, False),
    ("head.init", ["probes"], False),
    ("freeze.depth", [2.5], False),
    ("freeze.depth", "half", False),
    ("freeze.depth", {"low": 0, "high": 3}, False),
]


@pytest.mark.parametrize(("path", "entry", "fits"), ENTRIES)
def test_the_schema_and_the_reader_agree_on_a_space(path: str, entry: Any, fits: bool) -> None:
    raw = tomllib.loads(starter_job("x"))
    raw["arms"]["freeze"]["space"] = {"freeze.depth": "all", path: entry}
    assert schema().is_valid(raw) == fits
    if fits:
        parse_job(raw)
    else:
        with pytest.raises(JobError, match="mistake"):
            parse_job(raw)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "nokey", 1),
        ("train", "lr", 0),
        ("train", "lr", "1e-3"),
        ("data", "fit", "crops"),
        ("search", "trials", -1),
    ],
)
def test_the_schema_refuses_what_the_reader_does(section: str, key: str, value: Any) -> None:
    raw = tomllib.loads(starter_job("x"))
    raw[section][key] = value
    assert not schema().is_valid(raw)
    with pytest.raises(JobError):
        parse_job(raw)
