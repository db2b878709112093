"""One connection to a server: commands go out packed, and replies come back in the same order.

There is no task for each command. Callers wait for an `UncancellableFuture`, so a caller that is cancelled leaves its
command in its place, and nobody gets the reply to another command.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar, cast

import hiredis

from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.redis._errors import LOST, MAY_BE_APPLIED, ReplyError, translated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.redis._scripts import Script

T = TypeVar("T")

_INCOMPLETE: Final = object()

pack: Final[Callable[[tuple[str | int, ...]], bytes]] = cast("Any", hiredis).pack_command


class Command(Generic[T]):
    """A command, who waits for its answer, and how a reply becomes one.

    Attributes:
        future: Gets the answer or the error.
        packed: The bytes to send.
        asked_at: When it was asked for, in seconds of the event loop's clock.
    """

    __slots__ = ("_arguments", "_read", "_script", "asked_at", "future", "packed")

    def __init__(
        self,
        future: UncancellableFuture[T],
        arguments: tuple[str | int, ...],
        read: Callable[[Any], T],
        script: Script | None = None,
    ) -> None:
        self.future = future
        self.packed: bytes
        self.asked_at = future.get_loop().time()
        self._read = read
        self._script = script
        self._arguments = arguments
        if script is None:
            self.packed = pack(arguments)
        else:
            self.packed = pack(("EVALSHA", script.sha, *arguments))

    @property
    def key(self) -> str:
        """The key that it is about; the first argument of a script is the number of its keys."""
        return str(self._arguments[1])

    def wants_source(self, error: ReplyError) -> bool:
        """Return whether the server does not have the script; `packed` then holds its source."""
        return error.code == "NOSCRIPT" and self.in_full()

    def in_full(self) -> bool:
        """Put the source of the script into `packed`; return False if there is none, or it is there already."""
        script, self._script = self._script, None
        if script is None:
            return False
        self.packed = pack(("EVAL", script.source, *self._arguments))
        return True

    def answer(self, reply: object) -> None:
        """Settle it with the reply of the server."""
        try:
            answer = self._read(reply)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            self.fail(error)
        else:
            self.future.settle(answer)

    def fail(self, error: Exception) -> None:
        """Settle it with an error."""
        self.future.fail(error)


class Question(Command[Any]):
    """A command for one server, which is never sent to another one in its place."""

    __slots__ = ()

    def __init__(self, future: UncancellableFuture[Any], *arguments: str | int) -> None:
        super().__init__(future, arguments, lambda reply: reply)


class Asking(Command[Any]):
    """Lets the next command in at a node that is importing its slot; it succeeds or fails with that command."""

    __slots__ = ()

    def __init__(self, command: Command[Any]) -> None:
        super().__init__(command.future, ("ASKING",), lambda reply: reply)

    def answer(self, reply: object) -> None:
        """Leave it to the reply that comes next."""


class Owner(Protocol):
    """The user of a wire."""

    def goes_on(self, command: Command[Any], error: ReplyError) -> bool:
        """Return whether a command that was answered with an error is sent once more, here or elsewhere."""
        ...

    def heard(self) -> None:
        """Take note that replies came: their callers go on in the next turn of the event loop."""

    def lost(self, wire: Wire) -> None:
        """Stop using the wire."""


class Wire(asyncio.Protocol):
    """One connection, from its handshake on.

    Attributes:
        sent: The commands whose replies are outstanding, in their order.
        used_at: When it was last written to or read from, in seconds of the event loop's clock.
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
        self._transport: asyncio.Transport  # a wire is used only once it is connected
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
        """Close it now; outstanding commands fail, and may have been applied."""
        self._error = self._error or error
        self._transport.abort()

    # --- Called by the event loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
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
        """Stop using it, as the server has closed its side; asyncio closes ours."""
        self._owner.lost(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the outstanding commands."""
        self._owner.lost(self)
        if self._timer is not None:
            self._timer.cancel()
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
