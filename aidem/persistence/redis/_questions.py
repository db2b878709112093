"""What is asked of a server only now and then: on a connection for this one question."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.redis._errors import CLOSED
from aidem.persistence.redis._line import Line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aidem.persistence.redis._server import Endpoint, Server

T = TypeVar("T")

SHARES_AT_MOST: Final = 4
"""Among how many servers the time is divided, or each of many would have too little of it."""


async def answer_of(server: Endpoint, *command: str, timeout_seconds: float) -> Any:
    """Return what a server replies.

    Args:
        server: Whom to ask.
        command: What to ask.
        timeout_seconds: How long connecting may take, and then how long the answer.

    Raises:
        IdempotencyPersistenceLayerError: It does not, or with an error.
    """
    line = Line(server, timeout_seconds=timeout_seconds)
    try:
        answer = line.query(*command)
        await answer.waiter()
        return answer.result()
    finally:
        await line.abort()


async def first_of(
    servers: Iterable[Server], attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float
) -> T:
    """Try servers one after the other; return what the first one answers that can be reached.

    Args:
        servers: Whom to try.
        attempt: Tries one, within the seconds that it is given.
        timeout_seconds: How long all of it may take; a server that hangs leaves some of it to the next.

    Raises:
        IdempotencyPersistenceLayerError: None of them can be reached, or the first one that can refuses.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    left = list(servers)
    failure = IdempotencyPersistenceConnectionError(CLOSED)
    while left:
        share = max(0.0, deadline - loop.time()) / min(len(left), SHARES_AT_MOST)
        try:
            return await attempt(left.pop(0), share)
        except IdempotencyPersistenceConnectionError as error:
            failure = error
    raise failure
