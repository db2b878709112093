"""SQLite's connections of a process that vanishes: their transactions end, as SQLite would see to it.

Where an open transaction stayed, with the write lock, no later process could do anything on the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import threading
    from collections.abc import Collection


def break_connections(
    held: list[object], helpers: Collection[threading.Thread], older: Collection[threading.Thread], patience: float
) -> None:
    """Roll back what is open; close what nobody else can have.

    Args:
        held: What the variables of the functions that have vanished refer to.
        helpers: The threads that have done something for the process.
        older: Those that were there before it.
        patience: How long is waited for a connection at most, in seconds.
    """
    for connection in held:
        if isinstance(connection, sqlite3.Connection):
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed, or another thread's
                connection.rollback()
    aiosqlite = sys.modules.get("aiosqlite")
    if aiosqlite is None or not helpers:
        return
    ids = set(map(id, held))
    for connection in [thing for thing in gc.get_objects() if type(thing) is aiosqlite.Connection]:
        thread = connection._thread  # noqa: SLF001 - there is no other way to know whose it is
        if thread in helpers and thread.is_alive():
            is_its_own = id(connection) in ids and thread not in older
            with contextlib.suppress(TimeoutError, ValueError):  # its thread is busy; it is closed
                asyncio.run(asyncio.wait_for(_end(connection, is_its_own=is_its_own), patience))


async def _end(connection: Any, *, is_its_own: bool) -> None:
    if is_its_own:
        await connection.stop()
    elif connection.in_transaction:
        await connection.rollback()
