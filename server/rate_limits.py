"""Bounds how often a client may ask and how many tokens it may use. Knows clients by a name and time; no HTTP.

Each client has two buckets, of requests and of tokens, that hold a minute's worth and fill up evenly. What a request
uses is known when it has ended: it comes in while there are any tokens, and what it used is taken then, so that a
bucket may be overdrawn and its client waits the longer. Lives on the event loop, so needs no lock.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cachetools import LRUCache

from server.errors import RateLimitExceeded

MAX_CLIENTS = 10_000  # beyond it, whoever asked longest ago is forgotten; an idle minute fills buckets again anyway
WINDOW_SECONDS = 60.0


class TokenBucket:
    """Fills up to `capacity` within a minute."""

    def __init__(self, capacity: int, *, now: float) -> None:
        self.capacity = capacity
        self._level = float(capacity)
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; negative if it is overdrawn."""
        filled = self._level + (now - self._at) * self.capacity / WINDOW_SECONDS
        self._level, self._at = min(float(self.capacity), filled), now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Also more than there is."""
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        """Until there is so much in it, if nobody takes any; 0 if there is."""
        return max(0.0, (level - self.level(now)) * WINDOW_SECONDS / self.capacity)


@dataclass(frozen=True, slots=True)
class ClientBuckets:
    """What is left to one client, by what is counted. What has no limit has no bucket."""

    by_kind: Mapping[str, TokenBucket]  # "requests", "tokens"

    def headers(self, now: float) -> dict[str, str]:
        """As OpenAI names them."""
        shown = {}
        for kind, bucket in self.by_kind.items():
            shown[f"x-ratelimit-limit-{kind}"] = str(bucket.capacity)
            shown[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level(now))))
            shown[f"x-ratelimit-reset-{kind}"] = show_duration(bucket.seconds_until(bucket.capacity, now))
        return shown


class RateLimits:
    """The buckets of every client that asked lately."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        max_clients: int = MAX_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._limits = {kind: limit for kind, limit in limits.items() if limit is not None}
        self._clients: LRUCache[str, ClientBuckets] = LRUCache(max_clients)
        self._clock = clock

    @property
    def is_on(self) -> bool:
        """Whether anything is limited."""
        return bool(self._limits)

    @property
    def num_clients(self) -> int:
        """How many are remembered."""
        return len(self._clients)

    def admit(self, client: str) -> None:
        """Takes one request. RateLimitExceeded, and nothing taken, if the client has no request or no token left."""
        buckets = self._buckets(client)
        now = self._clock()
        for kind, bucket in buckets.by_kind.items():
            wait_seconds = bucket.seconds_until(1, now)
            if wait_seconds > 0:
                raise RateLimitExceeded(
                    f"the limit is {bucket.capacity} {kind} per minute; try again in {show_duration(wait_seconds)}",
                    limit=kind,
                    retry_after_seconds=math.ceil(wait_seconds),
                )
        if (requests := buckets.by_kind.get("requests")) is not None:
            requests.take(1, now)

    def charge(self, client: str, num_tokens: int) -> None:
        """Takes the tokens that a request has used."""
        if (tokens := self._buckets(client).by_kind.get("tokens")) is not None:
            tokens.take(num_tokens, self._clock())

    def headers(self, client: str) -> dict[str, str]:
        """What is left to the client, for its answer."""
        return self._buckets(client).headers(self._clock())

    def _buckets(self, client: str) -> ClientBuckets:
        buckets = self._clients.get(client)
        if buckets is None:
            now = self._clock()
            buckets = ClientBuckets({kind: TokenBucket(limit, now=now) for kind, limit in self._limits.items()})
            self._clients[client] = buckets
        return buckets


def show_duration(seconds: float) -> str:
    """`1m30s`, `2.5s` or `120ms`, rounded up, as OpenAI writes it."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
