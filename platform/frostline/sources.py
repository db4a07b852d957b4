"""What the data holds, before any image is decoded or text tokenised: samples, class names, given splits, groups, and how to read each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pyarrow.fs import FileInfo

from frostline import idx
from frostline.files import DataError, Place, Tree, locate, read_bytes, scan
from frostline.imagetable import SPLIT_NAMES, ImageTable, open_table, read_cells
from frostline.models import digest
from frostline.samples import BadSample
from frostline.spec import Data
from frostline.texttable import TextTable, columns_of, is_table, open_texts
from frostline.tokens import raw_of

Kind = Literal["digits", "idx", "parquet", "folder"]
Reader = Callable[[], bytes]
"""Gives the raw content of one sample, in any thread. Raises BadSample."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PARQUET_SUFFIXES = (".parquet", ".pq")

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FORTUNES = "/usr/share/games/fortunes"  # where Debian's fortunes and fortunes-min put them
PACKAGES = {
    "fashion-mnist": (FASHION_MNIST, "dataset-fashion-mnist"),
    "fortunes": (FORTUNES, "fortunes fortunes-min"),
}
"""Names of data -> where Debian puts it, and in which packages."""
NAMES = ("digits", *PACKAGES)
"""What data.path may be besides a path."""
FORTUNES_A_CLASS = 500
_FOR_TEXTS = "the backbone takes images: for texts name an encoder of these, such as backbone.name = 'all-minilm-l6-v2'"
_IDX_NAME = re.compile(r"((?:train|t10k)-(?:images-idx3|labels-idx1)-ubyte)(?:\.gz)?")


@dataclass(frozen=True, eq=False)
class Source:
    """The samples of a dataset in their order; the lists run parallel."""

    name: str
    sample_ids: list[str]
    names: list[str | None]
    """The class of each sample; None where that is not known, and need not be."""
    read: Callable[[Sequence[int]], Iterator[Reader]]
    """For sample indices in rising order, a reader each."""
    splits: list[str] | None = None
    """Where the data comes with splits: "train", "val" or "test" for each sample."""
    groups: list[str] | None = None
    problems: tuple[tuple[str, str], ...] = ()
    """(what, `kind: detail`) for all that is there and cannot become a sample."""
    stamp: str | None = None
    """Changes when a file behind the samples does (name, size, modification time); None where nothing says so cheaply."""
    changed_ns: int = 0
    """The latest modification behind the stamp, nanoseconds since 1970."""
    grey_shape: tuple[int, int] | None = None
    """(height, width) where the raw content is grey pixels, a byte each; None where it is an encoded image."""
    separate: bool = False
    """Whether each sample is a file of its own, so that they are read in any order at the same cost."""
    classes: tuple[str, ...] | None = None
    """The classes in their own order, where they have one."""


def open_source(spec: Data, *, labelled: bool = True) -> Source:
    """List the samples at `spec.path`. Where they need not be `labelled`, images without a class are samples too, one image may be
    named alone, groups are not looked at, and splits only where each sample is in one.

    Raises DataError when there is nothing there, or nothing that can be used.
    """
    if spec.tokenizer is not None:
        if spec.path in ("digits", "fashion-mnist"):
            raise DataError(
                f"data.path = {spec.path!r} holds images, and the backbone takes texts: name CSV, JSON Lines or Parquet"
            )
        place, tree = _reached(spec.path)
        return _fortunes(place, tree) if spec.path == "fortunes" else _texts(spec, place, tree, labelled)
    if spec.path == "digits":
        return _digits()
    place, tree = _reached(spec.path)
    kind = infer_kind(spec.path, tree.files)
    if spec.path == "fortunes":
        raise DataError(f"{place.name} holds texts; {_FOR_TEXTS}")
    image = kind == "folder" and place.path.lower().endswith(IMAGE_SUFFIXES) and not labelled
    if tree.is_file and kind != "parquet" and not image:
        hint = f"; {_FOR_TEXTS}" if is_table(place.name) else ""
        raise DataError(f"{place.name} is a single file and not Parquet: name a folder or a .parquet file{hint}")
    if kind == "idx":
        return _idx(place, tree)
    return _parquet(spec, place, tree, labelled) if kind == "parquet" else _folder(place, tree, labelled)


def _reached(path: str) -> tuple[Place, Tree]:
    folder, packages = PACKAGES.get(path, (path, None))
    place = locate(folder)
    try:
        return place, scan(place)
    except DataError as error:
        if packages is None:
            raise
        raise DataError(f"{error}; `apt-get install {packages}` puts it there (Debian, Ubuntu)") from None


def infer_kind(path: str, files: Iterable[str]) -> Kind:
    """What `data.path` stands for, given the names of the files there relative to it. IDX files lie at the top; any
    Parquet file makes it Parquet, and images beside it are what its rows name."""
    if path == "digits":
        return "digits"
    files = list(files)
    if path == "fashion-mnist" or any(_IDX_NAME.fullmatch(name) for name in files):
        return "idx"
    return "parquet" if any(name.lower().endswith(PARQUET_SUFFIXES) for name in files) else "folder"


def _digits() -> Source:
    package = find_spec("sklearn")  # whose file is read as it is: to import it takes every worker a second
    assert package, "scikit-learn comes with this package"
    file = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, np.int64, delimiter=",")  # 64 levels and the digit
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    return Source(
        name="digits",
        sample_ids=[f"digits/{i}" for i in range(len(pixels))],
        names=[str(label) for label in table[:, -1].tolist()],
        read=lambda indices: (pixels[i].tobytes for i in indices),
        grey_shape=(8, 8),
    )


def _folder(place: Place, tree: Tree, labelled: bool) -> Source:
    root = place.parent if tree.is_file else place
    images = [name for name in tree.files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        hint = f"; {_FOR_TEXTS}" if any(map(is_table, tree.files)) else ""
        seen = (
            f"{len(tree.files)} other file(s), such as {next(iter(tree.files))!r}" if tree.files else "no visible file"
        )
        raise DataError(f"{place.name} holds no images ({' '.join(IMAGE_SUFFIXES)}) and no Parquet, but {seen}{hint}")
    top = [name for name in tree.folders if "/" not in name]
    given = [name for name in top if name.lower() in SPLIT_NAMES]
    if labelled and 1 < len(given) < len(top):
        stray = next(name for name in top if name not in given)
        raise DataError(
            f"{place.name} holds split folders ({', '.join(given)}) beside {stray!r}: is that a class or a split? "
            f"Move it, or keep nothing but train, val and test there"
        )
    has_splits = 0 < len(given) == len(top)
    depth = 1 if has_splits else 0  # where in its path an image's class stands
    classed = [name for name in images if name.count("/") > depth]
    samples = classed if labelled else images
    used = {name.rsplit("/", name.count("/") - level)[0] for name in classed for level in range(depth + 1)}
    without = [name for name in images if name.count("/") <= depth]
    problems = [(name, "no class: lies in no class folder") for name in without] if labelled else []
    for name in tree.folders if labelled else ():
        if name.count("/") <= depth and name not in used:
            kind = "class" if name.count("/") == depth else "split"
            problems.append((name, f"empty {kind}: no images in this folder"))
    stamp, changed_ns = _stamp(place, {name: tree.files[name] for name in samples})
    parts = [name.split("/") for name in samples]
    in_splits = has_splits and all(len(part) > 1 for part in parts)
    return Source(
        name=place.name,
        sample_ids=samples,
        names=[part[depth] if len(part) > depth + 1 else None for part in parts],
        read=lambda indices: (partial(read_bytes, root / samples[i]) for i in indices),
        separate=True,
        splits=[SPLIT_NAMES[part[0].lower()] for part in parts] if in_splits else None,
        problems=tuple(problems),
        stamp=stamp,
        changed_ns=changed_ns,
    )


def _idx(place: Place, tree: Tree) -> Source:
    found = {match[1]: name for name in tree.files if (match := _IDX_NAME.fullmatch(name))}
    prefixes = ("train", "t10k") if any(name.startswith("t10k") for name in found) else ("train",)
    images, labels, shapes = {}, {}, {}
    for prefix in prefixes:
        for needed in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            if needed not in found:
                there = ", ".join(sorted(found.values())) or "no IDX files"
                raise DataError(f"{place.name} has no {needed}(.gz), but {there}")
        images[prefix] = place / found[f"{prefix}-images-idx3-ubyte"]
        count, *shape = idx.image_dims(images[prefix])
        labels[prefix] = idx.read_labels(place / found[f"{prefix}-labels-idx1-ubyte"]).tolist()
        shapes[prefix] = (shape[0], shape[1])
        if count != len(labels[prefix]):
            raise DataError(f"{images[prefix].name} has {count} images for {len(labels[prefix])} labels")
        if shapes[prefix] != shapes["train"]:
            raise DataError(f"{images[prefix].name} has images of {shapes[prefix]} pixels, train of {shapes['train']}")
    at = [(prefix, i) for prefix in prefixes for i in range(len(labels[prefix]))]
    numbers = [labels[prefix][i] for prefix, i in at]
    fashion = PurePosixPath(place.path).name == "fashion-mnist"
    if fashion and max(numbers, default=0) >= len(FASHION_CLASSES):
        raise DataError(f"{place.name} has label {max(numbers)}; Fashion-MNIST has 0 to {len(FASHION_CLASSES) - 1}")

    def read(indices: Sequence[int]) -> Iterator[Reader]:
        for prefix, run in groupby((at[i] for i in indices), key=lambda where: where[0]):
            pixels = idx.read_images(images[prefix])
            for _, i in run:
                yield pixels[i].tobytes

    stamp, changed_ns = _stamp(place, {name: tree.files[name] for name in found.values()})
    return Source(
        name=place.name,
        sample_ids=[f"{prefix}/{i}" for prefix, i in at],
        names=[FASHION_CLASSES[number] if fashion else str(number) for number in numbers],
        read=read,
        splits=["train" if prefix == "train" else "test" for prefix, _ in at] if len(prefixes) > 1 else None,
        stamp=stamp,
        changed_ns=changed_ns,
        grey_shape=shapes["train"],
        classes=FASHION_CLASSES if fashion else None,
    )


def _parquet(spec: Data, place: Place, tree: Tree, labelled: bool) -> Source:
    root = place.parent if tree.is_file else place
    names = [name for name in tree.files if name.lower().endswith(PARQUET_SUFFIXES)]
    tables = {name: open_table(root / name, spec, labelled=labelled) for name in names}
    rows = _rows(place, tables, names, labelled)
    at = rows.at

    def read(indices: Sequence[int]) -> Iterator[Reader]:
        for name, run in groupby((at[i] for i in indices), key=lambda where: where[0]):
            yield from read_cells(root / name, spec.image_column, [row for _, row in run])

    files = {name: tree.files[name] for name in names}
    for name, table in tables.items():
        folder = (root / name).parent
        paths = sorted(set(table.paths or []))
        infos = folder.fs.get_file_info([f"{folder.path}/{path}" for path in paths])
        files |= {f"{name}/{path}": info for path, info in zip(paths, infos, strict=True)}
    stamp, changed_ns = _stamp(place, files, spec.image_column, spec.label_column, spec.group_column)
    return Source(
        name=place.name,
        sample_ids=[f"{name}:{row}" for name, row in at],
        names=rows.labels,
        read=read,
        splits=rows.splits,
        groups=rows.groups if spec.group_column and labelled else None,
        problems=tuple(rows.problems),
        stamp=None if any(table.paths is None for table in tables.values()) else stamp,
        changed_ns=changed_ns,
    )


def _texts(spec: Data, place: Place, tree: Tree, labelled: bool) -> Source:
    root = place.parent if tree.is_file else place
    names = [name for name in tree.files if is_table(name)]
    if not names:
        seen = f"but {next(iter(tree.files))!r}" if tree.files else "and no other visible file"
        raise DataError(f"{place.name} holds no table of texts (CSV, JSON Lines, Parquet), {seen}")
    tables = {name: open_texts(root / name, spec, labelled=labelled) for name in names}
    rows = _rows(place, tables, names, labelled)
    damaged = [(f"{name}, line {line}", reason) for name in names for line, reason in tables[name].problems]
    stamp, changed_ns = _stamp(place, {name: tree.files[name] for name in names}, *columns_of(spec).values())
    return Source(
        name=place.name,
        sample_ids=[f"{name}:{row}" for name, row in rows.at],
        names=rows.labels,
        read=lambda indices: (partial(_text, tables[name].texts[row]) for name, row in (rows.at[i] for i in indices)),
        splits=rows.splits,
        groups=rows.groups if spec.group_column and labelled else None,
        problems=(*damaged, *rows.problems),
        stamp=stamp,
        changed_ns=changed_ns,
    )


def _text(texts: tuple[bytes, ...] | None) -> bytes:
    if texts is None:
        raise BadSample("no text: null in this row")
    return raw_of(texts)


def _fortunes(place: Place, tree: Tree) -> Source:
    """Debian's fortune cookies, a class a file: those of 500 texts and more, which stand between lines of a lone percent sign."""
    texts: dict[str, list[bytes]] = {}
    for name in tree.files:
        if "." not in name and "/" not in name:
            parts = [part.strip() for part in re.split(rb"(?m)^%\n", read_bytes(place / name))]
            texts[name] = [part for part in parts if part]
    texts = {name: found for name, found in texts.items() if len(found) >= FORTUNES_A_CLASS}
    at = [(name, number) for name, found in texts.items() for number in range(len(found))]
    return Source(
        name=place.name,
        sample_ids=[f"{name}:{number}" for name, number in at],
        names=[name for name, _ in at],
        read=lambda indices: (partial(bytes, texts[at[i][0]][at[i][1]]) for i in indices),
    )


@dataclass(frozen=True)
class _Rows:
    """The samples of several tables; the lists run parallel."""

    at: list[tuple[str, int]]
    """(file, row) of each."""
    labels: list[str | None]
    groups: list[str]
    splits: list[str] | None
    problems: list[tuple[str, str]]


def _rows(
    place: Place, tables: Mapping[str, ImageTable] | Mapping[str, TextTable], names: list[str], labelled: bool
) -> _Rows:
    """The rows that have all that a sample needs. Raises DataError where some tables have splits and some have none."""
    by_file = _splits_by_file(place, names, labelled)
    at: list[tuple[str, int]] = []
    labels, groups, splits = [], [], []
    problems: list[tuple[str, str]] = []
    for name, table in tables.items():
        rows = len(table.labels)
        of_rows = table.splits or [by_file.get(name)] * rows
        for row, (label, group, split) in enumerate(
            zip(table.labels, table.groups or [""] * rows, of_rows, strict=True)
        ):
            if labelled and (label is None or group is None or (split is None and table.splits)):
                lacks = "label" if label is None else "group" if group is None else "split"
                problems.append((f"{name}:{row}", f"no {lacks}: null in this row"))
                continue
            at.append((name, row))
            labels.append(label)
            groups.append(group)
            splits.append(split)
    if labelled and None in splits and set(splits) != {None}:
        raise DataError(f"{place.name}: some of its files say which split their rows are in, some do not")
    return _Rows(at, labels, groups, None if None in splits else splits, problems)


def _splits_by_file(place: Place, names: list[str], strict: bool) -> dict[str, str]:
    """File -> split, where every file's name or top folder says it, as Hugging Face names them: `train-00000-of-00002`."""
    said = {}
    for name in names:
        folder, word = name.split("/")[0].lower(), re.split(r"[-_.]", PurePosixPath(name).name.lower())[0]
        if (split := SPLIT_NAMES.get(word) or SPLIT_NAMES.get(folder)) is not None:
            said[name] = split
    if len(set(said.values())) < 2:  # one lone `train.parquet` says nothing
        return {}
    for name in names:
        if name not in said:
            if not strict:
                return {}
            raise DataError(f"{place.name} holds {next(iter(said))!r} beside {name!r}: which split is the latter in?")
    return said


def _stamp(place: Place, files: dict[str, FileInfo], *columns: str | None) -> tuple[str, int]:
    seen = [(name, info.size, info.mtime_ns) for name, info in sorted(files.items())]
    return digest([place.name, columns, seen]), max((when or 0 for _, _, when in seen), default=0)
