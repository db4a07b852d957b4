"""Of Ray, without Ray: its token, its temporary folder, and what to say where a cluster does not answer."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
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


def shared_token() -> str | None:
    """The file with the token in use, where others than its owner may read it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        return str(path) if path.stat().st_mode & 0o077 else None
    return None


def keep_token() -> None:
    """See to it that a Ray that is started here has a token which only this user can read: Ray makes one that everybody can.

    One that Ray has made is closed; where a variable names another, or the user wants none, nothing is done.
    """
    own = Path.home() / ".ray" / "auth_token"
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    own.parent.mkdir(mode=0o700, exist_ok=True)
    if not own.exists():
        new = own.with_name(f"auth_token-{os.getpid()}")
        new.touch(0o600)
        new.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(new, own)  # whole, or not at all
        new.unlink()
    if own.stat().st_mode & 0o077:
        own.chmod(0o600)


def private_folder() -> Path:
    """A folder for Ray's sessions that other users cannot enter: Ray opens its own to all. Raises ClusterError where somebody else
    has taken its name."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    folder = Path(base) / f"frostline-user-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:  # a folder, and nobody else's
        raise ClusterError(
            f"{folder} can be entered by others, or is theirs: remove it, or set TMPDIR to a folder of your own"
        )
    return folder / "ray"


def settings() -> dict[str, str]:
    """What the environment is to have before Ray is imported, which reads it then: no telemetry, and a token where there is one;
    what the user has set stays. A Ray that has been imported finds a token by itself, and would learn of the mode by half."""
    found = {"RAY_USAGE_STATS_ENABLED": "0"}
    if token_place() and "ray" not in sys.modules:
        found["RAY_AUTH_MODE"] = "token"
    return {name: os.environ.get(name, value) for name, value in found.items()}
