"""Buckets fill with time, refuse when they are empty, and stay few."""

import pytest

from server.errors import RateLimitExceeded
from server.rate_limits import RateLimits, show_duration
from tests.fakes import ManualClock


def limits_of(
    clock: ManualClock, *, requests: int | None = None, tokens: int | None = None, max_clients: int = 100
) -> RateLimits:
    return RateLimits(requests_per_minute=requests, tokens_per_minute=tokens, max_clients=max_clients, clock=clock)


def admitted(limits: RateLimits, client: str, tries: int) -> int:
    """Of so many tries, those that came in."""
    count = 0
    for _ in range(tries):
        try:
            limits.admit(client)
        except RateLimitExceeded:
            continue
        count += 1
    return count


def test_a_minutes_worth_comes_at_once_and_then_evenly() -> None:
    clock = ManualClock()
    limits = limits_of(clock, requests=30)
    assert admitted(limits, "a", 40) == 30
    clock.advance(2.0)
    assert admitted(limits, "a", 5) == 1
    clock.advance(3600.0)
    assert admitted(limits, "a", 40) == 30


def test_refusal_says_when_to_come_back_and_is_right() -> None:
    clock = ManualClock()
    limits = limits_of(clock, requests=7)
    assert admitted(limits, "a", 7) == 7
    with pytest.raises(RateLimitExceeded, match="7 requests per minute") as refused:
        limits.admit("a")
    assert refused.value.retry_after_seconds == 9  # 60 / 7, rounded up
    clock.advance(60 / 7 - 0.01)
    assert admitted(limits, "a", 1) == 0
    clock.advance(0.02)
    assert admitted(limits, "a", 1) == 1


def test_clients_do_not_share_a_bucket() -> None:
    limits = limits_of(ManualClock(), requests=2)
    assert [admitted(limits, client, 3) for client in ("a", "b")] == [2, 2]


def test_tokens_are_taken_afterwards_and_may_be_overdrawn() -> None:
    clock = ManualClock()
    limits = limits_of(clock, tokens=600)
    limits.admit("a")
    limits.charge("a", 900)
    with pytest.raises(RateLimitExceeded, match="600 tokens per minute") as refused:
        limits.admit("a")
    assert refused.value.retry_after_seconds == 31  # 300 of debt and one token more, at ten a second
    clock.advance(31.0)
    limits.admit("a")


def test_request_refused_for_its_tokens_is_not_counted_as_one() -> None:
    clock = ManualClock()
    limits = limits_of(clock, requests=2, tokens=60)
    limits.admit("a")
    limits.charge("a", 60)
    assert admitted(limits, "a", 5) == 0
    assert limits.headers("a")["x-ratelimit-remaining-requests"] == "1"


def test_headers_tell_limit_rest_and_time_until_full() -> None:
    clock = ManualClock()
    limits = limits_of(clock, requests=6, tokens=600)
    limits.admit("a")
    limits.charge("a", 900)
    assert limits.headers("a") == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    clock.advance(2.0)
    assert limits.headers("a")["x-ratelimit-reset-requests"] == "8s"


def test_what_has_no_limit_is_neither_counted_nor_shown() -> None:
    limits = limits_of(ManualClock())
    assert not limits.is_on
    assert admitted(limits, "a", 1000) == 1000
    limits.charge("a", 10**9)
    assert limits.headers("a") == {}


def test_memory_is_bounded_however_many_clients_come() -> None:
    limits = limits_of(ManualClock(), requests=1, max_clients=50)
    assert sum(admitted(limits, f"client {i}", 2) for i in range(1000)) == 1000
    assert limits.num_clients == 50
    assert admitted(limits, "client 999", 1) == 0  # who came last is not forgotten


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.0004, "1ms"), (0.12, "120ms"), (1, "1s"), (2.5, "2.5s"), (60, "1m0s"), (90.25, "1m30.25s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown
