"""The one table from exception classes to answers."""

import inspect
import json

import pytest

import engine.errors
import router.errors
import server.errors
import stack_store.errors
from server.error_responses import body_of, response_to
from server.error_table import error_table
from server.errors import ERROR_TABLE, InvalidRequest, QueueFull, answer_for
from stack_store.errors import GenerationConflict, StoreError

PACKAGES = (engine.errors, router.errors, server.errors, stack_store.errors)


@pytest.mark.parametrize("module", PACKAGES, ids=lambda module: module.__name__)
def test_every_exception_class_has_a_row(module: object) -> None:
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Exception)]
    assert classes
    missing = [c.__name__ for c in classes if c not in ERROR_TABLE]
    assert not missing, f"no row in ERROR_TABLE: {missing}"


def test_unlisted_subclass_is_answered_as_its_nearest_ancestor() -> None:
    class NewKind(QueueFull):
        pass

    assert answer_for(NewKind("full")).status == 429


def test_what_nobody_raised_on_purpose_tells_nothing() -> None:
    body = body_of(ZeroDivisionError("secret"))
    assert body["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(body)


def test_retry_headers_follow_the_table() -> None:
    assert response_to(QueueFull("full")).headers["retry-after"] == "1"
    conflict = response_to(GenerationConflict(expected=1, current=2))
    assert (conflict.status_code, conflict.headers["x-should-retry"]) == (412, "false")
    assert "x-should-retry" not in response_to(StoreError("odd")).headers


def test_quoted_half_characters_can_be_sent() -> None:
    response = response_to(InvalidRequest("model '\ud800' is odd", param="\ud800"))
    assert json.loads(bytes(response.body))["error"]["message"] == "model '?' is odd"


def test_table_tells_whose_wait_it_is_and_what_http_refuses() -> None:
    rows = {row.split(" | ")[1]: row for row in error_table().splitlines() if "`" in row}
    assert "| after 1 s |" in rows["`queue_full`"]
    assert "| as `Retry-After` says |" in rows["`rate_limit_exceeded`"]
    assert rows["`headers_too_large`"].startswith("| 431 |")


def test_statuses_that_the_official_client_retries_say_when() -> None:
    for cls, answer in ERROR_TABLE.items():
        if answer.status in (429, 503):
            assert answer.retry_after_seconds is not None, cls
