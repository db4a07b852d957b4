"""The report as HTML: every text escaped, every chart with its table, styles and scripts inside, and nothing fetched."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import altair
import vl_convert

from frostline.cache import entry, publish
from frostline.compare_text import Grid
from frostline.encodings import CONFIG, Chart
from frostline.files import DataError
from frostline.text import plain

ROWS = 200
"""Of a table, at most."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading, which the list of contents leads to."""

    id: str
    title: str
    html: str
    charts: Sequence[Chart] = ()


def text(value: Any) -> str:
    """A value as HTML text or attribute, which no markup, quote or control code can come out of."""
    return html.escape(plain(value).plain)


def paragraph(said: str, kind: str = "") -> str:
    """A paragraph, of a class of styles."""
    return f"<p{f' class={kind}' * bool(kind)}>{text(said)}</p>"


def listing(lines: Sequence[str], kind: str = "") -> str:
    """A list; nothing where there is nothing."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul{f' class={kind}' * bool(kind)}>{items}</ul>" if lines else ""


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values, as a description list."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="facts">{rows}</dl>'


def code(lines: Sequence[str], name: str) -> str:
    """Lines to be copied."""
    shown = "\n".join(text(line) for line in lines)
    return f'<pre tabindex="0" role="region" aria-label="{text(name)}"><code>{shown}</code></pre>'


def folded(summary: str, content: str) -> str:
    """What opens when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def table(grid: Grid, kind: str = "") -> str:
    """A table, its lines below it; of a long one its first rows."""
    if not grid.rows:
        return paragraph(f"{grid.title}: nothing")
    names = list(grid.rows[0])
    side = {name: "" if grid.left(name) else ' class="number"' for name in names}
    head = "".join(f'<th scope="col"{side[name]}>{text(name)}</th>' for name in names)
    body = "".join(
        f"<tr>{''.join(_cell(row[name], name == names[0], side[name]) for name in names)}</tr>"
        for row in grid.rows[:ROWS]
    )
    more = [f"the first {ROWS} of {len(grid.rows):,} rows"] if len(grid.rows) > ROWS else []
    below = listing([*more, *grid.below], "below")
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{text(grid.title)}"><table>'
        f"<caption>{text(grid.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def _cell(value: str, first: bool, side: str) -> str:
    return f'<th scope="row">{text(value)}</th>' if first else f"<td{side}>{text(value)}</td>"


def figure(chart: Chart, title: str, caption: str, *grids: Grid, beside: str = "", kind: str = "") -> str:
    """A chart under its title, then what it does not say by itself, what stands beside it, and its numbers as tables."""
    name = text(chart.name)
    tables = "".join(folded(f"Table: {grid.title}", table(grid)) for grid in grids)
    return (
        f'<figure id="figure-{name}" class="{kind}" aria-labelledby="title-{name}"><h3 id="title-{name}">{text(title)}</h3>'
        f'<div class="scroll plot-frame" tabindex="0" role="group" aria-label="chart: {text(title)}">'
        f'<div class="plot" id="chart-{name}" data-chart="{name}" style="min-height:{chart.height}px"></div></div>'
        f"<figcaption>{text(caption)}</figcaption>{beside}{tables}</figure>"
    )


def document(title: str, head: str, sections: Sequence[Section], more: Mapping[str, Any]) -> str:
    """The page: `head` stands above the contents; `more` is what its script knows beside the charts.

    Its policy lets run the two scripts in it and nothing else, and lets nothing be fetched, whatever the texts in it hold.
    """
    known = {"config": CONFIG, "charts": {chart.name: chart.spec for section in sections for chart in section.charts}}
    data = _inert(json.dumps(_printable({**known, **more}), allow_nan=False, separators=(",", ":"), ensure_ascii=False))
    scripts = [_bundle(), _asset("report.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts
    )
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
    links = "".join(f'<li><a href="#{each.id}">{text(each.title)}</a></li>' for each in sections)
    body = "".join(
        f'<section id="{each.id}" tabindex="-1" aria-labelledby="{each.id}-title"><h2 id="{each.id}-title">{text(each.title)}</h2>{each.html}</section>'
        for each in sections
    )
    tags = "".join(f"<script>{each}</script>" for each in scripts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_asset("report.css")}</style></head>\n<body>\n'
        f'<a class="skip" href="#{sections[0].id}">Skip to the content</a>\n'
        f'<header>{head}<nav aria-label="Contents"><ul>{links}</ul></nav></header>\n'
        "<noscript><p>The charts need JavaScript; the tables under each hold the same numbers.</p></noscript>\n"
        f'<main>{body}</main>\n<script type="application/json" id="data">{data}</script>\n{tags}\n</body></html>\n'
    )


def _inert(data: str) -> str:
    """JSON in which no tag can begin or end."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _printable(value: Any) -> Any:
    """The same JSON value, its texts without control codes."""
    if isinstance(value, str):
        return plain(value).plain
    if isinstance(value, Mapping):
        return {plain(key).plain: _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list | tuple) else value


@functools.cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that Altair writes for. To put it together takes more than a second,
    so that this machine keeps it, where it can keep anything."""
    version = altair.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    make = functools.partial(vl_convert.javascript_bundle, "window.vegaEmbed = vegaEmbed;", vl_version=version)
    try:
        with entry("vega", f"{version}-{metadata.version('vl-convert-python')}") as (folder, lock), lock():
            if not (path := folder / "bundle.js").is_file():
                publish(path, lambda file: file.write(make().encode()))
            script = path.read_text(encoding="utf-8")
    except DataError:
        script = make()
    assert "</script" not in script.lower()
    assert "<!--" not in script
    return script
