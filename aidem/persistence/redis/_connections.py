"""The connections of one layer in one event loop: a line and a listener."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem.persistence.redis._line import Line
    from aidem.persistence.redis._listener import Listener
    from aidem.persistence.redis._wire import Command


class Lines(Protocol):
    """What takes commands: the line to one server, or the lines to the nodes of a cluster."""

    def ask(self, command: Command[Any]) -> None:
        """Send a command to where its key is; its future is settled, whatever happens."""
        ...

    async def nodes(self) -> Sequence[Line]:
        """Return the line to each server that takes writes.

        Raises:
            IdempotencyPersistenceLayerError: It is not known which they are.
        """
        ...

    async def aclose(self) -> None:
        """Finish what was asked so far, then close all connections."""
        ...

    async def abort(self) -> None:
        """Close all connections now."""
        ...


class Connections:
    """What the calls of one event loop share.

    Attributes:
        line: Takes commands.
        listener: Hears of changes.
    """

    __slots__ = ("line", "listener")

    def __init__(self, line: Lines, listener: Listener) -> None:
        self.line = line
        self.listener = listener

    async def aclose(self) -> None:
        """Finish what was asked so far, then close them."""
        await self.line.aclose()
        await self.listener.abort()

    async def abort(self) -> None:
        """Close them now."""
        await self.line.abort()
        await self.listener.abort()
