"""Damaged inputs for every reader that a user's file reaches, and what the readers make of them. A process for each reader:

    python tests/_malformed.py MADE SCRATCH READER COUNT

MADE is what `make` wrote. COUNT inputs are made of sound ones, the same in every run: bits flipped, cut short, spliced, stretches put
in, left out and repeated, numbers at their limits, files of another kind; and in text, half of the time, values and keys of another
type, size or depth. Checksums that a stranger could write anew are written anew half of the time, so that what is behind them is
reached too. The last line is JSON: how many were refused with an error of ours that names the file, how many were read, and all else
that happened, which is wrong.
"""

from __future__ import annotations

import csv
import faulthandler
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from frostline import results
from frostline.bundle import load_bundle
from frostline.checkpoint import opened
from frostline.claim import record_job
from frostline.comparison import compare
from frostline.fixed import best_job
from frostline.fsck import examine
from frostline.images import FORMATS, decode
from frostline.jobfile import load_job
from frostline.models import digest
from frostline.report import write_report
from frostline.samples import BadSample
from frostline.sealed import _footer_start
from frostline.sources import open_source
from frostline.spec import Data, Job
from frostline.store import Store, _opened
from frostline.testing import text_encoder, text_rows, toy_backbone
from frostline.tokens import load_tokenizer, to_ids
from frostline.weights import hash_tensors, load_weights, read_weights

LIMIT_S = 20.0
"""For one input, on a machine that may be busy."""
MEMORY_BYTES = 24 << 30
"""Of addresses, of which PyTorch takes some by itself."""

JOB = """
name = "photos"
seed = 3
[data]
path = "photos/"
val = 0.2
per_class = 10
[backbone]
name = "timm/resnet18"
[train]
epochs = 3
lr = 3e-4
batch_size = 32
[search]
trials = 8
pruner = { kind = "none" }
[confirm]
seeds = 2
finalists = "arms"
[arms.probe]
strategy = "linear_probe"
[arms.probe.space]
"train.head_lr" = { low = 1e-3, high = 1e-1, log = true }
"head.hidden" = [0, 16]
[arms.freeze]
strategy = "freeze_depth"
[arms.freeze.space]
"freeze.depth" = "all"
"train.lr" = { low = 1e-4, high = 1e-2, log = true }
"""
OVERRIDES = (
    "train.lr=1e-3",
    "data.path=photos/ü",
    'arms.probe.space."train.lr"={ low = 1e-4, high = 1e-1, log = true }',
    "search.pruner.kind=none",
    "data.per_class=20",
    'arms.freeze.space."freeze.depth"=[0, 1, 2]',
)
DEEP = 100_000
STRANGE = [
    *("null", "true", "-1", "0", "1.5", "1e999", "-0.0", "nan", "NaN", "-Infinity", "9223372036854775808", "-1e308", "1979-05-27"),
    *('""', '"all"', '"../../../../tmp/outside"', '"/tmp/outside"', '"file:///tmp/outside"', r'"\u0000"', r'"\ud800"', r'"\u001b[31m"'),
    *("[]", "{}", "[[]]", "[1, 2, 3]", '{"a": 1}', "{ low = 2, high = 1 }", '"random"', '"pretrained"', "python", "'''"),
    "9" * 5000,
    '"' + "a" * 100_000 + '"',
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    "[" * 60 + "]" * 60,
    "[" * 400 + "]" * 400,
    ".".join("a" * 400),
]  # fmt: skip
"""What may stand in the place of a value or a key."""
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[^\s"{}\[\],:=]+')


@dataclass(frozen=True)
class Reader:
    """What is read, and how."""

    files: str
    """Below MADE, as for glob: what is damaged."""
    read: Callable[[Path], Any]
    """Given a damaged file, which stands where the sound one stood."""
    named: Callable[[Path], str] = lambda path: path.name
    """What an error has to name."""
    seal: Callable[[Path, bytes], None] | None = None
    """Writes checksums anew that the damaged file belongs to, given what was sound."""


# --- the readers ---


def read_job(path: Path) -> None:
    job = load_job(path)
    assert Job.model_validate_json(job.model_dump_json()) == job


def read_override(path: Path) -> None:
    load_job(path.with_name("job.toml"), [path.read_bytes().decode("utf-8", "surrogateescape")])


def read_image(path: Path) -> None:
    pixels = decode(path.read_bytes(), size=8, fit="crop", max_pixels=1_000_000)
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)


def read_samples(spec: Data) -> None:
    """All of a source, as a search and as a prediction read it."""
    for labelled in (True, False):
        source = open_source(spec, labelled=labelled)
        for read in source.read(range(len(source.sample_ids))):
            try:
                assert isinstance(read(), bytes)
            except BadSample:
                continue


def read_images(path: Path) -> None:
    read_samples(Data(path=str(path)))


def read_texts(path: Path) -> None:
    read_samples(Data(path=str(path), tokenizer="not opened"))


def read_idx(path: Path) -> None:
    read_samples(Data(path=str(path.parent)))


def read_network(path: Path) -> None:
    module = toy_backbone()["module"]
    load_weights(module, read_weights(path), str(path))


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer.__wrapped__(f"text/{path.parent}")
    try:
        row = to_ids(tokenizer, 16, pair=False)(b"the old ship near an anchor")
    except BadSample:
        return
    assert (row.shape, row.dtype) == ((16, 2), np.int32)


def read_bundle(path: Path) -> None:
    load_bundle(path.parent)


def read_study(path: Path) -> None:
    """As results, compare, fsck, train --best and a search that goes on read it, and where they all do, report."""
    folder = next(parent for parent in path.parents if parent.name == "study")
    begun = json.loads((folder.parent / "begun.json").read_bytes())
    job, no_splits = Job.model_validate(begun["job"]), results.SCHEMAS["splits"].empty_table()
    said: list[Exception] = []
    for read in (
        lambda: results.to_json(folder),
        lambda: compare([folder]),
        lambda: best_job(folder),
        lambda: examine(folder),
        lambda: record_job(folder, job, begun["facts"], no_splits),
        lambda: said or write_report(folder),
    ):
        try:
            read()
        except Exception as error:  # noqa: BLE001 (which kind it is, is looked at later)
            said.append(error)
    for error in sorted(said, key=lambda error: is_told(error, IN_STUDY)):  # what is not told first
        raise error


def read_checkpoint(path: Path) -> None:
    tensors, about = opened(path.read_bytes())
    assert isinstance(tensors, dict)
    assert isinstance(about, dict)


def read_features(path: Path) -> None:
    store, key = Store(path.parent.parent), path.parent.name
    _opened.clear()  # it knows files by their size and time
    store.entries(), store.verify(key), store.missing(key, np.arange(3))
    rows = store.open(key)
    rows.gather(rows.samples)


# --- checksums anew ---


def seal_bundle(path: Path, _: bytes) -> None:
    files = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.name != "manifest.json"}
    sums = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (path.parent / "manifest.json").write_text(json.dumps({"files": sums}))


def seal_study(path: Path, _: bytes) -> None:
    """Of a part or the splits; of a job.json where it is one still."""
    raw = path.read_bytes()
    if path.suffix == ".parquet":
        cut = _footer_start(raw) if len(raw) > 8 else -1
        if cut - 32 >= 0:
            path.write_bytes(raw[: cut - 32] + hashlib.sha256(raw[: cut - 32] + raw[cut:]).digest() + raw[cut:])
        return
    try:
        record = json.loads(raw)
        record = {key: record[key] for key in record if key != "digest"}
        path.write_text(json.dumps({**record, "digest": digest(record)}))
    except (ValueError, TypeError, KeyError, RecursionError):
        return


def seal_checkpoint(path: Path, raw: bytes) -> None:
    """A sound one, but for what it says of the training."""
    sound = safetensors.torch.load(raw)
    hurt = damage(random.Random(path.read_bytes()), sound["about"].numpy().tobytes(), [b"{}"], text=True)
    tensors = {name: tensor for name, tensor in sound.items() if name not in ("sha256", "about")}
    tensors["about"] = torch.frombuffer(bytearray(hurt or b" "), dtype=torch.uint8)
    tensors["sha256"] = torch.frombuffer(bytearray(hash_tensors(tensors.items()).encode()), dtype=torch.uint8)
    path.write_bytes(safetensors.torch.save(tensors))


def seal_features(path: Path, _: bytes) -> None:
    if path.suffix != ".json":
        return
    try:
        content = json.loads(path.read_bytes())
        content = {key: content[key] for key in content if key != "sha256"}
        sealed = content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
        path.write_text(json.dumps(sealed, sort_keys=True))
    except (ValueError, TypeError, KeyError, RecursionError):
        return


IN_STUDY = "inputs/study"
READERS = {
    "job files": Reader("jobs/job.toml", read_job),
    "overrides": Reader("jobs/*.override", read_override, lambda _: "job.toml"),
    "images": Reader("images/*", read_image, lambda _: ""),  # of which one, is said by who lists them
    "tables of images": Reader("tables/images*", read_images),
    "tables of texts": Reader("tables/texts*", read_texts),
    "IDX files": Reader("idx/*", read_idx, lambda path: path.parent.name),
    "weights": Reader("weights/*", read_network),
    "tokenizers": Reader("encoder/token*", read_tokenizer, lambda path: path.parent.name),
    "bundles": Reader("study/bundle/*", read_bundle, lambda _: f"{IN_STUDY}/bundle", seal_bundle),
    "studies": Reader("study/job.json", read_study, lambda _: IN_STUDY, seal_study),
    "tables of studies": Reader("study/**/*.parquet", read_study, lambda _: IN_STUDY, seal_study),
    "checkpoints": Reader("checkpoints/*", read_checkpoint, lambda _: "", seal_checkpoint),
    "features": Reader("features/*/*.*", read_features, lambda path: path.parent.name, seal_features),
}
TEXT = (".toml", ".override", ".json", ".jsonl", ".csv", ".tsv", ".md")


# --- damage ---


def damage(rng: random.Random, raw: bytes, others: Sequence[bytes], *, text: bool) -> bytes:
    """A damaged copy."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kinds = [*BINARY, *[_strange] * len(BINARY)] if text else BINARY
        raw = rng.choice(kinds)(rng, raw, others)
    return raw


def _place(rng: random.Random, raw: bytes) -> tuple[int, int]:
    """Ends of a stretch, often a short one."""
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + int(2 ** rng.uniform(0, 12)))


def _flip(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    hurt = bytearray(raw)
    for _ in range(rng.randint(1, 8) if raw else 0):
        hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def _cut(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _splice(rng: random.Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    """A stretch of this file, or of another, over a stretch of this."""
    other = rng.choice([raw, *others])
    (start, end), (a, b) = _place(rng, raw), _place(rng, other)
    return raw[:start] + other[a:b] + raw[end if rng.random() < 0.5 else start + b - a :]


def _insert(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    start, _end = _place(rng, raw)
    return raw[:start] + rng.randbytes(rng.choice((1, 2, 8, 100))) + raw[start:]


def _drop(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(rng, raw)
    return raw[:start] + raw[end:]


def _repeat(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(rng, raw)
    return raw[:start] + raw[start:end] * rng.choice((2, 3, 50)) + raw[end:]


def _number(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    """A number at its limits over some bytes, of the head or the foot more often than not, where files say how long they are."""
    form = rng.choice("BHIQ")
    bits = 8 * struct.calcsize(form)
    value = rng.choice((0, 1, (1 << (bits - 1)) - 1, 1 << (bits - 1), (1 << bits) - 1, len(raw) % (1 << bits)))
    packed = struct.pack(rng.choice("<>") + form, value)
    start = rng.choice((rng.randrange(64), max(0, len(raw) - rng.randrange(1, 64)), rng.randrange(len(raw) + 1)))
    return raw[:start] + packed + raw[start + len(packed) :]


def _foreign(rng: random.Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    return rng.choice((b"", b"\0" * 64, rng.randbytes(512), raw[::-1], gzip.compress(raw), rng.choice(others)))


def _strange(rng: random.Random, raw: bytes, _: Sequence[bytes]) -> bytes:
    """In text: a value or a key in the place of which something else stands."""
    tokens = [*_TOKEN.finditer(raw)]
    if not tokens:
        return rng.choice(STRANGE).encode()
    token = rng.choice(tokens)
    return raw[: token.start()] + rng.choice(STRANGE).encode() + raw[token.end() :]


BINARY = [_flip, _flip, _cut, _cut, _splice, _insert, _drop, _repeat, _number, _number, _foreign]


# --- sound inputs ---


def make(made: Path) -> None:
    """Sound inputs of every kind, but for the study, its features and its checkpoints."""
    for name in ("jobs", "images", "tables", "idx", "weights"):
        (made / name).mkdir(parents=True)
    (made / "jobs" / "job.toml").write_text(JOB)
    for number, override in enumerate(OVERRIDES):
        (made / "jobs" / f"{number}.override").write_text(override)
    rng = np.random.default_rng(0)
    images = {}
    for mode, shape in (("RGB", (20, 24, 3)), ("L", (20, 24))):
        image = Image.fromarray(rng.integers(0, 255, shape, np.uint8), mode)
        for form in FORMATS:
            image.save(made / "images" / f"{mode}.{form.lower()}", form)
            images[f"{mode}.{form}"] = (made / "images" / f"{mode}.{form.lower()}").read_bytes()
    image.save(made / "images" / "lzw.tiff", compression="tiff_lzw")
    image.convert("P").save(made / "images" / "p.png", interlace=1)
    for name, column in {
        "images": [{"bytes": raw, "path": name} for name, raw in images.items()],
        "images-raw": [*images.values()],
        "images-paths": [f"photos/{name}" for name in images],
    }.items():
        labels = [str(number % 2) for number in range(len(images))]
        pq.write_table(
            pa.table({"image": column, "label": labels}), made / "tables" / f"{name}.parquet", row_group_size=5
        )
    rows = text_rows(8)
    pq.write_table(pa.Table.from_pylist(rows), made / "tables" / "texts.parquet")
    (made / "tables" / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        csv.writer(text, delimiter=separator).writerows(
            [["text", "label"], *([row["text"], row["label"]] for row in rows)]
        )
        (made / "tables" / f"texts.{suffix}").write_text(text.getvalue())
    (made / "tables" / "texts.csv.gz").write_bytes(gzip.compress((made / "tables" / "texts.csv").read_bytes()))
    pixels, labels = rng.integers(0, 255, (20, 8, 8), np.uint8).tobytes(), bytes([0, 1] * 10)
    (made / "idx" / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 20, 8, 8) + pixels)
    (made / "idx" / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 20) + labels)
    (made / "idx" / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">4I", 0x803, 20, 8, 8) + pixels)
    )
    (made / "idx" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, 20) + labels))
    state = toy_backbone()["module"].state_dict()
    safetensors.torch.save_file(state, made / "weights" / "toy.safetensors")
    torch.save(state, made / "weights" / "toy.pt")
    torch.save(state, made / "weights" / "toy.legacy", _use_new_zipfile_serialization=False)
    text_encoder(made / "encoder")
    (made / "encoder" / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))


# --- a run ---


def is_told(error: BaseException, named: str) -> bool:
    """Whether the command line makes a message of it, which names what it is about."""
    ours = type(error).__module__.startswith("frostline.") and isinstance(error, ValueError | RuntimeError)
    return (ours or (isinstance(error, OSError) and error.filename is not None)) and named in str(error)


class Watch:
    """What is written, started or reached while a reader reads, but below a folder."""

    def __init__(self, inside: Path) -> None:
        self.inside, self.on, self.seen = str(inside), False, list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        paths = ()
        if event == "open":
            paths = arguments[:1] if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"):
            paths = arguments[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = arguments[:2]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event} {arguments!r}"[:300])
        for path in paths:
            if not isinstance(path, int):
                full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a Path would be another audited event)
                if not full.startswith((self.inside, "/dev/null")):
                    self.seen.append(f"{event} {full}"[:300])


def run(made: Path, scratch: Path, name: str, count: int) -> dict[str, Any]:
    """Read this many damaged inputs. The current, home and temporary folders are below `scratch`, and nothing may come into them."""
    reader, inputs = READERS[name], scratch / "inputs"
    shutil.copytree(made, inputs)
    files = sorted(path for path in inputs.glob(reader.files) if path.is_file())
    for path in files:
        reader.read(path)  # sound ones are read; and what that imports is imported
    whole = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    stamps = {path: path.stat().st_mtime_ns for path in whole}
    pool, watch = [whole[path] for path in files], Watch(inputs)
    elsewhere = [scratch / each for each in ("home", "here", "tmp")]
    before = {path for folder in elsewhere for path in folder.rglob("*")}
    found: dict[str, Any] = {"inputs": count, "refused": 0, "read": 0, "slowest_s": 0.0, "wrong": []}
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        path = rng.choice(files)
        path.write_bytes(damage(rng, whole[path], pool, text=path.suffix in TEXT))
        if reader.seal is not None and rng.random() < 0.5:
            reader.seal(path, whole[path])
        shutil.copy(path, scratch / "last")  # to look at, should this process not survive it
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        began, watch.on, error = time.perf_counter(), True, None
        try:
            reader.read(path)
        except Exception as caught:  # noqa: BLE001 (which kind it is, is the question)
            error = caught
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
        found["slowest_s"] = max(found["slowest_s"], time.perf_counter() - began)
        found["refused" if error else "read"] += 1
        if error and not is_told(error, reader.named(path)):
            kind = f"{type(error).__module__}.{type(error).__qualname__}"
            found["wrong"].append(f"{number}, {path.name}: {kind}: {error}"[:400])
        found["wrong"] += [f"{number}, {path.name}: {event}" for event in watch.seen]
        watch.seen.clear()
        for each in (*inputs.rglob("*"), *whole):
            if each not in whole:
                each.unlink() if each.is_file() else None
            elif not each.exists() or each.stat().st_mtime_ns != stamps[each]:
                each.write_bytes(whole[each])
                stamps[each] = each.stat().st_mtime_ns
    found["wrong"] += [f"left: {path}" for each in elsewhere for path in each.rglob("*") if path not in before]
    return found


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
