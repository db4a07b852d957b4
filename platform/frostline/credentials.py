"""Credentials in addresses: told from those without, and taken out of what is shown. Standard library only."""

from __future__ import annotations

import re

_LOGIN = re.compile(r"(?<=://)[^/?#@\s\"']*:[^/?#\s\"']*@")
_OPTION = re.compile(r"(?<=[?&])(sig|[a-z_]*(?:secret|token|password|_key))=[^&#\s\"']+", re.IGNORECASE)


def holds_credentials(address: str) -> bool:
    """Whether a URL has a password before its host, or an option that is a key, a token or the like."""
    return "://" in address and bool(_LOGIN.search(address) or _OPTION.search(address))


def censored(text: str) -> str:
    """Text without the credentials of addresses in it."""
    return _OPTION.sub(r"\1=***", _LOGIN.sub("***@", text))
