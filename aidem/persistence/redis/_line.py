"""The line to one server from one event loop: it connects when it is needed, and again after the connection broke.

An idle connection is written to at once, so one task alone pays no delay. While replies are outstanding, commands
collect, and go out together when the next replies have come, or when there are enough of them to keep the server busy
while we go on.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.redis._errors import CLOSED, LOST, copy_of, failure_of
from aidem.persistence.redis._wire import Asking, Command, Question, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem.exceptions import IdempotencyPersistenceLayerError
    from aidem.persistence.redis._errors import ReplyError
    from aidem.persistence.redis._server import Endpoint, Server

IDLE_SECONDS: Final = 1.0
"""After how long a connection is looked at before it is written to."""

COLLECTED_AT_MOST: Final = 16
"""How many commands collect while replies are outstanding."""


class Detours(Protocol):
    """Knows what becomes of commands that one server of many does not serve."""

    def redirected(self, line: Line, command: Command[Any], error: ReplyError) -> bool:
        """Whether a command that the server has refused goes on elsewhere."""
        ...

    def stranded(self, line: Line, commands: Sequence[Command[Any]], failure: IdempotencyPersistenceLayerError) -> None:
        """Take what was not sent: there is no connection any more, or none could be made."""


class Line:
    """Takes commands from anywhere in one event loop.

    Attributes:
        server: Where they go.
    """

    def __init__(self, server: Endpoint, *, timeout_seconds: float, detours: Detours | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self.server = server
        self._detours = detours
        self._timeout_seconds = timeout_seconds
        self._wire: Wire | None = None
        self._waiting: list[Command[Any]] = []
        self._is_flush_due = False
        self._connecting: asyncio.Task[None] | None = None

    def ask(self, command: Command[Any]) -> None:
        """Send a command as soon as that makes sense; its future is settled, whatever happens."""
        wire = self._wire
        if wire is None or wire.sent or self._is_flush_due:
            self.again(command)
        else:
            self._waiting.append(command)
            self._flush()

    def query(self, *arguments: str) -> UncancellableFuture[Any]:
        """Send a command; answer the reply as it comes."""
        future: UncancellableFuture[Any] = UncancellableFuture(loop=self._loop)
        self.ask(Question(future, *arguments))
        return future

    def ask_importing(self, command: Command[Any]) -> None:
        """Send a command to a node that is importing its slot."""
        command.in_full()  # if it was sent again because the node does not know the script, it would not be let in
        self._waiting.append(Asking(command))
        self.ask(command)

    async def nodes(self) -> Sequence[Line]:
        """Return all that records are kept behind: itself."""
        return (self,)

    def again(self, command: Command[Any]) -> None:
        """Send a command with what goes out next."""
        self._waiting.append(command)
        if self._wire is None:
            self._connect()
        elif len(self._waiting) >= COLLECTED_AT_MOST and not self._has_been_idle(self._wire):
            self._write(self._wire)

    def goes_on(self, command: Command[Any], error: ReplyError) -> bool:
        """Whether a command that was answered with an error is sent once more, here or elsewhere."""
        if command.wants_source(error):
            self.again(command)
            return True
        return self._detours is not None and self._detours.redirected(self, command, error)

    def heard(self) -> None:
        """Send what was collected, and what those who got the replies ask for now."""
        self._is_flush_due = True
        self._loop.call_soon(self._flush)

    def lost(self, wire: Wire) -> None:
        """Use the wire no more."""
        if self._wire is wire:
            self._wire = None
            waiting, self._waiting = self._waiting, []
            if self._detours is not None:
                self._detours.stranded(self, waiting, IdempotencyPersistenceConnectionError(LOST))
                return
            for command in waiting:
                command.future.give_up_at(command.asked_at + self._timeout_seconds)  # it has waited before
                self.again(command)

    async def aclose(self) -> None:
        """Finish what was asked so far, then close the connection; a later command opens it anew."""
        while pending := self.pending():
            await asyncio.wait(pending)
        await self.abort()

    async def abort(self) -> None:
        """Close the connection now."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort(IdempotencyPersistenceConnectionError(CLOSED))
            await asyncio.wait([wire.closed])

    def pending(self) -> list[asyncio.Future[Any]]:
        """Return what was asked and is not answered yet."""
        sent = () if self._wire is None else self._wire.sent
        return [command.future for command in (*self._waiting, *sent) if not command.future.done()]

    def _flush(self, *, has_looked: bool = False) -> None:
        wire = self._wire
        if wire is not None and not has_looked and self._has_been_idle(wire):
            # Two turns of the loop tell whether the server has closed it meanwhile: the process may have been frozen.
            self._is_flush_due = True
            self._loop.call_soon(self._loop.call_soon, partial(self._flush, has_looked=True))
            return
        self._is_flush_due = False
        if wire is not None:  # else it was lost in between: it all goes out when there is another
            self._write(wire)

    def _has_been_idle(self, wire: Wire) -> bool:
        return self._loop.time() - wire.used_at > IDLE_SECONDS

    def _write(self, wire: Wire) -> None:
        waiting, self._waiting = self._waiting, []
        commands = [command for command in waiting if not command.future.done()]  # what was given up is never sent
        if commands:
            wire.send(commands)

    def _connect(self) -> None:
        if self._connecting is None:
            # In an empty context: the connection outlives the caller, and must not keep what that has in its own.
            task = self._loop.create_task(self._connected(), name="aidem connects to Redis", context=Context())
            self._connecting = task
            self._connecting.add_done_callback(self._connecting_ended)

    async def _connected(self) -> None:
        wire = await self.server.reach(self._wire_to, timeout_seconds=self._timeout_seconds)
        self._connecting = None
        self._wire = wire
        for command in self._waiting:
            command.asked_at = self._loop.time()  # or a connection that took long would be given up at once
        self._flush()

    async def _wire_to(self, server: Server, timeout_seconds: float) -> Wire:
        wire = Wire(self, timeout_seconds=self._timeout_seconds)
        await server.connect(wire, timeout_seconds=timeout_seconds)
        return wire

    def _connecting_ended(self, task: asyncio.Task[None]) -> None:
        failure = failure_of(task)
        if failure is not None:
            self._connecting = None
            waiting, self._waiting = self._waiting, []
            if self._detours is not None:
                self._detours.stranded(self, waiting, failure)
                return
            for command in waiting:
                command.fail(copy_of(failure))
