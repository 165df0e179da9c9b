"""The clients of the load test, in a process of their own: they ask, hang up, send nonsense, and judge every answer.

Reads one plan as a line of JSON, writes what came of it as another. An answer that differs in any way from the one that
the idle server gave is a failure, as is every ending that the plan doesn't allow for.
"""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.benchmarks.event_streams import Connection, CutOff, Head
from tests.benchmarks.load_answers import Case, StreamedAnswer
from tests.benchmarks.load_cases import BadRequest, bad_requests

NICENESS = 5  # below the server's priority: it should be the one that is never idle
HANG_UP_POINTS = ("in the request", "after the request", "after the headers", "in the stream")
MAX_SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Who asks what for how long. With `leaving`, each asks once, and once more when that has ended."""

    port: int
    model: str
    num_clients: int
    seconds: float
    seed: int
    cases: Sequence[Case]
    leaving: bool = False


@dataclass(slots=True)
class Tally:
    """What came of all requests."""

    finished: int = 0  # streams, each equal to its reference
    tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    hung_up: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # bad requests, by what is bad
    told: int = 0  # by an error event
    full: int = 0  # 429, asked again
    late: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def shown(self) -> dict[str, Any]:
        """As JSON, with the first failures and the number of all."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"failures": self.failures[:MAX_SHOWN_FAILURES], "num_failures": len(self.failures)}


class Clients:
    """All clients of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bad = bad_requests(plan.model)
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + plan.seconds
        self._num_begun = 0
        self._all_begun = asyncio.Event()
        self.tally = Tally()

    async def run(self) -> None:
        """Until the plan's time is over and every answer has come."""
        one = self._leave if self._plan.leaving else self._keep_asking
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.num_clients):
                group.create_task(one(Random(f"{self._plan.seed}-{number}")))

    async def _keep_asking(self, random: Random) -> None:
        connection = Connection(self._plan.port)
        await asyncio.sleep(random.random())
        while self._loop.time() < self._end:
            kind = random.random()
            try:
                if kind < 0.1:
                    await self._hang_up(connection, random.choice(HANG_UP_POINTS), random)
                elif kind < 0.2:
                    await self._ask_badly(connection, random.choice(self._bad), random)
                else:
                    await self._ask(connection, random.choice(self._plan.cases), random)
            except (CutOff, OSError) as error:
                self.tally.fail(f"{type(error).__name__}: {error}")
                connection.hang_up()
        connection.hang_up()

    async def _ask(self, connection: Connection, case: Case, random: Random) -> None:
        await connection.send(_streamed(case.request))
        head = await self._head(connection)
        if head.status == 429:
            await self._wait_for_room(connection, head, random)
        elif head.status == 200:
            await self._judge(connection, head, case)
        else:
            self.tally.fail(f"{head.status}: {await connection.body(head)}")

    async def _ask_badly(self, connection: Connection, bad: BadRequest, random: Random) -> None:
        await connection.send(bad.content)
        head = await self._head(connection)
        if head.status == 429:
            await self._wait_for_room(connection, head, random)
            return
        body = await connection.body(head)
        if head.status != bad.status or not body["error"]["message"]:
            self.tally.fail(f"{bad.name}: {head.status} {body}")
        self.tally.refused[bad.name] += 1

    async def _hang_up(self, connection: Connection, point: str, random: Random) -> None:
        case = random.choice(self._plan.cases)
        await connection.send(
            _streamed(case.request | {"max_tokens": 200}), share=random.random() if point == HANG_UP_POINTS[0] else 1.0
        )
        if point == "after the request":
            await asyncio.sleep(random.choice((0, 0.05, 1.0)))
        elif point != "in the request":
            head = await self._head(connection)
            if head.status not in (200, 429):
                self.tally.fail(f"{head.status}: {await connection.body(head)}")
            elif head.status == 200 and point == "in the stream":
                await self._read_some(connection, head, case, num_events=random.randrange(1, 30))
        self.tally.hung_up[point] += 1
        connection.hang_up(rudely=random.random() < 0.5)

    async def _read_some(self, connection: Connection, head: Head, case: Case, *, num_events: int) -> None:
        answer = StreamedAnswer()
        async for event in connection.events(head):
            answer.take(event)
            num_events -= 1
            if num_events == 0:
                break
        if (straying := answer.straying(case)) is not None:
            self.tally.fail(f"{case.request}: {straying}")

    async def _head(self, connection: Connection) -> Head:
        head = await connection.head()
        self.tally.statuses[str(head.status)] += 1
        return head

    async def _wait_for_room(self, connection: Connection, head: Head, random: Random) -> None:
        self.tally.full += 1
        body = await connection.body(head)
        if body["error"]["type"] != "rate_limit_error" or "retry-after" not in head.headers:
            self.tally.fail(f"429 without its words: {head.headers} {body}")
        await asyncio.sleep(float(head.headers.get("retry-after", 1)) * (1 + random.random()))

    async def _judge(self, connection: Connection, head: Head, case: Case) -> None:
        answer = StreamedAnswer()
        async for event in connection.events(head):
            answer.take(event)
        if answer.error is not None and self._plan.leaving and answer.error["code"] == "shutting_down":
            self.tally.told += 1
            if not case.text.startswith(answer.text):
                self.tally.fail(f"{case.request}: {answer.text!r} is no beginning of {case.text!r}")
        elif (difference := answer.difference(case)) is not None:
            self.tally.fail(f"{case.request}: {difference}")
        else:
            self.tally.finished += 1
            self.tally.tokens += case.completion_tokens

    async def _leave(self, random: Random) -> None:
        connection = Connection(self._plan.port)
        try:
            await connection.send(_streamed((case := random.choice(self._plan.cases)).request))
            try:
                head = await self._head(connection)
            finally:
                self._note_begun()
            if head.status == 200:
                await self._judge(connection, head, case)
            elif head.status in (429, 503):
                await connection.body(head)
                self.tally.told += 1
            else:
                self.tally.fail(f"{head.status}: {await connection.body(head)}")
        except (CutOff, OSError) as error:
            self.tally.fail(f"{type(error).__name__}: {error}")
        connection.hang_up()
        await self._all_begun.wait()
        await asyncio.sleep(0.5)  # in which SIGTERM comes
        await self._come_late(Connection(self._plan.port), random)

    async def _come_late(self, connection: Connection, random: Random) -> None:
        """Asks a server that leaves: it answers 503, or not at all once it no longer listens."""
        case = random.choice(self._plan.cases)
        try:
            await connection.send(_streamed(case.request))
            head = await connection.head()
        except (CutOff, OSError):
            self.tally.late["nobody there"] += 1
            return
        self.tally.late[str(head.status)] += 1
        if head.status == 200:
            await self._judge(connection, head, case)
        elif head.status != 503 or "retry-after" not in head.headers:
            self.tally.fail(f"a late request: {head}")

    def _note_begun(self) -> None:
        """Says when all clients have their headers, so that the server can be told to leave."""
        self._num_begun += 1
        if self._num_begun == self._plan.num_clients:
            self._all_begun.set()
            print(json.dumps("begun"), flush=True)


def _streamed(request: dict[str, Any]) -> bytes:
    return json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()


async def run(plan: Plan) -> Tally:
    """What came of a plan."""
    clients = Clients(plan)
    await clients.run()
    return clients.tally


def main() -> None:
    """Serves its standard input."""
    os.nice(NICENESS)
    for line in sys.stdin:
        given = json.loads(line)
        plan = Plan(**given | {"cases": [Case(**case) for case in given["cases"]]})
        print(json.dumps(asyncio.run(run(plan)).shown()), flush=True)


if __name__ == "__main__":
    main()
