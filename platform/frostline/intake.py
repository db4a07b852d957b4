"""From the body of a request to encoded images: the only place that knows what a client may send."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

JSON = "application/json"
FORM = "multipart/form-data"


@dataclass(frozen=True)
class Input:
    """What a bundle takes."""

    key: str
    """What one is called: its key in JSON, its field in a form."""
    types: tuple[str, ...]
    """Content types of a body that is one, as it is."""
    what: str
    """For people."""


IMAGE = Input(
    key="image",
    types=(
        *("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff"),
        "application/octet-stream",
    ),
    what="a PNG, JPEG, WEBP, BMP, GIF or TIFF file",
)


@dataclass(frozen=True)
class Limits:
    """What a request may cost; an image's pixels are limited by its bundle."""

    body_bytes: int = 32 << 20
    images: int = 64
    read_s: float = 30.0
    """To send the body."""
    answer_s: float = 60.0
    """From then on to the answer."""
    requests: int = 256
    """At a time."""
    held_bytes: int = 512 << 20
    """Of bodies, at a time."""


class Refused(ValueError):  # noqa: N818 (it names a state, and reads better so)
    """A request that is not answered: its HTTP status, and what a client is told."""

    def __init__(self, status: int, what: str, why: str, remedy: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{what}: {why}")
        self.status, self.what, self.why, self.remedy = status, what, why, remedy
        self.headers = dict(headers or {})


async def contents_of(content_type: str, body: bytes, given: Input, limits: Limits) -> list[bytes]:
    """The encoded images in a body, in order, at least one. Raises Refused."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (JSON, FORM, *given.types):
        raise Refused(
            415,
            "content type not supported",
            f"{kind!r} is none of those that are read" if kind else "the request has no Content-Type",
            f"send {given.what} as it is with {given.types[0]} or its own type, a form as {FORM}, or {JSON}",
        )
    if not body:
        raise Refused(400, "empty body", "no bytes came", f"send {given.what}, a form or JSON")
    if kind == JSON:
        found = from_json(body, given)
    elif kind == FORM:
        found = await from_form(content_type, body, given, limits)
    else:
        found = [body]
    if len(found) > limits.images:
        raise Refused(
            422,
            f"{len(found):,} images",
            f"a request takes {limits.images} at most",
            "send them in several requests, or predict a folder with `frostline predict`",
        )
    return found


def from_json(body: bytes, given: Input) -> list[bytes]:
    """`{"image": BASE64}`, or a list of these. Raises Refused."""
    remedy = f'send {{"{given.key}": "BASE64"}}, or a list of one or more of these'
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else _brief(error)
        raise Refused(400, "not JSON", why, remedy) from None
    items: Sequence[Any] = said if isinstance(said, list) else [said]
    if not items:
        raise Refused(422, "nothing to predict", "the list is empty", remedy)
    return [_from_object(item, number, given, remedy) for number, item in enumerate(items)]


def _from_object(item: Any, number: int, given: Input, remedy: str) -> bytes:
    what = f"{given.key} {number} cannot be read"
    if not isinstance(item, dict) or not isinstance(item.get(given.key), str):
        raise Refused(422, what, f"it is no object with a text {given.key!r}", remedy)
    if others := sorted(set(item) - {given.key}):
        raise Refused(422, what, f"it has other keys: {', '.join(map(repr, others[:3]))[:100]}", remedy)
    try:
        return base64.b64decode(item[given.key], validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            422, what, "it is not base64", "encode the file's bytes in base64, without a data: prefix"
        ) from None


async def from_form(content_type: str, body: bytes, given: Input, limits: Limits) -> list[bytes]:
    """The files of a form, which are all fields of the input's name. Raises Refused."""
    remedy = f"upload files in fields {given.key!r}, as curl -F {given.key}=@FILE does"

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        Headers({"content-type": content_type}), stream(), max_files=10 * limits.images, max_fields=10
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, "not a form", getattr(error, "message", "it cannot be parsed"), remedy) from None
    try:
        found: list[bytes] = []
        for name, value in form.multi_items():
            if name != given.key or not isinstance(value, UploadFile):
                raise Refused(422, "unknown field", f"{name[:100]!r} is no file named {given.key!r}", remedy)
            found.append(await value.read())
    finally:
        await form.close()
    if not found:
        raise Refused(422, "nothing to predict", "the form has no file", remedy)
    return found


def _brief(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 100 else text[:99] + "…"
