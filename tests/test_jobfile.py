import datetime
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from pydantic import BaseModel

from frostline.jobfile import MAX_JOB_BYTES, JobError, as_toml, known_keys, load_job, parse_job
from frostline.models import Range
from frostline.spec import OWN_KEYS, Arm, Job, searchable_fields, section_models

BASE = """
name = "x"
data.path = "digits"
[arms.a]
strategy = "freeze_depth"
[arms.a.space]
"freeze.depth" = "all"
"train.lr" = { low = 1e-5, high = 1e-3, log = true }
"""
DEPTH = 'a depth is a whole number of stages (1 = one stage), a share of them from 0.0 to 1.0 (1.0 = all), or "all"'


def parse(text: str, *overrides: str) -> Job:
    return parse_job(tomllib.loads(text), overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    """What JobError lists, a string each; the count in its first line is checked."""
    with pytest.raises(JobError) as caught:
        parse(text, *overrides)
    head, *lines = str(caught.value).split("\n")
    assert head == f"job: {len(lines)} mistake{'s' * (len(lines) != 1)}"
    return [line.removeprefix("  ") for line in lines]


def space(entry: str, strategy: str = "freeze_depth") -> str:
    return f'name = "x"\ndata.path = "digits"\n[arms.a]\nstrategy = "{strategy}"\n[arms.a.space]\n{entry}\n'


def test_a_job_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    job = load_job(path, ["train.epochs=3"])
    assert job == parse(BASE, "train.epochs=3")
    assert (job.name, job.data.path, job.train.epochs) == ("x", "digits", 3)
    assert job.arms["a"].space == {"freeze.depth": "all", "train.lr": Range(low=1e-5, high=1e-3, log=True)}


def test_every_mistake_is_reported_at_once() -> None:
    assert mistakes(
        """
        [trian]
        [data]
        image_size = 4
        [resources]
        cpus = "2"
        [arms.a]
        strategy = "linear_probe"
        space."head.hidden" = [0, -1]
        space.train.lr = 1e-3
        [arms.b]
        strategy = "full"
        space."freeze.depth" = [0, 2]
        [arms.c]
        strategy = "freeze_depth"
        [arms.d]
        strategy = "full"
        [arms.e]
        strategy = "full"
        """,
        "train",
    ) == [
        "'train': an override is written key=value, for example train.lr=1e-3",
        "name: this key is needed. Letters, digits, `_` and `-`; the study's folder is results/NAME unless `results` "
        "says otherwise.",
        f"data.path: this key is needed. {' '.join(str(section_models()['data'].model_fields['path'].description).split())}",
        "data.image_size = 4: should be greater than or equal to 8",
        'resources.cpus = "2": should be a number, without quotes',
        f"trian: unknown key. Did you mean 'train'? Allowed here: {', '.join(Job.model_fields)}.",
        'arms.a.space."head.hidden" = -1: should be greater than or equal to 0',
        'arms.a.space.train: a dotted key of a space is written in quotes: "train.lr" = …',
        "search.trials = 24: not an equal share for each of 5 arms; 20 or 25 is",
        "arms.b: freeze: depth is not for strategy = 'full'; it is for freeze_depth, surgical, layer_decay, discriminative, gradual, lp_ft, norm_only, bias_only, lora, dora, auto_rgn",
        'arms.c: strategy = "freeze_depth" needs space."freeze.depth", for example "all" or [0.0, 0.5, 1.0]',
    ]


SECTIONS = {"": Job, **section_models()}


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_of_any_section_is_an_error_that_suggests_the_nearest(section: str) -> None:
    keys = SECTIONS[section].model_fields
    for key in keys:
        path = f"{section}.{key}q".removeprefix(".")
        expected = f"{path}: unknown key. Did you mean {key!r}? Allowed here: {', '.join(keys)}."
        assert expected in mistakes(BASE, f"{path}=1")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("lr=1", "lr: unknown key. Did you mean 'train.lr'? Allowed here: name, results,"),
        ("train.hidden=1", "train.hidden: unknown key. Did you mean 'head.hidden'? Allowed here: optimizer,"),
        ("search.kind=1", "search.kind: unknown key. Did you mean 'search.pruner.kind'? Allowed here: trials,"),
        ("train.zzz=1", "train.zzz: unknown key. Allowed here: optimizer, lr,"),
        ('"train.lr"=1', "\"train.lr\": unknown key. Did you mean 'train.lr'? Allowed here: name,"),
        ('"a\\u001b b"=1', '"a\\u001b b": unknown key. Allowed here: name,'),
        ("arms.a.spce=1", "arms.a.spce: unknown key. Did you mean 'space'? Allowed here: strategy, sampler, space."),
        (
            'arms.a.space."train.lr".hihg=1',
            "arms.a.space.\"train.lr\".hihg: unknown key. Did you mean 'high'? Allowed here: low, high, log, step.",
        ),
    ],
)
def test_unknown_keys(override: str, start: str) -> None:
    [line] = mistakes(BASE, override)
    assert line.startswith(start)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs=10.0", "train.epochs = 10.0: should be a whole number, without point and quotes"),
        ('train.epochs="10"', 'train.epochs = "10": should be a whole number, without point and quotes'),
        ("train.epochs=true", "train.epochs = true: should be a whole number, without point and quotes"),
        ("train.epochs=0", "train.epochs = 0: should be greater than or equal to 1"),
        ("train.epochs=10001", "train.epochs = 10001: should be less than or equal to 10000"),
        ('train.lr="1e-3"', 'train.lr = "1e-3": should be a number, without quotes'),
        ("train.lr=fast", 'train.lr = "fast": should be a number, without quotes'),
        ("train.lr=true", "train.lr = true: should be a number, without quotes"),
        ("train.lr=[1e-3]", "train.lr: should be a number, without quotes"),
        ("train.lr=0", "train.lr = 0: should be greater than 0"),
        ("train.lr=nan", "train.lr = NaN: should be a finite number"),
        ("train.lr=inf", "train.lr = Infinity: should be a finite number"),
        ("train.lr=", 'train.lr = "": should be a number, without quotes'),
        ("train.momentum=1.0", "train.momentum = 1.0: should be less than 1"),
        ("search.defaults=True", 'search.defaults = "True": should be true or false'),
        ("search.defaults=0", "search.defaults = 0: should be true or false"),
        ("search.pruner.factor=1", "search.pruner.factor = 1: should be greater than or equal to 2"),
        ("search.pruner=none", 'search.pruner = "none": should be a table'),
        ("train.optimizer=adam", "train.optimizer = \"adam\": should be 'adamw' or 'sgd'. Did you mean 'adamw'?"),
        ("train.optimizer=lion", "train.optimizer = \"lion\": should be 'adamw' or 'sgd'"),
        ("data.path=5", "data.path = 5: should be text in quotes"),
        ("data.path=2024-05-01", "data.path = 2024-05-01: should be text in quotes"),
        ('data.path=""', 'data.path = "": string should have at least 1 character'),
        ("data.val=0.9", "data: val + test = 1.05 leaves nothing to train on; their sum must be below 1"),
        ("name=a b", 'name = "a b": a name is 1 to 64 letters, digits, `_` and `-`, a letter or a digit first'),
        ("seed=2147483648", "seed = 2147483648: should be less than 2147483648"),
        ("seed=-1", "seed = -1: should be greater than or equal to 0"),
        ("seed=0x8000000000000000", "seed: an integer of more than 64 bits"),
        ("seed=0x7fffffffffffffff", "seed = 9223372036854775807: should be less than 2147483648"),
        (f"seed={-(1 << 63) - 1}", "seed: an integer of more than 64 bits"),
        ("seed=" + "1" * 5000, f'seed = "{"1" * 79}…: should be a whole number, without point and quotes'),
        ("train=5", "train = 5: should be a table"),
        ("arms=5", "arms = 5: should be a table"),
        ("arms.b=5", "arms.b = 5: should be a table"),
        ("arms.b.space=1", "arms.b.space = 1: should be a table"),
        (
            "objective.mode=min",
            "objective: accuracy is better when it is higher: mode must be 'max' or left out",
        ),
        ("freeze.depth=2.5", f"freeze.depth = 2.5: {DEPTH}"),
        ("freeze.depth=-1", f"freeze.depth = -1: {DEPTH}"),
        ("freeze.depth=true", f"freeze.depth = true: {DEPTH}"),
        ("freeze.depth=half", f'freeze.depth = "half": {DEPTH}'),
        ("freeze.depth=nan", f"freeze.depth = NaN: {DEPTH}"),
        (
            "freeze.depth=0.5",
            "freeze: depth is not for strategy = 'full'; it is for freeze_depth, surgical, layer_decay, discriminative, gradual, lp_ft, norm_only, bias_only, lora, dora, auto_rgn",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_allowed(override: str, line: str) -> None:
    assert line in mistakes(BASE, override)


def test_what_is_missing_is_named_and_described() -> None:
    assert mistakes('[arms.a]\nspace."train.lr" = { low = 1e-3 }') == [
        "name: this key is needed. Letters, digits, `_` and `-`; the study's folder is results/NAME unless `results` "
        "says otherwise.",
        "data: this key is needed.",
        "arms.a.strategy: this key is needed. What is frozen when, in every trial of the arm: takes the place of "
        "`freeze.strategy`.",
        'arms.a.space."train.lr".high: this key is needed. The largest value that is drawn.',
    ]


@pytest.mark.parametrize("name", ["range", "choice", "value", "int", "float", "space", "arms"])
def test_an_arm_may_have_any_name(name: str) -> None:
    [line] = mistakes(f'name = "x"\ndata.path = "d"\n[arms.{name}]\nstrategy = "full"\nspace."train.lr" = [0.0]')
    assert line == f'arms.{name}.space."train.lr" = 0.0: should be greater than 0'


def test_an_arm_name_is_a_name() -> None:
    said = "a name is 1 to 64 letters, digits, `_` and `-`, a letter or a digit first"
    assert mistakes(BASE + '[arms."b c"]\nstrategy = "full"\n') == [f'arms."b c": {said}']
    assert mistakes(BASE + '[arms."[key]"]\nstrategy = "full"\n') == [f'arms."[key]": {said}']


ENTRIES = [
    ('"head.hidden" = [0, -1, 1.5, "x"]', 'arms.a.space."head.hidden" = -1: should be greater than or equal to 0'),
    (
        '"head.hidden" = [0, -1, 1.5, "x"]',
        'arms.a.space."head.hidden" = 1.5: should be a whole number, without point and quotes',
    ),
    (
        '"head.hidden" = [0, -1, 1.5, "x"]',
        'arms.a.space."head.hidden" = "x": should be a whole number, without point and quotes',
    ),
    ('"head.hidden" = [[1]]', 'arms.a.space."head.hidden": should be a whole number, without point and quotes'),
    ('"head.hidden" = [true]', 'arms.a.space."head.hidden" = true: should be a whole number, without point and quotes'),
    ('"head.hidden" = [0, 8, 0]', 'arms.a.space."head.hidden" = 0: stands in the list twice'),
    ('"head.hidden" = []', 'arms.a.space."head.hidden": give at least one choice'),
    ('"head.hidden" = 70000', 'arms.a.space."head.hidden" = 70000: should be less than or equal to 65536'),
    (
        '"head.init" = ["probes"]',
        "arms.a.space.\"head.init\" = \"probes\": should be 'random', 'zero' or 'probe'. Did you mean 'probe'?",
    ),
    ('"train.lr" = 1979-01-01', 'arms.a.space."train.lr" = 1979-01-01: should be a number, without quotes'),
    ('"train.lr" = [nan]', 'arms.a.space."train.lr" = NaN: should be a finite number'),
    ('"train.lr" = { low = 0, high = 1 }', 'arms.a.space."train.lr".low = 0: should be greater than 0'),
    ('"train.lr" = { low = 1, high = 11 }', 'arms.a.space."train.lr".high = 11: should be less than or equal to 10'),
    (
        '"train.lr" = { low = "1", high = 2 }',
        'arms.a.space."train.lr".low = "1": should be a number, without quotes',
    ),
    ('"train.lr" = { low = 1, high = 1 }', 'arms.a.space."train.lr": low = 1 must be below high = 1'),
    (
        '"train.lr" = { low = 1, high = 2, step = 0 }',
        'arms.a.space."train.lr".step = 0: should be greater than 0',
    ),
    (
        '"train.lr" = { low = 1, high = 2, log = true, step = 1 }',
        'arms.a.space."train.lr": log and step exclude each other; leave one out, or give a list of choices',
    ),
    (
        '"head.dropout" = { low = 0, high = 0.5, log = true }',
        'arms.a.space."head.dropout": log = true needs low above 0, not 0',
    ),
    (
        '"head.dropout" = { low = 0, high = 0.5, step = 0.2 }',
        'arms.a.space."head.dropout": steps of 0.2 from low = 0 miss high = 0.5; the last value that they reach is 0.4',
    ),
    (
        '"train.epochs" = { low = 1.5, high = 4 }',
        'arms.a.space."train.epochs".low = 1.5: should be a whole number, without point and quotes',
    ),
    (
        '"train.epochs" = { low = 1, high = 4, step = 0.5 }',
        'arms.a.space."train.epochs".step = 0.5: should be a whole number, without point and quotes',
    ),
    (
        '"train.schedule" = { low = 1, high = 4 }',
        'arms.a.space."train.schedule": train.schedule takes no range; give a list of choices',
    ),
    (
        '"freeze.depth" = { low = 0, high = 4 }',
        'arms.a.space."freeze.depth": freeze.depth takes no range; give a list of choices, or "all" to search every depth',
    ),
    ('"freeze.depth" = [0.0, 2.5]', f'arms.a.space."freeze.depth" = 2.5: {DEPTH}'),
    ('"freeze.depth" = 3.0', f'arms.a.space."freeze.depth" = 3.0: {DEPTH}'),
    ('"freeze.depth" = [-1, 2]', f'arms.a.space."freeze.depth" = -1: {DEPTH}'),
    (
        '"freeze.depth" = [0.0, 0.5, 1]',
        'arms.a.space."freeze.depth": 1 is one stage, 1.0 is all; write shares (0.5, 1.0) or numbers of stages (1, 3), not both',
    ),
    (
        '"freeze.depth" = [1, 1.0]',
        'arms.a.space."freeze.depth": 1 is one stage, 1.0 is all; write shares (0.5, 1.0) or numbers of stages (1, 3), not both',
    ),
    (
        '"freeze.strategy" = ["full"]',
        'arms.a.space."freeze.strategy": an arm has one strategy, `strategy` beside its space; write an arm for each strategy',
    ),
    (
        '"data.image_size" = [32, 64]',
        f'arms.a.space."data.image_size": not a key that can be searched. Allowed: {", ".join(searchable_fields())}.',
    ),
    (
        '"trian.lr" = 1e-3',
        f"arms.a.space.\"trian.lr\": not a key that can be searched. Did you mean 'train.lr'? Allowed: {', '.join(searchable_fields())}.",
    ),
    (
        "train = 3",
        f"arms.a.space.train: not a key that can be searched. Allowed: {', '.join(searchable_fields())}.",
    ),
    (
        "train.lr = { low = 1e-5, high = 1e-3 }",
        'arms.a.space.train: a dotted key of a space is written in quotes: "train.lr" = …',
    ),
    (
        "train = { lr = 1e-3, head_lr = 1e-2 }",
        'arms.a.space.train: a dotted key of a space is written in quotes: "train.lr", "train.head_lr" = …',
    ),
]


@pytest.mark.parametrize(("entry", "line"), ENTRIES)
def test_a_wrong_entry_of_a_space_is_one_line_that_says_what_is_allowed(entry: str, line: str) -> None:
    found = mistakes(space(entry))
    assert line in found
    assert len(found) == sum(other == entry for other, _ in ENTRIES)


@pytest.mark.parametrize(
    "entry",
    [
        '"freeze.depth" = [0, 0.5, 1.0]',
        '"freeze.depth" = [0, 1, 3, "all"]',
        '"freeze.depth" = [0.0, 0.05, 2, 1.0]',
        '"freeze.depth" = "all"\n"head.dropout" = { low = 0.1, high = 0.3, step = 0.1 }',
        '"freeze.depth" = "all"\n"train.epochs" = { low = 1.0, high = 9, step = 2.0 }',
        '"freeze.depth" = 0\n"train.clip_norm" = { low = 0.1, high = 1, log = true }',
        '"freeze.depth" = 1.0\n"train.ema" = 0.99\n"train.lr" = [1, 0.1]',
    ],
)
def test_right_entries_of_a_space(entry: str) -> None:
    parse(space(entry))


@pytest.mark.parametrize("path", searchable_fields())
def test_every_searchable_key_takes_its_own_default_and_only_numbers_take_a_range(path: str) -> None:
    depth = "" if path == "freeze.depth" else '"freeze.depth" = "all"\n'
    strategy = OWN_KEYS.get(path.removeprefix("freeze."), ("freeze_depth",))[0]
    default, whole = searchable_fields()[path].default, path in ("freeze.span", "freeze.every", "freeze.rank")
    written = default if default is not None else 1 if whole else 0.5
    for dimension, read in ((json.dumps(written), written), (f"[{json.dumps(written)}]", (written,))):
        assert parse(space(f'{depth}"{path}" = {dimension}', strategy)).arms["a"].space[path] == read
    ranged = space(f'{depth}"{path}" = {{ low = 1, high = 2 }}', strategy)
    if isinstance(written, str | bool) or path == "freeze.depth" or whole:
        assert "takes no range" in mistakes(ranged)[0]
    elif isinstance(written, int):
        assert parse(ranged).arms["a"].space[path] == Range(low=1, high=2)


def test_arms_that_contradict_themselves() -> None:
    assert mistakes(BASE.replace('"freeze_depth"', '"full"')) == [
        "arms.a: freeze: depth is not for strategy = 'full'; it is for freeze_depth, surgical, layer_decay, discriminative, gradual, lp_ft, norm_only, bias_only, lora, dora, auto_rgn"
    ]
    probe = BASE.replace('"freeze_depth"', '"linear_probe"').replace('"all"', "[1, 2, 3]")
    assert mistakes(probe) == [
        "arms.a: freeze: depth is not for strategy = 'linear_probe'; it is for freeze_depth, surgical, layer_decay, discriminative, gradual, lp_ft, norm_only, bias_only, lora, dora, auto_rgn"
    ]


def test_a_contradiction_is_found_in_a_space_of_any_size() -> None:
    wide = "".join(f'"train.{key}" = [0.1, 0.2, 0.3, 0.4]\n' for key in ("head_lr", "warmup", "momentum", "ema"))
    wide += "".join(
        f'"train.{key}" = [0.1, 0.2, 0.3, 0.4]\n' for key in ("weight_decay", "label_smoothing", "clip_norm")
    )
    assert len(mistakes(BASE.replace('"freeze_depth"', '"full"') + wide)) == 1


def test_the_depth_of_a_freeze_depth_arm_comes_from_its_space_or_from_the_job() -> None:
    text = 'name = "x"\ndata.path = "d"\n[arms.a]\nstrategy = "freeze_depth"\n'
    assert mistakes(text) == [
        'arms.a: strategy = "freeze_depth" needs space."freeze.depth", for example "all" or [0.0, 0.5, 1.0]'
    ]
    parse(text, "freeze.strategy=freeze_depth", "freeze.depth=2")


def test_trials_are_shared_equally() -> None:
    two = BASE + '[arms.b]\nstrategy = "full"\n'
    assert mistakes(two, "search.trials=25") == [
        "search.trials = 25: not an equal share for each of 2 arms; 24 or 26 is"
    ]
    assert mistakes(two, "search.trials=1") == ["search.trials = 1: not an equal share for each of 2 arms; 2 is"]
    parse(two, "search.trials=26")


def test_a_grid_takes_no_open_range() -> None:
    line = (
        'arms.a.space."train.lr": a grid needs a list of choices, or a range with a step or of whole numbers, '
        "not an open range"
    )
    assert mistakes(BASE, "search.sampler=grid") == [line]
    assert mistakes(BASE, "arms.a.sampler=grid") == [line]
    parse(BASE, "search.sampler=grid", "arms.a.sampler=tpe")
    whole = '"head.hidden" = { low = 0, high = 4 }\n"head.dropout" = { low = 0.0, high = 0.5, step = 0.25 }\n'
    parse(BASE + whole, "search.sampler=grid", 'arms.a.space."train.lr"=[1e-3, 1e-4]')


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr = 1e-3", "train.lr", 1e-3),
        ("train.epochs=7", "train.epochs", 7),
        ("data.path=photos/", "data.path", "photos/"),
        ("data.path=s3://bucket/a=b.parquet", "data.path", "s3://bucket/a=b.parquet"),
        ("data.path='two words'", "data.path", "two words"),
        ("data.path=two words", "data.path", "two words"),
        ('data.path=\\\\host\\share\\"é😀\x7f\t#1', "data.path", '\\\\host\\share\\"é😀\x7f\t#1'),
        ('"data"."path"=x/y', "data.path", "x/y"),
        ("search.pruner.kind=median", "search.pruner.kind", "median"),
        ("search.defaults=false", "search.defaults", False),
        ("freeze={strategy='freeze_depth', depth=1.0}", "freeze.depth", 1.0),
    ],
)
def test_overrides(override: str, path: str, value: Any) -> None:
    found: Any = parse(BASE, override)
    for name in path.split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


def test_overrides_reach_into_a_space_and_the_last_one_wins() -> None:
    low = 'arms.a.space."train.lr".low=1e-6'
    assert parse(BASE, low).arms["a"].space["train.lr"] == Range(low=1e-6, high=1e-3, log=True)
    assert parse(BASE, 'arms.a.space."train.lr"=[1e-3]').arms["a"].space["train.lr"] == (1e-3,)
    assert parse(BASE, "arms.b.strategy=full").arms["b"] == Arm(strategy="full")
    assert parse(BASE, "train.epochs=3", "train.epochs=4").train.epochs == 4


@pytest.mark.parametrize("override", ["train.lr", "", "=3", " =3"])
def test_an_override_needs_a_key_and_a_value(override: str) -> None:
    assert mistakes(BASE, override) == [f"{override!r}: an override is written key=value, for example train.lr=1e-3"]


@pytest.mark.parametrize("key", ["a b", "train..lr", "train.", "[train]", 'train."lr', "a" + ".a" * 600])
def test_an_override_needs_a_dotted_key(key: str) -> None:
    said = 'is not a dotted key, for example train.lr or arms.NAME.space."train.lr"'
    assert mistakes(BASE, f"{key}=3") == [f"{f'{key}=3'!r}: {key!r} {said}"]


def test_overrides_of_a_job_from_python_leave_the_data_alone() -> None:
    raw = {"name": "x", "data": {"path": "digits"}}
    assert parse_job(raw, ["train.lr=1e-2", "data.val=0.2"]).data.val == 0.2
    assert raw == {"name": "x", "data": {"path": "digits"}}


def test_numbers_are_read_as_toml_has_them() -> None:
    assert isinstance(parse(BASE, "train.lr=1e-4").train.lr, float)
    assert parse(BASE, "train.lr=1").train.lr == 1.0
    for written, depth in (("1", 1), ("1.0", 1.0), ("0", 0), ("0.0", 0.0)):
        job = parse(BASE, "freeze.strategy=freeze_depth", f"freeze.depth={written}")
        assert (job.freeze.depth, type(job.freeze.depth)) == (depth, type(depth))


def said(path: Path) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path)
    return str(caught.value)


def test_a_file_that_is_no_job_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    assert said(path) == f"{path}: no such file; `frostline init {path}` writes a job file to start from"
    assert said(tmp_path) == f"{tmp_path}: Is a directory; name a job file (TOML)"
    path.write_text("data.path = photos/\n")
    assert said(path) == f"{path}: not a TOML file: Invalid value (at line 1, column 13); text is written in quotes"
    path.write_text('name = "x"\nname = "y"\n')
    assert said(path) == f"{path}: not a TOML file: Cannot overwrite a value (at line 2, column 11)"
    path.write_bytes(b'name = "\xff"\n')
    assert said(path).startswith(f"{path}: not a TOML file: 'utf-8' codec can't decode byte 0xff")
    path.write_text("nam = 3\n")
    assert said(path).startswith(f"{path}: 3 mistakes\n  name: this key is needed.")


def test_a_file_that_would_take_long_to_read_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("#" * (MAX_JOB_BYTES + 1))
    assert said(path) == f"{path}: a job file of more than 64 KiB is not read"
    assert said(Path("/dev/zero")) == "/dev/zero: a job file of more than 64 KiB is not read"
    path.write_text("a." * 30_000 + "a = 1")  # takes tomllib gigabytes
    assert said(path) == f"{path}: not a TOML file: a line of more than 500 dots is not read; break it up"
    path.write_text("a." * 400 + "a = 1")
    assert said(path) == f"{path}: {'a.' * 12}a: nested too deep; a job's tables are at most 12 levels deep"
    path.write_text("a = " + "[" * 20_000)
    assert said(path).startswith(f"{path}: not a TOML file: maximum recursion depth exceeded")
    path.write_text("seed = " + "1" * 5_000)
    assert said(path).startswith(f"{path}: not a TOML file: Exceeds the limit")
    path.write_text("seed = 0x1" + "0" * 5_000)
    assert said(path) == f"{path}: seed: an integer of more than 64 bits"


def test_a_job_survives_json_and_is_read_from_it_again() -> None:
    job = parse(BASE + '"head.hidden" = { low = 0, high = 8 }\n"train.momentum" = [0, 0.5]\n"freeze.norm" = "affine"\n')
    assert Job.model_validate(job.model_dump(mode="json")) == job
    assert Job.model_validate_json(job.model_dump_json()) == job
    again = job.model_dump(mode="json", exclude_none=True)
    assert parse_job(again) == job


WORDS = st.sampled_from(
    sorted(
        {word for key in known_keys() for word in key.split(".")} | {*searchable_fields(), "low", "high", "log", "a"}
    )
)
SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(1 << 64), 1 << 64),
    st.integers(-2, 40),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=6),
    st.sampled_from(["full", "freeze_depth", "tpe", "grid", "all", "probe", "digits", "frozen", "sgd"]),
    st.dates(),
    st.datetimes(),
    st.times(),
)
KEYS = WORDS | st.text(max_size=4)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def set_at(tree: Any, path: list[str], value: Any) -> None:
    for word in path[:-1]:
        if not isinstance(tree.get(word), dict):
            tree[word] = {}
        tree = tree[word]
    tree[path[-1]] = value


PATHS = st.one_of(
    st.sampled_from([key.split(".") for key in known_keys()]),
    st.tuples(st.just("arms"), WORDS, st.just("space"), st.sampled_from(sorted(searchable_fields()))).map(list),
    st.tuples(
        st.just("arms"), st.just("a"), st.just("space"), WORDS, st.sampled_from(["low", "high", "log", "step", "lo"])
    ).map(list),
    st.tuples(st.just("arms"), st.just("a"), WORDS).map(list),
    st.lists(KEYS, min_size=1, max_size=6),
)


def check_outcome(raw: dict[str, Any], overrides: list[str]) -> None:
    """Anything but a Job or a JobError fails; so does a Job that JSON does not keep, or a text that no terminal shows."""
    try:
        job = parse_job(raw, overrides)
    except JobError as error:
        told = str(error)
    else:
        told = ""
        assert Job.model_validate_json(job.model_dump_json()) == job
    head, *lines = told.split("\n")
    assert not lines or head == f"job: {len(lines)} mistake{'s' * (len(lines) != 1)}"
    assert told.replace("\n", "").isprintable()


@given(st.dictionaries(KEYS, TREES, max_size=5), st.lists(st.text(max_size=12), max_size=2))
def test_any_data_gives_a_job_or_a_job_error(raw: dict[str, Any], overrides: list[str]) -> None:
    check_outcome(raw, overrides)


@given(st.lists(st.tuples(PATHS, TREES), min_size=1, max_size=4))
@example([(["arms", "a", "space", "head.dropout"], {"low": -1e308, "high": 1e308, "step": 1e-308})])
@example([(["arms", "a", "space", "train.lr", "range"], 3)])
@example([(["data", "path"], datetime.date(2024, 5, 1))])
@example([(["name"], "\ud800")])
def test_a_job_with_anything_changed_is_a_job_or_a_job_error(changes: list[tuple[list[str], Any]]) -> None:
    raw = tomllib.loads(BASE)
    for path, value in changes:
        set_at(raw, path, value)
    check_outcome(raw, [])


def test_known_keys_are_those_of_the_models() -> None:
    assert {"name", "train", "train.lr", "search.pruner", "search.pruner.kind"} <= set(known_keys())
    assert len(known_keys()) == len(set(known_keys()))
    assert all(issubclass(model, BaseModel) for model in section_models().values())
    assert all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", key) for key in known_keys())


def test_a_job_is_written_as_it_was_read() -> None:
    raw = {
        "name": "x",
        "data": {"path": 'a "b"\\ü', "per_class": None},
        "arms": {
            "space": {
                "strategy": "full",
                "space": {"train.lr": {"low": 1e-5, "high": 0.1, "log": True}, "head.hidden": [0, 16]},
            }
        },
    }
    text = "\n".join(as_toml(raw))
    assert parse_job(tomllib.loads(text)) == parse_job({**raw, "data": {"path": raw["data"]["path"]}})
