"""Extraction: each image passes once, whatever asks for it and however often; what is damaged or missing is made again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostline import extract as module
from frostline.cuts import _known
from frostline.extract import SHARD_BYTES, SHARD_IMAGES, extract, needs, shard_size, survey
from frostline.features import EVAL_BATCH, Feed
from frostline.outcome import Outcome
from frostline.pack import run_pack
from frostline.prepare import prepare
from frostline.results import table_of
from frostline.shards import FeatureError
from frostline.store import Store
from frostline.testing import toy_job
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec, configure, confirm_seeds, search_seeds, trial_of
from frostline.work import Supply, Survey
from frostline.world import World

CPU = World(torch.device("cpu"), "here")
CUTS = (1, 2, 3)
VAL = 270
TRAIN = 100  # ten of each class


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync does cannot be seen without a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def spec_of(root: Path, *options: str, round_: str = "search", index: int = 0, **values: Any) -> TrialSpec:
    """A trial of the toy job that reads what is stored; options are overrides of the job, values of the configuration."""
    job = prepare(toy_job(root / "study", options)).job
    seed, seeds = search_seeds(job, "freeze", index) if round_ == "search" else confirm_seeds(job, index)
    config = configure(job, job.arms["freeze"], {"freeze.depth": 3, "head.hidden": 0, **values})
    return trial_of(
        job,
        config,
        seeds,
        trial_id=f"freeze-{index:05d}",
        arm="freeze",
        number=index,
        round="search" if round_ == "search" else "confirm",
        seed=seed,
        cached=True,
    )


def supply(
    *specs: TrialSpec, cuts: tuple[int, ...] | None = CUTS, means: tuple[int, ...] = (), at_once: int = 1
) -> Supply:
    return survey(Survey(specs, cuts, means, at_once), CPU, lambda *_: None)


def test_where_nothing_is_read_nothing_is_made(tmp_path: Path) -> None:
    spec = spec_of(tmp_path).model_copy(update={"cached": False, "round": "confirm"})
    found = supply(spec, cuts=None)
    assert (found.keys, found.shards) == ((), ())


def made(found: Supply) -> int:
    """Extract what a supply lacks; how many images passed."""
    feed = Feed()
    for shard in found.shards:
        extract(shard, feed, CPU)
    return feed.images_forwarded


def store_of(spec: TrialSpec) -> Store:
    assert spec.features.path is not None
    return Store(spec.features.path)


def test_each_image_passes_once_for_all_cuts_and_a_restart_passes_none(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    found = supply(spec)
    passed = Counter(sample for shard in found.shards for sample in shard.samples.tolist())
    assert set(passed.values()) == {1}
    assert len(passed) == TRAIN + VAL
    assert {shard.cuts for shard in found.shards} == {CUTS}
    assert len(found.keys) == len(CUTS)
    assert made(found) == TRAIN + VAL
    again = supply(spec)
    assert (again.shards, again.keys, again.root) == ((), found.keys, found.root)
    assert {entry.key: entry.samples for entry in store_of(spec).entries()} == dict.fromkeys(found.keys, TRAIN + VAL)
    assert all(store_of(spec).verify(key) == [] for key in found.keys)


def test_a_process_that_only_extracts_finds_the_cuts_for_itself(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    found = supply(spec)
    _known.cache_clear()
    assert made(found) == TRAIN + VAL
    assert not supply(spec).shards


def test_the_row_of_an_extraction(tmp_path: Path) -> None:
    (shard,) = supply(spec_of(tmp_path, "features.dtype=float16"), cuts=(1, 3)).shards
    row = extract(shard, Feed(), CPU)
    table_of("extractions", [row])
    assert (row["cuts"], row["view"], row["node"]) == ("1,3", None, "here")
    assert row["images"] == TRAIN + VAL
    assert row["bytes"] == (TRAIN + VAL) * 2 * (8 * 8 * 8 + 24)
    assert row["seconds"] > 0


def test_another_study_extracts_only_what_is_missing(tmp_path: Path) -> None:
    made(supply(spec_of(tmp_path), cuts=(3,)))
    more = spec_of(tmp_path, "data.per_class=20", "train.epochs=9")
    added = supply(more, cuts=(3,))
    assert made(added) == TRAIN, "a larger draw holds the smaller one"
    split = spec_of(tmp_path, "seed=1")
    lacking = supply(split, cuts=(3,))
    have = {sample for entry in [spec_of(tmp_path), more] for sample in needed(entry)}
    assert {sample for shard in lacking.shards for sample in shard.samples.tolist()} == set(needed(split)) - have
    assert 0 < made(lacking) < TRAIN + VAL


def needed(spec: TrialSpec) -> list[int]:
    return [sample for need in needs(spec, (3,), (), origin_of(spec, CPU)) for sample in need.samples.tolist()]


def test_more_cuts_pass_the_images_again_for_those_alone(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    made(supply(spec, cuts=(3,)))
    found = supply(spec, cuts=(2, 3))
    assert {shard.cuts for shard in found.shards} == {(2,)}
    assert made(found) == TRAIN + VAL


def test_images_that_lack_different_cuts_pass_once_each(tmp_path: Path) -> None:
    """Cut 3 is there for some images, cut 2 for others."""
    few, many = spec_of(tmp_path, "data.per_class=5"), spec_of(tmp_path)
    made(supply(few, cuts=(3,)))
    found = supply(many, cuts=(2, 3))
    assert {shard.cuts: len(shard.samples) for shard in found.shards} == {(2,): 50 + VAL, (2, 3): 50}
    assert made(found) == TRAIN + VAL


def test_an_image_that_two_trials_need_passes_once(tmp_path: Path) -> None:
    """Confirmations draw train subsets of their own, which overlap; each reads its own cut."""
    specs = [
        spec_of(tmp_path, "data.per_class=60", round_="confirm", index=index, **{"freeze.depth": depth})
        for index, depth in ((0, 3), (1, 3), (2, 2))
    ]
    found = supply(*specs, cuts=None)
    passed = Counter(sample for shard in found.shards for sample in shard.samples.tolist())
    assert set(passed.values()) == {1}
    everyone = [set(needed(spec)) for spec in specs]
    assert len(set.union(*everyone)) < sum(map(len, everyone))
    assert passed.keys() == set.union(*everyone)
    asked = {sample: tuple(cut for cut, who in ((2, [2]), (3, [0, 1])) if any(sample in everyone[i] for i in who))
             for sample in passed}  # fmt: skip
    assert {sample: shard.cuts for shard in found.shards for sample in shard.samples.tolist()} == asked
    assert made(found) == len(passed)


def test_confirmations_need_test_and_searches_must_not_have_it(tmp_path: Path) -> None:
    search, confirm = spec_of(tmp_path), spec_of(tmp_path, round_="confirm")
    test = set(origin_of(search, CPU).dataset.indices("test").tolist())
    assert not test & set(needed(search))
    assert test <= set(needed(confirm))
    made(supply(search))
    found = supply(confirm, cuts=None)
    assert {shard.cuts for shard in found.shards} == {(3,)}
    assert test <= {sample for shard in found.shards for sample in shard.samples.tolist()}
    assert made(found) < len(test) + TRAIN + 1, "val was there"


def test_what_is_not_read_from_the_store_is_not_put_there(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, round_="confirm", **{"freeze.depth": 1}).model_copy(update={"cached": False})
    found = supply(spec, cuts=None)
    assert (found.keys, found.shards) == ((), ())


@pytest.mark.parametrize(("views", "passes"), [(0, 1), (3, 3), ("live", 0)])
def test_train_images_pass_once_for_each_view_and_validation_once(tmp_path: Path, views: Any, passes: int) -> None:
    spec = spec_of(tmp_path, f"augment.views={views}")
    found = supply(spec)
    by_view = Counter({shard.view: 0 for shard in found.shards})
    for shard in found.shards:
        by_view[shard.view] += len(shard.samples)
    plain = VAL + TRAIN * (views == 0)
    assert by_view == {None: plain, **(dict.fromkeys(range(passes), TRAIN) if views else {})}
    assert len(found.keys) == len(CUTS) * (1 + (passes if views else 0))
    assert made(found) == VAL + passes * TRAIN
    assert supply(spec).shards == ()
    if views == 3:
        assert made(supply(spec_of(tmp_path, "augment.views=4"))) == TRAIN, "view 3 is new"


def damage_size(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_size, damage_bit, Path.unlink])
@pytest.mark.parametrize("kind", ["rows", "json"])
def test_a_damaged_shard_is_made_again_and_no_other(tmp_path: Path, damage: Any, kind: str) -> None:
    spec = spec_of(tmp_path)
    found = supply(spec, at_once=3)
    assert len(found.shards) == 3
    made(found)
    victim = sorted((tmp_path / "features").glob(f"*/*.{kind}"))[4]
    before = {path: path.read_bytes() for path in (tmp_path / "features").glob("*/*.rows")}
    damage(victim)
    again = supply(spec)
    (shard,) = again.shards
    assert len(shard.cuts) == 1
    assert any(np.array_equal(shard.samples, first.samples) for first in found.shards)
    assert made(again) == len(shard.samples)
    assert supply(spec).shards == ()
    assert {path: path.read_bytes() for path in (tmp_path / "features").glob("*/*.rows")} == before


def loud_backbone() -> dict[str, Any]:
    """Activations of 10^6 at every cut."""
    from frostline.testing import toy_backbone

    made = toy_backbone()
    with torch.no_grad():
        made["module"].block2[1].weight.fill_(1e6)
    return made


def test_activations_beyond_half_precision_are_an_error_that_names_the_key(tmp_path: Path) -> None:
    options = ["backbone.name=python:test_extract:loud_backbone"]
    (shard,) = supply(spec_of(tmp_path, *options, "features.dtype=float16"), cuts=(3,)).shards
    with pytest.raises(FeatureError, match=r'float16 ends at 65504; set features\.dtype = "float32"'):
        extract(shard, Feed(), CPU)
    assert store_of(shard.spec).entries() == [], "nothing of it is stored"
    assert made(supply(spec_of(tmp_path, *options), cuts=(3,))) == TRAIN + VAL


def test_the_budget_evicts_what_was_used_longest_ago_but_nothing_held_or_wanted(tmp_path: Path) -> None:
    image_bytes = {cut: 4 * size for cut, size in ((1, 8 * 8 * 8), (2, 16 * 4 * 4), (3, 24))}
    budget = (TRAIN + VAL) * (image_bytes[1] + 2 * image_bytes[2] + image_bytes[3]) + 20_000  # and manifests
    options = f"features.budget_gb={budget / 1e9}"
    older, held, newer = (
        spec_of(tmp_path, options, f"features.dtype={dtype}", f"train.precision={precision}")
        for dtype, precision in (("float32", "fp32"), ("float32", "bf16"), ("float16", "fp32"))
    )
    first, second = supply(older, cuts=(2,)), supply(held, cuts=(2,))
    made(first)
    made(second)
    with store_of(held).hold(second.keys):
        third = supply(newer, cuts=(1, 3))
        assert {entry.key for entry in store_of(older).entries()} == {*first.keys, *second.keys}, "all has room"
        made(third)
        fourth = supply(older, cuts=(1,))
        left = {entry.key for entry in store_of(older).entries()}
        assert left == {*second.keys, *third.keys}
        assert made(fourth) == TRAIN + VAL
    assert sum(entry.bytes for entry in store_of(older).entries()) <= budget
    again = supply(held, cuts=(2,))
    assert again.shards == ()


def test_what_a_survey_asks_for_is_not_evicted_to_make_room_for_the_rest(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "features.budget_gb=1e-9")
    first = supply(spec, cuts=(3,))
    made(first)
    second = supply(spec, cuts=(2, 3))
    assert [entry.key for entry in store_of(spec).entries()] == list(first.keys)
    assert {shard.cuts for shard in second.shards} == {(2,)}


def test_trials_run_on_what_was_extracted_and_on_nothing_else(tmp_path: Path) -> None:
    """A trial of another cut says which activations are missing; it does not quietly compute them."""
    spec = spec_of(tmp_path)
    made(supply(spec, cuts=(3,)))
    outcomes: dict[str, Outcome] = {}

    def run(spec: TrialSpec) -> dict[str, Any]:
        feed = Feed()
        run_pack([spec], feed=feed, world=CPU, report=lambda _: {spec.trial_id: True}, finish=outcomes.update)
        assert feed.images_forwarded == 0
        return outcomes[spec.trial_id].row

    assert run(spec)["status"] == "complete"
    failed = run(spec_of(tmp_path, **{"freeze.depth": 2}))
    assert (failed["status"], failed["error_kind"]) == ("failed", "user_error")
    assert "holds no activations: extract them first" in failed["reason"]


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (shard, *_) = supply(spec_of(tmp_path), cuts=(3,)).shards
    features = shard.spec.features.model_copy(update={"path": str(tmp_path / "file")})
    spec = shard.spec.model_copy(update={"features": features})
    with pytest.raises(FeatureError, match=r"/file cannot be used: .*features\.path"):
        made(supply(spec, cuts=(3,)))


def test_shards_share_the_work_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tmp_path)
    assert [len(shard.samples) for shard in supply(spec, at_once=2).shards] == [192, 178]
    assert [len(shard.samples) for shard in supply(spec, at_once=100).shards] == [64] * 5 + [50]
    bytes_of_all = 4 * (8 * 8 * 8 + 16 * 4 * 4 + 24)
    monkeypatch.setattr(module, "SHARD_BYTES", 130 * bytes_of_all)
    assert [len(shard.samples) for shard in supply(spec).shards] == [128, 128, 114]


@given(images=st.integers(1, 10**7), image_bytes=st.integers(1, 10**9), at_once=st.integers(1, 10_000))
def test_the_size_of_a_shard(images: int, image_bytes: int, at_once: int) -> None:
    size = shard_size(images, image_bytes, at_once)
    assert size > 0
    assert size % EVAL_BATCH == 0, "whole batches"
    assert size <= SHARD_IMAGES
    assert size * image_bytes <= SHARD_BYTES or size == EVAL_BATCH
    count, most = -(-images // size), -(-images // EVAL_BATCH)
    bounded = size + EVAL_BATCH > SHARD_IMAGES or (size + EVAL_BATCH) * image_bytes > SHARD_BYTES
    assert count <= at_once or bounded, "no more than can be made at once, but for memory"
    smaller = max(1, size // EVAL_BATCH - 1)
    assert size == EVAL_BATCH or -(-most // smaller) > at_once, "and the work is spread as far as it goes"
