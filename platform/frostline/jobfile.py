"""Reading a job file: TOML and `key=value` overrides in, a `Job` out, or a `JobError` that lists every mistake.

Each mistake names its key path and value, what is allowed, and the nearest known name.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from frostline.credentials import censored
from frostline.modality import modality_mistakes
from frostline.models import Range
from frostline.spec import (
    DEPTHS,
    NEEDED_KEYS,
    SEARCHABLE,
    Arm,
    Job,
    holds_integers,
    is_searched,
    searchable_fields,
    section_models,
    takes_range,
)
from frostline.targets import task_mistakes
from frostline.trialspec import configure

EXAMPLES = {
    "depth": '"all" or [0.0, 0.5, 1.0]',
    "layer_decay": "[0.65, 0.8, 0.95]",
    "lr_ratio": "{ low = 0.01, high = 1.0, log = true }",
}
"""Of spaces for keys that a strategy needs."""
MAX_JOB_BYTES = 1 << 16
MAX_DOTS = 500  # in one line: tomllib takes memory with the square of a dotted key's length
MAX_DEPTH = 12

Loc = tuple[str | int, ...]
"""Where a mistake is, as pydantic names it; ("arms", ARM, "space", KEY, index or end) inside a space."""


class JobError(ValueError):
    """A mistake of the user's in a job file or an override; its text lists all of them."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and lay `key=value` overrides over it.

    Raises JobError, listing every mistake, also where the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JOB_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{path}: no such file; `frostline init {path}` writes a job file to start from") from None
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}; name a job file (TOML)") from None
    if len(content) > MAX_JOB_BYTES:
        raise JobError(f"{path}: a job file of more than {MAX_JOB_BYTES >> 10} KiB is not read")
    try:
        raw = _loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, a number of thousands of digits
        hint = "; text is written in quotes" if "Invalid value" in str(error) else ""
        raise JobError(f"{path}: not a TOML file: {error}{hint}") from None
    return parse_job(raw, overrides, source=str(path))


def parse_job(raw: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "job") -> Job:
    """A job from plain data, as `load_job` reads it from TOML. Raises JobError."""
    try:
        merged = _plain(raw)
    except JobError as error:
        raise JobError(f"{source}: {error}") from None
    lines: list[str] = []
    for override in overrides:
        try:
            _merge(merged, _plain(_parse_override(override)))
        except JobError as error:
            lines.append(str(error))
    job, found = None, dict(_space_mistakes(merged))
    try:
        job = Job.model_validate(merged)
    except ValidationError as error:
        own = {
            loc: line for loc, line in _field_mistakes(error) if not any(loc[: n + 1] in found for n in range(len(loc)))
        }
        found = own | found
    sound = _sound_part(merged, found) if found else job
    lines += found.values()
    lines += _arm_mistakes(sound, len(merged.get("arms", ()))) if sound else ()
    lines += [*modality_mistakes(job), *task_mistakes(job)] if job else ()
    if job is None or lines:
        assert lines
        count = f"{len(lines)} mistake{'s' * (len(lines) != 1)}"
        raise JobError("\n".join([f"{source}: {count}", *(f"  {line}" for line in lines)]))
    return job


def _sound_part(raw: Mapping[str, Any], mistaken: Iterable[Loc]) -> Job | None:
    """The job without its mistaken arms and sections, to tell what is wrong with the other arms in the same breath;
    None where the mistakes are in what all arms share."""
    touched = {loc[0] for loc in mistaken}
    arms = {loc[1] for loc in mistaken if loc[0] == "arms" and len(loc) > 1}
    if touched & {*SEARCHABLE, "search"} or ("arms" in touched and not arms):
        return None
    sound = {key: value for key, value in raw.items() if key not in touched}
    sound["arms"] = {name: arm for name, arm in raw.get("arms", {}).items() if name not in arms}
    return Job.model_validate({**sound, "name": "sound", "data": {"path": "digits"}})


def _plain(value: Any, path: tuple[str, ...] = ()) -> Any:
    """A copy of TOML data. Raises JobError where it is nested too deep to be a job's, or no TOML for its integers."""
    if len(path) > MAX_DEPTH:
        raise JobError(f"{_dotted(path)}: nested too deep; a job's tables are at most {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {key: _plain(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise JobError(f"{_dotted(path)}: an integer of more than 64 bits")
    return value


def _parse_override(text: str) -> dict[str, Any]:
    """`train.lr=1e-3` as nested data; a value that is not TOML is taken as a string, so paths need no quotes."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"{text!r}: an override is written key=value, for example train.lr=1e-3")
    for candidate in (value, json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")):
        try:
            return _loads(f"{key} = {candidate}")
        except (ValueError, RecursionError):
            continue
    raise JobError(f'{text!r}: {key!r} is not a dotted key, for example train.lr or arms.NAME.space."train.lr"')


def _loads(text: str) -> dict[str, Any]:
    """TOML text as plain data. Raises ValueError, or RecursionError where it is nested deeply."""
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise ValueError(f"a line of more than {MAX_DOTS} dots is not read; break it up")
    return tomllib.loads(text)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _field_mistakes(error: ValidationError) -> Iterator[tuple[Loc, str]]:
    """What pydantic found, as (where, line)."""
    for item in error.errors(include_url=False):
        loc = item["loc"]
        if item["type"] == "too_short":  # a list of choices that is empty once the wrong ones are gone
            continue
        if loc[:1] == ("arms",) and loc[2:3] == ("space",):  # loc[4] is the kind of dimension, no part of the path
            loc = loc[:4] if loc[4:5] == ("value",) else loc[:4] + loc[5:6]
        if item["type"] == "string_pattern_mismatch" and loc[-1] == "[key]":
            loc = loc[:-1]
        if item["type"] == "extra_forbidden":
            owner = _model_at(loc[:-1])
            near = _nearest(_dotted(loc), owner.model_fields) or _nearest(_dotted(loc), known_keys())
            yield loc, f"{_dotted(loc)}: unknown key.{near} Allowed here: {', '.join(owner.model_fields)}."
        elif item["type"] == "missing":
            field = _model_at(loc[:-1]).model_fields[str(loc[-1])]
            yield loc, f"{_dotted(loc)}: this key is needed. {' '.join((field.description or '').split())}".rstrip()
        else:
            shown = "" if item["loc"][-1] == "[key]" else _shown(item["input"])
            yield loc, f"{_dotted(loc)}{shown}: {_message(item)}"


def _space_mistakes(raw: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    """What is wrong with the arms' spaces, as (where, line), read from plain data: it is told beside all else."""
    arms = raw.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        space = arm.get("space") if isinstance(arm, dict) else None
        for path, dimension in space.items() if isinstance(space, dict) else ():
            loc = ("arms", name, "space", path)
            yield from (
                (loc + tail, f"{_dotted(loc + tail)}{text}") for tail, text in _dimension_mistakes(path, dimension)
            )


def _dimension_mistakes(path: str, dimension: Any) -> Iterator[tuple[Loc, str]]:
    """What is wrong with one entry of a space, as (where inside it, text)."""
    keys = list(searchable_fields())
    if path in SEARCHABLE and isinstance(dimension, dict):
        quoted = ", ".join(f'"{path}.{key}"' for key in dimension or ["KEY"])
        yield (), f": a dotted key of a space is written in quotes: {quoted} = …"
    elif path == "freeze.strategy":
        yield (), ": an arm has one strategy, `strategy` beside its space; write an arm for each strategy"
    elif path not in keys:
        yield (), f": not a key that can be searched.{_nearest(path, keys)} Allowed: {', '.join(keys)}."
    elif isinstance(dimension, dict) and not takes_range(path):
        every = ', or "all" to search every depth' if path in DEPTHS else ""
        yield (), f": {path} takes no range; give a list of choices{every}"
    elif isinstance(dimension, dict):
        for end in ("low", "high", "step"):
            value = dimension.get(end)
            if isinstance(value, float) and value.is_integer() and holds_integers(path):
                value = int(value)
            if end in dimension and (message := _value_mistake(path, value)):
                yield (end,), f"{_shown(value)}: {message}"
    elif isinstance(dimension, list):
        if not dimension:
            yield (), ": give at least one choice"
        mixed = path in DEPTHS and "1" in map(str, dimension) and float in map(type, dimension)
        if mixed:
            yield (), ": 1 is one stage, 1.0 is all; write shares (0.5, 1.0) or numbers of stages (1, 3), not both"
        seen: set[Any] = set()
        for index, value in enumerate(dimension):
            if message := _value_mistake(path, value):
                yield (index,), f"{_shown(value)}: {message}"
            elif value in seen and not mixed:
                yield (index,), f"{_shown(value)}: stands in the list twice"
            else:
                seen.add(value)
    elif message := _value_mistake(path, dimension):
        yield (), f"{_shown(dimension)}: {message}"


def _arm_mistakes(job: Job, arms: int) -> Iterator[str]:
    """What is wrong with the budget of `arms` arms, and with those in the job as a whole: settings of one section that
    contradict each other somewhere in the space."""
    if arms and (over := job.search.trials % arms):
        fewer, more = job.search.trials - over, job.search.trials - over + arms
        yield (
            f"search.trials = {job.search.trials}: not an equal share for each of {arms} arms; "
            f"{f'{fewer} or ' if fewer else ''}{more} is"
        )
    if not job.search.trials:
        yield from (
            f'arms.{name}.space."{path}": is searched, and search.trials is 0; hold one value, or give trials'
            for name, arm in job.arms.items()
            for path, dim in arm.space.items()
            if is_searched(path, dim)
        )
        if not job.confirm.seeds:
            yield "search.trials = 0 and confirm.seeds = 0: nothing would be trained"
    for name, arm in job.arms.items():
        if (arm.sampler or job.search.sampler) == "grid":
            yield from (
                f'arms.{name}.space."{path}": a grid needs a list of choices, or a range with a step or of whole numbers, not an open range'
                for path, dim in arm.space.items()
                if isinstance(dim, Range) and dim.step is None and not holds_integers(path)
            )
        needed = [key for key in NEEDED_KEYS.get(arm.strategy, ()) if key not in job.freeze.model_fields_set]
        if lacking := [key for key in needed if f"freeze.{key}" not in arm.space]:
            yield from (
                f'arms.{name}: strategy = "{arm.strategy}" needs space."freeze.{key}", for example {EXAMPLES[key]}'
                for key in lacking
            )
            continue
        found: dict[Loc, str] = {}
        for values in _corners(arm):
            try:
                configure(job, arm, values)
            except ValidationError as error:
                found = dict(_field_mistakes(error)) | found
        yield from (f"arms.{name}: {line}" for line in found.values())


def _corners(arm: Arm, at_most: int = 4096) -> Iterator[dict[str, Any]]:
    """The ends and choices of a space, combined within each section: where its settings can contradict each other."""
    ends = {path: _ends(path, dim) for path, dim in arm.space.items() if is_searched(path, dim)}
    first = {path: values[0] for path, values in ends.items()}
    for section in SEARCHABLE:
        mine = [path for path in ends if path.startswith(f"{section}.")]
        for values in itertools.islice(itertools.product(*(ends[path] for path in mine)), at_most):
            yield first | dict(zip(mine, values, strict=True))


def _ends(path: str, dimension: Any) -> tuple[Any, ...]:
    if isinstance(dimension, Range):
        kind = int if holds_integers(path) else float
        return kind(dimension.low), kind(dimension.high)
    return dimension if isinstance(dimension, tuple) else (dimension,)


def _value_mistake(path: str, value: Any) -> str | None:
    """What is wrong with `value` for the job key `path` by itself; None where nothing is."""
    section, key = path.split(".", 1)
    try:
        section_models()[section].model_validate({key: value})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["loc"][:1] == (key,):
                return _message(item)
    return None


def known_keys() -> list[str]:
    """Every dotted key of a job outside `arms`, sections included."""
    nested = [f"{name}.{key}" for name, model in section_models().items() for key in model.model_fields]
    return [*Job.model_fields, *nested]


def _model_at(loc: Loc) -> type[BaseModel]:
    """The model whose key a mistake is about."""
    if loc[:1] == ("arms",):
        return Arm if len(loc) == 2 else Range
    return section_models()[".".join(map(str, loc))] if loc else Job


def _nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing: the known key whose last word is nearest by spelling."""
    known = list(known)
    last = [key.rpartition(".")[2] for key in known]
    close = difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.7)
    near = difflib.get_close_matches(name, [key for key, word in zip(known, last, strict=True) if word in close], 1, 0)
    return f" Did you mean {near[0]!r}?" if near else ""


MESSAGES = {
    "string_type": "should be text in quotes",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number, without point and quotes",
    "float_type": "should be a number, without quotes",
    "model_type": "should be a table",
    "dict_type": "should be a table",
    "string_pattern_mismatch": "a name is 1 to 64 letters, digits, `_` and `-`, a letter or a digit first",
}


def _message(item: ErrorDetails) -> str:
    text = MESSAGES.get(item["type"], item["msg"].removeprefix("Value error, ").removeprefix("Input "))
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        near = _nearest(item["input"], re.findall(r"'([^']*)'", text))
        text += f".{near}" if near else ""
    return text[:1].lower() + text[1:]


def _dotted(loc: Loc) -> str:
    words = [str(part) for part in loc if isinstance(part, str)]
    return ".".join(word if re.fullmatch("[A-Za-z0-9_-]+", word) else _toml(word) for word in words)


def _shown(value: Any) -> str:
    return "" if isinstance(value, dict | list) else f" = {_toml(value)}"


def _toml(value: Any, at_most: int = 80) -> str:
    """A value as it is written in the file, printable and not long."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | int | float) else str(value)
    text = censored(text)
    text = text if len(text) <= at_most else f"{text[:at_most]}…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def as_toml(values: Mapping[str, Any], section: str = "") -> list[str]:
    """Lines of a job file that hold these JSON values; what is None is left out, which is what it stands for."""
    lines, below = [], []
    for key, value in values.items():
        name = _toml_key(key)
        if isinstance(value, Mapping) and not section.endswith(".space"):
            inner = f"{section}.{name}" if section else name
            below += ["", f"[{inner}]", *as_toml(value, inner)]
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value)}")
    return lines + below


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_toml_key(key)} = {_toml_value(each)}" for key, each in value.items() if each is not None)
        return f"{{ {inside} }}"
    return (
        f"[{', '.join(map(_toml_value, value))}]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
    )
