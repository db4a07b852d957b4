"""What the models of a job are made of: their base, depths, the dimensions of a space, and how values are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)

from frostline.credentials import holds_credentials

Scalar = bool | int | float | str


class Frozen(BaseModel):
    """The base of every spec: immutable, unknown keys forbidden, types as written (no number from a string, no integer
    from `true`), NaN and infinity refused, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _without_credentials(address: str) -> str:
    if holds_credentials(address):
        raise ValueError(
            "a job is written down with its study, so that no address in it may hold credentials; leave them out, and set them in "
            "the environment of every node (for s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or where its library looks"
        )
    return address


Address = Annotated[str, AfterValidator(_without_credentials)]
"""A path or a URI, without credentials."""


def _say_what_a_depth_is(value: Any, handler: Callable[[Any], Any]) -> Any:
    """One message in place of one per type that a depth may have."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            'a depth is a whole number of stages (1 = one stage), a share of them from 0.0 to 1.0 (1.0 = all), or "all"'
        ) from None


Depth = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | Literal["all"],
    WrapValidator(_say_what_a_depth_is),
]


class Range(Frozen):
    """A searched interval, both ends included; whole numbers where the key holds whole numbers."""

    low: float
    """The smallest value that is drawn."""
    high: float
    """The largest value that is drawn."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    step: float | None = Field(default=None, gt=0)
    """Draw low, low + step, … up to high only; any value of the interval (any whole number) when not given."""

    @model_validator(mode="after")
    def _is_an_interval(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} must be below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs low above 0, not {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; leave one out, or give a list of choices")
        low, high, step = (Fraction(str(value)) for value in (self.low, self.high, self.step or 1.0))
        if self.step is not None and (high - low) % step:
            raise ValueError(
                f"steps of {self.step:g} from low = {self.low:g} miss high = {self.high:g}; "
                f"the last value that they reach is {float(high - (high - low) % step):g}"
            )
        return self


def _dimension_kind(value: Any) -> str:
    return "range" if isinstance(value, Mapping | Range) else "choice" if isinstance(value, list | tuple) else "value"


Dimension = Annotated[
    Annotated[Range, Tag("range")]
    | Annotated[tuple[Scalar, ...], Field(min_length=1, strict=False), Tag("choice")]
    | Annotated[Scalar, Tag("value")],
    Discriminator(_dimension_kind),
]


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON value's canonical text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
