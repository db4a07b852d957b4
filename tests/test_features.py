"""What trials are fed: the same activations from the store, from a shared pass and from a pass of one's own; and their keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frostline import features as module
from frostline.data import load_data, subset
from frostline.extract import extract, survey
from frostline.features import EVAL_BATCH, Feed, Origin, chunks, filled, from_rows, to_rows
from frostline.inputs import Images
from frostline.prepare import prepare
from frostline.shards import FeatureError
from frostline.store import Store, key_of
from frostline.testing import toy_job
from frostline.trial import origin_of
from frostline.trialspec import TrialSpec, configure, search_seeds, trial_of
from frostline.work import Survey
from frostline.world import World

CPU = World(torch.device("cpu"), "here")
CUTS = (1, 2, 3)


def spec_of(root: Path, *options: str) -> TrialSpec:
    """A trial of the toy job that reads what is stored; options are overrides of the job."""
    job = prepare(toy_job(root / "study", ["data.per_class=8", *options])).job
    seed, seeds = search_seeds(job, "freeze", 0)
    return trial_of(
        job,
        configure(job, job.arms["freeze"], {"freeze.depth": 3}),
        seeds,
        trial_id="freeze-00000",
        arm="freeze",
        number=0,
        round="search",
        seed=seed,
        cached=True,
    )


def stored(spec: TrialSpec) -> Origin:
    """What the trial and others like it read is put into the store."""
    for shard in survey(Survey((spec,), CUTS, (), 1), CPU, lambda *_: None).shards:
        extract(shard, Feed(), CPU)
    return origin_of(spec, CPU)


def samples_of(spec: TrialSpec) -> tuple[np.ndarray, np.ndarray]:
    dataset = load_data(spec.data, spec.seeds.split)
    return subset(dataset, spec.data.per_class, spec.seeds.subset), dataset.indices("val")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("views", [0, 2])
def test_what_is_read_is_what_a_pass_gives(tmp_path: Path, views: int, dtype: str) -> None:
    spec = spec_of(tmp_path, f"augment.views={views}", f"features.dtype={dtype}")
    origin, feed = stored(spec), Feed()
    train, val = samples_of(spec)
    for cut in CUTS:
        fetch = feed.activations(origin, cut, train, spec.features)
        for epoch in (1, 2, 3):
            view = (epoch - 1) % views if views else None
            wanted = np.random.default_rng(epoch).permutation(train)[:EVAL_BATCH]
            passed = Feed().pass_through(origin, {cut}, wanted, view)[cut]
            read = fetch(wanted, epoch)
            assert read.dtype == torch.float32
            assert read.shape == passed.shape
            torch.testing.assert_close(read, passed, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-6)
            assert torch.equal(read, read.to(getattr(torch, dtype)).float()), "rounded as the job says"
        read = feed.activations(origin, cut, val, spec.features)(val[:5], 0)
        passed = Feed().pass_through(origin, {cut}, val[:5], None)[cut]
        torch.testing.assert_close(read, passed, rtol=1e-3 if dtype == "float16" else 1e-5, atol=1e-6)
    assert feed.images_forwarded == 0


def test_the_very_batches_that_were_passed_are_read_to_the_bit(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    origin = stored(spec)
    everything = np.sort(np.concatenate(samples_of(spec)))
    for batch in chunks(everything, EVAL_BATCH):
        passed = Feed().pass_through(origin, CUTS, batch, None)
        for cut in CUTS:
            assert torch.equal(Feed().activations(origin, cut, everything, spec.features)(batch, 1), passed[cut])


def test_views_differ_and_validation_is_never_varied(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "augment.views=2")
    origin, (train, val) = stored(spec), samples_of(spec)
    fetch = Feed().activations(origin, 3, train, spec.features)
    first, second, third = (fetch(train[:8], epoch) for epoch in (1, 2, 3))
    assert not torch.equal(first, second)
    assert torch.equal(first, third)
    fetch = Feed().activations(origin, 3, val, spec.features)
    torch.testing.assert_close(fetch(val[:8], 0), Feed().pass_through(origin, {3}, val[:8], None)[3])


def test_one_live_pass_serves_all_cuts_that_are_asked_for(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "augment.views=live")
    origin, (train, val), feed = stored(spec), samples_of(spec), Feed()
    fetches = {cut: feed.activations(origin, cut, train, spec.features) for cut in CUTS}
    for epoch in (1, 2):
        fed = {cut: fetch(train[:8], epoch) for cut, fetch in fetches.items()}
        assert feed.images_forwarded == 8 * epoch
        alone = {cut: Feed().pass_through(origin, {cut}, train[:8], epoch - 1)[cut] for cut in CUTS}
        assert all(torch.equal(fed[cut], alone[cut]) for cut in CUTS)
        fed[3].zero_()
        assert fetches[3](train[:8], epoch).any(), "what one trial does to its batch reaches no other"
    assert feed.images_forwarded == 16
    fetches[1](val[:8], 0)
    assert feed.images_forwarded == 16, "validation is read"
    feed.forget_passes()
    feed.activations(origin, 2, train, spec.features)(train[:8], 2)
    assert feed.images_forwarded == 24
    assert feed.pass_s > 0


def test_activations_that_are_not_there_say_what_to_do(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    train, _ = samples_of(spec)
    origin = origin_of(spec, CPU)
    with pytest.raises(FeatureError, match=r"holds no activations: extract them first"):
        Feed().activations(origin, 3, train, spec.features)(train[:2], 1)
    about = origin.about(3, None)
    assert spec.features.path is not None
    Store(spec.features.path).put(key_of(about), about, train[:5], np.zeros((5, 24), np.float32))
    read = Feed().activations(origin, 3, train, spec.features)
    assert read(train[:5], 1).shape == (5, 24)
    with pytest.raises(FeatureError, match=rf"sample {train[5]}, and 1 other\(s\) of the 4 .* extract what"):
        read(train[3:7], 1)


def test_rows_are_what_they_were_made_from() -> None:
    image = torch.randn(3, 5, 4, 2).to(memory_format=torch.channels_last)
    rows = to_rows(image, "float32")
    assert rows.shape == (3, 4, 2, 5)
    assert np.shares_memory(rows, image.numpy()), "no copy: this is how they lie in memory"
    assert torch.equal(from_rows(torch.from_numpy(rows)), image)
    tokens = torch.randn(3, 7, 6)
    halved = to_rows(tokens, "float16")
    assert halved.dtype == np.float16
    assert torch.equal(from_rows(torch.from_numpy(halved)), tokens.half().float())


def changes(root: Path) -> dict[str, Any]:
    """Of everything that could change an activation (P12), something else -> what is asked under that key."""
    base = functools.partial(spec_of, root)
    origin = origin_of(base(), CPU)
    viewed = origin_of(base("augment.views=2", "augment.colour=0.3"), CPU)
    folder, inputs = base("data.image_size=24"), origin.backbone.inputs
    assert isinstance(inputs, Images)
    return {
        "nothing": origin,
        "weights and buffers": replace(origin, backbone=replace(origin.backbone, weights_hash="other")),
        "the network's source": replace(origin, backbone=replace(origin.backbone, source_hash="other")),
        "its name": replace(origin, backbone=replace(origin.backbone, name="other")),
        "its stages": replace(origin, backbone=replace(origin.backbone, stages_hash="other")),
        "mean": replace(origin, backbone=replace(origin.backbone, inputs=Images((0.1, 0.2, 0.3), inputs.std))),
        "std": replace(origin, backbone=replace(origin.backbone, inputs=Images(inputs.mean, (0.1, 0.2, 0.3)))),
        "resolution": origin_of(folder, CPU),
        "images": replace(origin, dataset=replace(origin.dataset, inputs_hash="other")),
        "dtype": origin_of(base("features.dtype=float16"), CPU),
        "precision": origin_of(base("train.precision=bf16"), CPU),
        "view": viewed,
        **{
            f"augment.{key}": replace(viewed, augment=viewed.augment.model_copy(update={key: value}))
            for key, value in {"flip": False, "crop": 0.7, "colour": 0.4}.items()
        },
        "the seed of the views": replace(viewed, augment_seed=viewed.augment_seed + 1),
    }


def test_the_key_changes_with_everything_that_could_change_an_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for what, origin in changes(tmp_path).items():
        view = 1 if origin.augment.views else None
        found[what] = key_of(origin.about(3, view))
        found[f"{what}, at another cut"] = key_of(origin.about(2, view))
        if view:
            found[f"{what}, another view"] = key_of(origin.about(3, 0))
    origin = changes(tmp_path)["nothing"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "EVAL_BATCH", 32)
        found["batch"] = key_of(origin.about(3, None))
    with monkeypatch.context() as patch:
        patch.setattr(module, "versions", lambda: {"torch": "0"})
        found["versions"] = key_of(origin.about(3, None))
    torch.set_num_threads(2)
    found["threads"] = key_of(origin.about(3, None))
    torch.set_num_threads(1)
    assert len(set(found.values())) == len(found), found
    assert key_of(origin.about(3, None)) == found["nothing"]


def test_the_key_stays_with_everything_that_could_not(tmp_path: Path) -> None:
    """Another split, fewer samples, other augmentation of other studies: what one stored, the next one reads."""
    viewed = ("augment.views=2", "augment.colour=0.3")
    found = {
        key_of(origin_of(spec_of(tmp_path, *options), CPU).about(3, None))
        for options in (
            (),
            ("data.per_class=5",),
            ("data.val=0.3",),
            ("train.batch_size=7", "train.epochs=9"),
            ("augment.flip=false",),
            viewed,
        )
    }
    assert len(found) == 1
    more = ("augment.views=5", "augment.colour=0.3")
    assert len({key_of(origin_of(spec_of(tmp_path, *options), CPU).about(3, 1)) for options in (viewed, more)}) == 1


def test_real_weights_are_what_the_key_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that moved is enough."""
    from frostline import backbone
    from frostline.testing import ToyNet

    (tmp_path / "nudged.py").write_text(
        "from frostline.testing import toy_backbone\n"
        "def plain(): return toy_backbone()\n"
        "def nudged():\n"
        "    made = toy_backbone()\n"
        "    made['module'].stem[1].running_mean[0] += 1e-3\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loaded = [
        backbone.load_backbone(spec_of(tmp_path, f"backbone.name=python:nudged:{name}").backbone, image_size=16)
        for name in ("plain", "nudged")
    ]
    assert isinstance(loaded[0].module, ToyNet)
    assert loaded[0].source_hash == loaded[1].source_hash
    origin = origin_of(spec_of(tmp_path), CPU)
    plain, nudged = (replace(origin, backbone=replace(each, name="same")) for each in loaded)
    assert key_of(plain.about(3, None)) != key_of(nudged.about(3, None))


def test_a_live_pass_rounds_only_where_storing_would(tmp_path: Path) -> None:
    exact = origin_of(spec_of(tmp_path), CPU)
    assert [exact.rounding(cut) for cut in (0, 1, 2, 3)] == [None] * 4
    half = origin_of(spec_of(tmp_path, "features.dtype=float16"), CPU)
    assert [cut and cut.index for cut in map(half.rounding, (0, 1, 2, 3))] == [None, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_what_fits_and_reads_the_rest(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    world = World(torch.device("cuda"), "here")
    for shard in survey(Survey((spec,), CUTS, (), 1), world, lambda *_: None).shards:
        extract(shard, Feed(), world)
    origin, (train, _) = origin_of(spec, world), samples_of(spec)
    held, read = Feed(), Feed(resident_bytes=0)
    wanted = np.random.default_rng(0).permutation(train)[:EVAL_BATCH]
    for cut in CUTS:
        found = [feed.activations(origin, cut, train, spec.features)(wanted, 1) for feed in (held, read)]
        assert found[0].device.type == "cuda"
        assert torch.equal(*found)
    assert (len(held._resident), len(read._resident)) == (3, 0)
    halves = np.array_split(train, 2)
    room = Feed(resident_bytes=24 * 4 * len(halves[0]))
    for half in halves:
        room.activations(origin, 3, half, spec.features)(half[:3], 1)
    assert [samples for _, samples in room._resident] == [halves[1].tobytes()], "what was used longest ago has gone"


def test_a_full_batch_gives_each_row_the_same_bits_and_keeps_its_layout() -> None:
    images = torch.rand(5, 8, 8, 3).permute(0, 3, 1, 2)
    whole = filled(images)
    assert whole.shape == (EVAL_BATCH, 3, 8, 8)
    assert torch.equal(whole[:5], images)
    assert torch.equal(whole[60:], images[:4])
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert filled(whole) is whole
