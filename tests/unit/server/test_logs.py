"""What a line of the log looks like, in both forms."""

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from server.logs import JsonFormatter, RequestIdFilter, configure_logging, request_id_var

logger = logging.getLogger("tests.logs")


@pytest.fixture
def restored() -> Iterator[None]:
    """The test run's own logging comes back."""
    root, levels = logging.getLogger(), dict[str, int]()
    for name in list(logging.Logger.manager.loggerDict):
        levels[name] = logging.getLogger(name).level
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def line_of(message: str, *args: Any, **options: Any) -> dict[str, Any]:
    """The JSON object that an event becomes."""
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 1, message, args, options.get("exc_info"))
    RequestIdFilter().filter(record)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    shown: dict[str, Any] = json.loads(line)
    return shown


def test_json_has_the_values_that_the_message_names() -> None:
    line = line_of("stack loaded name=%s bytes=%d seconds=%.3f cold=%s", "math", 7, 0.25, ["a", "b"])
    assert line["message"] == "stack loaded name=math bytes=7 seconds=0.250 cold=['a', 'b']"
    assert line["fields"] == {"name": "math", "bytes": 7, "seconds": 0.25, "cold": ["a", "b"]}
    assert (line["level"], line["logger"]) == ("info", "tests.logs")
    assert line["time"].endswith("+00:00")


def test_values_that_json_does_not_have_are_shown_as_text() -> None:
    assert line_of("x error=%s", ValueError("broken"))["fields"] == {"error": "broken"}
    assert line_of("x age=%.1f", float("inf"))["fields"] == {"age": "inf"}


@pytest.mark.parametrize(
    ("message", "args"),
    [("no values", ()), ("100%% of %s", ("it",)), ("from %s to %s", (1, 2)), ("by name %(a)s", ({"a": 1},))],
)
def test_message_without_named_values_has_no_fields(message: str, args: tuple[Any, ...]) -> None:
    assert "fields" not in line_of(message, *args)


def test_request_id_and_traceback_are_in_the_line() -> None:
    token = request_id_var.set("req-7")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = line_of("request failed", exc_info=sys.exc_info())
    finally:
        request_id_var.reset(token)
    assert line["request_id"] == "req-7"
    assert "ValueError: two\nlines" in line["exception"]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("form", ["text", "json"])
def test_log_goes_to_stderr_line_by_line(form: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", form)
    logger.info("first count=%d", 1)
    logger.debug("hidden")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    if form == "json":
        assert json.loads(shown)["fields"] == {"count": 1}
    else:
        assert "INFO tests.logs [-] first count=1" in shown
