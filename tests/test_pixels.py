import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frostline.cache import cache_root
from frostline.data import recipe_of
from frostline.files import DataError
from frostline.images import decode
from frostline.pixels import Rows, content_hashes, load_rows
from frostline.sources import Source, open_source
from frostline.spec import Data

LONG_AGO = 1_000_000_000 * 10**9  # 2001, in nanoseconds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(colour: int) -> bytes:
    out = BytesIO()
    Image.fromarray(np.full((12, 10, 3), colour % 240, np.uint8) + np.arange(10, dtype=np.uint8)[:, None]).save(
        out, "PNG"
    )
    return out.getvalue()


def images(folder: Path, count: int = 20, changed_ns: int = LONG_AGO) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        os.utime(path, ns=(changed_ns, changed_ns))
    return folder


def source_of(folder: Path) -> Source:
    return open_source(Data(path=str(folder)))


def load(source: Source, size: int = 8, progress=None, **keys) -> Rows:
    hashes, bad = content_hashes(source)
    assert not bad
    spec = Data.model_validate({"path": "any", "image_size": size, "max_megapixels": 0.001} | keys)
    return load_rows(source, np.arange(len(hashes)), hashes, recipe_of(spec, source), progress)


def counting(source: Source, reads: list) -> Source:
    """The same source, noting every sample that is read from it."""

    def read(indices):
        reads.extend(indices)
        return source.read(indices)

    return Source(**(vars(source) | {"read": read}))


def test_pixels_are_those_of_decode(tmp_path):
    folder = images(tmp_path / "data", 50)
    source, calls = source_of(folder), []
    pixels = load(source, progress=lambda done, total: calls.append((done, total)))
    assert (pixels.rows.shape, pixels.rows.dtype, pixels.bad) == ((50, 8, 8, 3), np.uint8, {})
    for row, name in zip(pixels.rows, source.sample_ids, strict=True):
        raw = (folder / name).read_bytes()
        np.testing.assert_array_equal(row, decode(raw, size=8, fit="crop", max_pixels=1000))
    assert calls == [(i, 50) for i in range(1, 51)]
    assert isinstance(pixels.rows, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        pixels.rows[0] = 0


def test_nothing_is_read_twice(tmp_path):
    reads: list[int] = []
    source = counting(source_of(images(tmp_path / "data")), reads)
    first = load(source)
    assert len(reads) == 40  # once for the hashes, once for the pixels
    second = load(source)
    assert len(reads) == 40
    assert second.key == first.key
    np.testing.assert_array_equal(first.rows, second.rows)
    load(source, size=9)
    assert len(reads) == 60


def test_the_key_covers_what_could_change_the_pixels(tmp_path, monkeypatch):
    source = source_of(images(tmp_path / "data"))
    keys = [
        load(source).key,
        load(source, size=9).key,
        load(source, fit="squash").key,
        load(source, max_megapixels=0.002).key,
    ]
    monkeypatch.setattr("PIL.__version__", "0.0")
    keys.append(load(source).key)
    monkeypatch.setattr("frostline.data.DECODE_VERSION", 0)
    keys.append(load(source).key)
    (tmp_path / "data/a/000.png").write_bytes(png(99))
    keys.append(load(source_of(tmp_path / "data")).key)
    assert len(set(keys)) == 7


def test_changed_files_are_hashed_again(tmp_path):
    folder = images(tmp_path / "data")
    before, _ = content_hashes(source_of(folder))
    (folder / "a/000.png").write_bytes(png(77))
    after, _ = content_hashes(source_of(folder))
    assert (before != after).any(axis=1).tolist() == [True] + [False] * 19


def test_files_that_have_only_just_changed_are_not_trusted_to_keep_their_stamp(tmp_path):
    folder = images(tmp_path / "data", changed_ns=(now := time.time_ns()))
    before, _ = content_hashes(source_of(folder))
    same_size = png(0)[:-20] + bytes(20)
    (folder / "a/000.png").write_bytes(same_size)
    os.utime(folder / "a/000.png", ns=(now, now))
    assert (content_hashes(source_of(folder))[0] != before).any()


def test_a_file_that_changes_between_hashing_and_decoding_is_noticed(tmp_path, cache):
    folder = images(tmp_path / "data")
    source = source_of(folder)
    hashes, _ = content_hashes(source)
    (folder / "b/003.png").write_bytes(png(88))
    with pytest.raises(DataError, match=r"b/003\.png changed while it was being read"):
        load_rows(source, np.arange(20), hashes, recipe_of(Data(path="any", image_size=8), source))
    assert {path.name for path in (cache / "pixels").rglob("*") if path.is_file()} == {"lock"}


def test_bad_images_have_a_reason_and_no_row(tmp_path):
    folder = images(tmp_path / "data")
    (folder / "a/000.png").write_bytes(b"")
    (folder / "b/003.png").write_bytes(png(3)[:-30])
    Image.new("RGB", (40, 40)).save(folder / "b/019.png")
    for _ in range(2):  # built, then from the cache
        pixels = load(source_of(folder))
        assert pixels.bad[0] == "empty: no bytes"
        assert pixels.bad[11].startswith("corrupt: ")
        assert pixels.bad[19].startswith("too large: 40 x 40")
        assert pixels.rows.shape == (17, 8, 8, 3)
        second = decode((folder / "a/002.png").read_bytes(), size=8, fit="crop", max_pixels=1000)
        np.testing.assert_array_equal(pixels.rows[0], second)
    path = next((cache_root() / "pixels").glob("*/pixels.npy"))
    assert np.load(path).shape == (17, 8, 8, 3)  # anybody can read it


def test_all_bad_is_no_rows(tmp_path):
    folder = images(tmp_path / "data", 2)
    for name in ("a/000.png", "b/001.png"):
        (folder / name).write_bytes(b"nothing")
    for _ in range(2):
        pixels = load(source_of(folder))
        assert (pixels.rows.shape, len(pixels.bad)) == ((0, 8, 8, 3), 2)


def test_unreadable_files_are_asked_for_again(tmp_path):
    folder = images(tmp_path / "data")
    source = source_of(folder)
    whole = (folder / "a/000.png").read_bytes()
    (folder / "a/000.png").unlink()
    hashes, bad = content_hashes(source)
    assert bad == {0: "missing: no such file"}
    assert not hashes[0].any()
    (folder / "a/000.png").write_bytes(whole)
    hashes, bad = content_hashes(source)
    assert bad == {}
    assert hashes[0].any()


@pytest.mark.parametrize("name", ["pixels/*/pixels.npy", "pixels/*/bad.json", "hashes/*/sha256.npy"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "empty", "garbage", "delete", "other shape"])
def test_damaged_entries_are_built_again(tmp_path, cache, name, damage):
    source = source_of(images(tmp_path / "data"))
    expected = np.array(load(source).rows)
    path = next(cache.glob(name))
    whole = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "other shape":
        with path.open("wb") as file:
            np.save(file, np.zeros((20, 7, 7, 3), np.uint8))
    else:
        path.write_bytes(
            {"truncate": whole[:-1], "extend": whole + b"x", "empty": b"", "garbage": b"\x93NUMPY" + bytes(500)}[damage]
        )
    np.testing.assert_array_equal(load(source).rows, expected)
    assert path.read_bytes() == whole


LOADER = """
import sys
from pathlib import Path
import numpy as np
from frostline.data import recipe_of
from frostline.pixels import content_hashes, load_rows
from frostline.sources import open_source
from frostline.spec import Data
source = open_source(Data(path=sys.argv[1]))
hashes, _ = content_hashes(source)
calls = []
def progress(done, total):
    calls.append(done)
    if len(sys.argv) > 2 and done == 5:
        Path(sys.argv[2]).touch()
        import time; time.sleep(60)
recipe = recipe_of(Data(path="any", image_size=64, max_megapixels=0.001), source)
pixels = load_rows(source, np.arange(len(hashes)), hashes, recipe, progress)
print(len(calls), int(np.asarray(pixels.rows, np.int64).sum()))
"""


def test_of_many_processes_at_once_one_decodes_and_all_see_the_same(tmp_path, cache):
    folder = images(tmp_path / "data", 300)
    command = [sys.executable, "-c", LOADER, str(folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate()[0].split() for process in running]
    assert sorted(int(calls) for calls, _ in outputs) == [0, 0, 0, 300]
    assert len({total for _, total in outputs}) == 1
    assert sorted(path.name for path in (cache / "pixels").glob("*/*")) == ["bad.json", "lock", "pixels.npy"]


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path, cache):
    folder = images(tmp_path / "data", 40)
    reached = tmp_path / "reached"
    with subprocess.Popen([sys.executable, "-c", LOADER, str(folder), str(reached)]) as process:
        while not reached.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in (cache / "pixels").glob("*/*")) == ["lock", "pixels.npy.tmp"]
    assert load(source_of(folder), size=64).rows.shape == (40, 64, 64, 3)
    assert sorted(path.name for path in (cache / "pixels").glob("*/*")) == ["bad.json", "lock", "pixels.npy"]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"the cache .* cannot be used: Not a directory; free space there, or let FROSTLINE_CACHE"
    ):
        content_hashes(source_of(images(tmp_path / "data", 2)))


def test_a_full_disk_is_a_data_error_and_leaves_no_part(tmp_path, cache, monkeypatch):
    code = """
import resource, signal, sys
import numpy as np
from frostline.data import recipe_of
from frostline.files import DataError
from frostline.pixels import content_hashes, load_rows
from frostline.sources import open_source
from frostline.spec import Data
source = open_source(Data(path=sys.argv[1]))
hashes, _ = content_hashes(source)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writes beyond fail as on a full disk
try:
    load_rows(source, np.arange(20), hashes, recipe_of(Data(path="any", image_size=64), source))
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(images(tmp_path / "data"))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot be used: File too large; free space there, or let FROSTLINE_CACHE name another" in shown
    assert [path.name for path in (cache / "pixels").glob("*/*")] == ["lock"]


def test_the_cache_lies_in_the_home_folder_unless_told(monkeypatch):
    monkeypatch.delenv("FROSTLINE_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == Path("/home/somebody/.cache/frostline")


def test_an_entry_is_private(tmp_path, cache):
    load(source_of(images(tmp_path / "data", 2)))
    assert {path.stat().st_mode & 0o777 for path in cache.glob("*/*")} == {0o700}
    assert json.loads(next(cache.glob("pixels/*/bad.json")).read_text()) == []
