"""The lines of one layer: one per event loop and process, closed with its loop."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aidem.persistence._redis_line import Line


class Lines:
    """Finds the line of the running event loop."""

    def __init__(self, make: Callable[[], Line]) -> None:
        self._make = make
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[Line, AsyncGenerator[None]]] = {}
        self._lock = threading.Lock()
        _all.add(self)

    def here(self) -> Line:
        """Return the line of this loop, made where it is the first time."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            line = self._make()
            found = line, _closed_with_its_loop(line)
            with self._lock:
                self._by_loop = {other: kept for other, kept in self._by_loop.items() if not other.is_closed()}
                self._by_loop[loop] = found
        return found[0]

    async def aclose(self) -> None:
        """Close the line of this loop; other loops close theirs when they end."""
        with self._lock:
            found = self._by_loop.pop(asyncio.get_running_loop(), None)
        if found is not None:
            line, guard = found
            await line.aclose()
            await guard.aclose()

    def leave_to_parent(self) -> None:
        """Forget everything, in a forked child: the sockets are the parent's, and nothing may be said on them."""
        _inherited.append(self._by_loop)
        self._by_loop = {}
        self._lock = threading.Lock()


def _closed_with_its_loop(line: Line) -> AsyncGenerator[None]:
    """Return what closes the line when it is dropped, and when its loop shuts its asynchronous generators down."""
    guard = _guard(line)
    with suppress(StopIteration):
        guard.asend(None).send(None)  # up to its yield: from here on the loop knows it
    return guard


async def _guard(line: Line) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await line.abort()


_all: Final[WeakSet[Lines]] = WeakSet()
_inherited: Final[list[object]] = []  # kept, as what finalizes a connection would close it


def _after_fork_in_child() -> None:
    for lines in _all:
        lines.leave_to_parent()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork_in_child)
