"""How redis-py connects to a server: it shakes hands, and then its connection is ours."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.redis._errors import connecting_failed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio.connection import AbstractConnection

# What a pool tells its connections and a line does in its own way, or not at all.
_LEFT_OUT: Final = ("retry", "maint_", "oss_cluster_maint_", "health_check_interval")
_OURS: Final[dict[str, Any]] = {"protocol": 2, "socket_timeout": None}


class Taker(asyncio.Protocol):
    """Takes a connection over.

    Attributes:
        stream: What redis-py made of the transport; kept, as its end would close the transport.
    """

    stream: object = None


class Endpoint(Protocol):
    """What can be connected to: a server, or whichever one it takes."""

    async def connect(self, taker: Taker, *, timeout_seconds: float) -> None:
        """Connect whoever takes the connection over.

        Raises:
            IdempotencyPersistenceLayerError: It could not, in this time.
            IdempotencyPersistenceConfigError: It is no server that a connection can be shared to.
        """


class Server:
    """What redis-py needs to know of a server.

    Args:
        connection_class: Which of its connections is made.
        options: What that one is told.

    Attributes:
        host: Its name or address.
        address: Where it is, to be shown.
    """

    def __init__(self, connection_class: type[AbstractConnection], options: Mapping[str, Any]) -> None:
        self._class = connection_class
        self._options = {name: value for name, value in options.items() if not name.startswith(_LEFT_OUT)} | _OURS
        self.host: str = options.get("host", "localhost")
        self.address: str = options.get("path") or f"{self.host}:{options.get('port', 6379)}"

    def at(self, host: str, port: int) -> Server:
        """Return a server that differs in nothing but its place."""
        return Server(self._class, self._options | {"host": host, "port": port})

    async def connect(self, taker: Taker, *, timeout_seconds: float) -> None:
        """Connect."""
        connection: Any = self._class(**self._options)
        try:
            async with asyncio.timeout(timeout_seconds):
                await connection.connect()
            _take_over(connection, taker)
        except IdempotencyPersistenceConfigError:
            raise
        except Exception as error:
            raise connecting_failed(error, address=self.address, timeout_seconds=timeout_seconds) from error
        finally:
            await connection.disconnect(nowait=True)


def _take_over(connection: Any, taker: Taker) -> None:
    """Put the taker in the place of redis-py's own reader and writer.

    The one place that looks inside a connection of redis-py, which offers no other way to share one.
    """
    reader: asyncio.StreamReader = connection._reader  # noqa: SLF001
    stream: asyncio.StreamWriter = connection._writer  # noqa: SLF001
    if not isinstance(cast("object", stream), asyncio.StreamWriter):
        raise IdempotencyPersistenceConfigError(
            f"{type(connection).__module__}.{type(connection).__qualname__}, with which this client connects, leads to "
            "no server; give the layer a client of a real one, or, for tests, use "
            "aidem.persistence.memory.MemoryPersistenceLayer() in its place"
        )
    if reader.at_eof():
        raise ConnectionResetError  # it would not be told to anyone else
    connection._reader = connection._writer = None  # noqa: SLF001 - or it would close them
    taker.stream = stream
    stream.transport.set_protocol(taker)
    taker.connection_made(stream.transport)
