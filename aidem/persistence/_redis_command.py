"""A command: the bytes to send, who waits for the answer, and how a reply becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import hiredis

from aidem.persistence._redis_errors import ReplyError, translated

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._cancellation import SettlingFuture
    from aidem.persistence._redis_scripts import Script

T = TypeVar("T")

pack: Final[Callable[[tuple[str | int, ...]], bytes]] = cast("Any", hiredis).pack_command


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
        arguments: tuple[str | int, ...],
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
            self.packed = pack(arguments)
        else:
            self.packed = pack(("EVALSHA", script.sha, *arguments))

    def wants_source(self, reply: object) -> bool:
        """Whether the server has forgotten the script; `packed` then holds it in full."""
        script = self._script
        if script is None or not isinstance(reply, ReplyError) or reply.code != "NOSCRIPT":
            return False
        self.packed = pack(("EVAL", script.source, *self._script_arguments))
        self._script = None
        return True

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
        self.future.exception()
