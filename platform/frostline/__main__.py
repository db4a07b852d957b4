"""`frostline`, which is also `python -m frostline`."""

from __future__ import annotations

from frostline.cli import main
from frostline.ending import leave


def run() -> None:
    """The command, to its end."""
    leave(main())


if __name__ == "__main__":
    run()
