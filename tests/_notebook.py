"""Runs a notebook's code cells, one after the other, and keeps what they print and show as its outputs:
`python tests/_notebook.py docs/tour.ipynb` writes them into the file."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> None:
    """Replace the outputs of its code cells, in place, by those of running them in this process. Raises what they raise."""
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        source = "".join(cell["source"])
        *body, last = ast.parse(source).body
        printed, shown = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            silent = not isinstance(last, ast.Expr) or source.rstrip().endswith(";")
            exec(compile(ast.Module([*body, last] if silent else body, []), f"cell {number}", "exec"), space)
            if isinstance(last, ast.Expr) and not silent:
                shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space)
        stream = {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        cell["execution_count"] = number
        cell["outputs"] = [stream] * bool(printed.getvalue())
        cell["outputs"] += [result | {"data": shapes(shown)}] if shown is not None else []


def shapes(value: Any) -> dict[str, str]:
    """A value as notebooks show it: as a picture where it is one, else as text."""
    png = getattr(value, "_repr_png_", None)
    if bundle := getattr(value, "_repr_mimebundle_", None):
        png = bundle()[0]["image/png"]
    elif png:
        png = png()
    return {"image/png": base64.b64encode(png).decode()} if png else {"text/plain": repr(value)}


def write(notebook: dict[str, Any], path: Path) -> None:
    """As Jupyter writes it."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    file = Path(sys.argv[1]).absolute()
    read = json.loads(file.read_text(encoding="utf-8"))
    run(read)
    write(read, Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else file)
