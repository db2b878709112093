"""The primary that the sentinels name: they are asked each time a connection is made.

redis-py's `Sentinel` would save about 20 lines, and bring a pool of connections where each event loop needs only one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.redis._errors import ReplyError
from aidem.persistence.redis._questions import answer_of, first_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem.persistence.redis._server import Server, Taker

PAUSE_SECONDS: Final = 0.1
"""How long a failover is left alone before the sentinels are asked again."""


class Primary:
    """The primary of a service, whichever server that is.

    Args:
        sentinels: Who knows it.
        service: What they call it.
        like: A server that differs from it in nothing but its place.
        other_sentinels: How many others a sentinel must see, to be believed.
    """

    def __init__(self, sentinels: Sequence[Server], *, service: str, like: Server, other_sentinels: int = 0) -> None:
        self._sentinels = sentinels
        self._service = service
        self._like = like
        self._other_sentinels = other_sentinels

    async def connect(self, taker: Taker, *, timeout_seconds: float) -> None:
        """Connect, once a failover is over if there is one."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        last_start = deadline - timeout_seconds / 4
        failure: IdempotencyPersistenceConnectionError | None = None
        while True:
            try:
                primary = await first_of(self._sentinels, self._named_by, timeout_seconds=deadline - loop.time())
                # A server that hangs leaves the sentinels time to name another.
                await primary.connect(taker, timeout_seconds=(deadline - loop.time()) / 2)
            except IdempotencyPersistenceConnectionError as error:
                if failure is None or loop.time() < deadline:
                    failure = error  # who runs out of time learns less than is known by then
                if loop.time() + PAUSE_SECONDS > last_start:
                    raise failure from failure.__cause__
            else:
                return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _named_by(self, sentinel: Server, timeout_seconds: float) -> Server:
        try:
            reply = await answer_of(sentinel, "SENTINEL", "MASTER", self._service, timeout_seconds=timeout_seconds)
        except IdempotencyPersistenceLayerError as error:
            raise self._refusal(sentinel, error) from error
        fields: dict[bytes, bytes] = dict(zip(reply[::2], reply[1::2], strict=True))
        if {b"s_down", b"o_down"} & {*fields[b"flags"].split(b",")}:
            raise IdempotencyPersistenceConnectionError(
                f"sentinel {sentinel.address} sees the primary of {self._service!r} down; wait for the failover to end"
            )
        if int(fields[b"num-other-sentinels"]) < self._other_sentinels:
            raise IdempotencyPersistenceConnectionError(
                f"sentinel {sentinel.address} is cut off from the others; see min_other_sentinels"
            )
        return self._like.at(fields[b"ip"].decode(), int(fields[b"port"]))

    def _refusal(self, sentinel: Server, error: IdempotencyPersistenceLayerError) -> IdempotencyPersistenceLayerError:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code in {"ERR", "IDONTKNOW"}:
            return IdempotencyPersistenceConfigError(
                f"Redis at {sentinel.address} is not a sentinel that knows a service {self._service!r}"
            )
        return type(error)(f"sentinel {sentinel.address}: {error}")
