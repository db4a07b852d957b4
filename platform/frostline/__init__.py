"""Frostline: search what to freeze, how big a head and which learning rates, on Ray, into Parquet."""

from typing import TYPE_CHECKING, Any

from frostline.versions import VERSION

if TYPE_CHECKING:
    from frostline.api import best_job, probe, search, train
    from frostline.comparison import compare

__all__ = ["__version__", "best_job", "compare", "probe", "search", "train"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """These are imported on first use: reading results needs neither torch nor Ray."""
    if name == "compare":
        from frostline.comparison import compare

        return compare
    if name in __all__:
        from frostline import api

        return getattr(api, name)
    raise AttributeError(f"module 'frostline' has no attribute {name!r}")
