import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from frostline.files import DataError
from frostline.sources import FASHION_CLASSES, FASHION_MNIST, Source, infer_kind, open_source
from frostline.spec import Data


def tree(folder: Path, *names: str) -> Path:
    """Files that hold their own names; a name that ends with / is an empty folder."""
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
    return folder


def opened(path: Path | str, **keys) -> Source:
    return open_source(Data.model_validate({"path": str(path)} | keys))


def contents(source: Source) -> list[bytes]:
    return [reader() for reader in source.read(range(len(source.sample_ids)))]


def write_idx(folder: Path, prefix: str, pixels: np.ndarray, labels: list[int], suffix: str = "") -> None:
    squeeze = gzip.compress if suffix else bytes
    images = struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()
    (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(squeeze(images))
    (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(
        squeeze(struct.pack(">2I", 0x801, len(labels)) + bytes(labels))
    )


@pytest.mark.parametrize(
    ("path", "files", "kind"),
    [
        ("digits", [], "digits"),
        ("fashion-mnist", [], "idx"),
        ("d", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"], "idx"),
        ("d", ["t10k-labels-idx1-ubyte.gz"], "idx"),
        ("d", ["raw/train-images-idx3-ubyte", "cat/a.png"], "folder"),
        ("d", ["a/x.PARQUET", "images/cat.png"], "parquet"),
        ("d/x.pq", ["x.pq"], "parquet"),
        ("d", ["cat/a.png"], "folder"),
        ("d", [], "folder"),
    ],
)
def test_infer_kind(path, files, kind):
    assert infer_kind(path, files) == kind


def test_digits():
    source = opened("digits")
    assert len(source.sample_ids) == len(set(source.sample_ids)) == 1797
    assert source.grey_shape == (8, 8)
    first = np.frombuffer(contents(source)[0], np.uint8).reshape(8, 8)
    assert first[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0, times 255 / 16
    assert {int(v) for raw in contents(source) for v in set(raw)} == {round(v * 255 / 16) for v in range(17)}
    assert source.names[:10] == list("0123456789")
    theirs = load_digits()
    assert source.names == [str(label) for label in theirs.target]
    ours = np.array([np.frombuffer(raw, np.uint8) for raw in contents(source)])
    assert np.array_equal(ours, np.rint(theirs.data * (255 / 16)))
    assert source.splits is None


def test_a_folder_per_class(tmp_path):
    tree(
        tmp_path, "dog/b.JPG", "dog/deep/a.png", "cat/x.webp", "cat/notes.txt", "cat/.x.png", ".git/z.png", "README.md"
    )
    source = opened(tmp_path)
    assert source.sample_ids == ["cat/x.webp", "dog/b.JPG", "dog/deep/a.png"]
    assert source.names == ["cat", "dog", "dog"]
    assert (source.splits, source.groups, source.problems) == (None, None, ())
    assert contents(source) == [b"cat/x.webp", b"dog/b.JPG", b"dog/deep/a.png"]


def test_split_folders_above_the_classes(tmp_path):
    tree(tmp_path, "train/cat/a.png", "Valid/cat/b.png", "test/dog/deep/c.png", "validation/dog/d.png", "LICENSE")
    source = opened(tmp_path)
    assert source.names == ["cat", "dog", "cat", "dog"]
    assert source.splits == ["val", "test", "train", "val"]


def test_one_class_may_be_called_train(tmp_path):
    source = opened(tree(tmp_path, "bus/a.png", "train/b.png"))
    assert source.names == ["bus", "train"]
    assert source.splits is None


def test_splits_beside_something_else_are_ambiguous(tmp_path):
    with pytest.raises(DataError, match=r"split folders \(test, train\) beside 'extra': is that a class or a split\?"):
        opened(tree(tmp_path, "train/cat/a.png", "test/cat/b.png", "extra/cat/c.png"))


def test_what_belongs_to_no_class_or_holds_nothing_is_a_problem(tmp_path):
    source = opened(tree(tmp_path / "flat", "loose.png", "cat/a.png", "dog/notes.txt", "fox/", ".cache/"))
    assert source.sample_ids == ["cat/a.png"]
    assert source.problems == (
        ("loose.png", "no class: lies in no class folder"),
        ("dog", "empty class: no images in this folder"),
        ("fox", "empty class: no images in this folder"),
    )
    source = opened(tree(tmp_path / "split", "train/cat/a.png", "train/dog/", "train/b.png", "val/"))
    assert source.problems == (
        ("train/b.png", "no class: lies in no class folder"),
        ("train/dog", "empty class: no images in this folder"),
        ("val", "empty split: no images in this folder"),
    )


def test_a_folder_without_images_says_what_is_there(tmp_path):
    with pytest.raises(
        DataError, match=r"holds no images \(.png .*\) and no Parquet, but 2 other file\(s\), such as 'a.txt'"
    ):
        opened(tree(tmp_path / "texts", "a.txt", "b/c.csv"))
    with pytest.raises(DataError, match="but no visible file"):
        opened(tree(tmp_path / "hidden", ".x.png", "empty/"))
    with pytest.raises(DataError, match=r"c\.csv is a single file and not Parquet"):
        opened(tmp_path / "texts/b/c.csv")


def test_a_stamp_changes_with_every_file(tmp_path):
    tree(tmp_path, "cat/a.png", "dog/b.png")
    before = opened(tmp_path)
    assert opened(tmp_path).stamp == before.stamp
    assert before.changed_ns == max((tmp_path / name).stat().st_mtime_ns for name in before.sample_ids)
    os.utime(tmp_path / "cat/a.png", ns=(1, 1))
    touched = opened(tmp_path).stamp
    (tmp_path / "dog/b.png").rename(tmp_path / "dog/c.png")
    renamed = opened(tmp_path).stamp
    assert len({before.stamp, touched, renamed}) == 3
    tree(tmp_path, "dog/notes.txt")
    assert opened(tmp_path).stamp == renamed


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    write_idx(tmp_path, "train", pixels[:3], [5, 0, 12], suffix)
    source = opened(tmp_path)
    assert source.splits is None
    write_idx(tmp_path, "t10k", pixels[3:], [0, 5], suffix)
    source = opened(tmp_path)
    assert source.sample_ids == ["train/0", "train/1", "train/2", "t10k/0", "t10k/1"]
    assert source.names == ["5", "0", "12", "0", "5"]
    assert source.splits == ["train"] * 3 + ["test"] * 2
    assert (source.grey_shape, source.classes) == ((4, 3), None)
    assert contents(source) == [image.tobytes() for image in pixels]
    assert [reader() for reader in source.read([2, 3])] == [pixels[2].tobytes(), pixels[3].tobytes()]


def test_idx_files_that_do_not_fit_together(tmp_path):
    pixels = np.zeros((2, 4, 3), np.uint8)
    write_idx(tmp_path, "t10k", pixels, [0, 1])
    with pytest.raises(
        DataError, match=r"has no train-images-idx3-ubyte\(\.gz\), but t10k-images-idx3-ubyte, t10k-labels"
    ):
        opened(tmp_path)
    write_idx(tmp_path, "train", pixels, [0, 1, 2])
    with pytest.raises(DataError, match="train-images-idx3-ubyte has 2 images for 3 labels"):
        opened(tmp_path)
    write_idx(tmp_path, "train", np.zeros((2, 5, 3), np.uint8), [0, 1])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte has images of \(4, 3\) pixels, train of \(5, 3\)"):
        opened(tmp_path)


def test_fashion_mnist_names_its_classes_wherever_it_lies(tmp_path):
    folder = tree(tmp_path, "fashion-mnist/") / "fashion-mnist"
    write_idx(folder, "train", np.zeros((3, 4, 4), np.uint8), [9, 0, 6], ".gz")
    source = opened(folder)
    assert source.names == ["Ankle boot", "T-shirt/top", "Shirt"]
    assert source.classes == FASHION_CLASSES
    write_idx(folder, "train", np.zeros((1, 4, 4), np.uint8), [10], ".gz")
    with pytest.raises(DataError, match="has label 10; Fashion-MNIST has 0 to 9"):
        opened(folder)


def test_debians_fashion_mnist():
    if not Path(FASHION_MNIST).exists():
        with pytest.raises(DataError, match=r"does not exist.*`apt-get install dataset-fashion-mnist` puts it there"):
            opened("fashion-mnist")
        pytest.skip("the full Fashion-MNIST is absent: apt-get install dataset-fashion-mnist")
    source = opened("fashion-mnist")
    assert len(source.names) == 70_000
    assert source.splits == ["train"] * 60_000 + ["test"] * 10_000
    assert source.names[:4] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    first = next(source.read([0]))()
    assert (len(first), sum(first)) == (784, 76_247)


def test_without_debians_package_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("frostline.sources.FASHION_MNIST", str(tmp_path / "fashion-mnist"))
    with pytest.raises(DataError, match=r"fashion-mnist does not exist; `apt-get install dataset-fashion-mnist`"):
        opened("fashion-mnist")


def test_a_parquet_file(tmp_path):
    columns = {"image": [b"0", b"1", b"2", b"3"], "label": ["a", None, "b", "a"], "site": [1, 1, None, 2]}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    source = opened(tmp_path / "d.parquet")
    assert source.sample_ids == ["d.parquet:0", "d.parquet:2", "d.parquet:3"]
    assert source.names == ["a", "b", "a"]
    assert contents(source) == [b"0", b"2", b"3"]
    assert source.problems == (("d.parquet:1", "no label: null in this row"),)
    assert (source.groups, source.splits) == (None, None)
    grouped = opened(tmp_path / "d.parquet", group_column="site")
    assert grouped.groups == ["1", "2"]
    assert grouped.problems[1] == ("d.parquet:2", "no group: null in this row")
    assert grouped.stamp != source.stamp  # the same file, other samples


def test_a_folder_of_parquet_files(tmp_path):
    tree(tmp_path, "b/", "a/one.png", "notes.txt")
    pq.write_table(pa.table({"image": ["one.png"], "label": [1]}), tmp_path / "a/y.parquet")
    pq.write_table(pa.table({"image": [b"2", b"3"], "label": [2, 3]}), tmp_path / "b/x.parquet")
    source = opened(tmp_path)
    assert source.sample_ids == ["a/y.parquet:0", "b/x.parquet:0", "b/x.parquet:1"]
    assert contents(source) == [b"a/one.png", b"2", b"3"]
    assert source.names == ["1", "2", "3"]
    tree(tmp_path, "a/one.png")
    (tmp_path / "a/one.png").write_bytes(b"changed, and longer")
    assert opened(tmp_path).stamp != source.stamp


def test_no_stamp_where_only_reading_would_tell(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "one.png"}, {"bytes": b"2", "path": None}], struct)
    pq.write_table(pa.table({"image": images, "label": [1, 2]}), tree(tmp_path, "one.png") / "d.parquet")
    source = opened(tmp_path)
    assert source.stamp is None
    assert contents(source) == [b"one.png", b"2"]


def test_parquet_splits_by_column_or_by_file_name(tmp_path):
    def write(name: str, **columns) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [b"1", b"2"], "label": [0, 1]} | columns), tmp_path / name)

    write("column/d.parquet", split=["test", None])
    source = opened(tmp_path / "column")
    assert source.splits == ["test"]
    assert source.problems == (("d.parquet:1", "no split: null in this row"),)
    write("names/train-00000-of-00002.parquet")
    assert opened(tmp_path / "names").splits is None  # one file says nothing
    write("names/train-00001-of-00002.parquet")
    write("names/validation.parquet")
    assert opened(tmp_path / "names").splits == ["train"] * 4 + ["val"] * 2
    write("names/more.parquet")
    with pytest.raises(DataError, match=r"holds 'train-00000-of-00002.parquet' beside 'more.parquet': which split"):
        opened(tmp_path / "names")
    write("column/e.parquet")
    with pytest.raises(DataError, match="some of its Parquet files say which split their rows are in, some do not"):
        opened(tmp_path / "column")


def test_what_need_not_be_labelled(tmp_path: Path) -> None:
    def unlabelled(path: Path) -> Source:
        return open_source(Data(path=str(path)), labelled=False)

    for name in ("cat/1.png", "2.png", "train/dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = unlabelled(tmp_path)
    assert dict(zip(found.sample_ids, found.names, strict=True)) == {
        "2.png": None,
        "cat/1.png": "cat",
        "train/dog/3.png": "train",
    }
    assert (found.problems, found.splits) == ((), None)
    assert [read() for read in found.read([0, 2])] == [b"2.png", b"train/dog/3.png"]
    one = unlabelled(tmp_path / "2.png")
    assert (one.sample_ids, one.names, next(one.read([0]))()) == (["2.png"], [None], b"2.png")
    table = pa.table({"image": [b"x", b"y"], "split": ["test", "strange"]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = unlabelled(tmp_path / "t.parquet")
    assert (rows.names, rows.splits, rows.problems) == ([None, None], None, ())
    with pytest.raises(DataError, match="label_column"):
        open_source(Data(path=str(tmp_path / "t.parquet")))
