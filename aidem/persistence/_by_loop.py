"""What a layer has for each event loop, such as its connections: closed with the loop, and not used after a fork."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar
from weakref import WeakSet

from aidem._runtime.threads import Lock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class Closable(Protocol):
    """What belongs to one event loop."""

    async def aclose(self) -> None:
        """Finish what was asked so far, then close."""
        ...

    async def abort(self) -> None:
        """Close now."""
        ...


T = TypeVar("T", bound=Closable)


class ByLoop(Generic[T]):
    """Finds what belongs to the running event loop, and makes it where it is the first time."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None]]] = {}
        self._lock = Lock()
        _all.add(self)

    def here(self) -> T:
        """Return that of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            made = self._make()
            # Aborts it when it is dropped, and when the loop shuts its asynchronous generators down.
            guard = _guard(made)
            with suppress(StopIteration):
                guard.asend(None).send(None)  # up to its yield: from here on the loop knows it
            found = made, guard
            with self._lock:
                self._by_loop = {other: kept for other, kept in self._by_loop.items() if not other.is_closed()}
                self._by_loop[loop] = found
        return found[0]

    async def aclose(self) -> None:
        """Close that of the running loop; other loops close theirs when they end."""
        with self._lock:
            found = self._by_loop.pop(asyncio.get_running_loop(), None)
        if found is not None:
            closable, guard = found
            await closable.aclose()
            await guard.aclose()

    def leave_to_parent(self) -> None:
        """Forget everything, in a forked child: the sockets are the parent's, and nothing may be said on them."""
        _inherited.append(self._by_loop)
        self._by_loop = {}
        self._lock = Lock()


async def _guard(closable: Closable) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await closable.abort()


_all: Final[WeakSet[ByLoop[Any]]] = WeakSet()
_inherited: Final[list[object]] = []  # kept, as what finalizes a connection would close it


def _after_fork_in_child() -> None:
    for by_loop in _all:
        by_loop.leave_to_parent()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork_in_child)
