"""One connection that all operations of an event loop share: commands go out packed, replies come back in order.

An idle connection is written to at once. While replies are outstanding, what is asked in one turn of the loop goes out
together. There is no task per operation: whoever waits, waits for a `SettlingFuture`, so a caller that is cancelled
leaves its place in the line, and nobody gets another's reply.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import hiredis

from aidem._cancellation import SettlingFuture
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence._redis_errors import ReplyError, translated

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Protocol

    from aidem.persistence._redis_scripts import Script

    class Connect(Protocol):
        """Connects a protocol to the server; raises errors of aidem."""

        def __call__(self, wire: Wire) -> Awaitable[asyncio.Transport]: ...


T = TypeVar("T")

_INCOMPLETE: Final = object()
IDLE_SECONDS: Final = 1.0
"""After how long a connection is looked at before it is used: the server may have closed it, and the process slept."""


class Command(Generic[T]):
    """A command that was asked for.

    Attributes:
        future: What its answer goes to.
        packed: The bytes to send.
        asked_at: In seconds of the loop's clock.
    """

    __slots__ = ("_read", "_script", "_script_arguments", "asked_at", "future", "packed")

    def __init__(
        self,
        future: SettlingFuture[T],
        arguments: tuple[str | bytes | int, ...],
        read: Callable[[Any], T],
        script: Script | None = None,
    ) -> None:
        self.future = future
        self.packed: bytes
        self.asked_at = future.get_loop().time()
        self._read = read
        self._script = script
        self._script_arguments = arguments
        if script is None:
            self.packed = hiredis.pack_command(arguments)
        else:
            self.packed = hiredis.pack_command(("EVALSHA", script.sha, *arguments))

    def wants_source(self, reply: object) -> bool:
        """Whether the server has forgotten the script; `packed` then holds it in full."""
        script = self._script
        if script is None or not isinstance(reply, ReplyError) or reply.code != "NOSCRIPT":
            return False
        self.packed = hiredis.pack_command(("EVAL", script.source, *self._script_arguments))
        self._script = None
        return not self.future.done()

    def answer(self, reply: object) -> None:
        """Settle it with the reply of the server."""
        if isinstance(reply, ReplyError):
            self.fail(translated(reply))
            return
        try:
            answer = self._read(reply)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            self.fail(error)
        else:
            self.future.settle(answer)

    def fail(self, error: Exception) -> None:
        """Settle it with an error; nobody may be there any more to look at it."""
        self.future.fail(error)
        if self.future.done():
            self.future.exception()
