"""A sample's label as text, as a source has it: one name, several, or a number."""

from __future__ import annotations

import json
import math
from typing import Any

from frostline.spec import Data, Task

WANTED: dict[Task, str] = {
    "classification": "integers or strings are needed",
    "multilabel": "lists of integers or strings are needed, or strings",
    "regression": "numbers are needed",
}


def label_text(value: Any, spec: Data) -> str | None:
    """A cell of the label column as text, None where it is null. Raises ValueError where it cannot be a label of the job's task."""
    if value is None or _is_name(value):
        return None if value is None else str(value)
    if isinstance(value, float) and spec.task == "regression":
        return repr(value)
    if isinstance(value, list) and spec.task == "multilabel" and all(map(_is_name, value)):
        names = [str(name) for name in value]
        if split := [name for name in names if labels_in(name, spec.label_separator) != [name]]:
            raise ValueError(
                f"holds the label {split[0]!r}, which is empty or has data.label_separator = {spec.label_separator!r} in it; "
                "name another separator"
            )
        return spec.label_separator.join(names)
    hint = f" (data.task = {spec.task!r}; there is multilabel, too)" if isinstance(value, list) else ""
    raise ValueError(f"holds {json.dumps(value, default=str)[:80]}; {WANTED[spec.task]}{hint}")


def labels_in(text: str, separator: str) -> list[str]:
    """The names in a text of any number of labels."""
    return [name for part in text.split(separator) if (name := part.strip())]


def not_a_number(text: str) -> str | None:
    """Why a text is no label of a regression; None where it is one."""
    try:
        number = float(text)
    except ValueError:
        return f"label: {text!r} is no number"
    return None if math.isfinite(number) else f"label: {text!r} is not finite"


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
