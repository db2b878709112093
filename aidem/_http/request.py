"""The body of a request: read and hashed before its key is claimed, then handed on."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from aidem._http.types import header_values, length_in

if TYPE_CHECKING:
    from aidem._http.fingerprint import Fingerprint
    from aidem._http.types import Message, Receive, Scope


PIECE_BYTES: Final = 64 * 1024
"""Smaller chunks are joined up to this: each is a message, and a client that sends single bytes must cost no more."""


class BodyTooLargeError(Exception):
    """The body is larger than it may be."""


class ClientGoneError(Exception):
    """The client went before all of the body had come."""


class RequestBody:
    """A body that was read; `receive` hands it out again, and after it whatever comes."""

    __slots__ = ("_pieces", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pieces: deque[bytearray] = deque()

    async def read(self, scope: Scope, fingerprint: Fingerprint, *, limit: int) -> None:
        """Read all of it into memory.

        Raises:
            BodyTooLargeError: It is larger than `limit` bytes.
            ClientGoneError: It will never be complete.
        """
        if (length_in(header_values(scope["headers"], b"content-length")) or 0) > limit:
            raise BodyTooLargeError  # before the client is told to go on sending
        received = 0
        more_body = True
        while more_body:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            chunk = message.get("body", b"")
            received += len(chunk)
            if received > limit:
                raise BodyTooLargeError
            fingerprint.update(chunk)
            self._keep(chunk)
            more_body = message.get("more_body", False)

    def _keep(self, chunk: bytes) -> None:
        if self._pieces and len(self._pieces[-1]) < PIECE_BYTES:
            self._pieces[-1] += chunk
        else:
            self._pieces.append(bytearray(chunk))

    @property
    def whole(self) -> bytes:
        """All of it, before any of it is handed out."""
        return b"".join(self._pieces)

    async def receive(self) -> Message:
        """Return the next message."""
        if not self._pieces:
            return await self._receive()
        piece = bytes(self._pieces.popleft())
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
