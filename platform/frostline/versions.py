"""What computes the numbers: the packages, and this one's own code."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

VERSION = "0.1.0"
"""Of Frostline: kept here, as a cluster is sent the source and not the installed package."""
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "transformers",
    "tokenizers",
    "ray",
    "optuna",
    "pyarrow",
    "pillow",
    "scikit-learn",
)
VERSIONED = ("torch", "torchvision", "timm")  # what computes activations


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers, and `code`: 12 hex digits of the SHA-256 over this package's source."""
    found = {"python": platform.python_version(), "frostline": VERSION}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    sha = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(source.name.encode() + source.read_bytes())
    return {**found, "code": sha.hexdigest()[:12]}
