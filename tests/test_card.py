"""Model cards hold whatever classes and data are called."""

from __future__ import annotations

import pytest
import yaml

from frostline.card import dataset_name, model_card
from frostline.seeds import Seeds
from frostline.spec import Augment, BackboneSpec, Data, Features, Freeze, Head, Objective, Resources, Train
from frostline.trialspec import Config, TrialSpec

ROW = {
    "freeze_depth": 1,
    "head_depth": 2,
    "trainable_params": 10,
    "total_params": 20,
    "n_train": 5,
    "epochs": 2,
    "n_test": 7,
    "test_accuracy": 0.5,
    "test_nll": 1.25,
}


def spec(path: str) -> TrialSpec:
    numbers = dict.fromkeys(Seeds.model_fields, 0)
    return TrialSpec(
        trial_id="a-1",
        arm="a",
        number=1,
        round="confirm",
        seed=3,
        seeds=Seeds(**numbers),
        data=Data(path=path, image_size=16),
        backbone=BackboneSpec(name='odd: "name"'),
        config=Config(freeze=Freeze(strategy="freeze_depth", depth=1), head=Head(hidden=4), train=Train()),
        augment=Augment(),
        features=Features(),
        objective=Objective(),
        resources=Resources(),
    )


def test_names_do_not_break_out() -> None:
    text = model_card(spec("s3://bucket/photos?region=x"), ["stem", "top"], ["a`b|c", "x\n---"], ROW)
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["base_model"] == 'odd: "name"'
    assert card["metrics"] == ["accuracy", "nll"]
    assert card["model-index"][0]["results"][0]["dataset"]["name"] == "photos"
    assert "a`b" not in body
    assert "| test | 7 | 0.5000 | 1.2500 |" in body
    assert "1 of 2 stages frozen (`stem`)" in body
    assert "an MLP of 4 units" in body


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("digits", "digits"),
        ("/data/photos/", "photos"),
        ("s3://bucket/a/b.parquet?region=eu", "b.parquet"),
        ("s3://user:word@bucket", "bucket"),
        ("/", "data"),
    ],
)
def test_data_is_called_by_its_last_name(path: str, name: str) -> None:
    assert dataset_name(path) == name
