"""A study in other people's tools: which there are, where an export goes, and what opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from frostline import to_mlflow, to_optuna, to_tensorboard, to_wandb
from frostline.runs import Tracked, read_tracked

FOLDER = "tracked"
"""Of a study, where its exports go unless told otherwise."""


@dataclass(frozen=True)
class Target:
    """A tool that a study can be exported to."""

    export: Callable[[Tracked, Path], str]
    """Brings the export at a path up to date, and answers what was written."""
    name: str
    """Of the export, in the study's folder `tracked`."""
    opened: str
    """The command that opens it, with {path} for where it is and {study} for the study's name."""


TARGETS = {
    "optuna": Target(to_optuna.export, "optuna.journal", "optuna-dashboard {path}"),
    "tensorboard": Target(to_tensorboard.export, "tensorboard", "tensorboard --logdir {path}"),
    "mlflow": Target(to_mlflow.export, "mlflow.db", "mlflow ui --backend-store-uri sqlite:///{path}"),
    "wandb": Target(to_wandb.export, "wandb", "wandb sync {path}/{study}/*/offline-run-*"),
}


@dataclass(frozen=True)
class Export:
    """What `track` has written."""

    path: Path
    wrote: str
    """How many trials."""
    opened: str
    """The command that opens it."""


def track(study: str | Path, target: str, out: Path | None = None) -> Export:
    """Bring a study's export to a target up to date, in its folder `tracked` where no other path is given.

    The study may be running; doing it again adds what has ended since. Raises what the readers in `results` raise,
    ExportError, MissingExtraError and OSError.
    """
    chosen = TARGETS[target]
    path = out or Path(study) / FOLDER / chosen.name
    found = read_tracked(study)
    wrote = chosen.export(found, path)
    return Export(path, wrote, chosen.opened.format(path=path, study=found.name))
