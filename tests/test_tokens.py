"""Tokenising: the library's own ids, cut and padded, special words being text; tokenizers that cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.files import DataError
from frostline.samples import BadSample
from frostline.testing import text_encoder
from frostline.tokens import (
    Tokenizer,
    key_of_rows,
    load_tokenizer,
    parse_tokenizer,
    raw_of,
    texts_of,
    to_ids,
    tokenizer_files,
)

PAD, UNK, CLS, SEP = range(4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(text_encoder(tmp_path_factory.mktemp("toy") / "encoder"))


def test_a_text_is_its_ids_between_special_ones_padded(toy: Tokenizer) -> None:
    row = to_ids(toy, 8, pair=False)(b"the old ship")
    known = json.loads(toy.text)["model"]["vocab"]
    assert row.dtype == np.int32
    assert row[:, 0].tolist() == [CLS, known["the"], known["old"], known["ship"], SEP, PAD, PAD, PAD]
    assert not row[:, 1].any()


def test_a_long_text_is_cut_and_keeps_its_end_mark(toy: Tokenizer) -> None:
    row = to_ids(toy, 8, pair=False)(b"the " * 100)
    assert (row[0, 0], row[-1, 0]) == (CLS, SEP)


def test_of_a_pair_the_second_text_has_another_type_and_the_longer_one_is_cut(toy: Tokenizer) -> None:
    row = to_ids(toy, 10, pair=True)(raw_of([b"the old ship", b"salt"]))
    assert row[:, 1].tolist() == [0] * 5 + [1, 1, 0, 0, 0]
    row = to_ids(toy, 10, pair=True)(raw_of([b"ship", b"salt " * 50]))
    assert (row[:, 0] == SEP).sum() == 2
    assert row[1, 0] == json.loads(toy.text)["model"]["vocab"]["ship"]


def test_words_that_look_like_special_tokens_are_text(toy: Tokenizer) -> None:
    row = to_ids(toy, 16, pair=False)(b"[PAD] ship [SEP] [CLS]")[:, 0].tolist()
    end = row.index(PAD)
    assert (row[0], row[end - 1]) == (CLS, SEP)
    assert not {PAD, CLS, SEP} & {*row[1 : end - 1]}


@pytest.mark.parametrize(
    ("raw", "pair", "said"),
    [
        (b"", False, "empty: no text"),
        (b" \n\t", False, "empty: no text"),
        (b"caf\xe9", False, "not UTF-8: "),
        (raw_of([b"a", b" "]), True, "empty: no text in one of the pair"),
        (raw_of([b"a", b"caf\xe9"]), True, "not UTF-8: "),
    ],
)
def test_what_is_no_text_is_a_bad_sample(toy: Tokenizer, raw: bytes, pair: bool, said: str) -> None:
    with pytest.raises(BadSample, match=said):
        to_ids(toy, 8, pair=pair)(raw)


@given(first=st.text(min_size=1), second=st.text(min_size=1))
def test_raw_content_is_what_it_was_made_of_and_different_for_different_pairs(first: str, second: str) -> None:
    pair = [first.encode("utf-8", "replace"), second.encode("utf-8", "replace")]
    if all(each.decode().strip() for each in pair):
        assert [text.encode() for text in texts_of(raw_of(pair), pair=True)] == pair
        assert raw_of(pair) != raw_of([pair[0] + pair[1], b""])
        assert raw_of(pair[:1]) == pair[0]


def test_the_key_covers_tokenizer_size_and_pairs(toy: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cased = parse_tokenizer("cased", toy.text.replace('"ship"', '"Ship"'), "[PAD]")
    other = parse_tokenizer("padded", toy.text, "[UNK]")
    keys = [key_of_rows(toy, 8, pair=False), key_of_rows(toy, 9, pair=False), key_of_rows(toy, 8, pair=True)]
    keys += [key_of_rows(cased, 8, pair=False), key_of_rows(other, 8, pair=False)]
    monkeypatch.setattr("tokenizers.__version__", "0")
    keys.append(key_of_rows(toy, 8, pair=False))
    assert len({json.dumps(key) for key in keys}) == 6


def test_padding_is_what_the_settings_say(tmp_path: Path, toy: Tokenizer) -> None:
    name = text_encoder(tmp_path / "encoder")
    (tmp_path / "encoder" / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[UNK]"}}))
    found = load_tokenizer(name)
    assert (found.pad, found.pad_id, found.vocabulary) == ("[UNK]", UNK, toy.vocabulary)
    assert sorted(tokenizer_files(name)) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_tokenizer_that_cannot_be_used_says_why(tmp_path: Path, toy: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"the tokenizer.json of x cannot be read: "):
        parse_tokenizer("x", "{}", None)
    with pytest.raises(DataError, match="has no token for padding: say which in its tokenizer_config.json"):
        parse_tokenizer("x", toy.text, "<none>")
    text_encoder(tmp_path / "encoder")
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer.json and no vocabulary: name an encoder that has one"):
        load_tokenizer(f"text/{tmp_path / 'encoder'}")


def test_a_vocabulary_makes_a_tokenizer(tmp_path: Path) -> None:
    name = text_encoder(tmp_path / "encoder")
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    (tmp_path / "encoder" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "ship", "##s"])
    )
    row = to_ids(load_tokenizer(name), 8, pair=False)(b"The ships")
    assert row[:, 0].tolist() == [CLS, 4, 5, 6, SEP, PAD, PAD, PAD]
