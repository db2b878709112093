"""Tells waiters of changes, through redis-py's `PubSub` on one connection, which is open while there are listeners.

A waiter listens, asks for the record, and listens again. So a subscription is kept for a while without listeners, and a
message that comes meanwhile is told when the waiter listens again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any, cast

from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence._errors import copy_of
from aidem.persistence.redis._errors import CLOSED, ReplyError, failure_of, listening_failed

if TYPE_CHECKING:
    from aidem.exceptions import IdempotencyPersistenceLayerError
    from aidem.persistence.redis._server import Endpoint


class _Channel:
    """A channel that is subscribed to.

    Attributes:
        told: Set when a message came, or when the subscription failed.
        listeners: How many listen now.
        failure: Why the subscription failed.
        timer: Ends the subscription when nobody has listened for a while.
    """

    __slots__ = ("failure", "listeners", "timer", "told")

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.listeners = 0
        self.failure: IdempotencyPersistenceLayerError | None = None
        self.timer: asyncio.TimerHandle | None = None


class Listener:
    """The subscriptions of one event loop.

    Args:
        server: Where to listen.
        timeout_seconds: How long connecting may take.
        linger_seconds: How long a subscription is kept without listeners, longer than a waiter pauses. Default: 3.
    """

    def __init__(self, server: Endpoint, *, timeout_seconds: float, linger_seconds: float = 3.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._linger_seconds = linger_seconds
        self._channels: dict[str, _Channel] = {}
        self._is_changed = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._refusal: IdempotencyPersistenceLayerError | None = None

    async def wait(self, name: str, *, timeout_seconds: float) -> None:
        """Return when a message has come on a channel, also since the last call, or after the timeout.

        Raises:
            IdempotencyPersistenceLayerError: The connection was lost or could not be made, or the server refuses.
        """
        if self._refusal is not None:
            raise copy_of(self._refusal)
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel()
            self._is_changed.set()
            if self._listening is None:
                self._start()
        channel.listeners += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await channel.told.wait()
        finally:
            channel.listeners -= 1
            channel.told.clear()
            if channel.timer is not None:
                channel.timer.cancel()
            channel.timer = self._loop.call_later(self._linger_seconds, self._forget, name, channel, context=Context())
        if channel.failure is not None:
            raise copy_of(channel.failure)

    async def abort(self) -> None:
        """Close the connection now; all listeners get an error."""
        self._fail(IdempotencyPersistenceConnectionError(CLOSED))
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])

    # --- Channels ---------------------------------------------------------------------------------------------------

    def _forget(self, name: str, channel: _Channel) -> None:
        if not channel.listeners and self._channels.get(name) is channel:  # else it is in use, or has failed
            del self._channels[name]
            self._is_changed.set()

    def _fail(self, failure: IdempotencyPersistenceLayerError) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.failure = failure
            channel.told.set()

    # --- The connection ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        # In empty contexts: the connection outlives the caller, and must not keep its context variables alive.
        self._listening = self._loop.create_task(self._listen(), name="aidem listens to Redis", context=Context())
        self._listening.add_done_callback(self._ended, context=Context())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._listening = None
        failure = failure_of(task)
        if failure is not None:
            if isinstance(failure.__cause__, ReplyError) and failure.__cause__.code == "NOPERM":
                self._refusal = failure  # an ACL does not change by itself: waiters have to poll
            self._fail(failure)
        elif self._channels:  # they were added while the connection was being closed
            self._start()

    async def _listen(self) -> None:
        """Subscribe and unsubscribe as channels are added and removed, until there are none."""
        pubsub: Any = await self._server.reach(
            lambda server, seconds: server.subscriber(timeout_seconds=seconds), timeout_seconds=self._timeout_seconds
        )
        hearing = asyncio.create_task(self._hear(pubsub))
        hearing.add_done_callback(lambda _: self._is_changed.set())
        subscribed = set[str]()
        try:
            while self._channels:
                if hearing.done():
                    await hearing
                self._is_changed.clear()
                wanted = set(self._channels)
                if wanted - subscribed:
                    await pubsub.subscribe(*wanted - subscribed)
                if subscribed - wanted:
                    await pubsub.unsubscribe(*subscribed - wanted)
                subscribed = wanted
                await self._is_changed.wait()
        except Exception as error:  # noqa: BLE001 - it is raised as an error of ours
            failure = listening_failed(error)
            raise failure from failure.__cause__
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)
            await pubsub.connection.disconnect(nowait=True)
            await pubsub.aclose()

    async def _hear(self, pubsub: Any) -> None:
        """Tell listeners of messages, until the connection is lost."""
        while True:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=None)
            channel = None if message is None else self._channels.get(cast("bytes", message["channel"]).decode())
            if channel is not None:
                channel.told.set()
