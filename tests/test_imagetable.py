import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frostline.files import DataError, locate
from frostline.images import BadImage
from frostline.imagetable import open_table, read_cells
from frostline.spec import Data

RAW = [b"one", b"two", b"three"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def written(folder, columns: dict, **options):
    """The place of a Parquet file with these columns."""
    pq.write_table(pa.table(columns), folder / "t.parquet", **options)
    return locate(f"{folder}/t.parquet")


def spec(**keys) -> Data:
    return Data.model_validate({"path": "x"} | keys)


def read(place, rows: list[int]) -> list[bytes | str]:
    found = []
    for reader in read_cells(place, "image", rows):
        try:
            found.append(reader())
        except BadImage as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    "images",
    [
        pa.array(RAW),
        pa.array(RAW, pa.large_binary()),
        pa.array([{"bytes": raw, "path": None} for raw in RAW], STRUCT),
        pa.array([{"bytes": raw, "path": None} for raw in RAW]),  # the type of path is null
        pa.array([{"bytes": raw} for raw in RAW], pa.struct([("bytes", pa.large_binary())])),
        pa.array(["a/1.png", "2.png", "./3.png"]),
        pa.array(["a/1.png", "2.png", "3.png"], pa.large_string()),
        pa.array([{"bytes": None, "path": path} for path in ("a/1.png", "2.png", "3.png")], STRUCT),
    ],
    ids=lambda images: str(images.type),
)
def test_every_image_column(tmp_path, images):
    (tmp_path / "a").mkdir()
    for name, raw in zip(("a/1.png", "2.png", "3.png"), RAW, strict=True):
        (tmp_path / name).write_bytes(raw)
    place = written(tmp_path, {"image": images, "label": [0, 1, 0]})
    table = open_table(place, spec())
    assert table.labels == ["0", "1", "0"]
    assert (table.groups, table.splits) == (None, None)
    assert read(place, [0, 1, 2]) == RAW
    assert read(place, [0, 2]) == RAW[::2]
    assert read(place, []) == []


def test_rows_are_found_over_batches_and_row_groups(tmp_path):
    raws = [str(i).encode() for i in range(1000)]
    place = written(tmp_path, {"image": raws, "label": ["x"] * 1000}, row_group_size=77)
    wanted = [0, 31, 32, 76, 77, 500, 999]
    assert read(place, wanted) == [raws[i] for i in wanted]


def test_image_files_behind_rows_are_known_where_that_is_cheap(tmp_path):
    label = [1, 2]

    def paths(images: pa.Array, **options) -> list[str] | None:
        return open_table(written(tmp_path, {"image": images, "label": label}, **options), spec()).paths

    embedded = pa.array([{"bytes": b"1", "path": "a"}] * 2, STRUCT)
    assert paths(pa.array([b"1", None])) == []
    assert paths(pa.array(["a/1.png", "../out"])) == ["a/1.png"]
    assert paths(embedded) == []
    assert paths(embedded, write_statistics=False) is None
    assert paths(pa.array([{"bytes": None, "path": "a"}, {"bytes": b"1", "path": "a"}], STRUCT)) is None


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "a/../../secret.png", "s3://bucket/x.png"])
def test_paths_stay_below_the_folder(tmp_path, path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    place = written(tmp_path / "in", {"image": [path], "label": [0]})
    assert read(place, [0]) == [f"path: {path!r} is not relative to, and below, the folder of its Parquet file"]


def test_what_is_missing_is_one_bad_image(tmp_path):
    place = written(tmp_path, {"image": pa.array([None, "gone.png"]), "label": [0, 0]})
    assert read(place, [0, 1]) == ["no image: null in this row", "missing: no such file"]


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (pa.array([3, None], pa.uint8()), ["3", None]),
        (pa.array(["b", "a"], pa.large_string()), ["b", "a"]),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        (pa.array([-1, 10**15]), ["-1", str(10**15)]),
    ],
)
def test_labels_and_groups_are_integers_or_strings(tmp_path, labels, texts):
    place = written(tmp_path, {"image": RAW[:2], "label": labels, "site": labels})
    table = open_table(place, spec(group_column="site"))
    assert (table.labels, table.groups) == (texts, texts)


def test_a_split_column_is_read(tmp_path):
    place = written(tmp_path, {"image": RAW, "label": [0, 1, 0], "split": ["Train", "validation", None]})
    assert open_table(place, spec()).splits == ["train", "val", None]
    place = written(tmp_path, {"image": RAW, "label": [0, 1, 0], "split": [1, 2, 3]})
    with pytest.raises(DataError, match=r"column 'split' holds '1'; allowed are train, val, valid.*rename the column"):
        open_table(place, spec())


def test_a_wrong_column_names_the_nearest_and_all(tmp_path):
    place = written(tmp_path, {"image": RAW, "labels": [0, 1, 0]})
    with pytest.raises(
        DataError,
        match=r"data\.label_column = 'label': .*did you mean 'labels'\? \(columns there: image, labels\)",
    ):
        open_table(place, spec())
    with pytest.raises(DataError, match=r"data\.group_column = 'site': .* has no such column \(columns"):
        open_table(place, spec(label_column="labels", group_column="site"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": RAW, "label": [0.5, 1, 2]}, "column 'label' holds 0.5; integers or strings are needed"),
        ({"image": [1, 2, 3], "label": [0, 1, 2]}, "column 'image' holds int64; images are struct<bytes"),
        ({"image": [{"data": b"1"}] * 3, "label": [0, 1, 2]}, "column 'image' holds struct<data: binary>; images are"),
    ],
)
def test_wrong_types_are_named(tmp_path, columns, reason):
    with pytest.raises(DataError, match=reason):
        open_table(written(tmp_path, columns), spec())


def test_damaged_files_are_data_errors(tmp_path):
    place = written(tmp_path, {"image": [bytes(5000)] * 3, "label": [0, 1, 2]}, compression="none", use_dictionary=False,
                    write_page_checksum=True)  # fmt: skip
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:4000] + b"!" + whole[4001:])
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet: .*CRC"):
        read(place, [0])
    (tmp_path / "t.parquet").write_bytes(whole[:5000])
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet: "):
        open_table(place, spec())


@pytest.mark.parametrize("column", ["image", "label"])
def test_names_that_are_no_utf8_are_damage(tmp_path, column):
    columns = {"image": pa.array(["a.png"]), "label": pa.array(["x"])}
    columns[column] = pa.array([b"\xff.png"]).view(pa.string())
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet: .*UTF8"):
        open_table(written(tmp_path, columns), spec())
