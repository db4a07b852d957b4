from typing import Any

import pytest

from frostline.labels import label_text, labels_in, not_a_number
from frostline.spec import Data


@pytest.mark.parametrize(
    ("task", "value", "text"),
    [
        ("classification", "cat", "cat"),
        ("classification", 7, "7"),
        ("classification", None, None),
        ("multilabel", ["b", "a"], "b;a"),
        ("multilabel", [3, "x"], "3;x"),
        ("multilabel", [], ""),
        ("multilabel", "a; b", "a; b"),
        ("multilabel", None, None),
        ("regression", 1.5, "1.5"),
        ("regression", 3, "3"),
        ("regression", "-2e3", "-2e3"),
    ],
)
def test_a_cell_becomes_text(task: str, value: Any, text: str | None) -> None:
    assert label_text(value, Data.model_validate({"path": "p", "task": task})) == text


@pytest.mark.parametrize(
    ("task", "value", "said"),
    [
        ("classification", 1.5, "holds 1.5; integers or strings are needed"),
        ("classification", True, "holds true; integers or strings"),
        ("classification", ["a"], "there is multilabel, too"),
        ("multilabel", ["a;b"], "data.label_separator = ';'"),
        ("multilabel", [""], "which is empty"),
        ("multilabel", [1.5], "lists of integers or strings"),
        ("multilabel", 2.5, "lists of integers or strings"),
        ("regression", [1.0], "numbers are needed"),
    ],
)
def test_a_cell_that_is_no_label_is_told(task: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        label_text(value, Data.model_validate({"path": "p", "task": task}))


def test_names_are_taken_apart_at_the_separator() -> None:
    assert labels_in("a; b ;;c", ";") == ["a", "b", "c"]
    assert labels_in("", ";") == []
    assert labels_in("haze primary", " ") == ["haze", "primary"]


def test_numbers_are_finite() -> None:
    assert not_a_number("1e3") is None
    assert not_a_number("tall") == "label: 'tall' is no number"
    assert not_a_number("nan") == "label: 'nan' is not finite"
