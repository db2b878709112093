"""A TCP proxy between a client and a server, whose faults are switched on and off while connections are open.

    async with Proxy.to(port) as proxy:
        client = connect("127.0.0.1", proxy.port)
        proxy.drop(replies=True)            # requests reach the server, what it answers is thrown away
        ...
        assert proxy.dropped.replies > 0    # the fault happened
        proxy.heal()

Faults hold for every connection, open or new, until `heal`:

- `proxy.drop(requests=True)`, `proxy.drop(replies=True)`: throw away what comes from that side; both may be given.
- `proxy.delay(seconds)`: everything arrives at least that much later, both ways, in order.
- `proxy.hold()`: nothing passes in either direction; `heal` lets what was held through.
- `proxy.cut()`: end all open connections now, once; `proxy.refuse()`: and every new one too.
- `proxy.cut_after_reply_is_dropped()`: throw away the next reply, then end its connection: applied, reply lost.

`proxy.forwarded`, `proxy.dropped` and `proxy.held` count bytes (`.requests`, `.replies`), `proxy.connections` counts
connections made, and `proxy.open_connections` those that are open; `proxy.requests` holds each chunk a client wrote, in
order, for tests that count what went over the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Self

from tests.support.listening import listening

CHUNK_BYTES = 1 << 16

Side = Literal["requests", "replies"]


@dataclass
class Bytes:
    """How many bytes went each way."""

    requests: int = 0
    replies: int = 0

    def add(self, side: Side, count: int) -> None:
        setattr(self, side, getattr(self, side) + count)


@dataclass
class Proxy:
    """Listens on a free port of its own, `port`, and passes on what it gets."""

    server_port: int
    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    forwarded: Bytes = field(default_factory=Bytes)
    dropped: Bytes = field(default_factory=Bytes)
    held: Bytes = field(default_factory=Bytes)
    _dropping: set[Side] = field(default_factory=set)
    _delay_seconds: float = 0.0
    _refusing: bool = False
    _cutting_at_reply: bool = False
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = field(default_factory=set)

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, server_port: int) -> AsyncGenerator[Self]:
        """Serve a proxy to a port of this machine."""
        proxy = cls(server_port)
        proxy._open.set()
        async with listening(proxy._accept) as proxy.port:
            yield proxy

    @property
    def open_connections(self) -> int:
        return len(self._pairs)

    # --- Faults -----------------------------------------------------------------------------------------------------

    def drop(self, *, requests: bool = False, replies: bool = False) -> None:
        if requests:
            self._dropping.add("requests")
        if replies:
            self._dropping.add("replies")

    def delay(self, seconds: float) -> None:
        self._delay_seconds = seconds

    def hold(self) -> None:
        self._open.clear()

    def cut(self) -> None:
        for writers in self._pairs:
            for writer in writers:
                writer.transport.abort()

    def refuse(self) -> None:
        self._refusing = True
        self.cut()

    def cut_after_reply_is_dropped(self) -> None:
        self._cutting_at_reply = True

    def heal(self) -> None:
        """End every fault."""
        self._dropping.clear()
        self._delay_seconds = 0.0
        self._refusing = self._cutting_at_reply = False
        self._open.set()

    # --- Connections ------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, server_writer)
        self._pairs.add(pair)
        ways: list[tuple[Side, asyncio.StreamReader, asyncio.StreamWriter]] = [
            ("requests", reader, server_writer),
            ("replies", server_reader, writer),
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                for way in ways:
                    tasks.create_task(self._pass_on(*way))
        except asyncio.CancelledError:
            server_writer.transport.abort()
            raise
        finally:
            self._pairs.discard(pair)

    async def _pass_on(self, side: Side, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                if not self._open.is_set():
                    self.held.add(side, len(chunk))
                await self._open.wait()
                await asyncio.sleep(self._delay_seconds)
                if side == "requests":
                    self.requests.append(chunk)
                if side == "replies" and self._cutting_at_reply:
                    self._cutting_at_reply = False
                    self.dropped.add(side, len(chunk))
                    break
                if side in self._dropping:
                    self.dropped.add(side, len(chunk))
                    continue
                self.forwarded.add(side, len(chunk))
                target.write(chunk)
                await target.drain()
        target.close()
