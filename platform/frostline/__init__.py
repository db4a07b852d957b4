"""Frostline: search what to freeze, how big a head and which learning rates, on Ray, into Parquet."""

from typing import TYPE_CHECKING, Any

from frostline.versions import VERSION

if TYPE_CHECKING:
    from frostline.api import probe, search

__all__ = ["__version__", "probe", "search"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """`frostline.search` and `frostline.probe`, imported on first use: reading results needs neither torch nor Ray."""
    if name in ("probe", "search"):
        from frostline import api

        return getattr(api, name)
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
