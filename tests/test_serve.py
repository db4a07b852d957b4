"""Bundles behind HTTP: their own numbers, whoever asks beside whom; nothing that a client sends ends a replica or shows a traceback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http.client
import io
import json
import os
import re
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jsonschema import Draft202012Validator
from PIL import Image
from starlette.testclient import TestClient

import frostline
from _head import ray_head
from _texts import text_bundle
from _tls import certified
from frostline.batches import Batches
from frostline.bundle import load_bundle
from frostline.cli import main
from frostline.intake import Limits
from frostline.serve import (
    Asks,
    Replica,
    ServeError,
    ask_all,
    check_tls,
    given_to,
    grouped,
    is_loopback,
    listen,
    named,
    read_token,
)
from frostline.testing import text_rows, toy_job
from frostline.trunks import trunk_of
from frostline.web import LOOPBACK, OPEN, Door, Served, app_of, predictions

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

TOKEN = "canary-5f0e1c2d3b4a"
TOLERANCE = 1e-5
"""Between an image's logits alone and in a batch, in float32."""
KINDS = {
    "linear": {"freeze.depth": [3]},
    "wide": {"freeze.depth": [3], "head.hidden": 16},
    "tuned": {"freeze.depth": [1]},
}


def trained(root: Path, name: str, space: dict[str, Any]) -> Path:
    """A bundle of a toy study."""
    arms = {"freeze": {"strategy": "freeze_depth", "space": {"train.lr": 1e-3, "train.head_lr": 1e-2, **space}}}
    job = toy_job(root / name, ["search.trials=1", "confirm.seeds=1"], arms=arms)
    return frostline.search(job, inline=True) / "bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two that differ in their heads, and one whose backbone has been tuned."""
    root = tmp_path_factory.mktemp("serve")
    return {name: trained(root, name, space) for name, space in KINDS.items()}


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """An image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A small file of many black pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * ((width // 8 + 2) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def in_json(*images: bytes) -> bytes:
    """One image, or a list of several, as JSON."""
    items = [{"image": base64.b64encode(each).decode()} for each in images]
    return json.dumps(items[0] if len(items) == 1 else items).encode()


class InProcess:
    """A replica's code as a handle of it, without Ray."""

    def __init__(self, bundles: dict[str, Path]) -> None:
        self.replica = Replica(lambda: {name: load_bundle(path) for name, path in bundles.items()})
        self.asked: list[tuple[int, list[str]]] = []
        self.predict = self

    async def remote(self, images: list[bytes], names: list[str]) -> Any:
        """`predict`."""
        self.asked.append((len(images), names))
        return await self.replica.predict(images, names)


def asks_of(bundles: dict[str, Path]) -> list[Asks]:
    """Their trunks, in this process."""
    groups = grouped({name: load_bundle(path) for name, path in bundles.items()})
    return [Asks.of(names, InProcess({name: bundles[name] for name in names}), 1, 64) for names in groups]


SMALL = Limits(body_bytes=200_000, samples=8, characters=1000)


def client_of(
    bundles: dict[str, Path], door: Door | None = None, limits: Limits = SMALL, **replaced: Any
) -> TestClient:
    """A client of the routes, whose replicas are in this process."""
    loaded = {name: load_bundle(path) for name, path in bundles.items()}
    served = {name: Served(bundle.classes, given_to(bundle)) for name, bundle in loaded.items()}

    async def ready() -> bool:
        return True

    ask = replaced.get("ask", partial(ask_all, asks_of(bundles)))
    app = app_of(served, ask, replaced.get("ready", ready), door=door or Door(), limits=limits)
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(bundles: dict[str, Path]) -> TestClient:
    return client_of(bundles)


def shares(prediction: dict[str, Any], classes: tuple[str, ...]) -> np.ndarray:
    """(C,) probabilities in the order of the bundle's classes."""
    told = {each["label"]: each["probability"] for each in prediction["top"]}
    return np.array([told[name] for name in classes], np.float32)


def test_bundles_that_differ_in_their_heads_only_share_a_trunk(bundles: dict[str, Path]) -> None:
    loaded = {name: load_bundle(path) for name, path in bundles.items()}
    assert grouped(loaded) == [["linear", "wide"], ["tuned"]]
    trunk = trunk_of({name: loaded[name] for name in ("linear", "wide")})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    both = trunk.logits(pixels, ("wide", "linear"))
    for name in ("linear", "wide"):
        np.testing.assert_array_equal(both[name], loaded[name].pass_through(pixels, fill=False)[0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["raw", "form", "json"])
def test_a_request_gets_the_bundles_own_probabilities_to_the_bit(
    client: TestClient, bundles: dict[str, Path], name: str, how: str
) -> None:
    bundle = load_bundle(bundles[name])
    images = [encoded(seed, "JPEG" if seed % 2 else "PNG") for seed in range(1 if how == "raw" else 5)]
    body: dict[str, Any] = {
        "raw": {"content": images[0], "headers": {"content-type": "image/png"}},
        "form": {"files": [("image", (f"{n}.png", each)) for n, each in enumerate(images)]},
        "json": {"content": in_json(*images), "headers": {"content-type": "application/json"}},
    }[how]
    answer = client.post(f"/{name}/predict?top_k=10", **body)
    assert answer.status_code == 200, answer.text
    expected = bundle.predict(images)
    found = answer.json()["predictions"]
    assert [each["label"] for each in found] == expected.labels
    np.testing.assert_array_equal([shares(each, bundle.classes) for each in found], expected.probabilities)
    everyone = client.post("/predict?top_k=10", **body).json()["bundles"]
    assert everyone[name] == found
    assert list(everyone) == list(KINDS)


def test_a_request_to_all_bundles_asks_each_trunk_once(bundles: dict[str, Path]) -> None:
    asks = asks_of(bundles)
    asyncio.run(ask_all(asks, [encoded(0)], tuple(bundles)))
    assert [each.handle.asked for each in asks] == [[(1, ["linear", "wide"])], [(1, ["tuned"])]]


def test_requests_for_several_bundles_share_batches_and_a_bad_image_is_its_own_requests(
    bundles: dict[str, Path],
) -> None:
    asks = asks_of({name: bundles[name] for name in ("linear", "wide")})

    async def together() -> list[Any]:
        names = [("linear",), ("wide",), ("wide", "linear"), ("linear",), ("wide",)]
        bodies = [[encoded(0)], [encoded(1), b"x"], [encoded(2)], [encoded(3), encoded(0)], [b""]]
        return await asyncio.gather(*(ask_all(asks, *each) for each in zip(bodies, names, strict=True)))

    first, bad, both, two, empty = asyncio.run(together())
    assert asks[0].handle.asked == [(1, ["linear"]), (2, ["wide"]), (4, ["linear", "wide"])]
    assert (list(bad[0]), list(empty[0])) == ([1], [0])
    assert list(both[1]) == ["wide", "linear"]
    for name, seeds, (why, logits) in (("linear", [0], first), ("wide", [2], both), ("linear", [3, 0], two)):
        assert not why
        expected = load_bundle(bundles[name]).predict([encoded(seed) for seed in seeds], batch_size=1)
        np.testing.assert_allclose(logits[name], expected.logits, atol=TOLERANCE)


def test_top_k_is_how_many_classes_are_told(client: TestClient) -> None:
    def told(query: str) -> Any:
        return client.post(f"/linear/predict{query}", content=encoded(0), headers={"content-type": "image/png"})

    assert len(told("").json()["predictions"][0]["top"]) == 5
    (one,) = told("?top_k=1").json()["predictions"]
    assert one["top"][0]["label"] == one["label"]
    for query in ("?top_k=0", "?top_k=11", "?top_k=x", "?top_k=1&top_k=2", "?top_k=", "?topk=1", "?top_k=%F3"):
        assert told(query).status_code == 400, query


def test_predictions_are_in_the_order_of_logits() -> None:
    (told,) = predictions(np.array([[0.0, 2.0, 1.0]], np.float32), ("a", "b", "c"), 2)
    assert told["label"] == "b"
    assert [each["label"] for each in told["top"]] == ["b", "c"]


JSON = "application/json"
CORPUS: dict[str, tuple[bytes, str, int]] = {
    "empty": (b"", "image/png", 400),
    "empty json": (b"", JSON, 400),
    "truncated": (encoded(0)[:-40], "image/png", 422),
    "truncated at its head": (encoded(0)[:20], "image/png", 422),
    "no image": (b"\0" * 1000, "image/jpeg", 422),
    "bomb": (flat_png(9000, 9000), "image/png", 422),
    "10,000 px wide": (flat_png(10_000, 2), "image/png", 200),
    "1 px": (flat_png(1, 1), "image/png", 200),
    "wrong type": (b"cats", "text/plain", 415),
    "no type": (encoded(0), "", 415),
    "svg": (b"<svg/>", "image/svg+xml", 415),
    "huge": (b"\0" * 200_001, "image/png", 413),
    "deep json": (b"[" * 100_000, JSON, 400),
    "deep closed json": (b"[" * 50_000 + b"]" * 50_000, JSON, 400),
    "deep object": (b'{"image":' * 20_000, JSON, 400),
    "not utf-8": (b"\xff\xfe\x00", JSON, 400),
    "a number": (b"7", JSON, 422),
    "a large number": (b"9" * 10_000, JSON, 400),
    "nan": (b"NaN", JSON, 422),
    "empty list": (b"[]", JSON, 422),
    "null": (b'{"image": null}', JSON, 422),
    "a url": (b'{"image": "http://169.254.169.254/latest"}', JSON, 422),
    "another key": (b'{"image": "aGk=", "path": "/etc/passwd"}', JSON, 422),
    "a path": (b'{"image": "/etc/passwd"}', JSON, 422),
    "no base64": ('{"image": "\u00e9"}'.encode(), JSON, 422),
    "empty base64": (b'{"image": ""}', JSON, 422),
    "many": (in_json(*[encoded(0)] * 9), JSON, 422),
    "one bad of two": (in_json(encoded(0), b"x"), JSON, 422),
    "no form": (b"nothing", "multipart/form-data; boundary=x", 400),
    "no boundary": (b"nothing", "multipart/form-data", 400),
    "a form without files": (b"--x--\r\n", "multipart/form-data; boundary=x", 422),
    "another field": (
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="../../x"\r\n\r\nhi\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        422,
    ),
    "a text field": (
        b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nhi\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        422,
    ),
}


def held_as_error(status: int, text: str) -> None:
    """An answer that refuses says what, why and what to do, and no more."""
    error = json.loads(text)["error"]
    assert error["status"] == status
    assert all(isinstance(error[key], str) and error[key] for key in ("what", "why", "remedy"))
    assert "Traceback" not in text
    assert ".py" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("name", CORPUS)
def test_what_cannot_be_used_is_refused_with_a_reason(client: TestClient, name: str) -> None:
    body, kind, status = CORPUS[name]
    answer = client.post("/linear/predict", content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status, answer.text
    if status != 200:
        held_as_error(status, answer.text)
    after = client.post("/linear/predict", content=encoded(1), headers={"content-type": "image/png"})
    assert after.status_code == 200


def test_the_refusal_of_an_image_names_it(client: TestClient) -> None:
    answer = client.post("/linear/predict", content=in_json(encoded(0), b"x", b"y"), headers={"content-type": JSON})
    error = answer.json()["error"]
    assert error["what"] == "image 1 cannot be used"
    assert error["why"].endswith("; and 1 more")
    bomb = client.post("/linear/predict", content=flat_png(9000, 9000), headers={"content-type": "image/png"})
    assert bomb.json()["error"]["why"] == "too large: 9000 x 9000 pixels, allowed are 50,000,000 in all"


TEXT_KINDS = {"words": ({}, False), "wide": ({"head.hidden": 16}, False), "pairs": ({}, True)}


@pytest.fixture(scope="module")
def text_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of texts that differ in their heads, and one of pairs."""
    root = tmp_path_factory.mktemp("texts")
    return {
        name: text_bundle(root / name, {"strategy": "linear_probe", "space": space}, pair=pair)
        for name, (space, pair) in TEXT_KINDS.items()
    }


@pytest.fixture(scope="module")
def text_client(text_bundles: dict[str, Path]) -> TestClient:
    return client_of(text_bundles)


def in_texts(*texts: Any) -> bytes:
    """Texts, or pairs of them, as JSON."""
    return json.dumps({"texts": texts}).encode()


@pytest.mark.parametrize("name", TEXT_KINDS)
def test_texts_get_the_bundles_own_probabilities_to_the_bit(
    text_client: TestClient, text_bundles: dict[str, Path], name: str
) -> None:
    bundle = load_bundle(text_bundles[name])
    texts: list[Any] = [row["text"] for row in text_rows(2)] + ["caf\u00e9 [SEP] \U0001f6a2", "ship " * 100]
    if bundle.pair:
        texts = [*zip(texts, texts[::-1], strict=True)]
    answer = text_client.post(f"/{name}/predict", content=in_texts(*texts), headers={"content-type": JSON})
    assert answer.status_code == 200, answer.text
    expected, found = bundle.predict(texts), answer.json()["predictions"]
    assert [each["label"] for each in found] == expected.labels
    np.testing.assert_array_equal([shares(each, bundle.classes) for each in found], expected.probabilities)


def test_texts_share_trunks_and_batches_as_images_do(text_bundles: dict[str, Path]) -> None:
    asks = asks_of(text_bundles)
    assert [each.names for each in asks] == [("words", "wide"), ("pairs",)]

    async def together() -> list[Any]:
        bodies = [
            ([b"ship"], ("words",)),
            ([b"salt", b" "], ("wide",)),
            ([b"rose"], ("wide", "words")),
            ([b"\xff"], ("words",)),
        ]
        return await asyncio.gather(*(ask_all(asks, *each) for each in bodies))

    first, bad, both, broken = asyncio.run(together())
    assert asks[0].handle.asked == [(1, ["words"]), (2, ["wide"]), (2, ["wide", "words"])]
    assert bad == ({1: "empty: no text"}, {})
    assert broken[0][0].startswith("not UTF-8")
    for name, text, (why, logits) in (("words", "ship", first), ("wide", "rose", both)):
        assert not why
        np.testing.assert_allclose(logits[name], load_bundle(text_bundles[name]).predict([text]).logits, atol=TOLERANCE)


def test_all_bundles_are_asked_at_once_where_they_take_the_same(
    bundles: dict[str, Path], text_bundles: dict[str, Path]
) -> None:
    alike = client_of({name: text_bundles[name] for name in ("words", "wide")})
    ship = {"content": in_texts("ship"), "headers": {"content-type": JSON}}
    assert list(alike.post("/predict", **ship).json()["bundles"]) == ["words", "wide"]
    mixed = client_of({"images": bundles["linear"], "words": text_bundles["words"]})
    assert mixed.post("/predict", **ship).status_code == 404
    assert mixed.post("/words/predict", **ship).status_code == 200
    image = {"content": in_json(encoded(0)), "headers": {"content-type": JSON}}
    assert mixed.post("/images/predict", **image).status_code == 200
    assert mixed.post("/words/predict", **image).status_code == mixed.post("/images/predict", **ship).status_code == 422


TEXT_CORPUS: dict[str, tuple[str, bytes, str, int]] = {
    "empty": ("words", b"", JSON, 400),
    "an image": ("words", encoded(0), "image/png", 415),
    "plain text": ("words", b"a ship", "text/plain", 415),
    "a form": ("words", b"--x--\r\n", "multipart/form-data; boundary=x", 415),
    "no JSON": ("words", b"a ship", JSON, 400),
    "not UTF-8": ("words", b'{"texts": ["caf\xe9"]}', JSON, 400),
    "half a pair of surrogates": ("words", b'{"texts": ["\\ud800"]}', JSON, 422),
    "deep": ("words", b"[" * 100_000, JSON, 400),
    "a list": ("words", b'["a ship"]', JSON, 422),
    "a string": ("words", b'{"texts": "a ship"}', JSON, 422),
    "another key": ("words", b'{"texts": ["a ship"], "path": "/etc/passwd"}', JSON, 422),
    "no texts": ("words", b'{"texts": []}', JSON, 422),
    "a number": ("words", b'{"texts": [7]}', JSON, 422),
    "null": ("words", b'{"texts": [null]}', JSON, 422),
    "an empty text": ("words", in_texts("a ship", ""), JSON, 422),
    "blanks": ("words", in_texts(" \n\t"), JSON, 422),
    "a nul": ("words", in_texts("a \0 ship"), JSON, 200),
    "long": ("words", in_texts("a" * 1000), JSON, 200),
    "too long": ("words", in_texts("a" * 1001), JSON, 422),
    "many": ("words", in_texts(*["a"] * 9), JSON, 422),
    "huge": ("words", in_texts("a" * 200_000), JSON, 413),
    "a pair where a text is wanted": ("words", in_texts(["a ship", "salt"]), JSON, 422),
    "a text where a pair is wanted": ("pairs", in_texts("a ship"), JSON, 422),
    "two texts where pairs are wanted": ("pairs", in_texts("a ship", "salt"), JSON, 422),
    "one of a pair": ("pairs", in_texts(["a ship"]), JSON, 422),
    "three of a pair": ("pairs", in_texts(["a", "b", "c"]), JSON, 422),
    "an empty one of a pair": ("pairs", in_texts(["a ship", ""]), JSON, 422),
    "a number in a pair": ("pairs", in_texts(["a ship", 1]), JSON, 422),
    "too long in a pair": ("pairs", in_texts(["a", "b" * 1001]), JSON, 422),
}


@pytest.mark.parametrize("name", TEXT_CORPUS)
def test_texts_that_cannot_be_used_are_refused_with_a_reason(text_client: TestClient, name: str) -> None:
    bundle, body, kind, status = TEXT_CORPUS[name]
    answer = text_client.post(f"/{bundle}/predict", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    if status != 200:
        held_as_error(status, answer.text)
        assert "image" not in json.loads(answer.text)["error"]["remedy"]


def test_the_refusal_of_a_text_names_it(text_client: TestClient) -> None:
    def error(name: str, *texts: Any) -> list[str]:
        answer = text_client.post(f"/{name}/predict", content=in_texts(*texts), headers={"content-type": JSON})
        said = answer.json()["error"]
        return [said["what"], said["why"], said["remedy"]]

    assert error("words", "a", " ", "") == [
        "text 1 cannot be used",
        "empty: no text; and 1 more",
        'send {"texts": ["…", …]}',
    ]
    assert error("words", "a", ["a", "b"])[:2] == ["text 1 cannot be read", "it is not a string, as this bundle takes"]
    wanted = "it is not a list of 2 strings, as this bundle takes"
    assert error("pairs", "a") == ["pair 0 cannot be read", wanted, 'send {"texts": [["…", "…"], …]}']
    assert error("words", "a" * 1001)[1] == "it is too long: 1,001 characters, allowed are 1,000"


def test_openapi_says_what_each_bundle_takes(bundles: dict[str, Path], text_bundles: dict[str, Path]) -> None:
    described = client_of({"images": bundles["linear"], **text_bundles}).get("/openapi.json").json()
    assert "/predict" not in described["paths"]
    bodies = {
        name: described["paths"][f"/{name}/predict"]["post"]["requestBody"] for name in ("images", "words", "pairs")
    }
    assert {"image/png", "multipart/form-data", JSON} <= bodies["images"]["content"].keys()
    assert [*bodies["words"]["content"]] == [*bodies["pairs"]["content"]] == [JSON]
    schemas = {name: Draft202012Validator(each["content"][JSON]["schema"]) for name, each in bodies.items()}
    for case, (name, body, kind, status) in TEXT_CORPUS.items():
        if kind == JSON and status in (200, 422) and case != "half a pair of surrogates":
            assert schemas[name].is_valid(json.loads(body)) == (status == 200), case


def test_unknown_routes_and_methods(client: TestClient) -> None:
    for path in ("/nothing", "/linear", "/linear/", "/linear/predict/", "/-/routes", "/docs"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        held_as_error(404, answer.text)
    absent = client.post("/cats/predict", content=encoded(0), headers={"content-type": "image/png"})
    assert (absent.status_code, absent.json()["error"]["remedy"]) == (404, "there are linear, wide, tuned")
    for method, path in (("GET", "/linear/predict"), ("POST", "/healthz"), ("DELETE", "/"), ("PUT", "/predict")):
        answer = client.request(method, path)
        assert answer.status_code == 405, path
        assert answer.headers["allow"]
        held_as_error(405, answer.text)


def test_health_readiness_and_an_error_of_ours(bundles: dict[str, Path]) -> None:
    async def never() -> bool:
        return False

    async def broken(*_: Any) -> Any:
        raise ZeroDivisionError("secret/path.py")

    client = client_of({"linear": bundles["linear"]}, ready=never, ask=broken)
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").status_code == 503
    answer = client.post("/predict", content=encoded(0), headers={"content-type": "image/png"})
    assert answer.status_code == 500
    held_as_error(500, answer.text)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_without_the_token_nobody_gets_further_than_the_open_routes(bundles: dict[str, Path]) -> None:
    client = client_of({"linear": bundles["linear"]}, Door(TOKEN))
    routes = ["/", "/healthz", "/readyz", "/openapi.json", "/predict", "/linear/predict", "/nothing"]
    assert [path for path in routes if client.get(path).status_code != 401] == list(OPEN)
    for header in (
        "",
        "Bearer",
        f"Basic {TOKEN}",
        "Bearer canary",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer \xe9",
    ):
        answer = client.get("/openapi.json", headers={"authorization": header.encode("latin-1")})
        assert answer.status_code == 401, header
        assert answer.headers["www-authenticate"] == "Bearer"
        held_as_error(401, answer.text)
        assert TOKEN not in answer.text
    known = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/openapi.json", headers=known).json()["security"] == [{"token": []}]
    answer = client.post("/predict", content=encoded(0), headers=known | {"content-type": "image/png"})
    assert answer.status_code == 200
    assert TOKEN not in repr(Door(TOKEN))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "models.example.com"}, 200),
        ({"host": "evil.com"}, 403),
        ({"host": "127.0.0.1.evil.com"}, 403),
        ({"host": "evil.com:8000@127.0.0.1"}, 200),
        ({"host": "[::"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://models.example.com"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "http://evil.com"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
    ],
)
def test_foreign_hosts_and_origins_are_refused(bundles: dict[str, Path], headers: dict[str, str], status: int) -> None:
    door = Door(None, (*LOOPBACK, "models.example.com"), ("models.example.com",))
    answer = client_of({"linear": bundles["linear"]}, door).get("/healthz", headers=headers)
    assert answer.status_code == status
    if status != 200:
        held_as_error(status, answer.text)


def test_too_many_at_a_time_too_slow_and_too_late(bundles: dict[str, Path]) -> None:
    one = {"linear": bundles["linear"]}
    image = {"content": encoded(0), "headers": {"content-type": "image/png"}}
    assert client_of(one, limits=replace(SMALL, requests=0)).post("/predict", **image).status_code == 429
    full = client_of(one, limits=replace(SMALL, held_bytes=100))
    answer = full.post("/predict", **image)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    held_as_error(429, answer.text)

    async def forever(*_: Any) -> Any:
        await asyncio.sleep(60)

    late = client_of(one, limits=replace(SMALL, answer_s=0.05), ask=forever).post("/predict", **image)
    assert late.status_code == 503
    held_as_error(503, late.text)

    def announced(length: str) -> int:
        return full.post("/predict", content=b"", headers={"content-length": length}).status_code

    assert announced("200001") == 413
    assert announced("9" * 5000) == 413
    coded = full.post("/predict", content=b"x", headers={"content-type": "image/png", "content-encoding": "gzip"})
    assert coded.status_code == 415


def test_the_page_is_one_file_that_asks_nobody_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.findall(r"https?://|//\w", answer.text)
    assert "innerHTML" not in answer.text
    assert "frame-ancestors 'none'" in client.get("/healthz").headers["content-security-policy"]


def test_openapi_lists_every_route(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    routes = ["/", "/healthz", "/readyz", "/openapi.json", "/predict", *(f"/{name}/predict" for name in KINDS)]
    assert sorted(described["paths"]) == sorted(routes)
    (top,) = described["paths"]["/linear/predict"]["post"]["parameters"]
    assert top["schema"]["maximum"] == 10


def test_batches_take_all_that_wait_and_nobody_waits_for_a_batch() -> None:
    seen: list[list[int]] = []

    async def ask() -> list[Any]:
        free = asyncio.Event()

        async def work(items: Sequence[int]) -> list[int]:
            seen.append(list(items))
            await free.wait()
            if 13 in items:
                raise ValueError("unlucky")
            return [item * item for item in items]

        batches = Batches(work, 4, calls=1)
        first = asyncio.create_task(batches([1]))
        others = [asyncio.create_task(batches(each)) for each in ([2, 3], [4], [5, 6], [13], [])]
        gone = asyncio.create_task(batches([7]))
        await asyncio.sleep(0)
        assert seen == []
        await asyncio.sleep(0)
        gone.cancel()
        free.set()
        return [await first, *(await asyncio.gather(*others, return_exceptions=True))]

    found = asyncio.run(ask())
    assert seen == [[1], [2, 3, 4, 5], [6, 13]]
    assert found[:3] == [[1], [4, 9], [16]]
    assert str(found[3]) == str(found[4]) == "unlucky"
    assert found[5] == []


def test_names_of_bundles() -> None:
    assert named(["results/photos/bundle", "birds=x/bundle", "export/mine"]) == {
        "photos": Path("results/photos/bundle"),
        "birds": Path("x/bundle"),
        "mine": Path("export/mine"),
    }
    with pytest.raises(ServeError, match="both called a"):
        named(["a/bundle", "b/a"])
    for bad in ("x y", "..", "=x", "a/b=c"):
        with pytest.raises(ServeError, match="cannot be part of a path"):
            named([bad])


def test_the_token_is_long_private_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(ServeError, match="can be read by others: chmod 600"):
        read_token(str(file))
    file.chmod(0o600)
    assert read_token(str(file)) == TOKEN
    monkeypatch.setenv("FROSTLINE_SERVE_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    assert "FROSTLINE_SERVE_TOKEN" not in os.environ
    assert read_token(None) is None
    for bad in ("canary", "canary with spaces in it", "", "\xe9" * 20):
        file.write_text(bad)
        with pytest.raises(ServeError, match="16 or more") as caught:
            read_token(str(file))
        assert "canary" not in str(caught.value)
    with pytest.raises(ServeError, match="cannot be read"):
        read_token(str(tmp_path / "nothing"))


def test_mistakes_are_told_before_ray_starts(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = str(bundles["linear"])
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("models.example.com")
    with contextlib.closing(listen("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (["--host", "0.0.0.0"], "there is no token"),
            (["--port", port], "give another --port"),
            (["--port", "99999999"], "--port 99999999"),
            (["--host", "no such host", "--allow-open"], "no such place"),
            (["--replicas", "0"], "give 1 or more"),
            (["--max-batch", "0"], "give 1 or more"),
            (["--token-file", str(tmp_path / "no")], "cannot be read"),
        ):
            assert main(["serve", bundle, *arguments]) == 2, arguments
            assert said in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_a_certificate_is_one_and_its_key_is_its_own(
    bundles: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    of, other = certified(tmp_path / "of", "localhost"), certified(tmp_path / "other", "localhost")
    check_tls(of.certificate, of.key)
    for certificate, key, said in (
        (of.certificate, other.key, "KEY_VALUES_MISMATCH"),
        (of.key, of.key, "must be a certificate and its key as PEM"),
        (str(tmp_path / "no"), of.key, "No such file"),
        (of.certificate, str(tmp_path / "no"), "No such file"),
    ):
        assert main(["serve", str(bundles["linear"]), "--tls-cert", certificate, "--tls-key", key]) == 2
        assert said in capsys.readouterr().err
    assert main(["serve", str(bundles["linear"]), "--tls-cert", of.certificate]) == 2
    assert "--tls-cert and --tls-key go together" in capsys.readouterr().err
    Path(of.key).chmod(0o644)
    with pytest.raises(ServeError, match="can be read by everyone: chmod o="):
        check_tls(of.certificate, of.key)
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", other.key, "-aes256", "-passout", "pass:canary", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ServeError, match="is locked by a passphrase"):
        check_tls(other.certificate, str(locked))


class Server:
    """`frostline serve` as a process, and requests to it. It hears Ctrl-C even where these tests run as a background job that does
    not."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.log = folder / "serve.log"
        hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [sys.executable, "-m", "frostline.cli", "serve", "--port", "0", *arguments]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=os.environ | env, stdout=out, stderr=out, start_new_session=True, preexec_fn=hear
            )
        deadline = time.monotonic() + 240
        while not (found := re.search(r"(https?://\S+)/ for people", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        self.url = found[1]
        self.trusts: ssl.SSLContext | None = None
        self.all = psutil.Process(self.process.pid).children(recursive=True)

    def ask(self, path: str, body: bytes | None = None, kind: str = "image/png", **headers: str) -> tuple[int, str]:
        """Status and text."""
        head = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} | head)
        try:
            with urllib.request.urlopen(request, timeout=90, context=self.trusts) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold a trunk."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ServeReplica:" in " ".join(each.cmdline()) or "ServeReplica:" in each.name():
                    found.append(each)
        return found

    def end(self, number: int) -> int:
        """Send a signal, and answer the exit status."""
        self.all = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    each = [f"{name}={bundles[name]}" for name in ("linear", "wide")]
    server = Server(folder, *each, "--token-file", str(token))
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)
    for process in server.all:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


KNOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.slow
def test_more_replicas_than_there_is_room_for_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"the replicas take 999 CPUs .*give fewer --replicas"):
        Server(tmp_path, str(bundles["linear"]), "--replicas", "999")


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_nothing_undocumented(server: Server, tmp_path: Path) -> None:
    """All of its checks but one: that what fits the schema is accepted, as no schema says which bytes are an image."""
    known = ("-H", f"Authorization: Bearer {TOKEN}", "--exclude-checks", "positive_data_acceptance")
    how = ("--continue-on-failure", "-n", "100", "--seed", "1", "--no-color")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *known, *how]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "".join(line[:300] for line in done.stdout.splitlines(True))[-4000:] + done.stderr
    assert re.search(r"Tested: 6", done.stdout)
    assert server.ask("/readyz")[0] == 200


needs_browser = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="needs chromium and chromium-driver, from apt-get"
)


@contextlib.contextmanager
def browsing(url: str, profile: Path) -> Iterator[Any]:
    """A browser on this page, whose log then holds nothing that the page's policy has forbidden."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or ""))
    try:
        browser.get(url)
        yield browser
        assert not [each for each in browser.get_log("browser") if "Content Security Policy" in each["message"]]
    finally:
        browser.quit()


def until(browser: Any, text: str, within: str) -> None:
    """Wait until an element holds this."""
    deadline = time.monotonic() + 30
    while text not in (seen := browser.find_element("id", within).text):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)


@pytest.mark.slow
@needs_browser
def test_the_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    """It asks for the token, and shows what was said of each file, whose name is text."""
    hostile = tmp_path / "<img src=x onerror=document.title='lost'>.png"
    hostile.write_bytes(encoded(0))
    with browsing(server.url, tmp_path / "p") as browser:
        until(browser, "not let in", "said")
        browser.find_element("id", "token").send_keys(TOKEN)
        browser.find_element("id", "files").send_keys(str(hostile))
        browser.find_element("css selector", "button").click()
        until(browser, " %", "answers")
        assert hostile.name in browser.find_element("id", "answers").text
        assert browser.title == "Frostline: predict"
        assert [each.text for each in browser.find_elements("css selector", "option")] == ["linear", "wide"]
        assert not browser.find_element("id", "text").is_displayed()


@pytest.mark.fault(44)
@pytest.mark.slow
def test_a_real_server(server: Server, bundles: dict[str, Path]) -> None:
    """Numbers, refusals, a replica that dies under load, and an end with nothing left."""
    assert server.ask("/readyz")[0] == 200
    assert server.ask("/linear/predict", encoded(0))[0] == 401
    assert server.ask("/linear/predict", encoded(0), Authorization="Bearer wrong")[0] == 401
    loaded = {name: load_bundle(bundles[name]) for name in ("linear", "wide")}
    expected = {name: bundle.predict([encoded(0)]) for name, bundle in loaded.items()}
    for name, bundle in loaded.items():
        status, text = server.ask(f"/{name}/predict?top_k=10", encoded(0), **KNOWN)
        assert status == 200, text
        (found,) = json.loads(text)["predictions"]
        np.testing.assert_array_equal(shares(found, bundle.classes), expected[name].probabilities[0])

    (replica,) = server.replicas()
    for body, kind, status in CORPUS.values():
        found, text = server.ask("/wide/predict", body, kind or "text/plain", **KNOWN)
        # this server's limits are the usual ones: what is too many or too much for the small ones is not too much for them
        if body not in (CORPUS["many"][0], CORPUS["huge"][0]):
            assert found == status, text
        assert found < 500, text
    assert [each.pid for each in server.replicas()] == [replica.pid]

    crowd = [encoded(seed) for seed in range(24)]
    alone = {name: bundle.predict(crowd, batch_size=1) for name, bundle in loaded.items()}

    def asked(number: int) -> None:
        name = ("linear", "wide")[number % 2]
        status, text = server.ask(f"/{name}/predict?top_k=10", crowd[number % 24], **KNOWN)
        assert status == 200, text
        (found,) = json.loads(text)["predictions"]
        given = alone[name].probabilities[number % 24]
        np.testing.assert_allclose(shares(found, loaded[name].classes), given, atol=TOLERANCE)

    with ThreadPoolExecutor(16) as pool:
        under_way = [pool.submit(asked, number) for number in range(200)]
        time.sleep(0.1)
        replica.kill()
        killed = time.monotonic()
        for each in under_way:
            each.result()
    assert server.ask("/readyz")[0] == 200
    assert time.monotonic() - killed < 30
    (back,) = server.replicas()
    assert back.pid != replica.pid

    assert server.end(signal.SIGTERM) == 143
    _, alive = psutil.wait_procs(server.all, timeout=20)
    assert not alive
    said = server.log.read_text()
    assert said.splitlines()[-1] == "frostline: no longer serving"
    assert TOKEN not in said
    assert "Traceback" not in said


@pytest.mark.fault(44)
@pytest.mark.slow
def test_a_real_server_of_texts(text_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Numbers, refusals, and all of schemathesis's checks: what fits the schema is accepted, too."""
    server = Server(tmp_path, *(f"{name}={text_bundles[name]}" for name in ("words", "pairs")))
    try:
        for name, texts in (("words", ["the old ship", "salt"]), ("pairs", [("the old ship", "salt")])):
            bundle = load_bundle(text_bundles[name])
            status, text = server.ask(f"/{name}/predict", in_texts(*texts), JSON)
            assert status == 200, text
            found = [shares(each, bundle.classes) for each in json.loads(text)["predictions"]]
            np.testing.assert_array_equal(found, bundle.predict(texts).probabilities)
        before = sorted(each.pid for each in server.replicas())
        for case, (name, body, kind, status) in TEXT_CORPUS.items():
            if case not in (
                "many",
                "huge",
                "too long",
                "too long in a pair",
            ):  # of this server, whose limits are the usual ones
                assert server.ask(f"/{name}/predict", body, kind)[0] == status, case
        assert server.ask("/words/predict", in_texts("a " * 50_001), JSON)[0] == 422
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        how = ("--continue-on-failure", "-n", "100", "--seed", "1", "--no-color")
        done = subprocess.run([*command, *how], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, "".join(line[:300] for line in done.stdout.splitlines(True))[-4000:] + done.stderr
        assert sorted(each.pid for each in server.replicas()) == before
        if shutil.which("chromedriver"):
            with browsing(server.url, tmp_path / "p") as browser:
                until(browser, "words", "bundle")
                assert not browser.find_element("id", "files").is_displayed()
                browser.find_element("id", "text").send_keys("the <b>old</b> ship")
                browser.find_element("css selector", "button").click()
                until(browser, "the <b>old</b> ship", "answers")
                until(browser, " %", "answers")
                browser.find_element("css selector", "option:last-child").click()
                browser.find_element("id", "pair").send_keys("salt")
                browser.find_element("css selector", "button").click()
                until(browser, "the <b>old</b> ship / salt", "answers")
    finally:
        server.end(signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_over_tls_only(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Who knows the authority is answered, with the numbers of the bundle; who does not hangs up, and plain HTTP gets nothing."""
    of = certified(tmp_path / "tls", "127.0.0.1")
    server = Server(tmp_path, f"wide={bundles['wide']}", "--tls-cert", of.certificate, "--tls-key", of.key)
    try:
        assert server.url.startswith("https://127.0.0.1:")
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            server.ask("/readyz")
        server.trusts = ssl.create_default_context(cafile=of.authority)
        assert server.ask("/readyz", Origin=server.url)[0] == 200
        assert server.ask("/readyz", Origin="https://elsewhere.example")[0] == 403
        status, text = server.ask("/wide/predict?top_k=10", encoded(0))
        assert status == 200, text
        bundle = load_bundle(bundles["wide"])
        (found,) = json.loads(text)["predictions"]
        given = bundle.predict([encoded(0)]).probabilities[0]
        np.testing.assert_array_equal(shares(found, bundle.classes), given)
        server.url = server.url.replace("https", "http")
        with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
            server.ask("/readyz")
    finally:
        server.end(signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


ACTORS = """
import sys, ray
from ray import serve
ray.init("auto", log_to_driver=False, logging_level="error")
if sys.argv[1] == "start":
    serve.start(proxy_location="Disabled")
print("found", sorted(each["name"] for each in ray.util.list_named_actors(all_namespaces=True)))
"""


@pytest.mark.slow
def test_on_a_cluster_that_is_there_with_and_without_a_serve_of_its_own(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Whose nodes have another frostline: the replicas run this one."""
    with ray_head(tmp_path) as head:

        def actors(what: str) -> str:
            command = [sys.executable, "-c", ACTORS, what]
            env = head.env | {"RAY_ADDRESS": head.address}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return re.findall(r"^found (.*)$", done.stdout, re.MULTILINE)[-1]

        for what, left in (("look", "[]"), ("start", "['SERVE_CONTROLLER_ACTOR']")):
            assert actors(what) == left
            server = Server(tmp_path, f"tuned={bundles['tuned']}", "--address", head.address, **head.env)
            try:
                status, text = server.ask("/tuned/predict?top_k=10", encoded(0))
                assert status == 200, text
                bundle = load_bundle(bundles["tuned"])
                (found,) = json.loads(text)["predictions"]
                given = bundle.predict([encoded(0)]).probabilities[0]
                np.testing.assert_array_equal(shares(found, bundle.classes), given)
            finally:
                ended = server.end(signal.SIGINT)
            assert ended == 130, server.log.read_text()
            assert actors("look") == left
