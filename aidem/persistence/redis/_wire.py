"""One connection that all operations of an event loop share: commands go out packed, replies come back in order.

There is no task per operation. Callers wait for an `UncancellableFuture`, so one that is cancelled leaves its place
in the line, and nobody gets another's reply.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import hiredis

from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.redis._errors import LOST, MAY_BE_APPLIED, ReplyError, translated
from aidem.persistence.redis._server import Taker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem.persistence.redis._command import Command

_INCOMPLETE: Final = object()


class Owner(Protocol):
    """Whoever uses a wire."""

    def goes_on(self, command: Command[Any], error: ReplyError) -> bool:
        """Whether a command that was answered with an error is sent once more, here or elsewhere."""
        ...

    def heard(self) -> None:
        """Take note that replies came: whoever waited for them goes on in the next turn of the loop."""

    def lost(self, wire: Wire) -> None:
        """Use the wire no more."""


class Wire(Taker):
    """One connection, from its handshake on.

    Attributes:
        sent: The commands whose replies are outstanding, in their order.
        used_at: When it was last written to or read from, in seconds of the loop's clock.
        closed: Done when its socket is closed.
    """

    def __init__(self, owner: Owner, *, timeout_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.sent: deque[Command[Any]] = deque()
        self.used_at = self._loop.time()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._owner = owner
        self._timeout_seconds = timeout_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport  # nobody has the wire before it is connected
        self._is_ending = False
        self._error: IdempotencyPersistenceConnectionError | None = None
        self._reader = hiredis.Reader(replyError=ReplyError, notEnoughData=_INCOMPLETE)

    def send(self, commands: Sequence[Command[Any]]) -> None:
        """Write commands, all at once."""
        self.sent.extend(commands)
        self.used_at = self._loop.time()
        if self._timer is None:
            self._watch()
        self._transport.write(b"".join([command.packed for command in commands]))

    def abort(self, error: IdempotencyPersistenceConnectionError | None = None) -> None:
        """Close it now; what is outstanding fails, and may have been applied."""
        self._error = self._error or error
        self._transport.abort()

    # --- Called by the event loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over a connection whose handshake is done."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are complete."""
        self.used_at = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._take(reply)
        except hiredis.ProtocolError:
            self._break("what answers is not Redis")
        self._owner.heard()
        if self._is_ending and not self.sent:
            self.abort()

    def eof_received(self) -> None:
        """Use it no more: the server has closed its side; what closes ours comes by itself."""
        self._owner.lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is outstanding."""
        self._owner.lost(self)
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)
        while self.sent:
            failure = IdempotencyPersistenceConnectionError(str(self._error or f"{LOST}; {MAY_BE_APPLIED}"))
            failure.__cause__ = exc
            self.sent.popleft().fail(failure)

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _take(self, reply: object) -> None:
        if not self.sent:
            self._break("Redis said what nobody had asked for")
            return
        command = self.sent.popleft()
        if not isinstance(reply, ReplyError):
            command.answer(reply)
        elif not self._owner.goes_on(command, reply):
            command.fail(translated(reply))
            if reply.ends_connection:
                self._owner.lost(self)
                self._is_ending = True

    def _watch(self) -> None:
        """Break the connection when the oldest command has waited too long; replies come in order."""
        self._timer = None
        if not self.sent:
            return
        due = self.sent[0].asked_at + self._timeout_seconds
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._watch)
        else:
            self._break(f"Redis did not answer within {self._timeout_seconds:g} s, which timeout_seconds allows")

    def _break(self, what: str) -> None:
        self._owner.lost(self)
        self.abort(IdempotencyPersistenceConnectionError(f"{what}; {MAY_BE_APPLIED}"))
