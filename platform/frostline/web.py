"""The web side of serving: routes, who is let in, and what an answer looks like. No Ray: it is given a function that predicts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frostline.intake import Input, Limits, Refused, contents_of
from frostline.metrics import probabilities, said_of
from frostline.openapi import TOP, describe
from frostline.spec import Task
from frostline.text import plain

OPEN = ("/", "/healthz", "/readyz")
"""Paths that ask for no token: they say nothing of bundles."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Asked = tuple[dict[int, str], dict[str, np.ndarray]]
"""Number of a sample -> why it cannot be used; and name of a bundle -> (N, C) logits of the others."""
Ask = Callable[[Sequence[bytes], Sequence[str]], Awaitable[Asked]]
"""Raw contents of samples, and the bundles that are asked. Raises Refused."""


@dataclass(frozen=True)
class Served:
    """A bundle, as clients see it."""

    classes: tuple[str, ...]
    given: Input
    task: Task = "classification"


@dataclass(frozen=True)
class Door:
    """Who is let in."""

    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK
    """Names that a Host header may have, against DNS rebinding; any where None."""
    origins: tuple[str, ...] = ()
    """Names of sites beside this one whose pages may ask."""

    def refusal(self, path: str, headers: Headers) -> Refused | None:
        """Why a request is not let in, if so."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(f"//{host}") not in self.hosts:
            return Refused(
                403,
                "host refused",
                f"this server is not {host[:100]!r}",
                "ask 127.0.0.1, or start it with --allow-host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and _name(origin) not in self.origins:
            return Refused(
                403,
                "origin refused",
                "a page of another site asks",
                "ask from a program, or from this server's own page",
            )
        if self.token is None or path in OPEN:
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(_digest(token.strip()), _digest(self.token)):
            return None
        why = "the token is not the server's" if kind else "the request has no token"
        remedy = "send the header Authorization: Bearer TOKEN"
        return Refused(401, "not let in", why, remedy, {"WWW-Authenticate": "Bearer"})


def app_of(
    served: Mapping[str, Served],
    ask: Ask,
    ready: Callable[[], Awaitable[bool]],
    *,
    door: Door,
    limits: Limits,
) -> ASGIApp:
    """The routes: `/NAME/predict` for each bundle, `/predict` for all of them where they take the same, a page, OpenAPI, health
    and readiness."""
    held = _Held(limits)
    described = describe(
        {name: (each.classes, each.given, each.task) for name, each in served.items()}, limits, bool(door.token)
    )

    async def predict_one(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in served:
            raise Refused(404, "no such bundle", f"{name[:100]!r} is not served", f"there are {', '.join(served)}")
        return JSONResponse({"predictions": (await answer(request, (name,)))[name]})

    async def predict_all(request: Request) -> Response:
        return JSONResponse({"bundles": await answer(request, tuple(served))})

    async def answer(request: Request, names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
        top = _top(request, max(len(served[name].classes) for name in names))
        with held.request() as body:
            content = await body.read(request)
            given = served[names[0]].given
            samples = await contents_of(request.headers.get("content-type", ""), content, given, limits)
            try:
                async with asyncio.timeout(limits.answer_s):
                    bad, logits = await ask(samples, names)
            except TimeoutError:
                raise _late(limits) from None
        if bad:
            number, why = min(bad.items())
            more = f"; and {len(bad) - 1} more" * (len(bad) > 1)
            raise Refused(422, f"{given.noun} {number} cannot be used", f"{why}{more}", f"send {given.what}")
        return {name: predictions(logits[name], served[name].classes, top, served[name].task) for name in names}

    async def openapi(_: Request) -> Response:
        return JSONResponse(described)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def readyz(_: Request) -> Response:
        if await ready():
            return JSONResponse({"status": "ready"})
        raise Refused(503, "not ready", "a replica is starting", "ask again in some seconds", {"Retry-After": "5"})

    routes = [
        Route("/", _page),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/openapi.json", openapi),
        Route("/{name}/predict", predict_one, methods=["POST"]),
    ]
    if len({each.given for each in served.values()}) == 1:
        routes.append(Route("/predict", predict_all, methods=["POST"]))
    app = Starlette(
        routes=routes,
        exception_handlers={Refused: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _failed},
    )
    app.router.redirect_slashes = False
    return _Guarded(app, door)


def predictions(
    logits: np.ndarray, classes: Sequence[str], top: int, task: Task = "classification"
) -> list[dict[str, Any]]:
    """A prediction a sample, of (N, C) logits: the likeliest class, or all labels of a probability above one half, and the `top`
    likeliest ones with their probabilities; of (N, 1) numbers the value."""
    said = said_of(logits, classes, task)
    if task == "regression":
        return [{"value": value} for value in said]
    key, shares = ("label" if task == "classification" else "labels"), probabilities(logits, task)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    return [
        {key: each, "top": [{"label": classes[label], "probability": float(row[label])} for label in best]}
        for each, best, row in zip(said, order, shares, strict=True)
    ]


class _Held:
    """What requests in progress hold, and the limits to that."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.requests, self.bytes = limits, 0, 0

    def request(self) -> _Body:
        return _Body(self)

    def refuse(self, why: str) -> NoReturn:
        raise Refused(429, "too many requests", why, "ask again in a moment", {"Retry-After": "1"})


class _Body:
    """One request in progress, and its body. Raises Refused where either is too much."""

    def __init__(self, held: _Held) -> None:
        self.held, self.bytes = held, 0

    def __enter__(self) -> _Body:
        if self.held.requests >= self.held.limits.requests:
            self.held.refuse(f"{self.held.requests} are being answered")
        self.held.requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.held.requests -= 1
        self.held.bytes -= self.bytes

    async def read(self, request: Request) -> bytes:
        limits = self.held.limits
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limits.body_bytes:
            raise _too_large(f"{int(announced[:20]):,} bytes are announced", limits)
        if coding := request.headers.get("content-encoding"):
            raise Refused(
                415, "content encoding not supported", f"{coding[:100]!r} is not read", "send it uncompressed"
            )
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(limits.read_s):
                async for chunk in request.stream():
                    self.bytes += len(chunk)
                    self.held.bytes += len(chunk)
                    if self.bytes > limits.body_bytes:
                        raise _too_large("more came", limits)
                    if self.held.bytes > limits.held_bytes:
                        self.held.refuse("their bodies fill the memory that is set aside for them")
                    chunks.append(chunk)
        except TimeoutError:
            why = f"it did not come within {limits.read_s:g} s"
            raise Refused(408, "body too slow", why, "send less, or from nearer", {"Connection": "close"}) from None
        return b"".join(chunks)


def _too_large(why: str, limits: Limits) -> Refused:
    remedy = "send less at a time, or predict a whole data set with `frostline predict`"
    most = f"a body has {limits.body_bytes:,} at most"
    return Refused(413, "body too large", f"{why}, and {most}", remedy, {"Connection": "close"})


def _late(limits: Limits) -> Refused:
    why = f"no answer came within {limits.answer_s:g} s"
    return Refused(503, "too slow", why, "ask again, for fewer at a time", {"Retry-After": "5"})


def _top(request: Request, classes: int) -> int:
    """The query parameter top_k; others are refused, as a misspelt one would otherwise go unnoticed."""
    pairs = request.query_params.multi_items()
    if others := [name for name, _ in pairs if name != "top_k"]:
        raise Refused(400, "unknown parameter", f"{others[0][:100]!r} is none", "there is top_k")
    if not pairs:
        return min(TOP, classes)
    value = pairs[0][1]
    if len(pairs) > 1 or not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= classes:
        said = ", ".join(value[:20] for _, value in pairs)
        raise Refused(400, "top_k cannot be honoured", f"it is {said!r}", f"give one number from 1 to {classes}")
    return int(value)


class _Guarded:
    """ASGI: the door before all routes, and the headers of all answers."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cache-Control"] = "no-store"
            await send(message)

        refusal = self.door.refusal(scope["path"], Headers(scope=scope))
        app = self.app if refusal is None else _answer(refusal)
        await app(scope, receive, send_guarded)


def _answer(refused: Refused) -> Response:
    error = {"status": refused.status, "what": refused.what, "why": refused.why, "remedy": refused.remedy}
    shown = {name: plain(value).plain if isinstance(value, str) else value for name, value in error.items()}
    return JSONResponse({"error": shown}, refused.status, refused.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error)


async def _http(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path[:100]}"
    remedies = {404: "GET /openapi.json lists the routes", 405: "the header Allow says what this path takes"}
    remedy = remedies.get(error.status_code, "see /openapi.json")
    return _answer(Refused(error.status_code, str(error.detail).lower(), said, remedy, error.headers))


async def _gone(_: Request, error: Exception) -> Response:
    """A client that has left; nobody reads this."""
    return _answer(Refused(400, "body incomplete", "the connection was closed", "send it again"))


async def _failed(_: Request, error: Exception) -> Response:
    """What should not happen: the traceback goes to the server's log, and not to the client."""
    return _answer(Refused(500, "internal error", "it is in the server's log", "tell whoever runs this server"))


async def _page(_: Request) -> Response:
    html, policy = _upload_page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _upload_page() -> tuple[str, str]:
    """The page, and a policy that lets its own script and style run, and it ask nobody but this server."""
    html = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    rest = "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return html, f"default-src 'none'; {allowed['script']}; {allowed['style']}; {rest}"


def _name(url: str) -> str | None:
    """The host of a URL, in lower case; None where it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
