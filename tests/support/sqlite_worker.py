"""What processes of their own do with a layer: `python sqlite_worker.py COMMAND PATH …`."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aidem._rules.lifecycle import Claimed
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import claim_of, completed_of


def layer_at(path: str) -> SQLitePersistenceLayer:
    return SQLitePersistenceLayer(path, busy_timeout_seconds=30)


async def claim(layer: SQLitePersistenceLayer, key: str) -> bool:
    """Claim a key for this process, for an hour; answers whether it could."""
    now = layer.clock()
    record = claim_of(key, now=now, owner=f"{os.getpid()}", lease_seconds=3600, kept_seconds=7200)
    return isinstance(await layer.acquire(record, now=now), Claimed)


async def contend(path: str, count: str) -> None:
    """Claim the same keys as others do, having waited for the word; prints which were ours."""
    layer = layer_at(path)
    os.write(1, b"ready\n")
    sys.stdin.readline()
    claims = await asyncio.gather(*(claim(layer, f"key-{number}") for number in range(int(count))))
    os.write(1, " ".join(map(str, itertools.compress(range(int(count)), claims))).encode())
    await layer.aclose()


async def write(path: str) -> None:
    """Complete one key after another until killed; prints each once it is answered."""
    layer = layer_at(path)

    async def write_some(writer: int) -> None:
        for number in itertools.count():
            now = layer.clock()
            key = f"{writer}-{number}"
            answer = await layer.acquire(claim_of(key, now=now, kept_seconds=7200), now=now)
            if await layer.complete(completed_of(answer.record, now=now, kept_seconds=7200), now=now):
                os.write(1, f"{key}\n".encode())

    await asyncio.gather(*(write_some(writer) for writer in range(8)))


async def leave(path: str) -> None:
    """Ask, and leave without waiting for the answer or closing anything."""
    layer = layer_at(path)
    await layer.open()
    now = layer.clock()
    for number in range(1000):
        layer.acquire(claim_of(f"key-{number}", now=now, kept_seconds=7200), now=now)  # type: ignore[unused-awaitable]


LEFT_OPEN = list[SQLitePersistenceLayer]()


async def leave_open(path: str) -> None:
    """Leave a layer to the end of the interpreter."""
    layer = layer_at(path)
    await claim(layer, "key")
    LEFT_OPEN.append(layer)


def repair(path: str) -> None:
    """Break the index of the log and hold the locks of a process that repairs it, until told to let go."""
    write_lock, recover_lock, header_size = 120, 122, 96  # https://sqlite.org/walformat.html#wal_locks
    with Path(f"{path}-shm").open("r+b", buffering=0) as index:
        fcntl.lockf(index, fcntl.LOCK_EX, 1, write_lock)
        fcntl.lockf(index, fcntl.LOCK_EX, 1, recover_lock)
        index.write(bytes(header_size))
        os.write(1, b"ready\n")
        sys.stdin.readline()


def has_open(path: str) -> bool:
    return any(os.path.realpath(link).startswith(path) for link in Path("/proc/self/fd").iterdir())


def in_child(path: str, layer: SQLitePersistenceLayer, key: str) -> int:
    """Use the parent's layer; answers an exit status."""
    if has_open(path):
        return 2  # SQLite forbids to inherit
    if not asyncio.run(claim(layer, key)) or asyncio.run(claim(layer, "parent")):
        return 3
    asyncio.run(layer.aclose())
    return 0


def fork(path: str) -> None:
    """Fork again and again while a thread writes and reads; parent and children use the same layer."""
    layer = layer_at(path)
    asyncio.run(claim(layer, "parent"))
    if not has_open(path):
        sys.exit("the parent must have the file open, or nothing is shown")
    stop = threading.Event()

    async def keep_writing() -> None:
        for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
            await asyncio.gather(*(claim(layer, f"thread-{number}-{part}") for part in range(8)))

    writer = threading.Thread(target=asyncio.run, args=[keep_writing()], daemon=True)
    writer.start()
    for number in range(20):
        child = os.fork()
        if child == 0:
            sys.exit(in_child(path, layer, f"child-{number}"))
        _, status = os.waitpid(child, 0)
        if status != 0:
            stop.set()
            sys.exit(f"child {number}: {os.waitstatus_to_exitcode(status)}")
    stop.set()
    writer.join()
    asyncio.run(layer.aclose())


COROUTINES: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "contend": contend,
    "write": write,
    "leave": leave,
    "leave_open": leave_open,
}

if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command in COROUTINES:
        asyncio.run(COROUTINES[command](*arguments))
    else:
        {"fork": fork, "repair": repair}[command](*arguments)
