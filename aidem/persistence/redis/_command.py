"""A command: the bytes to send, who waits for the answer, and how a reply becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import hiredis

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.redis._errors import ReplyError
    from aidem.persistence.redis._scripts import Script

T = TypeVar("T")

pack: Final[Callable[[tuple[str | int, ...]], bytes]] = cast("Any", hiredis).pack_command


class Command(Generic[T]):
    """A command that was asked for.

    Attributes:
        future: What its answer goes to.
        packed: The bytes to send.
        asked_at: In seconds of the loop's clock.
    """

    __slots__ = ("_arguments", "_read", "_script", "asked_at", "future", "packed")

    def __init__(
        self,
        future: UncancellableFuture[T],
        arguments: tuple[str | int, ...],
        read: Callable[[Any], T],
        script: Script | None = None,
    ) -> None:
        self.future = future
        self.packed: bytes
        self.asked_at = future.get_loop().time()
        self._read = read
        self._script = script
        self._arguments = arguments
        if script is None:
            self.packed = pack(arguments)
        else:
            self.packed = pack(("EVALSHA", script.sha, *arguments))

    @property
    def key(self) -> str:
        """The key that it is about; a script is told first how many there are."""
        return str(self._arguments[1])

    def wants_source(self, error: ReplyError) -> bool:
        """Whether the server has forgotten the script; `packed` then holds it in full."""
        return error.code == "NOSCRIPT" and self.in_full()

    def in_full(self) -> bool:
        """Let `packed` hold the script itself; answer whether it held only its digest."""
        script, self._script = self._script, None
        if script is None:
            return False
        self.packed = pack(("EVAL", script.source, *self._arguments))
        return True

    def answer(self, reply: object) -> None:
        """Settle it with the reply of the server."""
        try:
            answer = self._read(reply)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            self.fail(error)
        else:
            self.future.settle(answer)

    def fail(self, error: Exception) -> None:
        """Settle it with an error."""
        self.future.fail(error)


class Question(Command[Any]):
    """What is asked of one server, and of no other that may take its place."""

    __slots__ = ()


class Asking(Command[Any]):
    """What lets the next command in at a node that is importing its slot; it succeeds or fails with that command."""

    __slots__ = ()

    def __init__(self, command: Command[Any]) -> None:
        super().__init__(command.future, ("ASKING",), lambda reply: reply)

    def answer(self, reply: object) -> None:
        """Leave it to the reply that comes next."""
