import hashlib
import struct
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from PIL import Image

import frostline.data
from frostline.data import DataError, Dataset, at_most, load_data, order_classes, splits_table, subset
from frostline.sources import FASHION_MNIST
from frostline.spec import Data


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch) -> None:
    """No cache on disk and none in the process."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(frostline.data, "_loaded", {})


def png(*key: object) -> bytes:
    """A small image that differs for every key."""
    noise = np.frombuffer(hashlib.sha256(repr(key).encode()).digest()[:27], np.uint8).reshape(3, 3, 3)
    out = BytesIO()
    Image.fromarray(noise).resize((12, 12)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, name: str, raw: bytes | None = None) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(png(name) if raw is None else raw)


def classes_of(folder: Path, count: int = 10, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in names:
        for i in range(count):
            write(folder, f"{name}/{i:02}.png")
    return folder


def with_splits(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    for split in splits:
        for name in ("cat", "dog"):
            for i in range(8 if split == "train" else 3):
                write(folder, f"{split}/{name}/{i}.png")
    return folder


def load(path: Path | str, seed: int = 0, **keys) -> Dataset:
    frostline.data._loaded.clear()
    return load_data(Data.model_validate({"path": str(path), "image_size": 8} | keys), seed)


def sizes(dataset: Dataset) -> dict[str, int]:
    return {name: len(dataset.indices(name)) for name in ("train", "val", "test")}


def test_digits():
    dataset = load("digits")
    assert dataset.inputs.shape == (1797, 8, 8, 3)
    assert dataset.classes == tuple("0123456789")
    assert dataset.labels[:10].tolist() == list(range(10))
    assert dataset.inputs[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert sizes(dataset) == {"train": 1258, "val": 270, "test": 269}
    assert (dataset.data_hash, dataset.split_hash) == ("41bb793507b3e693", "6da2539c4549a77b")
    for label in range(10):
        count = int(np.sum(dataset.labels == label))
        assert abs(int(np.sum(dataset.labels[dataset.indices("test")] == label)) - 0.15 * count) <= 1


def test_the_parts_fit_together(tmp_path):
    dataset = load(classes_of(tmp_path / "d", names=("10", "9", "b", "B")))
    assert dataset.classes == ("9", "10", "B", "b")
    assert dataset.inputs.shape == (40, 8, 8, 3)
    assert (dataset.labels.dtype, dataset.split.shape, dataset.groups, dataset.excluded) == (np.int64, (40,), None, ())
    for row, label, name in zip(dataset.inputs, dataset.labels, dataset.sample_ids, strict=True):
        assert name.split("/")[0] == dataset.classes[label]
        expected = Image.open(tmp_path / "d" / name).resize((8, 8), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(row, np.asarray(expected))
    every = np.concatenate([dataset.indices(name) for name in ("train", "val", "test")])
    assert np.sort(every).tolist() == list(range(40))
    assert dataset.indices("val").dtype == np.int64
    with pytest.raises(AssertionError):
        dataset.indices("valid")


def test_a_process_loads_once(tmp_path):
    spec = Data(path=str(classes_of(tmp_path)), image_size=8)
    calls = []
    first = load_data(spec, 0, progress=lambda *done: calls.append(done))
    assert calls == [(i, 20) for i in range(1, 21)]
    assert load_data(Data(path=str(tmp_path), image_size=8), 0) is first
    other = load_data(spec, 1, progress=lambda *done: calls.append(done))
    assert len(calls) == 20  # another split, the same pixels
    assert other.split.tolist() != first.split.tolist()
    assert (other.data_hash, other.inputs_hash) == (first.data_hash, first.inputs_hash)
    assert other.split_hash != first.split_hash
    for seed in range(2, 12):
        load_data(spec, seed)
    assert len(frostline.data._loaded) == 4


def test_hashes_say_what_changed(tmp_path):
    first = load(classes_of(tmp_path))
    larger = load(tmp_path, image_size=16)
    assert (larger.data_hash, larger.split_hash) == (first.data_hash, first.split_hash)
    assert larger.inputs_hash != first.inputs_hash
    assert load(tmp_path, fit="squash").inputs_hash != first.inputs_hash
    write(tmp_path, "cat/00.png", png("changed"))
    changed = load(tmp_path)
    assert changed.data_hash != first.data_hash
    assert changed.split_hash == first.split_hash
    (tmp_path / "cat/00.png").rename(tmp_path / "cat/000.png")
    assert load(tmp_path).data_hash not in (first.data_hash, changed.data_hash)
    assert len(first.data_hash) == len(first.split_hash) == 16


def test_the_data_hash_is_of_id_class_and_content(tmp_path):
    dataset = load(classes_of(tmp_path, 3))
    total = hashlib.sha256()
    for name in sorted(dataset.sample_ids):
        content = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        total.update(f'["{name}", "{name[:3]}", "{content}"]\n'.encode())
    assert dataset.data_hash == total.hexdigest()[:16]


def test_given_splits_are_kept_and_the_missing_carved_out_of_train(tmp_path):
    assert sizes(load(with_splits(tmp_path / "all"))) == {"train": 16, "val": 6, "test": 6}
    no_val = load(with_splits(tmp_path / "no_val", ("train", "test")), val=0.25)
    assert sizes(no_val) == {"train": 12, "val": 4, "test": 6}
    assert all(no_val.sample_ids[i].startswith("test/") for i in no_val.indices("test"))
    assert sizes(load(with_splits(tmp_path / "no_test", ("train", "val")), test=0.25)) == {
        "train": 12,
        "val": 6,
        "test": 4,
    }
    assert sizes(load(with_splits(tmp_path / "only_train", ("train",)), val=0.25, test=0.25)) == {
        "train": 8,
        "val": 4,
        "test": 4,
    }
    with pytest.raises(DataError, match="comes with test and val but no train split"):
        load(with_splits(tmp_path / "no_train", ("val", "test")))


def test_identical_images_never_cross_a_split_of_ours(tmp_path):
    classes_of(tmp_path, 30)
    for i in range(0, 30, 3):
        for copy in range(3):
            write(tmp_path, f"cat/{i + copy:02}.png", png("same", i))
    for seed in range(10):
        dataset = load(tmp_path, seed)
        assert len(dataset.sample_ids) == 60
        where: dict[bytes, set[str]] = {}
        for name, split in zip(dataset.sample_ids, dataset.split.tolist(), strict=True):
            where.setdefault((tmp_path / name).read_bytes(), set()).add(split)
        assert all(len(splits) == 1 for splits in where.values())
        assert set(dataset.split[dataset.labels == 0]) == {"train", "val", "test"}


def parquet(folder: Path, rows: int = 24, **columns) -> Path:
    labels = ["cat", "dog"] * (rows // 2)
    pq.write_table(pa.table({"image": [png(i) for i in range(rows)], "label": labels} | columns), folder / "d.parquet")
    return folder / "d.parquet"


def test_groups_never_cross_even_through_copies(tmp_path):
    groups = [f"g{i // 2}" for i in range(24)]  # a cat and a dog each
    images = [png(i) for i in range(24)]
    images[0] = images[2]  # joins g0 and g1
    path = parquet(tmp_path, image=images, site=groups)
    for seed in range(5):
        dataset = load(path, seed, group_column="site")
        assert dataset.groups == tuple(groups)
        split_of = dict(zip(groups, dataset.split.tolist(), strict=True))
        assert [split_of[group] for group in groups] == dataset.split.tolist()
        assert split_of["g0"] == split_of["g1"]


@pytest.mark.fault(38, 40)
def test_bad_samples_stop_the_job_with_one_list(tmp_path):
    classes_of(tmp_path, 10)
    for i in range(12):
        write(tmp_path, f"cat/bad{i:02}.png", b"no image")
    write(tmp_path, "dog/empty.png", b"")
    (tmp_path / "fox").mkdir()
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"14 problem(s) in {tmp_path} (12 x not an image, 1 x empty class, 1 x empty):"
    assert lines[1] == "  fox: empty class: no images in this folder"
    assert lines[2] == "  cat/bad00.png: not an image: none of PNG, JPEG, WEBP, BMP, GIF, TIFF"
    assert lines[-2] == "  and 4 more"
    assert lines[-1] == 'Mend them, or set data.on_bad = "exclude" to leave them out, counted and listed.'
    assert len(lines) == 13


@pytest.mark.fault(38, 40)
def test_bad_samples_can_be_excluded_with_their_reasons(tmp_path):
    classes_of(tmp_path, 10)
    clean = load(tmp_path)
    write(tmp_path, "cat/bad.png", b"no image")
    write(tmp_path, "dog/empty.png", b"")
    Image.new("L", (1001, 1000)).save(tmp_path / "dog/large.png")
    (tmp_path / "fox").mkdir()
    dataset = load(tmp_path, on_bad="exclude", max_megapixels=1)
    assert dict(dataset.excluded) == {
        "fox": "empty class: no images in this folder",
        "cat/bad.png": "not an image: none of PNG, JPEG, WEBP, BMP, GIF, TIFF",
        "dog/empty.png": "empty: no bytes",
        "dog/large.png": "too large: 1001 x 1000 pixels, allowed are 1,000,000 in all",
    }
    assert dataset.data_hash == clean.data_hash
    assert dataset.split.tolist() == clean.split.tolist()
    assert dataset.split_hash != clean.split_hash
    np.testing.assert_array_equal(dataset.inputs, clean.inputs)


@pytest.mark.fault(40)
def test_duplicates_across_given_splits_leave_train_first_and_test_never(tmp_path):
    with_splits(tmp_path)
    for name in ("train/cat/0.png", "val/cat/0.png", "test/cat/0.png"):
        write(tmp_path, name, png("everywhere"))
    for name in ("train/dog/0.png", "train/dog/1.png", "val/cat/1.png"):
        write(tmp_path, name, png("both"))
    for name in ("train/cat/2.png", "train/cat/3.png"):
        write(tmp_path, name, png("within train"))
    with pytest.raises(DataError, match=r"4 problem\(s\) in .* \(4 x duplicate\):"):
        load(tmp_path)
    dataset = load(tmp_path, on_bad="exclude")
    assert dict(dataset.excluded) == {
        "train/cat/0.png": "duplicate: same content as test/cat/0.png in test",
        "val/cat/0.png": "duplicate: same content as test/cat/0.png in test",
        "train/dog/0.png": "duplicate: same content as val/cat/1.png in val, under another label",
        "train/dog/1.png": "duplicate: same content as val/cat/1.png in val, under another label",
    }
    assert sizes(dataset) == {"train": 13, "val": 5, "test": 6}


def test_empty_files_are_not_duplicates_of_each_other(tmp_path):
    with_splits(tmp_path)
    for name in ("train/cat/0.png", "test/cat/0.png"):
        write(tmp_path, name, b"")
    assert {reason for _, reason in load(tmp_path, on_bad="exclude").excluded} == {"empty: no bytes"}


def test_a_group_in_two_given_splits_is_a_leak(tmp_path):
    splits = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
    groups = [*range(23), 0]  # the last test row is of the first train row's group
    path = parquet(tmp_path, split=splits, site=groups)
    with pytest.raises(DataError, match=r"d.parquet:0: shared group: '0' as d.parquet:23 in test"):
        load(path, group_column="site")
    assert sizes(load(path, group_column="site", on_bad="exclude")) == {"train": 15, "val": 4, "test": 4}
    assert sizes(load(path)) == {"train": 16, "val": 4, "test": 4}


def test_what_has_been_left_out_leaks_no_more(tmp_path):
    """The val row is a copy of a test row; once it is gone, its group is in train only."""
    images = [png(i) for i in range(24)]
    images[16] = images[20]
    splits = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
    path = parquet(tmp_path, image=images, split=splits, site=[16, *range(1, 24)])
    dataset = load(path, group_column="site", on_bad="exclude")
    assert dataset.excluded == (("d.parquet:16", "duplicate: same content as d.parquet:20 in test"),)


@pytest.mark.fault(40)
def test_what_cannot_be_used_at_all_is_always_an_error(tmp_path):
    exclude = {"on_bad": "exclude"}
    with pytest.raises(DataError, match=r"has only samples of class 'cat'; at least two classes are needed$"):
        load(classes_of(tmp_path / "one", names=("cat",)), **exclude)
    write(tmp_path / "none", "cat/a.png", b"x")
    with pytest.raises(DataError, match=r"has no samples; .* after 1 exclusion\(s\), such as cat/a.png: not an image"):
        load(tmp_path / "none", **exclude)
    classes_of(tmp_path / "few")
    write(tmp_path / "few", "fox/a.png")
    write(tmp_path / "few", "fox/b.png")
    with pytest.raises(DataError, match=r"class 'fox' has 2 sample\(s\), fewer than the 3 splits to fill"):
        load(tmp_path / "few", **exclude)
    write(with_splits(tmp_path / "stray"), "test/fox/a.png")
    with pytest.raises(DataError, match=r"class\(es\) 'fox' in test, but not in train"):
        load(tmp_path / "stray", **exclude)
    with_splits(tmp_path / "leak", ("train", "test"))
    for name in ("cat", "dog"):
        write(tmp_path / "leak", f"val/{name}/0.png", png(f"test/{name}/0.png"))
    with pytest.raises(
        DataError, match=r"has no samples left in val, after 2 exclusion\(s\), such as val/cat/0.png: dup"
    ):
        load(tmp_path / "leak", **exclude)
    with pytest.raises(DataError, match=r"/fe does not exist; did you mean 'few'\?"):
        load(tmp_path / "fe")


def test_a_subset_is_stratified_seeded_and_nested(tmp_path):
    dataset = load(classes_of(tmp_path, 20, ("a", "b", "c")))
    train = dataset.indices("train")
    assert subset(dataset, None, 0).tolist() == train.tolist()
    five = subset(dataset, 5, 3)
    assert five.dtype == np.int64
    assert five.tolist() == sorted(set(five.tolist()) & set(train.tolist()))
    assert Counter(dataset.labels[five].tolist()) == {0: 5, 1: 5, 2: 5}
    assert subset(dataset, 5, 3).tolist() == five.tolist() != subset(dataset, 5, 4).tolist()
    assert set(five) < set(subset(dataset, 6, 3))
    assert subset(dataset, 14, 3).tolist() == train.tolist()
    with pytest.raises(
        DataError, match=r"per_class = 15, but class 'a' has 14 samples in train: lower it to 14 or below"
    ):
        subset(dataset, 15, 3)
    assert at_most(dataset, 5, 3).tolist() == five.tolist()
    assert at_most(dataset, 15, 3).tolist() == train.tolist()


def test_the_splits_table_lists_all(tmp_path):
    path = parquet(tmp_path, label=[None, "dog", *["cat", "dog"] * 11], site=[str(i) for i in range(24)])
    dataset = load(path, group_column="site", on_bad="exclude")
    table = splits_table(dataset)
    assert table.column_names == ["sample_id", "label", "group_id", "split", "reason"]
    rows = table.to_pylist()
    assert [row["sample_id"] for row in rows] == [f"d.parquet:{i}" for i in range(1, 24)] + ["d.parquet:0"]
    assert rows[0] == {
        "sample_id": "d.parquet:1",
        "label": "dog",
        "group_id": "1",
        "split": dataset.split[0],
        "reason": None,
    }
    assert rows[-1] == {
        "sample_id": "d.parquet:0",
        "label": None,
        "group_id": None,
        "split": "excluded",
        "reason": "no label: null in this row",
    }
    assert set(table["split"].to_pylist()) == {"train", "val", "test", "excluded"}
    pq.write_table(table, tmp_path / "splits.parquet")
    assert pq.read_table(tmp_path / "splits.parquet").equals(table)


@given(st.lists(st.text(max_size=4) | st.integers().map(str), max_size=8), st.randoms())
def test_class_order_depends_on_nothing_but_the_names(names, random):
    order = order_classes(names)
    assert sorted(order) == sorted(set(names))
    shuffled = list(names)
    random.shuffle(shuffled)
    assert order_classes(shuffled) == order


def test_class_order():
    names = ["b", "10", "B", "9", "-1", "09", "a10", "a9", "1" * 5000, "٣"]
    assert order_classes(names) == ("-1", "09", "9", "10", "1" * 5000, "B", "a10", "a9", "b", "٣")


def test_idx_folders_load(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        pixels, labels = rng.integers(0, 256, (count, 9, 7), np.uint8), bytes(i % 2 for i in range(count))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 0x803, count, 9, 7) + pixels.tobytes()
        )
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
    dataset = load(tmp_path)
    assert sizes(dataset) == {"train": 34, "val": 6, "test": 10}
    grey = Image.fromarray(pixels[3]).resize((8, 8), Image.Resampling.BICUBIC, box=(0, 1, 7, 8))
    for channel in range(3):
        np.testing.assert_array_equal(dataset.inputs[43, :, :, channel], np.asarray(grey))


@pytest.mark.slow
def test_the_full_fashion_mnist():
    if not Path(FASHION_MNIST).exists():
        pytest.skip("the full Fashion-MNIST is absent: apt-get install dataset-fashion-mnist")
    dataset = load("fashion-mnist")
    assert dataset.classes[0] == "T-shirt/top"
    assert sizes(dataset) == {"train": 51_000, "val": 9_000, "test": 10_000}
    assert set(Counter(dataset.labels[dataset.indices("val")].tolist()).values()) == {900}
    assert dataset.data_hash == "5e7f4344e628bee6"


def test_s3_and_local_files_give_the_same(tmp_path, monkeypatch):
    classes_of(tmp_path / "pets")
    write(tmp_path / "pets", "cat/bad.png", b"no image")
    parquet(tmp_path)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="parity")
    for path in (tmp_path / "pets").rglob("*.png"):
        client.upload_file(path, "parity", path.relative_to(tmp_path).as_posix())
    client.upload_file(tmp_path / "d.parquet", "parity", "d.parquet")
    for name in ("pets", "d.parquet"):
        near, far = load(tmp_path / name, on_bad="exclude"), load(f"s3://parity/{name}", on_bad="exclude")
        assert (far.data_hash, far.split_hash, far.inputs_hash) == (near.data_hash, near.split_hash, near.inputs_hash)
        np.testing.assert_array_equal(far.inputs, near.inputs)
        assert far.excluded == near.excluded
    write(tmp_path, "other.png")
    client.upload_file(tmp_path / "other.png", "parity", "pets/cat/00.png")
    assert load("s3://parity/pets", on_bad="exclude").data_hash != load(tmp_path / "pets", on_bad="exclude").data_hash
    client.close()
    server.stop()


def test_no_torch_and_no_ray_is_imported():
    code = "import frostline.data, sys; print(sorted({'torch', 'ray', 'sklearn', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
