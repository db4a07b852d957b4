"""What is served, as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frostline.intake import FORM, JSON, Input, Limits
from frostline.spec import Task
from frostline.versions import VERSION

TOP = 5
"""Classes told of a sample, unless top_k says otherwise."""

_REFUSALS = {
    "400": "what came cannot be parsed, or a parameter cannot be honoured",
    "401": "no token, or a wrong one",
    "403": "a foreign Host or Origin",
    "404": "no such route or bundle",
    "405": "the path takes another method",
    "408": "the body came too slowly",
    "413": "too many bytes",
    "415": "a content type or encoding that is not read",
    "422": "a sample or JSON value that cannot be used, or too many of them",
    "429": "too many requests at a time",
    "503": "no answer in time, or not ready",
}
_LABELLED = {
    "type": "object",
    "required": ["label", "probability"],
    "properties": {"label": {"type": "string"}, "probability": {"type": "number", "minimum": 0, "maximum": 1}},
}
_TOP = {"type": "array", "minItems": 1, "items": _LABELLED}
_ANSWERS: dict[Task, str] = {"classification": "Prediction", "multilabel": "Labels", "regression": "Number"}
"""Task -> the schema of a prediction."""
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["status", "what", "why", "remedy"],
                "properties": {
                    "status": {"type": "integer"},
                    **{name: {"type": "string"} for name in ("what", "why", "remedy")},
                },
            }
        },
    },
    "Prediction": {
        "type": "object",
        "required": ["label", "top"],
        "properties": {"label": {"type": "string"}, "top": _TOP},
    },
    "Labels": {
        "type": "object",
        "required": ["labels", "top"],
        "properties": {"labels": {"type": "array", "items": {"type": "string"}}, "top": _TOP},
    },
    "Number": {"type": "object", "required": ["value"], "properties": {"value": {"type": "number"}}},
    "Status": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}},
}


def describe(
    served: Mapping[str, tuple[Sequence[str], Input, Task]], limits: Limits, with_token: bool
) -> dict[str, Any]:
    """The document, of the classes, the input and the task of each bundle."""
    many = {
        name: {"type": "array", "minItems": 1, "items": _ref(_ANSWERS[task])} for name, (_, _, task) in served.items()
    }
    each = {"type": "object", "required": [*served], "properties": many}
    paths: dict[str, Any] = {
        "/": {
            "get": _operation(
                "an upload page", {"200": _answer("the page", {"type": "string"}, "text/html")}, [], free=True
            )
        },
        "/healthz": {"get": _operation("whether the server is alive", _ok("Status"), [], free=True)},
        "/readyz": {"get": _operation("whether it can predict", _ok("Status"), ["503"], free=True)},
        "/openapi.json": {
            "get": _operation("this document", {"200": _answer("OpenAPI 3.1", {"type": "object"})}, ["401"])
        },
    }
    first, *others = {given for _, given, _ in served.values()}
    if not others:
        most = max(len(classes) for classes, _, _ in served.values())
        operation = _predict("ask all bundles", "bundles", each, most)
        paths["/predict"] = {"post": operation | {"requestBody": _body(first, limits)}}
    for name, (classes, given, task) in served.items():
        knows = f"gives {classes[0]}" if task == "regression" else f"knows {len(classes)} classes"
        operation = _predict(f"ask {name}, which {knows}", "predictions", many[name], len(classes))
        paths[f"/{name}/predict"] = {"post": operation | {"requestBody": _body(given, limits)}}
    scheme = {"token": {"type": "http", "scheme": "bearer"}} if with_token else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Frostline", "version": VERSION, "description": f"Bundles: {', '.join(served)}"},
        "paths": paths,
        "components": {"schemas": _SCHEMAS, "securitySchemes": scheme},
        "security": [{"token": []}] if with_token else [],
    }


def _predict(summary: str, key: str, schema: dict[str, Any], classes: int) -> dict[str, Any]:
    answered = {"type": "object", "required": [key], "properties": {key: schema}}
    top = {"type": "integer", "minimum": 1, "maximum": classes, "default": min(TOP, classes)}
    parameter = {
        "name": "top_k",
        "in": "query",
        "required": False,
        "schema": top,
        "description": "how many classes are told of each",
    }
    refusals = [status for status in _REFUSALS if status != "405"]
    operation = _operation(summary, {"200": _answer("in the order of what was sent", answered)}, refusals)
    return operation | {"parameters": [parameter]}


def _body(given: Input, limits: Limits) -> dict[str, Any]:
    if given.texts:
        text = {"type": "string", "pattern": r"\S", "maxLength": limits.characters}
        several = {"type": "array", "minItems": given.texts, "maxItems": given.texts, "items": text}
        schemas = {JSON: _object(given.key, _list(text if given.texts == 1 else several, limits))}
    else:
        one = _object(given.key, {"type": "string", "contentEncoding": "base64"})
        binary = {"type": "string", "format": "binary"}
        schemas = {JSON: {"anyOf": [one, _list(one, limits)]}, **dict.fromkeys(given.types, binary)}
        schemas[FORM] = _object(given.key, _list(binary, limits))
    return {
        "required": True,
        "description": f"{given.what}, up to {limits.body_bytes:,} bytes and {limits.samples} {given.noun}s",
        "content": {kind: {"schema": schema} for kind, schema in schemas.items()},
    }


def _object(key: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [key], "additionalProperties": False, "properties": {key: schema}}


def _list(item: dict[str, Any], limits: Limits) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "maxItems": limits.samples, "items": item}


def _operation(summary: str, answers: dict[str, Any], refusals: Sequence[str], *, free: bool = False) -> dict[str, Any]:
    """An operation; one that is `free` asks for no token."""
    told = {status: _answer(_REFUSALS[status], _ref("Error")) for status in ("403", *refusals)}
    return {"summary": summary, "responses": answers | told} | ({"security": []} if free else {})


def _answer(what: str, schema: dict[str, Any], kind: str = JSON) -> dict[str, Any]:
    return {"description": what, "content": {kind: {"schema": schema}}}


def _ok(name: str) -> dict[str, Any]:
    return {"200": _answer("yes", _ref(name))}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
