"""Frostline: search what to freeze, how big a head and which learning rates, on Ray, into Parquet."""

from typing import TYPE_CHECKING, Any

from frostline.versions import VERSION

if TYPE_CHECKING:
    from frostline.api import probe, search
    from frostline.bundle import load_bundle

__all__ = ["__version__", "load_bundle", "probe", "search"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """`frostline.search`, `probe` and `load_bundle`, imported on first use: reading results needs neither torch nor Ray."""
    if name in ("probe", "search"):
        from frostline import api

        return getattr(api, name)
    if name == "load_bundle":
        from frostline.bundle import load_bundle

        return load_bundle
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
