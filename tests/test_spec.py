import hashlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given
from pydantic import BaseModel, ValidationError

from frostline import spec
from frostline.models import Range, digest
from frostline.seeds import Seeds, derive_seed
from frostline.spec import (
    Arm,
    Freeze,
    Head,
    Job,
    Objective,
    Train,
    holds_integers,
    is_searched,
    searchable_fields,
    section_models,
    takes_range,
)
from frostline.trialspec import Config, TrialSpec, configure, confirm_seeds, search_seeds, trial_of

MODELS = [Job, Arm, Range, *section_models().values()]
STREAMS = ("split", "subset", "order", "head", "dropout")


def job(**keys: Any) -> Job:
    return Job.model_validate({"name": "x", "data": {"path": "digits"}, **keys})


FREEZES = st.one_of(
    st.builds(Freeze, strategy=st.sampled_from(["full", "linear_probe"]), norm=st.sampled_from(["frozen", "batch"])),
    st.builds(
        Freeze,
        strategy=st.just("freeze_depth"),
        depth=st.integers(0, 50) | st.floats(0, 1).map(abs) | st.just("all"),
        layer_decay=st.floats(0, 1, exclude_min=True),
    ),
)
CONFIGS = st.builds(
    Config,
    freeze=FREEZES,
    head=st.builds(Head, hidden=st.integers(0, 65536), dropout=st.floats(0, 0.99).map(abs)),
    train=st.builds(
        Train,
        lr=st.floats(0, 10, exclude_min=True),
        epochs=st.integers(1, 10_000),
        clip_norm=st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    ),
)


@pytest.mark.parametrize("model", MODELS)
def test_every_key_is_described(model: type[BaseModel]) -> None:
    sections = set(section_models().values())
    for name, field in model.model_fields.items():
        if field.annotation not in sections and name != "arms":
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize("model", MODELS)
def test_specs_are_frozen_and_know_their_keys(model: type[BaseModel]) -> None:
    made: Any = {Job: job(), Arm: Arm(strategy="full"), Range: Range(low=0, high=1)}.get(model)
    made = made or model.model_validate({"path": "x"} if model is spec.Data else {})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(model.model_fields)), 1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        model.model_validate({**made.model_dump(), "nokey": 1})


def test_types_are_as_written() -> None:
    for section, key, value in (
        ("train", "lr", "1e-3"),
        ("train", "epochs", True),
        ("train", "epochs", 3.0),
        ("train", "lr", float("nan")),
        ("train", "lr", float("inf")),
        ("search", "defaults", 1),
        ("data", "path", 1),
        ("freeze", "depth", True),
    ):
        with pytest.raises(ValidationError):
            section_models()[section].model_validate(
                {"path": "x"} | {key: value} if section == "data" else {key: value}
            )
    assert isinstance(Train(lr=1).lr, float)


def test_a_depth_says_in_one_message_what_it_may_be() -> None:
    for wrong in (2.5, -1, -0.5, 1.5, True, "half", [1], float("nan")):
        with pytest.raises(ValidationError) as caught:
            Freeze.model_validate({"strategy": "freeze_depth", "depth": wrong})
        [error] = caught.value.errors()
        assert error["loc"] == ("depth",)
        assert error["msg"] == (
            "Value error, a depth is a whole number of stages (1 = one stage), a share of them from 0.0 to 1.0 "
            '(1.0 = all), or "all"'
        )


@pytest.mark.parametrize("depth", [0, 0.0, 1, 1.0, 0.5, 7, "all"])
def test_a_depth_keeps_its_type_over_json(depth: Any) -> None:
    freeze = Freeze(strategy="freeze_depth", depth=depth)
    for again in (
        Freeze.model_validate(freeze.model_dump(mode="json")),
        Freeze.model_validate_json(freeze.model_dump_json()),
        Freeze.model_validate_json(json.dumps(freeze.model_dump(mode="json"))),
        Freeze.model_validate(json.loads(freeze.model_dump_json())),
    ):
        assert (again.depth, type(again.depth)) == (depth, type(depth))


@given(CONFIGS)
def test_a_trial_spec_survives_json(config: Config) -> None:
    study = job()
    seed, seeds = search_seeds(study, "a", 0)
    trial = trial_of(study, config, seeds, trial_id="a-0", arm="a", number=0, round="search", seed=seed)
    for again in (
        TrialSpec.model_validate_json(trial.model_dump_json()),
        TrialSpec.model_validate(trial.model_dump(mode="json")),
        TrialSpec.model_validate(json.loads(json.dumps(trial.model_dump(mode="json")))),
    ):
        assert again == trial
        assert again.config.id == config.id
        assert type(again.config.freeze.depth) is type(config.freeze.depth)


@given(CONFIGS, CONFIGS)
def test_config_ids_differ_where_configurations_do(one: Config, two: Config) -> None:
    assert (one.id == two.id) == (one.model_dump_json() == two.model_dump_json())


def test_config_ids_are_equal_however_a_configuration_was_written() -> None:
    plain = configure(job(), Arm(strategy="full"), {})
    assert len(plain.id) == 16
    written = [
        configure(job(train={"lr": 3e-4, "momentum": 0.9}, head={"hidden": 0}), Arm(strategy="full"), {}),
        configure(job(train={"momentum": 0.9, "lr": 0.0003}), Arm(strategy="full"), {}),
        configure(job(train={"lr": 1}), Arm(strategy="full"), {"train.lr": 3e-4}),
        configure(job(), Arm.model_validate({"strategy": "full", "space": {"train.lr": 3e-4}}), {}),
        configure(job(freeze={"strategy": "linear_probe"}), Arm(strategy="full"), {}),
        Config.model_validate_json(plain.model_dump_json()),
        Config(freeze=Freeze(), head=Head(), train=Train()),
    ]
    assert {config.id for config in written} == {plain.id}
    share, count = (configure(job(), Arm(strategy="freeze_depth"), {"freeze.depth": depth}).id for depth in (1.0, 1))
    assert share != count


def test_whole_numbers_in_a_float_key_are_floats() -> None:
    assert Config(freeze=Freeze(), head=Head(), train=Train(lr=1)).id == (
        Config(freeze=Freeze(), head=Head(), train=Train(lr=1.0)).id
    )


def test_an_id_is_pinned() -> None:
    text = '{"a":[1,2.5,null],"b":"x"}'
    assert digest({"b": "x", "a": [1, 2.5, None]}) == hashlib.sha256(text.encode()).hexdigest()[:16]


ROOTS = st.integers(0, (1 << 31) - 1)


@given(ROOTS, st.text(max_size=5), st.integers(0, 10**6), st.integers(0, 1000))
def test_search_seeds_never_equal_confirm_seeds(root: int, arm: str, number: int, index: int) -> None:
    searched, confirmed = search_seeds(job(seed=root), arm, number)[0], confirm_seeds(job(seed=root), index)[0]
    assert 0 <= searched < 1 << 30 <= confirmed < 1 << 31


@given(ROOTS, st.integers(0, 1000), st.integers(0, 1000))
def test_each_use_of_randomness_has_a_seed_of_its_own(root: int, number: int, other: int) -> None:
    assume(number != other)
    study = job(seed=root)
    for draw in (lambda n: search_seeds(study, "a", n), lambda n: confirm_seeds(study, n)):
        (seed, seeds), (other_seed, others) = draw(number), draw(other)
        assert seed != other_seed
        assert len({getattr(seeds, name) for name in STREAMS}) == len(STREAMS)
        assert seeds.split == others.split
        assert seeds.head != others.head
        assert seeds.dropout != others.dropout
    search, confirm = search_seeds(study, "a", number)[1], confirm_seeds(study, number)[1]
    assert search.split == confirm.split
    assert all(getattr(search, name) != getattr(confirm, name) for name in STREAMS if name != "split")


@given(ROOTS, st.integers(0, 1000), st.sampled_from(["full", "linear_probe"]), st.floats(1e-6, 1))
def test_changing_what_a_search_varies_changes_no_stream(root: int, number: int, strategy: Any, lr: float) -> None:
    plain = job(seed=root, arms={"a": {"strategy": "freeze_depth", "space": {"freeze.depth": "all"}}})
    other = job(
        seed=root,
        arms={"a": {"strategy": strategy}, "b": {"strategy": "full"}},
        train={"lr": lr},
        head={"hidden": 8},
        search={"sampler": "random"},
    )
    assert search_seeds(plain, "a", number) == search_seeds(other, "a", number)
    assert confirm_seeds(plain, number) == confirm_seeds(other, number)


def test_search_trials_share_split_subset_and_order_and_confirmations_redraw_them_in_pairs() -> None:
    study = job(seed=3)
    searched = [search_seeds(study, arm, number)[1] for arm in "ab" for number in range(50)]
    for name in ("split", "subset", "augment", "order"):
        assert len({getattr(seeds, name) for seeds in searched}) == 1
    for name in ("head", "dropout"):
        assert len({getattr(seeds, name) for seeds in searched}) == 100
    confirmed = [confirm_seeds(study, index)[1] for index in range(50)]
    assert len({seeds.split for seeds in confirmed}) == 1
    for name in ("subset", "augment", "order", "head", "dropout"):
        assert len({getattr(seeds, name) for seeds in confirmed}) == 50


def test_seeds_are_pinned() -> None:
    digits = hashlib.sha256(b'[7, "search", "a", 3]').digest()[:4]
    assert derive_seed(7, "search", "a", 3) == int.from_bytes(digits, "big") >> 2
    seeds = search_seeds(job(seed=7), "a", 3)[1]
    assert seeds == Seeds(
        split=79131147,
        subset=319930350,
        augment=611109824,
        order=89000190,
        head=364616919,
        dropout=609041014,
        init=943427837,
    )


@given(ROOTS, st.lists(st.integers(0, 99) | st.text(max_size=3), min_size=1, max_size=3), st.data())
def test_different_names_give_different_seeds(root: int, names: list[Any], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(0, 99) | st.text(max_size=3), min_size=1, max_size=3))
    assert (derive_seed(root, *names) == derive_seed(root, *other)) == (names == other)
    assert 0 <= derive_seed(root, *names) < 1 << 30


def test_a_configuration_is_the_job_with_the_arm_and_its_values_laid_over_it() -> None:
    study = job(train={"lr": 1e-3, "epochs": 3}, freeze={"norm": "affine"}, head={"hidden": 8})
    arm = Arm.model_validate(
        {
            "strategy": "freeze_depth",
            "space": {"freeze.depth": "all", "train.momentum": 0.5, "head.hidden": [0, 4], "freeze.norm": "batch"},
        }
    )
    assert configure(study, arm, {"freeze.depth": 2, "head.hidden": 4}) == Config(
        freeze=Freeze(strategy="freeze_depth", depth=2, norm="batch"),
        head=Head(hidden=4),
        train=Train(lr=1e-3, epochs=3, momentum=0.5),
    )
    with pytest.raises(ValidationError, match="needs depth"):
        configure(study, arm, {"head.hidden": 4})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        configure(study, arm, {"freeze.depth": 2, "head.hidden": -4})


def test_what_of_a_space_is_searched() -> None:
    assert is_searched("train.lr", Range(low=1, high=2))
    assert is_searched("train.lr", (1.0,))
    assert is_searched("freeze.depth", "all")
    assert not is_searched("freeze.depth", 0.5)
    assert not is_searched("freeze.norm", "all")


@pytest.mark.parametrize(
    ("range_", "message"),
    [
        ({"low": 1, "high": 1}, "low = 1 must be below high = 1"),
        ({"low": 0, "high": 1, "log": True}, "log = true needs low above 0, not 0"),
        ({"low": 1, "high": 3, "log": True, "step": 1}, "log and step exclude each other"),
        ({"low": 0, "high": 1, "step": 0}, "greater than 0"),
        ({"low": 0, "high": 1, "step": 0.3}, "steps of 0.3 from low = 0 miss high = 1; the last value .* is 0.9"),
        (
            {"low": 0, "high": 1, "step": 2},
            "steps of 2 from low = 0 miss high = 1; the last value that they reach is 0 ",
        ),
        ({"low": -1e308, "high": 1e308, "step": 1e-308 * 3}, "the last value that they reach"),
    ],
)
def test_what_is_no_range(range_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Range.model_validate(range_)


@given(st.integers(-1000, 1000), st.integers(1, 1000), st.integers(1, 50), st.sampled_from([1, 10, 100, 1000]))
def test_steps_in_decimals_reach_the_end(low: int, step: int, count: int, places: int) -> None:
    ends = {"low": low / places, "high": (low + step * count) / places, "step": step / places}
    assert Range.model_validate(ends).step == step / places


def test_the_direction_of_a_metric_is_its_own() -> None:
    assert Objective().mode == Objective(metric="macro_f1", mode="max").mode == "max"
    assert Objective(metric="nll").mode == "min"
    with pytest.raises(ValidationError, match="nll is better when it is lower: mode must be 'min' or left out"):
        Objective(metric="nll", mode="max")


def test_keys_that_can_be_searched() -> None:
    assert set(searchable_fields()) == {
        f"{section}.{key}" for section in ("freeze", "head", "train") for key in section_models()[section].model_fields
    } - {"freeze.strategy"}
    assert {path for path in searchable_fields() if holds_integers(path)} == {
        "head.hidden",
        "train.epochs",
        "train.batch_size",
    }
    assert {path for path in searchable_fields() if not takes_range(path)} == {
        *(
            "freeze.depth",
            "freeze.span",
            "freeze.every",
            "freeze.rank",
            "freeze.norm",
            "head.depth",
            "head.init",
            "train.optimizer",
            "train.schedule",
            "train.precision",
            "train.compile",
            "train.class_weights",
        )
    }


def test_sections_come_with_the_sections_in_them() -> None:
    assert list(section_models()) == [
        *(
            "data",
            "backbone",
            "freeze",
            "head",
            "train",
            "augment",
            "features",
            "objective",
            "resources",
            "scaling",
            "search",
            "search.pruner",
            "confirm",
        )
    ]


def test_a_study_lives_in_its_folder() -> None:
    assert job().folder == Path("results/x")
    assert job(results="/data/y").folder == Path("/data/y")
