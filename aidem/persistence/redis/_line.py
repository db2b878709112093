"""The line from one event loop to one server: it connects on first use, and again after the connection was lost.

A command goes out at once while the connection is idle, so that one task alone has no delay. While replies are
outstanding, commands collect. They go out together when the next replies have come, or as soon as there are enough of
them to keep the server busy.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence._errors import copy_of
from aidem.persistence.redis._errors import CLOSED, LOST, failure_of
from aidem.persistence.redis._wire import Asking, Command, Question, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem.exceptions import IdempotencyPersistenceLayerError
    from aidem.persistence.redis._errors import ReplyError
    from aidem.persistence.redis._server import Endpoint, Server

IDLE_SECONDS: Final = 1.0
"""After how much idle time a connection is checked before it is written to."""

COLLECTED_AT_MOST: Final = 16
"""How many commands collect at most while replies are outstanding."""


class Detours(Protocol):
    """Handles commands that one server of several does not serve."""

    def redirected(self, line: Line, command: Command[Any], error: ReplyError) -> bool:
        """Return whether a command that the server has refused is sent to another one, or waits for one."""
        ...

    def stranded(self, line: Line, commands: Sequence[Command[Any]], failure: IdempotencyPersistenceLayerError) -> None:
        """Take commands that were not sent, as the connection was lost or could not be made."""


class Line:
    """Takes the commands of one event loop for one server.

    Attributes:
        server: The server, or the servers of which one is connected to.
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
        """Send a command, now or with others; its future is always settled."""
        wire = self._wire
        if wire is None or wire.sent or self._is_flush_due:
            self.again(command)
        else:
            self._waiting.append(command)
            self._flush()

    def query(self, *arguments: str) -> UncancellableFuture[Any]:
        """Send a command; return a future of its reply."""
        future: UncancellableFuture[Any] = UncancellableFuture(loop=self._loop)
        self.ask(Question(future, *arguments))
        return future

    def ask_importing(self, command: Command[Any]) -> None:
        """Send a command to a node that is importing its slot."""
        command.in_full()  # ASKING counts for one command: EVAL after a NOSCRIPT error would not be let in
        self._waiting.append(Asking(command))
        self.ask(command)

    async def nodes(self) -> Sequence[Line]:
        """Return itself."""
        return (self,)

    def again(self, command: Command[Any]) -> None:
        """Send a command with the next ones."""
        self._waiting.append(command)
        if self._wire is None:
            self._connect()
        elif len(self._waiting) >= COLLECTED_AT_MOST and not self._has_been_idle(self._wire):
            self._write(self._wire)

    def goes_on(self, command: Command[Any], error: ReplyError) -> bool:
        """Return whether a command that was answered with an error is sent once more, here or elsewhere."""
        if command.wants_source(error):
            self.again(command)
            return True
        return self._detours is not None and self._detours.redirected(self, command, error)

    def heard(self) -> None:
        """Send the commands that have collected, and those that the receivers of the replies ask for now."""
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
                command.future.give_up_at(command.asked_at + self._timeout_seconds)  # its waiting time counts
                self.again(command)

    async def aclose(self) -> None:
        """Wait for the commands that were asked so far, then close the connection; a later command connects again."""
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
        """Return the futures of commands that are not answered yet."""
        sent = () if self._wire is None else self._wire.sent
        return [command.future for command in (*self._waiting, *sent) if not command.future.done()]

    def _flush(self, *, has_looked: bool = False) -> None:
        wire = self._wire
        if wire is not None and not has_looked and self._has_been_idle(wire):
            # The process may have been frozen: in two turns of the loop it learns whether the server has closed it.
            self._is_flush_due = True
            self._loop.call_soon(self._loop.call_soon, partial(self._flush, has_looked=True))
            return
        self._is_flush_due = False
        if wire is not None:  # else it was lost meanwhile, and the commands go out on the next one
            self._write(wire)

    def _has_been_idle(self, wire: Wire) -> bool:
        return self._loop.time() - wire.used_at > IDLE_SECONDS

    def _write(self, wire: Wire) -> None:
        waiting, self._waiting = self._waiting, []
        commands = [command for command in waiting if not command.future.done()]  # the others were given up
        if commands:
            wire.send(commands)

    def _connect(self) -> None:
        if self._connecting is None:
            # In an empty context: the connection outlives the caller, and must not keep its context variables alive.
            task = self._loop.create_task(self._connected(), name="aidem connects to Redis", context=Context())
            self._connecting = task
            self._connecting.add_done_callback(self._connecting_ended)

    async def _connected(self) -> None:
        wire = await self.server.reach(self._wire_to, timeout_seconds=self._timeout_seconds)
        self._connecting = None
        self._wire = wire
        for command in self._waiting:
            command.asked_at = self._loop.time()  # connecting may have taken most of the time-out
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
