"""The connections of one layer on one event loop: a line and a listener."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

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
