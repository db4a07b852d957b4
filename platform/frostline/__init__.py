"""Frostline: search what to freeze, how big a head and which learning rates, on Ray, into Parquet."""

from typing import TYPE_CHECKING, Any

from frostline.versions import VERSION

if TYPE_CHECKING:
    from frostline.api import best_job, probe, search, train
    from frostline.bundle import load_bundle
    from frostline.comparison import compare

__all__ = ["__version__", "best_job", "compare", "load_bundle", "probe", "search", "train"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """These are imported on first use: reading results needs neither torch nor Ray."""
    if name == "compare":
        from frostline.comparison import compare

        return compare
    if name in ("best_job", "probe", "search", "train"):
        from frostline import api

        return getattr(api, name)
    if name == "load_bundle":
        from frostline.bundle import load_bundle

        return load_bundle
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
