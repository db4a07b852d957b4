import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from _s3 import s3_endpoint
from frostline.shards import FeatureError, Rows
from frostline.store import Store, key_of

ABOUT = {"weights": "abc", "cut": 3}
KEY = key_of(ABOUT)
ALL = np.arange(12)
USED_S = 1_700_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[tuple[str, Any]]:
    """host:port of a real S3 endpoint on loopback, and a client of it."""
    with s3_endpoint() as found:
        yield found


@pytest.fixture
def bucket(endpoint, tmp_path) -> tuple[Store, Any]:
    """A store at an empty bucket, and a client that sees the bucket from outside."""
    name = f"b{abs(hash(tmp_path)):x}"
    endpoint[1].create_bucket(Bucket=name)
    return Store(uri(endpoint[0], name)), Bucket(endpoint[1], name)


def uri(host: str, bucket: str) -> str:
    return f"s3://CANARYKEY:CANARYSECRET@{bucket}/deep/store?endpoint_override={host}&scheme=http&region=us-east-1"


class Bucket:
    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    def listing(self) -> dict[str, int]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return {entry["Key"]: entry["Size"] for entry in found if not entry["Key"].endswith("/")}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def write(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body)


def rows_of(samples: np.ndarray, plus: float = 0.0) -> np.ndarray:
    """(n, 2, 3) float16 that say whose they are."""
    return (samples[:, None, None] + np.arange(6).reshape(2, 3) / 8 + plus).astype(np.float16)


def put(store: Store, samples: np.ndarray, about: dict[str, Any] | None = None, plus: float = 0.0) -> bool:
    about = ABOUT if about is None else about
    return store.put(key_of(about), about, samples, rows_of(samples, plus))


def right(rows: Rows, samples: np.ndarray) -> None:
    np.testing.assert_array_equal(rows.gather(samples), rows_of(samples))


def file(store: Store, pattern: str) -> Path:
    (found,) = Path(store.root, KEY).glob(pattern)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options
    )


def test_keys_stand_for_all_that_is_told_and_nothing_else():
    assert KEY == key_of({"cut": 3, "weights": "abc"}) != key_of({"cut": 4, "weights": "abc"})
    assert len(KEY) == 16
    assert key_of({"shape": (1, 2)}) == key_of({"shape": [1, 2]})


@pytest.mark.parametrize(
    "key", ["", "..", "../../etc", "abc", "0" * 15, "0" * 65, "G" * 16, f"{'0' * 16}/x", "0" * 16 + "\n"]
)
def test_only_keys_are_taken_for_keys(store, key):
    for call in (store.open, store.verify, store.repair, lambda key: store.missing(key, ALL)):
        with pytest.raises(FeatureError, match="is no key of stored activations: those are 16 to 64 hex digits"):
            call(key)
    with pytest.raises(FeatureError, match="is no key"), store.hold([key]):
        pass
    assert not Path(store.root).exists()


def test_what_is_put_is_there(store):
    assert store.missing(KEY, ALL).tolist() == ALL.tolist()
    assert put(store, ALL[:5])
    assert store.missing(KEY, ALL[::-1]).tolist() == ALL[:4:-1].tolist()
    assert put(store, ALL[5:])
    assert store.missing(KEY, ALL).tolist() == []
    right(store.open(KEY), ALL[::-1])
    assert store.verify(KEY) == []
    (entry,) = store.entries()
    assert (entry.key, entry.about, entry.samples, entry.shards) == (KEY, ABOUT, 12, 2)
    assert entry.bytes == sum(path.stat().st_size for path in Path(store.root, KEY).iterdir()) > 12 * 12
    assert abs(entry.used_s - time.time()) < 10


def test_nothing_stored_is_an_error_that_says_so(store):
    with pytest.raises(FeatureError, match=rf"{KEY} holds no activations: extract them first$"):
        store.open(KEY)
    assert (store.entries(), store.evict(0), store.clean(), store.repair(KEY)) == ([], [], [], [])
    assert not Path(store.root).exists()


def test_a_store_travels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    put(store, ALL)
    copy = pickle.loads(pickle.dumps(store))
    monkeypatch.chdir("/")
    assert copy == store == Store(tmp_path / "here")
    right(copy.open(KEY), ALL)
    right(Store(f"file://{tmp_path}/here").open(KEY), ALL)
    assert "SECRET" not in repr(Store("s3://KEY:SECRET@b/x"))


def test_one_process_maps_an_entry_once_and_sees_it_grow(store):
    put(store, ALL[:5])
    first = store.open(KEY)
    assert store.open(KEY) is first
    assert Store(store.root).open(KEY) is first
    put(store, ALL[5:])
    second = store.open(KEY)
    right(second, ALL)
    right(first, ALL[:5])
    assert first.samples.tolist() == ALL[:5].tolist()


def test_only_so_many_entries_stay_mapped(store, monkeypatch):
    monkeypatch.setattr("frostline.store._KEPT", 2)
    for cut in range(4):
        put(store, ALL, {"cut": cut})
    opened = [store.open(key_of({"cut": cut})) for cut in range(4)]
    assert store.open(key_of({"cut": 3})) is opened[3]
    assert store.open(key_of({"cut": 0})) is not opened[0]


def test_the_first_wins(store):
    assert put(store, ALL)
    before = {path: path.read_bytes() for path in Path(store.root, KEY).iterdir()}
    assert not put(store, ALL)
    assert not put(store, ALL, plus=1.0)
    assert {path: path.read_bytes() for path in Path(store.root, KEY).iterdir()} == before


@settings(max_examples=30)
@given(parts=st.lists(st.sets(st.integers(0, 60), min_size=1), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_puts_and_then_any_gather(tmp_path_factory, parts, seed):
    store = Store(tmp_path_factory.mktemp("store"))
    done: set[int] = set()
    for part in parts:
        put(store, np.array(sorted(part)))
        done |= part
        assert set(store.missing(KEY, np.arange(61)).tolist()) == set(range(61)) - done
    right(store.open(KEY), np.random.default_rng(seed).choice(sorted(done), 30))
    assert store.verify(KEY) == []
    assert store.entries()[0].samples == len(done)


RACER = """
import sys, time
import numpy as np
from pathlib import Path
from frostline.store import Store, key_of
root, number, start = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
about = {"cut": 1}
rows = [np.full((40, 700), 10 * number + i, np.float16) for i in range(8)]
time.sleep(max(0, start - time.time()))
store = Store(root)
print(*(int(store.put(key_of(about), about, np.arange(40 * i, 40 * i + 40), rows[i])) for i in range(8)))
"""


def test_of_processes_that_publish_the_same_shards_one_wins_each(tmp_path):
    start = time.time() + 2
    racing = [python(RACER, tmp_path / "s", number, start) for number in (1, 2, 3)]
    won = np.array([[int(flag) for flag in process.communicate()[0].split()] for process in racing])
    assert won.sum(axis=0).tolist() == [1] * 8
    store, key = Store(tmp_path / "s"), key_of({"cut": 1})
    assert store.verify(key) == []
    values = store.open(key).gather(np.arange(320)).reshape(8, 40 * 700)
    assert (values == (10 * (won.argmax(axis=0) + 1) + np.arange(8))[:, None]).all()
    assert len(names(tmp_path / "s" / key)) == 2 * 8 + 1, "losers leave nothing"


KILLED = """
import os, signal, sys
import numpy as np
from frostline.store import Store, key_of
step = sys.argv[2]
setattr(os, step, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
Store(sys.argv[1]).put(key_of({"cut": 1}), {"cut": 1}, np.arange(9), np.ones((9, 5), np.float32))
"""


@pytest.mark.parametrize(
    ("step", "left"), [("fsync", [".tmp", "used"]), ("replace", [".tmp", "used"]), ("link", [".tmp", "rows", "used"])]
)
def test_a_writer_killed_at_any_step_leaves_nothing_to_be_seen_or_in_the_way(store, step, left):
    with python(KILLED, store.root, step) as process:
        assert process.wait() == -signal.SIGKILL
    key, samples, rows = key_of({"cut": 1}), np.arange(9), np.ones((9, 5), np.float32)
    folder = Path(store.root, key)
    assert sorted(".tmp" if name[0] == "." else name.rpartition(".")[2] for name in names(folder)) == left
    assert store.missing(key, samples).tolist() == samples.tolist()
    assert (store.verify(key), store.entries()[0].about) == ([], None)
    with pytest.raises(FeatureError, match="holds no activations"):
        store.open(key)
    assert store.put(key, {"cut": 1}, samples, rows)
    assert store.clean(unused_days=1) == []
    assert len(names(folder)) == 3
    np.testing.assert_array_equal(store.open(key).gather(samples), rows)


@pytest.mark.parametrize("kind", ["*.rows", "*.json"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "empty", "delete", "garbage"])
def test_a_shard_that_does_not_look_intact_is_missing_and_made_anew(store, kind, damage):
    put(store, ALL[8:])
    good = store.open(KEY)
    put(store, ALL[:8])
    path = max(Path(store.root, KEY).glob(kind), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        made = {"truncate": whole[:-1], "extend": whole + b"x", "empty": b"", "garbage": b"{" + bytes(3000)}
        path.write_bytes(made[damage])
    assert store.missing(KEY, ALL).tolist() == list(range(8))
    assert store.open(KEY).samples.tolist() == list(range(8, 12))
    assert [str(path.name)[:16] in line for line in store.verify(KEY)] == (
        [] if (kind, damage) == ("*.json", "delete") else [True]
    )
    assert put(store, ALL[:8])
    right(store.open(KEY), ALL)
    right(good, ALL[8:])
    assert (store.verify(KEY), path.read_bytes()) == ([], whole)
    assert len(names(Path(store.root, KEY))) == 5


@pytest.mark.fault(24)
def test_no_flipped_bit_survives_verification(store):
    chance = random.Random(0)
    parts = {}
    for part in (ALL[:8], ALL[8:]):
        put(store, part)
        for path in Path(store.root, KEY).glob("*.*"):
            parts.setdefault(path, part.tolist())
    for path, part in parts.items():
        whole = path.read_bytes()
        for position in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(12))]:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            (line,) = store.verify(KEY)
            assert path.name[:16] in line
            assert store.repair(KEY) == [line]
            assert store.missing(KEY, ALL).tolist() == part
            assert put(store, np.array(part))
            right(store.open(KEY), ALL)
            assert (store.verify(KEY), path.read_bytes()) == ([], whole)


def test_a_shard_in_another_place_is_not_served(store):
    put(store, ALL)
    put(store, ALL, {"cut": 4}, plus=1.0)
    other = Path(store.root, key_of({"cut": 4}))
    for path in Path(store.root, KEY).glob("*-*.rows"):
        shutil.copy(path, other)
    shutil.copy(file(store, "*.json"), other)
    assert store.missing(other.name, ALL).tolist() == ALL.tolist()
    (line,) = store.repair(other.name)
    assert line.endswith(".json: is not what was written")


def test_what_is_not_finite_is_not_stored(store):
    rows = np.full((12, 4), np.inf, np.float16)
    with pytest.raises(FeatureError, match=r'sample 0, and of 11 other.* set features\.dtype = "float32"'):
        store.put(KEY, ABOUT, ALL, rows)
    assert not Path(store.root).exists()


FULL = """
import resource, signal, sys
import numpy as np
from frostline.store import FeatureError, Store, key_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # writes beyond fail as on a full disk
try:
    Store(sys.argv[1]).put(key_of({}), {}, np.arange(1000), np.ones((1000, int(sys.argv[3])), np.float16))
except FeatureError as error:
    print(error)
"""


@pytest.mark.fault(29)
@pytest.mark.parametrize(("limit", "width", "left"), [(50_000, 100, []), (5_000, 1, [".rows"])])
def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing_half_published(store, limit, width, left):
    shown = python(FULL, store.root, limit, width).communicate()[0]
    assert f"the feature store {store.root}/{key_of({})} cannot be used: [Errno 27] File too large" in shown
    assert "; free space there, or name another place (features.path, or FROSTLINE_CACHE" in shown
    assert [name[-5:] for name in names(Path(store.root, key_of({}))) if name != "used"] == left
    assert len(store.missing(key_of({}), np.arange(1000))) == 1000
    store.clean()
    assert names(Path(store.root)) == []


def test_a_root_that_is_no_folder_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureError, match=r"file/.* cannot be used: .*; free space there, or name another place"):
        put(Store(tmp_path / "file"), ALL)


def aged(store: Store, *cuts: int) -> list[str]:
    """Entries for these cuts, the first used longest ago, an hour apart."""
    for hour, cut in enumerate(cuts):
        put(store, ALL, {"cut": cut})
        os.utime(Path(store.root, key_of({"cut": cut}), "used"), (USED_S + 3600 * hour,) * 2)
    return [key_of({"cut": cut}) for cut in cuts]


def test_the_least_recently_used_goes_first(store):
    keys = aged(store, 5, 3, 9, 1)
    assert [entry.key for entry in store.entries()] == keys
    store.open(keys[0])
    size = store.entries()[0].bytes
    assert store.evict(4 * size) == []
    assert [entry.key for entry in store.evict(4 * size - 1)] == [keys[1]]
    assert [entry.key for entry in store.evict(2 * size, keep=[keys[2]])] == [keys[3]]
    assert sorted(names(Path(store.root))) == sorted([keys[0], keys[2]])
    assert [entry.key for entry in store.evict(-1)] == [keys[2], keys[0]]
    assert names(Path(store.root)) == []


def test_the_time_of_use_is_noted_once_a_minute(store):
    (key,) = aged(store, 1)
    used = Path(store.root, key, "used")
    for ago_s, noted in ((30, False), (90, True)):
        before = time.time() - ago_s
        os.utime(used, (before, before))
        store.open(key)
        assert (used.stat().st_mtime > before + 1) == noted
    used.unlink()
    store.open(key)
    assert used.exists()


HOLDER = """
import sys, time
from frostline.store import Store
with Store(sys.argv[1]).hold(sys.argv[2:]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holding(store: Store, *keys: str) -> Iterator[Callable[[], None]]:
    """Another process that holds these; what is given waits until it does. It is killed in the end."""
    with python(HOLDER, store.root, *keys) as process:
        assert process.stdout is not None
        told = process.stdout

        def until_held() -> None:
            assert told.readline() == "held\n"

        try:
            yield until_held
        finally:
            process.kill()


def test_what_a_living_process_holds_stays(store):
    old, older = aged(store, 2, 1)
    coming = key_of({"cut": "to come"})
    with holding(store, old, coming) as until_held:
        until_held()
        os.utime(Path(store.root, old, "used"), (USED_S, USED_S))
        assert [entry.key for entry in store.evict(0)] == [older]
        assert store.clean() == []
        assert sorted(names(Path(store.root))) == sorted([old, coming])
        right(store.open(old), ALL)
    assert sorted(entry.key for entry in store.clean()) == sorted([old, coming])
    assert names(Path(store.root)) == []


def test_a_hold_of_ones_own_counts_too_and_ends(store):
    (key,) = aged(store, 1)
    with store.hold([key]), Store(store.root).hold([key]):
        assert store.evict(0) == []
        assert put(store, ALL + 100, {"cut": 1})
    assert [entry.key for entry in store.evict(0)] == [key]


def test_a_hold_begun_while_an_entry_is_removed_is_of_the_new_one(store):
    (key,) = aged(store, 1)
    with contextlib.ExitStack() as held:
        with store._alone(key) as alone:
            assert alone
            until_held = held.enter_context(holding(store, key))
            time.sleep(1.5)  # it waits for the lock by now
            store._remove(key, store._files(key))
            assert not Path(store.root, key).exists()
        until_held()
        put(store, ALL, {"cut": 1})
        assert store.evict(0) == []


def test_cleaning_spares_what_was_used_lately(store):
    old, new = aged(store, 1, 2)
    store.open(new)
    assert [entry.key for entry in store.clean(unused_days=1)] == [old]
    assert [entry.key for entry in store.clean()] == [new]


def test_only_what_is_ours_is_removed(store, tmp_path):
    (key,) = aged(store, 1)
    root = Path(store.root)
    foreign = [root / "notes", root / key / "notes.txt", root / key / f"{'0' * 16}.jsonx", root / ("0" * 12) / "x.rows"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    away = tmp_path / "away"
    shutil.copytree(root / key, away)
    (root / ("1" * 16)).symlink_to(away)
    linked = key_of({"cut": 2})
    (root / linked).symlink_to(away)
    before = names(away)
    assert [entry.key for entry in store.clean()] == [key]
    assert store.clean() == []
    assert (names(away), [path.read_text() for path in foreign]) == (before, ["mine"] * 4)
    assert (store.missing(linked, ALL).tolist(), store.repair(linked)) == (ALL.tolist(), [])
    with pytest.raises(FeatureError, match="is a symbolic link, which Frostline does not make: move it away"):
        put(store, ALL, {"cut": 2})
    shutil.move(away, tmp_path / "gone")  # now it dangles
    with pytest.raises(FeatureError, match="is a symbolic link"), store.hold([linked]):
        pass
    shutil.move(tmp_path / "gone", away)
    assert names(away) == before


def test_manifests_of_many_shards_are_read_quickly(store):
    samples = np.arange(4000).reshape(200, 20)
    for part in samples:
        put(store, part)
    started = time.process_time()
    assert store.missing(KEY, samples.ravel()).tolist() == []
    rows = store.open(KEY)
    assert time.process_time() - started < 0.5
    right(rows, samples.ravel()[::-1])


# --- at a URI


def test_a_bucket_holds_a_store_that_nodes_mirror(bucket, cache):
    store, outside = bucket
    assert store.missing(KEY, ALL).tolist() == ALL.tolist()
    with pytest.raises(FeatureError, match=rf"^s3://b\w+/deep/store/{KEY} holds no activations"):
        store.open(KEY)
    assert put(store, ALL[:5])
    assert not put(store, ALL[:5], plus=1.0)
    assert store.missing(KEY, ALL).tolist() == list(range(5, 12))
    assert not (cache / "features").exists()
    rows = store.open(KEY)
    right(rows, ALL[:5])
    assert store.open(KEY) is rows
    put(store, ALL[5:])
    right(store.open(KEY), ALL)
    assert (store.verify(KEY), store.missing(KEY, ALL).tolist()) == ([], [])
    (entry,) = store.entries()
    assert (entry.key, entry.about, entry.samples, entry.shards) == (KEY, ABOUT, 12, 2)
    assert sorted(Path(key).suffix for key in outside.listing()) == ["", ".json", ".json", ".rows", ".rows"]
    assert all(key.startswith(f"deep/store/{KEY}/") for key in outside.listing())
    (mirrored,) = (cache / "features").glob(f"*/{KEY}")
    assert set(names(mirrored)) == {Path(key).name for key in outside.listing()} | {"fetch"}
    assert "CANARY" not in str(mirrored)


def test_the_mirror_may_be_elsewhere_and_is_read_instead_of_the_bucket(bucket, tmp_path, cache):
    store, outside = bucket
    put(store, ALL)
    near = Store(store.root, tmp_path / "near")
    right(pickle.loads(pickle.dumps(near)).open(KEY), ALL)
    assert not (cache / "features").exists()
    for key, size in outside.listing().items():
        outside.write(key, bytes(size))
    right(near.open(KEY), ALL)
    assert store.missing(KEY, ALL).tolist() == ALL.tolist()


FETCHER = """
import sys
import numpy as np
from pathlib import Path
from frostline import shards, store
read = []
def fetched(place, sha256):
    read.append(place.name)
    yield from shards.fetched(place, sha256)
store.fetched = fetched
rows = store.Store(sys.argv[1], Path(sys.argv[2])).open(sys.argv[3])
print(len(read), int(rows.gather(rows.samples).astype(np.int64).sum()))
"""


def test_of_the_processes_of_a_node_one_fetches(bucket, tmp_path):
    store, _ = bucket
    for part in np.split(ALL, 4):
        put(store, part)
    running = [python(FETCHER, store.root, tmp_path / "near", KEY) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in running]
    assert sorted(int(count) for count, _ in outputs) == [0, 0, 4]
    assert {int(total) for _, total in outputs} == {int(rows_of(ALL).astype(np.int64).sum())}
    assert len(names(tmp_path / "near" / KEY)) == 2 * 4 + 2


def test_damage_in_a_bucket_is_found_and_not_fetched(bucket, cache):
    store, outside = bucket
    put(store, ALL)
    for kind in ("rows", "json"):
        (key,) = [key for key in outside.listing() if key.endswith(kind)]
        whole = outside.read(key)
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        outside.write(key, bytes(damaged))
        with pytest.raises(FeatureError, match="is damaged: its SHA-256|holds no intact activations"):
            store.open(KEY)
        assert not list((cache / "features").rglob(f"{KEY}/*.json"))
        (line,) = store.verify(KEY)
        assert line.startswith(f"s3://{outside.name}/{key}")
        assert store.repair(KEY) == [line]
        assert store.missing(KEY, ALL).tolist() == ALL.tolist()
        assert put(store, ALL)
        assert outside.read(key) == whole
    right(store.open(KEY), ALL)


def test_damage_in_the_mirror_is_found_and_fetched_anew(bucket, cache):
    store, _ = bucket
    put(store, ALL)
    store.open(KEY)
    (path,) = (cache / "features").rglob("*.rows")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    right(store.open(KEY), ALL)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-2] + b"xy")
    (line,) = store.repair(KEY)
    assert line.startswith(str(path))
    assert store.missing(KEY, ALL).tolist() == []
    right(store.open(KEY), ALL)
    assert path.read_bytes() == whole


def test_what_was_made_anew_with_other_bits_is_fetched_anew(bucket):
    store, outside = bucket
    put(store, ALL, plus=1.0)
    np.testing.assert_array_equal(store.open(KEY).gather(ALL), rows_of(ALL, 1.0))
    for key in outside.listing():
        outside.client.delete_object(Bucket=outside.name, Key=key)
    put(store, ALL)
    right(store.open(KEY), ALL)


def test_a_put_cut_short_in_a_bucket_is_not_seen(bucket):
    store, outside = bucket
    put(store, ALL)
    (key,) = [key for key in outside.listing() if key.endswith("json")]
    outside.client.delete_object(Bucket=outside.name, Key=key)  # rows without a manifest
    assert store.missing(KEY, ALL).tolist() == ALL.tolist()
    assert put(store, ALL)
    right(store.open(KEY), ALL)


def test_a_bucket_keeps_for_a_day_what_may_be_in_use(bucket, cache, monkeypatch):
    store, outside = bucket
    put(store, ALL)
    put(store, ALL, {"cut": 4})
    outside.write(f"deep/store/{KEY}/notes.txt", b"mine")
    store.open(KEY)
    assert store.evict(0) == store.clean() == []
    assert not list((cache / "features").rglob("*.rows")), "the mirror knows its locks"
    assert len(store.entries()) == 2
    monkeypatch.setattr("frostline.store._URI_HOLD_S", -10.0)
    with store.hold([KEY]):
        assert names(next((cache / "features").glob("*"))) == [KEY]
    assert {entry.key for entry in store.clean()} == {KEY, key_of({"cut": 4})}
    assert list(outside.listing()) == [f"deep/store/{KEY}/notes.txt"]
    everything = outside.client.list_objects_v2(Bucket=outside.name)["Contents"]
    assert not any(key_of({"cut": 4}) in entry["Key"] for entry in everything), "no empty folder is left"


def test_no_message_of_a_bucket_holds_credentials(endpoint):
    store = Store(uri(endpoint[0], "no-such-bucket"))
    for call in (lambda: put(store, ALL), lambda: store.verify(KEY), store.entries):
        with contextlib.suppress(FeatureError):
            call()
    with pytest.raises(FeatureError) as caught:
        put(store, ALL)
    assert "s3://no-such-bucket/deep/store" in str(caught.value)
    assert "CANARY" not in f"{caught.value!r} {store!r} {caught.value.__cause__!r}"
    assert caught.value.__suppress_context__


def test_a_manifest_is_plain_json_to_anybody(store):
    put(store, ALL)
    content = json.loads(file(store, "*.json").read_text())
    assert (content["about"], content["dtype"], content["shape"], content["format"]) == (ABOUT, "<f2", [2, 3], 1)
    raw = np.fromfile(file(store, "*.rows"), content["dtype"]).reshape(-1, *content["shape"])
    np.testing.assert_array_equal(raw, rows_of(ALL))
