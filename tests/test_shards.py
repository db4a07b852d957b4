import fcntl
import gc
import os
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from frostline.files import locate
from frostline.shards import (
    FeatureError,
    Rows,
    Shard,
    decoded,
    fetched,
    locked,
    mapped,
    read,
    sha256_of,
    shard_of,
    write,
)

ABOUT = {"cut": 3, "weights": "é", "view": None, "shape": (2, 3)}


def rows_of(samples: np.ndarray, shape: tuple[int, ...], dtype: str = "float16", plus: float = 0.0) -> np.ndarray:
    """Rows that say whose they are."""
    width = int(np.prod(shape))
    table = samples[:, None] + np.arange(width)[None] / max(width, 1) + plus
    return table.reshape(len(samples), *shape).astype(dtype)


def stored(
    folder: Path, samples: np.ndarray, shape: tuple[int, ...], dtype: str = "float16", plus: float = 0.0
) -> Shard:
    shard, raw = shard_of(ABOUT, samples, rows_of(samples, shape, dtype, plus))
    write(folder / shard.file, [raw], os.replace)
    return shard


def table_of(folder: Path, *samples: np.ndarray, shape: tuple[int, ...] = (5,), dtype: str = "float16") -> Rows:
    return mapped(folder, [stored(folder, one, shape, dtype) for one in samples])


def test_a_manifest_says_what_was_stored():
    samples = np.array([0, 5, 7, 1 << 40])
    shard, raw = shard_of(ABOUT, samples, rows_of(samples, (2, 3), "float32"))
    read_back = decoded(shard.encoded())
    assert read_back is not None
    assert read_back.samples.tolist() == samples.tolist()
    assert (read_back.about, read_back.dtype, read_back.shape) == ({**ABOUT, "shape": [2, 3]}, "<f4", (2, 3))
    assert (read_back.name, read_back.file, read_back.size) == (shard.name, shard.file, len(raw))
    assert shard.size == 4 * 6 * 4
    assert shard.file.startswith(shard.name)


def test_a_shard_is_named_after_its_samples_and_its_rows_after_their_content():
    samples = np.arange(4)
    one, _ = shard_of(ABOUT, samples, rows_of(samples, (2,)))
    same, _ = shard_of({}, samples.astype(np.int32), rows_of(samples, (2,)))
    other, _ = shard_of(ABOUT, samples, rows_of(samples, (2,), plus=1.0))
    apart, _ = shard_of(ABOUT, samples + 1, rows_of(samples, (2,)))
    assert one.file == same.file
    assert one.manifest == other.manifest != apart.manifest
    assert one.file != other.file


def test_no_flipped_bit_and_no_cut_of_a_manifest_goes_unnoticed():
    shard, _ = shard_of({"cut": 3, "tolerance": 1e-5}, np.arange(3), rows_of(np.arange(3), (2,)))
    whole = shard.encoded()
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            assert decoded(bytes(flipped)) is None, (position, bit)
        assert decoded(whole[:position]) is None
    assert decoded(whole + b" ") is None
    for strange in (b"", b"null", b"[]", b"{}", b"\xff\xfe", whole.replace(b'"samples"', b'"Samples"')):
        assert decoded(strange) is None


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (70_000.0, "float16", r'^activations of sample 4, and of 0 other\(s\) of 3, are not finite in float16: '
         r'float16 ends at 65504; set features.dtype = "float32"$'),
        (np.nan, "float32", "are not finite in float32: the backbone's weights or the images are at fault"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_activations_that_are_not_finite_are_refused(value, dtype, says):
    rows = np.zeros((3, 2, 2), np.float32)
    rows[1, 0, 1] = value
    with pytest.raises(FeatureError, match=says):
        shard_of(ABOUT, np.array([2, 4, 6]), rows.astype(dtype))


@pytest.mark.parametrize("samples", [[3, 1], [1, 1], [-1, 2]])
def test_sample_numbers_ascend(samples):
    with pytest.raises(AssertionError, match="sample numbers ascend"):
        shard_of(ABOUT, np.array(samples), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1281,), (3, 5, 7), (4, 32, 32)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_any_size_come_back_from_many_files_as_from_one(tmp_path, shape, dtype):
    every = np.arange(3, 60, 2)
    rows = table_of(tmp_path, *np.split(every, [1, 7, 20]), shape=shape, dtype=dtype)
    wanted = np.random.default_rng(0).permutation(every)
    got = rows.gather(wanted)
    np.testing.assert_array_equal(got, rows_of(wanted, shape, dtype))
    assert (got.dtype, rows.dtype, rows.shape, rows.nbytes) == (dtype, dtype, shape, got.nbytes)
    assert rows.samples.tolist() == every.tolist()


def test_a_gather_is_fresh_and_what_is_mapped_cannot_be_written(tmp_path):
    rows = table_of(tmp_path, np.arange(9))
    got = rows.gather(np.array([4, 4, 0]))
    got[:] = -1
    np.testing.assert_array_equal(rows.gather(np.array([0, 4])), rows_of(np.array([0, 4]), (5,)))
    assert rows.gather(np.array([], np.int64)).shape == (0, 5)
    with pytest.raises(ValueError, match="read-only"):
        rows._table[0] = 0


@pytest.mark.parametrize("lacking", [-1, 0, 9, 11, 30, 1 << 40, -(1 << 40)])
def test_a_sample_without_a_row_is_named(tmp_path, lacking):
    rows = table_of(tmp_path, np.arange(10, 20, 2), np.arange(24, 30))
    says = (
        rf"^sample {lacking}, and 1 other\(s\) of the 4 asked for, have no stored activations: extract what `missing`"
    )
    with pytest.raises(FeatureError, match=says):
        rows.gather(np.array([10, lacking, 29, 13]))


def test_the_first_of_overlapping_shards_serves(tmp_path):
    first = stored(tmp_path, np.arange(0, 6), (5,))
    second = stored(tmp_path, np.arange(4, 9), (5,), plus=0.5)
    either = np.arange(9)
    for one, other, served in (
        (first, second, either + 0.5 * (either > 5)),
        (second, first, either + 0.5 * (either > 3)),
    ):
        np.testing.assert_array_equal(mapped(tmp_path, [one, other]).gather(either)[:, 0], served)


@given(
    parts=st.lists(st.sets(st.integers(0, 300), min_size=1, max_size=40), min_size=1, max_size=8),
    width=st.integers(1, 40),
    choose=st.randoms(use_true_random=False),
)
def test_any_gather_from_any_shards_is_of_the_right_rows(tmp_path_factory, parts, width, choose):
    folder = tmp_path_factory.mktemp("shards")
    rows = table_of(folder, *(np.array(sorted(part)) for part in parts), shape=(width,))
    every = sorted(set().union(*parts))
    wanted = np.array(choose.choices(every, k=20))
    assert rows.samples.tolist() == every
    np.testing.assert_array_equal(rows.gather(wanted), rows_of(wanted, (width,)))
    if lacking := sorted(set(range(-1, 302)) - set(every)):
        with pytest.raises(FeatureError, match=f"sample {lacking[0]}, and 0 other"):
            rows.gather(np.array([every[0], lacking[0]]))


def smaps(name: str) -> list[dict[str, int]]:
    """The mappings of a file in this process, KiB by kind."""
    found: list[dict[str, int]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            if inside := line.endswith(name):
                found.append({})
        elif inside and rest[-1] == "kB":
            found[-1][word[:-1]] = int(rest[0])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_rows_are_the_pages_of_the_file_and_go_when_nobody_needs_them(tmp_path):
    samples = np.arange(1024)
    shards = [stored(tmp_path, part, (1024,)) for part in (samples[:512], samples[512:])]
    rows = mapped(tmp_path, shards)
    kept = rows.gather(samples[:3])
    rows.gather(samples)
    for shard in shards:
        (found,) = smaps(shard.file)
        assert found["Size"] == found["Rss"] == 1024
        assert found["Anonymous"] == 0
    table = rows._table
    del rows
    gc.collect()
    assert len(smaps(shards[0].file)) == 1, "whoever has the table keeps the pages"
    del table
    gc.collect()
    assert [smaps(shard.file) for shard in shards] == [[], []]
    np.testing.assert_array_equal(kept, rows_of(samples[:3], (1024,)))


def test_rows_stay_after_the_file_is_removed(tmp_path):
    rows = table_of(tmp_path, np.arange(2000), shape=(64,))
    for path in tmp_path.iterdir():
        path.unlink()
    np.testing.assert_array_equal(rows.gather(np.array([1999])), rows_of(np.array([1999]), (64,)))


def test_a_write_is_whole_or_not_at_all(tmp_path):
    def failing():
        yield b"half"
        raise FeatureError("the other half is damaged")

    with pytest.raises(FeatureError, match="the other half"):
        write(tmp_path / "x", failing(), os.replace)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "x", [b"a", memoryview(b"b")], os.link)
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", [b"c"], os.link)
    assert (list(tmp_path.iterdir()), (tmp_path / "x").read_bytes()) == ([tmp_path / "x"], b"ab")


def test_reading(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"not gzip")
    place = locate(str(tmp_path)) / "x.gz"
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
    assert read(place) == b"not gzip"
    assert read(place.parent / "y") is None
    assert b"".join(fetched(place, sha256_of(place))) == b"not gzip"
    with pytest.raises(FeatureError, match=r"x\.gz is damaged: its SHA-256 is not the manifest's"):
        list(fetched(place, sha256))
    assert sha256_of(place.parent / "y") is None
    with pytest.raises(FeatureError, match=r"the feature store .*/y cannot be used: .*; free space there, or name"):
        list(fetched(place.parent / "y", sha256))


def test_a_lock_is_of_the_file_that_is_there(tmp_path):

    path = tmp_path / "deep" / "lock"
    with locked(path, fcntl.LOCK_EX) as held:
        assert held is not None
        with locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB) as refused:
            assert refused is None
        path.unlink()
        with locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as anew:
            assert anew is not None
    with locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB) as first, locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB) as second:
        assert None not in (first, second)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere" / "file")
    with pytest.raises(OSError, match="symbolic links"), locked(path, fcntl.LOCK_EX):
        pass
