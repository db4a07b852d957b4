"""Of Ray, without Ray: where its token is, and what to say where a cluster does not answer."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class ClusterError(ConnectionError):
    """A Ray cluster that cannot be reached."""


TOKEN_HINT = (
    "If there is one, it may want a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where its token is not in "
    "~/.ray/auth_token"
)


def token_place() -> str | None:
    """Which of Ray's places for a token is in use, in the order in which Ray looks; never the token itself."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").exists() else None


def settings() -> dict[str, str]:
    """What the environment is to have before Ray is imported, which reads it then: no telemetry, and a token where there is one;
    what the user has set stays. A Ray that has been imported finds a token by itself, and would learn of the mode by half."""
    found = {"RAY_USAGE_STATS_ENABLED": "0"}
    if token_place() and "ray" not in sys.modules:
        found["RAY_AUTH_MODE"] = "token"
    return {name: os.environ.get(name, value) for name, value in found.items()}
