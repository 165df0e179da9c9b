"""The OpenAPI document says of every route what it answers, by which key, and in which shapes."""

from typing import Any

import pytest

from tests.servers import LiveServer

PLACES = {"{name}": "math", "{action}": "pin", "{sha256}": "0" * 64, "{model}": "tiny"}


@pytest.fixture
def document(shared_server: LiveServer) -> dict[str, Any]:
    with shared_server.client() as client:
        shown: dict[str, Any] = client.get("/openapi.json").json()
    return shown


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, of) for path, methods in document["paths"].items() for method, of in methods.items()]


def test_every_route_says_what_it_answers(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        schema = next(iter(operation["responses"]["200"]["content"].values()))["schema"]
        assert "$ref" in schema or path == "/metrics", (method, path)
        assert "422" not in operation["responses"]
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(chat) == {"application/json", "text/event-stream"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for inner in value.values() for found in references(inner)]
        return [found for inner in value for found in references(inner)] if isinstance(value, list) else []

    for reference in references(document):
        _, _, kind, name = reference.split("/")
        assert name in document["components"][kind], reference


def test_errors_have_one_shape_and_name_their_codes(document: dict[str, Any]) -> None:
    errors = document["components"]["responses"]
    assert {"Error400", "Error401", "Error404", "Error412", "Error429", "Error499", "Error503"} <= set(errors)
    for error in errors.values():
        assert error["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert "context_length_exceeded" in errors["Error400"]["description"]
    assert errors["Error429"]["headers"]["retry-after"]["required"]


def test_keys_are_documented_for_both_doors(document: dict[str, Any]) -> None:
    for _, path, operation in operations(document):
        is_open = path.startswith("/health") or path == "/metrics"
        key = "adminKey" if path.startswith("/admin") else "apiKey"
        assert operation.get("security") == (None if is_open else [{key: []}]), path
    assert set(document["components"]["securitySchemes"]) == {"apiKey", "adminKey"}


def test_upload_has_a_body_of_bytes(document: dict[str, Any]) -> None:
    body = document["paths"]["/admin/blobs/{sha256}"]["put"]["requestBody"]
    assert list(body["content"]) == ["application/octet-stream"]


def test_wrong_method_is_told_every_right_one(shared_server: LiveServer, document: dict[str, Any]) -> None:
    with shared_server.client() as client:
        for path, methods in document["paths"].items():
            filled = path
            for name, value in PLACES.items():
                filled = filled.replace(name, value)
            answer = client.request("PATCH", filled)
            assert answer.status_code == 405
            assert answer.headers["allow"].split(", ") == sorted(method.upper() for method in methods), path


def test_wrong_method_for_a_file_is_told_how_files_are_read(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        for path in ("/playground/main.js", "/playground/health/live"):  # the second ends like a route of the app
            answer = client.post(path)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "GET, HEAD", path
