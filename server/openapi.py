"""Completes the OpenAPI document: answers, errors and keys of every route. Knows paths and the table of errors.

FastAPI writes what is asked; this adds what is answered. Errors are said once, as components, with the codes that the
table of errors.py has for their status.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from server import answer_schemas as answers
from server.error_responses import CODES_BY_STATUS
from server.errors import ERROR_TABLE

Json = dict[str, Any]
Operation = tuple[str, str]  # method, path

REF = "#/components/schemas/{model}"

ANSWERS: Mapping[Operation, type[BaseModel]] = {
    ("post", "/v1/chat/completions"): answers.ChatCompletion,
    ("post", "/v1/completions"): answers.Completion,
    ("get", "/v1/models"): answers.ModelList,
    ("get", "/v1/models/{model}"): answers.Model,
    ("post", "/v1/route"): answers.RouteAnswer,
    ("post", "/tokenize"): answers.Tokens,
    ("post", "/detokenize"): answers.PromptText,
    ("get", "/tokenizer_info"): answers.TokenizerInfo,
    ("get", "/admin/domains"): answers.DomainList,
    ("get", "/admin/domains/{name}"): answers.ShownDomain,
    ("put", "/admin/domains/{name}"): answers.Registered,
    ("delete", "/admin/domains/{name}"): answers.Removed,
    ("post", "/admin/domains/{name}/verify"): answers.Verified,
    ("post", "/admin/domains/{name}/{action}"): answers.ShownDomain,
    ("get", "/admin/cache"): answers.Cache,
    ("put", "/admin/blobs/{sha256}"): answers.Upload,
    ("put", "/admin/router"): answers.InstalledRouter,
    ("get", "/health"): answers.Readiness,
    ("get", "/health/live"): answers.Live,
    ("get", "/health/ready"): answers.Readiness,
}
STREAMED: Mapping[Operation, type[BaseModel]] = {
    ("post", "/v1/chat/completions"): answers.ChatCompletionChunk,
    ("post", "/v1/completions"): answers.CompletionChunk,
}
PLAIN: Mapping[Operation, str] = {("get", "/metrics"): "text/plain"}
CREATED = frozenset({("put", "/admin/domains/{name}")})  # answers 201 where there was none before
UNREADY = frozenset({("get", "/health"), ("get", "/health/ready")})  # 503 is an answer here, not an error

# A path may be none of its route's, or match a neighbour that has other methods: any string can stand for a name.
STATUSES_BY_TAG: Mapping[str, tuple[int, ...]] = {
    "openai": (401, 404, 405, 500, 503),
    "admin": (400, 401, 403, 404, 405, 500, 503),
    "health": (500,),
}
STATUSES_OF_BODIES: Mapping[str, tuple[int, ...]] = {
    "openai": (400, 408, 413, 429, 499, 504),
    "admin": (408, 413, 499, 502),
}
CHANGES_STORE = (412,)

KEYS: Mapping[str, str] = {"openai": "apiKey", "admin": "adminKey"}
SECURITY_SCHEMES: Json = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "one of server.api_keys, if any are set"},
    "adminKey": {"type": "http", "scheme": "bearer", "description": "server.admin_key; without one, 403"},
}
REQUEST_ID: Json = {
    "x-request-id": {"required": True, "schema": {"type": "string"}, "description": "the caller's own, if it is one"}
}
HEADERS_BY_STATUS: Mapping[int, Json] = {
    401: {"www-authenticate": {"required": True, "schema": {"type": "string"}}},
    412: {"x-should-retry": {"required": True, "schema": {"const": "false"}}},
    429: {"retry-after": {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}},
    503: {"retry-after": {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}},
    504: {"x-should-retry": {"required": True, "schema": {"const": "false"}}},
}


class DocumentedApi(FastAPI):
    """An app whose document says what is answered, too."""

    def openapi(self) -> Json:
        """Made once."""
        if self.openapi_schema is None:
            self.openapi_schema = complete(super().openapi())
        return self.openapi_schema


def complete(document: Json) -> Json:
    """The same document with answers, errors and keys. FastAPI's own 422, which nothing answers here, is taken out."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(operation, (method, path))
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    ours = _answer_schemas()
    assert not ours.keys() & schemas.keys(), f"two schemas of one name: {ours.keys() & schemas.keys()}"
    schemas |= ours
    rows = (*STATUSES_BY_TAG.values(), *STATUSES_OF_BODIES.values(), CHANGES_STORE)
    components["responses"] = {f"Error{status}": _error(status) for status in sorted({s for row in rows for s in row})}
    components["securitySchemes"] = SECURITY_SCHEMES
    return document


def _complete_operation(operation: Json, key: Operation) -> None:
    tag = operation["tags"][0]
    statuses = set(STATUSES_BY_TAG[tag])
    if "requestBody" in operation:
        statuses |= set(STATUSES_OF_BODIES[tag])
    if any(parameter["name"] == "if-match" for parameter in operation.get("parameters", ())):
        statuses |= set(CHANGES_STORE)
    responses = operation["responses"]
    responses.pop("422", None)
    if key in ANSWERS:
        responses["200"] = _answer(key)
    if key in PLAIN:
        responses["200"] = {"description": "done", "content": {PLAIN[key]: {"schema": {"type": "string"}}}}
    responses["200"]["headers"] = REQUEST_ID
    if key in CREATED:
        responses["201"] = _answer(key)
    if key in UNREADY:
        responses["503"] = _answer(key) | {"description": "not ready"}
    for status in sorted(statuses):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/Error{status}"})
    if tag in KEYS:
        operation["security"] = [{KEYS[tag]: []}]


def _answer(key: Operation) -> Json:
    content: Json = {"application/json": {"schema": _ref(ANSWERS[key])}}
    description = "done"
    if key in STREAMED:
        content["text/event-stream"] = {"schema": _ref(STREAMED[key])}  # of one event, as OpenAI's own document has it
        description = "whole, or as events that end with [DONE]; an event with `error` ends a stream that failed"
    return {"description": description, "headers": REQUEST_ID, "content": content}


def _error(status: int) -> Json:
    codes = {answer.code for answer in ERROR_TABLE.values() if answer.status == status}
    codes |= {CODES_BY_STATUS[status]} if status in CODES_BY_STATUS else set()
    return {
        "description": f"code is one of: {', '.join(sorted(codes))}",
        "headers": REQUEST_ID | HEADERS_BY_STATUS.get(status, {}),
        "content": {"application/json": {"schema": _ref(answers.Error)}},
    }


def _answer_schemas() -> Json:
    models: set[type[BaseModel]] = {*ANSWERS.values(), *STREAMED.values(), answers.Error}
    # As they are read, where a field with a default may be absent; as they are written, all would be required.
    ordered = sorted(models, key=lambda model: model.__name__)
    pairs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in ordered]
    _, definitions = models_json_schema(pairs, ref_template=REF)
    schemas: Json = definitions["$defs"]
    return schemas


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": REF.format(model=model.__name__)}
