"""The lifespan of an app: its persistence layer is opened before the app starts, and closed after it has ended."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from aidem.exceptions import IdempotencyPersistenceConnectionError

if TYPE_CHECKING:
    from aidem._http.types import ASGIApp, Message, Receive, Scope, Send
    from aidem.persistence import PersistenceLayer

logger = logging.getLogger("aidem")

_LAST: Final = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


class Lifespan:
    """One lifespan; the server may end the loop as soon as it is told of the last step, so the layer closes before."""

    __slots__ = ("_is_open", "_layer", "_receive", "_send")

    def __init__(self, layer: PersistenceLayer, receive: Receive, send: Send) -> None:
        self._layer = layer
        self._receive = receive
        self._send = send
        self._is_open = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the app's own."""
        try:
            await app(scope, self.receive, self.send)
        finally:
            await self._close()

    async def receive(self) -> Message:
        """Open the layer before the app hears that it starts.

        Raises:
            IdempotencyPersistenceLayerError: The layer's settings cannot work; the server is told.
        """
        message = await self._receive()
        if message["type"] == "lifespan.startup":
            self._is_open = True
            try:
                await self._layer.open()
            except IdempotencyPersistenceConnectionError as failure:  # the server must not stay away for that
                logger.warning("the persistence layer cannot be reached yet: %s", failure)
            except Exception as error:
                await self.send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
                raise
        return message

    async def send(self, message: Message) -> None:
        """Close the layer before the server hears that the app has ended."""
        if message["type"] in _LAST:
            await self._close()
        await self._send(message)

    async def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            await self._layer.aclose()
