"""Prints every error that a request can be answered with as Markdown: `python -m server.error_table`.

The table stands in docs/api.md. Knows the table of errors.py, the trees in which each package's errors.py says what its
classes mean, and what HTTP itself refuses.
"""

import re
import sys
from collections.abc import Iterator

from server.error_responses import CODES_BY_STATUS, type_of
from server.errors import ERROR_TABLE, Answer, ClientGone, RateLimitExceeded

SAID_BY_HTTP = {
    404: "there is nothing at that path",
    405: "the path takes other methods",
    408: "the body did not come in time",
    413: "the body is larger than `server.max_body_bytes`",
    431: "the request line and headers are larger than 64 KiB",
}
INTERNAL_SAID = "what went wrong inside, which only the server's log tells"
LEAF = re.compile(r"^[│ ]*[├└]── (\w+) +(\S.*)$", re.MULTILINE)


def error_table() -> str:
    """A row for each status and code, by status."""
    rows = {(status, CODES_BY_STATUS[status]): ([said], Answer(status, "")) for status, said in SAID_BY_HTTP.items()}
    for cls, answer in ERROR_TABLE.items():
        if cls is not ClientGone:  # nobody is there to read it
            rows.setdefault((answer.status, answer.code), ([], answer))[0].append(_meaning(cls))
    return "\n".join(_lines(rows)) + "\n"


def _meaning(cls: type[Exception]) -> str:
    return dict(LEAF.findall(sys.modules[cls.__module__].__doc__ or "")).get(cls.__name__, "")


def _lines(rows: dict[tuple[int, str], tuple[list[str], Answer]]) -> Iterator[str]:
    yield "| status | `code` | `type` | try again | |"
    yield "|---|---|---|---|---|"
    for (status, code), (said, answer) in sorted(rows.items()):
        meaning = INTERNAL_SAID if code == "internal_error" else "; or ".join(dict.fromkeys(said))
        yield f"| {status} | `{code}` | `{type_of(status)}` | {_retry(status, answer)} | {meaning} |"


def _retry(status: int, answer: Answer) -> str:
    """What Retry-After says; else what the official clients do by themselves."""
    if answer is ERROR_TABLE[RateLimitExceeded]:  # each error of this class says its own wait
        return "as `Retry-After` says"
    if answer.retry_after_seconds is not None:
        return f"after {answer.retry_after_seconds} s"
    return "yes" if (status >= 500 or status == 408) and answer.should_retry is not False else "no"


if __name__ == "__main__":
    sys.stdout.write(error_table())
