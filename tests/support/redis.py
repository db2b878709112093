"""What tests of the Redis layer share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

from redis.asyncio import Redis

from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.testing import claim_of, completed_of
from tests.support.listening import listening
from tests.support.servers import RedisServer

DEADLINE_SECONDS = 30.0


async def acquired(
    layer: RedisPersistenceLayer, key: str = "key", owner: str = "ours", **options: Any
) -> Claimed | Blocked:
    now = time.time()
    record = claim_of(key, now=now, owner=owner, **{"lease_seconds": 50, "kept_seconds": 60} | options)
    return await layer.acquire(record, now=now)


async def claimed(layer: RedisPersistenceLayer, key: str = "key", owner: str = "ours", **options: Any) -> DataRecord:
    answer = await acquired(layer, key, owner, **options)
    assert isinstance(answer, Claimed)
    return answer.record


async def taken_over(layer: RedisPersistenceLayer, found: DataRecord, *, force: bool = False) -> DataRecord:
    now = time.time()
    record = claim_of(found.idempotency_key, now=now, owner="ours again", payload_hash=found.payload_hash)
    answer = await layer.take_over(found, record, now=now, force=force)
    assert answer is not None
    return answer


async def completed(layer: RedisPersistenceLayer, claim: DataRecord, text: str = '{"paid": true}') -> bool:
    now = time.time()
    return await layer.complete(completed_of(claim, now=now, response_data=text, kept_seconds=60), now=now)


@contextlib.asynccontextmanager
async def client_of(server: RedisServer) -> AsyncGenerator[Any]:
    """Give a client that sees what is stored."""
    async with Redis.from_url(server.url, decode_responses=True) as client:
        yield client


async def until(has_happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await has_happened():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.005)


async def stored(client: Any, key: str = "key") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(await client.get(key))
    return fields


class FakeServer:
    """Answers what a function says to each command, None: nothing; and always the same to CLIENT."""

    def __init__(self, answer: Callable[[list[bytes]], bytes | None], greeted: bytes) -> None:
        self.answer = answer
        self._greeted = greeted
        self.port = 0
        self.commands: list[list[bytes]] = []
        self.open_connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def say(self, reply: bytes) -> None:
        """Say something that nobody asked for, to everyone."""
        for writer in self._writers:
            writer.write(reply)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.open_connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                command = await _command(reader)
                self.commands.append(command)
                reply = self._greeted if command[0] == b"CLIENT" else self.answer(command)
                if reply is not None:
                    writer.write(reply)
                    await writer.drain()
        self.open_connections -= 1
        writer.close()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def _command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    arguments = list[bytes]()
    for _ in range(count):
        length = int((await reader.readuntil(b"\r\n"))[1:])
        arguments.append((await reader.readexactly(length + 2))[:-2])
    return arguments


@contextlib.asynccontextmanager
async def fake_server(
    answer: Callable[[list[bytes]], bytes | None], *, greeted: bytes = b"+OK\r\n"
) -> AsyncGenerator[FakeServer]:
    fake = FakeServer(answer, greeted)
    async with listening(fake.serve) as fake.port:
        yield fake


@contextlib.contextmanager
def no_complaints() -> Iterator[list[dict[str, Any]]]:
    """Collect what the loop is told of errors that nobody looked at; there must be none."""
    complaints = list[dict[str, Any]]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    yield complaints
    loop.set_exception_handler(None)
    assert complaints == []


FORKING = """
import asyncio, os, sys
from aidem._rules.record import DataRecord, RecordStatus
from aidem.persistence.redis import RedisPersistenceLayer

layer = RedisPersistenceLayer(sys.argv[1])

async def acquire(key, owner):
    claim = DataRecord(idempotency_key=key, status=RecordStatus.INPROGRESS, owner=owner)
    return type(await layer.acquire(claim, now=0)).__name__

loop = asyncio.new_event_loop()
loop.run_until_complete(acquire("parent", "parent"))
for number in range(3):
    child = os.fork()
    if child == 0:
        print(asyncio.run(asyncio.wait_for(acquire(f"child {number}", "child"), 20)), flush=True)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print(loop.run_until_complete(acquire(f"child {number}", "parent")), flush=True)
loop.run_until_complete(layer.aclose())
loop.close()
"""
