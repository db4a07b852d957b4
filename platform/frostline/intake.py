"""From the body of a request to encoded images or to texts: the only place that knows what a client may send."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from frostline.samples import utf8
from frostline.tokens import raw_of

JSON = "application/json"
FORM = "multipart/form-data"


@dataclass(frozen=True)
class Input:
    """What a bundle takes."""

    noun: str
    """What one is called."""
    key: str
    """In JSON, and of fields in a form."""
    what: str
    how: str
    """Both for people."""
    types: tuple[str, ...] = ()
    """Content types beside JSON; of a body that is one as it is, but for the form's."""
    texts: int = 0
    """How many texts one is."""


TEXT = Input("text", "texts", what='{"texts": ["…", …]}', how=f"as {JSON}", texts=1)
PAIR = Input("pair", "texts", what='{"texts": [["…", "…"], …]}', how=f"as {JSON}", texts=2)
IMAGE = Input(
    "image",
    "image",
    what="a PNG, JPEG, WEBP, BMP, GIF or TIFF file",
    how=f"as it is with image/png or its own type, in a form as {FORM}, or in {JSON}",
    types=(
        *("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff"),
        *("application/octet-stream", FORM),
    ),
)


@dataclass(frozen=True)
class Limits:
    """What a request may cost; an image's pixels are limited by its bundle."""

    body_bytes: int = 32 << 20
    samples: int = 64
    """Images, texts or pairs."""
    characters: int = 100_000
    """Of a text, all of which is tokenised before it is cut."""
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
    """The raw contents of the samples in a body (encoded images, `raw_of` texts), in order, at least one. Raises Refused."""
    kind = content_type.partition(";")[0].strip().lower()
    remedy = f"send {given.what}, {given.how}"
    if kind not in (JSON, *given.types):
        why = f"{kind!r} is none of those that are read" if kind else "the request has no Content-Type"
        raise Refused(415, "content type not supported", why, remedy)
    if not body:
        raise Refused(400, "empty body", "no bytes came", remedy)
    if kind == JSON:
        found = texts_from_json(body, given, limits) if given.texts else images_from_json(body, given)
    elif kind == FORM:
        found = await from_form(content_type, body, given, limits)
    else:
        found = [body]
    if len(found) > limits.samples:
        raise Refused(
            422,
            f"{len(found):,} {given.noun}s",
            f"a request takes {limits.samples} at most",
            "send them in several requests, or predict a whole data set with `frostline predict`",
        )
    return found


def texts_from_json(body: bytes, given: Input, limits: Limits) -> list[bytes]:
    """`{"texts": [TEXT, …]}`, or `{"texts": [[TEXT, TEXT], …]}` of pairs. Raises Refused."""
    remedy = f"send {given.what}"
    said = _json(body, remedy)
    _check_keys(said, given, list, f"a list {given.key!r}", "the JSON cannot be read", remedy)
    items: list[Any] = said[given.key]
    if not items:
        raise Refused(422, "nothing to predict", "the list is empty", remedy)
    found = []
    for number, item in enumerate(items):
        what = f"{given.noun} {number} cannot be read"
        texts = [item] if given.texts == 1 else item
        if not isinstance(texts, list) or len(texts) != given.texts or not all(isinstance(each, str) for each in texts):
            wanted = "a string" if given.texts == 1 else f"a list of {given.texts} strings"
            raise Refused(422, what, f"it is not {wanted}, as this bundle takes", remedy)
        if (longest := max(map(len, texts))) > limits.characters:
            why = f"it is too long: {longest:,} characters, allowed are {limits.characters:,}"
            raise Refused(422, what, why, "cut it: the bundle reads its beginning only")
        found.append(raw_of([utf8(text) for text in texts]))
    return found


def images_from_json(body: bytes, given: Input) -> list[bytes]:
    """`{"image": BASE64}`, or a list of these. Raises Refused."""
    remedy = f'send {{"{given.key}": "BASE64"}}, or a list of one or more of these'
    said = _json(body, remedy)
    items: Sequence[Any] = said if isinstance(said, list) else [said]
    if not items:
        raise Refused(422, "nothing to predict", "the list is empty", remedy)
    return [_from_object(item, number, given, remedy) for number, item in enumerate(items)]


def _json(body: bytes, remedy: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else _brief(error)
        raise Refused(400, "not JSON", why, remedy) from None


def _check_keys(item: Any, given: Input, kind: type, wanted: str, what: str, remedy: str) -> None:
    """Raises Refused unless it is an object with the input's key, of this kind, and no other."""
    if not isinstance(item, dict) or not isinstance(item.get(given.key), kind):
        raise Refused(422, what, f"it is no object with {wanted}", remedy)
    if others := sorted(set(item) - {given.key}):
        raise Refused(422, what, f"it has other keys: {', '.join(map(repr, others[:3]))[:100]}", remedy)


def _from_object(item: Any, number: int, given: Input, remedy: str) -> bytes:
    what = f"{given.noun} {number} cannot be read"
    _check_keys(item, given, str, f"a text {given.key!r}", what, remedy)
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
        Headers({"content-type": content_type}), stream(), max_files=10 * limits.samples, max_fields=10
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
