"""The page's parts, and its colours."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import frostline.page
from frostline.compare_text import Grid
from frostline.page import ROWS, table, text

CSS = Path(frostline.page.__file__).with_name("report.css").read_text()
LIGHT, DARK = (dict(re.findall(r"(--[\w-]+): (#\w{6});", CSS.split("}")[part])) for part in (0, 1))
BLIND = {
    "none": np.eye(3),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}
"""What colours become in linear RGB, by Machado et al. (2009) at full severity."""


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's, of two colours."""
    dark, light = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB, white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(light, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out(theme: dict[str, str]) -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for marks that mean something."""
    for ink, ground in itertools.product(("--ink", "--soft", "--accent"), ("--paper", "--ground")):
        assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
    assert contrast(theme["--warn"], theme["--warn-tint"]) >= 4.5
    for mark in (*(f"--arm-{number}" for number in range(8)), "--ramp-6"):
        assert contrast(theme[mark], theme["--paper"]) >= 3, mark


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", BLIND)
def test_colours_of_arms_are_told_apart(theme: dict[str, str], kind: str) -> None:
    seen = [lab(BLIND[kind] @ linear(theme[f"--arm-{number}"])) for number in range(8)]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 20


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_steps_of_the_ramp_rise_in_lightness(theme: dict[str, str]) -> None:
    lightness = [lab(linear(theme[f"--ramp-{number}"]))[0] for number in range(7)]
    steps = np.diff(lightness)
    assert (np.sign(steps) == np.sign(steps[0])).all()
    assert np.abs(steps).min() >= 5


def test_text_is_text() -> None:
    assert text("<b>\"'&\x1b\u202e") == "&lt;b&gt;&quot;&#x27;&amp;\ufffd\ufffd"


def test_a_long_table_is_cut_and_says_so() -> None:
    page = table(Grid("t", [{"n": str(number)} for number in range(ROWS + 50)]))
    assert page.count("<tr>") == ROWS + 1
    assert f"the first {ROWS} of {ROWS + 50} rows" in page
    assert "nothing" in table(Grid("t", []))
