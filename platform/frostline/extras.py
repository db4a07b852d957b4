"""Packages that Frostline does without until something needs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingExtraError(ValueError):
    """A package that is not installed; the text says how to install it."""


def extra(name: str, module: str) -> Any:
    """A module of a package that Frostline's extra `name` brings. Raises MissingExtraError."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"the package {package} is not installed. It comes with an extra: pip install 'frostline[{name}]', or in a "
            f"clone of the repository: pip install -e '.[{name}]'"
        ) from None
