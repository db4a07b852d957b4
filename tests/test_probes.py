"""Heads in closed form at every cut: they are those of features passed live, whatever the study stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import frostline
from frostline import probes as module
from frostline import results
from frostline.closedform import lda, pooled, ridge
from frostline.cuts import emit
from frostline.data import subset
from frostline.features import Feed
from frostline.finalists import best_probe
from frostline.metrics import scores
from frostline.testing import image_folder, toy_job
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec
from frostline.world import World

CPU = World(torch.device("cpu"), "here")
ONE = ["search.trials=1", "confirm.seeds=0", "train.epochs=1"]


def searched(folder: Path, *options: str) -> list[dict]:
    """The probes of a search."""
    return results.read_probes(frostline.search(toy_job(folder, [*ONE, *options]), inline=True)).to_pylist()


def live(folder: Path, cut: int, view: int | None) -> dict[str, dict[str, float]]:
    """Scores of heads on features that are passed now."""
    spec = TrialSpec.model_validate_json(results.read_trials(folder)["spec"][0].as_py())
    origin = origin_of(spec, CPU)
    dataset, val = origin.dataset, origin.dataset.indices("val")
    train = subset(dataset, spec.data.per_class, spec.seeds.subset)

    def features(samples: np.ndarray, view: int | None) -> torch.Tensor:
        return pooled(emit(Feed().module(origin), [origin.cut(cut)], origin.inputs(samples, view))[cut])

    shown, labels = features(train, view), torch.from_numpy(dataset.labels[train])
    return {
        method: scores(fit(shown, labels, 10)(features(val, None)).numpy(), dataset.labels[val])
        for method, fit in (("ridge", ridge), ("lda", lda))
    }


@pytest.mark.parametrize(("views", "first"), [("0", None), ("2", 0), ("live", 0)])
def test_they_are_fitted_to_what_the_pretrained_stages_give(study_folder: Path, views: str, first: int | None) -> None:
    rows = searched(study_folder, f"augment.views={views}")
    assert [(row["cut"], row["method"]) for row in rows] == [(c, m) for c in (1, 2, 3) for m in ("ridge", "lda")]
    assert {row["cut"]: row["features"] for row in rows} == {1: 8, 2: 16, 3: 24}
    for row in rows:
        expected = live(study_folder, row["cut"], first)[row["method"]]
        for name, value in expected.items():
            assert row[f"val_{name}"] == pytest.approx(value, rel=1e-4), row
        assert row["val_score"] == row["val_accuracy"]
        assert (row["n_train"], row["reason"]) == (100, None)


def test_their_images_pass_on_the_way_to_what_trials_read(study_folder: Path) -> None:
    searched(study_folder)
    extractions = results.read_extractions(study_folder).to_pylist()
    trial = results.read_trials(study_folder).to_pylist()[0]
    assert sum(row["images"] for row in extractions) == trial["n_train"] + trial["n_val"]


def test_a_large_train_split_is_fitted_in_part_with_every_class(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGES", 55)
    assert {row["n_train"] for row in searched(study_folder)} == {50}


def test_a_class_with_few_images_gives_all_that_it_has(
    study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_folder(tmp_path / "shapes", ("many", "some"), per_class=40)
    for path in sorted((data / "some").glob("*.png"))[12:]:
        path.unlink()
    monkeypatch.setattr(module, "IMAGES", 20)
    arguments = [f"data.path={data}", "data.val=0.25", "data.test=0.25", *ONE]
    job = toy_job(study_folder, arguments, data={"image_size": 16})
    rows = results.read_probes(frostline.search(job, inline=True)).to_pylist()
    assert {row["n_train"] for row in rows} == {16}, "6 of `some`, 10 of `many`"


def test_none_are_fitted_where_nothing_may_be_stored(study_folder: Path) -> None:
    assert searched(study_folder, "features.cache=none") == []


def test_a_head_that_cannot_be_fitted_has_a_reason(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_: object) -> None:
        raise torch.linalg.LinAlgError("the matrix is singular")

    monkeypatch.setattr(module, "lda", singular)
    rows = searched(study_folder)
    assert {row["method"]: row["reason"] for row in rows} == {
        "ridge": None,
        "lda": "the matrix is singular",
    }
    assert {row["val_score"] is None for row in rows if row["method"] == "lda"} == {True}


def test_the_best_is_the_deepest_of_equal_ones() -> None:
    rows = [{"cut": cut, "val_score": score} for cut, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, None))]
    assert best_probe(rows, "max") == rows[2]
    assert best_probe(rows, "min") == rows[0]
    assert best_probe(rows[3:], "max") is None
