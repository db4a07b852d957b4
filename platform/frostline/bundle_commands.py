"""What the commands predict and export do."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from frostline.text import plain


def predict(arguments: argparse.Namespace) -> int:
    """`frostline predict`."""
    from frostline.predict import lines, predict_data

    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch}: give 1 or more images a pass")
    summary = predict_data(
        arguments.bundle,
        arguments.data,
        arguments.out,
        arguments.overrides,
        split=arguments.split,
        features=arguments.features,
        batch=arguments.batch,
        address=arguments.address,
    )
    console = Console(highlight=False)
    for line in lines(summary):
        console.print(plain(line), soft_wrap=True)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`frostline export`."""
    from frostline.export import export_bundle

    done = export_bundle(
        arguments.bundle, "full" if arguments.full else arguments.to, Path(arguments.out) if arguments.out else None
    )
    console = Console(highlight=False)
    for line in (f"{done.path}: {done.wrote}", f"open it with: {done.opened}"):
        console.print(plain(line), soft_wrap=True)
    return 0
