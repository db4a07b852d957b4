"""What is said of one sample that cannot be used, whatever it is a sample of."""

from __future__ import annotations


class BadSample(ValueError):  # noqa: N818 (it names a state, and reads better so)
    """One sample cannot be used. The message is a short `kind: detail`, without the sample's name."""
