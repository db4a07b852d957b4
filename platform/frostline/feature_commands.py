"""What the commands `features list`, `verify` and `clean` do: from parsed arguments to what is printed, and an exit status."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from frostline.files import locate
from frostline.store import Entry, Store
from frostline.text import render_table


def list_features(arguments: argparse.Namespace) -> int:
    store, name = _store(arguments.root)
    _show_entries(store.entries(), name)
    return 0


def verify_features(arguments: argparse.Namespace) -> int:
    store, name = _store(arguments.root)
    entries, console = store.entries(), Console(highlight=False)
    damage = {entry.key: store.verify(entry.key) for entry in entries}
    _show_entries(entries, name, damage)
    problems = [problem for found in damage.values() for problem in found]
    for problem in problems:
        console.print(Text(problem), soft_wrap=True)
    if problems:
        console.print("a search that reads them makes what is damaged anew")
    elif entries:
        console.print("every byte is as it was written")
    return 1 if problems else 0


def clean_features(arguments: argparse.Namespace) -> int:
    store, name = _store(arguments.root)
    removed, console = store.clean(arguments.unused_days), Console(highlight=False)
    kept = store.entries()
    console.print(Text(f"deleted {_counted(removed)} in {name}"), soft_wrap=True)
    if kept:
        recent = f" or used within {arguments.unused_days:g} days" * (arguments.unused_days > 0)
        console.print(f"kept {_counted(kept)}, in use{recent}", soft_wrap=True)
    return 0


def _store(root: str) -> tuple[Store, str]:
    """The store at a folder or URI, and its name without credentials."""
    place = locate(root)
    if "://" not in root and not Path(place.path).is_dir():
        raise ValueError(
            f"{place.name} is not a folder. A search stores activations where its job's features.path says, or else in the "
            "folder `features` beside its study, which is results/features for results/NAME: name that one"
        )
    return Store(root), place.name


def _show_entries(entries: Sequence[Entry], name: str, damage: Mapping[str, Sequence[str]] | None = None) -> None:
    """Print a line an entry and, where it is known, whether it is damaged; 100 columns suffice."""
    abouts = [entry.about or {} for entry in entries]
    columns = {
        "backbone": [about.get("backbone", "unknown") for about in abouts],
        "cut": [about.get("cut") for about in abouts],
        "view": [about["view"]["view"] if about.get("view") else None for about in abouts],
        "images": [entry.samples for entry in entries],
        "MB": [round(entry.bytes / 1e6, 2) for entry in entries],
        "dtype": [about.get("dtype") for about in abouts],
        "last used": [datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M") for entry in entries],
        "key": [entry.key for entry in entries],
    }
    if damage is not None:
        columns["state"] = ["damaged" if damage[entry.key] else "intact" for entry in entries]
    console = Console(highlight=False)
    if entries:
        render_table(pa.table(columns), console)
    console.print(Text(f"{_counted(entries)} in {name}"), soft_wrap=True)


def _counted(entries: Sequence[Entry]) -> str:
    count = len(entries)
    return f"{count:,} {'entry' if count == 1 else 'entries'}, {decimal(sum(entry.bytes for entry in entries))}"
