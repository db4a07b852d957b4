"""Probes of backbones, for real: on digits, through the feature store."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestCentroid

import frostline
from frostline import probing as module
from frostline import results
from frostline.backbone import BackboneError, load_backbone
from frostline.candidates import Probed
from frostline.data import Dataset, load_data
from frostline.features import Feed
from frostline.neighbours import directions
from frostline.prepare import prepare
from frostline.probe_text import render_probed, to_json
from frostline.probing import folds_of, spec_of
from frostline.seeds import derive_seed
from frostline.spec import Job
from frostline.store import Store
from frostline.testing import TOY_BACKBONE, image_folder, toy_job
from frostline.trial import origin_of
from frostline.world import World

OTHER = "timm/test_resnet"
HEADS = {"probe": {"strategy": "linear_probe", "space": {"head.depth": "all", "train.head_lr": [0.01, 0.1]}}}


def loss_job(folder: Path, *overrides: str) -> Job:
    return toy_job(folder, ["objective.metric=nll", *overrides])


def shown(found: Probed) -> str:
    """As it is printed, all in 100 columns."""
    console = Console(width=80, highlight=False, file=io.StringIO())
    render_probed(found, console)
    text = console.file.getvalue()
    assert all(len(line) <= 100 for line in text.splitlines()), text
    return text


def test_each_image_passes_once_whoever_asks_first(study_folder: Path) -> None:
    job = toy_job(study_folder, ["confirm.seeds=0", "train.epochs=1", "search.trials=4"], arms=HEADS)
    first = frostline.probe(job)
    assert first.candidates[0].images_passed == first.n_train + first.n_val == 370
    again = frostline.probe(job)
    assert again.candidates[0].images_passed == 0
    assert again.candidates[0].places == first.candidates[0].places
    frostline.search(job, inline=True)
    assert results.read_extractions(study_folder).num_rows == 0, "the search finds all of it"


def test_what_a_search_has_stored_is_not_passed_again(study_folder: Path) -> None:
    job = toy_job(study_folder, ["confirm.seeds=0", "train.epochs=1", "search.trials=1", "augment.views=2"])
    frostline.search(job, inline=True)
    assert frostline.probe(job).candidates[0].images_passed == 0


def test_its_heads_are_those_of_the_study(study_folder: Path) -> None:
    job = toy_job(study_folder, ["confirm.seeds=0", "train.epochs=1", "search.trials=1", "augment.views=live"])
    found = frostline.probe(job)
    frostline.search(job, inline=True)
    rows = results.read_probes(study_folder).to_pylist()
    assert len(rows) == 6
    for row in rows:
        place = found.candidates[0].places[row["cut"] - 1]
        (head,) = [head for head in place.heads if head.method == row["method"]]
        assert (place.cut, place.features) == (row["cut"], row["features"])
        assert head.val == pytest.approx(row["val_score"])
        assert head.val_scores["nll"] == pytest.approx(row["val_nll"])
        assert head.strength == pytest.approx(row["strength"])


def test_inner_scores_are_those_of_scikit_learns_cross_validation(study_folder: Path) -> None:
    job = toy_job(study_folder)
    found = frostline.probe(job)
    prepared = prepare(job)
    spec = spec_of(prepared.job, "auto")
    origin = origin_of(spec, World(torch.device("cpu"), "here"))
    train = module.fitted_to(prepared.dataset, spec)
    labels = prepared.dataset.labels[train]
    folds = StratifiedKFold(5, shuffle=True, random_state=derive_seed(job.seed, "folds"))
    for place in found.candidates[0].places:
        features = directions(Feed().means(origin, place.cut, None, train, spec.features))
        with warnings.catch_warnings(action="ignore"):  # of features that are always zero
            predicted = cross_val_predict(NearestCentroid(), features, labels, cv=folds)
        assert place.heads[1].method == "mean"
        assert place.heads[1].inner == pytest.approx(np.mean(predicted == labels))


def test_val_has_no_part_in_inner_scores_and_test_is_not_read(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toy_job(study_folder)
    plain = frostline.probe(job).candidates[0].places
    asked = []
    gather, indices = Feed.means, Dataset.indices
    monkeypatch.setattr(Dataset, "indices", lambda self, split: (asked.append(split), indices(self, split))[1])

    def mixed_up(feed: Feed, origin, cut: int, view, samples: np.ndarray, features) -> torch.Tensor:
        made = gather(feed, origin, cut, view, samples, features)
        return torch.randn_like(made) if len(samples) == 270 else made

    monkeypatch.setattr(Feed, "means", mixed_up)
    mixed = frostline.probe(job).candidates[0].places
    for a, b in zip(plain, mixed, strict=True):
        assert [head.inner for head in a.heads] == [head.inner for head in b.heads]
        assert (a.logme, a.h_score) == (b.logme, b.h_score)
        assert all(
            one.val is not None and two.val is not None and one.val > two.val
            for one, two in zip(a.heads, b.heads, strict=True)
        )
    assert set(asked) == {"train", "val"}
    stored = {entry.samples for entry in Store(study_folder.parent / "features").entries()}
    assert stored == {370}, "train and val"


def test_under_nll_only_heads_with_probabilities_count(study_folder: Path) -> None:
    found = frostline.probe(loss_job(study_folder))
    (each,) = found.candidates
    for place in each.places:
        scored = {head.method: head for head in place.heads if head.inner is not None}
        assert set(scored) == {"lda", "ridge"}
        for head in scored.values():
            assert head.losses is not None
            assert head.losses.mean() == pytest.approx(head.inner)
            assert head.val == head.val_scores["nll"]
        assert "nll" not in place.heads[0].val_scores
    text = " ".join(shown(found).split())
    assert re.search(r"(LDA|ridge) there: nll \d\.\d{4} in cross-validation", text)
    assert re.search(r"270 images; accuracy 0\.\d{4}, binomial standard error", text)


def test_candidates_stand_side_by_side(study_folder: Path) -> None:
    found = frostline.probe(toy_job(study_folder, ["data.image_size=32"]), backbones=[OTHER, f"{OTHER}=random", OTHER])
    assert [each.backbone for each in found.candidates] == [TOY_BACKBONE, OTHER]
    toy, other = found.candidates
    assert [place.features for place in toy.places] == [8, 16, 24]
    assert toy.places[-1].parameters == sum(
        each.numel() for each in load_backbone(toy_job(study_folder).backbone).module.parameters()
    )
    assert len(other.places) == other.stages
    text = shown(found)
    assert "which backbone" in text
    assert "LogME after the last stage" in text
    assert text.count("tau with val") == 2
    raw = to_json(found)
    assert json.loads(json.dumps(raw, allow_nan=False))["ranked"] == raw["ranked"]
    assert raw["ranked"][0] in text
    assert len(raw["candidates"][0]["places"][0]["heads"]) == 4


def test_a_candidate_that_cannot_be_had_is_told_before_anything_passes(study_folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"timm has|has no 'resnet18_'.*\n.*timm/resnet18_=PATH"):
        frostline.probe(toy_job(study_folder), backbones=["timm/resnet18_"])
    with pytest.raises(BackboneError, match=r"nowhere\.pt"):
        frostline.probe(toy_job(study_folder), backbones=[f"{OTHER}=nowhere.pt"])
    assert not (study_folder.parent / "features").exists()


def test_where_nothing_may_be_stored_it_says_what_to_set(study_folder: Path) -> None:
    with pytest.raises(ValueError, match=r'features\.cache = "none".*set it to "auto"'):
        frostline.probe(toy_job(study_folder, ["features.cache=none"]))


def test_arms_need_not_fit_a_candidate(study_folder: Path) -> None:
    arms = {"deep": {"strategy": "freeze_depth", "space": {"freeze.depth": [5], "train.lr": [0.1, 0.2]}}}
    found = frostline.probe(toy_job(study_folder, arms=arms))
    assert len(found.candidates[0].places) == 3
    assert frostline.probe(toy_job(study_folder, arms={})).candidates[0].images_passed == 0


def test_a_head_that_cannot_be_fitted_has_a_reason(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the matrix is singular")

    monkeypatch.setitem(module.METHODS, "lda", singular)
    monkeypatch.setattr(module, "logme", singular)
    found = frostline.probe(toy_job(study_folder))
    for place in found.candidates[0].places:
        assert {head.method: head.reason for head in place.heads if head.reason} == {"lda": "the matrix is singular"}
        assert place.logme is None
    assert "where to cut" in shown(found)


def folder_of(root: Path, *per_class: int) -> Dataset:
    """A dataset of shapes, with so many images of each class in train and two in val and test."""
    made = image_folder(root / "all", ("a", "b", "c"), per_class=max(per_class) + 4)
    for name, count in zip("abc", per_class, strict=True):
        for index, path in enumerate(sorted((made / name).glob("*.png"))[: count + 4]):
            split = ("val", "val", "test", "test", *["train"] * count)[index]
            target = root / "split" / split / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(target)
    return load_data(toy_job(root / "study", [f"data.path={root / 'split'}", "data.per_class=1"]).data, 0)


@pytest.mark.parametrize(("per_class", "folds"), [((12, 9, 7), 5), ((9, 9, 3), 3), ((9, 2, 9), 2), ((9, 1, 9), 0)])
def test_there_are_as_many_folds_as_the_rarest_class_allows(
    tmp_path: Path, per_class: tuple[int, int, int], folds: int
) -> None:
    dataset = folder_of(tmp_path, *per_class)
    train = dataset.indices("train")
    found, why = folds_of(dataset, train, 0)
    assert len(found) == folds
    assert (why is None) == (folds > 0)
    for fit, held in found:
        assert not set(fit) & set(held)
        assert set(dataset.labels[train[fit]]) == {0, 1, 2}
    if found:
        assert sorted(np.concatenate([held for _, held in found])) == [*range(len(train))]


def test_a_train_split_of_one_image_a_class_is_chosen_on_val(tmp_path: Path) -> None:
    found = frostline.probe(toy_job(tmp_path / "study", ["data.per_class=1"]))
    assert (found.folds, found.n_train) == (0, 10)
    text = shown(found)
    assert "on val's 270 images, so that what is best looks better than it is: a class has fewer than 2" in " ".join(
        text.split()
    )
    assert "5-fold" not in text


def test_samples_of_a_group_stay_together(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, 12, 12, 12)
    train = dataset.indices("train")
    groups = np.arange(len(dataset.labels)) // 3
    grouped = Dataset(**{**vars(dataset), "groups": tuple(map(str, groups))})
    found, _ = folds_of(grouped, train, 0)
    assert len(found) == 5
    for fit, held in found:
        assert not set(groups[train[fit]]) & set(groups[train[held]])
    alone = Dataset(**{**vars(dataset), "groups": tuple(map(str, dataset.labels))})
    none, why = folds_of(alone, train, 0)
    assert none == []
    assert why is not None
    assert "groups" in why


@pytest.mark.slow
def test_lite0_serves_digits_best_before_its_end(tmp_path: Path) -> None:
    """As the quickstart has it; the stages after the best cut are ImageNet's own."""
    quickstart = Path(__file__).parent.parent / "jobs" / "quickstart.toml"
    found = frostline.probe(quickstart, [f"results={tmp_path / 'study'}"])
    raw = to_json(found)["candidates"][0]
    assert raw["best"]["cut"] in (6, 7)
    assert raw["distance"]["word"] == "far"
    assert raw["tau_with_val"]["lda"] > 0.7
