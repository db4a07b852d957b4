"""Images or texts: the backbone says it, and keys of the other are refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frostline.jobfile import JobError, parse_job
from frostline.modality import modality_mistakes, reads_text
from frostline.prepare import prepare
from frostline.testing import text_job, toy_job

TEXT, IMAGE = "text/some/folder", "timm/resnet18"


def mistakes(backbone: str, /, **sections: Any) -> list[str]:
    given = {"name": "x", "data": {"path": "x"}, "backbone": {"name": backbone}}
    with pytest.raises(JobError) as caught:
        parse_job({**given, **{name: {**given.get(name, {}), **keys} for name, keys in sections.items()}})
    return str(caught.value).split("\n  ")[1:]


def test_names_of_text_encoders() -> None:
    assert [reads_text(name) for name in (TEXT, "all-minilm-l6-v2", IMAGE, "efficientnet-lite0", "python:a:b")] == [
        *(True, True, False, False, False)
    ]


@pytest.mark.parametrize(
    ("backbone", "section", "key", "value"),
    [
        (TEXT, "data", "image_column", "photo"),
        (TEXT, "data", "image_size", 64),
        (TEXT, "data", "fit", "squash"),
        (TEXT, "data", "max_megapixels", 3.0),
        (TEXT, "augment", "views", 2),
        (TEXT, "augment", "views", "live"),
        (IMAGE, "data", "text_column", "body"),
        (IMAGE, "data", "pair_column", "body"),
        (IMAGE, "data", "max_tokens", 64),
        (IMAGE, "data", "tokenizer", "text/x"),
        (IMAGE, "backbone", "pool", "cls"),
    ],
)
def test_a_key_of_the_other_modality_is_refused(backbone: str, section: str, key: str, value: Any) -> None:
    (said,) = mistakes(backbone, **{section: {key: value}})
    assert said.startswith(f"{section}.{key} = {value!r}: backbone.name = {backbone!r} takes ")
    assert "leave" in said


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes(TEXT, data={"fit": "squash", "image_size": 64}, augment={"views": 1}, train={"lr": 0})) == 1
    assert len(mistakes(TEXT, data={"fit": "squash", "image_size": 64}, augment={"views": 1})) == 3


def test_a_key_at_its_default_says_nothing() -> None:
    parse_job({"name": "x", "data": {"path": "x", "fit": "crop", "image_column": "image"}, "backbone": {"name": TEXT}})


def test_a_prepared_text_job_says_size_and_tokenizer_and_is_one_still(tmp_path: Path) -> None:
    job = text_job(tmp_path / "study", ["data.max_tokens=24"])
    ready = prepare(job)
    assert (ready.job.data.max_tokens, ready.job.data.image_size, ready.job.data.size) == (24, None, 24)
    assert ready.job.data.tokenizer == job.backbone.name
    assert not [*modality_mistakes(ready.job)]
    assert ready.facts["max_tokens"] == 24
    longest = job.model_copy(update={"data": job.data.model_copy(update={"max_tokens": None})})
    assert prepare(longest).job.data.max_tokens == 64


def test_what_a_backbone_cannot_take_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.max_tokens = 65: text/.* takes at most 64 tokens"):
        prepare(text_job(tmp_path / "study", ["data.max_tokens=65"]))
    with pytest.raises(ValueError, match="of these, such as backbone.name = 'all-minilm-l6-v2'"):
        prepare(toy_job(tmp_path / "study", [f"data.path={tmp_path / 'texts.jsonl'}"]))
    texts, images = text_job(tmp_path / "study"), toy_job(tmp_path / "study")
    with pytest.raises(ValueError, match=r"data.image_size = 16: .* takes texts"):
        prepare(images.model_copy(update={"backbone": texts.backbone}))
