"""A client that costs less than the servers it measures: blocking bytes on kept connections, no HTTP library."""

from __future__ import annotations

import re
import selectors
import socket
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
CHUNK_BYTES = 1 << 16
PATIENCE_SECONDS = 60.0


class Load:
    """So many connections to one server, each with one request at a time."""

    def __init__(self, port: int, *, connections: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(each, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()

    def send(self, requests: Iterable[bytes], *, status: bytes, header: bytes = b"") -> None:
        """Send requests, and check that each is answered with this status, and with this header."""
        unsent = iter(requests)
        begun = {each: bytearray() for each in self._sockets if _send_next(each, unsent)}
        while begun:
            answered = self._selector.select(PATIENCE_SECONDS)
            if not answered:
                raise TimeoutError("the server does not answer")
            for ready, _ in answered:
                connection: socket.socket = ready.fileobj  # type: ignore[assignment]
                response = begun[connection]
                received = connection.recv(CHUNK_BYTES)
                response += received
                if not received:
                    raise ConnectionError("the server has closed a connection")
                if not _is_complete(response):
                    continue
                if status not in response[:16] or header not in response:
                    raise ValueError(f"not what is measured: {bytes(response[:300])!r}")
                response.clear()
                if not _send_next(connection, unsent):
                    del begun[connection]


def _send_next(connection: socket.socket, unsent: Iterator[bytes]) -> bool:
    request = next(unsent, None)
    if request is None:
        return False
    connection.sendall(request)
    return True


def _is_complete(response: bytearray) -> bool:
    end = response.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = LENGTH.search(response, 0, end + 1)
    if length is None:
        return response.endswith(b"\r\n0\r\n\r\n")  # in chunks
    return len(response) >= end + 4 + int(length[1])
