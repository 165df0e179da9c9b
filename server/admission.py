"""Bounds how many sequences are in the house. Knows counts, not requests. Lives on the event loop, so needs no lock."""

from server.errors import InvalidRequest, QueueFull


class Admission:
    """Admits sequences up to a limit and says 429 beyond it."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self.admitted = 0

    def admit(self, count: int, *, asked_by: str = "n") -> "Ticket":
        """QueueFull when the house is full; InvalidRequest, of the field, for a request that could never come in."""
        if count > self.limit:
            raise InvalidRequest(
                f"the request asks for {count} sequences at once, this server takes {self.limit}", param=asked_by
            )
        if self.admitted + count > self.limit:
            raise QueueFull(
                f"{self.admitted} sequences are running or waiting, the limit is {self.limit}; try again soon"
            )
        self.admitted += count
        return Ticket(self, count)


class Ticket:
    """Room for some sequences, given back once, at the latest behind a `with` block."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._count = count

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Idempotent."""
        self._admission.admitted -= self._count
        self._count = 0
