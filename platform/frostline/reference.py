"""What a job file may say, written out from the models: a file to start from, and the reference in docs/job.md."""

from __future__ import annotations

import json
import re
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from frostline.models import Range
from frostline.spec import NEEDED_KEYS, OWN_KEYS, Arm, Job, searchable_fields, section_models
from frostline.strategies import CATALOGUE

ARMS = """\
# An arm is a strategy with its own space; arms share search.trials equally. An entry of a space is a range
# {low, high, log, step}, a list of choices, or one value to hold. "freeze.depth" = "all" searches every depth, and so does "head.depth" = "all".

[arms.freeze]
strategy = "freeze_depth"

[arms.freeze.space]
"freeze.depth" = "all"
"freeze.norm" = ["frozen", "affine"]
"head.hidden" = [0, 128]
"train.lr" = { low = 1e-5, high = 3e-3, log = true }
"train.head_lr" = { low = 1e-4, high = 3e-2, log = true }
"""
STRATEGIES = """\
# Strategies

A strategy says what of the backbone trains, and when; the head always trains. It is named in an arm (`strategy = "lp_ft"`) or,
for a job's own configuration, in `freeze.strategy`. Its keys are written in the arm's space (`"freeze.depth" = "all"`) or in
`[freeze]`; those in bold are needed. The table is generated from `platform/frostline/strategies.py`.

{table}

With any strategy go `freeze.norm`, `freeze.layer_decay`, `head.init = "probe"` (the head starts at the closed-form ridge
solution), `train.l2_sp` (L2-SP, Li et al. 2018) and `train.wise` (WiSE-FT, Wortsman et al. 2022).

- **Depth.** Where a strategy takes `depth`, so many stages from the input are frozen throughout; their activations are stored
  and shared like those of `freeze_depth`.
- **Phases.** `lp_ft` and `gradual` train the head alone first. Those epochs are part of `train.epochs` and are charged; early
  stopping counts epochs from the first unfreezing (and the end of the warm-up), so that nothing is judged before it. `lp_ft` restarts schedule and optimizer
  with its second phase, `gradual` keeps both going.
- **Norm layers.** `norm_only` and `bias_only` imply `freeze.norm = "affine"`, `scratch` implies `"batch"`.
- **Adapters.** `lora` and `dora` need `pip install 'frostline[peft]'`. Linear layers and 1x1 convolutions get an update; a bundle
  holds the updates, not the weights.
- **From nothing.** `scratch` draws new weights for each confirmation; of a `python:` backbone those that its function makes.
- **Relative gradient norms.** `auto_rgn` weights the rate of each backbone tensor by its gradient's norm over its own, summed over
  the epoch before (at first, of the first step), the largest being 1. A tensor of zeros has weight 1.

Every strategy keeps the same contract, which `tests/test_strategies.py` holds on convolutional networks and a transformer: what
no phase trains is bit-equal after training; masks, optimizer and gradients agree at the start of each phase, or the trial fails;
the same seeds give the same weights to the bit; a bundle predicts what the trial did.
"""
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
TYPES = {int: "integer", float: "float", str: "string", bool: "true | false", dict: "table"}
GIVEN = {"name": "my-search", "data.path": "digits", "backbone.name": "efficientnet-lite0", "search.trials": 24}


def starter_job(name: str) -> str:
    """A complete job file: what must be chosen is set, all else stands there as a comment with its default."""
    given = GIVEN | {"name": re.sub(r"[^A-Za-z0-9_-]", "-", name).strip("-_")[:64] or GIVEN["name"]}
    blocks = ["# A Frostline job. See what it would do: frostline plan FILE. Run it: frostline search FILE.\n"]
    for section, model in {"": Job, **section_models()}.items():
        lines = [f"[{section}]"] if section else []
        for key, field in keys(model).items():
            path = f"{section}.{key}" if section else key
            lines += [f"# {line}" for line in textwrap.wrap(_describe(field), 115)]
            if path in given:
                lines.append(f"{key} = {json.dumps(given[path])}")
            else:
                lines.append(f"# {key} = {_default(field) or '…'}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join([*blocks, ARMS])


def job_reference() -> str:
    """docs/job.md."""
    parts = [
        "# The job file",
        "A job is a TOML file. Every key can be overridden on the command line as `key=value`. This page is generated "
        "from the models in `platform/frostline/spec.py`; `frostline schema` prints the same as JSON Schema.",
        "## Top level",
        _table(Job),
    ]
    for section, model in section_models().items():
        parts += [f"## `[{section}]`", _table(model)]
    searchable = ", ".join(f"`{path}`" for path in searchable_fields())
    parts += [
        "## `[arms.NAME]`",
        "A strategy with its own space and sampler. Arms share `search.trials` equally.",
        _table(Arm),
        "## `[arms.NAME.space]`",
        f"Keys, written in quotes: {searchable}.",
        "Each holds a list of choices, one value, or, where the key holds numbers, a table of:",
        _table(Range),
    ]
    return "\n\n".join(parts) + "\n"


def strategies_reference() -> str:
    """docs/strategies.md."""
    rows = ["| strategy | what trains, and when | keys of its own | source |", "|---|---|---|---|"]
    for strategy, entry in CATALOGUE.items():
        needed = NEEDED_KEYS.get(strategy, ())
        own = dict.fromkeys([*needed, *(key for key, strategies in OWN_KEYS.items() if strategy in strategies)])
        names = ", ".join(f"**`{key}`**" if key in needed else f"`{key}`" for key in own)
        rows.append(f"| `{strategy}` | {entry.about} | {names} | {entry.source} |")
    return STRATEGIES.format(table="\n".join(rows))


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in keys(model).items():
        default = f"`{_default(field)}`" if _default(field) else ""
        cells = (f"`{key}`", allowed(field), default, _describe(field))
        escaped = " | ".join(cell.replace("|", "\\|") for cell in cells)
        rows.append(f"| {escaped} |")
    return "\n".join(rows)


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model that are keys of its own table, not tables below it."""
    below = (*section_models().values(), dict)
    return {key: field for key, field in model.model_fields.items() if field.annotation not in below and key != "arms"}


def allowed(field: FieldInfo) -> str:
    """What a field takes, as the reference shows it: `float, > 0, ≤ 10`, `"adamw" | "sgd"`."""
    bounds = (
        f"{sign} {getattr(part, name)}"
        for part in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(part, name)
    )
    return ", ".join([type_name(field.annotation), *bounds])


def type_name(annotation: Any) -> str:
    """A type as the reference shows it: `integer | float | "all"`."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return " | ".join(json.dumps(choice) for choice in inner)
    if kind is Annotated:
        return type_name(inner[0])
    if kind in (Union, UnionType):
        return " | ".join(type_name(member) for member in inner if member is not NoneType)
    return TYPES[kind or annotation]


def _default(field: FieldInfo) -> str:
    """The default as TOML, empty where there is none."""
    value: Any = field.get_default()
    return "" if value in (PydanticUndefined, None) or value == {} else json.dumps(value)


def _describe(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())
