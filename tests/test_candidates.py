"""What is decided from the scores of probes, and how that is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline.candidates import (
    Candidate,
    HeadScore,
    Place,
    Probed,
    advice,
    alike,
    best_place,
    between_methods,
    binomial_error,
    distance,
    equals,
    rank_correlations,
    ranked,
    verdict,
)

N = 400


def head(method: str, inner: float | None, val: float = 0.5, wrong_from: int = 0) -> HeadScore:
    """A head that errs on a stretch of the N train images, as its inner score has it."""
    losses = None
    if inner is not None:
        losses = np.zeros(N)
        losses[wrong_from : wrong_from + round((1 - inner) * N)] = 1
    return HeadScore(method, 3, inner, val, {"accuracy": val}, losses)


def candidate(name: str, inner: list[float | None], val: list[float], **more: Any) -> Candidate:
    """A backbone with an LDA of these scores by cut, and a ridge that is a little worse."""
    places = tuple(
        Place(
            cut=cut,
            stage=f"block{cut}",
            parameters=1000 * cut,
            features=8 * cut,
            heads=(head("lda", a, b), head("ridge", None if a is None else a - 0.02, b - 0.03)),
            logme=-float(cut),
            h_score=float(cut),
        )
        for cut, (a, b) in enumerate(zip(inner, val, strict=True), 1)
    )
    kept = {"weights": "pretrained", "weights_hash": "0" * 16, "size": 32, "images_passed": 0, "seconds": 1.0}
    return Candidate(**{"backbone": name, "stages": len(places), "places": places, **kept, **more})


def probed(*candidates: Candidate, **more: Any) -> Probed:
    raw = {"name": "job", "metric": "accuracy", "mode": "max", "n_train": N, "n_val": 100, "classes": 10, "folds": 5}
    return Probed(
        **{**raw, "task": "classification", "inputs": "images", "no_folds": None, "candidates": candidates, **more}
    )


def words(lines: Any) -> str:
    return " ".join(f"{name}: {text}" for name, text in lines)


A = candidate("a", [0.5, 0.9, 0.8, 0.7], [0.4, 0.7, 0.75, 0.6])
B = candidate("b", [0.5, 0.95], [0.5, 0.9])


def test_cut_and_backbone_are_chosen_on_train_and_not_on_val() -> None:
    best = best_place(A, "max")
    assert best is not None
    assert (best[0].cut, best[1].method) == (2, "lda")
    assert [each.backbone for each, _, _ in ranked(probed(A, B))] == ["b", "a"]
    text = words(advice(A, probed(A)))
    assert "after stage 2 of 4 (block2), head.depth=2" in text
    assert (
        "accuracy 0.9000 in cross-validation on train, 0.7000 on val (100 images, binomial standard error 0.0" in text
    )
    assert "val's 100 images have had no part in it" in words(verdict(probed(A)))


def test_where_train_allows_for_no_folds_val_chooses_and_that_is_said() -> None:
    bare = candidate("a", [None] * 4, [0.4, 0.7, 0.75, 0.6])
    best = best_place(bare, "max")
    assert best is not None
    assert best[0].cut == 3
    assert equals(bare, "max") == []
    text = words(verdict(probed(bare, folds=0, no_folds="a class has one image")))
    assert "on val's 100 images, so that what is best looks better than it is: a class has one image" in text


def test_of_equal_cuts_the_deepest_and_of_losses_the_least() -> None:
    level = candidate("a", [0.9, 0.9, 0.8], [0.5] * 3)
    best = best_place(level, "max")
    assert best is not None
    assert best[0].cut == 2
    least = best_place(level, "min")
    assert least is not None
    assert (least[0].cut, least[1].method) == (3, "ridge")


def test_heads_are_told_apart_on_the_same_images() -> None:
    """Two that err on the same images differ by little less than two that err on others."""
    assert not alike(head("lda", 0.9), head("lda", 0.88))
    assert alike(head("lda", 0.9), head("lda", 0.88, wrong_from=200))
    assert not alike(head("lda", 0.9), head("lda", 0.7, wrong_from=200))
    assert alike(head("lda", 0.9), head("lda", 0.9))
    assert not alike(head("lda", 0.9), head("lda", None))


@pytest.mark.parametrize(
    ("inner", "word", "drop", "ratio"),
    [
        ([0.5, 0.6, 0.9], "near", 0, 1),
        ([0.5, 0.9, 0.9 - 1 / N], "near", 1 / N, 1 + 10 / N),
        ([0.5, 0.9, 0.85], "some way off", 0.05, 1.5),
        ([0.5, 0.9, 0.7], "far", 0.2, 3),
    ],
)
def test_how_far_source_and_target_are(inner: list[float | None], word: str, drop: float, ratio: float) -> None:
    each = candidate("a", inner, [0.5] * 3)
    found = distance(each, "accuracy", "max")
    assert found is not None
    assert found == (word, pytest.approx(drop), pytest.approx(ratio))
    said = words(advice(each, probed(each)))
    assert f"source, target: {word}: the features are best at" in said
    random = replace(each, weights="random")
    assert "source, target" not in words(advice(random, probed(random))), "random weights have no source"


def test_the_distance_in_nll_is_of_the_loss_itself() -> None:
    each = candidate("a", [2.0, 0.4, 1.0], [0.5] * 3)
    best = [head("lda", None) for _ in range(3)]
    places = [
        replace(place, heads=(replace(one, inner=place.heads[0].inner),))
        for place, one in zip(each.places, best, strict=True)
    ]
    found = distance(replace(each, places=tuple(places)), "nll", "min")
    assert found == ("far", pytest.approx(0.6), pytest.approx(2.5))


def test_rank_correlations_are_with_val_and_have_sizes_beside() -> None:
    taus = rank_correlations(A.places, "max")  # val orders 1 < 4 < 2 < 3
    assert taus["h_score"] == taus["parameters"] == taus["features"] == pytest.approx(1 / 3)
    assert taus["logme"] == pytest.approx(-1 / 3)
    assert taus["lda"] == taus["ridge"] == pytest.approx(2 / 3)
    assert between_methods(A.places, "max") == pytest.approx([-1, 0, 0, 0, 0, 1], abs=1e-9)
    assert set(rank_correlations(B.places, "max").values()) == {None}, "two cuts rank nothing"


def test_several_backbones_stand_beside_what_their_size_says() -> None:
    large = candidate("large", [0.5, 0.6, 0.94], [0.5, 0.6, 0.8], weights="random")
    text = words(verdict(probed(A, B, large)))
    assert "which backbone: 0.9500 b (cut 2 of 2, LDA)" in text
    assert "0.9400 large (weights: random) (cut 3 of 3, LDA)" in text
    assert "parameters: a 4000, large (weights: random) 3000, b 2000" in text
    assert "Kendall's tau with the best score on val, 3 backbones at these cuts: lda 1.00" in text
    close = candidate("close", [0.5, 0.95 - 1 / N], [0.5, 0.9])
    assert "close (cut 2 of 2, LDA; not told apart from the first)" in words(verdict(probed(B, close)))
    assert "which backbone" not in words(verdict(probed(A)))


def test_a_backbone_that_no_head_could_be_fitted_to_says_why() -> None:
    failed = HeadScore("lda", None, None, None, reason="the matrix is singular")
    places = tuple(replace(place, heads=(failed,), logme=None, h_score=None) for place in A.places)
    none = replace(A, places=places)
    assert best_place(none, "max") is None
    assert distance(none, "accuracy", "max") is None
    assert "no head could be scored by accuracy: the matrix is singular" in words(advice(none, probed(none)))
    assert ranked(probed(none, B))[0][0] is B


def test_a_share_of_all_has_an_error_too() -> None:
    assert binomial_error(0.5, 98) == pytest.approx(0.5 / 98**0.5)
    assert 0 < binomial_error(1.0, 100) < 0.02
