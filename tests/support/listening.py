"""Servers of a test's own, in its event loop.

async with listening(serve) as port:        # `serve` gets reader and writer, as from `asyncio.start_server`
    await asyncio.open_connection("127.0.0.1", port)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

# Until a connection that the system has accepted has a task that serves it, and until an aborted one is closed.
TURNS = 8


@contextlib.asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncGenerator[int]:
    """Serve on a port, which is given; in the end no connection is open, not even one that was made just then."""
    writers = dict[asyncio.Task[None] | None, asyncio.StreamWriter]()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers[asyncio.current_task()] = writer
        with contextlib.suppress(asyncio.CancelledError):
            await serve(reader, writer)

    async def turn() -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await turn()
        for task, writer in writers.items():
            writer.transport.abort()
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in writers if task is not None), return_exceptions=True)
        await turn()
