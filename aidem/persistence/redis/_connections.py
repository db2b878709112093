"""The connections of one layer: a line and a listener for each event loop and process, closed with their loop."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet

from aidem._runtime.threads import Lock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from aidem.persistence.redis._line import Line
    from aidem.persistence.redis._listener import Listener
    from aidem.persistence.redis._wire import Command


class Lines(Protocol):
    """Takes commands: the line to one server, or the lines to the nodes of a cluster."""

    def ask(self, command: Command[Any]) -> None:
        """Send a command to the server that has its key; its future is always settled."""
        ...

    async def nodes(self) -> Sequence[Line]:
        """Return the line to each server that takes writes.

        Raises:
            IdempotencyPersistenceLayerError: The nodes of a cluster cannot be asked for.
        """
        ...

    async def aclose(self) -> None:
        """Wait for the commands that were asked so far, then close all connections."""
        ...

    async def abort(self) -> None:
        """Close all connections now."""
        ...


class Connections:
    """The connections that the calls of one event loop share.

    Attributes:
        line: Takes commands.
        listener: Tells waiters of changes.
    """

    __slots__ = ("line", "listener")

    def __init__(self, line: Lines, listener: Listener) -> None:
        self.line = line
        self.listener = listener

    async def aclose(self) -> None:
        """Wait for the commands that were asked so far, then close them."""
        await self.line.aclose()
        await self.listener.abort()

    async def abort(self) -> None:
        """Close them now."""
        await self.line.abort()
        await self.listener.abort()


class ConnectionsByLoop:
    """Finds the connections of the running event loop."""

    def __init__(self, make: Callable[[], Connections]) -> None:
        self._make = make
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[Connections, AsyncGenerator[None]]] = {}
        self._lock = Lock()
        _all.add(self)

    def here(self) -> Connections:
        """Return the connections of this event loop; the first call makes them."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            connections = self._make()
            found = connections, _closed_with_its_loop(connections)
            with self._lock:
                self._by_loop = {other: kept for other, kept in self._by_loop.items() if not other.is_closed()}
                self._by_loop[loop] = found
        return found[0]

    async def aclose(self) -> None:
        """Close the connections of this event loop; those of other loops are closed when their loops end."""
        with self._lock:
            found = self._by_loop.pop(asyncio.get_running_loop(), None)
        if found is not None:
            connections, guard = found
            await connections.aclose()
            await guard.aclose()

    def leave_to_parent(self) -> None:
        """Forget all connections, in a forked child: the sockets are the parent's, and must not be used."""
        _inherited.append(self._by_loop)
        self._by_loop = {}
        self._lock = Lock()


def _closed_with_its_loop(connections: Connections) -> AsyncGenerator[None]:
    """Return a generator that closes them when it is dropped, and when its loop shuts down its generators."""
    guard = _guard(connections)
    with suppress(StopIteration):
        guard.asend(None).send(None)  # up to its yield; from here on the loop knows the generator
    return guard


async def _guard(connections: Connections) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await connections.abort()


_all: Final[WeakSet[ConnectionsByLoop]] = WeakSet()
_inherited: Final[list[object]] = []  # kept, as their finalizers would close the sockets


def _after_fork_in_child() -> None:
    for connections in _all:
        connections.leave_to_parent()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork_in_child)
