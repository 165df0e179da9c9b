"""A TCP proxy that breaks connections where a test wants it."""

import contextlib
import socket
import threading
from typing import Self

READ_BYTES = 4096
LINGER_NOT_AT_ALL = b"\x01\0\0\0\0\0\0\0"  # closing sends a reset, as a broken link does


class BreakingProxy:
    """Passes bytes between clients and a local port. Resets a connection after each of `breaks` bytes from there."""

    def __init__(self, port: int, *, breaks: list[int], num_refused: int = 0) -> None:
        """After the last break so many connections are reset at once, unless mend() comes first."""
        self.num_passed = 0
        self.num_connections = 0
        self._upstream = ("127.0.0.1", port)
        self._breaks = list(breaks)
        self._num_refused = num_refused
        self._num_to_refuse = 0
        self._since_break = 0
        self._changing = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._open: list[socket.socket] = []

    def mend(self) -> None:
        """Nothing breaks from now on."""
        with self._changing:
            self._num_to_refuse, self._breaks = 0, []

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                if self._is_refused():
                    _reset(client)
                    continue
                server = socket.create_connection(self._upstream)
                self._open += [client, server]
                for target, ends in ((self._answer, (server, client)), (_pass_on, (client, server))):
                    thread = threading.Thread(target=target, args=ends, name="proxy-connection")
                    self._threads.append(thread)
                    thread.start()

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with server, contextlib.suppress(OSError):
            while chunk := server.recv(READ_BYTES):
                if self._breaks_within(len(chunk)):
                    break
                client.sendall(chunk)
            else:
                client.shutdown(socket.SHUT_WR)
                return
        _reset(client)

    def _is_refused(self) -> bool:
        with self._changing:
            self._num_to_refuse -= 1
            return self._num_to_refuse >= 0

    def _breaks_within(self, num_bytes: int) -> bool:
        with self._changing:
            if self._num_to_refuse > 0:
                return True
            self._since_break += num_bytes
            if not self._breaks or self._since_break < self._breaks[0]:
                self.num_passed += num_bytes
                return False
            del self._breaks[0]
            self._since_break = 0
            self._num_to_refuse = 0 if self._breaks else self._num_refused
            return True


def _pass_on(client: socket.socket, server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := client.recv(READ_BYTES):
            server.sendall(chunk)
        server.shutdown(socket.SHUT_WR)
    client.close()


def _reset(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT_AT_ALL)
        client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
    client.close()
