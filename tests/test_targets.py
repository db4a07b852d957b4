"""Several labels and numbers, from the table to the served answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import expit

import frostline
from frostline import results
from frostline.bundle import load_bundle
from frostline.commit import read_table
from frostline.data import DataError, load_data
from frostline.export import export_bundle
from frostline.intake import IMAGE, Limits
from frostline.jobfile import JobError, parse_job
from frostline.metrics import scores
from frostline.openapi import describe
from frostline.parts import schema_of
from frostline.predict import predict_data
from frostline.prepare import prepare
from frostline.probe_text import to_json as probed
from frostline.report import write_report
from frostline.spec import Data, Task
from frostline.targets import EVERY, FURTHER, Target
from frostline.testing import SHAPES, target_table, text_encoder, toy_job
from frostline.web import predictions

TASKS: list[Task] = ["multilabel", "regression"]


def job_of(folder: Path, task: Task, overrides: tuple[str, ...] = (), **sections: Any):
    table = target_table(folder / f"{task}.parquet", task, count=96)
    data = {"path": str(table), "task": task, "image_size": 16}
    return toy_job(folder / "study", overrides, data=data, **sections)


@pytest.fixture(params=TASKS, scope="module")
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """A search of each task, in this process, with packs."""
    folder = tmp_path_factory.mktemp(request.param)
    own = ("search.trials=8", "confirm.seeds=2", "train.epochs=8", "train.batch_size=16", "search.pruner.kind=none")
    job = job_of(folder, request.param, own)
    frostline.search(job, inline=True)
    return request.param, folder / "study"


# --- the job


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"data": {"path": "p", "task": "regression", "per_class": 5}},
            "data.per_class = 5: data.task = 'regression' has",
        ),
        (
            {"data": {"path": "p", "task": "multilabel"}, "objective": {"metric": "accuracy"}},
            "scored by micro_f1, macro",
        ),
        ({"data": {"path": "p"}, "objective": {"metric": "rmse"}}, "'classification' is scored by accuracy"),
        (
            {"data": {"path": "p", "task": "regression"}, "train": {"class_weights": "balanced"}},
            "train.class_weights = 'balanced': is not for",
        ),
        (
            {"data": {"path": "p", "task": "regression"}, "space": {"train.label_smoothing": [0.0, 0.1]}},
            'arms.a.space."train.label_smoothing": is not for',
        ),
    ],
)
def test_what_is_not_for_the_task_is_told(raw: dict[str, Any], said: str) -> None:
    space = raw.pop("space", {"train.lr": [1e-3, 1e-2]})
    with pytest.raises(JobError, match=said.replace(".", r"\.")):
        parse_job({"name": "x", **raw, "arms": {"a": {"strategy": "full", "space": space}}})


def test_each_task_has_a_usual_metric() -> None:
    found = {}
    for task in ("classification", *TASKS):
        objective = parse_job({"name": "x", "data": {"path": "p", "task": task}}).objective
        found[task] = objective.metric, objective.mode
    assert found == {
        "classification": ("accuracy", "max"),
        "multilabel": ("average_precision", "max"),
        "regression": ("rmse", "min"),
    }
    assert (
        parse_job({"name": "x", "data": {"path": "p", "task": "regression"}}, ["objective.metric=r2"]).objective.mode
        == "max"
    )


# --- the data


def test_labels_are_indicators_and_every_split_has_each(tmp_path: Path) -> None:
    path = target_table(tmp_path / "t.parquet", "multilabel", 96)
    dataset = load_data(Data(path=str(path), task="multilabel", image_size=16), 0)
    assert dataset.classes == SHAPES
    assert dataset.labels.shape == (96, 3)
    assert dataset.target == Target("multilabel")
    listed = pq.read_table(path)["label"].to_pylist()
    assert [[s for s, has in zip(SHAPES, row, strict=True) if has] for row in dataset.labels] == listed
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        chosen = dataset.labels[dataset.indices(split)]
        assert abs(len(chosen) - share * 96) < 1.5
        assert (abs(chosen.sum(axis=0) - share * dataset.labels.sum(axis=0)) <= 3).all()


def test_numbers_are_standardised_by_train(tmp_path: Path) -> None:
    path = target_table(tmp_path / "t.parquet", "regression", 60)
    dataset = load_data(Data(path=str(path), task="regression", image_size=16), 0)
    assert dataset.classes == ("label",)
    assert dataset.labels[:, 0].tolist() == pq.read_table(path)["label"].to_pylist()
    own = dataset.targets(dataset.indices("train"))
    assert own.mean() == pytest.approx(0, abs=1e-6)
    assert own.std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(dataset.target.in_units(dataset.targets(np.arange(60))), dataset.labels, rtol=1e-6)


def texts_with(folder: Path, name: str, content: str, **data: Any) -> Data:
    path = folder / name
    path.write_text(content)
    encoder = text_encoder(folder / "encoder") if not (folder / "encoder").is_dir() else f"text/{folder / 'encoder'}"
    return Data.model_validate({"path": str(path), "tokenizer": encoder, "max_tokens": 16, **data})


def test_tables_of_texts_have_them_too(tmp_path: Path) -> None:
    rows = [("old ship", "sea|old"), ("new bread", "food"), ("rain", ""), ("old oven", "food|old")] * 3
    lines = "\n".join(f"{text} {number},{label}" for number, (text, label) in enumerate(rows))
    found = load_data(
        texts_with(tmp_path, "t.csv", f"text,label\n{lines}\n", task="multilabel", label_separator="|"), 0
    )
    assert found.classes == ("food", "old", "sea")
    assert found.labels[:4].tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    lines = "\n".join(json.dumps({"text": f"rain {n}", "label": n / 2}) for n in range(12))
    found = load_data(texts_with(tmp_path, "t.jsonl", lines, task="regression"), 0)
    assert found.labels[:, 0].tolist() == [n / 2 for n in range(12)]


def test_labels_that_are_no_numbers_are_listed_with_their_samples(tmp_path: Path) -> None:
    rows = [*(f"rain {n},{n}" for n in range(12)), "salt,tall", "rose,inf"]
    content = "\n".join(["text,label", *rows, ""])
    spec = texts_with(tmp_path, "t.csv", content, task="regression")
    with pytest.raises(
        DataError, match=r"(?s)2 problem\(s\).*2 x label.*t\.csv:12: label: 'tall' is no number"
    ) as told:
        load_data(spec, 0)
    assert "t.csv:13: label: 'inf' is not finite" in str(told.value)
    kept = load_data(spec.model_copy(update={"on_bad": "exclude"}), 0)
    assert len(kept.labels) == 12
    assert [why for _, why in kept.excluded] == ["label: 'tall' is no number", "label: 'inf' is not finite"]


def test_numbers_that_are_all_equal_and_labels_that_nobody_has_teach_nothing(tmp_path: Path) -> None:
    lines = "\n".join(["text,label", *(f"rain {n},7" for n in range(9)), ""])
    with pytest.raises(DataError, match="all labels are 7; nothing can be learnt"):
        load_data(texts_with(tmp_path, "t.csv", lines, task="regression"), 0)
    lines = "\n".join(["text,label", *(f"rain {n}," for n in range(9)), ""])
    with pytest.raises(DataError, match="no sample has any label in column 'label'"):
        load_data(texts_with(tmp_path, "u.csv", lines, task="multilabel"), 0)


def test_a_table_of_lists_says_that_there_is_multilabel(tmp_path: Path) -> None:
    path = target_table(tmp_path / "t.parquet", "multilabel", 24)
    with pytest.raises(DataError, match=r"column 'label' holds \[.*there is multilabel, too"):
        load_data(Data(path=str(path), image_size=16), 0)


def test_an_objective_that_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = pq.read_table(target_table(path, "regression", 40))
    splits = ["train"] * 30 + ["val"] * 5 + ["test"] * 5
    labels = [*rows["label"].to_pylist()[:30], *[7.0] * 10]
    pq.write_table(pa.table({"image": rows["image"], "label": labels, "split": splits}), path)
    data = {"path": str(path), "task": "regression", "image_size": 16}
    with pytest.raises(DataError, match="'r2' explains what varies, and in val all labels are 7"):
        prepare(toy_job(tmp_path / "study", ["objective.metric=r2"], data=data))
    prepare(toy_job(tmp_path / "study", data=data))


# --- a search


def test_rows_have_the_scores_of_their_task_and_no_others(searched: tuple[Task, Path]) -> None:
    task, study = searched
    trials, epochs = results.read_trials(study).to_pylist(), results.read_epochs(study).to_pylist()
    assert {row["status"] for row in trials if row["round"] == "confirm"} == {"complete"}
    every = {name for names in EVERY.values() for name in names} - {"nll"}
    for row in epochs:
        assert {name for name in every if row[f"val_{name}"] is not None} == {*EVERY[task]} - {"nll"}
        assert row["val_loss"] > 0
    confirmed = [row for row in trials if row["round"] == "confirm"]
    for row in confirmed:
        for name in (*EVERY[task], *FURTHER[task]):
            assert row[f"test_{name}"] is not None
        assert row["test_accuracy"] is None
    probes = results.read_probes(study).to_pylist()
    assert {row["method"] for row in probes} == {"ridge"}
    assert None not in {row["val_score"] for row in probes}


def test_training_tells_something(searched: tuple[Task, Path]) -> None:
    task, study = searched
    confirmed = [row for row in results.read_trials(study).to_pylist() if row["round"] == "confirm"]
    if task == "regression":
        assert all(row["test_r2"] > 0.2 for row in confirmed)
        assert all(row["test_score"] == row["test_rmse"] < 5 for row in confirmed), "in pixels"
    else:
        assert all(row["test_average_precision"] > 0.7 for row in confirmed)


def test_predictions_are_what_was_scored(searched: tuple[Task, Path]) -> None:
    task, study = searched
    rows = results.read_predictions(study).to_pylist()
    trials = {row["trial_id"]: row for row in results.read_trials(study).to_pylist()}
    for trial_id in {row["trial_id"] for row in rows}:
        own = [row for row in rows if row["trial_id"] == trial_id]
        if task == "regression":
            off = np.array([row["predicted_value"] - row["value"] for row in own])
            assert np.sqrt(np.square(off).mean()) == pytest.approx(trials[trial_id]["test_rmse"], rel=1e-6)
        else:
            said = np.array([row["probabilities"] for row in own]) > 0.5
            true = np.zeros_like(said)
            for row, each in zip(true, own, strict=True):
                row[each["labels"]] = True
            assert (said == true).all(axis=1).mean() == pytest.approx(trials[trial_id]["test_exact_match"])


def test_a_study_is_compared_reported_and_queried(searched: tuple[Task, Path]) -> None:
    task, study = searched
    metric = "rmse" if task == "regression" else "average_precision"
    assert frostline.compare([study]).metric == metric
    page = write_report(study).read_text()
    assert ("Predicted and true label" if task == "regression" else "F1 of each label on test") in page
    count = results.query(study, "select count(*) n from predictions where label is not null")
    assert count["n"].to_pylist() == [0]


# --- the model


def bundle_folder(study: Path) -> Path:
    return study / "bundle"


def test_a_bundle_gives_what_was_scored_in_the_unit_of_the_data(searched: tuple[Task, Path]) -> None:
    task, study = searched
    bundle = load_bundle(bundle_folder(study))
    rows = [row for row in results.read_predictions(study).to_pylist() if row["trial_id"] == bundle.spec.trial_id]
    table = pq.read_table(bundle.spec.data.path).to_pylist()
    said = bundle.predict([table[int(row["sample_id"].rpartition(":")[2])]["image"] for row in rows], batch_size=1000)
    if task == "regression":
        assert said.probabilities is None
        assert said.labels == pytest.approx([row["predicted_value"] for row in rows], rel=1e-5)
        assert said.labels == said.logits[:, 0].tolist()
    else:
        assert said.probabilities is not None
        np.testing.assert_allclose(said.probabilities, [row["probabilities"] for row in rows], atol=1e-5)
        assert said.labels == [
            tuple(name for name, has in zip(SHAPES, row > 0, strict=True) if has) for row in said.logits
        ]


def test_a_folder_of_predictions_has_labels_of_the_task_and_its_scores(
    searched: tuple[Task, Path], tmp_path: Path
) -> None:
    task, study = searched
    folder = bundle_folder(study)
    bundle = load_bundle(folder)
    summary = predict_data(folder, bundle.spec.data.path, tmp_path / "out", split="test")
    rows = read_table(
        tmp_path / "out", "predictions", "predictions", schema_of(bundle.classes, features=False, task=task)
    ).to_pylist()
    assert summary.labelled == summary.predicted == len(rows) > 0
    assert set(summary.scores) == {*EVERY[task]}
    known = bundle.about["scores"]
    for name, value in summary.scores.items():
        assert value == pytest.approx(known[f"test_{name}"], rel=1e-5, abs=1e-6)
    table = pq.read_table(bundle.spec.data.path)["label"].to_pylist()
    for row in rows:
        assert row["label"] == table[int(row["sample_id"].rpartition(":")[2])]
        if task == "regression":
            assert row["loss"] == pytest.approx((row["label"] - row["predicted"]) ** 2)
        else:
            truth = np.isin(SHAPES, row["label"])
            likely = np.clip(np.array(row["probabilities"], np.float64), 1e-7, 1 - 1e-7)
            assert row["loss"] == pytest.approx(-np.log(np.where(truth, likely, 1 - likely)).mean(), rel=1e-3)


def test_labels_that_the_bundle_does_not_know_are_not_scored(searched: tuple[Task, Path], tmp_path: Path) -> None:
    task, study = searched
    rows = pq.read_table(load_bundle(bundle_folder(study)).spec.data.path).slice(0, 6)
    labels = ["x", *map(str, range(5))] if task == "regression" else [["bar", "star"], *[["disc"]] * 5]
    pq.write_table(pa.table({"image": rows["image"], "label": labels}), tmp_path / "t.parquet")
    summary = predict_data(bundle_folder(study), str(tmp_path / "t.parquet"), tmp_path / "out")
    assert (summary.predicted, summary.labelled) == (6, 5)
    assert summary.foreign == {"x" if task == "regression" else "bar;star": 1}


@pytest.mark.parametrize("target", ["safetensors", "torch-export"])
def test_an_export_gives_the_same_numbers(searched: tuple[Task, Path], tmp_path: Path, target: str) -> None:
    task, study = searched
    export_bundle(bundle_folder(study), target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("numbers, in the unit of the labels," in card) == (task == "regression")


def test_the_card_says_what_it_predicts(searched: tuple[Task, Path]) -> None:
    task, study = searched
    card = (bundle_folder(study) / "README.md").read_text()
    assert ("RMSE" in card) == (task == "regression")
    assert ("mAP" in card) == (task == "multilabel")
    assert ("pipeline_tag" in card) == (task == "multilabel")


def test_backbones_are_probed_by_what_the_task_has(searched: tuple[Task, Path], tmp_path: Path) -> None:
    task, _ = searched
    found = probed(frostline.probe(job_of(tmp_path, task)))
    place = found["candidates"][0]["places"][-1]
    assert [head["method"] for head in place["heads"]] == ["ridge"]
    assert place["logme"] is not None
    assert place["h_score"] is None
    assert found["folds"] == 5


# --- serving


def test_answers_are_of_the_task_and_of_the_document() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, -2.0, -1.0]], np.float32)
    sets = predictions(logits, SHAPES, 2, "multilabel")
    assert [row["labels"] for row in sets] == [("bar", "frame"), ()]
    assert sets[0]["top"][0] == {"label": "bar", "probability": pytest.approx(expit(2.0), abs=1e-6)}
    assert predictions(logits[:, :1], ["angle"], 1, "regression") == [{"value": 2.0}, {"value": -3.0}]
    served = {"sets": (SHAPES, IMAGE, "multilabel"), "one": (("angle",), IMAGE, "regression")}
    document = describe(served, Limits(), with_token=False)
    answer = document["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    named = {name: each["items"]["$ref"] for name, each in answer["properties"]["bundles"]["properties"].items()}
    assert named == {"sets": "#/components/schemas/Labels", "one": "#/components/schemas/Number"}
    assert document["paths"]["/one/predict"]["post"]["summary"] == "ask one, which gives angle"


def test_heads_of_a_regression_are_folded_exactly_as_their_outputs_are() -> None:
    from frostline.head import build_head, in_units
    from frostline.spec import Head

    head = build_head(Head(), 5, 1, seed=0).double()
    inputs = torch.randn(7, 5, dtype=torch.float64)
    target = Target("regression", -40.0, 12.5)
    expected = target.in_units(head(inputs).detach().numpy())
    in_units(head, target)
    np.testing.assert_allclose(head(inputs).detach().numpy(), expected, rtol=1e-12)
    labels = np.array([[1.0], [2.0], [4.0], [8.0], [16.0], [0.5], [3.0]])
    natural = scores(head(inputs).detach().numpy(), labels, target=Target("regression"))
    counted = scores((expected - target.mean) / target.std, (labels - target.mean) / target.std, target=target)
    assert natural == pytest.approx(counted, rel=1e-9)
