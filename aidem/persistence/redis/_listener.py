"""Hears of changes by pub/sub, on a connection of its own that is there while somebody listens.

A subscription outlives its listener for a while: a waiter listens, looks at the record, and listens again, and what
happened while it looked is told when it comes back.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Final, cast

import hiredis

from aidem.exceptions import IdempotencyPersistenceConnectionError, IdempotencyPersistenceLayerError
from aidem.persistence.redis._command import pack
from aidem.persistence.redis._errors import CLOSED, LOST, ReplyError, copy_of, failure_of, translated
from aidem.persistence.redis._server import Taker

if TYPE_CHECKING:
    from aidem.persistence.redis._server import Endpoint

_INCOMPLETE: Final = object()


class _Channel:
    """A channel that is subscribed to.

    Attributes:
        told: Set when something was said on it, or when it broke.
        listeners: How many listen now.
        failure: Why it broke.
        timer: Ends the subscription when nobody has listened for a while.
    """

    __slots__ = ("failure", "listeners", "timer", "told")

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.listeners = 0
        self.failure: IdempotencyPersistenceLayerError | None = None
        self.timer: asyncio.TimerHandle | None = None


class Listener(Taker):
    """The subscriptions of one event loop.

    Args:
        server: Where to listen.
        timeout_seconds: How long connecting may take.
        linger_seconds: How long a subscription is kept without listeners: longer than a waiter looks away.
    """

    def __init__(self, server: Endpoint, *, timeout_seconds: float, linger_seconds: float = 3.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._linger_seconds = linger_seconds
        self._channels: dict[str, _Channel] = {}
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_ending = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._reader = hiredis.Reader()
        self._refusal: ReplyError | None = None

    async def wait(self, name: str, *, timeout_seconds: float) -> None:
        """Return when something was said on a channel, also since the last call, or after the timeout.

        Raises:
            IdempotencyPersistenceLayerError: It cannot be listened to.
        """
        if self._refusal is not None:
            raise translated(self._refusal)
        channel = self._channels.get(name) or self._subscribe(name)
        channel.listeners += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await channel.told.wait()
        finally:
            self._leave(name, channel)
        if channel.failure is not None:
            raise copy_of(channel.failure)

    async def abort(self) -> None:
        """Close the connection now; who listens is told so."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        self._break(IdempotencyPersistenceConnectionError(CLOSED))
        if self._transport is not None:
            self._end()
            await self._closed

    # --- Channels ---------------------------------------------------------------------------------------------------

    def _subscribe(self, name: str) -> _Channel:
        channel = self._channels[name] = _Channel()
        if self._transport is None:
            self._connect()
        else:
            self._send("SUBSCRIBE", name)
        return channel

    def _leave(self, name: str, channel: _Channel) -> None:
        channel.listeners -= 1
        channel.told.clear()
        if channel.timer is not None:
            channel.timer.cancel()
        channel.timer = self._loop.call_later(self._linger_seconds, self._forget, name, channel, context=Context())

    def _forget(self, name: str, channel: _Channel) -> None:
        if channel.listeners or self._channels.get(name) is not channel:
            return  # it is in use, and forgotten after that; or it broke
        del self._channels[name]
        if self._channels:
            self._send("UNSUBSCRIBE", name)
        else:
            self._end()

    def _break(self, failure: IdempotencyPersistenceLayerError) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.failure = failure
            channel.told.set()

    # --- The connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._connecting is None:
            connecting = self._server.connect(self, timeout_seconds=self._timeout_seconds)
            # In an empty context: the connection outlives the caller, and must not keep what that has in its own.
            self._connecting = self._loop.create_task(connecting, name="aidem listens to Redis", context=Context())
            self._connecting.add_done_callback(self._connecting_ended)

    def _connecting_ended(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        failure = failure_of(task)
        if failure is not None:
            self._break(failure)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Subscribe to what is asked for by now."""
        self._transport = cast("asyncio.Transport", transport)
        self._closed = self._loop.create_future()
        self._is_ending = False
        self._reader = hiredis.Reader(replyError=ReplyError, notEnoughData=_INCOMPLETE)
        if self._channels:
            self._send("SUBSCRIBE", *self._channels)
        else:
            self._end()  # nobody listens any more

    def data_received(self, data: bytes) -> None:
        """Wake who listens."""
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._take(reply)
        except hiredis.ProtocolError:
            self._refused(ReplyError("NONSENSE"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who listens that it hears nothing more; connect again for those who came while it was being ended."""
        self._transport = None
        self._closed.set_result(None)
        if not self._is_ending:
            failure = IdempotencyPersistenceConnectionError(LOST)
            failure.__cause__ = exc
            self._break(failure)
        elif self._channels:
            self._connect()

    def _end(self) -> None:
        if self._transport is not None:
            self._is_ending = True
            self._transport.abort()

    def _take(self, reply: object) -> None:
        match reply:
            case [b"message", bytes(name), bytes()]:
                self._tell(name.decode())
            case ReplyError():
                self._refused(reply)
            case _:
                pass  # a subscription began or ended

    def _refused(self, reply: ReplyError) -> None:
        if reply.code == "NOPERM":
            self._refusal = reply  # it will not change: whoever waits has to poll
        self._break(translated(reply))
        self._end()

    def _tell(self, name: str) -> None:
        channel = self._channels.get(name)
        if channel is not None:
            channel.told.set()

    def _send(self, *arguments: str) -> None:
        if self._transport is not None and not self._is_ending:
            self._transport.write(pack(arguments))
