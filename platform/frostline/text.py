"""Numbers, names and tables as text for a terminal."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from frostline.credentials import censored


def short(value: float | None) -> str:
    """`3e-4`, `3.2e-4`."""
    if value is None:
        return ""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def count(value: int | None) -> str:
    """`5210`, `12.8k`, `3.4M`, `340M`."""
    if value is None or value < 10_000:
        return "" if value is None else str(value)
    scaled, unit = (value / 1e6, "M") if value >= 1e6 else (value / 1e3, "k")
    return f"{scaled:.{int(scaled < 100)}f}{unit}"


def decimals(value: float | None) -> str:
    """A score: `0.9512`."""
    return "" if value is None else f"{value:.4f}"


def brief(value: Any) -> str:
    """A searched value: `8.1e-3`, `0.75`, `64`, `batch`."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return short(value) if 0 < abs(value) < 0.1 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`2 h 3 min`, `3 min 42 s`, `4.2 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def plain(value: Any, style: str = "") -> Text:
    """A value as text that neither markup nor terminal control codes can come out of."""
    text = "" if value is None else str(value)
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text), style)


def print_whole(renderable: RenderableType, console: Console) -> None:
    """Print a table or text in at least 100 columns, however narrow the console is (80, where a pipe has no width)."""
    lines = console.render_lines(renderable, console.options.update_width(max(console.width, 100)), pad=False)
    console.print(Segments([part for line in lines for part in (*line, Segment.line())]), crop=False, end="")


def render_table(table: pa.Table, console: Console) -> None:
    """Print any table."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for field in table.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        shown.add_column(plain(field.name), justify="right" if numeric else "left", overflow="fold")
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        shown.add_row(*(plain(f"{value:.6g}" if isinstance(value, float) else value) for value in row))
    console.print(shown) if console.is_terminal else print_whole(shown, console)
    console.print(f"{table.num_rows} row{'s' * (table.num_rows != 1)}")


def complain(text: str) -> None:
    """Print to stderr, without what a file's name may do to a terminal, and without credentials."""
    console = Console(stderr=True, highlight=False)
    for line in censored(text).split("\n"):
        console.print(plain(line), soft_wrap=True)
