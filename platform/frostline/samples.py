"""What is said of one sample that cannot be used, whatever it is a sample of; and the bytes of a text."""

from __future__ import annotations


class BadSample(ValueError):  # noqa: N818 (it names a state, and reads better so)
    """One sample cannot be used. The message is a short `kind: detail`, without the sample's name."""


def utf8(text: str) -> bytes:
    """The bytes that a text was read from, with `surrogateescape` where they are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair, from a JSON escape: no UTF-8 either
        return text.encode("utf-8", "surrogatepass")
