"""How redis-py connects to a server: it shakes hands, and then its connection is ours."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from aidem.persistence._redis_errors import connecting_failed

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection, ConnectionPool

# What a pool tells its connections and a line does in its own way, or not at all.
_LEFT_OUT: Final = ("retry", "maint_", "oss_cluster_maint_", "health_check_interval")
_OURS: Final[dict[str, Any]] = {"protocol": 2, "socket_timeout": None}


class Taker(asyncio.Protocol):
    """Takes a connection over.

    Attributes:
        stream: What redis-py made of the transport; kept, as its end would close the transport.
    """

    stream: object = None


class Server:
    """What redis-py needs to know of a server.

    Attributes:
        address: Where it is, to be shown.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        kwargs = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith(_LEFT_OUT)}
        self._class: type[AbstractConnection] = pool.connection_class
        self._kwargs: dict[str, Any] = kwargs | _OURS
        self.address = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"

    async def connect(self, taker: Taker, *, timeout_seconds: float) -> None:
        """Connect whoever takes the connection over.

        Raises:
            IdempotencyPersistenceLayerError: It could not, in this time.
        """
        connection: Any = self._class(**self._kwargs)
        try:
            async with asyncio.timeout(timeout_seconds):
                await connection.connect()
            _take_over(connection, taker)
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
    if reader.at_eof():
        raise ConnectionResetError  # it would not be told to anyone else
    connection._reader = connection._writer = None  # noqa: SLF001 - or it would close them
    taker.stream = stream
    stream.transport.set_protocol(taker)
    taker.connection_made(stream.transport)
