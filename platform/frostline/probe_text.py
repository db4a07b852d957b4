"""What probes found of candidate backbones, as text: a table each, then what follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from frostline.candidates import (
    Candidate,
    Place,
    Probed,
    advice,
    best_place,
    between_methods,
    distance,
    rank_correlations,
    ranked,
    verdict,
)
from frostline.text import count, duration, plain, print_whole

SHORT = {"knn": "kNN", "mean": "mean", "lda": "LDA", "ridge": "ridge"}
STAGE_WIDTH = 14


def render_probed(probed: Probed, console: Console) -> None:
    """Print it; 100 columns suffice."""
    for candidate in probed.candidates:
        print_whole(plain(candidate.label, "bold"), console)
        for line in _about(candidate, probed):
            print_whole(plain(line), console)
        console.print()
        print_whole(_table(candidate, probed), console)
        print_whole(_facts(advice(candidate, probed)), console)
        console.print()
    print_whole(_facts(verdict(probed)), console)


OF = {"classification": " of {:,} classes", "multilabel": " with any of {:,} labels", "regression": ""}


def to_json(probed: Probed) -> dict[str, Any]:
    """It as JSON values, with what was decided."""
    found = asdict(probed)
    for head in (head for each in found["candidates"] for place in each["places"] for head in place["heads"]):
        del head["losses"]
    for each, raw in zip(probed.candidates, found["candidates"], strict=True):
        best, far = best_place(each, probed.mode), distance(each, probed.metric, probed.mode)
        raw["best"] = {"cut": best[0].cut, "method": best[1].method} if best else None
        raw["distance"] = dict(zip(("word", "drop", "ratio"), far, strict=True)) if far else None
        raw["tau_with_val"] = rank_correlations(each.places, probed.mode)
        raw["tau_between_methods"] = between_methods(each.places, probed.mode)
    return found | {"ranked": [candidate.label for candidate, _, _ in ranked(probed)]}


def _about(candidate: Candidate, probed: Probed) -> Iterator[str]:
    end = candidate.places[-1]
    yield (
        f"weights {candidate.weights} ({candidate.weights_hash}), {count(end.parameters)} parameters, "
        + (f"{candidate.size} x {candidate.size} pixels" if probed.inputs == "images" else f"{candidate.size} tokens")
    )
    yield (
        f"{probed.n_train:,} train and {probed.n_val:,} val {probed.inputs}{OF[probed.task].format(probed.classes)}; "
        f"{candidate.images_passed:,} {probed.inputs} passed it now; {duration(candidate.seconds)}"
    )


def _table(candidate: Candidate, probed: Probed) -> Table:
    """A line a cut, and one of rank correlations; a star at the best of each column."""
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold")
    inner = f"{probed.folds}-fold" if probed.folds else ""
    methods = [head.method for head in candidate.places[0].heads]
    table.add_column("\ncut", justify="right")
    table.add_column("\n  after stage", justify="left", overflow="fold", max_width=STAGE_WIDTH)
    for name, width in (("\nparams", 7), ("\ndim", 5)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    shown: list[tuple[str, Sequence[float | None], bool]] = []
    for over, score in ((inner, "inner"), ("val", "val")):
        for number, method in enumerate(methods):
            values = [getattr(place.heads[number], score) for place in candidate.places]
            shown.append((f"{over}\n{SHORT[method]}", values, probed.mode == "max"))
    shown.append(("\nLogME", [place.logme for place in candidate.places], True))
    shown.append(("\nH-sc.", [place.h_score for place in candidate.places], True))
    if not probed.folds:
        del shown[: len(methods)]
    for name, _, _ in shown:
        table.add_column(name, justify="right", no_wrap=True, min_width=8 if "LogME" in name else 7)
    columns = [_starred(values, more) for _, values, more in shown]
    for place, *cells in zip(candidate.places, *columns, strict=True):
        table.add_row(*map(plain, (place.cut, f"  {place.stage}", *_sizes(place), *cells)))
    taus = rank_correlations(candidate.places, probed.mode)
    if any(tau is not None for tau in taus.values()):
        cells = [*(taus[method] for method in methods if probed.folds), *(None for _ in methods)]
        cells += [taus["logme"], taus["h_score"]]
        sizes = [taus["parameters"], taus["features"]]
        table.add_row(*map(plain, ("", "  tau with val", *map(_tau, sizes), *map(_tau, cells))))
    return table


def _facts(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(plain(name), plain(text))
    return table


def _sizes(place: Place) -> tuple[str, str]:
    return f"{count(place.parameters)} ", f"{count(place.features)} "


def _tau(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} "


def _starred(values: Sequence[float | None], more: bool) -> list[str]:
    """Numbers with a star at the best ones, as many characters wide without."""
    known = [value for value in values if value is not None]
    best = (max if more else min)(known, default=None)
    digits = [3 if value is None or abs(value) < 100 else 1 for value in values]
    return [
        "" if value is None else f"{value:.{places}f}{'*' if value == best else ' '}"
        for value, places in zip(values, digits, strict=True)
    ]
